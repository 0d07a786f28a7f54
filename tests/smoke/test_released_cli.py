"""The authors' models by name: `plato2 chat 24L` with a server of a tiny archive, and all that goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small import ROOT, assert_one_line, environment
from test_chat_cli import PROMPT, replies, terminal
from test_import_knover import write_release
from test_reply_cli import plato2

from plato2.config import UserError
from plato2.files import read_sha256
from plato2.weights import released
from plato2.weights.folder import read_saved, saved_tokenizer

NAMES = ("24L", "32L")


@dataclass
class Site:
    """What a server has, how it behaves, and what it was asked."""

    content: bytes
    version: str = '"1"'
    has_ranges: bool = True
    says_size: bool = True
    status: int = 200
    moved_to: str | None = None
    """Where /24L.tar redirects to."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next connections break, one after the other."""
    stalls_after: int | None = None
    before_get: Callable[[], None] = lambda: None
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """Method, path, Range and If-Range."""
    sent: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def gets(self) -> list[str | None]:
        """The Range of each GET."""
        return [of for method, _, of, _ in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with Range, If-Range and ETag."""

    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *given: Any) -> None:
        self.site = site
        super().__init__(*given)

    def log_message(self, *given: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.site.before_get()
        self.answer(self.site.content)

    def answer(self, body: bytes) -> None:
        site, of = self.site, self.headers["Range"]
        site.asked.append((self.command, self.path, of, self.headers["If-Range"]))
        if site.moved_to and self.path == "/24L.tar":
            self.send_response(302)
            self.send_header("Location", site.moved_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, size = 0, len(site.content)
        if of and site.has_ranges and self.headers["If-Range"] == site.version:
            start = int(of.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else site.status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if site.version:
            self.send_header("ETag", site.version)
        if site.says_size:
            self.send_header("Content-Length", str(size - start))
        else:
            self.close_connection = True
        self.end_headers()
        if body:
            self.send(body[start:])

    def send(self, body: bytes) -> None:
        site = self.site
        if site.cuts:
            body, self.close_connection = body[: site.cuts.pop(0)], True
        if site.stalls_after is not None:
            self.write(body[: site.stalls_after])
            site.stalled.set()
            assert site.go_on.wait(60)
            body = body[site.stalls_after :]
        self.write(body)

    def write(self, body: bytes) -> None:
        try:
            self.wfile.write(body)
            self.site.sent += len(body)
        except (BrokenPipeError, ConnectionResetError):  # Ctrl-C on the other side
            self.close_connection = True


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Knover's tiny models, packed as the large ones are."""
    folder = tmp_path_factory.mktemp("release")
    write_release(folder / "24L")
    with tarfile.open(folder / "24L.tar", "w") as tar:
        tar.add(folder / "24L", "24L")
    return (folder / "24L.tar").read_bytes()


@pytest.fixture
def site(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(archive)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, site))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PLATO2_MIRROR", site.url)
    monkeypatch.setenv("PLATO2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(released.time, "sleep", lambda _: None)
    yield site
    site.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def fetch(name: str = "24L") -> list[str]:
    """Fetches a model as someone who agrees; what was said."""
    lines: list[str] = []
    person = released.Person(lines.append, lines.append, lambda done, size: None)
    assert released.fetch_model(name, person) == released.released_folder(name)
    return lines


def refused(match: str) -> str:
    """The error of fetching."""
    with pytest.raises(UserError, match=match) as error:
        fetch()
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_complete(models: Path, archive: bytes) -> None:
    """The model folder and the hash of its archive are there, and nothing else."""
    assert {path.name for path in models.iterdir()} == {"24L", "24L.tar.sha256"}
    assert read_sha256(models / "24L.tar") == [hashlib.sha256(archive).hexdigest()]
    assert {read_saved(models / "24L", role=role).stage for role in ("generation", "evaluation")} == {
        "2_gen",
        "2_eval",
    }


# ------------------------------------------------------------------------------------------- one command


def test_one_command_fetches_imports_and_talks(
    site: Site, models: Path, archive: bytes, tmp_path: Path
) -> None:
    done = plato2("chat", "24L", "--yes", "--max-tokens", 4, stdin="hello !\n")
    assert done.returncode == 0
    assert len(replies(done)) == 1
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        f"24L is not here yet; asking {site.url}/24L.tar",
        f"{site.url}/24L.tar: 0.00 GB ({len(archive):,} bytes)",
        f"sha256 {hashlib.sha256(archive).hexdigest()}",
    ]
    assert_complete(models, archive)
    asked = len(site.asked)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("hi\thello\n", encoding="utf-8")
    for verb in (["reply", "hi", "--max-tokens", 4], ["score", pairs, "--evaluation", "24L"]):
        done = plato2(*verb, "--generation", "24L")
        assert (done.returncode, done.stderr) == (0, "")
    sets = tmp_path / "set.jsonl"
    sets.write_text(
        json.dumps({"context": ["hi"], "candidates": ["a", "b"], "labels": [1, 0]}), encoding="utf-8"
    )
    done = plato2("evaluate", "selection", sets, "--evaluation", "24L", "--no-baselines", "--json")
    assert done.returncode == 0
    assert len(site.asked) == asked  # what is here is not asked for


@pytest.mark.parametrize("name", NAMES)
def test_only_32l_reads_lower_case(site: Site, models: Path, name: str) -> None:
    fetch(name)
    assert saved_tokenizer(models / name).lower_case == (name == "32L")


def test_without_a_terminal_or_yes_nothing_is_asked(site: Site, models: Path) -> None:
    done = plato2("self-chat", "--generation", "32L", "--out", models.parent.parent / "chats.jsonl")
    assert done.returncode == 2
    assert_one_line(done.stderr, f"32L: not here yet; to fetch it from {site.url}/32L.tar give --yes")
    assert (site.asked, models.exists()) == ([], False)


def test_a_folder_of_that_name_comes_first(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "24L" / "Plato").mkdir(parents=True)  # what `tar xf 24L.tar` makes
    monkeypatch.chdir(tmp_path)
    assert "24L: Knover's files; run plato2 import knover 24L --out " in plato2("chat", "24L", "--yes").stderr
    assert not site.asked


@pytest.mark.slow
def test_on_a_terminal_it_asks_and_ctrl_c_costs_nothing(site: Site, models: Path, archive: bytes) -> None:
    with terminal(["24L"]) as screen:
        shown = screen.wait_for("[y/N]: ")
        assert f"{site.url}/24L.tar: 0.00 GB ({len(archive):,} bytes)" in shown
        screen.type("n\n")
        screen.wait_for("24L: not fetched; say yes")
        assert screen.exit_code() == 2
    assert site.gets == []
    site.stalls_after = 300_000
    with terminal(["24L", "--yes"]) as screen:
        assert site.stalled.wait(60)
        screen.wait_for("MB")  # the progress bar
        screen.type("\x03")
        assert screen.exit_code() == 130
    here = (models / "24L.tar.part").stat().st_size
    assert 0 < here <= 300_000
    site.stalls_after = None
    with terminal(["24L", "--max-tokens", "4"]) as screen:
        assert "of it here already" in screen.wait_for("[y/N]: ")
        screen.type("y\n")
        screen.wait_for(PROMPT)
    assert site.gets == [None, f"bytes={here}-"]
    assert_complete(models, archive)


# ------------------------------------------------------------------------------------ broken connections


def test_a_connection_that_breaks_is_made_again_and_no_byte_comes_twice(
    site: Site, models: Path, archive: bytes
) -> None:
    site.cuts = [100_000, 200_000]
    assert "the connection broke at 100,000 bytes; going on" in fetch()
    assert site.gets == [None, "bytes=100000-", "bytes=300000-"]
    assert site.asked[-1][3] == site.version
    assert site.sent == len(archive)
    assert_complete(models, archive)


def test_what_breaks_for_good_goes_on_with_the_next_command(site: Site, models: Path, archive: bytes) -> None:
    site.cuts = [300_000, *[0] * released.TRIES]
    error = refused("the connection broke at 300,000 of ")
    assert "the same command continues there" in error
    fetch()
    assert site.sent == len(archive)
    assert_complete(models, archive)


def test_a_server_without_range_begins_again(site: Site, models: Path, archive: bytes) -> None:
    site.has_ranges, site.cuts = False, [300_000]
    assert "the server cannot resume: from the beginning" in fetch()
    assert site.sent == len(archive) + 300_000
    assert_complete(models, archive)


@pytest.mark.parametrize("version", ["", 'W/"1"'])
def test_without_a_version_nothing_is_glued(site: Site, models: Path, archive: bytes, version: str) -> None:
    site.version, site.cuts = version, [300_000]
    fetch()
    assert site.gets == [None, None]
    assert_complete(models, archive)


# ---------------------------------------------------------------------------------------- changed bytes


def test_a_file_that_changed_between_two_commands_is_not_glued(
    site: Site, models: Path, archive: bytes
) -> None:
    site.content, site.version = b"\1" * len(archive), '"old"'
    site.cuts = [300_000, *[0] * released.TRIES]
    refused("the connection broke")
    site.content, site.version = archive, '"new"'
    assert "the file there is not the one that was begun: from the beginning" in fetch()
    assert_complete(models, archive)


def test_a_file_that_changes_while_it_is_fetched_is_not_glued(
    site: Site, models: Path, archive: bytes
) -> None:
    site.cuts = [300_000]

    def change() -> None:
        if site.sent:
            site.version = '"2"'

    site.before_get = change
    refused("changed while it was fetched; the same command begins again")
    fetch()
    assert_complete(models, archive)


def test_another_hash_than_the_first_time_is_refused(site: Site, models: Path, archive: bytes) -> None:
    fetch()
    shutil.rmtree(models / "24L")
    site.content, site.version = archive + bytes(tarfile.RECORDSIZE), '"2"'
    error = refused(f"its sha256 is {hashlib.sha256(site.content).hexdigest()}, the first one fetched had ")
    assert hashlib.sha256(archive).hexdigest() in error
    assert f"remove {models / '24L.tar.sha256'}, if not, {models / '24L.tar.part'}" in error
    assert not (models / "24L").exists()
    (models / "24L.tar.sha256").unlink()
    site.sent = 0
    fetch()
    assert site.sent == 0  # accepted as it is
    assert_complete(models, site.content)


def test_what_is_no_archive_is_said_and_not_remembered(site: Site, models: Path, archive: bytes) -> None:
    site.content, site.version = b"<html>log in to this network</html>", '"login"'
    file = models / "24L.tar"
    assert f"(fetched is {file}; remove it to fetch it again)" in refused("neither a folder, a tar nor")
    file.unlink()
    site.content, site.version = archive, '"1"'
    fetch()
    assert_complete(models, archive)


# ------------------------------------------------------------------------------------------- servers, disks


def test_a_redirect_is_shown_before_it_is_followed(site: Site, models: Path, archive: bytes) -> None:
    site.moved_to = "/elsewhere/24L.tar"
    said_before: list[bool] = []
    lines: list[str] = []
    to = f"it redirects to {site.url}/elsewhere/24L.tar"

    def say(line: str) -> None:
        if line == to:
            said_before.append([path for _, path, *_ in site.asked] == ["/24L.tar"])
        lines.append(line)

    released.fetch_model("24L", released.Person(say, say, lambda done, size: None))
    assert said_before == [True]
    assert f"{site.url}/elsewhere/24L.tar: 0.00 GB ({len(archive):,} bytes)" in lines
    assert_complete(models, archive)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "file://localhost/etc/passwd", "ftp://host/24L.tar"])
def test_a_redirect_away_from_the_web_is_not_followed(site: Site, to: str) -> None:
    site.moved_to = to
    error = refused("which is not followed; try again later, or get")
    assert error.startswith(f"{site.url}/24L.tar: redirects to {to.replace('///', '/')}")
    assert len(site.asked) == 1


def test_redirects_without_end(site: Site) -> None:
    site.moved_to = "/24L.tar"
    refused("HTTP 302 Found")
    assert len(site.asked) == released.REDIRECTS


@pytest.mark.parametrize(
    ("status", "said"), [(404, "HTTP 404 Not Found"), (500, "HTTP 500 Internal Server Error")]
)
def test_an_error_of_the_server_is_one_line_with_a_cure(
    site: Site, models: Path, status: int, said: str
) -> None:
    site.status = status
    error = refused(f"{site.url}/24L.tar: {said}; try again later, or get 24L.tar by other means and run: ")
    assert error.endswith(f"plato2 import knover 24L.tar --out {models / '24L'}")


def test_an_error_in_the_middle_keeps_what_is_here(site: Site, models: Path, archive: bytes) -> None:
    site.cuts, site.has_ranges = [300_000], False

    def fail() -> None:
        site.status = 503 if site.sent else 200

    site.before_get = fail
    refused("HTTP 503 Service Unavailable; the same command continues later")
    assert (models / "24L.tar.part").stat().st_size == 300_000


def test_a_server_that_does_not_say_how_large_it_is(site: Site) -> None:
    site.says_size = False
    refused("the server does not say how large it is")
    assert site.gets == []


def test_without_a_network_the_error_names_the_cure(
    site: Site, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATO2_MIRROR", "http://127.0.0.1:9")
    done = plato2("chat", "32L", "--yes")
    assert done.returncode == 2
    assert_one_line(done.stderr, "http://127.0.0.1:9/32L.tar: cannot be reached (ConnectError: ")
    cure = f"run: plato2 import knover 32L.tar --out {models / '32L'} --lower-case"
    assert done.stderr.endswith(f"{cure}\n")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "plato2-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(
    site: Site, disk: Path, models: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(archive) > 2**20
    monkeypatch.setenv("PLATO2_CACHE", str(disk))
    refused("0.00 GB free; 24L needs 0.01 GB more until it is imported; free some space, or set PLATO2_CACHE")
    assert site.gets == []
    monkeypatch.setattr(released, "COPIES", 0)  # as if the room went while it was fetched
    refused(f"{disk}/models: No space left on device; free some space, or set PLATO2_CACHE")
    here = (disk / "models" / "24L.tar.part").stat().st_size
    assert here > 500_000
    shutil.copytree(disk, models.parent)
    monkeypatch.setenv("PLATO2_CACHE", str(models.parent))
    fetch()
    assert site.gets == [None, f"bytes={here}-"]
    assert_complete(models, archive)


# ------------------------------------------------------------------------------------------ two at once


@pytest.mark.slow
def test_two_processes_at_once(site: Site, models: Path, archive: bytes) -> None:
    site.stalls_after = 300_000
    command = [
        sys.executable,
        "-m",
        "plato2",
        "reply",
        "--generation",
        "24L",
        "--yes",
        "--max-tokens",
        "4",
        "hi",
    ]
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert site.stalled.wait(60)
    second = plato2("reply", "--generation", "24L", "--yes", "hi")
    assert second.returncode == 2
    assert_one_line(
        second.stderr, f"{models / '24L.tar'} is being written by another process (process {first.pid}"
    )
    site.go_on.set()
    assert first.communicate(timeout=120)[0]
    assert first.returncode == 0
    assert len(site.gets) == 1
    assert_complete(models, archive)


def test_a_killed_process_leaves_what_it_has(site: Site, models: Path, archive: bytes) -> None:
    site.stalls_after = 300_000
    part = models / "24L.tar.part"
    command = [sys.executable, "-m", "plato2", "reply", "--generation", "24L", "--yes", "hi"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as first:
        assert site.stalled.wait(60)
        while not part.exists() or part.stat().st_size < 100_000:
            site.go_on.wait(0.01)
        first.send_signal(signal.SIGKILL)
    site.stalls_after = None
    here = part.stat().st_size
    fetch()
    assert site.gets == [None, f"bytes={here}-"]
    assert_complete(models, archive)
