"""`plato2 report`: what the runs of a curriculum reached, and how they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Show what the runs of a curriculum reached.

Loss and perplexity of the stages next to a unigram baseline, the evaluation model's coherence accuracy, and
the candidates for a few validation contexts, ranked, next to what a human said. Only run folders have
numbers. A second table is about choosing a response among ten, compared with chance and shared words; a third
about the latents: what they tell of a response, and how far they make candidates differ.

[bold]Example[/]

plato2 report --coarse outputs/tiny-1_coarse/RUN --generation outputs/tiny-2_gen/RUN
--evaluation outputs/tiny-2_eval/RUN --data data/chitchat --json
"""


@app.command(help=HELP)
def report(
    data: Annotated[str, typer.Option(help="The prepared corpus of the runs, local or remote.")],
    coarse: Annotated[Path | None, typer.Option(help="Run, checkpoint or model folder of 1_coarse.")] = None,
    generation: Annotated[Path | None, typer.Option(help="The same for 2_gen or plato.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="The same for 2_eval.")] = None,
    contexts: Annotated[int, typer.Option(min=0, help="Validation contexts to answer.")] = 3,
    latent_contexts: Annotated[
        int, typer.Option(min=0, help="Validation contexts on which to measure how candidates differ.")
    ] = 0,
    human_contexts: Annotated[
        int, typer.Option(min=0, help="Validation contexts whose human reply is ranked among candidates.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the verb."""
    from plato2.config import expand_path
    from plato2.evaluate.report import Part, curriculum_report, print_report

    data = expand_path(data, "--data")
    given: dict[Part, Path | None] = {"coarse": coarse, "generation": generation, "evaluation": evaluation}
    runs = {part: run for part, run in given.items() if run}
    found = curriculum_report(runs, data, contexts, latent_contexts, human_contexts)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_report(found, Console(highlight=False))
