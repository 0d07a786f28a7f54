"""Checkpoints that survive a kill at any moment, and weights taken from another run (warm start)."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from plato2.config import UserError
from plato2.training.saved import read_checkpoint


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` every N steps, at validations, at the end and when told to stop, and `best.ckpt`.

    A checkpoint falls between optimizer steps and after the validation of its step. It is written beside
    the old one and takes its place by renaming, so there is a whole one at any time. Weights, optimizer,
    schedule, step and data position are in it; all random numbers are functions of seed and step, so there
    is no state of theirs.

    SIGTERM, and SIGUSR1 as Slurm sends it before the time is up, stop the run after the step at hand (and its
    validation) on all ranks together, whichever of them got the signal.

    Args:
        folder: where to write.
        every_steps: steps between checkpoints.
        monitor: validation metric that picks `best.ckpt`, and `min` or `max`.
        extra: primitives to put into each checkpoint, e.g. the tokenizer's hash.
    """

    def __init__(
        self, folder: Path, every_steps: int, monitor: tuple[str, str], extra: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.every_steps, self.extra = folder, every_steps, extra or {}
        self.metric, self.direction = monitor
        self.best_value: float | None = None
        self.saved_step = -1
        self.stop_signal: int | None = None
        self.stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over: Lightning's handler waits for other ranks and can hang."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when the step count says so, unless a validation of this step is still to come."""
        step = trainer.global_step
        if step >= trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate after the last step, too
        self.stopping = self._told_to_stop(trainer)
        last = trainer.should_stop or trainer.is_last_batch
        due = self.stopping or last or step % self.every_steps == 0
        if due and not _validates_at(trainer, step):
            self.save(trainer)

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

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops before the next step: only now are the saved step's metrics written."""
        if self.stopping:
            raise SIGTERMException

    def _note_signal(self, number: int, frame: object) -> None:
        self.stop_signal = number

    def _told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any rank got a signal; all ranks get the same answer."""
        told = trainer.strategy.reduce_boolean_decision(self.stop_signal is not None, all=False)
        if told and self.stop_signal is None:
            self.stop_signal = signal.SIGTERM
        return told

    def save(self, trainer: pl.Trainer, best: bool = False) -> None:
        """Writes `last.ckpt` (and `best.ckpt`) of the current step; all ranks take part.

        Raises:
            UserError: the disk is full or not writable; the previous checkpoint is untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        last, new = self.folder / "last.ckpt", self.folder / "new.ckpt"
        try:
            trainer.save_checkpoint(new, weights_only=False)  # Lightning: not only weights
        except OSError as error:
            _remove(new)
            kept = (
                f"the one of step {self.saved_step} is untouched"
                if last.exists()
                else "there is none before it"
            )
            raise UserError(
                f"{last}: the checkpoint of step {trainer.global_step} could not be written "
                f"({error.strerror or error}); {kept}. Make room and start the same command again"
            ) from error
        self._put_in_place(new, last, best)
        trainer.strategy.barrier("checkpoint")
        self.saved_step = trainer.global_step

    @rank_zero_only
    def _put_in_place(self, new: Path, last: Path, best: bool) -> None:
        _replace(new, last)
        if best:
            _link(last, new)
            _replace(new, self.folder / "best.ckpt")

    def _is_better(self, value: float) -> bool:
        if isnan(value) or self.best_value is None:
            return not isnan(value)
        return value < self.best_value if self.direction == "min" else value > self.best_value

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, kept across a resume."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.best_value = state_dict["best_value"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what identifies the run's tokenizer and data."""
        checkpoint.update(self.extra)


def _validates_at(trainer: pl.Trainer, step: int) -> bool:
    every = trainer.val_check_batch
    due = trainer.should_stop or (isinstance(every, int) and step % every == 0)
    return bool(trainer.enable_validation and due)


def _replace(new: Path, path: Path) -> None:
    """Puts `new` in the place of `path`; both are files, or both folders (sharded checkpoints)."""
    if new.is_dir() and path.exists():
        old = path.with_suffix(".old")
        _remove(old)
        os.replace(path, old)
        os.replace(new, path)
        _remove(old)
    else:
        os.replace(new, path)


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no links."""
    _remove(target)
    try:
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
    except OSError:
        _remove(target)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Weights:
    """What a stage can start from."""

    path: Path
    stage: str
    tensors: dict[str, Tensor]
    tokenizer_sha256: str | None
    absent: tuple[str, ...] = ()
    """Parameters that a released model may lack because only training needs them."""


def checkpoint_weights(path: Path) -> Weights:
    """The weights in a checkpoint file.

    Raises:
        UserError: not a checkpoint of ours.
    """
    checkpoint = read_checkpoint(path)
    return Weights(path, checkpoint["stage"], checkpoint["state_dict"], checkpoint.get("tokenizer_sha256"))


def warm_start(
    stage: nn.Module, source: Weights, name: str, accepted: tuple[str, ...], tokenizer_sha256: str
) -> str:
    """Copies another model's weights into a stage: everything the two share, and nothing less.

    Args:
        stage: the stage to be trained.
        source: of a checkpoint or a model folder.
        name: the stage's name.
        accepted: stages whose weights fit.
        tokenizer_sha256: tokenizer of the data.

    Returns:
        A line on what was loaded, what starts anew and what was left out.

    Raises:
        UserError: a wrong stage, another tokenizer or size, or a backbone that is not complete.
    """
    path, state, own = source.path, source.tensors, stage.state_dict()
    if source.stage not in accepted:
        raise UserError(
            f"init_from={path}: a {source.stage} checkpoint; stage {name} starts from {' or '.join(accepted)}"
        )
    theirs = source.tokenizer_sha256
    if theirs and theirs != tokenizer_sha256:
        raise UserError(
            f"init_from={path}: trained with tokenizer {theirs[:12]}, the data has {tokenizer_sha256[:12]}; "
            "prepare the data with that run's tokenizer (plato2 prepare --tokenizer RUN/tokenizer)"
        )
    for key in sorted(own.keys() & state.keys()):
        if own[key].shape != state[key].shape:
            raise UserError(
                f"init_from={path}: {key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} "
                "here; choose the model it was trained with (its config.yaml says which)"
            )
    fresh = sorted(own.keys() - state.keys())
    left_out = sorted(state.keys() - own.keys())
    if lost := [key for key in fresh if key.startswith("backbone.") and key not in source.absent]:
        raise UserError(
            f"init_from={path}: lacks {lost[0]} and {len(lost) - 1} more backbone weights; another model?"
        )
    if lost := [key for key in left_out if key.startswith("backbone.")]:
        raise UserError(
            f"init_from={path}: has {lost[0]}, which this model does not; another n_layer or n_role?"
        )
    stage.load_state_dict(state, strict=False)
    report = f"weights from {path}: {len(own) - len(fresh)} of {len(own)} tensors"
    report += f"; new: {', '.join(_modules(fresh))}" if fresh else ""
    return report + (f"; not used: {', '.join(_modules(left_out))}" if left_out else "")


def _modules(keys: list[str]) -> list[str]:
    return sorted({key.split(".")[0] for key in keys})
