"""Metric audit: what automatic scores of replies have to do with what people say of the same replies.

Each score stands beside its Spearman correlation with the mean human rating, with the 95 % interval over
contexts. Where the interval holds 0, the score says nothing here, and is marked. The ceiling is how well one
rater agrees with the mean of the others: what a score that is as good as a person would reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from plato2.config import UserError
from plato2.evaluate.rated import RatedReply
from plato2.evaluate.results import Figure, Input, Measure, Result
from plato2.metrics import distinct_n
from plato2.talk.table import printable
from plato2.words import split_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

RESAMPLES = 1000
AT_ONCE = 1 << 21
"""Ranks that are held at a time: bounds the memory and changes no result."""
CEILING = "ceiling"
NOTHING = "the interval holds 0: it says nothing here"
WITH_INTERVALS = 2
"""With more qualities the tables show no intervals, and have `COLUMNS` columns."""
COLUMNS = 4
Column = np.ndarray
"""A score of each reply, (replies,); nan where it has none."""
Watch = Callable[[list[tuple[str, str]]], Iterable[tuple[str, str]]]

LABELS = {
    "words": "words",
    "distinct_1": "distinct-1 of the reply",
    "distinct_2": "distinct-2 of the reply",
    "seen": "words seen in the context",
    "overlap": "overlap with the context, by idf",
    "repeated": "bigrams that were said before",
    "similarity_context": "embedding: like the last turn",
    "bleu": "BLEU to references",
    "chrf": "chrF to references",
    "rouge_l": "ROUGE-L to references",
    "similarity_references": "embedding: like a reference",
    "coherence": "coherence p(l=1|c,r)",
    "log_p": "log p(r|c)",
    "log_p_token": "log p(r|c) by token",
    CEILING: "ceiling: a rater and the others",
}
"""Score -> its name for people; the order of the table."""


# ----------------------------------------------------------------------------------------------- the scores


def text_scores(replies: Sequence[RatedReply]) -> dict[str, Column]:
    """Scores that need only texts.

    Words are those of `plato2.words.split_words`. `overlap` is the share of the reply's different words that
    the context has, each weighted by log(N / n) of the N different contexts and replies of the file, of which
    n have it; `repeated` the share of the reply's bigrams in turns 2, 4, ... before it.
    """
    words = [split_words(reply.reply) for reply in replies]
    contexts = [[split_words(turn) for turn in reply.context] for reply in replies]
    documents = {
        reply.context: {w for turn in turns for w in turn}
        for reply, turns in zip(replies, contexts, strict=True)
    }
    texts = [
        *documents.values(),
        *map(set, {reply.reply: said for reply, said in zip(replies, words, strict=True)}.values()),
    ]
    n_of = Counter(word for text in texts for word in text)
    idf = {word: math.log(len(texts) / n) for word, n in n_of.items()}
    found: dict[str, list[float]] = {name: [] for name in ("words", "distinct_1", "distinct_2")}
    found |= {name: [] for name in ("seen", "overlap", "repeated")}
    for said, turns in zip(words, contexts, strict=True):
        seen = {word for turn in turns for word in turn}
        own = {pair for turn in turns[-2::-2] for pair in _bigrams(turn)}
        found["words"].append(len(said))
        found["distinct_1"].append(distinct_n([said], 1) if said else math.nan)
        found["distinct_2"].append(distinct_n([said], 2) if len(said) > 1 else math.nan)
        found["seen"].append(_share(word in seen for word in said))
        whole = sum(idf[word] for word in set(said))
        found["overlap"].append(sum(idf[word] for word in set(said) & seen) / whole if whole else math.nan)
        found["repeated"].append(_share(pair in own for pair in _bigrams(said)))
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def reference_scores(replies: Iterable[RatedReply]) -> dict[str, Column]:
    """BLEU and chrF by sacrebleu, ROUGE-L by torchmetrics (the best reference); nan without references."""
    from sacrebleu import sentence_bleu, sentence_chrf
    from torchmetrics.functional.text import rouge_score

    found: dict[str, list[float]] = {"bleu": [], "chrf": [], "rouge_l": []}
    for reply in replies:
        references = list(reply.references)
        if not references:
            for values in found.values():
                values.append(math.nan)
            continue
        found["bleu"].append(sentence_bleu(reply.reply, references).score)
        found["chrf"].append(sentence_chrf(reply.reply, references).score)
        rouge = rouge_score(reply.reply, references, accumulate="best", rouge_keys="rougeL")
        found["rouge_l"].append(float(rouge["rougeL_fmeasure"]))
    return {name: np.array(values) for name, values in found.items()}


def embedding_scores(
    replies: Sequence[RatedReply], encode: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, Column]:
    """Cosine similarity of a reply to the last turn of its context, and to the nearest of its references.

    Args:
        replies: what is rated.
        encode: texts to vectors of unit length, (N, H); zeros for a text without words.
    """
    texts = {text for r in replies for text in (r.reply, *r.references, *r.context[-1:])}
    place = {text: number for number, text in enumerate(sorted(texts))}
    vectors = encode(list(place))

    def nearest(reply: str, others: Sequence[str]) -> float:
        if not others or not vectors[place[reply]].any():
            return math.nan
        return float((vectors[[place[text] for text in others]] @ vectors[place[reply]]).max())

    return {
        "similarity_context": np.array([nearest(r.reply, r.context[-1:]) for r in replies]),
        "similarity_references": np.array([nearest(r.reply, r.references) for r in replies]),
    }


def model_scores(scored: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """What plato2 models say: of each reply what `talk.score.score_lines` gave.

    nan where a text was too long. p(r|c) of a model with latents is the mean of p(r|c,z) over z.

    Raises:
        UserError: a model that gives nan itself.
    """
    found: dict[str, list[float]] = {"coherence": [], "log_p": [], "log_p_token": []}
    for number, scores in enumerate(scored, start=1):
        for name in ("coherence", "nll", "nll_by_latent"):
            if not np.isfinite(scores.get(name, 0.0)).all():
                raise UserError(
                    f"reply {number}: the model gives {name} {scores[name]}; is it trained to its end?"
                )
        found["coherence"].append(scores.get("coherence", math.nan))
        log_p = math.nan
        if "n_tokens" in scores and "response_cut" not in scores:
            by_latent = -np.array(scores.get("nll_by_latent", [scores.get("nll")]), dtype=float)
            log_p = float(np.logaddexp.reduce(by_latent) - math.log(len(by_latent)))
        found["log_p"].append(log_p)
        found["log_p_token"].append(log_p / scores.get("n_tokens", 1))
    return {name: np.array(values) for name, values in found.items()}


def to_line(reply: RatedReply) -> bytes:
    """A reply as `talk.score.score_lines` reads it."""
    turns = [" ".join(turn.split()).replace("[SEP]", " ") for turn in reply.context]
    return f"{' [SEP] '.join(turns)}\t{' '.join(reply.reply.split())}".encode()


def _bigrams(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def _share(cases: Iterable[bool]) -> float:
    counted = list(cases)
    return sum(counted) / len(counted) if counted else math.nan


# ----------------------------------------------------------------------------------------- the correlations


def spearman(x: Column, y: Column, weights: np.ndarray) -> np.ndarray:
    """Spearman's correlation where case i is there as often as its weight says.

    It is the correlation of the cases written out that often, ties sharing their mean rank.

    Args:
        x: (n,).
        y: (n,).
        weights: (resamples, n), whole numbers.

    Returns:
        (resamples,); nan where x or y is the same everywhere.
    """
    a, b = _ranks(x, weights), _ranks(y, weights)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    a -= (weights * a).sum(axis=1, keepdims=True) / total
    b -= (weights * b).sum(axis=1, keepdims=True) / total
    together = (weights * a * b).sum(axis=1)
    apart = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    return np.divide(together, apart, out=np.full(len(weights), np.nan), where=apart > 1e-9)


def _ranks(values: Column, weights: np.ndarray) -> np.ndarray:
    """Mean ranks, (resamples, n)."""
    different, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(different)))
    size = np.add.reduceat(weights[:, order].astype(float), starts, axis=1)  # (resamples, groups)
    rank = np.cumsum(size, axis=1) - size + (size + 1) / 2
    return rank[:, group]


def correlation(pairs: Sequence[tuple[Column, Column]], contexts: Sequence[Any], seed: int) -> Figure:
    """Spearman's correlation with its interval over contexts; the mean over several pairs of columns.

    Args:
        pairs: columns (n,); a case counts where neither is nan.
        contexts: of each case; cases that share one are drawn together.
        seed: of the draws.
    """
    there = [np.isfinite(x) & np.isfinite(y) for x, y in pairs]
    n = int(np.logical_or.reduce(there).sum()) if there else 0
    if n < 3:
        return Figure(value=None, n=n, note=f"{n} replies are too few" if n else "no reply has it")
    for name, side in (("ratings", 1), ("scores", 0)):
        if all(len(np.unique(pair[side][one])) < 2 for pair, one in zip(pairs, there, strict=True)):
            return Figure(value=None, n=n, note=f"all {name} are equal: not defined")
    numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
    cluster = np.array([numbers[context] for context in contexts])
    draws = np.random.default_rng(seed).integers(0, len(numbers), (RESAMPLES, len(numbers)))

    def mean(weights: np.ndarray) -> np.ndarray:
        found = [spearman(x[one], y[one], weights[:, one]) for (x, y), one in zip(pairs, there, strict=True)]
        stacked = np.stack(found)
        counted = np.isfinite(stacked).sum(axis=0)
        return np.where(counted > 0, np.nansum(stacked, axis=0) / np.maximum(counted, 1), np.nan)

    value = float(mean(np.ones((1, len(cluster))))[0])
    if math.isnan(value):
        return Figure(value=None, n=n, note="not defined")
    found = []
    step = max(1, AT_ONCE // max(len(cluster), 1))
    for start in range(0, RESAMPLES, step):
        drawn = [np.bincount(draw, minlength=len(numbers)) for draw in draws[start : start + step]]
        found.append(mean(np.stack(drawn)[:, cluster]))
    low, high = np.nanquantile(np.concatenate(found), (0.025, 0.975))
    note = NOTHING if low <= 0 <= high else ""
    return Figure(value=value, low=float(low), high=float(high), n=n, note=note)


def ceiling(ratings: Sequence[Sequence[float]], contexts: Sequence[Any], seed: int) -> Figure:
    """The correlation of a rater with the mean of the other raters: the mean over raters.

    The first rater of each reply is taken as one, and so on, since files do not say who rated; replies may
    have different numbers of raters, those with one say nothing.
    """
    most = max(map(len, ratings), default=0)
    pairs = []
    for place in range(most if most > 1 else 0):
        one = [given[place] if 1 < len(given) > place else math.nan for given in ratings]
        others = [
            float(np.mean([*given[:place], *given[place + 1 :]])) if 1 < len(given) > place else math.nan
            for given in ratings
        ]
        pairs.append((np.array(one), np.array(others)))
    if not pairs:
        return Figure(value=None, n=0, note="one rating for each reply")
    return correlation(pairs, contexts, seed)


def audit_result(
    files: Mapping[str, tuple[Sequence[RatedReply], Mapping[str, Column]]],
    inputs: Sequence[Input],
    settings: Mapping[str, Any],
    counts: Mapping[str, Mapping[str, int]],
    seed: int = 0,
    watch: Watch = list,
) -> Result:
    """Every score beside its correlation with human ratings.

    Args:
        files: name -> rated replies and their scores by name (`LABELS`).
        inputs: the files.
        settings: options that change a figure.
        counts: name -> what `read_rated` counted.
        seed: of the intervals.
        watch: shows how far the work is.

    Returns:
        Of kind `audit`. Its systems are qualities (with the file's name before them where there are several
        files), its measures scores. A figure's `note` says where it says nothing, or why it is not defined.
    """
    measures: dict[str, Measure] = {}
    systems: dict[str, dict[str, Figure]] = {}
    work = {
        (f"{name}: {quality}" if len(files) > 1 else quality, score): (name, quality)
        for name, (replies, scores) in files.items()
        for quality in dict.fromkeys(quality for reply in replies for quality in reply.ratings)
        for score in LABELS
        if score == CEILING or (score in scores and np.isfinite(scores[score]).any())
    }
    for system, score in watch(list(work)):
        name, quality = work[system, score]
        replies, scores = files[name]
        contexts = [reply.context for reply in replies]
        if score == CEILING:
            figure = ceiling([reply.ratings.get(quality, ()) for reply in replies], contexts, seed)
        else:
            means = [np.mean(r.ratings[quality]) if quality in r.ratings else math.nan for r in replies]
            figure = correlation([(scores[score], np.array(means, dtype=float))], contexts, seed)
        systems.setdefault(system, {})[score] = figure
        measures[score] = Measure(label=LABELS[score], digits=2)
    return Result(
        kind="audit",
        inputs=list(inputs),
        settings={"seed": seed, "resamples": RESAMPLES, **settings},
        measures={score: measures[score] for score in LABELS if score in measures},
        systems=systems,
        details={"counts": {name: dict(found) for name, found in counts.items()}},
    )


# ----------------------------------------------------------------------------------- the table, the picture


def audit_tables(result: Result) -> list[Table]:
    """Scores as rows, qualities as columns; with intervals where there are few qualities."""
    systems = list(result.systems)
    with_intervals = len(systems) <= WITH_INTERVALS
    tables = []
    for start in range(0, len(systems), COLUMNS):
        shown = systems[start : start + COLUMNS]
        table = Table(
            title="" if start else "Spearman's correlation with human ratings", title_justify="left"
        )
        table.add_column("score", min_width=max(map(len, LABELS.values())))
        for system in shown:
            table.add_column(Text(printable(system)), justify="right", overflow="fold")
        for score, measure in result.measures.items():
            if score == CEILING:
                table.add_section()
            cells = [_cell(result.systems[system].get(score), with_intervals) for system in shown]
            table.add_row(measure.label, *cells)
        tables.append(table)
    return tables


def _cell(figure: Figure | None, with_interval: bool) -> str:
    if figure is None:
        return ""
    if figure.value is None:
        return f"({figure.note})" if with_interval else "n/a"
    text = f"{figure.value:+.2f}"
    if with_interval:
        text += f" ({figure.low:+.2f} to {figure.high:+.2f})"
    return f"[dim]{text} \N{MIDDLE DOT}[/]" if figure.note else f"{text}  "


def audit_picture(result: Result) -> Picture:
    """A panel for each quality: scores with their intervals, grey where they say nothing, a line at 0."""
    from matplotlib.figure import Figure as Picture

    scores = [score for score in result.measures if score != CEILING]
    columns = min(3, len(result.systems))
    rows = math.ceil(len(result.systems) / columns)
    size = (3.2 * columns + 2.6, (0.6 + 0.24 * len(scores)) * rows + 0.4)
    drawing = Picture(figsize=size, layout="constrained")
    panels = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, (system, figures) in zip(panels, result.systems.items(), strict=False):
        best = figures.get(CEILING)
        if best is not None and best.low is not None:
            panel.axvspan(best.low, best.high, color="#8fbf8f", alpha=0.5, linewidth=0)
        panel.axvline(0, color="black", linewidth=1)
        for place, score in enumerate(scores):
            figure = figures.get(score)
            if figure is None or figure.value is None:
                continue
            colour = "#b5b5b5" if figure.note else "#1f3552"
            panel.plot([figure.low, figure.high], [place, place], color=colour, linewidth=2)
            panel.plot(figure.value, place, "o", color=colour, markersize=4)
        panel.set_title(system, fontsize=9, loc="left")
        panel.set_yticks(range(len(scores)), [result.measures[score].label for score in scores], fontsize=8)
        panel.set_ylim(len(scores) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    for panel in panels[len(result.systems) :]:
        panel.set_axis_off()
    note = "Spearman's correlation; grey: the interval holds 0; green: a rater against the others"
    drawing.supxlabel(note, fontsize=8)
    return drawing
