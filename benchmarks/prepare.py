"""`python -m benchmarks.prepare`: what `plato2 prepare reddit` costs; all sides have to find one digest.

The choices:

- Made-up dumps (reddit_dumps.py) of a few sizes, so that what grows with the corpus is seen to grow.
- Every side is the real command, and all of its processes count (processes.py). The goal for memory is for
  what comes on top of the window that the dumps demand.
- The tokenizer is given, Knover's. What sampling messages and training one cost is measured once, apart.
- The yardstick is a pass that only decompresses and calls `json.loads` (plain_pass.py), a process too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata, resources, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.processes import SAMPLE_S, Measured, measure, size_of, watch_work
from benchmarks.report import Command, Say, Target, machine, progress, report, show, table
from plato2.commands import main
from plato2.config import UserError, expand_path, install

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


# -- the benchmark -----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where it works, and what has been found so far."""

    folder: Path
    say: Say
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
            made = [str(folder), str(n), str(MONTHS), str(SEED)]
            self.check(title, self.measure(title, [sys.executable, "-m", "benchmarks.reddit_dumps", *made]))
            known = json.loads(path.read_text(encoding="utf-8"))
        return known, [folder / name for name in known["files"]]

    def plain_pass(self, n: int, files: list[Path], n_lines: int) -> dict[str, Any]:
        """The yardstick."""
        title = f"plain pass over {n:,} comments"
        command = [sys.executable, "-m", "benchmarks.plain_pass", *map(str, files)]
        measured = self.measure(title, command)
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
                    "peak_work_bytes": max(measured.peak_work_bytes, size_of(work)),
                    "result_bytes": size_of(out),
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
            watch_work(measured, work)  # the last stages of a small corpus end between two looks
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
    say: Say = lambda text: None,
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
        "settings": _settings(sizes, engines),
        "wall_s": round(time.monotonic() - begin, 1),
    }


def _settings(sizes: list[int], engines: Sequence[str]) -> dict[str, Any]:
    return {
        "comments": sizes,
        "engines": list(engines),
        "months": MONTHS,
        "seed": SEED,
        "sample_s": SAMPLE_S,
        "versions": _versions(),
    }


def _check(sizes: list[int], engines: Sequence[str]) -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("python -m benchmarks.prepare reads /proc: it needs Linux")
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


# ---------------------------------------------------------------------------------------- the command line

HELP = """CPU time, memory and disk of preparing Reddit: 1 and 2 workers, and Spark on the smallest dumps.

Needs Linux, a few GB of disk and about half an hour; Spark needs Java and PySpark.

[bold]Examples[/]

python -m benchmarks.prepare

python -m benchmarks.prepare --comments 200000 --no-spark --json

python -m benchmarks.prepare --folder dumps
"""
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command, help=HELP)
def run(
    comments: Annotated[
        list[int] | None,
        typer.Option(
            help="Comments of a set of dumps; may be repeated.", show_default="1,000,000 and 3,000,000"
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="local or spark; may be repeated.", show_default="both"),
    ] = None,
    no_spark: Annotated[bool, typer.Option("--no-spark", help="The same as --engine local.")] = False,
    pieces: Annotated[int, typer.Option(help="Of the tokenizer whose training is measured apart.")] = PIECES,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep the dumps there, and use those that are there; else a temporary folder."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """`python -m benchmarks.prepare`."""
    engines = [name for name in engine or ENGINES if not (no_spark and name == "spark")]
    with tempfile.TemporaryDirectory(prefix="plato2-bench-") as temporary, progress() as say:
        where = Path(expand_path(str(folder or temporary), "--folder"))
        found = bench_prepare(where.resolve(), comments or COMMENTS, engines, pieces, say)
    show(found, as_json, "Targets", details(found["parts"]))


def details(parts: dict[str, Any]) -> Iterator[Table | str]:
    """What every side took, what failed or was left out, and what all of Reddit would take."""
    times = table("All processes of a side", ("side",), ("comments", "CPU s", "wall s", "µs CPU"))
    space = table(
        "Memory at its highest; disk; result",
        ("side",),
        ("comments", "MB", "anonymous MB", "work B", "result B", "digest"),
    )
    for side in sorted([*parts["plain_passes"], *parts["sides"]], key=lambda side: side["comments"]):
        start = [side.get("side", "decompress, json.loads"), f"{side['comments']:,}"]
        if "failed" in side:
            times.add_row(*start, "failed")
            continue
        times.add_row(*start, *(f"{side[key]:,.1f}" for key in ("cpu_s", "wall_s", "cpu_us_a_comment")))
        if "side" in side:
            memory = [f"{side[key]:,.0f}" for key in ("peak_mb", "peak_anonymous_mb")]
            disk = [f"{side[key] / side['comments']:.1f}" for key in ("peak_work_bytes", "result_bytes")]
            space.add_row(*start, *memory, *disk, side["digest"][:8])
    yield from (times, space)
    yield "µs CPU, work B (the work folder at its biggest) and result B are for each comment."
    yield from (f"{side['side']} failed: {side['failed']}" for side in parts["sides"] if "failed" in side)
    yield from (f"{name} was left out: {why}" for name, why in parts["left_out"].items())
    trained, whole = parts["tokenizer"], parts["all_of_reddit"]
    yield (
        f"A tokenizer of {trained['pieces']:,} pieces would be {trained['cpu_s']:.1f} CPU seconds more "
        f"({trained['comments']:,} comments, {trained['peak_mb']:,.0f} MB)."
    )
    if whole is not None:
        yield (
            f"In proportion, {whole['assumed_comments'] / 1e9:g} billion comments (assumed; "
            f"{whole['input_tb']:.1f} TB of lines) are {whole['core_hours']:,.0f} core-hours, "
            f"{whole['work_tb']:.2f} TB of work folder and {whole['shards_tb']:.2f} TB of shards."
        )


if __name__ == "__main__":
    main(app, "python -m benchmarks.prepare")
