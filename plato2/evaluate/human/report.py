"""What raters found: scores by system, systems against each other, how much raters agree.

Scores are those of the paper: the majority of a unit's raters, and its mean over units. Intervals draw start
utterances again, with all that was said after them, since turns of one dialogue and dialogues of one start
are not independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from plato2.evaluate.human.agreement import (
    PAPER_KAPPA,
    count_table,
    fleiss_kappa,
    krippendorff_alpha,
    majority,
    plain_agreement,
    same_number,
    scale_of,
)
from plato2.evaluate.human.formats import Question
from plato2.evaluate.human.ratings import Checked, Rated
from plato2.evaluate.results import Figure, Input, Measure, Result, picture
from plato2.metrics import bootstrap
from plato2.talk.table import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

RESAMPLES = 2000
Values = dict[str, list[float]]
"""Start -> values of what was said after it."""


def human_result(checked: Checked, inputs: Sequence[Input], failed_checks: int = 0, seed: int = 0) -> Result:
    """Scores, comparisons and agreement of ratings.

    Args:
        checked: the ratings that count.
        inputs: their files.
        failed_checks: as it was for `check_ratings`.
        seed: of the intervals.

    Returns:
        Of kind `human`: for a question NAME of a turn or a dialogue the measures NAME (majorities) and
        NAME_mean (all ratings), for one of pairs NAME (share of wins, ties half). `details` has `counts` and
        `failed` of `Checked`, `agreement` by question, and `comparisons` of two systems.
    """
    by_question: dict[str, list[Rated]] = defaultdict(list)
    for rated in checked.rated:
        by_question[rated.unit.question.name].append(rated)
    names = [shown.system for item in checked.tasks.items if item.expected is None for shown in item.shown]
    result = Result(
        kind="human",
        inputs=list(inputs),
        settings={
            "preset": checked.tasks.preset,
            "seed": seed,
            "resamples": RESAMPLES,
            "failed_checks": failed_checks,
            "majority": "the level that most raters gave; of a split of numbers the median, of a pair a tie",
        },
        measures={},
        systems={name: {} for name in names},
        details={
            "counts": checked.counts,
            "failed": checked.failed,
            "agreement": {},
            "paper_kappa": PAPER_KAPPA,
            "comparisons": [],
        },
    )
    agreement = result.details["agreement"]
    for question in checked.tasks.questions:
        if not (units := by_question[question.name]):
            continue
        agreement[question.name] = _agreement(question, units, seed)
        if question.per == "pair" and set(_levels(question)) <= {"left", "right", "tie"}:
            _pairs(question, units, result)
        elif question.per != "pair" and scale_of(_levels(question)) == "ordinal":
            _scores(question, units, result)
    if (pooled := _pooled(checked)) is not None:
        agreement["all"] = _agreement(*pooled, seed)
    _correct(result.details["comparisons"])
    return result


# ---------------------------------------------------------------------------------------------- the figures


def _levels(question: Question) -> list[int | str]:
    return [level.value for level in question.levels]


def _table(question: Question, units: Sequence[Rated]) -> np.ndarray:
    return count_table([list(rated.answers.values()) for rated in units], _levels(question))


def _mean(values: Values, seed: int) -> tuple[float, float, float, int]:
    """The mean over all values, its interval over starts, and the number of values."""
    sums = np.array([sum(found) for found in values.values()])
    numbers = np.array([len(found) for found in values.values()])
    low, high = bootstrap(
        lambda draw: float(sums[draw].sum() / numbers[draw].sum()), len(sums), RESAMPLES, seed
    )
    return float(sums.sum() / numbers.sum()), low, high, int(numbers.sum())


def _figure(values: Values, seed: int, note: str = "") -> Figure:
    mean, low, high, n = _mean(values, seed)
    return Figure(value=mean, low=low, high=high, n=n, note=note)


def _scores(question: Question, units: Sequence[Rated], result: Result) -> None:
    """Adds scores of what was said, by system; of every two systems on the starts of both."""
    seed = result.settings["seed"]
    voted, split = majority(_table(question, units), _levels(question))
    by_vote: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    by_mean: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    splits: dict[str, int] = defaultdict(int)
    for rated, value, is_split in zip(units, voted, split, strict=True):
        system, start = rated.unit.item.shown[0].system, rated.unit.item.start
        by_vote[system][start].append(float(value))
        by_mean[system][start].append(float(np.mean([float(value) for value in rated.answers.values()])))
        splits[system] += int(is_split)
    name = question.name
    result.measures[name] = Measure(label=name, better="high")
    result.measures[f"{name}_mean"] = Measure(label=f"{name}, mean of all ratings", better="high")
    for system, values in by_vote.items():
        note = f"{splits[system]} units without a majority: the median" if splits[system] else ""
        result.systems[system][name] = _figure(values, seed, note)
        result.systems[system][f"{name}_mean"] = _figure(by_mean[system], seed)
    for one, other in combinations(by_vote, 2):
        starts = [start for start in by_vote[one] if start in by_vote[other]]
        if not starts:
            continue
        differences = [
            float(np.mean(by_vote[one][start]) - np.mean(by_vote[other][start])) for start in starts
        ]
        result.details["comparisons"].append(
            _compared(name, "start", one, other, dict(zip(starts, differences, strict=True)), seed)
        )


def _pairs(question: Question, units: Sequence[Rated], result: Result) -> None:
    """Adds wins, ties and losses of pairs, whichever side each system was shown on."""
    seed, order = result.settings["seed"], list(result.systems)
    voted, split = majority(_table(question, units), _levels(question))
    points: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    pairs: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    splits: dict[str, int] = defaultdict(int)
    for rated, vote, is_split in zip(units, voted, split, strict=True):
        left, right = (shown.system for shown in rated.unit.item.shown)
        of_left = {"left": 1.0, "right": -1.0, "tie": 0.0}[str(vote)]
        for system, won in ((left, of_left), (right, -of_left)):
            points[system][rated.unit.item.start].append((won + 1) / 2)
            splits[system] += int(is_split)
        one, other = sorted((left, right), key=order.index)
        won = of_left if one == left else -of_left
        pairs[one, other][rated.unit.item.start, rated.unit.item.id] = won
    result.measures[question.name] = Measure(
        label=f"{question.name}, share of wins", better="high", chance=0.5
    )
    for system, values in points.items():
        note = f"{splits[system]} pairs without a majority: a tie" if splits[system] else ""
        result.systems[system][question.name] = _figure(values, seed, note)
    for (one, other), results in pairs.items():
        found = _compared(question.name, "pair", one, other, results, seed)
        result.details["comparisons"].append(found)


def _compared(
    question: str, unit: str, one: str, other: str, differences: dict[Any, float], seed: int
) -> dict[str, Any]:
    """Two systems: how often the first is better, as good, worse; the mean difference; a sign test.

    Args:
        question: its name.
        unit: what is compared: a `pair`, or a `start` by the means of both systems after it.
        one: the first system.
        other: the second.
        differences: start, or (start, item) -> above 0 where the first is better.
        seed: of the interval.
    """
    from scipy.stats import binomtest

    values = np.array(list(differences.values()))
    wins, losses = int((values > 1e-9).sum()), int((values < -1e-9).sum())
    by_start: Values = defaultdict(list)
    for key, value in differences.items():
        by_start[key[0] if isinstance(key, tuple) else key].append(float(value))
    mean, low, high, n = _mean(by_start, seed)
    return {
        "question": question,
        "of": unit,
        "system": one,
        "other": other,
        "wins": wins,
        "ties": n - wins - losses,
        "losses": losses,
        "difference": mean,
        "low": low,
        "high": high,
        "p": float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    }


def _correct(comparisons: list[dict[str, Any]]) -> None:
    """Adds `p_holm`, corrected for the number of comparisons (Holm, 1979)."""
    from statsmodels.stats.multitest import multipletests

    if comparisons:
        corrected = multipletests([found["p"] for found in comparisons], method="holm")[1]
        for found, p in zip(comparisons, corrected, strict=True):
            found["p_holm"] = float(p)


def agreement_by_question(checked: Checked) -> dict[str, dict[str, Any]]:
    """How much raters agree, without intervals; `all` is all questions together, where that can be."""
    by_question: dict[str, list[Rated]] = defaultdict(list)
    for rated in checked.rated:
        by_question[rated.unit.question.name].append(rated)
    found = {name: _agreement_of(units[0].unit.question, units) for name, units in by_question.items()}
    if (pooled := _pooled(checked)) is not None:
        found["all"] = _agreement_of(*pooled)
    return found


def _agreement_of(question: Question, units: Sequence[Rated]) -> dict[str, Any]:
    table, levels = _table(question, units), _levels(question)
    fit = same_number(table)
    numbers, counts = np.unique(table.sum(axis=1), return_counts=True)
    several = [rated.unit.item.id for rated in units if len(rated.answers) > 1]
    return {
        "units": len(table),
        "units_of_several": len(several),
        "items_of_several": len(set(several)),
        "raters_per_unit": {str(n): int(count) for n, count in zip(numbers, counts, strict=True)},
        "plain": _plain(plain_agreement(table)),
        "fleiss_kappa": _plain(fleiss_kappa(table[fit])),
        "fleiss_kappa_units": int(fit.sum()),
        "krippendorff_alpha": _plain(krippendorff_alpha(table, levels)),
        "scale": scale_of(levels),
        "splits": int(majority(table, levels)[1].sum()),
        "all_equal": bool((table > 0).any(axis=0).sum() == 1),
    }


def _agreement(question: Question, units: Sequence[Rated], seed: int) -> dict[str, Any]:
    """How much raters agree on a question; kappa's interval draws starts again."""
    table = _table(question, units)
    fit = same_number(table)
    kept = table[fit]
    starts = [rated.unit.item.start for rated, is_fit in zip(units, fit, strict=True) if is_fit]
    rows: dict[str, list[int]] = defaultdict(list)
    for row, start in enumerate(starts):
        rows[start].append(row)
    of_start = [np.array(found) for found in rows.values()]
    low, high = bootstrap(
        lambda draw: fleiss_kappa(kept[np.concatenate([of_start[start] for start in draw])]),
        len(of_start),
        RESAMPLES // 4,
        seed,
    )
    interval = {"fleiss_kappa_low": _plain(low), "fleiss_kappa_high": _plain(high)}
    return _agreement_of(question, units) | interval


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _pooled(checked: Checked) -> tuple[Question, list[Rated]] | None:
    """All questions together where several have the same levels, as the paper's one kappa."""
    asked = {rated.unit.question.name: rated.unit.question for rated in checked.rated}
    if len(asked) < 2 or len({tuple(_levels(question)) for question in asked.values()}) > 1:
        return None
    return next(iter(asked.values())), checked.rated


# ------------------------------------------------------------------------------------- tables and a picture


def agreement_table(result: Result) -> Table:
    """A line for each question, and one for all together."""
    title = f"agreement of raters (the paper's kappa: {PAPER_KAPPA})"
    table = Table("question", title=title, title_justify="left")
    for column in ("units", "raters", "plain", "Fleiss' kappa", "Krippendorff's alpha", "no majority"):
        table.add_column(column, justify="right")
    for name, found in result.details["agreement"].items():
        numbers = [int(n) for n in found["raters_per_unit"]]
        raters = f"{min(numbers)}" + (f" to {max(numbers)}" if len(numbers) > 1 else "")
        kappa = _shown(found["fleiss_kappa"])
        if found["fleiss_kappa_low"] is not None:
            kappa += f" ({found['fleiss_kappa_low']:.3f} to {found['fleiss_kappa_high']:.3f})"
        if found["all_equal"] and found["fleiss_kappa"] is not None:
            kappa += ", all ratings are equal"
        if 0 < found["fleiss_kappa_units"] < found["units"]:
            kappa += f", of {found['fleiss_kappa_units']}"
        alpha = f"{_shown(found['krippendorff_alpha'])} ({found['scale']})"
        table.add_row(
            Text(printable(name)),
            str(found["units"]),
            raters,
            _shown(found["plain"]),
            kappa,
            alpha,
            str(found["splits"]),
        )
    return table


def comparison_table(result: Result) -> Table:
    """Two systems a line: how often the first was better, as good and worse."""
    title = "two systems (sign test, ties left out; p after Holm's correction for all lines)"
    table = Table("question", "of", "system", "other", title=title, title_justify="left")
    for column in ("win", "tie", "loss", "mean difference", "p", "p (Holm)"):
        table.add_column(column, justify="right")
    for found in result.details["comparisons"]:
        difference = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        counts = (str(found[name]) for name in ("wins", "ties", "losses"))
        names = [Text(printable(found[name])) for name in ("question", "of", "system", "other")]
        table.add_row(*names, *counts, difference, f"{found['p']:.3g}", f"{found['p_holm']:.3g}")
    return table


def human_picture(result: Result) -> Picture:
    """Of pairs, bars of win, tie and loss; of scores a panel for each question."""
    pairs = [found for found in result.details["comparisons"] if found["of"] == "pair"]
    if not pairs:
        return picture(result, [name for name in result.measures if not name.endswith("_mean")])
    from matplotlib.figure import Figure as Picture

    drawing = Picture(figsize=(8, 1.2 + 0.45 * len(pairs)), layout="constrained")
    panel = drawing.subplots()
    colours = {"wins": "#4c78a8", "ties": "#c9c9c9", "losses": "#b0413e"}
    for row, found in enumerate(pairs):
        n, left = found["wins"] + found["ties"] + found["losses"], 0.0
        for name, colour in colours.items():
            share = found[name] / n
            label = name if row == 0 else None
            panel.barh(row, share, left=left, color=colour, label=label)
            if share > 0.05:
                panel.text(left + share / 2, row, str(found[name]), ha="center", va="center", fontsize=8)
            left += share
    names = [printable(f"{found['question']}: {found['system']} : {found['other']}") for found in pairs]
    panel.set_yticks(range(len(pairs)), names, fontsize=8, parse_math=False)
    panel.set_ylim(len(pairs) - 0.5, -0.5)
    panel.axvline(0.5, color="black", linestyle="--", linewidth=1)
    panel.set_xlabel("share of pairs; wins and losses of the first", fontsize=8)
    panel.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawing


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
