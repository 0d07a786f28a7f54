"""The loggers of a run, from the `logger` group and what they need to know of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from plato2.config import UserError, install
from plato2.runs.build import build
from plato2.runs.folder import RunFolder
from plato2.runs.panels import tensorboard_layout
from plato2.runs.saved import checkpoint_step
from plato2.runs.wandb import WandbRun, run_key, shortened


def build_loggers(
    nodes: Mapping[str, Mapping[str, Any]],
    run: RunFolder,
    checkpoint: Path | None,
    *,
    name: str,
    stage: str,
    size: str,
    seed: int,
    family: str,
    parent: Path | None,
    tags: Sequence[str],
    config: Mapping[str, Any],
) -> list[Any]:
    """One logger for each entry of the group.

    Args:
        nodes: the `logger` group, by `csv`, `tensorboard`, `wandb` or another name.
        run: the run folder; all of them write there.
        checkpoint: what the run resumes from, if it does.
        name: `<model>-<stage>`.
        stage: the stage's name; W&B's job type.
        size: name of the geometry.
        seed: of the run.
        family: what the runs of one curriculum share; W&B's group.
        parent: the checkpoint or model folder that the run starts from, if any.
        tags: for W&B.
        config: the resolved configuration, for W&B.

    Raises:
        UserError: an unknown key of a logger, a logger whose package is missing, or what W&B refuses.
    """
    step = checkpoint_step(checkpoint) if checkpoint else None
    ancestor = None if parent is None else run_of(parent)
    says = f"{name}/{run.path.name} seed {seed}" + (f" from {ancestor}" if ancestor else "")
    about = {"curriculum": family, "stage": stage, "size": size, "seed": seed, "parent": ancestor}
    later = {} if step is None else {"purge_step": step + 1}  # TensorBoard hides what it had of these steps
    of_the_run: dict[str, dict[str, Any]] = {
        "csv": {"folder": run.path, "resumed_step": step},
        "tensorboard": {"save_dir": run.path, **later},
        "wandb": {
            "save_dir": run.path,
            "name": shortened(says),
            "id": run_key(name, run.path),
            "resume": "allow",
            "group": shortened(family),
            "job_type": stage,
            "tags": list(tags),
            "config": {**config, "run": about},
        },
    }
    try:
        loggers = [build(node, f"logger.{key}", **of_the_run.get(key, {})) for key, node in nodes.items()]
    except ModuleNotFoundError as error:  # Lightning's; the packages of the other loggers are always there
        if "tensorboard" not in str(error):
            raise
        raise UserError(f"logger=tensorboard needs tensorboard: {install('tensorboard')}") from error
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(config), metrics={})  # for its hparams.yaml
            _lay_out(logger, stage)
        elif isinstance(logger, WandbRun):
            _begin(logger, run, step)
            if parent is not None and ancestor != parent.name:
                logger.use_parent(parent)
    return loggers


def run_of(parent: Path) -> str:
    """The name of the run that a checkpoint is of, `<model>-<stage>/<run_id>`; of a model folder its own."""
    is_checkpoint = parent.suffix == ".ckpt" and len(parent.parents) > 2
    return "/".join(parent.parents[1].parts[-2:]) if is_checkpoint else parent.name


@rank_zero_only
def _lay_out(logger: TensorBoardLogger, stage: str) -> None:
    """The dashboard's panels, under TensorBoard's `custom scalars`."""
    logger.experiment.add_custom_scalars(tensorboard_layout(stage))


def _begin(logger: WandbRun, run: RunFolder, resumed_step: int | None) -> None:
    """Begins the W&B run, on the first process, so that what W&B refuses is said before anything is trained.

    Raises:
        UserError: names, tags or a key that W&B does not take, or no way to its server.
    """
    from wandb.errors import Error

    try:
        logger.begin(run, resumed_step)
    except (Error, ValueError) as error:  # ValueError: pydantic's, of its settings
        lines = str(error).splitlines()
        told = next((line.strip() for line in lines if "Value error" in line), " ".join(lines[:2]))
        reason = told.removeprefix("Value error, ").partition(" [type=")[0]
        raise UserError(
            f"logger=wandb: {reason} (without a key or a network: logger.wandb.offline=true; the names are "
            "logger.wandb.project, tags and run_id)"
        ) from None


def close_loggers(trainer: pl.Trainer, run: RunFolder) -> None:
    """Ends the W&B run, which the next job of a sweep would otherwise continue.

    The best checkpoint of a finished run is an artifact there.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun) and trainer.is_global_zero:
            logger.flush()
            if run.finished:
                logger.log_best(run, {"step": trainer.global_step})
            logger.experiment.finish()
