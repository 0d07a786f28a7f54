"""`plato2 reply`: one answer, and the candidates it was chosen from."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from plato2.commands.talking import (
    DEFAULT,
    Backward,
    Device,
    Evaluation,
    Generation,
    Precision,
    Rank,
    SafetyInput,
    SafetyOutput,
    SafetyRules,
    decodes,
    load_bot,
    load_safety,
    say_if_unranked,
)
from plato2.config import DecodeConfig
from plato2.talk.table import candidate_table, printable

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Answer a message, or a conversation.

TURNS are what was said so far, oldest first: one argument per turn. A 2_gen model gives one candidate for
each latent z; the evaluation model picks the most coherent one.

[bold]Examples[/]

plato2 reply --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN "hi , how are you ?"

plato2 reply --generation RUN --json "do you like music ?" "yes , i play the piano ." "since when ?"

plato2 reply --generation RUN --backward RUN --rank forward=1,backward=0.5 "do you like music ?"
"""


@app.command(help=HELP)
@decodes
def reply(
    turns: Annotated[list[str], typer.Argument(help="The conversation, oldest turn first.")],
    generation: Generation,
    evaluation: Evaluation = None,
    backward: Backward = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    safety: SafetyRules = None,
    safety_input: SafetyInput = "block",
    safety_output: SafetyOutput = "block",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Run the verb."""
    checks = load_safety(safety, safety_input, safety_output)
    bot = load_bot(generation, evaluation, decode, device, precision, backward, rank, checks)
    answer = bot.reply(turns).to_dict()
    say_if_unranked(bot)
    if "warning" in answer:
        typer.echo(f"warning: {answer['warning']}", err=True)
    for flag in answer.get("flags", []):
        typer.echo(f"safety: {flag['side']} {flag['action']}: {flag['rule']}", err=True)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(Text(printable(answer["reply"]), style="bold"), soft_wrap=True)
    if answer["candidates"]:
        console.print(candidate_table(answer["candidates"]))
