"""Random numbers as a pure function of a key and a counter (splitmix64): no state, the same in any process.

For NumPy; `model/noise.py` has the same for tensors on any device.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


class Draw(IntEnum):
    """What random numbers are drawn for; part of their key, so that no two uses share a number."""

    SHARDS = 1
    ITEMS = 2
    ROWS = 3
    NEGATIVES = 4
    NOISE = 5
    MASKS = 6
    TEST = 7


def draw_key(*parts: int) -> int:
    """One 64-bit key of several integers, e.g. `draw_key(Draw.MASKS, seed, epoch)`."""
    key = 0
    for part in parts:
        key = (key + part + GOLDEN) & _WORD
        key = ((key ^ (key >> 30)) * MIX_1) & _WORD
        key = ((key ^ (key >> 27)) * MIX_2) & _WORD
        key ^= key >> 31
    return key


def draw(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Random 64-bit words (n,) uint64: splitmix64 of a key (or one key each) at the given counters."""
    words = counters.astype(np.uint64)
    words *= np.uint64(GOLDEN)
    words += np.uint64(key) if isinstance(key, int) else key
    return _mixed(words)


def hashed(values: np.ndarray) -> np.ndarray:
    """64-bit integers (n,) mixed well, each to another one: what `draw` has first for each of them as key."""
    return _mixed(values.astype(np.uint64) + np.uint64(GOLDEN))


def permutation(n: int, key: int) -> np.ndarray:
    """A random order (n,) of 0..n-1."""
    return np.argsort(draw(key, np.arange(n)), kind="stable")


def _mixed(words: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014), in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(MIX_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(MIX_2)
    words ^= words >> np.uint64(31)
    return words
