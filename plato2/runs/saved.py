"""What a run has saved, read back without Lightning, so that talking to a run starts in no time.

Checkpoints are read without executing anything in them.
"""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

from plato2.bounded import read_file
from plato2.config import Use, UserError
from plato2.files import check_sha256
from plato2.formats import Count, Open, Sha256, check
from plato2.weights.names import refuse_apart

HEADER = ("step", "metric", "value")
"""The first row of `metrics.csv`."""
METRICS_BYTES = 1 << 30
"""The largest `metrics.csv` that is read: some million steps of a run that logs each."""


def read_checkpoint(path: Path, in_shares: bool = False) -> dict[str, Any]:
    """A checkpoint, one file or a folder of shares, without executing anything in it; its tensors are whole.

    Those of a file are not read yet: they are mapped into memory, pages that all processes share.

    Args:
        path: the file or folder.
        in_shares: the tensors of a folder are only described, on the meta device: the ranks of a sharded run
            read their shares of them (`distributed.read_weights`).

    Raises:
        UserError: missing, truncated, or not a checkpoint of ours.
    """
    import torch  # not to read metrics

    if path.is_dir():
        from plato2.runs.distributed import WEIGHTS, describe_tensors, read_tensors

        found = _read_rest(path)
        found["state_dict"] = (describe_tensors if in_shares else read_tensors)(path, WEIGHTS)
        return _checked(path, found)
    if path.exists():
        check_sha256(path, "choose another one")
        _check_zip(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch raises whatever a broken zip or a foreign pickle leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); choose another one") from error
    found = _checked(path, checkpoint if isinstance(checkpoint, dict) else {})
    _check_tensors(path, found["state_dict"])
    return found


def _read_rest(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint without its tensors."""
    from plato2.runs.distributed import read_meta

    check_sha256(folder, "choose another one")
    return read_meta(folder)


def _checked(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint, if it is one of ours.

    Raises:
        UserError: it is not.
    """
    if isinstance(weights := found.get("state_dict"), dict):
        refuse_apart(path, map(str, weights))
    missing = [key for key in ("state_dict", "stage", "use", "hyper_parameters") if key not in found]
    if missing:
        raise UserError(f"{path}: not a plato2 checkpoint (no {', '.join(missing)})")
    facts = {key: found[key] for key in CheckpointFacts.model_fields if key in found}
    check(CheckpointFacts, facts, str(path), "choose another checkpoint")
    return found


class CheckpointFacts(Open):
    """What is read of a checkpoint beside its weights."""

    stage: str
    use: Use
    hyper_parameters: dict[str, Any]
    tokenizer_sha256: Sha256 | None = None
    global_step: Count = 0


def _check_zip(path: Path) -> None:
    """A checkpoint is a zip of what torch.load maps into memory as it is; nothing in it is packed.

    Raises:
        UserError: it is no zip, or would unpack to more than it is.
    """
    try:
        if not path.is_file():
            raise ValueError("a device or pipe")
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); choose another one") from None
    if size > path.stat().st_size:
        raise UserError(f"{path}: not a readable checkpoint (it is compressed); choose another one")


def _check_tensors(path: Path, tensors: Any) -> None:
    """Refuses what would take more memory than the file has bytes, such as one number seen as a million.

    Raises:
        UserError: no dict of plain tensors, or they are larger than the file.
    """
    import torch

    is_plain = isinstance(tensors, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        for name, tensor in tensors.items()
    )
    if not is_plain or sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
        raise UserError(f"{path}: its state_dict is not that of a model; choose another checkpoint")


def checkpoint_step(path: Path) -> int:
    """The optimizer steps a checkpoint (file or sharded folder) has behind it.

    Raises:
        UserError: not a readable checkpoint.
    """
    step = (_read_rest(path) if path.is_dir() else read_checkpoint(path)).get("global_step", 0)
    if not isinstance(step, int):
        raise UserError(f"{path}: not a readable checkpoint (no global_step); choose another one")
    return step


def best_value(path: Path) -> float | None:
    """The best value of the stage's monitor up to a checkpoint."""
    callbacks = (_read_rest(path) if path.is_dir() else read_checkpoint(path)).get("callbacks")
    own = callbacks.get("Checkpoints") if isinstance(callbacks, dict) else None
    value = own.get("best_value") if isinstance(own, dict) else None
    return value if isinstance(value, float) else None


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a `metrics.csv`: (step, metric, value).

    Raises:
        UserError: it has other rows, or cannot be read; names the file.
        FileNotFoundError: there is none.
    """
    cure = "restore the file, or move it away"
    data = read_file(path, METRICS_BYTES, cure)
    try:
        header, *rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""))) or [list(HEADER)]
        if tuple(header) != tuple(HEADER):
            raise ValueError(f"it begins with {','.join(header)[:80]!r}")
        return [(int(step), name, float(value)) for step, name, value in rows]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not rows of step,metric,value ({error}); {cure}") from None


def best_direction(metric: str) -> str:
    """Whether a metric is better when it is smaller (`min`) or larger (`max`)."""
    larger = ("acc", "p1", "mrr", "z_effective", "z_in_use", "z_mutual_information", "tokens_per_s", "mfu")
    return "max" if any(word in metric for word in larger) else "min"


def was_pruned(path: Path) -> bool:
    """Whether a checkpoint is of a run that ended as one of the bad ones of a study."""
    callbacks = (_read_rest(path) if path.is_dir() else read_checkpoint(path)).get("callbacks")
    own = callbacks.get("Report") if isinstance(callbacks, dict) else None
    return isinstance(own, dict) and own.get("pruned") is True


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of each metric; empty when nothing was logged."""
    return {name: value for _, name, value in read_metrics(path)} if path.exists() else {}
