"""Where the first weights of a run come from: `init_from`.

`auto`, the default, is the newest finished run of the parent stage (for all of ours stage 1) with the same
geometry and tokenizer; in a sweep that trains the parent, too, it is that one, which is waited for. Only its
record is read here, so that what is missing is said before any data are prepared and before a model is built.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.config import ModelConfig, UserError
from plato2.files import check_sha256, was_killed
from plato2.runs.console import say
from plato2.runs.folder import RunFolder, runs
from plato2.runs.saved import best_value

if TYPE_CHECKING:  # choosing needs no torch
    from plato2.stages import Stage

GEOMETRY = ("n_layer", "n_head", "hidden_size", "vocab_size", "max_position", "n_type", "n_role", "path")
"""Keys of the model that a stage shares with its parent; experiments change them under one name."""
OF_ADAPTER = ("adapter", "adapter_rank", "adapter_alpha", "base_sha256")
"""Those that it shares with a parent that has an adapter; the last with any parent made of a decoder."""
WAIT_S, POLL_S = 3600.0, 2.0
"""How long a job waits for a parent that writes nothing, and how often it looks, in seconds."""


@dataclass(frozen=True)
class OwnSweep:
    """What a job of a sweep that trains its parent, too, knows of it."""

    overrides: frozenset[str]
    """What the job differs in, but for the stage: its parent has the same."""
    side_by_side: bool
    """Whether jobs run at the same time, so that the parent may still be training."""


def parent_stage(stage: str, accepted: tuple[str, ...]) -> str | None:
    """The stage that another one starts from: the first whose weights it accepts, but itself."""
    return next((name for name in accepted if name != stage), None)


def newest_parent(
    output_dir: Path,
    stage: str,
    model_name: str,
    model: Mapping[str, Any],
    tokenizer_sha256: str | None,
    family: str | None,
    first: str,
    sweep: OwnSweep | None = None,
) -> RunFolder:
    """The run that `init_from=auto` means: the newest finished one of the parent stage that fits.

    Args:
        output_dir: the folder of all runs.
        stage: the parent stage.
        model_name: name of the geometry.
        model: its keys; a run with other values of `GEOMETRY` is skipped, whatever its name.
        tokenizer_sha256: of the data; None = they are not prepared yet, and any tokenizer will do.
        family: name of the sweep or curriculum; if it has a parent of its own, only that one will do.
        first: the command that trains a parent that fits.
        sweep: given where the sweep trains the parent: no other run will do, and it is waited for.

    Raises:
        UserError: no such run; names the command to run first.
    """
    found, own = _found(output_dir, stage, family)
    if sweep:
        own = _awaited(output_dir, stage, family, sweep) if sweep.side_by_side else _same(own, sweep)
    finished = [run for run in (own if own or sweep else found) if run.finished and run.best.exists()]
    fitting = [run for run in finished if not _other_geometry(run, stage, model_name, model)]
    chosen = [run for run in fitting if tokenizer_sha256 in (None, run.lineage().get("tokenizer_sha256"))]
    damaged = None
    for run in chosen:
        try:
            check_sha256(run.best, "choose another one")
            return run
        except UserError as error:
            say(f"warning: {run.path} is skipped: {error}")
            damaged = error
    if damaged:
        raise UserError(f"init_from=auto: {damaged}, or run this again: {first}")
    sought, reason = "", ""
    if fitting:
        sought = " with the tokenizer of this data"
        reason = f"; {fitting[0].path} has another (plato2 prepare --tokenizer {fitting[0].tokenizer})"
    elif finished:
        sought = " with this geometry"
        reason = f"; {finished[0].path} has {_other_geometry(finished[0], stage, model_name, model)}"
    curriculum = f" of the curriculum {family}" if own or sweep else ""
    raise UserError(
        f"init_from=auto: no finished {stage} run of model={model_name}{sought}{curriculum} under "
        f"{output_dir}{reason}; run this first: {first} (or give init_from=RUN; init_from=scratch insists on "
        "random weights)"
    )


def _found(output_dir: Path, stage: str, family: str | None) -> tuple[list[RunFolder], list[RunFolder]]:
    """All runs of the parent stage, newest first, and those of the curriculum."""
    found = runs(output_dir, f"*-{stage}/*")
    return found, [run for run in found if family and run.lineage().get("curriculum") == family]


def _same(own: list[RunFolder], sweep: OwnSweep) -> list[RunFolder]:
    """Those with the overrides of the job, if there are any: a sweep over seeds has a parent for each."""
    same = [run for run in own if frozenset(run.lineage().get("overrides", ())) == sweep.overrides]
    return same or own


def _awaited(output_dir: Path, stage: str, family: str | None, sweep: OwnSweep) -> list[RunFolder]:
    """The parent, when it is finished; as it is where it was killed, or has written nothing for an hour."""
    began, said = time.time(), False
    while True:
        own = _same(_found(output_dir, stage, family)[1], sweep)
        if own and own[0].finished:
            return own
        if own and was_killed(own[0].path / "lock"):
            return own
        written = [path.stat().st_mtime for run in own[:1] for path in run.path.glob("*")]
        if time.time() - max([began, *written]) > WAIT_S:
            return own
        if not said:
            say(f"init_from=auto: waiting for stage {stage} of the sweep {family} to finish")
            said = True
        time.sleep(POLL_S)


def _other_geometry(run: RunFolder, stage: str, model_name: str, model: Mapping[str, Any]) -> str:
    """What of a run's model differs, e.g. `model.n_layer=2, not 4`; empty where it is the same."""
    config = run.lineage().get("config")
    theirs = config.get("model") if isinstance(config, dict) else None
    if not isinstance(theirs, dict):
        name = run.path.parent.name.removesuffix(f"-{stage}")
        return "" if name == model_name else f"model={name}"  # shapes are compared when they are loaded
    differing = [key for key in (*GEOMETRY, *OF_ADAPTER) if theirs.get(key, model.get(key)) != model.get(key)]
    if "path" in differing and theirs.get("base_sha256", "") == model.get("base_sha256") != "":
        differing.remove("path")  # the same weights, in a folder that has been moved
    return ", ".join(f"model.{key}={theirs[key]}, not {model.get(key)}" for key in differing)


def described(run: RunFolder) -> str:
    """A run in a few words: its folder, its steps and its best validation.

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
    """The checkpoint of a run folder, or the checkpoint or model folder, that was named.

    Args:
        init_from: a run folder, a checkpoint, a model folder or `small`.
        stage: the stage to be trained.
        accepted: the stages it can start from.

    Raises:
        UserError: nothing there, an unfinished run, or one of another stage.
    """
    from plato2.weights.model_folder import is_model_folder, model_path

    path = model_path(init_from)
    if is_model_folder(path):
        return path
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


def warm_start(stage: Stage, path: Path, accepted: tuple[str, ...], tokenizer_sha256: str) -> str:
    """Copies another model's weights into a stage: everything the two share, and nothing less.

    A stage that is to be sharded (on the meta device) gets them later; of a sharded checkpoint each rank then
    reads its own shares.

    Args:
        stage: the stage to be trained.
        path: a checkpoint or a model folder.
        accepted: stages whose weights fit.
        tokenizer_sha256: tokenizer of the data.

    Returns:
        A line on what was loaded, what starts from scratch and what was left out.

    Raises:
        UserError: a wrong stage, another tokenizer or size, or a backbone that is not complete.
    """
    from plato2.model.pretrained import is_of_base
    from plato2.runs.distributed import read_weights
    from plato2.weights.folder import read_saved

    source = read_saved(path, accepted, "init_from=", in_shares=stage.backbone.device.type == "meta")
    _check_adapter(path, source.model_config, stage.model_config)
    state, own, theirs = source.weights, stage.state_dict(), source.tokenizer_sha256
    may_be_new = set(source.absent)
    if stage.model_config.has_adapter and not source.model_config.has_adapter:  # which is then the base
        state = {key: weight for key, weight in state.items() if not is_of_base(key)}
        may_be_new |= {key for key in own if ".lora_" in key}
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
    if lost := [key for key in fresh if key.startswith("backbone.") and key not in may_be_new]:
        raise UserError(
            f"init_from={path}: lacks {lost[0]} and {len(lost) - 1} more backbone weights; another model?"
        )
    if lost := [key for key in left_out if key.startswith("backbone.")]:
        raise UserError(
            f"init_from={path}: has {lost[0]}, which this model does not; another n_layer or n_role?"
        )
    described = any(weight.is_meta for weight in state.values())
    stage.start_from(state, partial(read_weights, folder=source.file) if described else None)
    base = f"; on all that {stage.model_config.base} has trained" if stage.model_config.base else ""
    report = f"weights from {path}: {len(own) - len(fresh)} of {len(own)} tensors"
    report += f"; new: {', '.join(_modules(fresh))}" if fresh else ""
    return report + (f"; not used: {', '.join(_modules(left_out))}" if left_out else "") + base


def with_base_of(model: ModelConfig, path: Path) -> ModelConfig:
    """The configuration of an adapter, on the base of what it goes on from: another one's, or all of a run.

    Args:
        model: of the stage to be trained.
        path: a checkpoint or a model folder.

    Raises:
        UserError: the base of the other adapter has changed, or is gone.
    """
    from plato2.weights.base import base_sha256, check_base
    from plato2.weights.folder import read_saved

    theirs = read_saved(path).model_config
    if not theirs.has_adapter:
        return replace(model, base=str(path.absolute()), base_sha256=base_sha256(path))
    if theirs.base:
        check_base(theirs, path)
        return replace(model, base=theirs.base, base_sha256=theirs.base_sha256)
    return model


def _check_adapter(path: Path, theirs: ModelConfig, own: ModelConfig) -> None:
    """Refuses an adapter of another shape or base than the stage's, or where it has none.

    Raises:
        UserError: it is.
    """
    if not theirs.has_adapter and own.has_adapter and theirs.architecture != own.architecture:
        raise UserError(
            f"init_from={path}: no run of the decoder in model.path={own.path}; give the one that it was "
            "trained from"
        )
    if theirs.has_adapter and theirs.base_sha256 != own.base_sha256 and own.has_adapter:
        raise UserError(
            f"init_from={path}: an adapter of other weights (sha256 {theirs.base_sha256[:12]}) than those in "
            f"model.path={own.path} ({own.base_sha256[:12]}); give the decoder that it was trained on"
        )
    for key in OF_ADAPTER if theirs.has_adapter else ():
        if (value := getattr(theirs, key)) != getattr(own, key):
            raise UserError(
                f"model.{key}={getattr(own, key)}: init_from={path} was trained with model.{key}={value}; "
                "give that"
            )


def _modules(keys: list[str]) -> list[str]:
    return sorted({key.split(".")[0] for key in keys})
