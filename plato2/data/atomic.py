"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plato2.config import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock, two runs at once are not noticed there
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EAGAIN, errno.EACCES)
"""What a file system says where another process holds a lock; all else means that it has no locks."""


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    with locked(_lock_file(target), target):
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


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file at `path` while the block runs, so that one process at a time writes `target`.

    Raises:
        UserError: another process holds it, or the file cannot be made.
    """
    try:
        lock = path.open("a")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    raise UserError(
                        f"{target} is being written by another process; wait for it, or stop it"
                    ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
