"""The authors' own models, `24L` and `32L`: fetched from where Knover's README has them, then imported.

    ~/.cache/plato2/models/         $PLATO2_CACHE/models
        24L/                        the model folder, from `import_knover`
        24L.tar.sha256              the hash of the first archive that was imported; later ones must have it
        24L.tar.part, .part.json    what is here of an archive, and which file of the server's it is part of

The archive is all that is fetched: their vocabulary, Knover's English spm.model and vocab.txt, comes with
plato2. No address is asked before it was shown.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.config import UserError
from plato2.files import (
    cache_folder,
    file_sha256,
    lock_file,
    locked,
    read_sha256,
    replace_text,
    sha256_file,
    sync,
    write_sha256,
)

if TYPE_CHECKING:
    from httpx import Client, Response

ADDRESS = "https://dialogue.bj.bcebos.com/Knover/projects/PLATO-2"
"""Of the folder with the archives, as projects/PLATO-2/README.md of github.com/PaddlePaddle/Knover has it."""
MIRROR = "PLATO2_MIRROR"
"""Environment variable: an address to fetch from instead."""
LOWER_CASE = {"24L": False, "32L": True}
"""The models, and whether they read lower-cased text, as Knover's configurations say."""
COPIES = 3
"""The archive, what it unpacks to and the model folder lie on the disk at once."""
TRIES = 5
"""How often in a row a connection may break without a new byte."""
TIMEOUT_S = 30.0
REDIRECTS = 5


@dataclass(frozen=True)
class Remote:
    """A file as its server describes it."""

    address: str
    size: int
    """In bytes."""
    version: str
    """Its strong ETag, else when it was last modified; empty where the server says neither."""


@dataclass(frozen=True)
class Person:
    """Who wants a model, and reads along."""

    say: Callable[[str], None]
    """Shows a line."""
    agree: Callable[[str], None]
    """Asks a question; raises a UserError if the answer is no."""
    progress: Callable[[int, int], None]
    """Shows how many bytes are here, and of how many."""


def is_released(path: Path) -> bool:
    """Whether this is the name of a released model, not that of a file or folder here."""
    return str(path) in LOWER_CASE and not path.exists()


def released_folder(name: str) -> Path:
    """Where the model folder of a released model is, or will be."""
    return cache_folder() / "models" / name


def is_fetched(name: str) -> bool:
    """Whether a released model is here, ready to be read: its folder appears when it is complete."""
    return (released_folder(name) / "config.json").is_file()


def archive_address(name: str) -> str:
    """Where the archive of a released model is fetched from."""
    return f"{(os.environ.get(MIRROR) or ADDRESS).rstrip('/')}/{name}.tar"


def fetch_model(name: str, person: Person) -> Path:
    """The model folder of a released model, fetched and imported unless it is there.

    What is interrupted continues where it stopped. Nothing is fetched before `person` agrees.

    Raises:
        UserError: no, no network, no such file, a full disk, another process at it, or other bytes than the
            first time.
    """
    folder = released_folder(name)
    archive = folder.with_name(f"{name}.tar")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_file(archive), archive):
            if not is_fetched(name):  # another process may just have made it
                if not archive.exists():
                    _fetch(archive, archive_address(name), person)
                _import(archive, folder, LOWER_CASE[name], person)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder.parent}: {error.strerror}; free some space, or set PLATO2_CACHE to a "
            "folder on another disk; the same command continues"
        ) from None
    return folder


def _import(archive: Path, folder: Path, lower_case: bool, person: Person) -> None:
    from plato2.weights.knover import import_knover  # here: importing torch takes seconds

    try:
        found = import_knover(archive, folder, lower_case=lower_case, say=person.say)
    except UserError as error:
        raise UserError(f"{error} (fetched is {archive}; remove it to fetch it again)") from None
    write_sha256(archive, found.sha256)
    archive.unlink()


def _fetch(archive: Path, address: str, person: Person) -> None:
    """Fetches an archive, or the rest of it, and checks it."""
    from httpx import Client, InvalidURL, TransportError

    part, note = (archive.with_name(f"{archive.name}.{kind}") for kind in ("part", "part.json"))
    with Client(headers={"Accept-Encoding": "identity"}, timeout=TIMEOUT_S) as client:
        person.say(f"{archive.stem} is not here yet; asking {address}")
        try:
            remote = _find(client, address, archive, person)
        except (TransportError, InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UserError(f"{address}: cannot be reached ({reason}); {_cure(archive)}") from None
        here = _size(part) if remote.version and _noted(note) == asdict(remote) else 0
        free, needed = shutil.disk_usage(archive.parent).free, COPIES * remote.size - here
        rest = f", {_gb(here)} of it here already" if here else ""
        person.say(f"{remote.address}: {_gb(remote.size)} ({remote.size:,} bytes){rest}")
        if free < needed:
            raise UserError(
                f"{archive.parent}: {_gb(free)} free; {archive.stem} needs {_gb(needed)} more until it is "
                "imported; free some space, or set PLATO2_CACHE to a folder on another disk"
            )
        person.agree(f"fetch it to {archive.parent}?")
        if not here:
            if _size(part):
                person.say("the file there is not the one that was begun: from the beginning")
            part.unlink(missing_ok=True)
            replace_text(note, json.dumps(asdict(remote)))
        _fetch_rest(client, remote, part, person)
    sha256 = file_sha256(part)
    person.say(f"sha256 {sha256}")
    known = read_sha256(archive)
    if known and sha256 not in known:
        raise UserError(
            f"{remote.address}: its sha256 is {sha256}, the first one fetched had {known[0]}; if the authors "
            f"have replaced it, remove {sha256_file(archive)}, if not, {part}; then run the same again"
        )
    sync(part)
    part.rename(archive)
    note.unlink(missing_ok=True)


def _find(client: Client, address: str, archive: Path, person: Person) -> Remote:
    """What the server says of a file, redirects followed one by one, each shown before it is asked.

    Raises:
        UserError: no such file, or a redirect to what is not on the web or no longer encrypted.
    """
    for _ in range(REDIRECTS):
        response = client.head(address)
        if not response.has_redirect_location:
            break
        to = response.url.join(response.headers["location"])
        if to.scheme not in ("https", response.url.scheme) or not to.host:
            raise UserError(f"{address}: redirects to {to}, which is not followed; {_cure(archive)}")
        address = str(to)
        person.say(f"it redirects to {address}")
    if response.status_code != 200:
        raise UserError(f"{address}: {_status(response)}; {_cure(archive)}")
    if not (size := response.headers.get("content-length", "")).isdecimal() or not int(size):
        raise UserError(f"{address}: the server does not say how large it is; {_cure(archive)}")
    return Remote(address, int(size), _version(response))


def _fetch_rest(client: Client, remote: Remote, part: Path, person: Person) -> None:
    """Appends to `part` what is missing; a connection that breaks is made again."""
    from httpx import TransportError

    failures = 0
    while (here := _size(part)) < remote.size:
        reason = "too few bytes"
        try:
            _append(client, remote, part, here, person)
        except TransportError as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
        if (now := _size(part)) == remote.size:
            return
        failures = failures + 1 if now <= here else 0
        if failures == TRIES:
            raise UserError(
                f"{remote.address}: the connection broke at {now:,} of {remote.size:,} bytes ({reason}); "
                "the same command continues there"
            )
        person.say(f"the connection broke at {now:,} bytes; going on")
        time.sleep(failures)


def _append(client: Client, remote: Remote, part: Path, here: int, person: Person) -> None:
    """One request for the bytes from `here` on, from the start where the server cannot resume.

    Raises:
        UserError: an error of the server, or another file than before.
        TransportError: the connection broke.
    """
    asked = {"Range": f"bytes={here}-", "If-Range": remote.version} if here and remote.version else {}
    with client.stream("GET", remote.address, headers=asked) as response:
        if response.status_code not in (200, 206):
            raise UserError(f"{remote.address}: {_status(response)}; the same command continues later")
        start = here if response.status_code == 206 else 0
        given = [response.headers.get("content-length"), _version(response)]
        wanted = [str(remote.size - start), remote.version]
        if start:
            given.append(response.headers.get("content-range"))
            wanted.append(f"bytes {start}-{remote.size - 1}/{remote.size}")
        if given != wanted:
            raise UserError(f"{remote.address}: changed while it was fetched; the same command begins again")
        if here and not start:
            person.say("the server cannot resume: from the beginning")
        with part.open("ab" if start else "wb") as file:
            for data in response.iter_raw():
                file.write(data)
                start += len(data)
                person.progress(start, remote.size)


def _version(response: Response) -> str:
    """What tells a file from a later one at the same address; `If-Range` takes no weak ETag."""
    tag: str = response.headers.get("etag", "")
    return response.headers.get("last-modified", "") if not tag or tag.startswith("W/") else tag


def _noted(note: Path) -> Any:
    """Which file a part is of."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(note.read_text(encoding="utf-8"))
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _status(response: Response) -> str:
    return f"HTTP {response.status_code} {response.reason_phrase}".strip()


def _cure(archive: Path) -> str:
    name = archive.stem
    lower = " --lower-case" if LOWER_CASE[name] else ""
    return (
        f"try again later, or get {name}.tar by other means and run: plato2 import knover {name}.tar "
        f"--out {archive.with_suffix('')}{lower}"
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
