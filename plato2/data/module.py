"""The LightningDataModule: one prepared corpus for one run, and the position in it.

The position lives here (`state_dict`), not in a loader: Lightning stores it with every checkpoint, whole and
the same for every rank. It is read from the batch that is being trained on, so what workers have prepared
ahead does not count, and it moves on only when the optimizer step is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytorch_lightning as pl

from plato2.config import UserError, expand_path, in_typed_words
from plato2.data.atomic import is_being_written
from plato2.data.order import Batching, Position
from plato2.data.shards import ShardIndex, has_index, read_index
from plato2.data.stream import Batch, Corpus, Step, StepLoader, TrainStream, ValidStream
from plato2.data.tokenizer import Tokenizer

PATIENCE_S = 120.0
"""Seconds that a process waits for a corpus that nobody is preparing: the first process may start later."""


class DialogueDataModule(pl.LightningDataModule):
    """Shards to batches, exactly resumable. The Trainer needs `use_distributed_sampler=False`.

    Args:
        path: folder of the prepared corpus, local or an fsspec address.
        batch: the stage's batch maker.
        batch_tokens: tokens of one optimizer step over all ranks, padding included.
        max_steps: optimizer steps of the run; the train loader's length.
        seed: of order, masks, negatives and noise (validation has its own, fixed one).
        mode: `packed`, `buckets` or `padded`; with the next four see `order.Batching`.
        unit_tokens: what one rank computes at once; accumulation follows from it and `batch_tokens`.
        row_length: slots of a packed row.
        pool_samples: rows are filled from so many samples at a time.
        window_samples: samples in memory.
        n_workers: worker processes of the train loader; 0 = none. Changes nothing but speed.
        valid_units: units of one validation pass over all ranks; the whole split when not given.
        cache_dir: local copies of remote shards; `~/.cache/plato2` when not given.
        prepare: options of `plato2 prepare` (without `out`): how to make the corpus when `path` has none.

    Raises:
        UserError: no corpus, a corpus made with other options than `prepare`, budgets that do not fit the
            corpus or the number of ranks, a position of another corpus or batching.
    """

    def __init__(
        self,
        path: str,
        batch: Batch,
        batch_tokens: int,
        max_steps: int,
        seed: int = 11,
        mode: Literal["packed", "buckets", "padded"] = "packed",
        unit_tokens: int = 8192,
        row_length: int = 512,
        pool_samples: int = 4096,
        window_samples: int = 65536,
        n_workers: int = 0,
        valid_units: int | None = None,
        cache_dir: str | None = None,
        prepare: dict[str, Any] | None = None,
    ) -> None:
        """Nothing is read yet; only the options are checked."""
        super().__init__()
        self.prepare_data_per_node = False  # nodes share the folder: one of them prepares it
        self.path, self.batch = expand_path(str(path), "data.path"), batch
        self.batching = Batching(mode, unit_tokens, row_length, pool_samples, window_samples)
        self.batch_tokens, self.max_steps, self.seed = batch_tokens, max_steps, seed
        self.n_workers, self.valid_units = n_workers, valid_units
        self.cache_dir = None if cache_dir is None else expand_path(cache_dir, "data.cache_dir")
        self.prepare_options = prepare
        if batch_tokens < 1 or batch_tokens % unit_tokens:
            raise UserError(
                f"optim.batch_tokens={batch_tokens} is not a multiple of data.unit_tokens={unit_tokens}: "
                f"use optim.batch_tokens={_nearest(batch_tokens, unit_tokens)}"
            )
        for key, value in (("data.n_workers", n_workers), ("trainer.max_steps", max_steps)):
            if value < 0:
                raise UserError(f"{key}={value}: must be 0 or more")
        if valid_units is not None and valid_units < 1:
            raise UserError(
                f"data.valid_units={valid_units}: must be at least 1, or null for the whole split"
            )
        self._step, self._position = 0, Position()
        self._before = (0, Position())
        self._prepared = False

    # ------------------------------------------------------------------------------------------ the corpus

    def prepare_data(self) -> None:
        """Prepare the corpus when there is none and `prepare` says how; otherwise reuse it and say so.

        `train.py` calls this before it builds the model, Lightning once more: the second call does nothing.
        """
        if self.prepare_options is None or self._prepared:
            return
        self._prepared = True
        from plato2.data.prepare import PrepareOptions, prepare, summary  # slow to import, rarely needed

        try:
            options = PrepareOptions.from_dict({**self.prepare_options, "out": self.path})
            if options.force or not has_index(self.path):
                print("\n".join(summary(prepare(options))))
                return
        except UserError as error:
            keys = [field.name for field in fields(PrepareOptions)] + ["reader.", "clean."]
            typed = {key: f"data.prepare.{key}" for key in keys} | {"out": "data.path"}
            raise UserError(in_typed_words(str(error), typed)) from error
        self._check_prepared(asdict(options))
        samples = {name: split.samples for name, split in self.index.splits.items()}
        print(
            f"data: reusing {self.path} ({', '.join(f'{n:,} {name}' for name, n in samples.items())} samples)"
        )

    def _check_prepared(self, asked: dict[str, Any]) -> None:
        stored, wanted = self.index.prepare, json.loads(json.dumps(asked, default=str))
        differing = [
            f"data.prepare.{key} is {stored[key]!r}, asked for {wanted[key]!r}"
            for key in sorted(stored.keys() & wanted.keys())
            if stored[key] != wanted[key]
        ]
        if differing:
            raise UserError(
                f"{self.path} was prepared with other options: {'; '.join(differing)}; "
                "take another data.path, or correct data.prepare, or prepare it again with `plato2 prepare`"
            )

    def prepare_or_wait(self) -> None:
        """Prepare before the ranks know each other: the first does it, others started beside it wait.

        Raises:
            UserError: the first one failed, or does not begin.
        """
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or "0"
        if rank == "0":
            self.prepare_data()
        if self.prepare_options is None:
            return
        seen = time.monotonic()
        while not self.exists:
            if is_being_written(Path(self.path)):
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE_S:
                raise UserError(
                    f"data.path={self.path}: no corpus there, and for {PATIENCE_S:g} s no process has been "
                    "preparing one; the first process (rank 0) says why it failed or does not run"
                )
            time.sleep(1.0)

    def check_model(self, vocab_size: int, max_position: int) -> None:
        """Refuse a model that does not fit the shards.

        Raises:
            UserError: another vocabulary, or too few positions.
        """
        if self.vocab_size != vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size}: the tokenizer of {self.path} has {self.vocab_size} ids; use "
                f"model.vocab_size={self.vocab_size}, or data prepared with the model's tokenizer"
            )
        longest = self.index.max_context + self.index.max_response
        if longest > max_position:
            raise UserError(
                f"model.max_position={max_position}: samples of {self.path} have up to {longest} tokens; use "
                f"model.max_position={longest}, or prepare the data with shorter limits"
            )

    @property
    def will_prepare(self) -> bool:
        """Whether `prepare_data` is still to make the corpus, so that nothing is known of it yet."""
        options = self.prepare_options
        return options is not None and not self._prepared and bool(options.get("force") or not self.exists)

    @property
    def exists(self) -> bool:
        """Whether `path` holds a prepared corpus."""
        return has_index(self.path)

    @cached_property
    def index(self) -> ShardIndex:
        """The corpus's index."""
        return read_index(self.path)

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer the shards were made with."""
        return self.index.tokenizer_sha256

    def check_tokenizer(self) -> None:
        """Refuse a corpus whose tokenizer is not the one that its shards were made with.

        Raises:
            UserError: it is another one, damaged or missing.
        """
        there = f"{self.path.rstrip('/')}/tokenizer"
        if Path(self.path).is_dir():
            found = Tokenizer.load(there).sha256
        else:
            with tempfile.TemporaryDirectory() as copy:
                try:
                    self.save_tokenizer(Path(copy))
                    found = Tokenizer.load(copy).sha256
                except (OSError, UserError) as error:
                    raise UserError(f"{there}: {str(error).replace(copy, there)}") from None
        if found != self.tokenizer_sha256:
            raise UserError(
                f"{there}: not the tokenizer that the shards were made with (sha256 {found[:12]}, not "
                f"{self.tokenizer_sha256[:12]}); restore its files, or prepare the corpus again"
            )

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the corpus's tokenizer, so that a run can be talked to without its data."""
        files, root = fsspec.core.url_to_fs(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        for file in files.ls(f"{root.rstrip('/')}/tokenizer", detail=False):
            (folder / file.rsplit("/", 1)[-1]).write_bytes(files.cat_file(file))

    @property
    def vocab_size(self) -> int:
        """Token ids of the shards' tokenizer, [MASK] included."""
        return self.index.vocab_size

    @cached_property
    def data_sha256(self) -> str:
        """Hash of the training shards: the same samples in the same order."""
        return self._shards_sha256("train")

    @cached_property
    def valid_sha256(self) -> str:
        """Hash of the validation shards."""
        return self._shards_sha256("valid")

    def _shards_sha256(self, split: str) -> str:
        hashes = [shard.sha256 for shard in self._corpus(split).shards.shards]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over the training split in this stage's batches, padding included.

        Measured on the first window and taken to be the same in the others.
        """
        corpus = self._corpus("train")
        window = corpus.windows(self.seed, 0, shuffle=True)[0]
        units = len(corpus.load(window, self.seed, Position(), shuffle=True).layout)
        samples = sum(corpus.shards.shards[number].samples for number in window)
        return round(units * self.batching.unit_tokens * corpus.shards.samples / samples)

    def _corpus(self, split: str) -> Corpus:
        return Corpus(self.path, self.index, split, self.batch, self.batching, self.cache_dir)

    # ------------------------------------------------------------------------------------------ the loaders

    @property
    def units_per_step(self) -> int:
        """Units of one optimizer step over all ranks."""
        return self.batch_tokens // self.batching.unit_tokens

    def setup(self, stage: str | None = None) -> None:
        """Check the corpus against the options before anything is computed."""
        self._corpus("train")
        self._corpus("valid")
        self.check_ranks(self._world_size)
        self._check_corpus(self._world_size)

    def train_dataloader(self) -> StepLoader:
        """The steps that are left, one a batch; its length is always `max_steps`."""
        _silence_lightning()
        self._before = (self._step, self._position)
        stream = TrainStream(
            self._corpus("train"),
            self.seed,
            self.units_per_step,
            self.max_steps,
            self._rank,
            self._world_size,
            self._position,
            self._step,
        )
        return StepLoader(stream, self.n_workers)

    def val_dataloader(self) -> StepLoader:
        """One pass over the validation split (or `valid_units` of it), one unit a batch."""
        _silence_lightning()
        stream = ValidStream(self._corpus("valid"), self.valid_units, self._rank, self._world_size)
        return StepLoader(stream, min(self.n_workers, 1), persistent=True)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def check_ranks(self, n_ranks: int) -> None:
        """Refuse steps that the ranks cannot share out.

        Raises:
            UserError: names the nearest `optim.batch_tokens` that they can.
        """
        unit, n_units = self.batching.unit_tokens, self.units_per_step
        if n_units % n_ranks:
            raise UserError(
                f"optim.batch_tokens={self.batch_tokens} is {n_units} units of data.unit_tokens={unit}, "
                f"which {n_ranks} ranks cannot share equally: use "
                f"optim.batch_tokens={_nearest(self.batch_tokens, unit * n_ranks)}, "
                "or a smaller data.unit_tokens"
            )

    def _check_corpus(self, n_ranks: int) -> None:
        """Refuse a corpus that the ranks cannot share out."""
        unit, corpus = self.batching.unit_tokens, self._corpus("train")
        if corpus.shards.tokens >= n_ranks * unit:
            return  # at least so many units, whatever the layout
        windows = enumerate(corpus.windows(self.seed, 0, shuffle=True))
        found = sum(len(corpus.load(w, self.seed, Position(0, i), True).layout) for i, w in windows)
        if found < n_ranks:
            raise UserError(
                f"{self.path}: the training split fills {found} units of data.unit_tokens={unit}, fewer than "
                f"the {n_ranks} ranks: use fewer devices, a smaller data.unit_tokens or a larger corpus"
            )

    # ----------------------------------------------------------------------------------------- the position

    def on_before_batch_transfer(self, batch: Step, dataloader_idx: int) -> Step:
        """Note where the step that begins now will end."""
        if "position" in batch:
            self._before = (self._step, self._position)
            self._step, self._position = self._step + 1, Position(*batch["position"].tolist())
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last finished step: plain numbers and strings, the same on every rank."""
        step, position = self._step, self._position
        if self.trainer and self.trainer.global_step == self._before[0]:
            step, position = self._before  # the step at hand is not finished: it will be trained again
        return {"step": step, **position._asdict(), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UserError: it belongs to other data, another seed or other batching options.
        """
        own = self._order()
        saved = {key: own[key] for key in ("validation split", "tokenizer")} | state_dict[
            "order"
        ]  # older: without them
        differing = [
            f"{key} was {saved.get(key)!r}, is {own[key]!r}" for key in own if saved.get(key) != own[key]
        ]
        if differing:
            raise UserError(
                f"cannot go on in the middle of {self.path}: {'; '.join(differing)}; "
                "resume with the same data and options, or start a new run with init_from"
            )
        self._step = state_dict["step"]
        self._position = Position(state_dict["epoch"], state_dict["window"], state_dict["unit"])
        self._before = (self._step, self._position)

    def _order(self) -> dict[str, Any]:
        """All that a position, and the numbers of a run, depend on."""
        options = {f"data.{key}": value for key, value in asdict(self.batching).items()}
        hashes = {
            "data": self.data_sha256,
            "validation split": self.valid_sha256,
            "tokenizer": self.tokenizer_sha256,
        }
        return {**hashes, "seed": self.seed, "batch": repr(self.batch), **options}


def _nearest(value: int, step: int) -> str:
    """The multiples of `step` around `value`, as words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _silence_lightning() -> None:
    """Warnings that do not hold here: workers share the stream, few are enough, and the position is saved."""
    for message in ("Your `IterableDataset` has `__len__`", ".*not have many workers", ".*is not resumable"):
        warnings.filterwarnings("ignore", message=message)
