"""The sequence of steps: complete, equal for any ranks and workers, exactly resumable, bounded in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import write_corpus

from plato2.config import UserError
from plato2.data.collate import CoherenceBatch, GenerationBatch
from plato2.data.order import Batching, Position
from plato2.data.shards import ShardIndex, SplitIndex, write_index
from plato2.data.stream import Batch, Corpus, PlannedWindow, Step, StepLoader, TrainStream, ValidStream

SMALL = Batching(unit_tokens=256, row_length=64, pool_samples=32, window_samples=50)


def make_corpus(
    folder: Path, n: int = 300, batch: Batch | None = None, batching: Batching = SMALL, **options: Any
) -> Corpus:
    index = write_corpus(folder, n, **{"shard_samples": 20, "n_valid": 90, **options})
    return Corpus(str(folder), index, "train", batch or GenerationBatch(), batching)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def same(first: Any, second: Any) -> bool:
    """Steps or units with equal tensors of equal shape under equal names."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(torch.equal(first, second))


def take(n: int, steps: Iterable[Step]) -> list[Step]:
    """The first steps of an endless stream."""
    return list(islice(steps, n))


def one_epoch(stream: TrainStream) -> Iterator[Step]:
    for step in stream:
        yield step
        if step["position"].tolist()[0] > stream.start.epoch:
            return


# -------------------------------------------------------------------------------------------- completeness


@given(
    n=st.integers(2, 120),
    shard_samples=st.integers(1, 40),
    window_samples=st.integers(1, 150),
    pool_samples=st.integers(1, 64),
    mode=st.sampled_from(["packed", "buckets", "padded"]),
    batch=st.sampled_from(
        [GenerationBatch(), GenerationBatch(latent_slot=True, keep_eos=True), CoherenceBatch()]
    ),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sample_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    n: int,
    shard_samples: int,
    window_samples: int,
    pool_samples: int,
    mode: Any,
    batch: Batch,
    epoch: int,
) -> None:
    batching = Batching(mode, 256, 64, pool_samples, window_samples)
    folder = tmp_path_factory.mktemp("epoch")
    if isinstance(batch, CoherenceBatch) and min(shard_samples, window_samples) < 8:
        batch = replace(batch, reject_identical=False)  # a window of one sample has no other response
    corpus = make_corpus(folder, n, batch, batching, shard_samples=shard_samples)
    stream = TrainStream(corpus, 11, 1, start=Position(epoch))
    seen: list[Any] = []
    for step in one_epoch(stream):
        (unit,) = step["units"]
        labels = unit.get("coherence_labels", torch.ones_like(unit["sample_ids"]))
        seen += zip(unit["sample_ids"].tolist(), labels.tolist(), strict=True)
    expected = [0, 1] if isinstance(batch, CoherenceBatch) else [1]
    assert sorted(seen) == [(i, label) for i in range(n) for label in expected]
    assert step["position"].tolist() == [epoch + 1, 0, 0]


def test_epochs_differ_and_seeds_differ(corpus: Corpus) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        stream = TrainStream(corpus, seed, 1, start=Position(epoch))
        return [i for step in one_epoch(stream) for i in step["units"][0]["sample_ids"].tolist()]

    orders = [order(11, 0), order(11, 1), order(12, 0)]
    assert len({tuple(ids) for ids in orders}) == 3
    assert order(11, 1) == orders[1]


# ----------------------------------------------------------------------------------------- ranks and workers


@pytest.mark.parametrize("batch", [GenerationBatch(latent_slot=True), CoherenceBatch()])
@pytest.mark.parametrize("mode", ["packed", "buckets", "padded"])
def test_ranks_share_the_same_steps(corpus: Corpus, batch: Batch, mode: Any) -> None:
    corpus = replace(corpus, batch=batch, batching=replace(SMALL, mode=mode))
    alone = take(12, TrainStream(corpus, 11, 4))  # 48 units: across windows and into the next epoch
    assert len({int(step["position"][1]) for step in alone}) > 1
    for step in alone:
        assert {int(unit["step_targets"]) for unit in step["units"]} == {
            sum(len(unit["target_ids"]) for unit in step["units"])
        }
        assert {int(unit["step_samples"]) for unit in step["units"]} == {
            sum(len(unit["sample_ids"]) for unit in step["units"])
        }
    for world_size in (2, 4):
        ranks = [take(12, TrainStream(corpus, 11, 4, rank, world_size)) for rank in range(world_size)]
        for step, *shares in zip(alone, *ranks, strict=True):
            assert all(torch.equal(share["position"], step["position"]) for share in shares)
            together = [share["units"][a] for a in range(4 // world_size) for share in shares]
            assert same(together, step["units"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("batch", [GenerationBatch(roles=True), CoherenceBatch()])
def test_workers_change_nothing(corpus: Corpus, n_workers: int, batch: Batch) -> None:
    stream = TrainStream(replace(corpus, batch=batch), 11, 3)
    assert same(take(17, StepLoader(stream, 0)), take(17, StepLoader(stream, n_workers)))


@pytest.mark.slow
def test_a_large_step_needs_few_file_descriptors(corpus: Corpus) -> None:
    """64 units a step and two workers that prepare ahead: 12 tensors each would be thousands of files."""
    script = (
        "from itertools import islice\n"
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from plato2.data.stream import *; from plato2.data.shards import read_index\n"
        f"corpus = Corpus({corpus.path!r}, read_index({corpus.path!r}), 'train', GenerationBatch(), "
        "Batching(unit_tokens=256, row_length=64))\n"
        "steps = list(islice(StepLoader(TrainStream(corpus, 11, 64), 2), 8)); print(len(steps[-1]['units']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.strip() == "64", done.stderr


# --------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("batch", [GenerationBatch(), CoherenceBatch()])
@pytest.mark.parametrize("units_per_step", [1, 7])
def test_going_on_equals_never_stopping(corpus: Corpus, batch: Batch, units_per_step: int) -> None:
    corpus = replace(corpus, batch=batch)
    n_steps = 60 // units_per_step
    whole = take(n_steps, TrainStream(corpus, 11, units_per_step))
    windows = {tuple(step["position"].tolist()[:2]) for step in whole}
    assert {epoch for epoch, _ in windows} >= {0, 1}  # across the end of an epoch
    for taken in range(1, n_steps, 3):
        position = Position(*whole[taken - 1]["position"].tolist())
        stream = TrainStream(corpus, 11, units_per_step, start=position)
        assert same(take(n_steps - taken, stream), whole[taken:])


def test_going_on_with_other_ranks_and_workers(corpus: Corpus) -> None:
    whole = take(12, TrainStream(corpus, 11, 4))
    position = Position(*whole[4]["position"].tolist())
    shares = [take(7, StepLoader(TrainStream(corpus, 11, 4, r, 2, position), 2)) for r in (0, 1)]
    for step, *parts in zip(whole[5:], *shares, strict=True):
        assert same([part["units"][a] for a in (0, 1) for part in parts], step["units"])


# ------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("batch", [GenerationBatch(), CoherenceBatch()])
@pytest.mark.parametrize("mode", ["packed", "buckets", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("max_units", [None, 4, 5])
def test_validation_is_one_pass_shared_by_the_ranks(
    corpus: Corpus, batch: Batch, mode: Any, world_size: int, max_units: int | None
) -> None:
    corpus = replace(corpus, split="valid", batch=batch, batching=replace(SMALL, mode=mode))
    alone = [step["units"][0] for step in ValidStream(corpus, max_units)]
    if max_units:
        assert len(alone) == max_units
    else:
        ids = sorted(i for unit in alone for i in unit["sample_ids"].tolist())
        assert ids == sorted([*range(90)] * (2 if isinstance(batch, CoherenceBatch) else 1))
    streams = [ValidStream(corpus, max_units, rank, world_size) for rank in range(world_size)]
    passes = [list(stream) for stream in streams]
    assert {len(steps) for steps in passes} == {len(streams[0])} == {-(-len(alone) // world_size)}
    together = [unit for steps in zip(*passes, strict=True) for step in steps for unit in step["units"]]
    assert same(together[: len(alone)], alone)
    for unit in together[len(alone) :]:
        assert not unit["segment_ids"].any()
        assert (unit["step_targets"], unit["step_samples"], len(unit["target_ids"])) == (0, 0, 0)
    for unit in alone:
        assert unit["step_targets"] == len(unit["target_ids"])
        assert unit["step_samples"] == len(unit["sample_ids"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_validation_is_the_same_every_time_and_with_a_worker(corpus: Corpus) -> None:
    stream = ValidStream(replace(corpus, split="valid", batch=CoherenceBatch()))
    loader = StepLoader(stream, 1, persistent=True)
    first, second = list(loader), list(loader)
    assert len(loader) == len(first)
    assert same(first, second)
    assert same(first, list(StepLoader(stream, 0)))
    assert same(first, list(StepLoader(stream, 3)))


def test_validation_pools_follow_the_stored_order(corpus: Corpus) -> None:
    corpus = replace(corpus, split="valid", batching=Batching("padded", 10**6, 64, 30, 10**6))
    pools = sorted(step["units"][0]["sample_ids"].tolist() for step in ValidStream(corpus))
    assert pools == [list(range(start, start + 30)) for start in (0, 30, 60)]


# ----------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_damaged_shard_stops_the_stream_with_its_name(tmp_path: Path, n_workers: int) -> None:
    corpus = make_corpus(tmp_path)
    path = tmp_path / "train-00007.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"^[^\n]*train-00007\.parquet: [^\n]*truncated[^\n]*$"):
        take(200, StepLoader(TrainStream(corpus, 11, 2), n_workers))


def test_a_missing_or_empty_split_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, n_valid=0)
    for split in ("valid", "test"):
        with pytest.raises(UserError, match=rf"split '{split}' is missing or empty \(splits: train, valid\)"):
            replace(corpus, split=split)


def test_rows_must_hold_the_longest_sample(corpus: Corpus) -> None:
    """The corpus allows 20 + 30 ids; generation drops one, the latent takes one."""
    for batch, longest in [
        (GenerationBatch(), 49),
        (GenerationBatch(latent_slot=True), 50),
        (GenerationBatch(latent_slot=True, keep_eos=True), 51),
        (CoherenceBatch(), 50),
    ]:
        batching = Batching(unit_tokens=longest, row_length=longest)
        replace(corpus, batch=batch, batching=batching)
        short = Batching(unit_tokens=longest - 1, row_length=longest - 1)
        with pytest.raises(UserError, match=rf"use data\.row_length={longest} or more"):
            replace(corpus, batch=batch, batching=short)


# ----------------------------------------------------------------------------------------------------- memory

_EPOCH = """
import json, resource, sys
from plato2.data.stream import *
from plato2.data.shards import read_index
index = read_index(sys.argv[1])
corpus = Corpus(sys.argv[1], index, "train", GenerationBatch(), Batching())
n = 0
for step in TrainStream(corpus, 11, 64):
    n += int(step["units"][0]["step_samples"])
    if step["position"][0]:
        break
print(json.dumps([n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """An epoch of 5 million samples needs the memory of one of half a million (the same shards again)."""
    index = write_corpus(tmp_path, 4 * 16384)
    shards = index.splits["train"].shards
    peak = {}
    for millions in (0.5, 5.0):
        n_shards = round(millions * 1e6) // 16384 + 1
        folder = tmp_path / str(millions)
        many = SplitIndex(tuple(shards[i % 4] for i in range(n_shards)))
        write_index(folder, ShardIndex("a" * 64, 8001, 20, 30, {"train": many}))
        for shard in shards:
            (folder / shard.file).symlink_to(tmp_path / shard.file)
        done = subprocess.run([sys.executable, "-c", _EPOCH, str(folder)], capture_output=True, check=True)
        n_samples, peak[millions] = json.loads(done.stdout)
        assert n_samples >= millions * 1e6
    assert peak[5.0] < 1.05 * peak[0.5], peak


def test_only_two_windows_are_alive(corpus: Corpus) -> None:
    """The one at hand and, while a step crosses over, the next."""
    loaded: list[weakref.ref[PlannedWindow]] = []
    most = 0

    class Watched(Corpus):
        def load(self, shards: list[int], seed: int, position: Position, shuffle: bool) -> PlannedWindow:
            nonlocal most
            planned = super().load(shards, seed, position, shuffle)
            loaded.append(weakref.ref(planned))
            most = max(most, sum(reference() is not None for reference in loaded))
            return planned

    watched = Watched(corpus.path, corpus.index, "train", GenerationBatch(), SMALL)
    for _ in islice(TrainStream(watched, 11, 3), 100):
        pass
    assert len(loaded) > 10
    assert most == 2
