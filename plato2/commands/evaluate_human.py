"""`plato2 evaluate human`: human evaluation, from tasks to what raters found."""

from __future__ import annotations

import typer

from plato2.commands import evaluate_human_ratings as of_ratings

app = typer.Typer(
    help="""Let people rate dialogues and replies, as the paper does.
""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command(help=of_ratings.REPORT)(of_ratings.report)
app.command(help=of_ratings.POWER)(of_ratings.power)
app.command(help=of_ratings.CONVERT)(of_ratings.convert)
app.command("import", help=of_ratings.IMPORT)(of_ratings.import_)


@app.callback()
def _human() -> None:
    """What stands before a sub-command."""
