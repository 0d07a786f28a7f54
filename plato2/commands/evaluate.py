"""`plato2 evaluate`: the evaluations, each a file of its own."""

from __future__ import annotations

import typer

from plato2.commands import LazyEvaluations

app = typer.Typer(
    cls=LazyEvaluations,
    help="""Measure dialogue models as the paper does, and how far each number can be trusted.

What is measured lies in files: dialogues (plato2 self-chat), replies (plato2 reply --contexts), selection
sets, ratings. Each prints a table, draws a picture (--picture) and writes one result file (--out),
which plato2 report reads.
""",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _evaluate() -> None:
    """What stands before the name of an evaluation."""
