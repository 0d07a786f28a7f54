"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plato2.config import UserError
from plato2.files import locked


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling of `target` that takes its place when the block ends well.

    On an exception the sibling is removed and `target` stays as it was. What a killed run left is removed by
    the next one. Nothing else is ever deleted, except a `target` that is replaced: the caller decides that.

    Raises:
        UserError: another process is writing the same folder, or the disk refuses.
    """
    work = target.parent / f".{target.name}.preparing"
    old = target.parent / f".{target.name}.replaced"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    with locked(target.parent / f".{target.name}.lock", target):
        try:
            if old.exists() and not target.exists():  # killed between the two renames below
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            yield work
            if target.exists():
                target.rename(old)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
