"""Knover's released models in and out: `plato2 import knover`, `plato2 export knover`.

A release is a folder or tar with `Plato` (generation) and/or `NSP` (evaluation), one binary file per
parameter, or PaddleNLP's `.pdparams` with both. The geometry follows from the shapes, except for the number
of attention heads. Everything is checked before anything is written.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from plato2 import __version__
from plato2.bounded import read_file
from plato2.config import ModelConfig, OptimConfig, Use, UserError
from plato2.data.tokenizer import Tokenizer
from plato2.weights.model_folder import (
    DTYPES,
    Lazy,
    Part,
    existing_parent,
    new_folder,
    refuse_existing,
    write_model_folder,
)
from plato2.weights.names import (
    is_transposed,
    knover_names,
    n_layers,
    paddlenlp_names,
    released_apart,
    released_shapes,
)
from plato2.weights.paddle import open_parameter, read_pdparams, write_parameter

if TYPE_CHECKING:
    from plato2.stages import Stage

FOLDERS = {"generation": "Plato", "evaluation": "NSP"}
"""What Knover calls the folder of each part."""
STANDARD_HEAD = 64
"""Width of an attention head of every published model: tells the number of heads where nothing else does."""
_OPTIMIZER = ("_moment1_0", "_moment2_0", "_beta1_pow_acc_0", "_beta2_pow_acc_0")
_CURE = "download it again"
UNPACKED_SHARE = 20
"""A tar unpacks to at most this many times its own size; weights hardly shrink when they are compressed."""
_SMALL = 1 << 26
"""Bytes that a tar may unpack to in any case."""
_MAX_MEMBERS = 100_000
_MAX_READ = 1 << 24
_NOT_WEIGHTS = {"learning_rate_0", "__lr_scheduler__", "__model__", "@LR_DECAY_COUNTER@"}
_NOT_WEIGHTS_STARTS = ("loss_scaling", "num_good_steps", "num_bad_steps", "num_steps", ".")


@dataclass(frozen=True)
class Source:
    """The parameters of one part, under the names of whoever wrote them."""

    path: Path
    part: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]
    """Name -> values; of a pickle it can be called once for each name."""
    names: Callable[[int], dict[str, str]]
    """Number of layers -> (our name -> theirs)."""


@dataclass(frozen=True)
class Imported:
    """What `import_knover` found and wrote."""

    out: Path
    models: dict[str, ModelConfig]
    stages: dict[str, str]
    """Name of each part's stage."""
    uses: dict[str, Use]
    absent: dict[str, tuple[str, ...]]
    left_alone: list[str]
    heads_from: str
    tokenizer_from: str
    sha256: str


def import_knover(
    path: Path,
    out: Path,
    tokenizer: Path | None = None,
    n_head: int | None = None,
    dtype: str | None = None,
    lower_case: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Imported:
    """Writes a model folder from Knover's or PaddleNLP's files.

    Args:
        path: a folder with `Plato` and/or `NSP`, one of the two, a tar of it, or a `.pdparams` file.
        out: the model folder to write.
        tokenizer: a folder with spm.model and vocab.txt; by default one found beside the weights, else
            Knover's English one, which every released English model uses.
        n_head: attention heads; by default those of a Knover configuration (`*.json` with
            num_attention_heads) beside the weights, else hidden size / 64.
        dtype: float32, float16 or bfloat16 to convert to; None keeps what is there.
        lower_case: whether the model was trained on lower-cased text (Knover's 32L configurations say so).
        say: called with progress messages.

    Raises:
        UserError: whatever is wrong with the files; nothing has been written then.
    """
    refuse_existing(out)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    with _unpacked(path, out, say) as place:
        sources, left_alone = find_sources(place)
        folders = list(_beside(path, place, sources[0].path))
        models, heads_from = {}, ""
        for source in sources:
            models[source.part], heads_from = _geometry(source, n_head, folders)
        _check_pair(path, models)
        parts = {source.part: _part(source, models[source.part], dtype) for source in sources}
        vocabulary, tokenizer_from = _find_tokenizer(path, folders, tokenizer, models, lower_case)
        say("hashing the source")
        sha256 = source_sha256(path)
        imported = Imported(
            out,
            models,
            {name: part.stage for name, part in parts.items()},
            {name: part.use for name, part in parts.items()},
            {name: part.absent for name, part in parts.items()},
            left_alone,
            heads_from,
            tokenizer_from,
            sha256,
        )
        say(f"writing {out}")
        write_model_folder(out, parts, vocabulary, _card(path, imported, dtype), {"source_sha256": sha256})
    return imported


def find_sources(place: Path) -> tuple[list[Source], list[str]]:
    """The parts in a folder or `.pdparams` file, and the names of files that are not weights.

    Raises:
        UserError: no weights there, or a file that is damaged.
    """
    if place.is_file():
        return _pdparams_sources(place)
    folders = [folder for folder in (place / "Plato", place / "NSP") if folder.is_dir()]
    if not folders and (place / "word_embedding").is_file():
        folders = [place]
    if not folders:
        inside = sorted(child for child in place.iterdir() if child.is_dir()) if place.is_dir() else []
        nested = [child for child in inside if (child / "Plato").is_dir() or (child / "NSP").is_dir()]
        if len(nested) == 1:
            return find_sources(nested[0])
        if nested:
            raise UserError(
                f"{place}: several models ({', '.join(c.name for c in nested)}); give one of them"
            )
        raise UserError(
            f"{place}: no Plato or NSP folder in it and no word_embedding file: not a model of Knover"
        )
    found = [_folder_source(folder) for folder in folders]
    if len({source.part for source, _ in found}) < len(found):
        raise UserError(f"{place}: Plato and NSP hold the same kind of model; give the one you want")
    return [source for source, _ in found], sorted({name for _, names in found for name in names})


def export_knover(
    out: Path, parts: dict[str, dict[str, np.ndarray]], dtype: str | None = None
) -> dict[str, int]:
    """Writes `OUT/Plato` and `OUT/NSP` as Knover reads them.

    Args:
        out: the folder; it must not exist, or be empty.
        parts: `generation` and/or `evaluation` -> arrays by our names.
        dtype: float16 or float32; norms stay float32, as Knover's own converter leaves them.

    Returns:
        Parameters written, by folder.

    Raises:
        UserError: there is something at `out`, or a parameter Knover has no name for.
    """
    with new_folder(out) as new:
        for part, arrays in parts.items():
            (new / FOLDERS[part]).mkdir()
            n_layer = 1 + max(
                int(name.split(".")[2]) for name in arrays if name.startswith("backbone.blocks.")
            )
            names = knover_names(n_layer)
            for ours, array in _apart(arrays):
                if ours not in names:
                    raise UserError(
                        f"the {part} model has {ours}, which Knover does not: it has only the heads of "
                        "stage.head=first, stage.recognition_head=tied and stage.bow_head=tied; use "
                        "plato2 export hf"
                    )
                array = array.T if is_transposed(ours) else array
                if dtype:
                    array = array.astype("float32" if "norm." in ours else dtype)
                write_parameter(new / FOLDERS[part] / names[ours], array)
    return {FOLDERS[part]: sum(1 for _ in _apart(arrays)) for part, arrays in parts.items()}


def _apart(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters in the layout of released models."""
    for ours, array in arrays.items():
        names = released_apart(ours)
        yield from zip(names, np.split(array, len(names)) if len(names) > 1 else [array], strict=True)


# ---------------------------------------------------------------------------------------------- reading


def _folder_source(folder: Path) -> tuple[Source, list[str]]:
    """One folder of parameter files; also the names of files in it that are not weights."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    layers = n_layers(set(files))
    known = set(knover_names(layers).values())
    left_alone = []
    for name in files.keys() - known:
        is_state = name.endswith(_OPTIMIZER) or name.startswith(_NOT_WEIGHTS_STARTS) or name in _NOT_WEIGHTS
        if not is_state:
            left_alone.append(f"{folder.name}/{name}")
    parameters = {name: open_parameter(file) for name, file in files.items() if name in known}
    part = "evaluation" if "next_sent_fc.w_0" in parameters or "pooled_fc.w_0" in parameters else "generation"
    return (
        Source(
            folder,
            part,
            {name: parameter.shape for name, parameter in parameters.items()},
            {name: parameter.dtype.name for name, parameter in parameters.items()},
            lambda name: parameters[name].read(),
            knover_names,
        ),
        left_alone,
    )


def _pdparams_sources(path: Path) -> tuple[list[Source], list[str]]:
    """The generation and the evaluation model in PaddleNLP's dict, and the names that belong to neither."""
    arrays = read_pdparams(path)
    sources = []
    left_alone = set(arrays)
    for part, marker in (("generation", "plato2_encoder."), ("evaluation", "nsp_predictor.")):
        mine = {
            name
            for name in arrays
            if name.startswith(marker)
            or (part == "generation" and name.startswith(("latent_weight", "logits_")))
        }
        if not mine:
            continue
        left_alone -= set(paddlenlp_names(n_layers(mine), part).values())
        sources.append(
            Source(
                path,
                part,
                {name: arrays[name].shape for name in mine},
                {name: arrays[name].dtype.name for name in mine},
                arrays.pop,
                lambda layers, part=part: paddlenlp_names(layers, part),  # type: ignore[misc]
            )
        )
    if not sources:
        first = ", ".join(sorted(arrays)[:3]) or "nothing"
        raise UserError(f"{path}: no PLATO-2 of PaddleNLP in it (it has {first} ...)")
    return sources, sorted(left_alone)


def _part(source: Source, config: ModelConfig, dtype: str | None) -> Part:
    """The parameters of a model, with every shape checked.

    Raises:
        UserError: a parameter is missing, or has a shape that does not fit the others.
    """
    names = source.names(config.n_layer)
    shapes = {ours: source.shapes[theirs] for ours, theirs in names.items() if theirs in source.shapes}
    from plato2.stages import (  # Lightning is slow to import
        CoarseGeneration,
        CoherenceEstimation,
        FineGeneration,
    )

    stage: type[Stage] = CoherenceEstimation
    if source.part == "generation":
        stage = FineGeneration if "recognition.latent_embedding" in shapes else CoarseGeneration
    with torch.device("meta"):
        whole = {name: tuple(tensor.shape) for name, tensor in stage(config).state_dict().items()}
    expected = released_shapes(whole)
    for ours in sorted(expected.keys() & shapes.keys()):
        wanted = expected[ours][::-1] if is_transposed(ours) else expected[ours]
        if shapes[ours] != wanted:
            raise UserError(
                f"{source.path}: {names[ours]} is {list(shapes[ours])}; with {config.n_layer} layers of "
                f"{config.hidden_size}, as the word table and the blocks say, it would be {list(wanted)}"
            )
    absent = sorted(expected.keys() - shapes.keys())
    lost = [name for name in absent if not name.startswith(stage.use.training_only)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{source.path}: {names.get(lost[0], lost[0])}{more} missing; download it again")
    if foreign := sorted(shapes.keys() - expected.keys()):
        raise UserError(f"{source.path}: {names[foreign[0]]} does not belong to a {stage.name} model")
    parameters = {}
    for ours, shape in whole.items():
        if (parts := released_apart(ours))[0] in shapes:
            theirs = [names[part] for part in parts]
            parameters[ours] = Lazy(
                shape,
                DTYPES.get(dtype or source.dtypes[theirs[0]], torch.float32),  # float64 becomes float32
                partial(_read, source, theirs, is_transposed(parts[0])),
            )
    optim = asdict(OptimConfig()) | {"betas": list(OptimConfig().betas)}
    arguments = {"model": asdict(config), "optim": optim, "seed": 11}
    return Part(stage.name, stage.use, arguments, parameters, tuple(absent))


def _read(source: Source, names: list[str], turn: bool) -> Tensor:
    """A copy of the values, stacked, with Paddle's matrices transposed for PyTorch."""
    arrays = [source.read(name) for name in names]
    parts = [torch.from_numpy(np.array(array.T if turn else array, order="C")) for array in arrays]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _geometry(source: Source, n_head: int | None, folders: list[Path]) -> tuple[ModelConfig, str]:
    """The geometry by the shapes, the number of heads, and where that number is from.

    Raises:
        UserError: a table is missing or invalid, or nothing gives the number of heads.
    """
    n_layer = n_layers(set(source.shapes))
    names = source.names(n_layer)

    def shape(ours: str) -> tuple[int, ...]:
        found = source.shapes.get(names[ours])
        if found is None:
            raise UserError(f"{source.path}: {names[ours]} is missing; download it again")
        if len(found) != 2 or 0 in found:
            raise UserError(f"{source.path}: {names[ours]} is {list(found)}: fits no model of PLATO-2")
        return found

    def size(ours: str, axis: int, otherwise: int) -> int:
        return shape(ours)[axis] if names.get(ours) in source.shapes else otherwise

    if not n_layer:
        raise UserError(f"{source.path}: no blocks in it (encoder_layer_0_...); download it again")
    vocab_size, hidden_size = shape("backbone.word.weight")
    heads_from = "--n-head"
    if n_head is None:
        n_head, heads_from = _find_heads(folders, hidden_size, n_layer)
    if n_head is None:
        if hidden_size % STANDARD_HEAD:
            raise UserError(
                f"{source.path}: the shapes do not tell the number of attention heads, and hidden size "
                f"{hidden_size} is not a multiple of {STANDARD_HEAD}; give --n-head, or put Knover's "
                "configuration (a .json with num_attention_heads) beside it"
            )
        n_head, heads_from = hidden_size // STANDARD_HEAD, f"hidden_size / {STANDARD_HEAD}"
    if n_head < 1 or hidden_size % n_head:
        raise UserError(
            f"{source.path}: {n_head} attention heads ({heads_from}) cannot share hidden size {hidden_size}; "
            "give --n-head"
        )
    config = ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_position=shape("backbone.position.weight")[0],
        n_type=shape("backbone.token_type.weight")[0],
        n_role=size("backbone.role.weight", 0, 0),
        n_latent=size("recognition.latent_embedding", 1, ModelConfig.n_latent),
    )
    return config, heads_from


def _check_pair(path: Path, models: dict[str, ModelConfig]) -> None:
    """Checks that the generation and evaluation models in a folder have the same geometry.

    Raises:
        UserError: they have two.
    """
    if len(models) < 2:
        return
    one, other = models["generation"], models["evaluation"]
    for key in ("n_layer", "n_head", "hidden_size", "vocab_size", "max_position", "n_type", "n_role"):
        if getattr(one, key) != getattr(other, key):
            raise UserError(
                f"{path}: two geometries: {key}={getattr(one, key)} in the generation model and "
                f"{getattr(other, key)} in the evaluation model; import Plato and NSP one by one"
            )


# ------------------------------------------------------------------------------------- what lies beside it


def _beside(path: Path, place: Path, weights: Path) -> Iterator[Path]:
    """Folders that may hold configuration and tokenizer: from that of the weights up to two above `path`."""
    folder = weights if weights.is_dir() else weights.parent
    top = place if place.is_dir() else place.parent
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder
    if place != path:  # an archive: what is beside it
        yield path.parent
        top = path.parent
    yield from list(Path(os.path.abspath(top)).parents)[:2]


def _find_heads(folders: list[Path], hidden_size: int, n_layer: int) -> tuple[int | None, str]:
    """The number of attention heads in a Knover configuration of this geometry, and the name of its file."""
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            try:
                config = json.loads(read_file(file, 1 << 20, ""))
                heads = config["num_attention_heads"]
                of = config.get("hidden_size", hidden_size), config.get("num_hidden_layers", n_layer)
            except (UserError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
                continue
            if type(heads) is int and of == (hidden_size, n_layer):
                return heads, file.name
    return None, ""


def _find_tokenizer(
    path: Path,
    folders: list[Path],
    given: Path | None,
    models: dict[str, ModelConfig],
    lower_case: bool | None,
) -> tuple[Tokenizer, str]:
    """The tokenizer, and a name for where it came from."""
    beside = (f for f in folders if (f / "spm.model").is_file() and (f / "vocab.txt").is_file())
    if folder := given or next(beside, None):
        found = Tokenizer.load(folder)
        name, where = Path(os.path.abspath(folder)).name, f"the tokenizer in {folder}"
    else:
        with resources.as_file(resources.files("plato2.weights") / "knover_english") as folder:
            found = Tokenizer.load(folder)
        name = where = "Knover's English tokenizer, which comes with plato2"
    vocab_size = next(iter(models.values())).vocab_size
    if found.vocab_size != vocab_size:
        raise UserError(
            f"{path}: a model of {vocab_size} tokens; {where} has {found.vocab_size}; give the folder "
            "with its spm.model and vocab.txt as --tokenizer"
        )
    return found if lower_case is None else found.with_lower_case(lower_case), name


# ------------------------------------------------------------------------------------------------ archives


@contextmanager
def _unpacked(path: Path, out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder to read: `path` itself, or the contents of a tar, unpacked temporarily near `out`.

    Raises:
        UserError: no tar or `.pdparams`, or one with members that do not belong there.
    """
    if path.is_dir() or (path.suffix == ".pdparams" and path.is_file()):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=existing_parent(out), prefix=f".{out.name}.") as folder:
        _unpack(path, Path(folder), say)
        yield Path(folder)


def _unpack(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    try:
        with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            say(f"checking {path}")
            members = []
            for member in archive:
                _check_member(path, member)
                members.append(member)
                if len(members) > _MAX_MEMBERS:
                    raise UserError(f"{path}: more than {_MAX_MEMBERS:,} files in it: not a model of Knover")
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
            while stream.read(1 << 20):
                pass  # a compressed file has its checksum at the end
            say(f"unpacking {path}")
            archive.extractall(folder, members, filter="data")
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        OverflowError,
        zlib.error,
        lzma.LZMAError,
        ValueError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be unpacked in {folder.parent} ({error.strerror})") from None
        raise UserError(f"{path}: not a complete tar ({error}); {_CURE}") from None


class _Bounded(io.BufferedIOBase):
    """A stream with a bound on what it unpacks, read piece by piece: tarfile trusts the sizes it is told."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path
        self._most = UNPACKED_SHARE * path.stat().st_size + _SMALL

    def read(self, size: int | None = -1) -> bytes:
        """Reads like any stream, but a piece at a time.

        Raises:
            UserError: more than such a file can hold was asked for, or unpacked.
        """
        if size is None or not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError("a name in it has no end")
        data = self._stream.read(size)
        if self._stream.tell() > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {UNPACKED_SHARE} times its size, which weights do not: "
                "refused, nothing was unpacked"
            )
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seeks by reading, so that skipped bytes count."""
        if whence or offset < self._stream.tell():
            return self._stream.seek(offset, whence)
        while (left := offset - self._stream.tell()) > 0 and self.read(min(left, 1 << 20)):
            pass
        return self._stream.tell()

    def tell(self) -> int:
        """The position of the next byte."""
        return self._stream.tell()

    def close(self) -> None:
        """Closes the underlying stream too."""
        self._stream.close()
        super().close()

    def seekable(self) -> bool:
        """Always true."""
        return True


def _decompressed(path: Path) -> _Bounded:
    """The bytes of a tar, whatever it is compressed with.

    Raises:
        UserError: not a file.
    """
    if not path.is_file():
        raise UserError(f"{path}: neither a folder, a tar nor a .pdparams file")
    with path.open("rb") as file:
        start = file.read(6)
    openers: dict[bytes, Callable[..., Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\0": lzma.open,
    }
    opener = next((opener for magic, opener in openers.items() if start.startswith(magic)), open)
    stream = _Bounded(opener(path, "rb"), path)
    try:
        tarfile.open(fileobj=stream, mode="r:").close()
    except tarfile.TarError:
        raise UserError(f"{path}: neither a folder, a tar nor a .pdparams file") from None
    stream.seek(0)
    return stream


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    problem = ""
    if name.is_absolute() or member.name.startswith(("/", "\\")):
        problem = "an absolute path"
    elif ".." in name.parts:
        problem = "a path with .."
    elif member.issparse():
        problem = "a file with holes"
    elif not (member.isfile() or member.isdir()):
        problem = "a link" if member.issym() or member.islnk() else "a device"
    if problem:
        raise UserError(f"{path}: {member.name!r} is {problem}: refused, nothing was unpacked")


def source_sha256(path: Path) -> str:
    """Hash of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        return _sha256(path).hex()
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(file.relative_to(path).as_posix().encode() + b"\0" + _sha256(file))
    return total.hexdigest()


def _sha256(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _card(path: Path, imported: Imported, dtype: str | None) -> str:
    """README.md of the model folder."""
    rows = []
    for part, model in imported.models.items():
        shape = f"{model.n_layer} layers, {model.n_head} heads, hidden {model.hidden_size}"
        size = f"vocabulary {model.vocab_size:,}, {model.max_position} positions"
        latents = f", K = {model.n_latent}" if imported.uses[part].has_latents else ""
        rows.append(f"| {part} | `{imported.stages[part]}` | {shape}, {size}{latents} |")
    absent = [name for names in imported.absent.values() for name in names]
    lacking = ", ".join(f"`{name}`" for name in absent) or "nothing"
    of_what = "" if path.is_file() else " of the names and contents of its files"
    return f"""---
license: apache-2.0
tags: [dialogue, plato-2]
---
# PLATO-2 from Knover

| part | stage | size |
| --- | --- | --- |
{chr(10).join(rows)}

- Source: `{Path(os.path.abspath(path)).name}`, sha256 `{imported.sha256}`{of_what}.
- Made by `plato2 import knover` of plato2 {__version__}{f", converted to {dtype}" if dtype else ""}.
- Number of heads from: {imported.heads_from}. Tokenizer from: {imported.tokenizer_from}.
- Parameters that only training needs and that the source lacks: {lacking}.
- Licence: Knover and the models released with it are under Apache-2.0 (https://github.com/PaddlePaddle/Knover);
  if the source is your own, state its licence yourself.

Talk to it with `plato2 chat --generation DIR --evaluation DIR`.
"""
