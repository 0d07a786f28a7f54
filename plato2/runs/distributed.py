"""Checkpoints of which each rank has written its share (torch.distributed.checkpoint, DCP), as folders.

`.metadata` is written when all shares are, and last `meta.pt`, which has all but the tensors of model
and optimizer: a folder that lacks one of them is not whole. Tensors are named `state_dict.NAME` and
`optimizer.PARAMETER.STATE`; where the weights are an average, those that training goes on with are
`current_model_state.NAME`. Nothing in a folder is executed: DCP's own reader unpickles `.metadata`, ours
takes from it only what describes tensors.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from plato2.config import UserError

META, TENSORS = "meta.pt", ".metadata"
WEIGHTS, OPTIMIZER, CURRENT = "state_dict.", "optimizer.", "current_model_state."
DCP = "torch.distributed.checkpoint"
DESCRIBES_TENSORS = {
    (f"{DCP}.metadata", "Metadata"),
    (f"{DCP}.metadata", "TensorStorageMetadata"),
    (f"{DCP}.metadata", "TensorProperties"),
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{DCP}.metadata", "ChunkStorageMetadata"),
    (f"{DCP}.metadata", "MetadataIndex"),
    (f"{DCP}.metadata", "StorageMeta"),
    (f"{DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What a `.metadata` may name, beside dtypes."""


def write(
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
    folder: Path,
    group: torch.distributed.ProcessGroup,
) -> Future[None]:
    """Begins to write the ranks' shares of tensors; all ranks call it. Training may go on at once.

    Args:
        tensors: plain ones, the same on all ranks, or DTensors; they are copied before this returns.
        rest: primitives and further tensors, as `read_meta` returns them; those of the first rank count.
        folder: new, the same on all ranks.
        group: of all ranks, on CPUs, and used for nothing else.

    Returns:
        Done on each rank once all have written; raises `CheckpointException` where one of them could not, and
        OSError on the first one if it cannot write the rest.
    """
    written = io.BytesIO()
    torch.save(dict(rest), written)
    first = torch.distributed.get_rank(group) == 0
    writer = dcp.FileSystemWriter(folder)
    begun = dcp.async_save(dict(tensors), storage_writer=writer, process_group=group)
    assert isinstance(begun, Future)
    return then(begun, lambda: (folder / META).write_bytes(written.getvalue()) if first else None)


def then(done: Future[Any], go_on: Callable[[], object]) -> Future[None]:
    """What is done after something else, in the thread that did that; an error of either is the result's."""
    all_done: Future[None] = Future()

    def after(first: Future[Any]) -> None:
        try:
            first.result()
            go_on()
        except BaseException as error:
            all_done.set_exception(error)
        else:
            all_done.set_result(None)

    done.add_done_callback(after)
    return all_done


def read_into(tensors: Mapping[str, Tensor], folder: Path, together: bool) -> None:
    """Fills tensors with those of the same names: of a DTensor the rank's share alone.

    Args:
        tensors: plain ones or DTensors.
        folder: of a checkpoint, written by any number of ranks.
        together: whether all ranks of this run call it.

    Raises:
        UserError: not a whole checkpoint, or one of other tensors.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is alone
            dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=_Tensors(), no_dist=not together)
    except (Exception, CheckpointException) as error:  # torch raises whatever a broken file leads to
        raise _unreadable(folder, error) from error


def read_meta(folder: Path) -> dict[str, Any]:
    """What is no tensor of the model or the optimizer.

    Raises:
        UserError: not a whole checkpoint.
    """
    if lacking := [name for name in (META, TENSORS) if not (folder / name).exists()]:
        raise UserError(
            f"{folder}: a sharded checkpoint that was not written to its end (no {lacking[0]}); choose "
            "another one"
        )
    try:
        found = torch.load(folder / META, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error
    if not isinstance(found, dict):
        raise UserError(f"{folder}: not a readable checkpoint; choose another one")
    for share, size in _shares(folder).items():
        if not share.is_file() or share.stat().st_size < size:
            raise UserError(
                f"{folder}: a sharded checkpoint whose {share.name} is lost or cut; choose another one"
            )
    return found


def _shares(folder: Path) -> dict[Path, int]:
    """The files that tensors are in, and how many bytes each needs to have at least.

    Raises:
        UserError: `.metadata` says something else.
    """
    needed: dict[Path, int] = {}
    try:
        for tensor in _Reader(folder).read_metadata().storage_data.values():
            share = folder / tensor.relative_path
            if share.parent != folder:
                raise ValueError(f"{tensor.relative_path!r} is not a file of it")
            needed[share] = max(needed.get(share, 0), tensor.offset + tensor.length)
    except (AttributeError, TypeError, ValueError) as error:  # whatever else it describes
        raise _unreadable(folder, error) from error
    return needed


def read_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """`read_into` of a model's weights by their own names; all ranks of this run call it.

    Raises:
        UserError: as `read_into`, on all ranks.
    """
    read_into(named(weights, {}), folder, together=True)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, put together from all shares, by the rest of their names.

    Raises:
        UserError: as `describe_tensors`.
    """
    tensors = {
        f"{prefix}{name}": torch.zeros(it.shape, dtype=it.dtype)
        for name, it in describe_tensors(folder, prefix).items()
    }
    read_into(tensors, folder, together=False)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def describe_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The same on the meta device: their shapes and types, and no memory.

    Raises:
        UserError: not a whole checkpoint, or it is more than its files are.
    """
    described = _Reader(folder).read_metadata().state_dict_metadata
    chosen = {
        name: it
        for name, it in described.items()
        if name.startswith(prefix) and isinstance(it, TensorStorageMetadata)
    }
    size = sum(it.size.numel() * it.properties.dtype.itemsize for it in chosen.values())
    if size > sum(file.stat().st_size for file in folder.iterdir()):
        raise UserError(f"{folder}: larger than its files; choose another checkpoint")
    return {
        name.removeprefix(prefix): torch.empty(it.size, dtype=it.properties.dtype, device="meta")
        for name, it in chosen.items()
    }


def read_whole(folder: Path) -> dict[str, Any]:
    """The same as a checkpoint of one file has it, for a run that is not sharded.

    Raises:
        UserError: as `read_tensors`.
    """
    checkpoint = read_meta(folder)
    groups = checkpoint.pop("optimizer_groups")
    checkpoint["state_dict"] = read_tensors(folder, WEIGHTS)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder, OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = tensor
    if current := read_tensors(folder, CURRENT):
        checkpoint["current_model_state"] = current
    return checkpoint | {"optimizer_states": [numbered({"state": state, "param_groups": groups})]}


def numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as PyTorch has it, parameters numbered through its groups; from one with names."""
    groups = optimizer["param_groups"]
    numbers = {name: n for n, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: of for name, of in optimizer["state"].items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def with_names(optimizer: Mapping[str, Any], named_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reverse: names from the groups of an optimizer over the same parameters."""
    pairs = list(zip(optimizer["param_groups"], named_groups, strict=True))
    names = {n: name for of, own in pairs for n, name in zip(of["params"], own["params"], strict=True)}
    return {
        "state": {names[n]: of for n, of in optimizer["state"].items()},
        "param_groups": [of | {"params": list(own["params"])} for of, own in pairs],
    }


def named(
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Mapping[str, Tensor]],
    current: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a model and of its optimizer's `state` (by parameter) under their names in a folder.

    `current`: the weights that training goes on with, where `weights` are their average.
    """
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"{CURRENT}{name}": tensor for name, tensor in (current or {}).items()}
    return tensors | {
        f"{OPTIMIZER}{name}.{key}": tensor for name, of in optimizer.items() for key, tensor in of.items()
    }


def _unreadable(folder: Path, error: BaseException) -> UserError:
    causes = error.failures.values() if isinstance(error, CheckpointException) else ()
    cause = next((failure[0] for failure in causes), error)
    if isinstance(cause, UserError):
        return cause
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    return UserError(f"{folder}: not a readable checkpoint ({reason}); choose another one")


class _Tensors(dcp.DefaultLoadPlanner):
    """Reads tensors, and nothing that would have to be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuses it."""
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without executing anything in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `.metadata` says.

        Raises:
            UserError: it says something else.
        """
        folder = Path(self.path)
        try:
            with (folder / TENSORS).open("rb") as file:
                found = _Unpickler(file).load()
            if not isinstance(found, Metadata):
                raise ValueError("no description of tensors")
        except Exception as error:  # as above
            raise _unreadable(folder, error) from error
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


class _Unpickler(pickle.Unpickler):
    """Makes descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuses the rest."""
        if (module, name) in DESCRIBES_TENSORS or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")
