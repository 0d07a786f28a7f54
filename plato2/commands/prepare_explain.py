"""`plato2 prepare explain`: what every cleaning rule says about one message."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from plato2.commands.prepare import parse_rules
from plato2.commands.prepare_reddit import default_rules
from plato2.prepare.reddit.messages import Message
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.rules import LANGUAGES, check_language, explain
from plato2.talk.table import printable

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Show what every cleaning rule says about one message.

The exit status is 0 when the message passes, 1 when a rule would remove it.

[bold]Examples[/]

plato2 prepare explain 'see www.example.com'

plato2 prepare explain 'I like the sea' --parent 'Do you like the sea ?' --rule max_overlap=0.5

plato2 prepare explain 'thanks !' --author AutoModerator --subreddit AskReddit --json
"""


@app.command(help=HELP)
def prepare_explain(
    text: Annotated[str, typer.Argument(help="The message.")],
    parent: Annotated[str | None, typer.Option(help="The message it answers (rule 6).")] = None,
    author: Annotated[str, typer.Option(help="Its author (rule 10).")] = "",
    subreddit: Annotated[str, typer.Option(help="Its subreddit (rule 9).")] = "",
    language: Annotated[
        str, typer.Option(help=f"{' or '.join(LANGUAGES)}: the word list.")
    ] = RedditOptions.language,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the tokenizer that counts tokens.", show_default="en: Knover's; zh: none"
        ),
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="RULE=VALUE or RULE=off; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the verb."""
    from plato2.data.tokenizer import Tokenizer

    check_language(language)
    if tokenizer is None and language == "en":  # to Knover's, all Chinese is one unknown id
        tokenizer = Path(str(files("plato2.weights") / "knover_english"))
    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    rules = parse_rules(rule or [], default_rules(language))
    message = Message(0, 0, 0, 0, text, author, subreddit, False)
    verdicts = explain(message, rules, loaded, parent)
    removed = any(verdict.passes is False for verdict in verdicts)
    if as_json:
        typer.echo(json.dumps({"removed": removed, "rules": [vars(verdict) for verdict in verdicts]}))
        raise typer.Exit(int(removed))
    table = Table("rule", "", "found", box=None, pad_edge=False)
    for verdict in verdicts:
        word, style = {True: ("passes", "green"), False: ("removed", "red"), None: ("not judged", "dim")}[
            verdict.passes
        ]
        table.add_row(Text(verdict.rule), Text(word, style=style), Text(printable(verdict.found)))
    console = Console(highlight=False)
    console.print(table)
    first = next((verdict.rule for verdict in verdicts if verdict.passes is False), None)
    console.print(f"removed by rule {first}" if first else "the message passes", markup=False)
    raise typer.Exit(int(removed))
