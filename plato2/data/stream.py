"""Units into optimizer steps, for any number of ranks and workers; the loaders of a run.

`TrainStream` is the endless sequence of units of `order.py`, cut into steps of `units_per_step` units. Every
rank plans all units of a step (cheap), so that it knows the step's true totals before the first backward
pass, and collates its own. Each of n workers builds every n-th step: their number changes nothing. Only the
window at hand is in memory, and the next one while a step crosses over. `ValidStream` is one finite pass in
stored order, padded with empty units so that all ranks take the same number.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from plato2.batch import Unit, n_targets
from plato2.config import UserError
from plato2.data.collate import BackwardBatch, CoherenceBatch, GenerationBatch, Items, JointBatch, Window
from plato2.data.order import Batching, Position, epoch_windows, lay_out, rank_units
from plato2.data.packing import Layout, UnitLayout
from plato2.data.shards import Samples, ShardIndex, SplitIndex, read_shard
from plato2.random import draw_key

Batch: TypeAlias = GenerationBatch | CoherenceBatch | JointBatch | BackwardBatch
Step: TypeAlias = dict[str, Any]
"""{"units": [unit, ...], "position": (3,)}; without position in validation."""

START = Position()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
VALID_SEED = 0
"""Masks, negatives and noise of validation are the same for every seed and every epoch."""


@dataclass(frozen=True)
class PlannedWindow:
    """A window in memory, its items and where they stand."""

    window: Window
    items: Items
    layout: Layout


@dataclass(frozen=True)
class Corpus:
    """One split of a prepared corpus, read the way a stage wants it.

    Raises:
        UserError: the split is missing or empty, or its longest sample does not fit the batching.
    """

    path: str
    index: ShardIndex
    split: str
    batch: Batch
    batching: Batching
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be streamed."""
        if self.split not in self.index.splits or not self.shards.samples:
            raise UserError(
                f"{self.path}: the split {self.split!r} is missing or empty "
                f"(splits: {', '.join(self.index.splits) or 'none'}); prepare the corpus again"
            )
        self.batching.check_longest(self.batch.longest(self.index))

    @property
    def shards(self) -> SplitIndex:
        """The split's part of the index."""
        return self.index.splits[self.split]

    def windows(self, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
        """The shard numbers of every window of an epoch."""
        return epoch_windows(self.shards, self.batching.window_samples, seed, epoch, shuffle)

    def load(self, shards: list[int], seed: int, position: Position, shuffle: bool) -> PlannedWindow:
        """Read the window at `position` (its unit is ignored) and lay it out."""
        epoch, number, _ = position
        samples = _read_window(self.path, self.shards, shards, self.cache_dir)
        window = Window(samples, seed, epoch, number, self.index.mask_id, self.index.max_response)
        items = self.batch.items(window)
        layout = lay_out(items.slots, self.batching, draw_key(seed, epoch, number), shuffle)
        return PlannedWindow(window, items, layout)


def _read_window(path: str, split: SplitIndex, shards: list[int], cache_dir: str | None) -> Samples:
    """The samples of several shards as one; each shard is copied into its place and forgotten."""
    infos = [split.shards[number] for number in shards]
    first_ids = split.first_sample_ids
    n_samples, n_tokens = sum(info.samples for info in infos), sum(info.tokens for info in infos)
    offsets = np.zeros(n_samples + 1, dtype=np.int64)
    context_len, sample_ids = np.empty(n_samples, dtype=np.int64), np.empty(n_samples, dtype=np.int64)
    token_ids = np.empty(0, dtype=np.uint16)
    sample = token = 0
    for number, info in zip(shards, infos, strict=True):
        part = read_shard(path, info, first_ids[number], cache_dir)
        if not sample:
            token_ids = np.empty(n_tokens, dtype=part.token_ids.dtype)
        end = sample + info.samples
        token_ids[token : token + info.tokens] = part.token_ids
        offsets[sample + 1 : end + 1] = part.offsets[1:] + token
        context_len[sample:end], sample_ids[sample:end] = part.context_len, part.sample_ids
        sample, token = end, token + info.tokens
    return Samples(token_ids, offsets, context_len, sample_ids)


class TrainStream(IterableDataset[Step]):
    """Optimizer steps `{"units": this rank's units, "position": (3,) position after the step}`, without end.

    Args:
        corpus: what is read.
        seed: of order, masks, negatives and noise.
        units_per_step: units of one optimizer step over all ranks; a multiple of `world_size`.
        rank: of this process.
        world_size: number of ranks.
        start: position to continue from.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        units_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        start: Position = START,
    ) -> None:
        """Nothing is read before the first iteration."""
        self.corpus, self.seed = corpus, seed
        self.units_per_step = units_per_step
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[Step]:
        """This worker's share of the steps."""
        worker = get_worker_info()
        worker_id, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        units = self._units()
        for number in count():
            step = [next(units) for _ in range(self.units_per_step)]
            if number % n_workers == worker_id:
                yield self._collate(step)

    def _units(self) -> Iterator[tuple[PlannedWindow, int, Position]]:
        """The endless sequence of units from `start`: window, unit number, position after the unit."""
        epoch, first_window, first_unit = self.start
        while True:
            windows = self.corpus.windows(self.seed, epoch, shuffle=True)
            for number in range(first_window, len(windows)):
                here = Position(epoch, number)
                planned = self.corpus.load(windows[number], self.seed, here, shuffle=True)
                is_last = number + 1 == len(windows)
                following = Position(epoch + 1) if is_last else Position(epoch, number + 1)
                n_units = len(planned.layout)
                for unit in range(first_unit, n_units):
                    after = following if unit + 1 == n_units else Position(epoch, number, unit + 1)
                    yield planned, unit, after
                first_unit = 0
            epoch, first_window = epoch + 1, 0

    def _collate(self, step: list[tuple[PlannedWindow, int, Position]]) -> Step:
        own = rank_units(len(step), self.rank, self.world_size)
        units, total, n_samples = [], 0, 0
        for i, (planned, number, _) in enumerate(step):
            layout = planned.layout.unit(number)
            n_samples += len(layout.items)
            if i in own:
                units.append(self.corpus.batch.unit(planned.window, planned.items, layout))
                total += n_targets(units[-1])
            else:
                total += self.corpus.batch.count_targets(planned.window, planned.items, layout.items)
        for unit in units:
            _add_totals(unit, total, n_samples)
        return {"units": units, "position": torch.tensor(step[-1][2])}


class ValidStream(IterableDataset[Step]):
    """One unit at a time, `{"units": [unit]}`, in stored order: rank r has units r, r + R, ...

    Ranks that would have fewer get empty units (rows of padding, no samples, no targets).

    Args:
        corpus: what is read.
        max_units: stop after this many units over all ranks; all when not given.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self, corpus: Corpus, max_units: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Nothing is read before the first iteration or `len()`."""
        self.corpus, self.max_units = corpus, max_units
        self.rank, self.world_size = rank, world_size

    @cached_property
    def n_units(self) -> int:
        """Units over all ranks; only planning tells how many units a window has."""
        return sum(1 for _ in self._units())

    def __len__(self) -> int:
        """Units of each rank."""
        return -(-self.n_units // self.world_size)

    def __iter__(self) -> Iterator[Step]:
        """This worker's share of this rank's units."""
        worker = get_worker_info()
        worker_id, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        turn = 0  # how many units this rank has had
        planned = None
        for i, (planned, number) in enumerate(self._units()):
            if i % self.world_size == self.rank:
                if turn % n_workers == worker_id:
                    yield self._collate(planned, planned.layout.unit(number))
                turn += 1
        if planned and turn < len(self) and turn % n_workers == worker_id:
            yield self._collate(planned, self._empty_layout())

    def _units(self) -> Iterator[tuple[PlannedWindow, int]]:
        n_given = 0
        for number, shards in enumerate(self.corpus.windows(VALID_SEED, 0, shuffle=False)):
            planned = self.corpus.load(shards, VALID_SEED, Position(0, number), shuffle=False)
            for unit in range(len(planned.layout)):
                yield planned, unit
                n_given += 1
                if n_given == self.max_units:
                    return

    def _collate(self, planned: PlannedWindow, layout: UnitLayout) -> Step:
        unit = self.corpus.batch.unit(planned.window, planned.items, layout)
        _add_totals(unit, n_targets(unit), len(layout.items))
        return {"units": [unit]}

    def _empty_layout(self) -> UnitLayout:
        batching, nothing = self.corpus.batching, np.zeros(0, dtype=np.int64)
        shape = (batching.rows_per_unit, batching.row_length) if batching.mode == "packed" else (1, 1)
        return UnitLayout(nothing, nothing, nothing, *shape)


def _add_totals(unit: Unit, targets: int, samples: int) -> None:
    unit["step_targets"] = torch.tensor(targets)
    unit["step_samples"] = torch.tensor(samples)


# ------------------------------------------------------------------------------------------------- loader


class StepLoader(DataLoader[Step]):
    """A DataLoader whose workers send each step as one flat tensor.

    A step has about a dozen tensors for each of its units. Sent one by one, each would take a file
    descriptor; a step of 64 units with prefetching runs into the usual limit of 1,024 open files.
    """

    def __init__(self, stream: TrainStream | ValidStream, n_workers: int, persistent: bool = False) -> None:
        """Pinned memory if there is a CUDA device; `persistent` keeps the workers between passes."""
        self._is_flat = n_workers > 0
        collate: Any = _flatten if self._is_flat else _keep
        super().__init__(
            stream,
            batch_size=None,
            num_workers=n_workers,
            collate_fn=collate,
            pin_memory=self._is_flat and torch.cuda.is_available(),
            persistent_workers=self._is_flat and persistent,
        )

    def __iter__(self) -> Iterator[Step]:  # type: ignore[override]
        """The steps, put together again.

        Raises:
            UserError: of a worker, without the traceback that DataLoader puts around it.
        """
        try:
            with _signals_held_back():  # workers keep it so: only the run's own process stops the run
                batches = super().__iter__()
            for batch in batches:
                yield _unflatten(batch) if self._is_flat else batch
        except UserError as error:
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Signals that stop a run wait until the block ends; processes started in it never see them.

    A terminal, `timeout` and Slurm send them to all processes of a run. A worker that died of one would take
    the step with it that is to be saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_workers() -> None:
    """Workers that an error leaves behind: they do not hear the SIGTERM that Python sends and waits for."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _keep(step: Step) -> Step:
    return step


def _flatten(step: Step) -> tuple[Tensor, list[list[tuple[str, list[int]]]]]:
    """All tensors of a step in a row, and name and shape of each (the step's own tensors come last)."""
    groups = [*step["units"], {name: value for name, value in step.items() if name != "units"}]
    flat = torch.cat([tensor.reshape(-1) for group in groups for tensor in group.values()])
    return flat, [[(name, list(tensor.shape)) for name, tensor in group.items()] for group in groups]


def _unflatten(flattened: tuple[Tensor, list[list[tuple[str, list[int]]]]]) -> Step:
    flat, shapes = flattened
    sizes = [int(np.prod(shape, dtype=np.int64)) for group in shapes for _, shape in group]
    parts = iter(flat.split(sizes))
    groups = [{name: next(parts).view(shape) for name, shape in group} for group in shapes]
    return {"units": groups[:-1], **groups[-1]}
