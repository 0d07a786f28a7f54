"""Measurements of `plato2 prepare reddit`: CPU time, memory and disk; the same digest on all sides.

The choices:

- Made-up dumps (dumps.py), of a few numbers of comments, so that what grows with the corpus is seen to grow.
- Every side is the real command in a session of its own. CPU time is the kernel's account of the processes
  that ended (`wait4`), theirs that they waited for included; orphans come to us, because we are their
  "subreaper". So the JVM and Spark's Python workers count, and no sampling can miss a process.
- Memory is the sum of PSS over the session (what several processes share counts once), and of its anonymous
  part (without mapped files), read five times a second: a shorter peak is missed. The goal is for what comes
  on top of the window that the dumps demand.
- The tokenizer is given, Knover's. What sampling messages and training one cost is measured once, apart.
- The yardstick is a pass that only decompresses and calls `json.loads`, a process too.

Linux only: all of that is in /proc. `python -m plato2.bench.prepare` is for the processes started here.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata, resources, util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from plato2.config import UserError, install

if TYPE_CHECKING:  # torch comes with it, and would be most of the time of the plain pass
    from plato2.bench.report import Target

COMMENTS = (1_000_000, 3_000_000)
TARGETS: dict[str, Target] = {
    "cpu_us_a_comment": ("<=", 80.0),
    "peak_gb_beyond_window": ("<=", 2.0),
    "digests": ("<=", 1.0),
}
"""What the project holds itself to at every number of comments: the worst of the local sides, GB of 10^9
bytes; different digests among all sides."""
WINDOW = 2**31
"""Bytes of text that a reader of the dumps keeps; of a shorter file, as many as it has."""
ENGINES = ("local", "spark")
FEWEST = 1_000
"""Comments of which something is left for training and for validation."""
MONTHS, SEED = 3, 7
PIECES = 8_000

REDDIT_COMMENTS = 6.0e9
"""Comments of 2005-12 to 2019-07, the paper's months: an assumption. Baumgartner et al. 2020, The Pushshift
Reddit Dataset, count 5.6e9 from 2005-06 to 2019-04."""
REDDIT_LINE_BYTES = 590.0
"""Bytes of a line: an assumption, May 2015: 54.5 million comments in 32 GB. Older lines are shorter, newer
ones longer."""

STAGES = ("tokenizer", "nodes", "repeated", "shards")
"""Beginnings of the names of the folders that the stages make in the work folder, in their order."""
SAMPLE_S = 0.2
LINGER_S = 30.0
"""Seconds after which processes that outlive their command are killed."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


@dataclass(frozen=True)
class Side:
    """A way to run the command."""

    name: str
    engine: str
    options: tuple[str, ...]


LOCAL = (
    Side("local, 1 worker", "local", ("--workers", "1")),
    Side("local, 2 workers", "local", ("--workers", "2")),
)
SPARK = tuple(
    Side(f"spark {master}", "spark", ("--engine", "spark", "--master", master))
    for master in ("local[2]", "local-cluster[2,1,1024]")
)


# -- a command and all processes that it starts ------------------------------------------------------------


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
    """Run a command to its end and that of all it started.

    Args:
        say: told how far it is.
        work: folder whose size is watched, and the folders of stages in it.
        until: the stage at whose beginning everything is killed.
    """
    found, begin, cpu_of_reaped = Measured(), time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, _adopting_orphans():
        root = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        ended = os.pidfd_open(root.pid)
        try:
            while processes := _session(root.pid):
                # The highest sum: CPU of a process that nobody waits for is lost to the account.
                found.cpu_s = max(found.cpu_s, cpu_of_reaped + sum(process.cpu_s for process in processes))
                _watch_memory(found, processes)
                if work is not None:
                    _watch_work(found, work)
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


def _watch_work(found: Measured, work: Path) -> None:
    found.peak_work_bytes = max(found.peak_work_bytes, _size(work))
    for stage in STAGES:
        if stage not in found.marks and any(work.glob(f"{stage}-*")):
            found.marks[stage] = found.cpu_s


def _size(folder: Path) -> int:
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


# -- what is started besides the command itself ------------------------------------------------------------


def write(folder: str, n_comments: str) -> None:
    """Write dumps, and when they are whole what is in them."""
    from plato2.bench.dumps import write_dumps

    facts = write_dumps(Path(folder), int(n_comments), months=MONTHS, seed=SEED, compression="zst")
    known = {
        "comments": facts.n_comments,
        "lines": facts.n_comments + facts.duplicates,
        "bytes": facts.n_bytes,
        "stored_bytes": sum(path.stat().st_size for path in facts.comments),
        "files": [path.name for path in facts.comments],
        "made_by": [MONTHS, SEED],
    }
    (Path(folder) / "facts.json").write_text(json.dumps(known), encoding="utf-8")


def plain_pass(*files: str) -> None:
    """Decompress, `json.loads` every line, and say how many there were, and the bytes of the longest file."""
    import zstandard

    n_lines = longest = 0
    for name in files:
        n_bytes = 0
        with open(name, "rb") as file:
            reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(file)
            for line in io.BufferedReader(reader, 1 << 18):
                json.loads(line)
                n_lines += 1
                n_bytes += len(line)
        longest = max(longest, n_bytes)
    print(n_lines, longest)


# -- the benchmark -----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where it works, and what has been found so far."""

    folder: Path
    say: Callable[[str], None]
    tokenizer: str
    sides: list[dict[str, Any]] = field(default_factory=list)

    def dumps(self, n: int) -> tuple[dict[str, Any], list[Path]]:
        """(what is in them, files) of dumps of n comments, written unless they are there."""
        folder = self.folder / f"{n}-comments" / "dumps"
        path = folder / "facts.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("made_by") != [MONTHS, SEED]:
            folder.mkdir(parents=True, exist_ok=True)
            title = f"writing dumps of {n:,} comments"
            self.check(title, self.measure(title, _ours("write", str(folder), str(n))))
            known = json.loads(path.read_text(encoding="utf-8"))
        return known, [folder / name for name in known["files"]]

    def plain_pass(self, n: int, files: list[Path], n_lines: int) -> dict[str, Any]:
        """The yardstick."""
        title = f"plain pass over {n:,} comments"
        measured = self.measure(title, _ours("plain_pass", *map(str, files)))
        self.check(title, measured)
        n_read, longest = map(int, measured.stdout.split())
        if n_read != n_lines:
            raise UserError(f"{files[0].parent}: {n_lines:,} lines were written and {n_read:,} read")
        return {"comments": n, **_costs(measured, n), "window_mb": round(min(WINDOW, longest) / 1e6, 1)}

    def run(self, side: Side, n: int, files: list[Path]) -> None:
        """One side; when it fails, its last line is kept and the others go on."""
        title = f"{side.name}, {n:,} comments"
        with self.command(n, files, "--tokenizer", self.tokenizer, *side.options) as (command, out, work):
            measured = self.measure(title, command, work)
            result: dict[str, Any] = {"side": side.name, "engine": side.engine, **_costs(measured, n)}
            if measured.exit_code:
                result = {"side": side.name, "engine": side.engine, "failed": measured.last_word}
            else:
                said = json.loads(measured.stdout)
                result |= {key: said[key] for key in ("digest", "samples")}
                result |= {
                    "stages_cpu_s": measured.stages,
                    "peak_work_bytes": max(measured.peak_work_bytes, _size(work)),
                    "result_bytes": _size(out),
                }
        self.sides.append({"comments": n, **result})

    def train_tokenizer(self, n: int, files: list[Path], pieces: int) -> dict[str, Any]:
        """Sampling and training: the command without a tokenizer, until it begins to clean."""
        options = ["--vocab-pieces", str(pieces), "--workers", "1"]
        title = f"training {pieces:,} pieces"
        with self.command(n, files, *options) as (command, _, work):
            measured = self.measure(title, command, work, until="nodes")
        if "nodes" not in measured.marks:
            raise UserError(f"{title}: {measured.last_word}")
        cpu_s = measured.stages["tokenizer"]
        return {
            "comments": n,
            "pieces": pieces,
            "cpu_s": cpu_s,
            "peak_mb": round(measured.peak_bytes / 1e6, 1),
        }

    @contextmanager
    def command(self, n: int, files: list[Path], *options: str) -> Iterator[tuple[list[str], Path, Path]]:
        """(command, its result, its work folder); both folders are empty before and gone afterwards."""
        out, work = (self.folder / f"{n}-comments" / name for name in ("out", "out.work"))
        inputs = [word for path in files for word in ("--comments", str(path))]
        ours = [sys.executable, "-m", "plato2", "prepare", "reddit", *inputs, "--out", str(out)]
        # Kept: its size and its stages are looked at again when the command has ended.
        for folder in (out, work):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            yield [*ours, "--work", str(work), "--keep-work", "--json", *options], out, work
        finally:
            for folder in (out, work):
                shutil.rmtree(folder, ignore_errors=True)

    def measure(
        self, title: str, command: list[str], work: Path | None = None, until: str | None = None
    ) -> Measured:
        """`measure` that says what it is at."""
        measured = measure(command, lambda text: self.say(f"{title}: {text}"), work, until)
        if work is not None:
            _watch_work(measured, work)  # the last stages of a small corpus end between two looks
        return measured

    def check(self, title: str, measured: Measured) -> None:
        """What everything else needs has to have worked."""
        if measured.exit_code:
            raise UserError(f"{title}: {measured.last_word}")

    def worst(self, n: int, key: str, engine: str | None = None) -> float | None:
        """The highest value of the sides at n comments."""
        values = [side[key] for side in self.sides_at(n, engine) if key in side]
        return max(values) if values else None

    def sides_at(self, n: int, engine: str | None = None) -> list[dict[str, Any]]:
        """Sides that ran on n comments."""
        return [side for side in self.sides if side["comments"] == n and engine in (None, side["engine"])]


def bench_prepare(
    folder: Path,
    comments: Sequence[int] = COMMENTS,
    engines: Sequence[str] = ENGINES,
    pieces: int = PIECES,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """CPU time, memory and disk of preparing dumps, the machine and the settings.

    Args:
        folder: dumps are written there, or found from another time.
        comments: of each set of dumps.
        engines: those to measure; Spark on the smallest set alone, and only where Java and PySpark are.
        pieces: of the tokenizer whose training is measured apart.
        say: told what is being measured.

    Raises:
        UserError: a value that cannot be, or dumps that cannot be written or read.
    """
    from plato2.bench.report import machine, report

    sizes, begin = sorted(set(comments)), time.monotonic()
    _check(sizes, engines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder={folder}: {error.strerror}") from None
    measured_on = machine()  # at the beginning: its load average is that of others
    left_out = {"spark": why} if "spark" in engines and (why := _no_spark()) else {}
    parts: dict[str, Any] = {"dumps": [], "plain_passes": []}
    ratios: dict[str, float | None] = {}
    with resources.as_file(resources.files("plato2.weights") / "knover_english") as tokenizer:
        bench = Bench(folder, say, str(tokenizer))
        for n in sizes:
            known, files = bench.dumps(n)
            plain = bench.plain_pass(n, files, known["lines"])
            parts["dumps"].append(known)
            parts["plain_passes"].append(plain)
            if n == sizes[0]:
                parts["tokenizer"] = bench.train_tokenizer(n, files, pieces)
            for side in (*LOCAL, *SPARK):
                if side.engine not in engines or side.engine in left_out:
                    continue
                if side.engine == "local" or n == sizes[0]:
                    bench.run(side, n, files)
            ratios |= _ratios(bench, n, plain)
    ratios["failed_sides"] = float(sum("failed" in side for side in bench.sides))
    targets = {f"{name}_at_{n}": target for n in sizes for name, target in TARGETS.items()}
    return {
        **report(ratios, {**targets, "failed_sides": ("<=", 0.0)}),
        "parts": {
            **parts,
            "sides": bench.sides,
            "left_out": left_out,
            "all_of_reddit": _all_of_reddit(bench),
        },
        "machine": measured_on,
        "settings": {
            "comments": sizes,
            "engines": list(engines),
            "months": MONTHS,
            "seed": SEED,
            "sample_s": SAMPLE_S,
            "versions": _versions(),
        },
        "wall_s": round(time.monotonic() - begin, 1),
    }


def _check(sizes: list[int], engines: Sequence[str]) -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("plato2 bench prepare reads /proc: it needs Linux")
    for n in sizes:
        if n < FEWEST:
            raise UserError(f"comments={n}: must be at least {FEWEST:,}")
    if not engines:
        raise UserError("no engine is left to measure: --no-spark is for --engine local")
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}")


def _no_spark() -> str | None:
    """Why Spark cannot run here."""
    home = os.environ.get("JAVA_HOME")
    if util.find_spec("pyspark") is None:
        return f"PySpark is not installed: {install('spark')}"
    if shutil.which("java", path=f"{home}/bin" if home else None) is None:
        return "there is no Java"
    return None


def _ratios(bench: Bench, n: int, plain: dict[str, Any]) -> dict[str, float | None]:
    """What is compared at n comments; None where no side ran."""
    peak = bench.worst(n, "peak_mb", "local")
    ours = next((side for side in bench.sides_at(n, "local") if "cpu_s" in side), None)
    digests = {side["digest"] for side in bench.sides_at(n) if "digest" in side}
    return {
        f"cpu_us_a_comment_at_{n}": bench.worst(n, "cpu_us_a_comment", "local"),
        f"peak_gb_beyond_window_at_{n}": None
        if peak is None
        else round((peak - plain["window_mb"]) / 1000, 3),
        f"digests_at_{n}": float(len(digests)) if digests else None,
        f"cpu_over_plain_pass_at_{n}": None if ours is None else round(ours["cpu_s"] / plain["cpu_s"], 2),
    }


def _costs(measured: Measured, n: int) -> dict[str, float]:
    return {
        "cpu_s": round(measured.cpu_s, 2),
        "wall_s": round(measured.wall_s, 2),
        "cpu_us_a_comment": round(1e6 * measured.cpu_s / n, 2),
        "peak_mb": round(measured.peak_bytes / 1e6, 1),
        "peak_anonymous_mb": round(measured.peak_anonymous_bytes / 1e6, 1),
    }


def _all_of_reddit(bench: Bench) -> dict[str, float] | None:
    """What the biggest run with one worker comes to, comment for comment: no more than a proportion."""
    ran = [side for side in bench.sides if side["side"] == LOCAL[0].name and "cpu_s" in side]
    if not ran:
        return None
    n = ran[-1]["comments"]
    times = REDDIT_COMMENTS / n
    return {
        "from_comments": n,
        "assumed_comments": REDDIT_COMMENTS,
        "assumed_line_bytes": REDDIT_LINE_BYTES,
        "input_tb": round(REDDIT_COMMENTS * REDDIT_LINE_BYTES / 1e12, 2),
        "core_hours": round(ran[-1]["cpu_s"] * times / 3600, 1),
        "work_tb": round(ran[-1]["peak_work_bytes"] * times / 1e12, 3),
        "shards_tb": round(ran[-1]["result_bytes"] * times / 1e12, 3),
    }


def _versions() -> dict[str, str]:
    names = ("duckdb", "orjson", "pyarrow", "pyspark", "sentencepiece", "zstandard")
    found = {"python": sys.version.split()[0]}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _ours(function: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "plato2.bench.prepare", function, *arguments]


if __name__ == "__main__":
    functions: dict[str, Callable[..., None]] = {"write": write, "plain_pass": plain_pass}
    functions[sys.argv[1]](*sys.argv[2:])
