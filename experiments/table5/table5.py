"""Table 5: what stage 2 adds to stage 1, pair by pair, over the same contexts of the test split.

    python experiments/table5/table5.py --data DIR --coarse RUN --fine RUN --first RUN --dual RUN
    python experiments/table5/table5.py --data DIR --coarse RUN --fine RUN --first RUN --dual RUN \
        --judge-url http://127.0.0.1:8000/v1 --judge-model NAME

Every run may be left out; what needs it is then missing. Candidates are kept in --work, so the same command
continues after a kill. The systems are those of experiments/table1, whose folder has to be on PYTHONPATH, as
run.sh has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from variants import (
    BATCH,
    DIGITS,
    HEADS,
    MAX_TOKENS,
    System,
    add_options,
    described,
    given_runs,
    machine,
    random_latent,
    record,
    systems_of,
)

from experiments.configs import keep_config
from plato2.config import DecodeConfig, UserError
from plato2.data.examples import Example, read_examples
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.evaluate.automatic import Compared
from plato2.evaluate.kept import continued
from plato2.evaluate.metrics import n_grams
from plato2.evaluate.options import AutomaticOptions
from plato2.evaluate.said import read_systems
from plato2.evaluate.scorers import Coherence, WordOverlap, corpus_texts
from plato2.metrics import bootstrap_means
from plato2.report.paper import PAIRS
from plato2.talk.bot import PlatoBot
from plato2.talk.decode import decode
from plato2.talk.rank import rank
from plato2.talk.self_chat import SPEAKERS, turn_seed
from plato2.talk.speaker import weights_hash
from plato2.weights.folder import load_evaluation, saved_tokenizer
from plato2.words import split_words

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
CONTEXTS = 300
REPEATED = 3
"""Words in a row that should not be said again."""
PEOPLE = {"people": "people's replies", "elsewhere": "people's replies to another context"}
"""The upper line and chance, beside the systems."""
MEASURES = {
    "chrf": "chrF with the person's reply",
    "similarity": "similarity to the person's reply",
    **{f"relevance_{head}": f"relevance by `{head}`" for head in HEADS},
    **{f"specific_{head}": f"the same less that to another context, `{head}`" for head in HEADS},
    "shared": "words shared with the context",
    "repeated": "trigrams said before",
    "words": "words",
}
LOWER_IS_BETTER = ("repeated",)
QUESTIONS = ("engagingness", "humanness")
"""The paper's table 5 asks people these two."""
Scores = dict[str, np.ndarray]
"""Measure -> (contexts,)."""


# -------------------------------------------------------------------------------------------------- replies


@dataclass
class Written:
    """The candidates of a context, in the order in which they were drawn."""

    texts: list[str]
    latents: list[int | None]
    scores: dict[str, list[float]]
    """Ranker -> p(l=1|c,r) of each, less Knover's penalty."""
    cpu_s: float


def readable_examples(data: Path, n: int) -> list[Example]:
    """Contexts of the test split, evenly spread, without those in which the tokenizer can read nothing of a
    turn or of the reply, such as a lone emoji."""
    tokenizer = Tokenizer.load(data / "tokenizer")
    return [
        one
        for one in read_examples(data, tokenizer, n, "test")
        if all(tokenizer.encode(text) for text in [*one.turns, one.reference])
    ]


def seed_of(seed: int, number: int) -> int:
    """Of the reply to a context."""
    return turn_seed(seed, number, 0)


def candidates(
    writer: str, runs: Mapping[str, Path], examples: Sequence[Example], folder: Path, seed: int
) -> list[Written]:
    """What a run writes to each context, and the scores of all rankers; kept in a file.

    Args:
        writer: the run.
        runs: all.
        examples: the contexts.
        folder: of the file.
        seed: of the samples.
    """
    bot = PlatoBot.load(runs[writer], None, "cpu", DecodeConfig(max_tokens=MAX_TOKENS))
    rankers: dict[str, Any] = {head: load_evaluation(runs[head]) for head in HEADS if head in runs}
    if bot.evaluation is not None:
        rankers[writer] = bot.evaluation

    def find(first: int) -> Iterator[Written]:
        for start in range(first, len(examples), BATCH):
            began, part = time.process_time(), examples[start : start + BATCH]
            contexts = [bot.read(one.turns) for one in part]
            seeds = [seed_of(seed, start + number) for number in range(len(part))]
            hypotheses = decode(bot.generation, [one.ids for one in contexts], bot.decode_config, seeds)
            found = []
            for context, drawn in zip(contexts, hypotheses, strict=True):
                # Each as if it were the only one, so that they stay in the order in which they were drawn.
                asked = ([context.ids] * len(drawn), [[one] for one in drawn])
                turns = [context.turns] * len(drawn)
                scores = {
                    name: [one.score for (one,) in rank(bot.tokenizer, *asked, network, turns)]
                    for name, network in rankers.items()
                }
                texts = [bot.tokenizer.decode([i for i in one.words if i > EOS_ID]) for one in drawn]
                texts = [" ".join(text.split()) for text in texts]
                found.append(Written(texts, [one.latent for one in drawn], scores, 0.0))
            cpu_s = (time.process_time() - began) / len(found)
            for one in found:
                one.cpu_s = round(cpu_s, DIGITS)
                yield one

    about = {
        "writer": weights_hash(bot.generation),
        "rankers": {name: weights_hash(network) for name, network in rankers.items()},
        "samples": [one.sample_id for one in examples],
        "settings": {"seed": seed, "max_tokens": MAX_TOKENS},
    }
    file = folder / f"{writer}-{'-'.join(rankers)}-{len(examples)}.candidates.jsonl"
    return list(continued(file, about, Written, find))


def chosen(system: System, written: Written, seed: int) -> str:
    """What a system says: the best by its ranker; else the first sample, or that of a random z."""
    if system.ranker is not None:
        scores = written.scores[system.ranker]
        return written.texts[int(np.argmax(scores))]
    return written.texts[random_latent(seed, len(written.texts)) if system.writer == "fine" else 0]


def write_replies(path: Path, name: str, examples: Sequence[Example], texts: Sequence[str]) -> Path:
    """Replies as `plato2 reply --contexts` writes them."""
    lines = []
    for number, (one, text) in enumerate(zip(examples, texts, strict=True)):
        said = [*one.turns, text]
        turns = [
            {"speaker": SPEAKERS[place % 2], "model": name if place == len(one.turns) else None, "text": turn}
            for place, turn in enumerate(said)
        ]
        line = {"id": number, "turns": turns, "references": [one.reference]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- measures


def measured(
    replies: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    runs: Mapping[str, Path],
    data: Path,
    files: Mapping[str, Path],
    kept: Path,
) -> dict[str, Scores]:
    """All measures of all replies, context by context.

    Args:
        replies: of each system, and of PEOPLE, to each context.
        examples: the contexts.
        runs: of the rankers, which measure here.
        data: the corpus: how rare a word is.
        files: the replies of the systems, for their embeddings.
        kept: these are kept beside this file.
    """
    from sacrebleu.metrics import CHRF

    n, half = len(examples), len(examples) // 2
    chrf, shared = CHRF(lowercase=True), WordOverlap(corpus_texts(data))
    found: dict[str, Scores] = {name: {key: np.full(n, np.nan) for key in MEASURES} for name in replies}
    judges = {
        head: Coherence(load_evaluation(runs[head]), saved_tokenizer(runs[head]))
        for head in HEADS
        if head in runs
    }
    common = embedded(files, kept)
    for number, example in enumerate(examples):
        texts = [of[number] for of in replies.values()]
        by_system: dict[str, Sequence[float]] = {"shared": shared(example.turns, texts)}
        other = examples[(number + half) % n]  # of another conversation, but for chance: they are shuffled
        for head, judge in judges.items():
            own = np.array(judge(example.turns, texts))
            by_system[f"relevance_{head}"] = own.tolist()
            by_system[f"specific_{head}"] = (own - judge(other.turns, texts)).tolist()
        for place, (name, text) in enumerate(zip(replies, texts, strict=True)):
            scores = {key: values[place] for key, values in by_system.items()}
            scores["words"], scores["repeated"] = len(split_words(text)), said_before(text, example.turns)
            if name != "people":  # they are the reference
                scores["chrf"] = chrf.sentence_score(text, [example.reference]).score
                if common is not None:
                    scores["similarity"] = common.similarity([text], [example.reference]).item()
            for key, value in scores.items():
                # Equal replies have equal scores: beyond this, a float32 depends on what is read with it.
                found[name][key][number] = round(value, 5)
    return {
        name: {key: values for key, values in of.items() if not np.isnan(values).all()}
        for name, of in found.items()
    }


def embedded(files: Mapping[str, Path], kept: Path) -> Compared | None:
    """What knows the embeddings of all replies and references; None without the encoder."""
    if not (files and find_spec("all_minilm_l6_v2") and find_spec("sentence_transformers")):
        return None
    said, _ = read_systems([f"{name}={file}" for name, file in files.items()], "replies")
    return Compared("replies", said, AutomaticOptions(device="cpu"), kept)


def said_before(text: str, turns: Sequence[str]) -> float:
    """The share of a reply's trigrams that stand in a turn of the context or earlier in the reply itself."""
    own = n_grams(split_words(text), REPEATED)
    known = {gram for turn in turns for gram in n_grams(split_words(turn), REPEATED)}
    repeats = 0
    for gram in own:
        repeats += gram in known
        known.add(gram)
    return repeats / len(own) if own else 0.0


# ---------------------------------------------------------------------------------------------------- tests


def pairs_of(head: str) -> list[tuple[str, str]]:
    """What is compared where one head ranks."""
    coarse, fine = f"coarse_{head}", f"fine_{head}"
    return [
        ("fine", "coarse"),
        (fine, "fine"),
        (fine, "coarse"),
        (fine, coarse),
        (coarse, "coarse"),
        (fine, "plato"),
    ]


def other_head(head: str) -> str:
    """The head that did not choose."""
    (other,) = (one for one in HEADS if one != head)
    return other


def compare(scores: Mapping[str, Scores], head: str) -> list[dict[str, Any]]:
    """Wins, ties and losses of all pairs where one head ranks, with sign tests and Holm's correction.

    Relevance is that of the other head, which chose neither reply. Length is compared without a test: neither
    more words nor fewer are better.

    Args:
        scores: system -> measure -> (contexts,).
        head: the ranker.
    """
    from statsmodels.stats.multitest import multipletests

    judge = other_head(head)
    measures = [
        "chrf",
        "similarity",
        f"relevance_{judge}",
        f"specific_{judge}",
        "shared",
        "repeated",
        "words",
    ]
    found = []
    for a, b in pairs_of(head):
        for key in measures:
            if key in scores.get(a, {}) and key in scores.get(b, {}):
                found.append(
                    {"a": a, "b": b, "measure": key, **sign_test(scores[a][key] - scores[b][key], key)}
                )
    tested = [one for one in found if one["measure"] != "words"]
    if tested:
        corrected = multipletests([one["p"] for one in tested], method="holm")[1]
        for one, p in zip(tested, corrected, strict=True):
            one["p_holm"] = round(float(p), DIGITS)
    return found


def sign_test(differences: np.ndarray, measure: str) -> dict[str, Any]:
    """The mean difference with its interval; wins, ties, losses; a two-sided sign test without ties."""
    from scipy.stats import binomtest

    low, high = bootstrap_means(differences[:, None])
    signs = np.sign(-differences if measure in LOWER_IS_BETTER else differences)
    wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
    decided = wins + losses
    return {
        "difference": round(float(differences.mean()), DIGITS),
        "low": round(float(low[0]), DIGITS),
        "high": round(float(high[0]), DIGITS),
        "wins": wins,
        "ties": len(differences) - decided,
        "losses": losses,
        "p": float(binomtest(wins, decided).pvalue) if decided else 1.0,
    }


def means(scores: Scores) -> dict[str, list[float]]:
    """Measure -> mean and 95 % interval over contexts."""
    values = np.stack(list(scores.values()), axis=1)
    rows = np.stack([values.mean(axis=0), *bootstrap_means(values)], axis=1)
    return {key: [round(x, DIGITS) for x in row] for key, row in zip(scores, rows.tolist(), strict=True)}


# ---------------------------------------------------------------------------------------------------- judge


def judged(files: Mapping[str, Path], url: str, model: str, most: int, folder: Path) -> dict[str, Any]:
    """What `plato2 evaluate judge` says of the systems that one head ranks, question by question.

    Returns:
        Question -> `controls`, their sentences; `withheld`, why there is no table (empty if there is one);
        `systems`, win rates and strengths; `pairs`, wins, ties and losses of each two.
    """
    head = next((head for head in HEADS if f"fine_{head}" in files), None)
    named = [
        f"{name}={file}"
        for name, file in files.items()
        if name in ("coarse", "fine", f"coarse_{head}", f"fine_{head}")
    ]
    found = {}
    for question in QUESTIONS:
        out = folder / f"judge-{question}.json"
        command = [
            sys.executable,
            "-m",
            "plato2",
            "evaluate",
            "judge",
            *named,
            "--url",
            url,
            "--model",
            model,
        ]
        command += ["--question", question, "--pairs", str(most), "--out", str(out)]
        command += ["--answers", str(folder / f"judge-{question}.answers.jsonl")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(out.read_text(encoding="utf-8"))
        details = result["details"]
        found[question] = {
            "model": model,
            "withheld": details["withheld"],
            "controls": [one["text"] for one in details["controls"]],
            "systems": {
                name: {key: [one["value"], one["low"], one["high"]] for key, one in of.items()}
                for name, of in result["systems"].items()
            },
            "pairs": counted(details["outcomes"]),
        }
    return found


def counted(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Wins of the first, ties, wins of the second of each two systems."""
    found: dict[str, list[int]] = {}
    for one in outcomes:
        counts = found.setdefault(f"{one['left']} - {one['right']}", [0, 0, 0])
        counts[{1.0: 0, 0.5: 1, 0.0: 2}[one["score"]]] += 1
    return found


# -------------------------------------------------------------------------------------------------- results


def draw(tests: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Mean differences with their intervals, a panel for each measure."""
    keys = list(dict.fromkeys(one["measure"] for of in tests.values() for one in of))
    if not keys:
        return
    figure, axes = plt.subplots(
        len(keys), 1, figsize=(8, 2.3 * len(keys)), squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes[:, 0], keys, strict=True):
        rows = [one for of in tests.values() for one in of if one["measure"] == key]
        for place, one in enumerate(rows):
            axis.plot([one["low"], one["high"]], [place, place], color="#4c78a8", linewidth=2)
            axis.plot(one["difference"], place, "o", color="#1f3552", markersize=4)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [f"{one['a']} - {one['b']}" for one in rows], fontsize=7)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        better = " (fewer are better)" if key in LOWER_IS_BETTER else ""
        axis.set_title(MEASURES[key].replace("`", "") + better, fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--judge-url", help="an OpenAI-compatible API; without it there is no judge")
    parser.add_argument("--judge-model", help="the model's name there")
    parser.add_argument(
        "--judge-pairs", type=int, default=50, help="pairs of each two systems; 50 in the paper"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/table5"), help="candidates are kept here")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    return parser.parse_args()


def main() -> None:
    """Writes, chooses, measures, tests, records and draws."""
    given, began = arguments(), time.process_time()
    if (given.judge_url is None) != (given.judge_model is None):
        raise UserError("--judge-url and --judge-model go together: give both, or none")
    torch.set_num_threads(1)
    folder = given.work / f"seed-{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    runs, n = given_runs(given), given.limit or CONTEXTS
    systems = systems_of(runs)
    examples = readable_examples(given.data, n)
    written = {
        writer: candidates(writer, runs, examples, folder, given.seed)
        for writer in dict.fromkeys(system.writer for system in systems.values())
    }
    replies: dict[str, list[str]] = {
        name: [chosen(system, one, seed_of(given.seed, k)) for k, one in enumerate(written[system.writer])]
        for name, system in systems.items()
    }
    files = {
        name: write_replies(folder / f"{name}-{len(examples)}.jsonl", name, examples, texts)
        for name, texts in replies.items()
    }
    half = len(examples) // 2
    replies["people"] = [one.reference for one in examples]
    replies["elsewhere"] = [*replies["people"][half:], *replies["people"][:half]]
    scores = measured(replies, examples, runs, given.data, files, folder / f"all-{len(examples)}.json")
    tests = {head: compare(scores, head) for head in HEADS if head in runs}
    found: dict[str, Any] = {
        "about": machine() | {"cpu_s": round(time.process_time() - began, 1)},
        "asked": {"contexts": len(examples), "split": "test"},
        "labels": {name: system.label for name, system in systems.items()} | PEOPLE,
        "measures": MEASURES,
        "models": described(runs),
        "cpu_s": {writer: round(sum(one.cpu_s for one in of), 1) for writer, of in written.items()},
        "figures": {name: means(of) for name, of in scores.items()},
        "tests": tests,
        "judge": None,
        "paper": [
            {"question": one.question, "systems": one.systems, "counts": one.counts}
            for one in PAIRS
            if one.number == "5"
        ],
    }
    draw(tests, given.out.with_name("differences.png"))
    for name, run in runs.items():
        keep_config(run, given.out.parent / "config" / f"seed-{given.seed}" / f"{name}.yaml")
    record(given.out, given.seed, found)
    if given.judge_url:  # after all that needs nobody else
        found["judge"] = judged(files, given.judge_url, given.judge_model, given.judge_pairs, folder)
        record(given.out, given.seed, found)


if __name__ == "__main__":
    main()
