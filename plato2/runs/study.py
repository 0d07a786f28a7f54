"""Optuna's study of a sweep: a journal in the sweep's folder, which its runs write to while they train.

The journal is Optuna's own (JournalStorage): a line for each thing that happened. The sweep adds points and
what came of them, a run adds its validations and asks whether it is worth going on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import optuna
import pytorch_lightning as pl
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import TrialState as TrialState
from pytorch_lightning.callbacks import Callback

from plato2.config import UserError, did_you_mean
from plato2.runs.build import check_arguments

JOURNAL = "study.journal"
NAME = "sweep"
"""Of the one study in a journal."""
PRUNER = "pruner"
"""The study's attribute that says which pruner its runs ask."""

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class _OneWriter(BaseJournalFileLock):
    """A lock of the kernel's, which is free the moment its holder is killed (Optuna's own stays for 30 s).

    A line that a killed process has not written to its end is cut off before the next one is added.
    """

    def __init__(self, journal: Path) -> None:
        self.journal, self.lock = journal, FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        """Waits for it."""
        self.lock.acquire()
        with self.journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end
            while whole:  # back to the end of the last whole line
                file.seek(whole - 1)
                if file.read(1) == b"\n":
                    break
                whole -= 1
            if whole < end:
                file.truncate(whole)
        return True

    def release(self) -> None:
        """Frees it."""
        self.lock.release()


def open_study(journal: Path, direction: Literal["minimize", "maximize"] | None = None) -> optuna.Study:
    """The study in a journal, with the pruner that it names.

    Args:
        journal: the file.
        direction: `minimize` or `maximize`; a study is begun where there is none. None = it must be there.

    Raises:
        UserError: no study, or not a journal of Optuna's.
    """
    cure = "restore it, or start another sweep with resume=never"
    if direction is None and not journal.exists():
        raise UserError(f"study={journal}: no such journal; {cure}")
    try:
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_OneWriter(journal)))
        if direction is None:
            study = optuna.load_study(study_name=NAME, storage=storage)
        else:
            study = optuna.create_study(
                study_name=NAME, storage=storage, direction=direction, load_if_exists=True
            )
        study.sampler = optuna.samplers.RandomSampler()  # until there is one: it asks nothing of the points
        study.pruner = pruner(study.user_attrs.get(PRUNER))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal}: not the journal of a study ({error}); {cure}") from None
    return study


def pruner(options: Mapping[str, Any] | None) -> optuna.pruners.BasePruner:
    """The pruner that `hydra.sweeper.pruner` describes.

    Raises:
        UserError: Optuna has none of the name, or it has no such option.
    """
    if options is None:
        return optuna.pruners.NopPruner()
    made: optuna.pruners.BasePruner = named(optuna.pruners, options, "hydra.sweeper.pruner")
    return made


def sampler(options: Mapping[str, Any], seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that `hydra.sweeper.sampler` describes.

    Raises:
        UserError: Optuna has none of the name, or it has no such option.
    """
    made: optuna.samplers.BaseSampler = named(
        optuna.samplers, {**options, "seed": seed}, "hydra.sweeper.sampler"
    )
    return made


def named(module: Any, options: Mapping[str, Any], key: str) -> Any:
    """An object of one of Optuna's modules: its class by `name`, its arguments beside it.

    Raises:
        UserError: no such class, or no such argument.
    """
    name = options.get("name")
    if name not in module.__all__:
        raise UserError(
            f"{key}.name={name}: Optuna has no such one; {did_you_mean(str(name), module.__all__)}"
        )
    given = {option: value for option, value in options.items() if option != "name"}
    check_arguments(getattr(module, str(name)), given, key)
    try:
        return getattr(module, str(name))(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


class Report(Callback):
    """Tells the study each validation of a run, and ends the run after one that its pruner finds bad.

    The decision is in the checkpoint of that validation, which Lightning lets write after this: a run that is
    killed right then is not trained on.

    Args:
        journal: of the study.
        trial: number of the run's point in it.
        metric: what is compared.
    """

    def __init__(self, journal: Path, trial: int, metric: str) -> None:
        self.journal, self.number, self.metric = journal, trial, metric
        self.pruned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the journal, on the process that writes to it."""
        if trainer.is_global_zero:
            study = open_study(self.journal)
            self.trial = trial(study, self.number)
            self.reported = set(study.get_trials(deepcopy=False)[self.number].intermediate_values)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports; all processes learn the answer.

        What was reported before a kill is found again and is the same.

        Raises:
            UserError: the metric is not logged at validations.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            known = sorted(map(str, trainer.callback_metrics))
            raise UserError(f"sweep_metric={self.metric}: not logged; {did_you_mean(self.metric, known)}")
        bad = False
        if trainer.is_global_zero:
            value = float(trainer.callback_metrics[self.metric])
            if isfinite(value) and trainer.global_step not in self.reported:
                self.trial.report(value, trainer.global_step)
            bad = trainer.global_step < trainer.max_steps and self.trial.should_prune()
        if trainer.strategy.broadcast(bad):
            self.pruned = True
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the run is over, whatever steps are left."""
        return {"pruned": self.pruned}


def trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A point of a study that is still open.

    Raises:
        UserError: there is none of the number.
    """
    for frozen in study.get_trials(deepcopy=False):
        if frozen.number == number:
            return optuna.Trial(study, frozen._trial_id)
    raise UserError(f"trial={number}: the study has no such point; leave trial and study to the sweep")
