"""`plato2 self-chat`: a model, or two, play both sides of many dialogues."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from plato2.commands.talking import (
    DECODING,
    DEFAULT,
    MODELS,
    Backward,
    Device,
    Evaluation,
    Generation,
    Precision,
    Rank,
    decodes,
    load_bot,
    say_if_unranked,
)
from plato2.config import DecodeConfig, UserError

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

FORMATS = ("jsonl", "parlai")
HELP = """Let a model talk to itself, or two models to each other.

A dialogue begins with a line of --starts and has 10 utterances with it, as in the paper. Speaker A is given
the start, B answers it, and so on by turns; of two models --generation is A and --generation2 is B. The same
command goes on where it was interrupted.

[bold]Examples[/]

plato2 self-chat --starts questions.txt --generation RUN --evaluation RUN --out chats.jsonl

plato2 self-chat --starts questions.txt --generation RUN --generation2 RUN --swap --out chats.jsonl
"""


@app.command(help=HELP)
@decodes
def self_chat(
    starts: Annotated[Path, typer.Option(help="A start a line: text, JSON lines (.jsonl) or Knover's .tsv.")],
    generation: Generation,
    out: Annotated[Path, typer.Option(help="Dialogues are appended there, one JSON object a line.")],
    evaluation: Evaluation = None,
    backward: Backward = None,
    generation2: Annotated[
        Path | None, typer.Option(help="Another model, which speaks as B.", rich_help_panel=MODELS)
    ] = None,
    evaluation2: Annotated[
        Path | None, typer.Option(help="What ranks for B.", rich_help_panel=MODELS)
    ] = None,
    backward2: Annotated[
        Path | None, typer.Option(help="The backward model of B.", rich_help_panel=MODELS)
    ] = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="Then all dialogues once more, A and B exchanged.")
    ] = False,
    utterances: Annotated[int, typer.Option(help="Turns of a dialogue, the start included.")] = 10,
    batch: Annotated[int, typer.Option(help="Dialogues that are played together; changes no word.")] = 16,
    format: Annotated[
        str, typer.Option(help="jsonl, or parlai: in ParlAI's format too, beside --out.")
    ] = "jsonl",
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Keep all candidates of each turn.", rich_help_panel=DECODING)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Run the verb."""
    if format not in FORMATS:
        raise UserError(f"--format {format}: use {' or '.join(FORMATS)}")
    for option, number, least in (("--utterances", utterances, 2), ("--batch", batch, 1)):
        if number < least:
            raise UserError(f"{option} {number}: must be at least {least}")
    for option, value in (("--evaluation2", evaluation2), ("--backward2", backward2), ("--swap", swap)):
        if value and generation2 is None:
            raise UserError(f"{option}: there is one model only; give --generation2 too")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: is no file; give a new one")
    if out.exists() and starts.exists() and out.samefile(starts):
        raise UserError(f"--out {out}: the very file of --starts; give a new one")

    from plato2.talk.self_chat import (  # after the options are checked: importing torch takes seconds
        Player,
        describe,
        plan,
        play,
        read_starts,
        resumed,
        to_dict,
        to_line,
        unread_starts,
        write_parlai,
    )

    given = read_starts(starts)
    players = [
        Player(str(generation), load_bot(generation, evaluation, decode, device, precision, backward, rank))
    ]
    if generation2 is not None:
        bot = load_bot(generation2, evaluation2, decode, device, precision, backward2, rank)
        players.append(Player(str(generation2), bot))
    for player in players:
        say_if_unranked(player.bot)
    dialogues = plan(given, players, utterances, swap)
    if unread := unread_starts(given, players):
        typer.echo(f"warning: {unread}", err=True)
    about = {
        "settings": asdict(decode),
        "rank": rank,
        "precision": precision,
        "utterances": utterances,
        "swap": swap,
        "candidates": candidates,
        "starts": sha256(json.dumps([start.turns for start in given]).encode()).hexdigest()[:16],
        **describe(players),
    }
    began = perf_counter()
    console = Console(stderr=True)
    with (
        resumed(out, about, len(dialogues), batch) as (file, n_kept),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        going = dialogues[n_kept:]
        n_missing = sum(utterances - len(dialogue.turns) for dialogue in going)
        bar = progress.add_task("utterances", total=n_missing)
        try:
            for first in range(0, len(going), batch):
                group = going[first : first + batch]
                for n_said in play(group, players, decode, utterances, candidates):
                    progress.advance(bar, n_said)
                file.write(b"".join(to_line(to_dict(dialogue, players, decode)) for dialogue in group))
                file.flush()
                os.fsync(file.fileno())
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise
    summary = {
        "out": str(out),
        "parlai": str(write_parlai(out)) if format == "parlai" else None,
        "dialogues": len(dialogues),
        "played": len(going),
        "utterances": sum(len(dialogue.turns) - len(dialogue.start.turns) for dialogue in going),
        "seconds": round(perf_counter() - began, 3),
    }
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    there = f", {n_kept} of them there before" if n_kept else ""
    typer.echo(f"{len(dialogues)} dialogue{'s' * (len(dialogues) > 1)} in {out}{there}")
    if summary["parlai"]:
        typer.echo(f"in ParlAI's format in {summary['parlai']}")
