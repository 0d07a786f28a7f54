"""`plato2 bench`: side-by-side measurements."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plato2.config import expand_path

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure preparing, training and talking side by side with other ways of doing it.",
)

Quick = Annotated[bool, typer.Option("--quick", help="A smoke test; its numbers mean nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DEFAULT_DATA = "data/chitchat"


@app.callback()
def _group() -> None:
    """Measure preparing, training and talking side by side with other ways of doing it."""


@app.command()
def train(
    data: Annotated[
        str | None,
        typer.Option(
            help="A prepared corpus; else data/chitchat, prepared in a temporary folder if need be."
        ),
    ] = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """The cost of a training step beside Hugging Face's GPT-2 and our own alternatives, in CPU seconds.

    Needs transformers (pip install transformers) and about ten minutes.
    """
    from plato2.bench.train import bench_train
    from plato2.data.shards import has_index

    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="plato2-bench-") as folder, console.status("starting") as status:
        if data is None:
            data = DEFAULT_DATA
            if not has_index(data):
                status.update("preparing chitchat")
                data = _prepare(Path(folder) / "chitchat")
        found = bench_train(
            expand_path(data, "--data"), quick, lambda text: status.update(f"measuring {text}")
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(_ratios(found, "Ratios (medians of alternating rounds, CPU seconds, one thread)"))
    costs = Table(title="CPU seconds for each 1,000 real tokens")
    for column in ("what", "side", "cost", "steps"):
        costs.add_column(column, justify="left" if column in ("what", "side") else "right")
    for name, part in found["parts"].items():
        for side, summary in part.items() if isinstance(part, dict) else ():
            if isinstance(summary, dict) and "steps" in summary:
                shown = f"{side} ({part['best_variant']})" if side == "huggingface" else side
                costs.add_row(name, shown, f"{summary['cpu_s_per_1000_tokens']:.3f}", str(summary["steps"]))
    console.print(costs)
    console.print(f"loader: {found['parts']['loader_samples_per_cpu_s']:,} samples/s of CPU time")
    _print_machine(found, console)


@app.command()
def generate(
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Finding and ranking 20 candidates beside Hugging Face's generate, and beside our own alternatives.

    Needs transformers (pip install transformers) and about five minutes.
    """
    from plato2.bench.generate import bench_generate

    with Console(stderr=True, highlight=False).status("starting") as status:
        found = bench_generate(quick, lambda text: status.update(f"measuring {text}"))
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(_ratios(found, "Ratios (medians of alternating rounds, wall seconds)"))
    seconds = Table(title="Milliseconds for one context (medians)")
    for column in ("what", "side", "ms"):
        seconds.add_column(column, justify="right" if column == "ms" else "left")
    for name, part in found["parts"].items():
        for side, value in {**part, **part.get("bounds", {})}.items():
            if side.endswith("_s"):
                seconds.add_row(name, side.removesuffix("_s"), f"{1000 * value:.0f}")
    console.print(seconds)
    _print_machine(found, console)


@app.command()
def serve(
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Requests a second and waiting times of a real server, with 1 client and with 16.

    Needs what plato2 serve needs (pip install '.\\[serve]') and about ten minutes.
    """
    from plato2.bench.serve import bench_serve

    with Console(stderr=True, highlight=False).status("starting") as status:
        found = bench_serve(quick, lambda text: status.update(f"measuring {text}"))
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(_ratios(found, "Ratios"))
    table = Table(title="Closed loop: a client sends its next request when it has its answer")
    for column in ("model", "clients", "requests", "a second", "median s", "99 % s", "statuses"):
        table.add_column(column, justify="left" if column in ("model", "statuses") else "right")
    for name, part in found["parts"].items():
        for clients, each in ((1, part["alone"]), (part["clients"], part["together"])):
            statuses = ", ".join(f"{status}: {n}" for status, n in each["statuses"].items())
            rate, median, p99 = (f"{each[key]:.2f}" for key in ("requests_per_s", "median_s", "p99_s"))
            table.add_row(name, str(clients), f"{each['requests']:,}", rate, median, p99, statuses)
    console.print(table)
    _print_machine(found, console)


@app.command()
def prepare(
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
    pieces: Annotated[int, typer.Option(help="Of the tokenizer whose training is measured apart.")] = 8_000,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep the dumps there, and use those that are there; else a temporary folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """CPU time, memory and disk of preparing Reddit: 1 and 2 workers, and Spark on the smallest set of dumps.

    Needs Linux, a few GB of disk and about half an hour; Spark needs Java and PySpark.
    """
    from plato2.bench.prepare import COMMENTS, ENGINES, bench_prepare

    engines = [name for name in engine or ENGINES if not (no_spark and name == "spark")]
    console = Console(stderr=True, highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="plato2-bench-") as temporary,
        console.status("starting") as status,
    ):
        where = folder or Path(temporary)
        found = bench_prepare(
            where.resolve(), comments or COMMENTS, engines, pieces, lambda text: status.update(escape(text))
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(_targets(found))
    parts = found["parts"]
    time, space = Table(title="All processes of a side"), Table(title="Memory at its highest; disk; result")
    _columns(time, ("side",), ("comments", "CPU s", "wall s", "µs CPU"))
    _columns(space, ("side",), ("comments", "MB", "anonymous MB", "work B", "result B"))
    space.add_column("digest")
    for side in sorted([*parts["plain_passes"], *parts["sides"]], key=lambda side: side["comments"]):
        start = [escape(side.get("side", "decompress, json.loads")), f"{side['comments']:,}"]
        if "failed" in side:
            time.add_row(*start, "failed")
            continue
        time.add_row(*start, *(f"{side[key]:,.1f}" for key in ("cpu_s", "wall_s", "cpu_us_a_comment")))
        if "side" in side:
            memory = [f"{side[key]:,.0f}" for key in ("peak_mb", "peak_anonymous_mb")]
            disk = [f"{side[key] / side['comments']:.1f}" for key in ("peak_work_bytes", "result_bytes")]
            space.add_row(*start, *memory, *disk, side["digest"][:8])
    console.print(time)
    console.print(space)
    lines = ["µs CPU, work B (the work folder at its biggest) and result B are for each comment."]
    lines += [f"{side['side']} failed: {side['failed']}" for side in parts["sides"] if "failed" in side]
    lines += [f"{name} was left out: {why}" for name, why in parts["left_out"].items()]
    trained, whole = parts["tokenizer"], parts["all_of_reddit"]
    lines.append(
        f"A tokenizer of {trained['pieces']:,} pieces would be {trained['cpu_s']:.1f} CPU seconds more "
        f"({trained['comments']:,} comments, {trained['peak_mb']:,.0f} MB)."
    )
    if whole is not None:
        lines.append(
            f"In proportion, {whole['assumed_comments'] / 1e9:g} billion comments (assumed; "
            f"{whole['input_tb']:.1f} TB of lines) are {whole['core_hours']:,.0f} core-hours, "
            f"{whole['work_tb']:.2f} TB of work folder and {whole['shards_tb']:.2f} TB of shards."
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    _print_machine(found, console)


def _targets(found: dict[str, Any]) -> Table:
    """Every ratio beside its target."""
    table = Table(title="Targets")
    _columns(table, ("what",), ("found", "target"))
    table.add_column("")
    words = {True: "met", False: "MISSED", None: ""}
    for name, value in found["ratios"].items():
        shown = "not measured" if value is None else f"{value:g}"
        table.add_row(name, shown, found["targets"].get(name, ""), words[found["met"].get(name)])
    return table


def _columns(table: Table, left: tuple[str, ...], right: tuple[str, ...]) -> None:
    for column in (*left, *right):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in left)


def _prepare(out: Path) -> str:
    from plato2.prepare.dialogues import prepare
    from plato2.prepare.options import PrepareOptions

    return str(prepare(PrepareOptions(corpus="chitchat", out=str(out))))


def _ratios(found: dict[str, Any], title: str) -> Table:
    table = Table(title=title)
    for column in ("what", "ratio", "target", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    words = {True: "yes", False: "no", None: ""}
    for name, value in found["ratios"].items():
        shown = "not measured" if value is None else f"{value:.2f}"
        table.add_row(name, shown, found["targets"].get(name, ""), words[found["met"].get(name)])
    return table


def _print_machine(found: dict[str, Any], console: Console) -> None:
    machine = found["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}, "
        f"torch {machine['torch']}, {machine['threads']} threads; {found['wall_s']:.0f} s",
        markup=False,
    )
