"""Where the first weights of a run come from: `init_from`.

`auto`, the default, is the newest finished stage-1 run of the same model and tokenizer. Only its record is
read here, so that what is missing is said before any data are prepared and before a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from pathlib import Path
from typing import Any

from plato2.config import UserError
from plato2.training.run import RunFolder, runs
from plato2.training.saved import best_value

COARSE = "1_coarse"
"""The stage that the others start from."""
GEOMETRY = ("n_layer", "n_head", "hidden_size", "vocab_size", "max_position", "n_type", "n_role")
"""Keys of the model that stage 1 shares with the stages after it; experiments change them under one name."""


def needs_parent(stage: str, accepted: tuple[str, ...]) -> bool:
    """Whether a stage starts from stage 1: all that accept its weights, but stage 1 itself."""
    return stage != COARSE and COARSE in accepted


def newest_parent(
    output_dir: Path,
    model_name: str,
    model: Mapping[str, Any],
    tokenizer_sha256: str | None,
    family: str | None,
    first: str,
) -> RunFolder:
    """The run that `init_from=auto` means: the newest finished stage 1 that fits.

    Args:
        output_dir: the folder of all runs.
        model_name: name of the geometry.
        model: its keys; a run of the same name and other values of `GEOMETRY` is passed over.
        tokenizer_sha256: of the data; None = they are not prepared yet, and any tokenizer will do.
        family: name of the sweep or curriculum; if it has a stage 1 of its own, only that one will do.
        first: the command that trains a stage 1 that fits.

    Raises:
        UserError: there is none; names the command to run first.
    """
    found = runs(output_dir, f"{model_name}-{COARSE}")
    own = [run for run in found if family and run.lineage().get("curriculum") == family]
    finished = [run for run in own or found if run.finished and run.best.exists()]
    fitting = [run for run in finished if not _other_geometry(run, model)]
    chosen = [run for run in fitting if tokenizer_sha256 in (None, run.lineage().get("tokenizer_sha256"))]
    if chosen:
        return chosen[0]
    sought, reason = "", ""
    if fitting:
        sought = " with the tokenizer of this data"
        reason = f"; {fitting[0].path} has another (plato2 prepare --tokenizer {fitting[0].tokenizer})"
    elif finished:
        sought = " with this geometry"
        reason = f"; {finished[0].path} has {_other_geometry(finished[0], model)}"
    curriculum = f" of the curriculum {family}" if own else ""
    raise UserError(
        f"init_from=auto: no finished {COARSE} run of model={model_name}{sought}{curriculum} under "
        f"{output_dir}{reason}; run this first: {first} (or give init_from=RUN; init_from=scratch insists on "
        "random weights)"
    )


def _other_geometry(run: RunFolder, model: Mapping[str, Any]) -> str:
    """What of a run's model differs, e.g. `model.n_layer=2, not 4`; empty where it is the same."""
    config = run.lineage().get("config")
    theirs = config.get("model") if isinstance(config, dict) else None
    if not isinstance(theirs, dict):
        return ""  # a record without a configuration: the weights' shapes are compared when they are loaded
    differing = [key for key in GEOMETRY if theirs.get(key, model[key]) != model[key]]
    return ", ".join(f"model.{key}={theirs[key]}, not {model[key]}" for key in differing)


def described(run: RunFolder) -> str:
    """A stage-1 run in a few words: its folder, its steps and its best validation.

    Raises:
        UserError: its checkpoint cannot be read.
    """
    facts, loss = [], best_value(run.best)
    if (step := run.lineage().get("step")) is not None:
        facts.append(f"{step:,} steps")
    if loss is not None:
        facts.append(f"best val/ppl {exp(loss):.1f}" if loss < 100 else f"best val/loss {loss:.1f}")
    return f"{run.path} ({', '.join(facts)})" if facts else str(run.path)


def named_start(init_from: str, stage: str, accepted: tuple[str, ...]) -> Path:
    """The checkpoint of a run folder or checkpoint that was named.

    A model folder is read by weights/folder.py instead.

    Args:
        init_from: a run folder or a checkpoint.
        stage: the stage to be trained.
        accepted: the stages it can start from.

    Raises:
        UserError: nothing there, an unfinished run, or one of another stage.
    """
    path = Path(init_from)
    if not path.exists():
        raise UserError(f"init_from={init_from}: no such run folder, checkpoint or model folder")
    run = RunFolder(path)
    if not run.lineage():
        if path.is_dir() and not (path / "meta.pt").exists():  # Lightning's file in a sharded checkpoint
            raise UserError(
                f"init_from={init_from}: neither a run folder (no lineage.json), a model folder "
                "(no config.json) nor a checkpoint"
            )
        return path
    if run.lineage().get("stage") not in accepted:
        raise UserError(
            f"init_from={init_from}: a {run.lineage().get('stage')} run; stage {stage} starts from "
            f"{' or '.join(accepted)}"
        )
    if not run.finished:
        raise UserError(
            f"init_from={init_from}: the run is not finished; start its command again to finish it, or name "
            f"one of its checkpoints: init_from={run.last}"
        )
    return run.best
