"""Locks that real processes hold, lose and take over; hashes beside files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import make_run
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.files import check_sha256, file_sha256, lock_file, locked, read_sha256, write_sha256

ROOT = Path(__file__).parents[2]
HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
import plato2.files
lock, how = Path(sys.argv[1]), sys.argv[2:]
if "no-flock" in how:  # as a file system without locks answers
    plato2.files.LEASE_S = 2.0
    def flock(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    fcntl.flock = flock
with plato2.files.locked(lock, "the thing", "name another"):
    if "fork" in how and os.fork() == 0:  # a worker that outlives its parent
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    if "stay" in how:
        time.sleep(600)
"""


def start(lock: Path, *how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(lock), *how]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def holding(lock: Path, *how: str) -> subprocess.Popen[str]:
    process = start(lock, "stay", *how)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("no-flock",)], ids=["flock", "no flock"])
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, how: tuple[str, ...]) -> None:
    lock = tmp_path / "lock"
    process = holding(lock, "fork", *how)
    try:
        _, told = start(lock, *how).communicate(timeout=60)
        last = told.splitlines()[-1]
        assert "waiting" not in told  # it is known to live
        assert f"the thing is being written by another process (process {process.pid}" in last
        assert "name another" in last
        if not how:
            signed = rf"process {process.pid} on .* since 20.*: -c .*lock stay fork"
            with pytest.raises(UserError, match=signed):
                locked(lock, "it").__enter__()
        process.kill()
        process.wait()
        assert start(lock, *how).communicate(timeout=60) == ("held\n", "")  # though its worker lives on
    finally:
        end(process)
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_machine_left_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": 1, "host": "another", "since": "2026", "command": "train.py"}))
    with locked(lock, "it"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


@pytest.mark.slow
def test_a_live_lease_is_kept_and_a_dead_machines_ends(tmp_path: Path) -> None:
    """A holder of another machine cannot be asked whether it lives; its lease is no longer renewed."""
    process = holding(tmp_path / "lock", "no-flock")
    lease = tmp_path / "lock.lease"
    signed = lease.read_text()
    end(process)
    lease.write_text(signed.replace(os.uname().nodename, "another"))
    held, told = start(tmp_path / "lock", "no-flock").communicate(timeout=60)
    assert held == "held\n"
    assert told == "the thing: another process holds it, or died: waiting 12 s at most\n"


@pytest.mark.slow
def test_a_holder_that_hung_ends_when_another_has_taken_over(tmp_path: Path) -> None:
    """As one on another machine that was asleep: of two that write the first to know stops."""
    process = holding(tmp_path / "lock", "no-flock")
    process.send_signal(signal.SIGSTOP)
    lease = tmp_path / "lock.lease"
    lease.write_text(lease.read_text().replace(os.uname().nodename, "another"))
    second = holding(tmp_path / "lock", "no-flock")
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    taken = "error: the thing: another process has taken it over while this one hung (owner-changed); stopped"
    assert told == f"{taken}\n"
    assert second.poll() is None
    assert lease.exists()
    end(second)


@pytest.mark.parametrize(
    "command",
    [
        "tokenizer train {tmp}/lines.txt --pieces 30 --out {tmp}/out",
        "score {tmp}/pairs.tsv --evaluation {model} --device cpu --out {tmp}/out",
    ],
)
def test_a_verb_does_not_write_what_another_process_writes(tmp_path: Path, command: str) -> None:
    (tmp_path / "lines.txt").write_text("hello you\n" * 9)
    (tmp_path / "pairs.tsv").write_text("hello\tyou\n")
    model = make_run(tmp_path / "2_eval", "2_eval")
    words = command.format(tmp=tmp_path, model=model).split()

    process = holding(lock_file(tmp_path / "out"))
    done = CliRunner().invoke(app, words)
    end(process)
    assert done.exit_code == 2, done.stderr
    assert (
        f"error: --out {tmp_path}/out is being written by another process (process {process.pid}"
        in done.stderr
    )
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "out").exists()
    assert not lock_file(tmp_path / "out").exists()


def test_other_errors_are_not_a_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        locked(tmp_path / "file" / "lock", "it").__enter__()


def test_the_hash_beside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "a.bin", tmp_path / "b"
    folder.mkdir()
    for path, inside in ((file, file), (folder, folder / "part")):
        inside.write_bytes(b"whole")
        check_sha256(path, "no hash, nothing to compare")
        write_sha256(path)
        assert read_sha256(path) == [file_sha256(path)]
        check_sha256(path, "")
        inside.write_bytes(b"whale")
        with pytest.raises(UserError, match=f"{path}: damaged: .*sha256.*; mend it"):
            check_sha256(path, "mend it")
        write_sha256(path, *read_sha256(path), file_sha256(path))  # while one takes the place of the other
        check_sha256(path, "")
        inside.write_bytes(b"whole")
        check_sha256(path, "")
        inside.write_bytes(b"whule")
        monkeypatch.setenv("PLATO2_CHECK_HASHES", "0")
        check_sha256(path, "")
        monkeypatch.delenv("PLATO2_CHECK_HASHES")
    done = subprocess.run(["sha256sum", "-c", "a.bin.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert "a.bin: FAILED" in done.stdout
