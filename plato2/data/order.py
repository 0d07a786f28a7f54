"""Which sample when: a pure function of (shard index, seed, epoch, window, batching options).

An *epoch* visits the shards of a split in a permuted order. Consecutive shards form *windows* of about
`window_samples` samples, the only part of a corpus that is in memory; the items of a window are permuted,
laid out in rows and grouped into *units* of a fixed token budget. The place in this endless sequence of
units is one `Position` (epoch, window, unit). Step s takes G = batch_tokens / unit_tokens units in a row,
which the ranks share out: how many ranks or workers there are changes who computes a sample, never when.
(Samples are shuffled over all shards when they are written, so a window mixes like the whole corpus.)

All randomness is counter-based: a hash of what is drawn for, not a generator with a state to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from plato2.config import UserError
from plato2.data.packing import Layout, grouped, packed
from plato2.data.shards import SplitIndex
from plato2.random import Draw, draw, draw_key, permutation


class Position(NamedTuple):
    """The next unit to compute."""

    epoch: int = 0
    window: int = 0
    unit: int = 0


# ---------------------------------------------------------------------------------------------- batching


@dataclass(frozen=True)
class Batching:
    """How items become units.

    Raises:
        UserError: impossible values, or (in `check`) that do not fit the corpus.
    """

    mode: Literal["packed", "buckets", "padded"] = "packed"
    """`packed`: several samples per row; `buckets`: one, rows of similar length; `padded`: one, any
    length."""
    unit_tokens: int = 8192
    """Slots of a unit, padding included: what one rank computes at once."""
    row_length: int = 512
    """Slots of a packed row; the other modes ignore it."""
    pool_samples: int = 4096
    """Rows are filled from this many samples at a time: more means less padding and longer planning."""
    window_samples: int = 65536
    """At least this many samples are in memory and shuffled together; also the pool of negatives."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.mode not in ("packed", "buckets", "padded"):
            raise UserError(f"data.mode={self.mode!r}: choose packed, buckets or padded")
        for name in ("unit_tokens", "row_length", "pool_samples", "window_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.mode == "packed" and self.unit_tokens % self.row_length:
            below = self.unit_tokens // self.row_length * self.row_length
            nearest = [str(n) for n in (below, below + self.row_length) if n]
            raise UserError(
                f"data.unit_tokens={self.unit_tokens} is not a multiple of "
                f"data.row_length={self.row_length}: use data.unit_tokens={' or '.join(nearest)}"
            )

    @property
    def rows_per_unit(self) -> int:
        """Rows of a packed unit."""
        return self.unit_tokens // self.row_length

    def check_longest(self, longest: int) -> None:
        """Refuse budgets that the longest possible item of a corpus does not fit in."""
        name = "row_length" if self.mode == "packed" else "unit_tokens"
        if getattr(self, name) < longest:
            raise UserError(
                f"data.{name}={getattr(self, name)} is shorter than the longest sample of the corpus, "
                f"{longest} tokens: use data.{name}={longest} or more"
            )


def lay_out(slots: np.ndarray, batching: Batching, key: int, shuffle: bool) -> Layout:
    """The units of a window.

    Args:
        slots: (n,) slots each item needs, n >= 1.
        batching: the options.
        key: of the window, from `draw_key`.
        shuffle: permute the items; otherwise they stay in stored order up to their pool. Rows (units where
            there is one item per row) are always shuffled, so that a part of the units is a fair sample.
    """
    items = permutation(len(slots), draw_key(Draw.ITEMS, key)) if shuffle else np.arange(len(slots))
    pools = np.array_split(items, -(-len(items) // batching.pool_samples))
    keys = draw(draw_key(Draw.ROWS, key), np.arange(len(items)))
    if batching.mode == "packed":
        return packed(slots, pools, batching.row_length, batching.rows_per_unit, keys)
    return grouped(slots, pools, batching.unit_tokens, keys, sort=batching.mode == "buckets")


# ------------------------------------------------------------------------------------------------ windows


def epoch_windows(
    split: SplitIndex, window_samples: int, seed: int, epoch: int, shuffle: bool
) -> list[list[int]]:
    """The shard numbers of every window of an epoch.

    A window takes shards until it has `window_samples` samples. A last one of less than half of that joins
    the window before it: a handful of samples would be a poor pool to shuffle, pack and draw negatives from.
    """
    sizes = [shard.samples for shard in split.shards]
    order = np.arange(len(sizes))
    if shuffle:
        order = permutation(len(sizes), draw_key(Draw.SHARDS, seed, epoch))
    windows: list[list[int]] = []
    n_samples = window_samples
    for shard in order.tolist():
        if n_samples >= window_samples:
            windows.append([])
            n_samples = 0
        windows[-1].append(shard)
        n_samples += sizes[shard]
    if len(windows) > 1 and n_samples < window_samples / 2:
        small = windows.pop()
        windows[-1] += small
    return windows


def rank_units(units_per_step: int, rank: int, world_size: int) -> range:
    """Which of a step's units belong to a rank: r, R + r, 2 R + r, ..."""
    return range(rank, units_per_step, world_size)
