"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plato2.config import UserError
from plato2.files import locked


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling of `target` that takes its place when the block ends well.

    On an exception the sibling is removed and `target` stays as it was. What a killed run left is removed by
    the next one. Nothing else is ever deleted, except a `target` that is replaced: the caller decides that.
    A link is followed: what it points to is written, on that disk.

    Raises:
        UserError: another process is writing the same folder, or the disk refuses.
    """
    target = Path(os.path.realpath(target))
    work = target.parent / f".{target.name}.preparing"
    old = target.parent / f".{target.name}.replaced"
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(_lock_file(target), target))
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error}") from error
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


def is_being_written(target: Path) -> bool:
    """Whether another process is in `new_folder` for this target."""
    lock = _lock_file(Path(os.path.realpath(target)))
    if not any(lock.parent.glob(f"{glob.escape(lock.name)}*")):
        return False  # and none is made: who is about to hold it must not find us in the way
    try:
        with locked(lock, target):
            return False
    except UserError:
        return True
    except OSError:  # nobody of ours can hold what we may not open
        return False


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"
