"""`plato2 evaluate replies`: static replies measured automatically."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from plato2.commands.options import takes
from plato2.config import UserError
from plato2.evaluate.options import AutomaticOptions, Kind
from plato2.files import lock_file, locked

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Measure replies to given contexts, without people.

A FILE has one dialogue per line, whose last turn is the reply (plato2 reply --contexts); it may have
references, what people said in its place, and candidates. Several files, or systems in one file, are
compared. NAME=FILE names a system; otherwise it has the name of its model. Counts are of words in lower case
without punctuation; in scripts without blanks a character is a word. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate replies replies.jsonl

plato2 evaluate replies plain=plain.jsonl filtered=filtered.jsonl --model RUN --out replies.json
"""

Files = Annotated[list[str], typer.Argument(help="Files to compare; NAME=FILE names the system.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Result file (.json) for plato2 report; an interrupted evaluation continues."),
]
Picture = Annotated[Path | None, typer.Option(help="Draw the figures: .png, .svg or .pdf.")]
FLAGS = {"embedding": "--embedding/--no-embedding"}


@app.command(help=HELP)
@takes(AutomaticOptions, leave_out=("speaker",), flags=FLAGS)
def replies(
    *,
    file: Files,
    options: AutomaticOptions,
    out: Out = None,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    evaluate_files("replies", file, options, out, picture, as_json)


def evaluate_files(
    kind: Kind,
    files: list[str],
    options: AutomaticOptions,
    out: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Evaluates, and shows and writes what was found.

    Raises:
        UserError: a file that cannot be read or written.
    """
    from plato2.evaluate.results import check_picture, result_table, to_json, write_picture, write_result

    check_picture(picture)
    for option, path in (("--out", out), ("--picture", picture)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {path}: {path.parent} is not a folder; make it first")
        if path is not None and path.is_dir():
            raise UserError(f"{option} {path}: a folder; give a file")
    # After the options are checked: importing torch takes seconds.
    from plato2.evaluate.automatic import SIZES, differences, evaluate, forget

    console = Console(stderr=True)
    with ExitStack() as held:
        if out is not None:
            held.enter_context(locked(lock_file(out), f"--out {out}"))
        watch: Any = partial(track, console=console, transient=True, disable=not console.is_terminal)
        result = evaluate(kind, files, options, out, watch)
        if out is not None:
            write_result(out, result)
            forget(out)
    if picture is not None:
        write_picture(picture, result, [name for name in result.measures if name not in SIZES])
    if as_json:
        typer.echo(to_json(result))
        return
    Console().print(result_table(result))
    for line in differences(result):
        typer.echo(line)
