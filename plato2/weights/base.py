"""The base of an adapter: the pretrained weights that it was trained on, which its checkpoints do not hold.

They are told by a hash, that of the files in the decoder's folder. It is kept in the cache (`PLATO2_CACHE`)
with the size and time of each file: 15 GB are not read again at each start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from plato2.config import ModelConfig, UserError
from plato2.files import cache_folder, file_sha256, replaced
from plato2.model.decoder_folder import weight_files
from plato2.runs.saved import read_checkpoint

SETTLED_S = 2.0
"""A file written less than this many seconds ago may change without another time stamp."""
CURE = "get the folder again from its source"


def with_base(config: ModelConfig) -> ModelConfig:
    """The configuration, with the hash of the weights in the decoder's folder: an adapter's base.

    Where all weights are trained, it tells the decoder that they began as, wherever its folder is.

    Raises:
        UserError: there are no such weights.
    """
    return replace(config, base_sha256=base_sha256(Path(config.path))) if config.is_pretrained else config


def check_base(config: ModelConfig, trained: Path) -> None:
    """Refuses an adapter on other weights than those it was trained on.

    Args:
        config: of the adapter.
        trained: its checkpoint or folder, for messages.

    Raises:
        UserError: the base is gone, or has changed.
    """
    folder = Path(config.base or config.path)
    if not folder.exists():
        raise UserError(
            f"{trained}: an adapter of {folder}, which is not there; put it back, or link to "
            f"it (sha256 {config.base_sha256[:12]})"
        )
    if (found := base_sha256(folder)) != config.base_sha256:
        raise UserError(
            f"{trained}: an adapter of other weights (sha256 {config.base_sha256[:12]}) than those in "
            f"{folder} ({found[:12]}); put the ones there that it was trained on"
        )


def fill_base(backbone: Any, config: ModelConfig, later: bool = False) -> None:
    """Reads the base of an adapter into its backbone: the weights in its folder, or all that a run trained.

    Args:
        backbone: of `config`.
        config: of the adapter.
        later: not now, but when ranks fill their shares.

    Raises:
        UserError: it cannot be read.
    """
    if config.base:
        trained = read_checkpoint(Path(config.base))["state_dict"]
        backbone.base = {name.removeprefix("backbone."): weight for name, weight in trained.items()}
    if not later:
        backbone.load_base()


def base_sha256(path: Path) -> str:
    """The hash of weights: what `sha256sum` says of their file, or of its lines for several.

    Args:
        path: of a decoder's folder, or of a checkpoint.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    is_checkpoint = path.is_file() or (path / "meta.pt").exists()
    if is_checkpoint:
        return _cached_sha256(path) if path.is_file() else file_sha256(path)
    folder, files = path, weight_files(path)
    try:
        hashes = [_cached_sha256(file) for file in files]
    except OSError as error:
        raise UserError(f"model.path={folder}: cannot be read ({error}); {CURE}") from None
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{found}  {file.name}\n" for file, found in zip(files, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _cached_sha256(file: Path) -> str:
    """The hash of a file, from the cache where neither its size nor its time has changed."""
    of = os.path.realpath(file)
    stat = os.stat(of)
    now = {"path": of, "size": stat.st_size, "time_ns": stat.st_mtime_ns}
    cached = cache_folder() / "sha256" / f"{hashlib.sha256(of.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cached.read_bytes())
        if {key: known[key] for key in now} == now:
            return str(known["sha256"])
    sha256 = file_sha256(file)
    if time.time() - stat.st_mtime > SETTLED_S:
        with suppress(OSError):  # a cache that cannot be written costs time alone
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replaced(cached, f".{os.getpid()}") as new:
                new.write_text(json.dumps({**now, "sha256": sha256}), encoding="utf-8")
    return sha256
