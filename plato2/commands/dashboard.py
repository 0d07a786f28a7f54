"""`plato2 dashboard`: the panels that people look at, as a dashboard in Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Make the dashboard of a project in Weights & Biases.

It has the losses of each stage, perplexity, the use and the entropy of the latents, the accuracy of the
evaluation model, tokens a second and MFU, memory, the gradient norm, the learning rate, and replies; runs are
grouped by curriculum and stage. Each call saves a new view. With --out it is written as a file instead, which
needs no network. The same panels are in plato2 report and under TensorBoard's custom scalars.

[bold]Examples[/]

plato2 dashboard --project plato2

plato2 dashboard --out dashboard.json
"""


@app.command(help=HELP)
def dashboard(
    project: Annotated[str, typer.Option(help="The project of the runs.")] = "plato2",
    entity: Annotated[
        str | None, typer.Option(help="The user or team that it belongs to; W&B's default if not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the dashboard.")] = "PLATO-2",
    out: Annotated[Path | None, typer.Option(help="Write it to this file, as JSON.")] = None,
) -> None:
    """Run the verb."""
    from plato2.report.dashboard import save, workspace, write

    made = workspace(project, entity or "", name)
    if out is None:
        typer.echo(f"saved: {save(made)}")
    else:
        write(out, made)
        typer.echo(f"written: {out}")
