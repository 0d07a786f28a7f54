"""A full shuffle of more samples than memory holds, in two passes.

Each sample goes to a random bucket on disk; each bucket is then read and shuffled on its own. Together that
is a uniform permutation of everything, with one bucket in memory at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

MAX_BUCKETS = 64
"""Files open at once, well under the usual limits; beyond that the buckets grow instead."""
_BUFFER_BYTES = 1 << 16


class DiskShuffle:
    """Collects samples and yields them in an order that depends on the seed and their number alone.

    Use as a context manager: leaving it closes and removes the bucket files.
    """

    def __init__(self, folder: Path, n_expected: int, bucket_samples: int, seed: Sequence[int]) -> None:
        """Open about `n_expected / bucket_samples` bucket files in `folder`, which is made."""
        n_buckets = min(MAX_BUCKETS, max(1, -(-n_expected // bucket_samples)))
        self._seed = list(seed)
        self._draws = self._bucket_numbers(n_buckets)
        folder.mkdir(parents=True)
        self._folder = folder
        self._paths = [folder / f"{i:03d}.bucket" for i in range(n_buckets)]
        self._stack = ExitStack()
        self._files = [
            self._stack.enter_context(path.open("w+b", buffering=_BUFFER_BYTES)) for path in self._paths
        ]

    def _bucket_numbers(self, n_buckets: int) -> Iterator[int]:
        random = np.random.default_rng([*self._seed, 0])
        while True:
            yield from random.integers(n_buckets, size=4096).tolist()

    def __enter__(self) -> DiskShuffle:
        """Nothing to do: the files are open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close and remove the bucket files."""
        self._stack.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._folder.rmdir()

    def add(self, token_ids: Sequence[int], context_len: int) -> None:
        """Put one sample into its bucket."""
        self._files[next(self._draws)].write(array("I", [len(token_ids), context_len, *token_ids]).tobytes())

    def buckets(self) -> Iterator[tuple[list[np.ndarray], list[int]]]:
        """Yield (token ids of each sample, context lengths), shuffled, bucket after bucket."""
        for number, file in enumerate(self._files):
            file.seek(0)
            words = np.frombuffer(file.read(), dtype=np.dtype(array("I").typecode))
            records, context_len = [], []
            start = 0
            while start < len(words):
                end = start + 2 + int(words[start])
                records.append(words[start + 2 : end])
                context_len.append(int(words[start + 1]))
                start = end
            order = np.random.default_rng([*self._seed, 1, number]).permutation(len(records))
            yield [records[i] for i in order], [context_len[i] for i in order]
