"""`plato2 report`: what runs and evaluations reached, on one page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from plato2.config import UserError

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Show what runs and evaluations reached.

PLACES are folders with runs or with results of plato2 evaluate, folders of sweeps (outputs/sweeps/NAME), or
result files; default: the last curriculum in outputs. All of it becomes one page: points of a sweep, curves,
the paper's tables with its numbers beside ours, every evaluation with its intervals, dialogues side by side,
settings, versions and hashes, and what is missing.
--out writes it as HTML (one file, offline, printable) or as Markdown; else it is printed.

With --data the models of a curriculum are looked at closer, instead: perplexity next to a unigram baseline,
the choice of a response among ten next to chance and shared words, the latents, and the candidates for a few
validation contexts next to what a human said.

[bold]Examples[/]

plato2 report

plato2 report outputs results --out report.html

plato2 report outputs/sweeps/20261122-101500 --out sweep.html

plato2 report --coarse outputs/tiny-1_coarse/RUN --generation outputs/tiny-2_gen/RUN
--evaluation outputs/tiny-2_eval/RUN --data data/chitchat --json
"""
CLOSER = "A curriculum, closer"


@app.command(help=HELP)
def report(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs or results, or result files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the page, .html or .md.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "plato2 report",
    wandb: Annotated[
        str | None, typer.Option(help="Also log it to this project of Weights & Biases.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The prepared corpus of the runs.", rich_help_panel=CLOSER)
    ] = None,
    coarse: Annotated[
        Path | None, typer.Option(help="Run, checkpoint or model folder of 1_coarse.", rich_help_panel=CLOSER)
    ] = None,
    generation: Annotated[
        Path | None, typer.Option(help="The same for 2_gen or plato.", rich_help_panel=CLOSER)
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="The same for 2_eval.", rich_help_panel=CLOSER)
    ] = None,
    contexts: Annotated[
        int, typer.Option(min=0, help="Validation contexts to answer.", rich_help_panel=CLOSER)
    ] = 3,
    latent_contexts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Validation contexts on which to measure how candidates differ.",
            rich_help_panel=CLOSER,
        ),
    ] = 0,
    human_contexts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Validation contexts whose human reply is ranked among candidates.",
            rich_help_panel=CLOSER,
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the verb."""
    from plato2.report.curriculum import Part

    given: dict[Part, Path | None] = {"coarse": coarse, "generation": generation, "evaluation": evaluation}
    runs = {part: run for part, run in given.items() if run}
    if data is None and runs:
        raise UserError(f"--{next(iter(runs))}: give the corpus of the runs too, --data DIR")
    if data is None:
        page(places, out, title, wandb, as_json)
    elif places or out or wandb:
        raise UserError(
            f"--data {data}: looks closer at one curriculum; leave out folders, --out and --wandb"
        )
    else:
        closer(data, runs, (contexts, latent_contexts, human_contexts), as_json)


def page(places: list[Path] | None, out: Path | None, title: str, wandb: str | None, as_json: bool) -> None:
    """Finds what lies there and writes, prints or logs the page."""
    from plato2.report.found import Found, find, last_curriculum
    from plato2.report.page import check_name, html, show, write
    from plato2.report.ranks import rank_facts
    from plato2.report.sections import sections

    if out is not None:
        check_name(out)
    found = find(places) if places else Found(last_curriculum(Path("outputs")), [])
    made = sections(found)
    written = [] if out is None else write(out, title, made)
    if wandb is not None:
        from plato2.report.wandb import log

        log(wandb, title, html(title, made), found)
    if as_json:
        results: list[dict[str, Any]] = [
            {"path": str(path)} | result.model_dump() for path, result in found.results
        ]
        about = {
            "runs": list(map(str, found.runs)),
            "results": results,
            "ranks": [facts for run in found.runs if (facts := rank_facts(run))],
            "sweeps": [asdict(sweep) for sweep in found.sweeps],
            "written": list(map(str, written)),
        }
        typer.echo(json.dumps(about, ensure_ascii=False))
    elif written:
        typer.echo(f"written: {written[0]}" + (f" and {len(written) - 1} pictures" if written[1:] else ""))
    else:
        show(title, made, Console(highlight=False))


def closer(data: str, runs: Any, numbers: tuple[int, int, int], as_json: bool) -> None:
    """The closing table of a curriculum."""
    from plato2.config import expand_path
    from plato2.data.shards import read_index
    from plato2.report.curriculum import curriculum_report, print_report

    data = expand_path(data, "--data")
    read_index(data, "--data ")
    found = curriculum_report(runs, data, *numbers)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_report(found, Console(highlight=False))
