"""`plato2 evaluate replies`: static replies measured automatically."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, deliver, watch
from plato2.commands.talking import fetches_models
from plato2.evaluate.options import AutomaticOptions, Kind
from plato2.files import lock_file, locked

if TYPE_CHECKING:
    from plato2.evaluate.results import Result

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Measure replies to given contexts, without people.

A FILE has one dialogue per line, whose last turn is the reply (plato2 reply --contexts); it may have
references, what people said in its place, and candidates. Several files, or systems in one file, are
compared. NAME=FILE names a system; otherwise it has the name of its model. Counts are of words in lower case
without punctuation; in scripts without blanks a character is a word. With --out, an interrupted evaluation
continues. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate replies replies.jsonl

plato2 evaluate replies plain=plain.jsonl filtered=filtered.jsonl --model RUN --out replies.json
"""

Files = Annotated[list[str], typer.Argument(help="Files to compare; NAME=FILE names the system.")]
FLAGS = {"embedding": "--embedding/--no-embedding"}


@app.command(help=HELP)
@fetches_models
@takes(AutomaticOptions, leave_out=("speaker",), flags=FLAGS)
@takes(ResultOptions)
def replies(*, file: Files, options: AutomaticOptions, to: ResultOptions) -> None:
    """Run the verb."""
    evaluate_files("replies", file, options, to)


def evaluate_files(kind: Kind, files: list[str], options: AutomaticOptions, to: ResultOptions) -> None:
    """Evaluates, and shows and writes what was found.

    Raises:
        UserError: a file that cannot be read or written.
    """
    # After the options are checked: importing torch takes seconds.
    from plato2.evaluate.automatic import SIZES, evaluate, forget
    from plato2.evaluate.results import picture

    with ExitStack() as held:
        if to.out is not None:
            held.enter_context(locked(lock_file(to.out), f"--out {to.out}"))
        result = evaluate(kind, files, options, to.out, watch)
        drawn = [name for name in result.measures if name not in SIZES]
        deliver(result, to, partial(picture, only=drawn), _show)
        if to.out is not None:
            forget(to.out)


def _show(result: Result) -> None:
    """The figures, and how systems differ."""
    from plato2.evaluate.automatic import differences
    from plato2.evaluate.results import print_table, result_table

    print_table(result_table(result), Console())
    for line in differences(result):
        typer.echo(line)
