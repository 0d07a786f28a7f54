"""How much raters agree, and what they say together: majority, plain agreement, kappa, alpha.

All take a table of counts, (units, levels): how many raters gave a unit each level. So nothing depends on who
rated what, and units may have different numbers of raters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

PAPER_KAPPA = 0.466
"""Fleiss' kappa of the paper's ratings: three raters, 0/1/2."""
Scale = Literal["ordinal", "nominal"]


def count_table(answers: Sequence[Sequence[int | str]], levels: Sequence[int | str]) -> np.ndarray:
    """How many raters gave each unit each level, (units, levels)."""
    place = {level: number for number, level in enumerate(levels)}
    table = np.zeros((len(answers), len(levels)), dtype=int)
    for row, given in enumerate(answers):
        for value in given:
            table[row, place[value]] += 1
    return table


def scale_of(levels: Sequence[int | str]) -> Scale:
    """Numbers are ordered; left, right and tie are not."""
    return "ordinal" if all(isinstance(level, int) for level in levels) else "nominal"


def majority(table: np.ndarray, levels: Sequence[int | str]) -> tuple[list[float | str], np.ndarray]:
    """What most raters of each unit say.

    Where several levels have as many raters as each other and more than any other (three raters: 0/1/2), it
    is a split: of numbers the median of all ratings counts (1), of left, right and tie the tie.

    Returns:
        A level for each unit (a number between two where an even number of raters splits), and whether it was
        a split, (units,).
    """
    most = table == table.max(axis=1, keepdims=True)
    split = most.sum(axis=1) > 1
    if scale_of(levels) == "nominal":
        found: list[float | str] = [
            "tie" if is_split else levels[place]
            for place, is_split in zip(table.argmax(axis=1), split, strict=True)
        ]
        return found, split
    values = np.array(levels, dtype=float)
    medians = [float(np.median(np.repeat(values, row))) for row in table]
    pairs = zip(table.argmax(axis=1), split, medians, strict=True)
    return [median if is_split else float(values[place]) for place, is_split, median in pairs], split


def plain_agreement(table: np.ndarray) -> float:
    """How often two raters of a unit say the same: the mean over units with two raters or more; else nan."""
    n = table.sum(axis=1)
    table, n = table[n > 1], n[n > 1]
    return float(((table * (table - 1)).sum(axis=1) / (n * (n - 1))).mean()) if len(n) else math.nan


def same_number(table: np.ndarray) -> np.ndarray:
    """Units that Fleiss' kappa is defined for, (units,): those with the number of raters that most units
    have, at least two."""
    n = table.sum(axis=1)
    numbers = np.bincount(n[n > 1]) if (n > 1).any() else np.zeros(1, dtype=int)
    return (n == numbers.argmax()) & (n > 1)


def fleiss_kappa(table: np.ndarray) -> float:
    """Fleiss' kappa of units with equally many raters (Fleiss, 1971); levels are not ordered.

    Where all ratings are equal, the formula is 0/0; it is defined as 1 here, which it is for every other
    table in which all raters of each unit agree. nan without units.
    """
    from statsmodels.stats.inter_rater import fleiss_kappa as of_table

    if len(table) == 0:
        return math.nan
    if (table > 0).any(axis=0).sum() == 1:
        return 1.0
    return float(of_table(table))


def krippendorff_alpha(table: np.ndarray, levels: Sequence[int | str]) -> float:
    """Krippendorff's alpha; ordinal for numbers, nominal for others. Units may have any number of raters,
    those with one say nothing. Where all ratings are equal it is 1, as kappa; nan without pairs of raters.
    """
    from krippendorff import alpha

    table = table[table.sum(axis=1) > 1]
    used = (table > 0).any(axis=0)
    if len(table) == 0:
        return math.nan
    if used.sum() == 1:
        return 1.0
    scale = scale_of(levels)
    domain = list(levels) if scale == "ordinal" else list(range(len(levels)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(alpha(value_counts=table, value_domain=domain, level_of_measurement=scale))
