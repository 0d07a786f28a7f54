"""Files that may be damaged, and that several processes want to write: hashes, locks, folders made whole."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from plato2.config import UserError

if TYPE_CHECKING:
    from filelock import LeaseCompromise

UNCHECKED = "PLATO2_CHECK_HASHES"
"""Environment variable: 0 = hashes are not checked, which saves the time that it takes to read huge files."""
NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks of the kernel say."""
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What file systems say that write folders when they like, such as those of other machines."""
LEASE_S = 120.0
"""Where there are none: a holder that has not renewed its lease for this many seconds is dead."""
SEEN_DEAD_S = 5.0
"""A holder on this machine is asked whether it lives, which takes a second or two."""


def cache_folder() -> Path:
    """Where copies of what lies elsewhere are kept."""
    return Path(os.environ.get("PLATO2_CACHE") or "~/.cache/plato2").expanduser()


@contextmanager
def replaced(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yields a name beside `path`, for a file that takes its place once written: never incomplete.

    Args:
        path: of the file.
        suffix: of the name; one of its own where several processes write the same file.
    """
    temporary = path.with_name(f"{path.name}{suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent, inside=False)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_place(path: Path, option: str) -> None:
    """Whether a file may be written there later; missing folders are no obstacle, they are made for it.

    Args:
        path: of the file.
        option: it was given by.

    Raises:
        UserError: it is a folder, or something in its way is not.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder; give a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is not a folder; name another file")


def sync(path: Path, inside: bool = True) -> None:
    """Waits until a file, or a folder and what is in it, is on the disk: a power cut does not undo it.

    Args:
        path: of the file or folder.
        inside: whether the files of a folder are waited for, or its names alone.
    """
    for child in path.iterdir() if inside and path.is_dir() else ():
        sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that is never incomplete."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- hashes


def file_sha256(path: Path) -> str:
    """Hash of a file, or of the names and hashes in a folder (sharded checkpoint)."""
    if path.is_dir():
        parts = [f"{child.name}:{file_sha256(child)}" for child in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    state = path.stat()
    return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, *state: int) -> str:
    """A file is hashed once, however often it is looked into, until it changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HASH_FILE_CHARS = 4096
"""More than two lines of a hash and a name have."""


def sha256_file(path: Path) -> Path:
    """The file beside `path` that has its hash, as `sha256sum` writes it."""
    return path.with_name(f"{path.name}.sha256")


def write_sha256(path: Path, *hashes: str) -> None:
    """Writes the hash of a file or folder beside it; its own, if none is given.

    Two are given while another file takes its place: a kill between the two renames leaves one that is known.
    """
    lines = [f"{sha256}  {path.name}\n" for sha256 in hashes or (file_sha256(path),)]
    replace_text(sha256_file(path), "".join(lines))


def read_sha256(path: Path) -> list[str]:
    """The hashes beside a file or folder; empty where there are none."""
    beside = sha256_file(path)
    if not beside.is_file():  # a pipe would hang
        return []
    with beside.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(HASH_FILE_CHARS).splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def check_sha256(path: Path, cure: str) -> None:
    """Compares a file or folder with the hash beside it; where there is none, nothing is compared.

    Raises:
        UserError: it is damaged, or was changed since it was saved.
    """
    if os.environ.get(UNCHECKED) == "0" or not sha256_file(path).exists():
        return
    if file_sha256(path) not in read_sha256(path):
        raise UserError(
            f"{path}: damaged: its bytes are not those that were saved ({sha256_file(path).name} has another "
            f"hash); {cure}"
        )


# ----------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(lock: Path, target: Path | str, cure: str = "wait for it, or stop it") -> Iterator[None]:
    """Holds a lock file while the block runs, so that one process at a time writes `target`.

    The kernel frees the lock of a dead process, on this or another machine. On file systems without such
    locks it is a lease that its holder renews; there that of a machine that died is free after two minutes.

    Args:
        lock: the file; gone afterwards.
        target: what is protected, for messages.
        cure: what to do when another process holds it.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be made.
    """
    from filelock import FileLock, SoftFileLease, Timeout  # here, since readers lock nothing

    held: FileLock | SoftFileLease = FileLock(
        lock, timeout=0, fallback_to_soft=False, on_acquired=_sign, thread_local=False
    )
    try:
        try:
            held.acquire()
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_FLOCK:
                raise
            lock.unlink(missing_ok=True)
            lock = lock.with_name(f"{lock.name}.lease")
            held = SoftFileLease(
                lock, lease_duration=LEASE_S, on_compromise=partial(_end, target), thread_local=False
            )
            try:
                held.acquire(timeout=0)
            except Timeout:
                wait_s = SEEN_DEAD_S
                if held.owner is None or held.owner.hostname != socket.gethostname():
                    wait_s = LEASE_S + 10
                    told = f"{target}: another process holds it, or died: waiting {wait_s:g} s at most"
                    print(told, file=sys.stderr, flush=True)
                held.acquire(timeout=wait_s)
    except Timeout:
        raise UserError(f"{target} is being written by another process{_holder(lock)}; {cure}") from None
    try:
        yield
    finally:
        if isinstance(held, FileLock):  # before it is free: who waits for it notices, and makes a new one
            lock.unlink(missing_ok=True)
        held.release()


def was_killed(lock: Path) -> bool:
    """Whether the process that held a lock died on this machine without letting go of it."""
    try:
        about = json.loads(lock.read_text(encoding="utf-8"))
        if about["host"] == socket.gethostname():
            os.kill(about["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass  # gone, or nobody has signed, or it is somebody else's
    return False


def _sign(file: int) -> None:
    """Writes into the lock who holds it, for the message to the others."""
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    with suppress(OSError):  # a full disk: the lock is held anyway
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)


def _holder(lock: Path) -> str:
    """` (process ... on ...)`, where it has signed."""
    try:
        about = json.loads(lock.read_text(encoding="utf-8"))
        return f" (process {about['pid']} on {about['host']} since {about['since']}: {about['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        from filelock import SoftFileLease

        pid = SoftFileLease(lock, lease_duration=LEASE_S).pid if lock.suffix == ".lease" else None
        return f" (process {pid})" if pid else ""


def _end(target: Path | str, loss: LeaseCompromise) -> None:
    """Ends this process at once: another one took its lease over while it hung. What it saved is intact."""
    told = f"another process has taken it over while this one hung ({loss.reason}); stopped"
    print(f"error: {target}: {told}", file=sys.stderr, flush=True)
    os._exit(1)


# --------------------------------------------------------------------------------------------------- folders


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
            stack.enter_context(locked(lock_file(target), target))
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
    lock = lock_file(target)
    if not any(lock.parent.glob(f"{glob.escape(lock.name)}*")):
        return False  # and none is made: who is about to hold it must not find us in the way
    try:
        with locked(lock, target):
            return False
    except UserError:
        return True
    except OSError:  # nobody of ours can hold what we may not open
        return False


def lock_file(target: Path) -> Path:
    """The lock of a file or folder, beside what it links to."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.lock")
