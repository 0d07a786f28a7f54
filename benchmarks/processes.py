"""What a command takes, all processes that it starts included: CPU time, memory, disk. Linux only: /proc.

- The command has a session of its own. CPU time is the kernel's account of the processes that ended
  (`wait4`), theirs that they waited for included; orphans come to us, because we are their "subreaper". So
  the JVM and Spark's Python workers count, and no sampling can miss a process.
- Memory is the sum of PSS over the session (what several processes share counts once), and of its anonymous
  part (without mapped files), read five times a second: a shorter peak is missed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizer", "nodes", "repeated", "shards")
"""Beginnings of the names of the folders that the stages of `plato2 prepare reddit` make in the work folder,
in their order."""
SAMPLE_S = 0.2
LINGER_S = 30.0
"""Seconds after which processes that outlive their command are killed."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class Process(NamedTuple):
    """A line of /proc/*/stat."""

    pid: int
    state: str
    parent: int
    cpu_s: float
    """Of the process and of those it has waited for."""


@dataclass
class Measured:
    """What a command took."""

    exit_code: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    peak_anonymous_bytes: int = 0
    peak_work_bytes: int = 0
    marks: dict[str, float] = field(default_factory=dict)
    """CPU seconds when the folder of a stage was first seen."""
    stdout: str = ""
    stderr: str = ""

    @property
    def stages(self) -> dict[str, float]:
        """CPU seconds of each stage; `start` comes before all, the last one takes in index and data card."""
        names, borders = ["start", *self.marks], [0.0, *self.marks.values(), self.cpu_s]
        return {name: round(borders[i + 1] - borders[i], 2) for i, name in enumerate(names)}

    @property
    def last_word(self) -> str:
        """The last line of what it said to the user."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1].strip().removeprefix("error: ") if lines else "it said nothing"


def measure(
    command: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    work: Path | None = None,
    until: str | None = None,
) -> Measured:
    """Run a command in the folder of this checkout, to its end and that of all it started.

    Args:
        say: told how far it is.
        work: folder whose size is watched, and the folders of stages in it.
        until: the stage at whose beginning everything is killed.
    """
    found, begin, cpu_of_reaped = Measured(), time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, _adopting_orphans():
        root = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, start_new_session=True
        )
        ended = os.pidfd_open(root.pid)
        try:
            while processes := _session(root.pid):
                # The highest sum: CPU of a process that nobody waits for is lost to the account.
                found.cpu_s = max(found.cpu_s, cpu_of_reaped + sum(process.cpu_s for process in processes))
                _watch_memory(found, processes)
                if work is not None:
                    watch_work(found, work)
                now = time.perf_counter()
                stage = next(reversed(found.marks), "start")
                say(f"{stage}, {now - begin:.0f} s, {found.peak_bytes / 1e6:,.0f} MB")
                for process in processes:
                    if process.state == "Z" and process.parent == os.getpid():
                        _, status, usage = os.wait4(process.pid, 0)
                        cpu_of_reaped += usage.ru_utime + usage.ru_stime
                        if process.pid == root.pid:
                            root.returncode = found.exit_code = os.waitstatus_to_exitcode(status)
                            found.wall_s = now - begin
                lingers = root.returncode is not None and now - begin > found.wall_s + LINGER_S
                if lingers or until in found.marks:
                    _kill(root.pid)
                if root.returncode is None:
                    select.select([ended], [], [], SAMPLE_S)  # its end is noticed at once
                elif _session(root.pid):
                    time.sleep(SAMPLE_S)
            found.cpu_s = max(found.cpu_s, cpu_of_reaped)
            found.stdout, found.stderr = _text(out), _text(err)
        except BaseException:  # such as Ctrl-C, which does not reach another session
            _kill(root.pid)
            root.wait()
            raise
        finally:
            os.close(ended)
    return found


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Processes whose parent ended become our children, not those of the system's first process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SUBREAPER, 0, 0, 0, 0)


def _session(leader: int) -> list[Process]:
    """All processes of a session, those that ended and were not waited for too."""
    processes, tick = [], os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while it is read
            fields = (path / "stat").read_text().rpartition(")")[2].split()  # a name may have blanks
            if int(fields[3]) == leader:
                ticks = sum(map(int, fields[11:15]))
                processes.append(Process(int(path.name), fields[0], int(fields[1]), ticks / tick))
    return processes


def _kill(leader: int) -> None:
    for process in _session(leader):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _watch_memory(found: Measured, processes: list[Process]) -> None:
    total = anonymous = 0
    for process in processes:
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            sizes = dict(line.split()[:2] for line in text.splitlines()[1:])
            total += 1024 * int(sizes["Pss:"])
            anonymous += 1024 * int(sizes["Pss_Anon:"])
    found.peak_bytes = max(found.peak_bytes, total)
    found.peak_anonymous_bytes = max(found.peak_anonymous_bytes, anonymous)


def watch_work(found: Measured, work: Path) -> None:
    """Its size, and the stages that have begun."""
    found.peak_work_bytes = max(found.peak_work_bytes, size_of(work))
    for stage in STAGES:
        if stage not in found.marks and any(work.glob(f"{stage}-*")):
            found.marks[stage] = found.cpu_s


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, in which others may be at work."""
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(where, name)).st_size
    return size


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
