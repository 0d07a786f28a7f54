"""What is held out for test, and what a split repeats of another."""

from __future__ import annotations

import numpy as np

from plato2.random import Draw, draw, draw_key, hashed


def held_out(keys: np.ndarray, sizes: np.ndarray, most: int) -> np.ndarray:
    """Whether each item is held out: the same items at any seed, nearly the same when others join them.

    Items of one key stay together. Keys come in a fixed random order, until their sizes would exceed `most`;
    a key that is too large by itself is passed over.

    Args:
        keys: (n,) uint64 that stand for the content of each item.
        sizes: (n,) what each item counts.
        most: what the items held out may count together.

    Returns:
        (n,) bool.
    """
    different, place = np.unique(keys, return_inverse=True)
    size = np.bincount(place, weights=sizes, minlength=len(different))
    order = np.argsort(draw(draw_key(Draw.TEST), different), kind="stable")
    order = order[size[order] <= most]
    chosen = np.zeros(len(different), dtype=bool)
    chosen[order[np.cumsum(size[order]) <= most]] = True
    return chosen[place]


def sample_keys(token_ids: np.ndarray, offsets: np.ndarray, context_len: np.ndarray) -> np.ndarray:
    """(n,) uint64 that stand for the samples `token_ids[offsets[i]:offsets[i + 1]]`, context and response."""
    lengths = np.diff(offsets)
    place = np.arange(len(token_ids)) - np.repeat(offsets[:-1], lengths)
    words = hashed(token_ids.astype(np.uint64) | (place.astype(np.uint64) << np.uint64(32)))
    starts = offsets[:-1].astype(np.int64)
    sums = np.add.reduceat(words, starts) if len(starts) else np.zeros(0, dtype=np.uint64)
    return hashed(sums + context_len.astype(np.uint64))


def n_repeated(keys: np.ndarray, of: np.ndarray) -> int:
    """How many of the samples with these keys are, word for word, among those with the keys `of`."""
    return int(np.isin(keys, of).sum())
