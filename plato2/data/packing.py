"""Laying items of known length out in units: rows of a fixed budget of token slots.

Pure functions of lengths. `packed` fills rows of `row_length` slots with several items each (best-fit
decreasing: the longest items first, each into the fullest row that still has room), `grouped` puts one item
into each row and adds rows while the padded unit stays within its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class UnitLayout:
    """Where the items of one unit stand, row by row and left to right."""

    items: np.ndarray
    """(n,) item numbers."""
    rows: np.ndarray
    """(n,) row of each item, ascending."""
    columns: np.ndarray
    """(n,) first slot of each item in its row."""
    n_rows: int
    row_length: int


@dataclass(frozen=True)
class Layout:
    """The units of a window: unit u holds `items[starts[u]:starts[u + 1]]`."""

    items: np.ndarray
    """(n,) item numbers, unit by unit, row by row, left to right."""
    rows: np.ndarray
    """(n,) row inside the unit."""
    columns: np.ndarray
    """(n,) first slot inside the row."""
    starts: np.ndarray
    """(units + 1,)."""
    shapes: np.ndarray
    """(units, 2): rows and slots per row of each unit."""

    def __len__(self) -> int:
        """Number of units."""
        return len(self.shapes)

    def unit(self, number: int) -> UnitLayout:
        """The layout of one unit."""
        part = slice(self.starts[number], self.starts[number + 1])
        n_rows, row_length = self.shapes[number].tolist()
        return UnitLayout(self.items[part], self.rows[part], self.columns[part], n_rows, row_length)


def best_fit_rows(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Row number of every item: best-fit decreasing into rows of `row_length` slots.

    Rows with the same free space are interchangeable, so they wait in one list per free space, and the lists
    that are not empty are bits of one integer: the best space is the lowest set bit at or above the length.
    Items of one length are placed together: a best-fit row takes as many of them as it has room for.

    Args:
        lengths: (n,) lengths, each in 1..row_length.
        row_length: slots of a row.
    """
    waiting: list[list[int]] = [[] for _ in range(row_length + 1)]
    has_space = 0
    n_rows = 0
    placed: list[int] = []
    values, counts = np.unique(lengths, return_counts=True)
    for length, remaining in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while remaining:
            fitting = has_space >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else row_length
            each = min(space // length, remaining)
            n_wanted = remaining // each
            if fitting:
                taken = waiting[space][-n_wanted:]
                del waiting[space][-n_wanted:]
                if not waiting[space]:
                    has_space ^= 1 << space
            else:
                taken = list(range(n_rows, n_rows + n_wanted))
                n_rows += n_wanted
            placed += taken if each == 1 else [row for row in taken for _ in range(each)]
            remaining -= len(taken) * each
            rest = space - each * length
            waiting[rest] += taken
            if rest:
                has_space |= 1 << rest
    rows_of_items = np.empty(len(lengths), dtype=np.int64)
    rows_of_items[np.argsort(-lengths, kind="stable")] = placed
    return rows_of_items


def packed(
    lengths: np.ndarray, pools: list[np.ndarray], row_length: int, rows_per_unit: int, row_keys: np.ndarray
) -> Layout:
    """Several items per row; the rows of all pools are shuffled together before they form units.

    Args:
        lengths: (n,) slots of each item.
        pools: item numbers of each pool; rows are filled from one pool at a time.
        row_length: slots of a row.
        rows_per_unit: rows of every unit; the last unit is filled up with empty rows.
        row_keys: (n,) sort keys; row i of the window takes its place in the order of `row_keys[i]`.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    n_rows = 0
    for pool in pools:
        rows = best_fit_rows(lengths[pool], row_length)
        row_of[pool] = rows + n_rows
        n_rows += int(rows.max()) + 1
    place = np.empty(n_rows, dtype=np.int64)
    place[np.argsort(row_keys[:n_rows], kind="stable")] = np.arange(n_rows)
    items = np.concatenate(pools)
    items = items[np.argsort(place[row_of[items]], kind="stable")]
    row = place[row_of[items]]
    columns = _start_in_group(lengths[items], row)
    n_units = -(-n_rows // rows_per_unit)
    starts = np.searchsorted(row, np.arange(n_units + 1) * rows_per_unit)
    shapes = np.tile(np.array([rows_per_unit, row_length], dtype=np.int64), (n_units, 1))
    return Layout(items, row % rows_per_unit, columns, starts, shapes)


def grouped(
    lengths: np.ndarray, pools: list[np.ndarray], unit_tokens: int, unit_keys: np.ndarray, sort: bool
) -> Layout:
    """One item per row; rows are added while rows x longest <= `unit_tokens`; the order of units is shuffled.

    Args:
        lengths: (n,) slots of each item, each at most `unit_tokens`.
        pools: item numbers of each pool; units are formed inside one pool.
        unit_tokens: slots of a unit, padding included.
        unit_keys: (n,) sort keys; unit i of the window takes its place in the order of `unit_keys[i]`.
        sort: sort each pool by length first, so that the rows of a unit are about equally long.
    """
    units = []
    for pool in pools:
        ordered = pool[np.argsort(lengths[pool], kind="stable")] if sort else pool
        units += [ordered[part] for part in _budget_groups(lengths[ordered], unit_tokens)]
    units = [units[i] for i in np.argsort(unit_keys[: len(units)], kind="stable")]
    sizes = np.array([len(unit) for unit in units])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    items = np.concatenate(units)
    rows = np.arange(len(items)) - np.repeat(starts[:-1], sizes)
    shapes = np.stack([sizes, np.maximum.reduceat(lengths[items], starts[:-1])], axis=1)
    return Layout(items, rows, np.zeros(len(items), dtype=np.int64), starts, shapes)


def _budget_groups(lengths: np.ndarray, unit_tokens: int) -> Iterator[slice]:
    """Consecutive items whose padded rectangle stays within the budget, as many as fit."""
    start = 0
    while start < len(lengths):
        ahead = lengths[start : start + unit_tokens // int(lengths[start])]
        padded = np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
        n_items = int(np.searchsorted(padded, unit_tokens, side="right"))
        yield slice(start, start + n_items)
        start += n_items


def _start_in_group(lengths: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Where each item starts inside its group; items stand group by group, none is empty."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.searchsorted(group, np.arange(int(group[-1]) + 1))
    return begins - begins[first][group]


def ranges(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The integers first[0], first[0] + 1, ... (length[0] of them), first[1], ...: (sum of length,) int64."""
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(int(length.sum()))
