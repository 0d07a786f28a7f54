"""Trained stages and their tokenizers from a run folder or a checkpoint file, checked and never unpickled.

A run folder is what `train.py` writes (training/run.py). A checkpoint names its stage and holds the
primitives of the stage's constructor, so it can be read back by itself, with `weights_only=True`: it cannot
run code.
"""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

import torch
from torchmetrics import Metric

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.stages import STAGES, Stage
from plato2.training.checkpoint import read_checkpoint
from plato2.training.run import RunFolder


def load_stage(path: str | Path, accept: Collection[str] = tuple(STAGES), option: str = "") -> Stage:
    """The stage of a run folder or checkpoint file, in evaluation mode, float32, on the CPU.

    Args:
        path: a run folder (its `best.ckpt`, else its `last.ckpt`) or a checkpoint file.
        accept: names of the stages that fit the use, e.g. `("2_eval",)`.
        option: the command line option that `path` was given to, for messages.

    Raises:
        UserError: nothing there, not a checkpoint, damaged, of another stage, or weights that do not fit.
    """
    file = checkpoint_file(path)
    checkpoint = read_checkpoint(file)
    name = checkpoint["stage"]
    if name not in STAGES:
        raise UserError(f"{file}: stage {name!r} is unknown here; known are {', '.join(STAGES)}")
    if name not in accept:
        given = f"{option} {path}" if option else str(path)
        raise UserError(f"{given}: this is a {name} run; give a run of {' or '.join(accept)}")
    try:
        with torch.device("meta"):  # no time for initial weights that are replaced at once
            stage = STAGES[name](**checkpoint["hyper_parameters"])
    except TypeError as error:
        raise UserError(
            f"{file}: written by another version of plato2 ({error}); train it again or install that version"
        ) from None
    weights = {key: tensor.float().clone() for key, tensor in checkpoint["state_dict"].items()}
    try:
        stage.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{file}: the weights do not fit its own model configuration ({first[0].strip()}); "
            "the file is damaged or was edited: take another checkpoint of the run"
        ) from None
    for module in stage.modules():
        if isinstance(module, Metric):  # sums over a validation, not in the checkpoint: they start from zero
            module._apply(lambda state: torch.zeros_like(state, device="cpu"))
    return stage.eval()


def run_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a run was trained with: of a run folder, or of the one a checkpoint file lies in.

    Raises:
        UserError: no tokenizer there, or not the one the checkpoint was trained with.
    """
    file = checkpoint_file(path).absolute()
    run = RunFolder(file.parents[1])
    if run.checkpoints != file.parent:  # a checkpoint that was taken out of its run
        run = RunFolder(file.parent)
    tokenizer = Tokenizer.load(run.tokenizer)
    trained_with = read_checkpoint(file).get("tokenizer_sha256")
    if trained_with and trained_with != tokenizer.sha256:
        raise UserError(
            f"{run.tokenizer}: not the tokenizer {file.name} was trained with (sha256 "
            f"{tokenizer.sha256[:12]}, not {trained_with[:12]}); put the tokenizer of that run there"
        )
    return tokenizer


def checkpoint_file(path: str | Path) -> Path:
    """The file to read for a run folder or a checkpoint path.

    Raises:
        UserError: nothing there (near names are suggested), or a folder without checkpoints.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint{_near(path)}")
    run = RunFolder(path)
    if run.best.exists():
        return run.best
    inside = [RunFolder(folder.parent) for folder in path.glob("*/checkpoints")]
    newest = max(inside, key=lambda run: run.checkpoints.stat().st_mtime, default=None)
    cure = f"did you mean {newest.path}?" if newest else "give the folder of a run that has saved one"
    raise UserError(f"{path}: there is no checkpoint in it; {cure}")


def _near(path: Path) -> str:
    """`; did you mean ...?` with names like the first missing part of `path`."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()]
    close = get_close_matches(missing.name, names, n=3, cutoff=0.5)
    if not close:
        return f"; {missing.parent} has nothing of that name"
    return f"; did you mean {' or '.join(str(missing.parent / name) for name in close)}?"
