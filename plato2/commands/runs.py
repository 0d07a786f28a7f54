"""`plato2 runs`: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """List runs, compare them, draw their curves.

PLACES are run folders, or folders with runs below them; default: outputs. For each run: its
stage and steps, the run it started from, its best validation, and the keys in which it differs from the
others of its model and stage, the most telling ones; --json has all keys in which runs of a stage differ.

[bold]Examples[/]

plato2 runs

plato2 runs outputs/tiny-1_coarse --best --draw curves.png

plato2 runs outputs --stage 2_gen --metric val/ppl --json
"""


@app.command(help=HELP)
def runs(
    places: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders of runs.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only runs of this stage.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Compare and draw by this metric, instead of the stage's own.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="List the best of each stage first, not the newest.")
    ] = False,
    draw: Annotated[Path | None, typer.Option(help="Draw the metric over the steps into this image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Run the verb."""
    from plato2.config import UserError, did_you_mean
    from plato2.evaluate.runs import (
        TOLD,
        check_logged,
        compare,
        find_runs,
        plain,
        runs_tables,
        winners_first,
    )
    from plato2.evaluate.runs import draw as draw_runs
    from plato2.runs.folder import RunFolder

    paths = find_runs(places or [Path("outputs")])
    if stage is not None:
        stages = {path: str(RunFolder(path).lineage().get("stage")) for path in paths}
        if stage not in stages.values():
            known = sorted(set(stages.values()))
            raise UserError(f"--stage {stage}: no run of that stage there; {did_you_mean(stage, known)}")
        paths = [path for path in paths if stages[path] == stage]
    found = compare(paths, metric)
    if metric is not None:
        check_logged(found)
    if best:
        found = winners_first(found)
    if draw is not None:
        draw_runs(found, draw)
    if as_json:
        typer.echo(json.dumps(plain(found), ensure_ascii=False))
        return
    Console(highlight=False).print(*runs_tables(found, most=TOLD), sep="\n")
    if draw is not None:
        typer.echo(f"drawn: {draw}")
