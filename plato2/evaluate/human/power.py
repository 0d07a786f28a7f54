"""How many items and raters show which difference: the power calculation before anyone is asked.

A case is what stands alone: a start utterance with all that a system said after it. Two systems with other
cases each are compared by a t-test of the cases' means; two systems in pairs by a sign test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plato2.config import UserError
from plato2.evaluate.human.agreement import PAPER_KAPPA, scale_of
from plato2.evaluate.human.ratings import Checked
from plato2.evaluate.results import Figure, Measure, Result

TOP_SCORE = {"plato": 2, "chat": 2, "ssa": 1, "candidates": 1}
"""The highest score of presets that give scores."""
PAIRS = ("topic", "acute")
"""Presets that compare two systems side by side."""
MOST_CASES = 20_000
"""Pairs up to which the sign test's power is computed."""


@dataclass(frozen=True)
class Variances:
    """Where the spread of scores comes from. The default is what FED's raters had on 0/1/2."""

    case: float = 0.08
    """Of the true scores of cases of one system."""
    rater: float = 0.31
    """Of one rater's scores around a case's true score."""

    def of_mean(self, raters: int) -> float:
        """Of the mean of some raters of a case."""
        return self.case + self.rater / raters


def measured(checked: Checked, question: str | None = None) -> tuple[str, Variances]:
    """The variances in ratings: a one-way analysis, cases in systems, of each rater's mean in a case.

    Args:
        checked: ratings of scores.
        question: whose; the first that has scores by default.

    Returns:
        The question and its variances.

    Raises:
        UserError: no such question, or too few ratings of one case or cases of one system.
    """
    names = [
        q.name
        for q in checked.tasks.questions
        if q.per != "pair" and scale_of([level.value for level in q.levels]) == "ordinal"
    ]
    if not names or (question is not None and question not in names):
        raise UserError(
            f"question={question}: the tasks have scores of {', '.join(names) or 'no question'}; name one"
        )
    name = question or names[0]
    given: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rated in checked.rated:
        if rated.unit.question.name == name:
            item = rated.unit.item
            for rater, value in rated.answers.items():
                given[item.shown[0].system, item.start][rater].append(float(value))
    within: list[tuple[float, int]] = []
    means: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (system, _), by_rater in given.items():
        scores = np.array([np.mean(values) for values in by_rater.values()])
        means[system].append((float(scores.mean()), len(scores)))
        within.append((float(((scores - scores.mean()) ** 2).sum()), len(scores) - 1))
    n_free = sum(n for _, n in within)
    several = [found for found in means.values() if len(found) > 1]
    if n_free == 0 or not several:
        raise UserError(
            f"question={name}: needs two cases of a system and two raters of a case; leave the ratings out"
        )
    of_rater = sum(squares for squares, _ in within) / n_free
    spread = sum(float(np.var([mean for mean, _ in found])) * len(found) for found in several)
    between = spread / sum(len(found) - 1 for found in several)
    share = float(np.mean([1 / n for found in several for _, n in found]))
    return name, Variances(max(0.0, between - of_rater * share), of_rater)


def score_cases(difference: float, raters: int, variances: Variances, power: float, alpha: float) -> int:
    """Cases of each system that show a difference of mean scores with this power, two-sided."""
    from statsmodels.stats.power import TTestIndPower

    effect = difference / math.sqrt(variances.of_mean(raters))
    n = TTestIndPower().solve_power(effect_size=effect, power=power, alpha=alpha)
    return max(2, math.ceil(float(np.ravel(n)[0]) - 1e-9))


def score_difference(cases: int, raters: int, variances: Variances, power: float, alpha: float) -> float:
    """The smallest difference of mean scores that so many cases of each system show with this power."""
    from statsmodels.stats.power import TTestIndPower

    effect = TTestIndPower().solve_power(nobs1=cases, power=power, alpha=alpha)
    return float(np.ravel(effect)[0]) * math.sqrt(variances.of_mean(raters))


def majority_share(share: float, raters: int, agreement: float) -> tuple[float, float]:
    """What the majority of raters says of pairs, if a single rater prefers the better system so often.

    A pair's own share is drawn from a beta distribution with mean `share` and intraclass correlation
    `agreement`, which is about Fleiss' kappa of two answers.

    Returns:
        How often the majority prefers the better system where there is a majority, and how often there is
        one.
    """
    from scipy.stats import betabinom, binom

    if agreement <= 0:
        votes = binom(raters, share)
    else:
        both = 1 / agreement - 1
        votes = betabinom(raters, share * both, (1 - share) * both)
    numbers = np.arange(raters + 1)
    p = votes.pmf(numbers)
    won, lost = float(p[2 * numbers > raters].sum()), float(p[2 * numbers < raters].sum())
    return won / (won + lost), won + lost


def sign_test_power(share: float, alpha: float, most: int = MOST_CASES) -> np.ndarray:
    """The exact power of a two-sided sign test of 1, 2, ... `most` decided pairs, (most,)."""
    from scipy.stats import binom

    n = np.arange(1, most + 1)
    low = binom.ppf(alpha / 2, n, 0.5)
    low = np.where(binom.cdf(low, n, 0.5) > alpha / 2, low - 1, low)
    return np.asarray(binom.cdf(low, n, share) + binom.sf(n - low - 1, n, share))


def pair_cases(
    share: float, raters: int, power: float, alpha: float, agreement: float = PAPER_KAPPA, ties: float = 0.0
) -> int | None:
    """Pairs that show which system is better with this power, ties included.

    Args:
        share: how often a single rater who decides prefers the better system.
        raters: of each pair.
        power: how often the difference is to be found.
        alpha: of the sign test, two-sided.
        agreement: see `majority_share`.
        ties: share of pairs that end as a tie although a majority was possible.

    Returns:
        From that many pairs on the power is never less; None: more than `MOST_CASES` decided pairs.
    """
    won, decided = majority_share(share, raters, agreement)
    too_few = np.flatnonzero(sign_test_power(won, alpha) < power)
    needed = int(too_few[-1]) + 2 if len(too_few) else 1
    return None if needed > MOST_CASES else math.ceil(needed / (decided * (1 - ties)))


def power_result(
    preset: str,
    differences: Sequence[float],
    raters: Sequence[int],
    variances: Variances,
    items: int | None,
    power: float,
    alpha: float,
    agreement: float = PAPER_KAPPA,
    ties: float = 0.0,
) -> Result:
    """A table: a line for each difference, a column for each number of raters.

    Args:
        preset: of `plato2 evaluate human make`.
        differences: of mean scores, or of pairs the share of a rater's wins.
        raters: of each item.
        variances: of scores.
        items: how many there will be; adds what they show.
        power: how often the difference is to be found.
        alpha: of the test, two-sided.
        agreement: of pairs.
        ties: of pairs.

    Returns:
        Of kind `power`. A figure is a number of cases of each system, or of pairs; `seen` the smallest
        difference, or the smallest share, that `items` show.
    """
    is_pairs = preset in PAIRS
    what = "a rater prefers one in" if is_pairs else "difference"
    measures = {f"d{d:g}": Measure(label=f"{what} {d:g}", digits=0) for d in differences}
    if items is not None:
        shown = "share of wins" if is_pairs else "difference"
        measures["seen"] = Measure(label=f"smallest {shown} seen with {items}", digits=3)
    systems: dict[str, dict[str, Figure]] = {}
    for n in raters:
        figures = systems.setdefault(f"{n} rater{'s' * (n > 1)}", {})
        for d in differences:
            cases = (
                pair_cases(d, n, power, alpha, agreement, ties)
                if is_pairs
                else score_cases(d, n, variances, power, alpha)
            )
            note = "" if cases is not None else f"more than {MOST_CASES:,}"
            figures[f"d{d:g}"] = Figure(value=cases, note=note)
        if items is not None and is_pairs:
            shares = np.arange(0.505, 1.0, 0.005)
            found = (
                s for s in shares if (pair_cases(s, n, power, alpha, agreement, ties) or items + 1) <= items
            )
            share = next(found, None)
            note = "" if share is not None else "no share"
            figures["seen"] = Figure(value=None if share is None else float(share), note=note)
        elif items is not None:
            figures["seen"] = Figure(value=score_difference(items, n, variances, power, alpha))
    settings = {"preset": preset, "power": power, "alpha": alpha, "items": items}
    of_pairs = {"agreement": agreement, "ties": ties}
    of_scores = {"case_variance": variances.case, "rater_variance": variances.rater}
    settings |= of_pairs if is_pairs else of_scores
    return Result(kind="power", settings=settings, measures=measures, systems=systems)
