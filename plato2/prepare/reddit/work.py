"""The folder of a run in progress: what is finished in it is never done again.

A stage has a folder whose name ends with a hash of everything that decides its content: rules, lists,
tokenizer, the stage before. Other settings are another folder, so a part can never be stale. A part is
written under another name first and renamed when it is whole; what a kill leaves is swept up by the next run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from plato2.bounded import read_file
from plato2.config import UserError
from plato2.files import locked, replaced
from plato2.formats import JSON_BYTES, Schema, parse

_UNFINISHED = ".part"


@contextmanager
def open_work(folder: Path, command: str) -> Iterator[Path]:
    """Make or reopen the work folder, for this process alone.

    A full disk becomes a clear error: what is finished stays, and the same command resumes from it.

    Raises:
        UserError: another process works there, or the disk refuses.
    """
    with clear_errors(folder, "--work", command):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", folder):
            for path in folder.rglob(f"*{_UNFINISHED}"):
                path.unlink(missing_ok=True)
            yield folder


@contextmanager
def clear_errors(folder: Path, option: str, command: str) -> Iterator[None]:
    """Say in words what the disk of `folder`, which the user chooses with `option`, refuses.

    Raises:
        UserError: instead of an OSError in the `with` block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(disk_full(folder, option, command)) from error
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; fix that and run {command} again"
        ) from error


def disk_full(folder: Path, option: str, command: str) -> str:
    """What to say when the disk is full."""
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free
    return (
        f"the disk of {folder} is full ({free / 1e6:,.0f} MB free): free some space, or name a folder on "
        f"another disk with {option}, and run {command} again; it continues from the last finished part"
    )


def stage_folder(work: Path, name: str, settings: Any) -> Path:
    """The folder of a stage under these settings (plain values), made when missing."""
    text = json.dumps(settings, sort_keys=True, default=str)
    folder = work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / "settings.json").exists():
        folder.mkdir(exist_ok=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=1, default=str))
    return folder


def _new(path: Path) -> AbstractContextManager[Path]:
    """`files.replaced` under a name that `open_work` removes where a killed process left it."""
    return replaced(path, f".{uuid.uuid4().hex}{_UNFINISHED}")


def read_record(schema: type[Schema], path: Path) -> Schema:
    """What `write_text` left of a part.

    Raises:
        UserError: it is damaged.
    """
    cure = "remove it, and the same command makes it again"
    return parse(schema, read_file(path, JSON_BYTES, cure), str(path), cure)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file."""
    with _new(path) as new:
        new.write_text(text, encoding="utf-8")


def write_part(path: Path, table: pa.Table, metadata: dict[str, bytes]) -> None:
    """Write a whole Parquet file whose schema carries `metadata`: data and counts are there together."""
    table = table.replace_schema_metadata(metadata)
    with _new(path) as new:
        pq.write_table(table, new, compression="zstd", use_dictionary=False)


def part_metadata(path: Path) -> dict[str, bytes]:
    """The metadata `write_part` was given."""
    return {key.decode(): value for key, value in (pq.read_schema(path).metadata or {}).items()}
