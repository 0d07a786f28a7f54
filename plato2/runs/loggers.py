"""The loggers of a run, from the `logger` group and what they need to know of the run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from plato2.config import UserError
from plato2.runs.build import build
from plato2.runs.folder import RunFolder
from plato2.runs.saved import checkpoint_step

WANDB_CHARACTERS = 100
"""Of a name that W&B gets: it takes 128, and makes longer ones of a run's id."""


def build_loggers(
    nodes: Mapping[str, Mapping[str, Any]],
    run: RunFolder,
    checkpoint: Path | None,
    *,
    name: str,
    stage: str,
    family: str,
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
        family: what the runs of one curriculum share; W&B's group.
        tags: for W&B.
        config: the resolved configuration, for W&B.

    Raises:
        UserError: an unknown key of a logger, or what W&B refuses.
    """
    step = checkpoint_step(checkpoint) if checkpoint else None
    later = {} if step is None else {"purge_step": step + 1}  # TensorBoard hides what it had of these steps
    of_the_run: dict[str, dict[str, Any]] = {
        "csv": {"folder": run.path, "resumed_step": step},
        "tensorboard": {"save_dir": run.path, **later},
        "wandb": {
            "save_dir": run.path,
            "name": shortened(f"{name}/{run.path.name}"),
            "id": shortened(re.sub(r"[^\w-]", "_", f"{name}-{run.path.name}")),
            "resume": "allow",
            "group": shortened(family),
            "job_type": stage,
            "tags": list(tags),
            "config": dict(config),
        },
    }
    if nodes.get("wandb", {}).get("log_model"):
        raise UserError(
            f"logger.wandb.log_model={nodes['wandb']['log_model']}: plato2 writes its own checkpoints and "
            "sends none; leave it out"
        )
    loggers = [build(node, f"logger.{key}", **of_the_run.get(key, {})) for key, node in nodes.items()]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(config), metrics={})  # for its hparams.yaml
        elif isinstance(logger, WandbLogger):
            _begin(logger)
    return loggers


def shortened(name: str) -> str:
    """A name that is short enough for W&B: of a long one the beginning, and a hash of the whole."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= WANDB_CHARACTERS else f"{name[: WANDB_CHARACTERS - 13]}-{digest}"


def _begin(logger: WandbLogger) -> None:
    """Begins the W&B run, on the first process, so that what W&B refuses is said before anything is trained.

    Raises:
        UserError: names, tags or a key that W&B does not take, or no way to its server.
    """
    from wandb.errors import Error

    try:
        logger.experiment  # noqa: B018
    except (Error, ValueError) as error:  # ValueError: pydantic's, of its settings
        lines = str(error).splitlines()
        told = next((line.strip() for line in lines if "Value error" in line), lines[0])
        reason = told.removeprefix("Value error, ").partition(" [type=")[0]
        raise UserError(
            f"logger=wandb: {reason} (without a key or a network: logger.wandb.offline=true; the names are "
            "logger.wandb.project, tags and run_id)"
        ) from None


def close_loggers(trainer: pl.Trainer) -> None:
    """Ends the W&B run, which the next job of a sweep would otherwise continue."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()
