"""Stage 3's output for one shard: its training samples as the final file, candidates for validation and test.

Written by whichever process got the shard's nodes. The `.json` comes last: with it the shard is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from plato2.data.shards import Samples, ShardInfo, write_shard
from plato2.prepare.reddit.threads import ThreadSamples, TreeOptions, build_threads
from plato2.prepare.reddit.work import read_record, write_part, write_text
from plato2.prepare.splits import sample_keys
from plato2.prepare.statistics import SplitStatistics
from plato2.prepare.without import Removed, WithoutOptions, evaluation_texts


@dataclass(frozen=True)
class ShardJob:
    """What is the same for all shards of stage 3."""

    folder: str
    trees: TreeOptions
    vocab_size: int
    valid_from: int
    """Seconds since 1970: responses before it are for training, the others candidates for validation."""
    valid_samples: int
    """Validation samples in the whole corpus, so the most one shard can give."""
    test_from: int | None
    """Responses from then on are candidates for test instead."""
    test_samples: int
    held_out: tuple[int, ...]
    """Communities whose earlier responses are candidates for test instead of for training."""
    tokenizer: str
    """Folder."""
    without: WithoutOptions | None
    """Evaluation sets whose texts training samples must not share."""


@dataclass(frozen=True)
class ShardPart:
    """What is known of a finished shard."""

    number: int
    train: ShardInfo | None
    digest: str
    """Of the training samples, see `samples_digest`."""
    n_candidates: int
    """Samples for validation, those that were not written included."""
    n_held_out: int
    """Samples for test, those that were not written included."""
    removed: dict[str, int]
    """Samples removed from training for evaluation sets, see `Removed.counts`."""
    removed_examples: list[str]
    n_nodes: dict[str, int]
    lost: dict[str, dict[str, int]]
    """By month and reason."""
    samples: dict[str, int]
    """By month, all splits."""
    statistics: dict[str, list[int] | int]

    def add_to(self, statistics: SplitStatistics) -> None:
        """Add the counts over the training samples."""
        for name, value in self.statistics.items():
            setattr(statistics, name, getattr(statistics, name) + np.array(value, dtype=np.int64)[()])


def write_samples(job: ShardJob, number: int, nodes: pa.Table) -> ShardPart:
    """Build the samples of a shard's threads and write them."""
    folder = Path(job.folder)
    samples = build_threads(nodes, job.trees)
    is_valid, is_test = _chosen(job, samples)
    # A tree of which there is more in another split gives no test samples.
    is_whole = ~np.isin(samples.tree, samples.tree[~is_test])
    train = samples.take(np.flatnonzero(~(is_valid | is_test)))
    valid = samples.take(np.flatnonzero(is_valid)[: job.valid_samples])  # the lowest keys: they are in order
    test = samples.take(np.flatnonzero(is_test & is_whole)[: job.test_samples])
    removed = Removed(job.without.names if job.without else [])
    if job.without:
        train = _without(job.without, job.tokenizer, train, removed)
    statistics = SplitStatistics(job.trees.max_context, job.trees.max_response, job.vocab_size)
    statistics.add(train.token_ids, train.offsets, train.context_len)
    info = None
    if len(train):
        written = Samples(train.token_ids, train.offsets, train.context_len, np.arange(len(train)))
        info = write_shard(folder, f"train-{number:05d}.parquet", written, job.vocab_size)
        keys = sample_keys(train.token_ids, train.offsets, train.context_len)
        write_part(folder / f"keys-{number:05d}.parquet", pa.table({"key": keys}), {})
    for split, candidates in (("valid", valid), ("test", test)):
        if len(candidates):
            write_part(folder / f"{split}-{number:05d}.parquet", _candidates(candidates), {})
    part = ShardPart(
        number=number,
        train=info,
        digest=samples_digest(train.token_ids, train.offsets, train.context_len),
        n_candidates=int(is_valid.sum()),
        n_held_out=int(is_test.sum()),
        removed=dict(removed.counts),
        removed_examples=removed.examples,
        n_nodes=dict(samples.n_nodes),
        lost={month_of(month): dict(counts) for month, counts in samples.lost.items()},
        samples=dict(Counter(np.datetime_as_string(samples.time.astype("datetime64[s]"), unit="M").tolist())),
        statistics={name: np.asarray(value).tolist() for name, value in vars(statistics).items()},
    )
    write_text(folder / f"{number:05d}.json", json.dumps(asdict(part)))
    return part


def _chosen(job: ShardJob, samples: ThreadSamples) -> tuple[np.ndarray, np.ndarray]:
    """(whether each sample is for validation, whether for test); the others are for training."""
    is_late = samples.time >= (np.inf if job.test_from is None else job.test_from)
    is_valid = (samples.time >= job.valid_from) & ~is_late
    is_held_out = np.isin(samples.community, np.array(job.held_out, dtype=np.int64))
    return is_valid, is_late | (is_held_out & ~is_valid)


def _without(
    options: WithoutOptions, tokenizer: str, train: ThreadSamples, removed: Removed
) -> ThreadSamples:
    """The training samples that have nothing to do with evaluation sets; the others are counted."""
    texts = evaluation_texts(options, tokenizer)
    found = texts.matches(np.split(train.token_ids, train.offsets[1:-1]) if len(train) else [])
    for row, match in enumerate(found):
        if match is not None:
            start, end = train.offsets[row] + train.context_len[row], train.offsets[row + 1]
            removed.add("train", match, texts.text_of(train.token_ids[start:end]))
    return train.take(np.array([row for row, match in enumerate(found) if match is None], dtype=np.int64))


def read_part(path: Path) -> ShardPart:
    """What `write_samples` left in `NNNNN.json`.

    Raises:
        UserError: it is damaged.
    """
    return read_record(ShardPart, path)


def samples_digest(token_ids: np.ndarray, offsets: np.ndarray, context_len: np.ndarray) -> str:
    """SHA-256 over samples in their order: lengths and context lengths (int64), then all ids (uint32)."""
    digest = hashlib.sha256()
    for array, kind in ((np.diff(offsets), "<i8"), (context_len, "<i8"), (token_ids, "<u4")):
        digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return digest.hexdigest()


def month_of(number: int) -> str:
    """The name of a month counted from year 0."""
    return f"{number // 12:04d}-{number % 12 + 1:02d}"


def _candidates(samples: ThreadSamples) -> pa.Table:
    """Candidates for validation or test with their keys."""
    token_ids = pa.ListArray.from_arrays(
        pa.array(samples.offsets, pa.int32()), pa.array(samples.token_ids, pa.int32())
    )
    return pa.table({"key": samples.keys, "token_ids": token_ids, "context_len": samples.context_len})


def group_by_shard(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, numbers: Sequence[int]
) -> Iterator[tuple[int, pa.Table]]:
    """(number, its nodes) for each of `numbers` (rising) from batches sorted by the column `shard`."""
    waiting: dict[int, list[pa.RecordBatch]] = {}
    expected = iter(numbers)
    for batch in batches:
        shards = batch.column("shard").to_numpy()
        starts = np.flatnonzero(np.append(True, shards[1:] != shards[:-1])[: len(shards)])
        for start, end in zip(starts, [*starts[1:], len(shards)], strict=True):
            number = int(shards[start])
            for finished in [] if number in waiting else [*waiting]:
                yield from _up_to(finished, expected, waiting.pop(finished), schema)
            waiting.setdefault(number, []).append(batch.slice(start, end - start))
    for finished, parts in waiting.items():
        yield from _up_to(finished, expected, parts, schema)
    for number in expected:
        yield number, schema.empty_table()


def _up_to(
    number: int, expected: Iterator[int], parts: list[pa.RecordBatch], schema: pa.Schema
) -> Iterator[tuple[int, pa.Table]]:
    """Shards without a node, then the shard `number`."""
    for other in expected:
        if other == number:
            yield number, pa.Table.from_batches(parts, schema)
            return
        yield other, schema.empty_table()
