"""Response selection (table 8): how well scores choose the right ones of a context's candidates.

MAP, MRR, P@1 and R_n@k of each score by torchmetrics, their means over contexts with bootstrap intervals, and
paired tests between scores with Holm's correction. Contexts without a right or without a wrong candidate have
nothing to choose: they are counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from plato2.config import UserError
from plato2.evaluate.candidates import Query
from plato2.evaluate.results import Figure, Measure, Result, print_table
from plato2.evaluate.scorers import Scorer
from plato2.metrics import bootstrap_means
from plato2.talk.table import printable

TIE_DRAWS = 200
"""How often equal scores are put in a random order; the mean of these is what they get."""
RESAMPLES = 2000
FLIPS = 9999
FLIPS_AT_ONCE = 500
TESTED = ("map", "mrr", "p1")
"""Measures of which scores are compared."""

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class SelectionSet:
    """The contexts of a set that have something to choose, and how many have not."""

    name: str
    queries: tuple[int, ...]
    """Their numbers in the list of all queries."""
    without_right: int
    without_wrong: int
    fewest: int
    """Candidates of the context with the fewest."""
    most: int
    chance: dict[str, float]
    """What a random order gets, measure by measure."""


def score_queries(
    queries: Sequence[Query],
    scorers: Mapping[str, Scorer],
    done: Sequence[Scores] = (),
    append: Callable[[Scores], None] = lambda scores: None,
) -> Iterable[Scores]:
    """The scores of each query by name of the scorer, one query after the other.

    Args:
        queries: what is to be scored.
        scorers: by name.
        done: the scores of the first queries, from before.
        append: called with each that is new.

    Raises:
        UserError: a score that is not a number.
    """
    yield from done[: len(queries)]
    for query in queries[len(done) :]:
        found = {name: list(scorer(query.context, query.candidates)) for name, scorer in scorers.items()}
        for name, scores in found.items():
            if not np.isfinite(scores).all():
                raise UserError(
                    f"{query.place}: {name} gives a candidate {np.sum(scores)}, not a number; is that model "
                    "trained to its end?"
                )
        append(found)
        yield found


def sets_of(queries: Sequence[Query], ks: Sequence[int]) -> list[SelectionSet]:
    """The sets of all queries, in the order in which they appear.

    Raises:
        UserError: a set without a context that has something to choose.
    """
    found = []
    for name in dict.fromkeys(name for query in queries for name in query.sets):
        labels = {n: labels_in(query, name) for n, query in enumerate(queries) if name in query.sets}
        chosen = {n: right for n, right in labels.items() if any(right) and not all(right)}
        without_right = sum(not any(right) for right in labels.values())
        if not chosen:
            raise UserError(
                f"{name}: none of {len(labels)} contexts has both right and wrong candidates "
                f"({without_right} have no right one); there is nothing to choose"
            )
        sizes = [len(right) for right in chosen.values()]
        by_chance = [chance(len(right), sum(right), ks) for right in chosen.values()]
        found.append(
            SelectionSet(
                name,
                tuple(chosen),
                without_right,
                len(labels) - len(chosen) - without_right,
                min(sizes),
                max(sizes),
                {key: float(np.mean([one[key] for one in by_chance])) for key in by_chance[0]},
            )
        )
    return found


def labels_in(query: Query, name: str) -> tuple[bool, ...]:
    """The labels of a query's candidates that belong to a set."""
    return tuple(query.labels[number] for number in query.sets[name])


def chance(n: int, right: int, ks: Sequence[int]) -> dict[str, float]:
    """The expected figures of a random order of n candidates of which some are right."""
    ranks = np.arange(1, n + 1)
    precision = (1 + (ranks - 1) * (right - 1) / max(n - 1, 1)) / ranks  # at the rank of a right one
    none_before = np.cumprod([1.0, *((n - right - rank + 1) / (n - rank + 1) for rank in ranks[:-1])])
    first = none_before * right / (n - ranks + 1).clip(1)
    return {
        "map": float(precision.mean()),
        "mrr": float((first / ranks).sum()),
        "p1": right / n,
        **{f"r{k}": min(k / n, 1.0) for k in ks},
    }


@lru_cache(maxsize=1 << 16)
def measures_of(right: tuple[bool, ...], ks: tuple[int, ...]) -> tuple[float, ...]:
    """MAP, MRR, P@1 and R@k of a query by torchmetrics.

    Only the order of right and wrong ones matters, of which there are few among a few candidates, so each is
    computed once.

    Args:
        right: whether each candidate is right, best first.
        ks: of R@k.
    """
    import torch
    from torchmetrics.functional import retrieval as of

    scores = torch.arange(len(right), 0, -1, dtype=torch.float32)  # > 0: others count as not retrieved
    labels = torch.tensor(right)
    found = [of.retrieval_average_precision(scores, labels), of.retrieval_reciprocal_rank(scores, labels)]
    found.append(of.retrieval_precision(scores, labels, top_k=1))
    found += [of.retrieval_recall(scores, labels, top_k=k) for k in ks]
    return tuple(float(value) for value in found)


def measured(
    scores: Sequence[float], labels: Sequence[bool], ks: Sequence[int], seed: int
) -> tuple[np.ndarray, bool]:
    """MAP, MRR, P@1 and R@k of a query, and whether a right and a wrong candidate have one score.

    Equal scores are put in a random order `TIE_DRAWS` times, and the mean is taken: so they share what they
    could get, and a score that is the same for all is worth chance.
    """
    found, right = np.asarray(scores), np.asarray(labels)
    tied = bool(np.isin(found[right], found[~right]).any())
    random = np.random.default_rng(seed)
    values = []
    for _ in range(TIE_DRAWS if tied else 1):
        order = np.lexsort((random.random(len(found)), -found))
        values.append(measures_of(tuple(right[order].tolist()), tuple(ks)))
    return np.mean(values, axis=0), tied


def permutation_p(differences: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-values of paired permutation tests: how often the mean is as far from 0 when each context's
    two scores are swapped at random.

    All columns get the same swaps, which is why a library, one test at a time, would take a hundred times as
    long.

    Args:
        differences: (n, m), a context per row, a pair of scores per column.
        seed: of the swaps.

    Returns:
        (m,); at least 1 / (FLIPS + 1).
    """
    random, mean = np.random.default_rng(seed), np.abs(differences.mean(axis=0))
    as_far = np.zeros(differences.shape[1])
    for start in range(0, FLIPS, FLIPS_AT_ONCE):
        signs = random.integers(0, 2, (min(FLIPS_AT_ONCE, FLIPS - start), len(differences))) * 2.0 - 1.0
        as_far += (np.abs(signs @ differences) / len(differences) >= mean - 1e-12).sum(axis=0)
    return np.asarray((1 + as_far) / (1 + FLIPS))


def evaluate_selection(
    queries: Sequence[Query], scored: Sequence[Scores], ks: Sequence[int] = (1, 2, 5), seed: int = 0
) -> Result:
    """The figures of all scores on all sets, and the tests between them.

    Args:
        queries: with labels.
        scored: the scores of each, from `score_queries`.
        ks: of R_n@k; where all contexts of a set have fewer candidates, it is left out.
        seed: of ties, resamples and tests.

    Returns:
        A result whose figures are named `SET/MEASURE`; `details` has `sets` and `tests`.

    Raises:
        UserError: a set without a context that has something to choose.
    """
    result = Result(kind="selection", measures={}, systems={name: {} for name in scored[0]})
    sets = sets_of(queries, ks)
    result.details = {"sets": {}, "tests": []}
    for chosen in sets:
        own = [k for k in ks if k < chosen.most]
        values = _values(queries, scored, chosen, own, seed)  # (n, systems, measures + 1)
        n = str(chosen.most) if chosen.fewest == chosen.most else "n"
        labels = {"map": "MAP", "mrr": "MRR", "p1": "P@1", **{f"r{k}": f"R_{n}@{k}" for k in own}}
        low, high = (
            bound.reshape(values.shape[1:])
            for bound in bootstrap_means(values.reshape(len(values), -1), RESAMPLES, seed)
        )
        mean = values.mean(axis=0)
        for place, (key, label) in enumerate({**labels, "ties": "right and wrong tied"}.items()):
            result.measures[f"{chosen.name}/{key}"] = Measure(
                label=f"{chosen.name}: {label}",
                better="low" if key == "ties" else "high",
                chance=chosen.chance.get(key),
            )
            for number, name in enumerate(scored[0]):
                result.systems[name][f"{chosen.name}/{key}"] = Figure(
                    value=float(mean[number, place]),
                    low=float(low[number, place]),
                    high=float(high[number, place]),
                    n=len(values),
                )
        result.details["sets"][chosen.name] = {
            "contexts": len(values),
            "without_right": chosen.without_right,
            "without_wrong": chosen.without_wrong,
            "candidates": [chosen.fewest, chosen.most],
        }
        for place, key in enumerate(TESTED):
            result.details["tests"] += _tests(list(scored[0]), values[:, :, place], chosen.name, key, seed)
    return result


def _values(
    queries: Sequence[Query], scored: Sequence[Scores], chosen: SelectionSet, ks: Sequence[int], seed: int
) -> np.ndarray:
    """(n, systems, measures + 1): the figures of each context, and whether it has ties."""
    values = []
    for number in chosen.queries:
        numbers, labels = queries[number].sets[chosen.name], labels_in(queries[number], chosen.name)
        row = []
        for scores in scored[number].values():
            found, tied = measured([scores[place] for place in numbers], labels, ks, seed + number)
            row.append([*found, float(tied)])
        values.append(row)
    return np.array(values)


def _tests(
    names: Sequence[str], values: np.ndarray, chosen: str, key: str, seed: int
) -> list[dict[str, object]]:
    """Paired tests of all pairs of scores by one measure, (n, systems), with Holm's correction over them."""
    from statsmodels.stats.multitest import multipletests

    pairs = list(combinations(range(len(names)), 2))
    if not pairs:
        return []
    differences = np.stack([values[:, a] - values[:, b] for a, b in pairs], axis=1)
    low, high = bootstrap_means(differences, RESAMPLES, seed)
    p = permutation_p(differences, seed)
    corrected = multipletests(p, method="holm")[1]
    return [
        {
            "set": chosen,
            "measure": key,
            "a": names[a],
            "b": names[b],
            "difference": float(differences[:, number].mean()),
            "low": float(low[number]),
            "high": float(high[number]),
            "p": float(p[number]),
            "p_holm": float(corrected[number]),
        }
        for number, (a, b) in enumerate(pairs)
    ]


def print_selection(result: Result, console: Console) -> None:
    """A table for each set, a score per row, as table 8; below it what the tests say of the best score."""
    for name, about in result.details["sets"].items():
        measures = {key: one for key, one in result.measures.items() if key.startswith(f"{name}/")}
        measures.pop(f"{name}/ties")  # said below the table
        title = f"{name}: {about['contexts']:,} contexts"
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("score", overflow="fold")
        for measure in measures.values():
            table.add_column(measure.label.removeprefix(f"{name}: "), justify="right", no_wrap=True)
        cells = ["" if one.chance is None else f"{one.chance:.3f}" for one in measures.values()]
        table.add_row("chance", *cells, style="dim")
        for system, figures in result.systems.items():
            table.add_row(
                Text(printable(system)),
                *(_cell(figures[key], key.rpartition("/")[2] in TESTED) for key in measures),
            )
        left_out = {"no right": about["without_right"], "no wrong": about["without_wrong"]}
        said = [f"{n:,} contexts with {which} candidate left out" for which, n in left_out.items() if n]
        tied = {system: figures[f"{name}/ties"].value or 0.0 for system, figures in result.systems.items()}
        shares = [f"{system} {share:.0%}" for system, share in tied.items() if share >= 0.005]
        said += [f"right and wrong tied: {', '.join(shares)}"] if shares else []
        table.caption = "; ".join(said)
        print_table(table, console)
        if result.details["tests"]:
            console.print(_tests_table(result, name))


def _cell(figure: Figure, with_interval: bool) -> str:
    interval = f"\n{figure.low:.2f}-{figure.high:.2f}" if with_interval else ""
    return f"{figure.value:.3f}{interval}"


def _tests_table(result: Result, name: str, key: str = "map") -> Table:
    """The best score of a set against each other one."""
    best = max(result.systems, key=lambda system: result.systems[system][f"{name}/{key}"].value or 0.0)
    table = Table(title_justify="left", caption_justify="left")
    table.add_column(Text(printable(f"MAP of {best}")), overflow="fold")
    for column in ("difference", "p", "p (Holm)"):
        table.add_column(column, justify="right")
    for test in result.details["tests"]:
        if (test["set"], test["measure"]) == (name, key) and best in (test["a"], test["b"]):
            sign = 1 if test["a"] == best else -1
            low, high = sorted((sign * test["low"], sign * test["high"]))
            table.add_row(
                Text(printable(f"against {test['b' if sign == 1 else 'a']}")),
                f"{sign * test['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
                f"{test['p']:.4f}",
                f"{test['p_holm']:.4f}",
            )
    return table
