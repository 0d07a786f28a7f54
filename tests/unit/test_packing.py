"""Layouts lose nothing, overflow nothing and waste little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.data.order import Batching, lay_out
from plato2.data.packing import Layout, best_fit_rows

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=300).map(np.array)


def slow_best_fit(lengths: np.ndarray, row_length: int) -> list[int]:
    """How full the rows of textbook best-fit decreasing are, one item at a time."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        best = min((s for s in spaces if s >= length), default=None)
        if best is None:
            spaces.append(row_length - length)
        else:
            spaces[spaces.index(best)] -= length
    return sorted(row_length - space for space in spaces)


@given(LENGTHS, st.integers(64, 150))
def test_rows_are_those_of_the_textbook(lengths: np.ndarray, row_length: int) -> None:
    rows = best_fit_rows(lengths, row_length)
    filled = np.bincount(rows, weights=lengths)
    assert sorted(filled.astype(int)) == slow_best_fit(lengths, row_length)


def realistic_lengths(n: int) -> np.ndarray:
    """Like the chitchat corpus: contexts mostly full (115 of 128 on average), responses of 24."""
    rng = np.random.default_rng(0)
    context = np.where(rng.random(n) < 0.75, rng.integers(108, 129, n), rng.integers(8, 128, n))
    return context + np.clip(rng.gamma(1.5, 14, n).astype(int) + 4, 3, 128)


def check(layout: Layout, lengths: np.ndarray, unit_tokens: int) -> None:
    """Every item once; no two share a slot; no unit over its budget; rows ascend."""
    assert sorted(layout.items.tolist()) == list(range(len(lengths)))
    assert layout.starts[0] == 0
    assert layout.starts[-1] == len(lengths)
    for number in range(len(layout)):
        unit = layout.unit(number)
        assert len(unit.items) > 0
        assert unit.n_rows * unit.row_length <= unit_tokens
        assert (np.diff(unit.rows) >= 0).all()
        used = np.zeros((unit.n_rows, unit.row_length), dtype=int)
        for item, row, column in zip(unit.items, unit.rows, unit.columns, strict=True):
            assert column + lengths[item] <= unit.row_length
            used[row, column : column + lengths[item]] += 1
        assert used.max() == 1


@given(LENGTHS, st.sampled_from(["packed", "buckets", "padded"]), st.integers(1, 100), st.booleans())
@settings(deadline=None)
def test_layouts_lose_and_overflow_nothing(lengths: np.ndarray, mode: str, pool: int, shuffle: bool) -> None:
    batching = Batching(mode, unit_tokens=256, row_length=64, pool_samples=pool)  # type: ignore[arg-type]
    check(lay_out(lengths, batching, 3, shuffle), lengths, 256)


@given(LENGTHS, st.sampled_from(["buckets", "padded"]))
def test_groups_are_as_large_as_the_budget_allows(lengths: np.ndarray, mode: str) -> None:
    batching = Batching(mode, unit_tokens=256, pool_samples=1000)  # type: ignore[arg-type]
    layout = lay_out(lengths, batching, 3, False)
    order = np.argsort(lengths, kind="stable") if mode == "buckets" else np.arange(len(lengths))
    place = np.argsort(order)
    for number in range(len(layout)):
        places = np.sort(place[layout.unit(number).items])
        assert (np.diff(places) == 1).all()  # consecutive in the pool
        following = places[-1] + 1
        if following < len(lengths):
            longest = lengths[order[places[0] : following + 1]].max()
            assert (len(places) + 1) * longest > 256


def test_only_the_last_packed_unit_has_empty_rows() -> None:
    lengths = realistic_lengths(3000)
    layout = lay_out(lengths, Batching(), 3, True)
    used_rows = [len(set(layout.unit(u).rows.tolist())) for u in range(len(layout))]
    assert set(used_rows[:-1]) == {16}


@pytest.mark.parametrize(("mode", "most"), [("packed", 0.015), ("buckets", 0.025)])
def test_little_is_wasted(mode: str, most: float) -> None:
    lengths = realistic_lengths(65536)
    layout = lay_out(lengths, Batching(mode), 3, True)  # type: ignore[arg-type]
    slots = layout.shapes.prod(axis=1).sum()
    assert 1 - lengths.sum() / slots < most


def test_packed_rows_mix_the_window() -> None:
    """Rows of long samples must not come first: each quarter of the units has the window's mean length."""
    lengths = realistic_lengths(20000)
    layout = lay_out(lengths, Batching(), 3, True)
    quarters = np.array_split(lengths[layout.items], 4)
    assert all(abs(quarter.mean() - lengths.mean()) < 2 for quarter in quarters)
