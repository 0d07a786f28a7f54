"""Who finds the right reply: each context's own among nine of other contexts, any or of about its length.

A language model chooses by log p(r|c) - log p(r|neutral): how much more probable the context makes a reply
than a greeting does. Without the second term it chooses what is always probable. A ranker chooses by
p(l=1|c,r). The control asks the same questions after another context, where nothing but a leak could find
the reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from experiments.small.small_model import write_sets
from plato2.data.selection import CANDIDATES
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.candidates import Query, read_queries
from plato2.evaluate.kept import kept
from plato2.evaluate.scorers import (
    Coherence,
    LogProb,
    Scorer,
    Texts,
    baselines,
    corpus_texts,
    forward,
    speaker_scorers,
)
from plato2.evaluate.selection import Scores, evaluate_selection, score_queries
from plato2.evaluate.speakers import read_speaker
from plato2.files import file_sha256
from plato2.metrics import bootstrap_means
from plato2.talk.speaker import weights_hash
from plato2.weights.folder import load_evaluation, load_generation, saved_tokenizer

NEUTRAL = ("hi .",)
"""The context that asks for nothing."""
CONTROL = "another"
"""Set: the first set's questions after contexts of other groups."""
SETS = ("random", "matched")
DIGITS = 4


def two_ways(name: str, summed: Scorer) -> dict[str, Scorer]:
    """`NAME, log p` and `NAME, difference`: log p(r|c), and that less log p(r|neutral).

    Both read the same, and all contexts of a group have the same candidates, so what was read is kept.

    Args:
        name: of the language model.
        summed: its summed log-probabilities.
    """
    worth: dict[str, float] = {}

    @lru_cache(maxsize=1)
    def after(context: tuple[str, ...], candidates: tuple[str, ...]) -> Sequence[float]:
        return summed(context, candidates)

    def log_p(context: Texts, candidates: Texts) -> Sequence[float]:
        return after(tuple(context), tuple(candidates))

    def difference(context: Texts, candidates: Texts) -> list[float]:
        if new := [text for text in dict.fromkeys(candidates) if text not in worth]:
            worth.update(zip(new, summed(NEUTRAL, new), strict=True))
        scores = log_p(context, candidates)
        return [float(score - worth[text]) for score, text in zip(scores, candidates, strict=True)]

    return {f"{name}, log p": log_p, f"{name}, difference": difference}


def decoder_scorers(folder: Path) -> dict[str, Scorer]:
    """The two ways in which the decoder as it is chooses, by its chat template."""
    found = speaker_scorers(read_speaker(f"smollm2=hf:{folder}", "--base", "cpu"), "summed")
    (summed,) = found.values()
    return two_ways("smollm2", summed)


def coarse_scorers(run: Path) -> dict[str, Scorer]:
    """The same of a run of stage 1."""
    return two_ways("stage 1", LogProb(forward(load_generation(run), saved_tokenizer(run))).summed)


def queries_of(data: Path, work: Path, n: int) -> list[Query]:
    """n questions of each set, and the control's.

    Args:
        data: the prepared corpus; the questions are of its test split.
        work: where the sets are written.
        n: whole groups of ten, in which each context asks once.
    """
    if not all((work / f"{name}.jsonl").exists() for name in SETS):
        write_sets(data, Tokenizer.load(data / "tokenizer"), work)
    found = {name: some_groups(list(read_queries(work / f"{name}.jsonl", "jsonl")), n) for name in SETS}
    asked = found[SETS[0]]
    others = [asked[(place + CANDIDATES) % len(asked)] for place in range(len(asked))]  # of another group
    spoilt = [
        replace(query, context=other.context, sets={CONTROL: tuple(range(len(query.labels)))})
        for query, other in zip(asked, others, strict=True)
    ]
    return [*found["random"], *found["matched"], *spoilt]


def some_groups(queries: Sequence[Query], n: int) -> list[Query]:
    """n questions in whole groups, from all over the file: groups of one length stand in order of length."""
    n_groups = len(queries) // CANDIDATES
    places = np.linspace(0, n_groups - 1, min(n // CANDIDATES, n_groups)).round().astype(int)
    return [queries[CANDIDATES * place + member] for place in places for member in range(CANDIDATES)]


def pair_accuracy(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The share of wrong candidates below the right one; equal ones count half."""
    (right,) = (score for score, label in zip(scores, labels, strict=True) if label)
    wrong = np.array([score for score, label in zip(scores, labels, strict=True) if not label])
    return float(np.mean((wrong < right) + 0.5 * (wrong == right)))


def measured(queries: Sequence[Query], scored: Sequence[Scores]) -> dict[str, Any]:
    """Set -> scorer -> measure -> [value, low, high], and the tests between scorers."""
    result = evaluate_selection(queries, scored, ks=(1,))
    found: dict[str, Any] = {}
    for chosen in result.details["sets"]:
        of = [(q, s) for q, s in zip(queries, scored, strict=True) if chosen in q.sets]
        pairs = np.array([[pair_accuracy(s[name], q.labels) for name in s] for q, s in of])
        low, high = bootstrap_means(pairs)
        for place, name in enumerate(scored[0]):
            figures = {"pair_acc": (pairs[:, place].mean(), low[place], high[place])}
            for key in ("p1", "mrr"):
                figure = result.systems[name][f"{chosen}/{key}"]
                figures[key] = (figure.value, figure.low, figure.high)
            rounded = {key: [round(float(x), DIGITS) for x in three] for key, three in figures.items()}
            found.setdefault(chosen, {})[name] = rounded
    return {"sets": found, "tests": result.details["tests"]}


def selection(
    data: Path, base: Path, coarse: Path, rankers: Mapping[str, Path], n: int, work: Path
) -> dict[str, Any]:
    """Who finds the right reply; scores are kept in `work`, one file for each model.

    Args:
        data: the prepared corpus.
        base: the decoder as it is.
        coarse: a run of stage 1.
        rankers: runs of stage 2.2 by name.
        n: questions of each set.
        work: the folder of what is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    queries = queries_of(data, work, n)
    models: dict[str, Any] = {
        "smollm2": (lambda: decoder_scorers(base), file_sha256(base / "model.safetensors")),
        "coarse": (lambda: coarse_scorers(coarse), weights_hash(load_generation(coarse))),
    }
    for name, run in rankers.items():

        def coherence(name: str = name, run: Path = run) -> dict[str, Scorer]:
            return {name: Coherence(load_evaluation(run), saved_tokenizer(run))}

        models[name] = (coherence, weights_hash(load_evaluation(run)))
    read = repr([(query.context, query.candidates) for query in queries])
    asked = {"queries": sha256(read.encode("utf-8", "surrogatepass")).hexdigest(), "neutral": NEUTRAL}
    texts = [text for query in queries for text in query.candidates]
    simple = baselines([q.context for q in queries], texts, corpus_texts(data), seed=0)
    scored: list[Scores] = [
        {name: list(scorer(query.context, query.candidates)) for name, scorer in simple.items()}
        for query in queries
    ]
    for name, (scorers, model) in models.items():
        file = work / f"scores-{name.replace(' ', '-')}.jsonl"
        with kept(file, {"model": model, **asked}, Scores) as (done, append):
            make = scorers() if len(done) < len(queries) else {}
            for found, new in zip(scored, score_queries(queries, make, done, append), strict=True):
                found |= new
    return measured(queries, scored)
