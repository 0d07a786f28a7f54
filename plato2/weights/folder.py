"""Trained models wherever they lie: run folder, checkpoint file or model folder; checked, never unpickled.

A run folder is what `train.py` writes (runs/folder.py), a model folder what `plato2 import` and `export`
write (weights/model_folder.py). A checkpoint names its stage and holds the primitives of the stage's
constructor, so it can be read back by itself, with `weights_only=True`: it cannot run code.

A model to talk to or to score with is loaded as a network (model/networks.py), without Lightning; a model to
train as its stage.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plato2.config import SMALL, SMOLLM2, ModelConfig, Role, Use, UserError
from plato2.data.tokenizer import Tokenizer
from plato2.formats import StageArguments, check
from plato2.model.backbone import initialize_parameter
from plato2.model.heads import Recognition
from plato2.model.networks import EvaluationNetwork, GenerationNetwork
from plato2.model.pretrained import ADAPTER, PretrainedBackbone
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_checkpoint
from plato2.weights.base import check_base, fill_base
from plato2.weights.model_folder import BASE, PARTS, is_model_folder, model_path, read_config, read_part

if TYPE_CHECKING:  # Lightning is not needed to talk
    from plato2.stages import Stage


Network = GenerationNetwork | EvaluationNetwork


@dataclass(frozen=True)
class Saved:
    """A trained model as it was found."""

    file: Path
    """The checkpoint or model folder, for messages."""
    stage: str
    use: Use
    arguments: dict[str, Any]
    """Of the stage's constructor."""
    weights: dict[str, Tensor]
    """By the names of the stage's state dict, in the precision they are stored in."""
    tokenizer_folder: Path
    tokenizer_sha256: str | None
    absent: tuple[str, ...] = ()
    """Parameters of the stage that are not there because only training needs them."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What its last validation measured beside its losses, e.g. `pair_acc` of an evaluation model."""

    def __post_init__(self) -> None:
        """Refuse a depth that is not that of the weights: blocks take memory even before their weights do."""
        blocks = (
            re.match(r"backbone\.(?:blocks|decoder\.(?:h|layers))\.(\d+)\.", key) for key in self.weights
        )
        n_blocks = len({found[1] for found in blocks if found})
        if (n_layer := self.model_config.n_layer) != n_blocks:
            raise UserError(_unfit(self.file, f"n_layer is {n_layer}, there are {n_blocks} blocks"))

    @property
    def model_config(self) -> ModelConfig:
        """Its geometry."""
        return ModelConfig(**self.arguments["model"])


def read_saved(
    path: str | Path,
    accept: Collection[str] | None = None,
    option: str = "",
    role: Role | None = None,
    in_shares: bool = False,
) -> Saved:
    """The model at `path`; in a model folder with two models, the accepted one.

    Args:
        path: a run folder (its `best.ckpt`, else its `last.ckpt`), a checkpoint file or a model folder.
        accept: names of the stages that will do; None = all.
        option: the command line option that `path` was given to, for messages.
        role: what the model is to be used for; None = anything.
        in_shares: as in `read_checkpoint`.

    Raises:
        UserError: nothing there, not a model, damaged, or of another stage or use.
    """
    given = f"{option}{'' if option.endswith('=') else ' '}{path}".strip()
    folder = model_path(path)
    if is_model_folder(folder):
        config = read_config(folder)
        held = [part for part in PARTS if part in config]
        for part in sorted(held, key=lambda part: part != role):  # a model that also ranks comes second
            if _fits(config[part]["stage"], config[part]["use"], accept, role):
                return _part(folder, config, part)
        stages = " and ".join(config[part]["stage"] for part in held)
        raise UserError(f"{given}: this folder holds {stages}; give one with {_wanted(accept, role)}")
    file = checkpoint_file(path)
    checkpoint = read_checkpoint(file, in_shares)
    stage = checkpoint["stage"]
    if not _fits(stage, checkpoint["use"], accept, role):
        raise UserError(f"{given}: this is a {stage} run; give a run of {_wanted(accept, role)}")
    return _checkpoint(file, checkpoint)


def _checkpoint(file: Path, checkpoint: dict[str, Any]) -> Saved:
    check(StageArguments, checkpoint["hyper_parameters"], str(file), "choose another checkpoint")
    checkpoint["hyper_parameters"]["model"].pop("base_dtype", None)  # of training alone
    run = RunFolder(file.absolute().parents[1])
    if run.checkpoints != file.absolute().parent:  # a checkpoint that was taken out of its run
        run = RunFolder(file.absolute().parent)
    return Saved(
        file,
        checkpoint["stage"],
        _use(checkpoint["use"]),
        checkpoint["hyper_parameters"],
        checkpoint["state_dict"],
        run.tokenizer,
        checkpoint.get("tokenizer_sha256"),
        figures=_numbers(checkpoint.get("figures")),
    )


def _part(folder: Path, config: dict[str, Any], part: Role) -> Saved:
    entry = config[part]
    if entry["arguments"]["model"].get("base_sha256"):
        entry["arguments"]["model"]["path"] = str(_base_of(folder, entry["arguments"]["model"]))
    return Saved(
        folder,
        entry["stage"],
        _use(entry["use"]),
        entry["arguments"],
        read_part(folder, part),
        folder / "tokenizer",
        config["tokenizer_sha256"],
        tuple(entry.get("absent", [])),
        _numbers(entry.get("figures")),
    )


def _base_of(folder: Path, model: dict[str, Any]) -> Path:
    """The base of a model folder's adapter: linked there; that of `smollm2` is made unless it is there."""
    from plato2.weights.smollm2_base import WEIGHTS_SHA256, ready_base

    linked, is_known = folder / BASE, model["base_sha256"] == WEIGHTS_SHA256
    return ready_base() if model["path"] == SMOLLM2 or (is_known and not linked.exists()) else linked


def _fits(stage: str, use: dict[str, Any], accept: Collection[str] | None, role: Role | None) -> bool:
    """Whether a model of that stage and use is one of those that are sought."""
    return (accept is None or stage in accept) and (role is None or _use(use).serves(role))


def _use(stored: dict[str, Any]) -> Use:
    return Use(**(stored | {"training_only": tuple(stored.get("training_only", ()))}))


def _wanted(accept: Collection[str] | None, role: Role | None) -> str:
    """The accepted stages; for a role, those of plato2 that have it, the latest of the curriculum first."""
    if accept is None:
        from plato2.stages import known_stages  # imports Lightning: only for the message

        own = {name: s for name, s in known_stages().items() if s.__module__.startswith("plato2.")}
        fitting = [name for name, stage in own.items() if role is None or stage.use.serves(role)]
        accept = sorted(fitting, key=lambda name: (name[0].isdigit(), name), reverse=True)
    return " or ".join(accept)


def _numbers(figures: Any) -> dict[str, float]:
    """The numbers in a record; anything else is ignored because nothing depends on it."""
    if not isinstance(figures, dict):
        return {}
    return {str(name): value for name, value in figures.items() if isinstance(value, float)}


def has_evaluation(path: str | Path) -> bool:
    """Whether `path` is a model folder with an evaluation model of its own."""
    folder = model_path(path)
    return is_model_folder(folder) and "evaluation" in read_config(folder)


def has_recognition(path: str | Path) -> bool:
    """Whether the generation model at `path` has all that p(z|c,r) needs, as every run of ours has.

    Without it a loaded stage has initial values there, and its posterior would mean nothing.
    """
    folder = model_path(path)
    absent = read_config(folder)["generation"].get("absent", []) if is_model_folder(folder) else []
    return not any(name.startswith("recognition.") for name in absent)


def load_stage(
    path: str | Path, accept: Collection[str] | None = None, option: str = "", role: Role | None = None
) -> Stage:
    """The stage at `path`, in evaluation mode, float32, on the CPU.

    Parameters the folder lacks get their initial values (see `Saved.absent`).

    Raises:
        UserError: as `read_saved`, or weights that do not fit.
    """
    from torchmetrics import Metric

    from plato2.stages import stage_class

    saved = read_saved(path, accept, option, role)
    try:
        with torch.device("meta"):  # no time for initial weights that are replaced at once
            stage = stage_class(saved.stage)(**saved.arguments)
    except TypeError as error:
        raise UserError(
            f"{saved.file}: written by another version of plato2 ({error}); train it again or "
            "install that version"
        ) from None
    _fill(stage, saved)
    for module in stage.modules():
        if isinstance(module, Metric):  # sums over a validation, not in the checkpoint: they start from zero
            module._apply(lambda state: torch.zeros_like(state, device="cpu"))
    return stage.eval()


def load_generation(
    path: str | Path, option: str = "", with_recognition: bool = False, beside: Network | None = None
) -> GenerationNetwork:
    """The generation model at `path`, in evaluation mode, float32, on the CPU.

    Args:
        path: where it is.
        option: see `read_saved`.
        with_recognition: with the head that estimates p(z|c,r), where the model has latents.
        beside: a loaded network, whose base in memory it shares where both are adapters of the same one.

    Raises:
        UserError: as `load_stage`.
    """
    saved = read_saved(path, option=option, role="generation")
    with torch.device("meta"):
        network = GenerationNetwork(
            saved.model_config,
            saved.use.has_latents,
            saved.use.coherence_head,
            saved.figures,
            _on_the_base_of(beside, saved),
        )
        if with_recognition and saved.use.has_latents:
            head = saved.arguments.get("recognition_head", "tied")
            bias = saved.arguments.get("recognition_bias", "learned")
            network.recognition = Recognition(saved.model_config, head, bias)
    _fill(network, saved, only_shared=True)
    return network.eval()


def load_backward(path: str | Path, option: str = "", beside: Network | None = None) -> GenerationNetwork:
    """The model of stage `backward` at `path`, in evaluation mode, float32, on the CPU.

    `beside`: see `load_generation`.

    Raises:
        UserError: as `load_stage`.
    """
    saved = read_saved(path, option=option, role="backward")
    with torch.device("meta"):
        backbone = _on_the_base_of(beside, saved)
        network = GenerationNetwork(saved.model_config, has_latents=False, backbone=backbone)
    _fill(network, saved, only_shared=True)
    return network.eval()


def load_evaluation(path: str | Path, option: str = "", beside: Network | None = None) -> EvaluationNetwork:
    """The evaluation model at `path`, in evaluation mode, float32, on the CPU.

    `beside`: see `load_generation`.

    Raises:
        UserError: as `load_stage`.
    """
    saved = read_saved(path, option=option, role="evaluation")
    with torch.device("meta"):
        head = saved.use.coherence_head or saved.arguments.get("head", "first")
        backbone = _on_the_base_of(beside, saved)
        network = EvaluationNetwork(saved.model_config, head, saved.figures, backbone)
    _fill(network, saved, only_shared=True)
    return network.eval()


def _on_the_base_of(beside: Network | None, saved: Saved) -> PretrainedBackbone | None:
    """A backbone of another adapter on the base of a loaded network, if both have the same base."""
    if beside is None or not isinstance(beside.backbone, PretrainedBackbone):
        return None
    own, theirs = saved.model_config, beside.model_config
    both = own.has_adapter and theirs.has_adapter
    if not both or (own.architecture, own.base_sha256) != (theirs.architecture, theirs.base_sha256):
        return None
    n_before = len({name.split(".")[-2] for name, _ in beside.named_parameters() if ".lora_A." in name})
    return PretrainedBackbone(own, beside.backbone, f"adapter_{n_before}")


def _fill(module: nn.Module, saved: Saved, only_shared: bool = False) -> None:
    """Fills a module on the meta device with stored weights, and with initial values where there are none.

    Empties `saved.weights` on the way, so that a model is in memory once. `only_shared` leaves out heads that
    only training needs.
    """
    backbone = module.get_submodule("backbone")
    shares = isinstance(backbone, PretrainedBackbone) and backbone.adapter != ADAPTER
    if shares:
        for key in [key for key in saved.weights if ".lora_" in key]:
            saved.weights[key.replace(f".{ADAPTER}.", f".{backbone.adapter}.")] = saved.weights.pop(key)
    _check_shapes(module, saved, only_shared)
    if saved.model_config.has_adapter:
        check_base(saved.model_config, saved.file)
        if not shares:
            fill_base(backbone, saved.model_config)
    known, weights = module.state_dict().keys(), {}
    for key in list(saved.weights):
        tensor = saved.weights.pop(key)
        if key in known:
            weights[key] = tensor.float().clone()  # not the bytes of a file that may change
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(saved.arguments.get("seed", 0))
        for name, parameter in module.named_parameters():
            if name in saved.absent and name not in weights:
                weights[name] = torch.empty(parameter.shape)
                initialize_parameter(name, weights[name])
    module.load_state_dict(weights, assign=True)


def _check_shapes(module: nn.Module, saved: Saved, only_shared: bool) -> None:
    """Checks all shapes before memory is allocated for any weight.

    Raises:
        UserError: one has another shape than its own configuration says, or is missing or unknown.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in saved.weights.items()}
    may_lack = saved.use.training_only
    problem = ""
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            problem = f"{key} is {list(found[key])}, not {list(shape)}"
        elif key not in found and not (key in saved.absent and key.startswith(may_lack)):
            problem = f"{key} is missing"
        if problem:
            break
    if not problem and not only_shared and (foreign := found.keys() - expected.keys()):
        problem = f"{min(foreign)} is unknown"
    if problem:
        raise UserError(_unfit(saved.file, problem))


def _unfit(file: Path, problem: str) -> str:
    return (
        f"{file}: the weights do not fit its model configuration ({problem}); the file is damaged or was "
        "edited: take another one"
    )


def saved_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a model was trained with.

    Raises:
        UserError: no tokenizer there, or not the one the model was trained with.
    """
    folder = model_path(path)
    if is_model_folder(folder):
        where, trained_with, what = (
            folder / "tokenizer",
            read_config(folder).get("tokenizer_sha256"),
            folder.name,
        )
    else:
        saved = read_saved(path, in_shares=True)  # its weights are not read
        where, trained_with, what = saved.tokenizer_folder, saved.tokenizer_sha256, saved.file.name
    tokenizer = Tokenizer.load(where)
    if trained_with and trained_with != tokenizer.sha256:
        raise UserError(
            f"{where}: not the tokenizer {what} was trained with (sha256 "
            f"{tokenizer.sha256[:12]}, not {trained_with[:12]}); put the tokenizer of that run there"
        )
    return tokenizer


def checkpoint_file(path: str | Path) -> Path:
    """The file to read for a run folder or a checkpoint path.

    Raises:
        UserError: nothing there (near names are suggested), or a folder without checkpoints.
    """
    path = model_path(path)
    if path.is_file() or (path / "meta.pt").exists():  # Lightning's file in a sharded checkpoint
        return path
    if not path.exists():
        raise UserError(f"{path}: no such run folder, checkpoint or model folder{_near(path)}")
    run = RunFolder(path.parent if path.name == "checkpoints" else path)
    if run.best.exists():
        return run.best_found()
    if any((path / name).is_dir() for name in ("Plato", "NSP")):
        raise UserError(
            f"{path}: Knover's files; run plato2 import knover {path} --out FOLDER, and give that"
        )
    inside = [RunFolder(folder.parent) for folder in path.glob("*/checkpoints")]
    newest = max(inside, key=lambda run: run.checkpoints.stat().st_mtime, default=None)
    cure = f"did you mean {newest.path}?" if newest else "give the folder of a run that has saved one"
    raise UserError(f"{path}: there is no checkpoint in it; {cure}")


def _near(path: Path) -> str:
    """`; did you mean ...?`: names like the first missing part of `path`, and of models that come along."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = {entry.name for entry in missing.parent.iterdir()}
    if path == Path(path.name):
        names |= {SMALL, SMOLLM2}
    close = get_close_matches(missing.name, names, n=3, cutoff=0.5)
    if not close:
        return f"; {missing.parent} has nothing of that name"
    return f"; did you mean {' or '.join(str(missing.parent / name) for name in close)}?"
