"""Automatic evaluation (section 3.3.2): what is counted and computed of replies and of dialogues.

1. `read_systems` takes from the files what each system said. What was given never counts.
2. `Compared` holds what must be the same for all systems: the size that variety is compared at, the
   similarity from which on two replies are near each other, the sentence embeddings.
3. `evaluate` makes the figures of each system and their intervals.

A case is what is drawn again for an interval: a dialogue, or a context with all replies to it. Words are
those of `plato2.words.split_words`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torchmetrics.functional.text.rouge import rouge_score
from torchmetrics.utilities import dim_zero_cat

from plato2.config import UserError, install
from plato2.evaluate.metrics import Coverage, Distinct, SelfRepetition
from plato2.evaluate.options import AutomaticOptions, Kind
from plato2.evaluate.results import Figure, Input, Measure, Result, inputs, text
from plato2.evaluate.said import System, Utterance, by_case, by_dialogue, read_systems
from plato2.evaluate.scores import (
    WIDTH,
    Encoder,
    Kept,
    Likelihood,
    Watch,
    is_english,
    offensive_by_classifier,
    unwatched,
)
from plato2.metrics import bootstrap, wilson
from plato2.talk.safety import WordRule
from plato2.words import split_words

DRAWS = 20
"""Subsets of a system's utterances that distinct is measured on at equal size."""
REPEATED = 3
"""Words in a row that a speaker should not say again."""
OTHERS = 50
"""Dialogues, at most, that each dialogue is compared with for self-BLEU."""

MEASURES = {
    "utterances": Measure(label="utterances", digits=0),
    "words": Measure(label="words", digits=0),
    "length": Measure(label="words per utterance", digits=1),
    "wordless": Measure(label="share without words", better="low"),
    "distinct_1": Measure(label="distinct-1", better="high"),
    "distinct_2": Measure(label="distinct-2", better="high"),
    "matched_1": Measure(label="distinct-1 at equal size", better="high"),
    "matched_2": Measure(label="distinct-2 at equal size", better="high"),
    "adjusted": Measure(label="expectation-adjusted distinct", better="high"),
    "turns": Measure(label="utterances per dialogue", digits=1),
    "repeated_3": Measure(label="trigrams said before", better="low"),
    "repeated": Measure(label="utterances said before", better="low"),
    "self_bleu": Measure(label="self-BLEU between dialogues", digits=1, better="low"),
    "candidates_self_bleu": Measure(label="self-BLEU between candidates", digits=1, better="low"),
    "bleu": Measure(label="BLEU-4", digits=2, better="high"),
    "rouge_l": Measure(label="ROUGE-L", digits=1, better="high"),
    "chrf": Measure(label="chrF", digits=1, better="high"),
    "similarity": Measure(label="similarity to the nearest reference", better="high"),
    "coverage": Measure(label="references that some candidate is near", better="high"),
    "topic": Measure(label="similarity to the start", better="high"),
    "topic_late": Measure(label="the same, later half", better="high"),
    "perplexity": Measure(label="perplexity per token", digits=1, better="low"),
    "nats_word": Measure(label="nats per word", digits=2, better="low"),
    "nats_byte": Measure(label="nats per byte", better="low"),
    "offensive_list": Measure(label="offensive, by word lists", better="low"),
    "offensive_classifier": Measure(label="offensive, by the classifier", better="low"),
    "offensive_candidates": Measure(label="offensive candidates, by word lists", better="low"),
}
"""All that is measured, in the order of the table."""
SIZES = ("utterances", "words")
"""They are not drawn."""


# ------------------------------------------------------------------------------------------- the same for all


class Compared:
    """What the systems of one evaluation have in common."""

    def __init__(
        self,
        kind: Kind,
        compared: dict[str, System],
        options: AutomaticOptions,
        out: Path | None = None,
        watch: Watch = unwatched,
    ) -> None:
        self.kind, self.systems, self.options, self.watch = kind, compared, options, watch
        self.bleu = _bleu()
        self.lists = [WordRule.read(name) for name in options.offensive]
        self.kept = {
            name: Kept(out and out.with_name(f"{out.name}.{name}"), width)
            for name, width in (("embeddings", WIDTH), ("nats", 2))
        }
        self.encoder = Encoder(options.device) if options.embedding else None
        self.likelihood = Likelihood(options.model, options.device) if options.model else None

    @cached_property
    def match_words(self) -> int:
        """Words that distinct is compared at; 0 where there is nothing to compare."""
        sizes = [n for said in self.systems.values() if (n := sum(len(one.words) for one in said))]
        return self.options.match_words or (min(sizes) if len(self.systems) > 1 and sizes else 0)

    @cached_property
    def others(self) -> int:
        """Dialogues that each is compared with for self-BLEU: the same number for all systems."""
        numbers = [len(_dialogues_as_words(said)) for said in self.systems.values()]
        return min([OTHERS, *(n - 1 for n in numbers if n > 1)], default=0) if max(numbers) > 1 else 0

    @cached_property
    def k(self) -> int:
        """Candidates that coverage is compared at: as many as the system has that has the fewest."""
        most = [max((len(one.candidates) for one in said), default=0) for said in self.systems.values()]
        return min((n for n in most if n), default=0)

    @cached_property
    def contexts(self) -> list[Utterance]:
        """One utterance of each context that has several references."""
        found = {
            (one.before, one.references): one
            for said in self.systems.values()
            for one in said
            if len(one.references) > 1
        }
        return list(found.values())

    @cached_property
    def people(self) -> np.ndarray:
        """Of each reference, its similarity to the nearest other one of its context."""
        found = [np.zeros(0)]
        for one in self.contexts:
            similarity = self.similarity(one.references, one.references)
            np.fill_diagonal(similarity, -np.inf)
            found.append(similarity.max(axis=1))
        return np.concatenate(found)

    @cached_property
    def near(self) -> float:
        """From which similarity on a candidate is near a reference; nan without references."""
        if self.options.near is not None:
            return self.options.near
        return float(np.median(self.people)) if len(self.people) else math.nan

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """Of all texts that are compared."""
        texts: dict[str, None] = {}
        for said in self.systems.values():
            for one in said:
                if self.kind == "dialogues":
                    texts |= dict.fromkeys([one.text, one.start or ""])
                elif one.references:
                    several = one.candidates if len(one.references) > 1 else ()
                    texts |= dict.fromkeys([one.text, *one.references, *several])
        assert self.encoder is not None
        name = self.encoder.name
        found = self.kept["embeddings"].of(
            list(texts), lambda text: f"{name} {text}", self.encoder, "embeddings", self.watch
        )
        return dict(zip(texts, found, strict=True))

    def similarity(self, some: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Cosines (some, others); 0 for a text without words."""
        a, b = (np.array([self.embeddings[t] for t in texts]).reshape(-1, WIDTH) for texts in (some, others))
        return a @ b.T

    def settings(self) -> dict[str, Any]:
        """All that changes a figure, also where it was found in the data."""
        from sacrebleu import __version__ as sacrebleu_version

        options = self.options
        found: dict[str, Any] = {
            "speaker": options.speaker,
            "match_words": self.match_words,
            "vocabulary": options.vocabulary,
            "offensive": options.offensive,
            "model": options.model and str(options.model),
            "encoder": self.encoder and self.encoder.name,
            "seed": options.seed,
            "words": "plato2.words.split_words",
            "sacrebleu": sacrebleu_version,
        }
        if self.kind == "replies":
            near = self.near if self.encoder else math.nan
            found |= {"near": None if math.isnan(near) else near, "coverage_candidates": self.k}
        else:
            found["self_bleu_others"] = self.others
        return found


def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError(f"BLEU needs sacrebleu: {install('eval')}") from None
    return BLEU(tokenize="none", effective_order=True)


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    kind: Kind,
    files: Sequence[str],
    options: AutomaticOptions | None = None,
    out: Path | None = None,
    watch: Watch = unwatched,
) -> Result:
    """Measures the systems of some files.

    Args:
        kind: static replies, or dialogues.
        files: `FILE` or `NAME=FILE`.
        options: what is measured.
        out: where the result will be written: what takes long is kept beside it until `forget`.
        watch: shows how far long work is.

    Raises:
        UserError: a file or model that cannot be read, or a package that is not installed.
    """
    options = options or AutomaticOptions()
    compared, paths = read_systems(files, kind, options.speaker)
    common = Compared(kind, compared, options, out, watch)
    figures = {name: _figures(said, common) for name, said in compared.items()}
    measures = _measures(common)
    sources: list[Input] = inputs(*paths, *([options.model] if options.model else []))
    details = _details(common)
    return Result(
        kind=kind,
        inputs=sources,
        settings=common.settings(),
        measures={name: measures[name] for name in measures if any(name in f for f in figures.values())},
        systems=figures,
        details=details,
    )


def differences(result: Result) -> list[str]:
    """How much more the systems cover than the first one does, in words."""
    compared = result.details.get("coverage_less", {"system": "", "differences": {}})
    return [
        f"coverage of {name} less that of {compared['system']}: "
        + text(Figure(**figure), Measure(label="", digits=3))
        + f", over {figure['n']} contexts"
        for name, figure in compared["differences"].items()
    ]


def forget(out: Path) -> None:
    """Removes what `evaluate` kept, once the result is written."""
    for name in ("embeddings", "nats"):
        out.with_name(f"{out.name}.{name}").unlink(missing_ok=True)


def _figures(said: System, common: Compared) -> dict[str, Figure]:
    found = _sizes(said, common) | _variety(said, common)
    if common.kind == "dialogues":
        found |= _repetition(said, common) | _between_dialogues(said, common)
        found |= _topic(said, common) if common.encoder else {}
    else:
        found |= _overlap(said, common)
        found |= _nearness(said, common) if common.encoder else {}
    found |= _offensive(said, common)
    if common.k or common.kind == "replies":  # few dialogues keep candidates
        found |= _candidates(said, common)
    return found | (_likelihood(said, common) if common.likelihood else {})


def _measures(common: Compared) -> dict[str, Measure]:
    """With what is known only now: the size in the label, and what chance gets."""
    size = f"{common.match_words:,} words each"
    found = dict(MEASURES)
    for name in ("matched_1", "matched_2"):
        found[name] = found[name].model_copy(update={"label": f"{found[name].label[:10]}, {size}"})
    if common.encoder and common.kind == "dialogues":
        chance = _topic_of_others(common)
        for name in ("topic", "topic_late"):
            found[name] = found[name].model_copy(update={"chance": chance})
    if common.encoder and common.kind == "replies":
        label = f"references that one of {common.k} candidates is near"
        found["coverage"] = found["coverage"].model_copy(update={"label": label})
        found["similarity"] = found["similarity"].model_copy(update={"chance": _replies_of_others(common)})
    return found


def _details(common: Compared) -> dict[str, Any]:
    """Of replies: how near people's replies are to each other, and coverage against the first system's."""
    if not (common.encoder and common.kind == "replies" and len(common.people)):
        return {}
    people = {
        "references": len(common.people),
        "mean": float(common.people.mean()),
        "median": float(np.median(common.people)),
    }
    first, *others = ((name, _covered(said, common)) for name, said in common.systems.items())
    differences = {}
    for name, covered in others:
        shared = [before for before in covered if before in first[1]]
        pairs = np.array([[*covered[before], *first[1][before]] for before in shared]).reshape(-1, 4)
        differences[name] = _of_sums(
            pairs, lambda s: s[0] / s[1] - s[2] / s[3], common.options.seed, "no context in common"
        ).model_dump()
    return {"people": people, "coverage_less": {"system": first[0], "differences": differences}}


# --------------------------------------------------------------------------------------------------- figures


def _of_sums(sums: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int, note: str) -> Figure:
    """A statistic of sums over cases, with its bootstrap interval.

    Args:
        sums: (cases, m), what each case adds.
        statistic: of the m sums; nan, or a division by zero, where it is not defined.
        seed: of the bootstrap.
        note: why there is no value, if there is none.
    """

    def of(rows: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            return float(statistic(rows.sum(axis=0)))

    value = of(sums) if len(sums) else math.nan
    if not math.isfinite(value):
        return Figure(value=None, n=0, note=note)
    low, high = math.nan, math.nan
    if len(sums) > 1:
        low, high = bootstrap(lambda draw: of(sums[draw]), len(sums), seed=seed)
    return _figure(value, (low, high), len(sums))


def _figure(value: float, interval: tuple[float, float], n: int) -> Figure:
    low, high = interval
    known = math.isfinite(low) and math.isfinite(high)
    return Figure(value=value, low=low if known else None, high=high if known else None, n=n)


def _mean(said: System, values: Sequence[float], common: Compared, note: str) -> Figure:
    """The mean of a value of each utterance."""
    return _share(said, values, [1.0] * len(values), common, note)


def _share(
    said: System, over: Sequence[float], under: Sequence[float], common: Compared, note: str
) -> Figure:
    """A sum over another, both over all utterances; nan leaves one out."""
    sums: dict[int, np.ndarray] = {}
    for one, pair in zip(said, zip(over, under, strict=True), strict=True):
        if not any(map(math.isnan, pair)):
            sums[one.case] = sums.get(one.case, np.zeros(2)) + pair
    return _of_sums(
        np.array(list(sums.values())).reshape(-1, 2), lambda s: s[0] / s[1], common.options.seed, note
    )


def _rate(figure: Figure) -> Figure:
    """A share, with Wilson's interval over cases where it is 0 or 1: no draw of a bootstrap differs there."""
    if figure.low is None or figure.value not in (0.0, 1.0):
        return figure
    low, high = wilson(figure.value, figure.n or 1)
    return figure.model_copy(update={"low": max(0.0, low), "high": min(1.0, high)})


def _sizes(said: System, common: Compared) -> dict[str, Figure]:
    words = sum(len(one.words) for one in said)
    return {
        "utterances": Figure(value=len(said)),
        "words": Figure(value=words),
        "length": _mean(said, [len(one.words) for one in said], common, ""),
        "wordless": _rate(_mean(said, [not one.words for one in said], common, "")),
    }


def _variety(said: System, common: Compared) -> dict[str, Figure]:
    found = {}
    cases = [[one.words for one in case] for case in by_case(said)]
    for name, metric in (
        ("distinct_1", Distinct(1)),
        ("distinct_2", Distinct(2)),
        ("adjusted", Distinct(1, common.options.vocabulary)),
    ):
        for case in cases:
            metric.update(case)
        value = float(metric.compute())
        found[name] = (
            _figure(value, metric.interval(), len(cases))
            if math.isfinite(value)
            else Figure(value=None, note="no words")
        )
    if common.match_words:
        for n in (1, 2):
            found[f"matched_{n}"] = _matched(said, n, common)
    return found


def _matched(said: System, n: int, common: Compared) -> Figure:
    """Distinct-n of as many words as the others have: whole utterances in random order, the last one cut."""
    most, total = common.match_words, sum(len(one.words) for one in said)
    if total < most:
        return Figure(value=None, n=total, note=f"only {total} words" if total else "no words")
    generator = np.random.default_rng(common.options.seed)
    values = []
    for _ in range(DRAWS):
        left, drawn = most, []
        for place in generator.permutation(len(said)):
            words = said[place].words[:left]
            drawn.append(words)
            left -= len(words)
            if not left:
                break
        different = {w[start : start + n] for w in drawn for start in range(len(w) - n + 1)}
        values.append(len(different) / most)
    return Figure(value=float(np.mean(values)), n=most)


def _repetition(said: System, common: Compared) -> dict[str, Figure]:
    dialogues = by_dialogue(said)
    turns = np.array([[len(dialogue), 1.0] for dialogue in dialogues])
    found = {"turns": _of_sums(turns, lambda s: s[0] / s[1], common.options.seed, "")}
    for name, metric in (("repeated_3", SelfRepetition(REPEATED)), ("repeated", SelfRepetition())):
        for dialogue in dialogues:
            speakers: dict[str, list[tuple[str, ...]]] = {}
            for one in dialogue:
                speakers.setdefault(one.speaker, []).append(one.words)
            metric.update(*speakers.values())
        sums = np.stack([dim_zero_cat(metric.repeated).numpy(), dim_zero_cat(metric.total).numpy()], axis=1)
        found[name] = _rate(_of_sums(sums, lambda s: s[0] / s[1], common.options.seed, "nothing to repeat"))
    return found


def _dialogues_as_words(said: System) -> list[str]:
    """All that a system says in each dialogue, as one text; no dialogue in which that is no word."""
    texts = (" ".join(" ".join(one.words) for one in dialogue) for dialogue in by_dialogue(said))
    return [text for text in texts if text.strip()]


def _between_dialogues(said: System, common: Compared) -> dict[str, Figure]:
    texts, n = _dialogues_as_words(said), common.others
    if len(texts) < 2:
        return {"self_bleu": Figure(value=None, n=len(texts), note="fewer than two dialogues with words")}
    generator = np.random.default_rng(common.options.seed)
    values = []
    for number, all_said in enumerate(common.watch(texts, "self-BLEU", len(texts))):
        drawn = generator.choice(len(texts) - 1, n, replace=False)
        others = [texts[other + (other >= number)] for other in drawn]  # all but itself
        values.append([common.bleu.sentence_score(all_said, others).score, 1.0])
    figure = _of_sums(np.array(values), lambda s: s[0] / s[1], common.options.seed, "")
    return {"self_bleu": figure}


def _candidates(said: System, common: Compared) -> dict[str, Figure]:
    """How much the candidates of a context say the same, and how many are offensive before the choice."""
    if not any(one.candidates for one in said):
        return {
            name: Figure(value=None, n=0, note="no candidates")
            for name in ("candidates_self_bleu", "offensive_candidates")
        }
    scores, offensive, numbers = [], [], []
    for one in common.watch(said, "self-BLEU of candidates", len(said)):
        texts = [" ".join(split_words(candidate)) for candidate in one.candidates]
        scores.append(_self_bleu(texts, common))
        offensive.append(float(sum(_by_lists(one.candidates, common))))
        numbers.append(float(len(texts)))
    return {
        "candidates_self_bleu": _mean(said, scores, common, "fewer than two candidates"),
        "offensive_candidates": _rate(_share(said, offensive, numbers, common, "no candidates")),
    }


def _self_bleu(texts: list[str], common: Compared) -> float:
    """The mean BLEU of each text against all others; nan for fewer than two."""
    if len(texts) < 2:
        return math.nan
    others = ((text, texts[:n] + texts[n + 1 :]) for n, text in enumerate(texts))
    return float(np.mean([common.bleu.sentence_score(*one).score for one in others]))


def _overlap(said: System, common: Compared) -> dict[str, Figure]:
    """BLEU over the whole corpus; means over contexts of ROUGE-L and chrF with the best reference."""
    from sacrebleu.metrics import CHRF

    named = [one for one in said if one.references]
    if not named:
        return {name: Figure(value=None, n=0, note="no references") for name in ("bleu", "rouge_l", "chrf")}
    chrf, rouge, characters = CHRF(lowercase=True), [], []
    counts: dict[int, np.ndarray] = {}
    for one in common.watch(named, "overlap with references", len(named)):
        reply, references = " ".join(one.words), [" ".join(split_words(r)) for r in one.references]
        bleu = common.bleu.sentence_score(reply, references)
        added = np.array([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len])
        counts[one.case] = counts.get(one.case, np.zeros(10)) + added
        found = rouge_score(
            reply, [references], "best", rouge_keys="rougeL", normalizer=str, tokenizer=str.split
        )
        rouge.append(100 * float(found["rougeL_fmeasure"]))
        characters.append(chrf.sentence_score(one.text, list(one.references)).score)

    def corpus_bleu(s: np.ndarray) -> float:
        n = [int(x) for x in s]
        return float(common.bleu.compute_bleu(n[:4], n[4:8], n[8], n[9], smooth_method="exp").score)

    return {
        "bleu": _of_sums(np.array(list(counts.values())), corpus_bleu, common.options.seed, "no references"),
        "rouge_l": _mean(named, rouge, common, "no references"),
        "chrf": _mean(named, characters, common, "no references"),
    }


def _nearness(said: System, common: Compared) -> dict[str, Figure]:
    named = [one for one in said if one.references]
    if not is_english([one.text for one in said]):
        unread = Figure(value=None, n=0, note="not English")
        return {"similarity": unread, "coverage": unread}
    values = [common.similarity([one.text], one.references).max() for one in named]
    covered = _covered(said, common)
    if not any(one.candidates for one in said):
        note = "no candidates"
    else:
        note = "no context with several references"
    return {
        "similarity": _mean(named, values, common, "no references"),
        "coverage": _of_sums(
            np.array(list(covered.values())).reshape(-1, 2), lambda s: s[0] / s[1], common.options.seed, note
        ),
    }


def _covered(said: System, common: Compared) -> dict[tuple[str, ...], np.ndarray]:
    """Context -> how many of its references are covered, and how many there are."""
    found: dict[tuple[str, ...], np.ndarray] = {}
    if not common.k or math.isnan(common.near):
        return found
    for one in said:
        if len(one.references) > 1 and one.candidates:
            metric = Coverage(common.near, common.k)
            metric.update(common.similarity(one.references, one.candidates))
            pair = np.array([float(metric.covered[0]), float(metric.total[0])])
            found[one.before] = found.get(one.before, np.zeros(2)) + pair
    return found


def _topic(said: System, common: Compared) -> dict[str, Figure]:
    if not is_english([one.text for one in said]):
        unread = Figure(value=None, n=0, note="not English")
        return {"topic": unread, "topic_late": unread}
    values, late = [], []
    for dialogue in by_dialogue(said):
        for number, one in enumerate(dialogue):
            nearness = math.nan if one.start is None else common.similarity([one.text], [one.start]).item()
            values.append(nearness)
            late.append(values[-1] if 2 * number >= len(dialogue) else math.nan)
    note = "nothing said after the start"
    return {"topic": _mean(said, values, common, note), "topic_late": _mean(said, late, common, note)}


def _topic_of_others(common: Compared) -> float | None:
    """The mean similarity of utterances to the start of the next dialogue: what staying on no topic gets."""
    values: list[float] = []
    for said in common.systems.values():
        dialogues = by_dialogue(said)
        if len(dialogues) > 1 and is_english([one.text for one in said]):
            for dialogue, other in zip(dialogues, dialogues[1:] + dialogues[:1], strict=True):
                if (start := other[-1].start) is not None:
                    values += list(common.similarity([one.text for one in dialogue], [start])[:, 0])
    return float(np.mean(values)) if values else None


def _replies_of_others(common: Compared) -> float | None:
    """The mean similarity of a person's reply to the next context to the nearest reference of this one."""
    contexts = common.contexts
    if len(contexts) < 2:
        return None
    pairs = zip(contexts, contexts[1:] + contexts[:1], strict=True)
    found = [common.similarity(other.references[:1], one.references).max() for one, other in pairs]
    return float(np.mean(found))


def _offensive(said: System, common: Compared) -> dict[str, Figure]:
    texts = [one.text for one in said]
    by_classifier = (
        _rate(_mean(said, offensive_by_classifier(texts), common, ""))
        if is_english(texts)
        else Figure(value=None, n=0, note="not English")
    )
    return {
        "offensive_list": _rate(_mean(said, _by_lists(texts, common), common, "")),
        "offensive_classifier": by_classifier,
    }


def _by_lists(texts: Sequence[str], common: Compared) -> list[bool]:
    found = [words(texts) for words in common.lists]
    return [any(verdicts) for verdicts in zip(*found, strict=True)]


def _likelihood(said: System, common: Compared) -> dict[str, Figure]:
    assert common.likelihood is not None
    name = common.likelihood.name
    scores = common.kept["nats"].of(
        [(one.before, one.text) for one in said],
        lambda pair: f"{name} {pair!r}",
        common.likelihood,
        "log-probabilities",
        common.watch,
    )
    nats, tokens = scores.T.tolist()
    left_out = Counter(map(math.isnan, nats))[True]
    note = "no reply with a context that the model can read"
    found = {
        "perplexity": _share(said, nats, tokens, common, note),
        "nats_word": _share(said, nats, [float(len(one.words)) for one in said], common, note),
        "nats_byte": _share(said, nats, [float(len(one.text.encode())) for one in said], common, note),
    }
    if (per_token := found["perplexity"]).value is not None:
        bounds = {bound: getattr(per_token, bound) for bound in ("value", "low", "high")}
        update = {bound: None if value is None else math.exp(value) for bound, value in bounds.items()}
        found["perplexity"] = per_token.model_copy(update=update)
    if left_out:
        told = f"{left_out} of {len(said)} left out: no context, or too long"
        found = {n: f.model_copy(update={"note": f.note or told}) for n, f in found.items()}
    return found
