"""What a run has saved, read back without Lightning, so that talking to a run starts in no time.

Checkpoints are read without executing anything in them.
"""

from __future__ import annotations

import csv
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from plato2.config import UserError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file, without executing anything in it.

    Raises:
        UserError: missing, truncated, or not a checkpoint of ours.
    """
    import torch  # not to read metrics or hashes

    if path.is_dir():
        raise UserError(
            f"{path}: a sharded checkpoint; make one file of it first: "
            f"python -m lightning_fabric.utilities.consolidate_checkpoint {path}"
        )
    if path.exists() and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a readable checkpoint (damaged, or something else); choose another one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch raises whatever a broken zip or a foreign pickle leads to
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); choose another one") from error
    missing = [key for key in ("state_dict", "stage", "hyper_parameters") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a plato2 checkpoint (no {', '.join(missing)})")
    return checkpoint


def checkpoint_step(path: Path) -> int:
    """The optimizer steps a checkpoint (file or sharded folder) has behind it.

    Raises:
        UserError: not a readable checkpoint.
    """
    if path.is_dir():
        import torch

        return int(torch.load(path / "meta.pt", map_location="cpu", weights_only=True)["global_step"])
    return int(read_checkpoint(path)["global_step"])


def best_value(path: Path) -> float | None:
    """The best value of the stage's monitor up to a checkpoint (not of a sharded one)."""
    if path.is_dir():
        return None
    value = read_checkpoint(path).get("callbacks", {}).get("Checkpoints", {}).get("best_value")
    return None if value is None else float(value)


def file_sha256(path: Path) -> str:
    """Hash of a file, or of the names and hashes in a folder (sharded checkpoint)."""
    if path.is_dir():
        parts = [f"{child.name}:{file_sha256(child)}" for child in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a `metrics.csv`: (step, metric, value)."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(step), name, float(value)) for step, name, value in list(csv.reader(file))[1:]]


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of each metric; empty when nothing was logged."""
    return {name: value for _, name, value in read_metrics(path)} if path.exists() else {}
