"""`plato2 evaluate dialogues`: self-chats and chats with people measured automatically."""

from __future__ import annotations

import typer

from plato2.commands.evaluate_replies import FLAGS, Files, evaluate_files
from plato2.commands.options import takes
from plato2.commands.results import ResultOptions
from plato2.commands.talking import fetches_models
from plato2.evaluate.options import AutomaticOptions

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Measure dialogues, without people.

A FILE has self-chats (plato2 self-chat), logs of ParlAI, or transcripts in the form of Meena's (.txt). Only
what systems said counts: not the start, not the other side of a chat with a person. Several files, or
systems in one file, are compared. NAME=FILE names a system; otherwise it has the name of its model. Counts
are of words in lower case without punctuation; in scripts without blanks a character is a word.
With --out, an interrupted evaluation continues. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate dialogues chats.jsonl --speaker B --out dialogues.json

plato2 evaluate dialogues human.txt meena.txt mine=chats.jsonl --no-embedding --picture dialogues.png
"""


@app.command(help=HELP)
@fetches_models
@takes(AutomaticOptions, leave_out=("near",), flags=FLAGS)
@takes(ResultOptions)
def dialogues(*, file: Files, options: AutomaticOptions, to: ResultOptions) -> None:
    """Run the verb."""
    evaluate_files("dialogues", file, options, to)
