"""A model folder: trained weights without a run, to keep, to give away, to talk to and to fine-tune from.

    DIR/
        config.json             which stages are in it, and the arguments of their constructors
        model.safetensors       `generation.<parameter>`, `evaluation.<parameter>`; above 5 GB several files
        *.sha256                the hash of each of these files, checked when it is read
        tokenizer/              spm.model, vocab.txt, text.json
        README.md               the model card

One folder holds a generation model, an evaluation model, or both. Nothing in it can execute anything.

Adapters of a pretrained decoder (`plato2 export adapter`) have their matrices in files of peft's, and the
decoder somewhere else:

        generation/             adapter_config.json and adapter_model.safetensors; the same in evaluation/
        base                    a link to the decoder's folder
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plato2.bounded import read_file
from plato2.config import SMALL, SMOLLM2, Role, Use, UserError
from plato2.data.tokenizer import Tokenizer
from plato2.files import check_sha256, locked, write_sha256
from plato2.formats import JSON_BYTES, Closed, Open, Sha256, StageArguments, parse
from plato2.weights.names import refuse_apart

FORMAT = "plato2"
ADAPTER_FILE, BASE = "adapter_model.safetensors", "base"
OF_PEFT = re.compile(r"base_model\.model\.[a-z_]+\.(.+\.lora_[AB])\.weight")
"""peft's name of a matrix of an adapter."""
PARTS: tuple[Role, ...] = ("generation", "evaluation")
SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CURE = "get the folder again from its source"
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class StoredPart(Closed):
    """A part in config.json."""

    stage: str
    use: Use
    arguments: StageArguments
    absent: list[str] = Field(default_factory=list)
    figures: Any = None


class ModelFolderConfig(Open):
    """config.json; transformers adds keys of its own."""

    format: str
    tokenizer_sha256: Sha256
    generation: StoredPart | None = None
    evaluation: StoredPart | None = None


class WeightIndex(Open):
    """model.safetensors.index.json, as Hugging Face writes it."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Lazy:
    """A parameter that is read and converted when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """float32, float16 or bfloat16."""
    read: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The values."""
        return self.read().to(self.dtype).contiguous()


@dataclass(frozen=True)
class Adapter:
    """The matrices of an adapter, as peft keeps them."""

    config: dict[str, Any]
    """adapter_config.json."""
    parameters: dict[str, Lazy]
    """By peft's names."""


@dataclass(frozen=True)
class Part:
    """One model of a folder."""

    stage: str
    use: Use
    arguments: dict[str, Any]
    """Primitives for the stage's constructor: `model`, `optim`, `seed` and its own."""
    parameters: dict[str, Lazy]
    """By the names of the stage's state dict."""
    absent: tuple[str, ...] = ()
    """Parameters of the stage that the source did not have; only training needs them."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What its last validation measured beside its losses."""


def refuse_existing(out: Path) -> None:
    """Refuses to write to a folder that has something in it.

    Raises:
        UserError: it has.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already exists and is not empty; choose another folder or remove it")


def existing_parent(out: Path) -> Path:
    """The nearest folder above `out`, or what it links to, that is there."""
    return next(folder for folder in Path(os.path.realpath(out)).parents if folder.is_dir())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end; after a failure nothing is left.

    Raises:
        UserError: there is something at `out`, another process writes it, or it cannot be written.
    """
    refuse_existing(out)
    target = Path(os.path.realpath(out))  # a link is followed to its disk
    new = existing_parent(out) / f".{target.name}.new"
    try:
        with locked(new.with_suffix(".lock"), f"--out {out}"):
            try:
                shutil.rmtree(new, ignore_errors=True)  # what a killed process left
                new.mkdir()
                yield new
                refuse_existing(out)
                if target.exists():
                    target.rmdir()  # empty
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new, target)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out {out}: could not be written ({error})") from None


def write_model_folder(
    out: Path,
    parts: dict[str, Part],
    tokenizer: Tokenizer,
    card: str,
    extra_config: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    files: dict[str, str] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    base: Path | None = None,
) -> None:
    """Writes a model folder, whole or not at all.

    Parameters are read one after the other: memory holds one at a time.

    Args:
        out: the folder; it must not exist, or be empty.
        parts: `generation` and/or `evaluation`.
        tokenizer: of both.
        card: text of README.md.
        extra_config: further entries of config.json.
        shard_bytes: weights above this go into several files.
        files: further text files, name -> content.
        adapters: of parts that are adapters of a pretrained decoder.
        base: the decoder's folder.

    Raises:
        UserError: there is something at `out`, or it cannot be written.
    """
    config: dict[str, Any] = {"format": FORMAT, "tokenizer_sha256": tokenizer.sha256}
    for name, part in parts.items():
        config[name] = {"stage": part.stage, "use": asdict(part.use), "arguments": part.arguments}
        config[name] |= {"absent": list(part.absent)}
        config[name] |= {"figures": dict(part.figures)} if part.figures else {}
    with new_folder(out) as new:
        _write_json(new / "config.json", config | (extra_config or {}))
        _write_weights(new, _prefixed(parts), shard_bytes)
        for name, adapter in (adapters or {}).items():
            (new / name).mkdir()
            _write_json(new / name / "adapter_config.json", adapter.config)
            save_tensors(new / name / ADAPTER_FILE, adapter.parameters)
            write_sha256(new / name / ADAPTER_FILE)
        for file in sorted(new.iterdir()):
            if file.is_file():
                write_sha256(file)
        if base is not None:
            with suppress(OSError):  # no links on this file system
                (new / BASE).symlink_to(base.absolute(), target_is_directory=True)
        tokenizer.save(new / "tokenizer")
        for name, text in ({"README.md": card} | (files or {})).items():
            (new / name).write_text(text, encoding="utf-8")


def model_path(named: str | Path) -> Path:
    """Where a model is that was named: `small` and `smollm2` are in this package, unless one is here, too.

    Raises:
        UserError: the package has none of that name.
    """
    path = Path(named).expanduser()
    if str(path) not in (SMALL, SMOLLM2) or path.exists():
        return path
    folder = Path(__file__).parent / path
    if not is_model_folder(folder):
        raise UserError(
            f"{path}: its adapters do not come with this version of plato2; experiments/pretrained/run.sh "
            f"trains them, and {SMALL} is a model that does come with it"
        )
    return folder


def is_model_folder(path: Path) -> bool:
    """Whether there is a model folder at `path`."""
    return (path / "config.json").is_file() and any(path.glob("model*.safetensors*"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: damaged, or of something else.
    """
    file = path / "config.json"
    data = read_file(file, JSON_BYTES, CURE)
    check_sha256(file, f"{CURE}, or remove {file.name}.sha256 if you edited it on purpose")
    found = parse(ModelFolderConfig, data, str(file), CURE)
    if found.format != FORMAT or not (found.generation or found.evaluation):
        raise UserError(f"{path}: not a model folder of plato2 (config.json says otherwise)")
    config: dict[str, Any] = json.loads(data)
    return {key: value for key, value in config.items() if value is not None}


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The parameters of a part, in their stored precision.

    Raises:
        UserError: a weights file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= {key.removeprefix(f"{part}."): tensor for key, tensor in _read(file, f"{part}.").items()}
    adapter = path / part / ADAPTER_FILE
    if adapter.parent.is_dir():
        if not adapter.is_file():
            raise UserError(f"{adapter}: missing; {CURE}")
        tensors |= {
            OF_PEFT.sub(r"backbone.decoder.\1.default.weight", key): tensor
            for key, tensor in _read(adapter, "").items()
        }
    refuse_apart(path, tensors)
    return tensors


def _read(file: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin so.

    Raises:
        UserError: it is damaged.
    """
    check_sha256(file, CURE)
    try:
        with safe_open(file, framework="pt") as opened:
            names = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable ({error}); {CURE}") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UserError: there is none, or one of several is missing.
    """
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        check_sha256(index, CURE)
        data = read_file(index, JSON_BYTES, CURE)
        names = set(parse(WeightIndex, data, str(index), CURE).weight_map.values())
    files = [path / Path(name).name for name in sorted(names)]  # never outside of the folder
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; {CURE}")
    return files


def _prefixed(parts: dict[str, Part]) -> dict[str, Lazy]:
    return {f"{name}.{key}": lazy for name, part in parts.items() for key, lazy in part.parameters.items()}


def _write_weights(folder: Path, parameters: dict[str, Lazy], shard_bytes: int) -> None:
    """One file, or as Hugging Face does `model-00001-of-00003.safetensors` and an index."""
    shards = list(_shards(parameters, shard_bytes))
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    for name, keys in zip(names, shards, strict=True):
        save_tensors(folder / name, {key: parameters[key] for key in keys})
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        total = sum(lazy.n_bytes for lazy in parameters.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def save_tensors(file: Path, parameters: dict[str, Lazy]) -> None:
    """Writes a safetensors file: the same bytes for the same values, in memory one at a time.

    The writer of safetensors needs all of them at once.
    """
    ordered = dict(sorted(parameters.items(), key=lambda item: -item[1].dtype.itemsize))  # values lie aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, lazy in ordered.items():
        begin, end = end, end + lazy.n_bytes
        header[key] = {
            "dtype": _SAFETENSORS_DTYPES[lazy.dtype],
            "shape": lazy.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for lazy in ordered.values():
            opened.write(lazy.tensor().flatten().view(torch.uint8).numpy().data)


def _shards(parameters: dict[str, Lazy], shard_bytes: int) -> Iterator[list[str]]:
    """Keys file by file, each file at most `shard_bytes` (or one parameter)."""
    keys: list[str] = []
    size = 0
    for key, lazy in parameters.items():
        if keys and size + lazy.n_bytes > shard_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += lazy.n_bytes
    yield keys


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
