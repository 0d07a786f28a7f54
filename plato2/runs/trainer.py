"""Lightning's Trainer for a run, with its strategy, callbacks and loggers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.config import TrainConfig, UserError
from plato2.runs.build import build
from plato2.runs.console import quiet_lightning
from plato2.runs.job import Job
from plato2.runs.parts import is_sharded, precision_of

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    import pytorch_lightning as pl

    from plato2.data.module import DialogueDataModule
    from plato2.runs.folder import RunFolder
    from plato2.stages import Stage


def build_trainer(
    keys: TrainConfig,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    loggers: list[Any],
    parent: Path | None,
    job: Job,
) -> pl.Trainer:
    """The Lightning Trainer with the callbacks and loggers of the run.

    Raises:
        UserError: an argument that Lightning does not take, or hardware that is not there.
    """
    from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from plato2.runs.wandb import WandbRun, WholeRows

    strategy = strategy_arguments(keys, job)
    callbacks = build_callbacks(keys, stage, data, run, parent)
    callbacks += [build(node, f"callbacks.{name}") for name, node in keys.callbacks.items()]
    callbacks += [WholeRows(logger) for logger in loggers if isinstance(logger, WandbRun)]
    quiet_lightning()
    fixed: dict[str, Any] = {
        "max_epochs": -1,  # a run is one endless epoch; the data's epochs are the stream's
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    plugins = strategy.pop("plugins")
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]  # `requeue` does it
    fixed["plugins"] = plugins or None
    node = {**fixed, **strategy, **keys.trainer, "_target_": "pytorch_lightning.Trainer"}
    try:
        return build(node, "trainer", callbacks=callbacks, logger=loggers or False, default_root_dir=run.path)
    except (MisconfigurationException, ValueError) as error:
        told = str(error).splitlines()[0]
        missing = "is not available" in told or "No supported gpu" in told
        cure = "; give strategy=cpu, or strategy=auto for what this machine has" if missing else ""
        raise UserError(f"trainer and strategy: {told}{cure}") from error


def strategy_arguments(keys: TrainConfig, job: Job) -> dict[str, Any]:
    """The group `strategy` as the Trainer takes it.

    Raises:
        UserError: a sweep that each of several processes would start again.
    """
    from plato2.runs.folder import several_processes
    from plato2.runs.parallel import is_on_gpu
    from plato2.runs.sharded import WholeCheckpoints, precision_plugin

    strategy = dict(keys.strategy)
    started = "LOCAL_RANK" in os.environ or several_processes()
    if job.in_sweep and strategy.get("devices") != 1 and not started:
        raise UserError(
            f"strategy.devices={strategy.get('devices')} in a sweep: every process would start it again; "
            "start it with torchrun or srun, use hydra/launcher=slurm, or devices=1"
        )
    if strategy.get("precision") == "auto":
        strategy["precision"] = precision_of(keys)
    device = "cuda" if is_on_gpu(str(strategy["accelerator"])) else "cpu"
    plugin = precision_plugin(str(strategy.get("precision", "32-true")), device, is_sharded(keys))
    if plugin:
        del strategy["precision"]  # Lightning takes one or the other
    plugins = [plugin, None if is_sharded(keys) else WholeCheckpoints()]
    return {**strategy, "plugins": [plugin for plugin in plugins if plugin]}


def build_callbacks(
    keys: TrainConfig, stage: Stage, data: DialogueDataModule, run: RunFolder, parent: Path | None
) -> list[pl.Callback]:
    """Checkpoints, progress and speed of a run, and the replies and figures beside its validations."""
    from plato2.runs.callbacks import (
        Figures,
        LatentHistogram,
        RunProgress,
        SampleReplies,
        SweepMetric,
        Throughput,
    )
    from plato2.runs.checkpoint import BetweenSteps, Checkpoints
    from plato2.runs.length import TimeLeft
    from plato2.talk.replies import ValidationReplies, ValidationVariety
    from plato2.talk.selection import ValidationFigures

    extra = {"tokenizer_sha256": data.tokenizer_sha256}
    checkpoints = Checkpoints(
        run.checkpoints, keys.checkpoint_steps, keys.checkpoint_minutes, stage.monitor, extra
    )
    callbacks: list[pl.Callback] = [
        BetweenSteps(checkpoints),
        checkpoints,
        Throughput(keys.model, stage.passes, keys.trainer["log_every_n_steps"]),
        RunProgress(f"{keys.model_name} {stage.name}"),
        TimeLeft(data.batching.unit_tokens, data.units_per_step, keys.model_name),
        LatentHistogram(),
    ]
    if keys.study is not None:
        if keys.trial is None:
            raise UserError(f"study={keys.study}: goes with trial; leave both to hydra/sweeper=optuna")
        from plato2.runs.study import Report

        callbacks.append(Report(Path(keys.study), keys.trial, keys.sweep_metric or stage.monitor[0]))
    elif keys.sweep_metric is not None:
        callbacks.append(SweepMetric(keys.sweep_metric))
    if keys.sample_replies and stage.use.role == "generation":
        replies = ValidationReplies(data, keys.sample_replies)
        what = f"replying (sample_replies={keys.sample_replies})"
        callbacks.append(SampleReplies(run.path / "replies.jsonl", replies, what))
    if (keys.selection or keys.human_rank) and stage.use.serves("evaluation"):
        what = f"ranking (selection={keys.selection}, human_rank={keys.human_rank})"
        callbacks.append(Figures(ValidationFigures(data, keys.selection, keys.human_rank, parent), what))
    if keys.latent_contexts and getattr(stage, "recognition", None) is not None:
        what = f"replying with each latent (latent_contexts={keys.latent_contexts})"
        callbacks.append(Figures(ValidationVariety(data, keys.latent_contexts), what))
    return callbacks
