"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from plato2.config import UserError
from plato2.files import file_sha256, read_sha256, sync, write_sha256
from plato2.runs.console import STOP_SIGNALS, WARNINGS
from plato2.runs.distributed import then


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` now and then, at validations, at the end and when told to stop, and `best.ckpt`.

    A checkpoint falls between optimizer steps, after the validation of its step, and after everything that
    its step logs is in the logs: a run that goes on drops what was logged later, and has all the rest. It is
    written beside the old one and takes its place by renaming, so there is a whole one at any time. The best
    one goes first: a run that was killed between the two goes on from the step before, and writes both again.
    A sharded one takes its place once every rank has written its share, while training goes on; the next one
    waits for it.
    Weights, optimizer, schedule, step and data position are in it; all random numbers are functions of seed
    and step, so there is no state of theirs.

    SIGTERM, Ctrl-C, and SIGUSR1 or SIGUSR2 as Slurm sends them before the time is up, stop the run after the
    step at hand (and its validation) on all ranks together, whichever of them got it. A second Ctrl-C stops
    at once.

    Args:
        folder: where to write.
        every_steps: steps between checkpoints.
        every_minutes: minutes after which there is one, however few the steps.
        monitor: validation metric that picks `best.ckpt`, and `min` or `max`.
        extra: primitives to put into each checkpoint, e.g. the tokenizer's hash.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int,
        every_minutes: float,
        monitor: tuple[str, str],
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.every_steps, self.extra = folder, every_steps, extra or {}
        self.every_seconds, self.saved_at = every_minutes * 60, time.monotonic()
        self.metric, self.direction = monitor
        self.best_value: float | None = None
        self.saved_step = -1
        self.stop_signal: int | None = None
        self.stopping = False
        self.due = False
        self.pending: Future[None] | None = None
        """A sharded checkpoint that is being written, and put in its place."""
        self.pending_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over: Lightning's handler waits for other ranks and can hang."""
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._note_signal)

    @property
    def has_started(self) -> bool:
        """Whether everything is restored and training has begun."""
        return self.saved_step >= 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes whether this step is to be saved, unless a validation of it is still to come."""
        step = trainer.global_step
        if step >= trainer.max_steps:
            trainer.should_stop = True  # makes Lightning also validate after the last step
        timely = self._told_to_stop_or_late(trainer)
        self.due = (timely or trainer.should_stop or step % self.every_steps == 0) and not _validates_at(
            trainer, step
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after each validation, also as `best.ckpt` when the monitored metric has improved."""
        if trainer.sanity_checking or (not trainer.training and trainer.state.fn != "fit"):
            return
        value = trainer.callback_metrics.get(self.metric)
        improved = value is not None and self._is_better(float(value))
        if improved:
            assert value is not None
            self.best_value = float(value)
        self.save(trainer, best=improved)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Saves what is due and stops when told to: only now is all that the last step logs in the logs.

        Raises:
            SIGTERMException: how Lightning ends after a signal.
        """
        if self.due:
            self.save(trainer)
        if self.stopping:
            self.finish(trainer)
            raise SIGTERMException

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step, where no validation did."""
        if self.due:
            self.save(trainer)
        self.finish(trainer)

    def _note_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not reentrant

    def _told_to_stop_or_late(self, trainer: pl.Trainer) -> bool:
        """Whether any rank got a signal, or the last checkpoint is too old; all ranks get the same answer."""
        late = time.monotonic() - self.saved_at >= self.every_seconds
        either = trainer.strategy.reduce_boolean_decision(late or self.stop_signal is not None, all=False)
        if either:  # rarely: one exchange per step is enough
            self.stopping = trainer.strategy.reduce_boolean_decision(self.stop_signal is not None, all=False)
            warned = trainer.strategy.reduce_boolean_decision(self.stop_signal in WARNINGS, all=False)
            if self.stopping and self.stop_signal is None:  # another rank's; the first one has to know which
                self.stop_signal = signal.SIGUSR1 if warned else signal.SIGTERM
        return either

    def save(self, trainer: pl.Trainer, best: bool = False) -> None:
        """Writes `last.ckpt` (and `best.ckpt`) of the current step, or begins to; all ranks take part.

        Raises:
            UserError: the disk is full or not writable, on all ranks; the previous checkpoint is untouched.
        """
        self.finish(trainer)
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / "new.ckpt"
        self.pending_step = trainer.global_step
        rank_zero_only(_remove)(new)  # half-written, by a run that was killed
        trainer.strategy.barrier("removed")
        place = partial(self._put_in_place, new, self.folder / "last.ckpt", best)
        failed: OSError | CheckpointException | None = None
        try:
            trainer.save_checkpoint(new, weights_only=False)  # Lightning: not only weights
        except (OSError, CheckpointException) as error:
            if getattr(trainer.strategy, "in_shares", False):
                raise self._not_written(_reasons(error)) from error
            failed = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where those are that do not write
        if written := getattr(trainer.strategy, "written", None):
            self.pending = then(written, place)
        else:
            try:
                if failed is None:
                    place()
            except OSError as error:
                failed = error
            self._all_written(trainer, failed)
            self.saved_step = trainer.global_step
        self.due, self.saved_at = False, time.monotonic()

    def finish(self, trainer: pl.Trainer) -> None:
        """Waits for a checkpoint that is being written in the background, if there is one.

        Raises:
            UserError: as `save`, on all ranks.
        """
        if self.pending is None:
            return
        error = None
        try:
            self.pending.result()
        except (OSError, CheckpointException) as found:
            error = found
        self._all_written(trainer, error)
        self.pending, self.saved_step = None, self.pending_step

    def _all_written(self, trainer: pl.Trainer, error: OSError | CheckpointException | None) -> None:
        """Tells all ranks at once what the first one knows: it puts files in place, and writes if one does.

        Raises:
            UserError: one of them could not write, on all of them.
        """
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            reasons = _reasons(error) if error else ""
            if trainer.world_size > 1 and not isinstance(error, CheckpointException):
                reasons = f"rank 0: {reasons}"
            raise self._not_written(trainer.strategy.broadcast(reasons)) from error

    def _not_written(self, reasons: str) -> UserError:
        last, new = self.folder / "last.ckpt", self.folder / "new.ckpt"
        with suppress(OSError):
            _remove(new)
            _remove(self.folder / "new.best")
        kept = "there is none before it"
        if last.exists():
            kept = f"the one from step {self.saved_step} is untouched"
        return UserError(
            f"{last}: the checkpoint of step {self.pending_step} could not be written "
            f"({reasons}); {kept}. Free some space and start the same command "
            "again (without resume=never)"
        )

    @rank_zero_only
    def _put_in_place(self, new: Path, last: Path, best: bool) -> None:
        sha256 = file_sha256(new)
        if best:  # a copy, no link: what damages one leaves the other
            copy = self.folder / "new.best"
            _remove(copy)
            (shutil.copytree if new.is_dir() else shutil.copyfile)(new, copy)
            put_in_place(copy, self.folder / "best.ckpt", sha256)
        put_in_place(new, last, sha256)

    def _is_better(self, value: float) -> bool:
        if isnan(value) or self.best_value is None:
            return not isnan(value)
        return value < self.best_value if self.direction == "min" else value > self.best_value

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, kept across a resume."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; where `best.ckpt` is lost, the next validation writes one."""
        self.best_value = state_dict["best_value"] if (self.folder / "best.ckpt").exists() else None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what identifies the run's tokenizer and data."""
        checkpoint.update(self.extra)


class BetweenSteps(Callback):
    """Calls `Checkpoints.between_steps` before other callbacks begin a step, so that clocks leave saving out.

    Lightning calls callbacks that save last.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves or stops."""
        self.checkpoints.between_steps(trainer)


def _validates_at(trainer: pl.Trainer, step: int) -> bool:
    every = trainer.val_check_batch
    due = trainer.should_stop or (isinstance(every, int) and step % every == 0)
    return bool(trainer.enable_validation and due)


def put_in_place(new: Path, path: Path, sha256: str) -> None:
    """Puts `new` and its hash in the place of `path`; each is a file or a folder (sharded checkpoint).

    A kill, or a power cut, at any moment leaves a whole one whose hash is known: at `path`, or a folder with
    `.old` beside it.
    """
    sync(new)
    known = read_sha256(path) or ([file_sha256(path)] if path.exists() else [])
    write_sha256(path, *known, sha256)
    if path.exists() and (new.is_dir() or path.is_dir()):
        old = path.with_suffix(".old")
        _remove(old)
        os.replace(path, old)
        os.replace(new, path)
        sync(path.parent, inside=False)
        _remove(old)
    else:
        os.replace(new, path)
        sync(path.parent, inside=False)
        _remove(path.with_suffix(".old"))
    write_sha256(path, sha256)


def _reasons(error: OSError | CheckpointException) -> str:
    """Why, and of shares by which rank."""
    of_ranks = error.failures if isinstance(error, CheckpointException) else {}
    told = [f"rank {rank}: {_reason(failure[0])}" for rank, failure in of_ranks.items()]
    return ", ".join(told) or _reason(error)


def _reason(error: BaseException) -> str:
    told = str(getattr(error, "strerror", None) or error).splitlines()[0]
    if "inline_container" in told:  # PyTorch's writer of zips, which counts what has come to the file
        return "less was written than was to be, as on a full disk"
    return told


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
