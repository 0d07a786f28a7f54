"""The LightningDataModule: one prepared corpus for one run, and the position in it.

The position lives here (`state_dict`), not in a loader: Lightning stores it with every checkpoint, whole and
the same for every rank. It is read from the batch that is being trained on, so what workers have prepared
ahead does not count, and it moves on only when the optimizer step is finished.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytorch_lightning as pl

from plato2.config import UserError, expand_path
from plato2.data.order import Batching, Position
from plato2.data.shards import ShardIndex, has_index, read_index
from plato2.data.stream import Batch, Corpus, Step, StepLoader, TrainStream, ValidStream
from plato2.data.tokenizer import Tokenizer


class DialogueDataModule(pl.LightningDataModule):
    """Shards to batches, exactly resumable. The Trainer needs `use_distributed_sampler=False`.

    Args:
        path: folder of the prepared corpus, local or an fsspec address.
        batch: the stage's batch maker.
        batch_tokens: tokens of one optimizer step over all ranks, padding included.
        seed: of order, masks, negatives and noise (validation has its own, fixed one).
        mode: `packed`: several samples per row; `buckets`: one, rows of similar length; `padded`: one, any
            length.
        unit_tokens: what one rank computes at once; accumulation follows from it and `batch_tokens`.
        row_length: slots of a packed row.
        pool_samples: rows are filled from this many samples at a time.
        window_samples: samples in memory.
        n_workers: worker processes of the train loader; 0 = none. Changes nothing but speed.
        valid_units: units of one validation pass over all ranks; the whole split when not given.
        cache_dir: local copies of remote shards; that of `cache_folder` when not given.

    Raises:
        UserError: no corpus, budgets that do not fit the corpus or the number of ranks, a position of another
            corpus or batching.
    """

    def __init__(
        self,
        path: str,
        batch: Batch,
        batch_tokens: int,
        seed: int = 11,
        mode: Literal["packed", "buckets", "padded"] = "packed",
        unit_tokens: int = 8192,
        row_length: int = 512,
        pool_samples: int = 4096,
        window_samples: int = 65536,
        n_workers: int = 0,
        valid_units: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """Nothing is read yet; only the options are checked."""
        super().__init__()
        if path == "":
            raise UserError("data.path=: is empty; give the folder of a corpus, or leave it out")
        self.path, self.batch = expand_path(str(path), "data.path"), batch
        self.batching = Batching(mode, unit_tokens, row_length, pool_samples, window_samples)
        self.batch_tokens, self.seed = batch_tokens, seed
        self.n_workers, self.valid_units = n_workers, valid_units
        self.cache_dir = None if cache_dir is None else expand_path(cache_dir, "data.cache_dir")
        if batch_tokens < 1 or batch_tokens % unit_tokens:
            raise UserError(
                f"optim.batch_tokens={batch_tokens} is not a multiple of data.unit_tokens={unit_tokens}: "
                f"use optim.batch_tokens={_nearest(batch_tokens, unit_tokens)}"
            )
        if n_workers < 0:
            raise UserError(f"data.n_workers={n_workers}: must be 0 or more")
        if valid_units is not None and valid_units < 1:
            raise UserError(
                f"data.valid_units={valid_units}: must be at least 1, or null for the whole split"
            )
        self._step, self._position = 0, Position()
        self._before = (0, Position())

    # ------------------------------------------------------------------------------------------ the corpus

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
    def exists(self) -> bool:
        """Whether `path` holds a prepared corpus."""
        return has_index(self.path)

    @cached_property
    def index(self) -> ShardIndex:
        """The corpus's index."""
        return read_index(self.path, "data.path=")

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

    @property
    def identity(self) -> dict[str, str]:
        """What a run records of its data."""
        hashes = {"sha256": self.data_sha256, "valid_sha256": self.valid_sha256}
        return {"path": self.path, **hashes, "tokenizer_sha256": self.tokenizer_sha256}

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
        """Steps from here on, one per batch and without end: `max_steps` of the trainer says where to
        stop."""
        _silence_lightning()
        self._before = (self._step, self._position)
        stream = TrainStream(
            self._corpus("train"),
            self.seed,
            self.units_per_step,
            self._rank,
            self._world_size,
            self._position,
        )
        return StepLoader(stream, self.n_workers)

    def val_dataloader(self) -> StepLoader:
        """One pass over the validation split (or `valid_units` of it), one unit per batch."""
        _silence_lightning()
        stream = ValidStream(self._corpus("valid"), self.valid_units, self._rank, self._world_size)
        return StepLoader(stream, min(self.n_workers, 1), persistent=True)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def check_ranks(self, n_ranks: int, devices: str = "strategy") -> None:
        """Refuse steps that the ranks cannot share.

        Args:
            n_ranks: of the run.
            devices: what says so, for the message.

        Raises:
            UserError: names a `data.unit_tokens` and the nearest `optim.batch_tokens` that they can.
        """
        batch, unit, n_units = self.batch_tokens, self.batching.unit_tokens, self.units_per_step
        if n_units % n_ranks == 0:
            return
        row = self.batching.row_length
        shared = (batch // n for n in range(n_ranks, batch // row + 1, n_ranks) if batch % n == 0)
        smaller = next((size for size in shared if size < unit and size % row == 0), None)
        cures = [f"optim.batch_tokens={_nearest(batch, unit * n_ranks)}"]
        if self.batching.mode == "packed" and smaller:
            cures.insert(0, f"data.unit_tokens={smaller}")
        raise UserError(
            f"{devices}: {n_ranks} ranks cannot share a step of optim.batch_tokens={batch} equally, "
            f"{n_units} unit{'s' * (n_units > 1)} of data.unit_tokens={unit}: use {', or '.join(cures)}"
        )

    def _check_corpus(self, n_ranks: int) -> None:
        """Refuse a corpus that the ranks cannot share."""
        unit, corpus = self.batching.unit_tokens, self._corpus("train")
        if corpus.shards.tokens >= n_ranks * unit:
            return  # at least this many units, whatever the layout
        windows = enumerate(corpus.windows(self.seed, 0, shuffle=True))
        found = sum(len(corpus.load(w, self.seed, Position(0, i), True).layout) for i, w in windows)
        if found < n_ranks:
            raise UserError(
                f"{self.path}: the training split fills {found} unit(s) of data.unit_tokens={unit}, "
                f"fewer than the {n_ranks} ranks: use fewer devices, a smaller data.unit_tokens or a larger "
                "corpus"
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
        """Continue from a saved position.

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
                f"cannot resume in the middle of {self.path}: {'; '.join(differing)}; "
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
