"""Made-up corpora for the tests of the data side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plato2.data.collate import Window
from plato2.data.shards import Samples, ShardIndex, ShardWriter, SplitIndex, read_index, write_index

VOCAB_SIZE = 8001


def records(n: int, seed: int = 0, longest: int = 40) -> tuple[list[list[int]], list[int]]:
    """n random records of one to three context turns, and the length of each context."""
    rng = np.random.default_rng(seed)
    made, context_len = [], []
    for _ in range(n):
        context = [1]
        for _ in range(rng.integers(1, 4)):
            context += [*rng.integers(3, VOCAB_SIZE - 1, rng.integers(0, longest // 8)).tolist(), 2]
        response = [1, *rng.integers(3, VOCAB_SIZE - 1, rng.integers(1, longest // 2)).tolist(), 2]
        made.append(context + response)
        context_len.append(len(context))
    return made, context_len


def window(
    made: list[list[int]], context_len: list[int], seed: int = 7, epoch: int = 0, max_response: int = 128
) -> Window:
    """Records as a window in memory."""
    samples = Samples(
        token_ids=np.concatenate([np.array(record, dtype=np.uint16) for record in made]),
        offsets=np.concatenate([[0], np.cumsum([len(record) for record in made])]),
        context_len=np.array(context_len, dtype=np.int64),
        sample_ids=np.arange(len(made)) + 1000,
    )
    return Window(samples, seed, epoch, 0, VOCAB_SIZE - 1, max_response)


def write_corpus(
    folder: Path | str,
    n_train: int,
    n_valid: int = 5,
    shard_samples: int = 16384,
    seed: int = 0,
    longest: int = 40,
    **index: object,
) -> ShardIndex:
    """A prepared corpus of random records."""
    splits = {}
    for i, (split, n) in enumerate({"train": n_train, "valid": n_valid}.items()):
        writer = ShardWriter(folder, split, VOCAB_SIZE, shard_samples)
        writer.write(*records(n, seed + i, longest))
        splits[split] = SplitIndex(tuple(writer.close()))
    write_index(folder, ShardIndex("a" * 64, VOCAB_SIZE, 20, 30, splits, **index))  # type: ignore[arg-type]
    return read_index(folder)
