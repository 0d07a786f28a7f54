"""`plato2 self-chat`: a model, or two, play both sides of many dialogues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from plato2.commands.options import takes
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

if TYPE_CHECKING:
    from plato2.talk.self_chat import Player, SelfChat

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

FORMATS = ("jsonl", "parlai")
HELP = """Let a model talk to itself, or two models to each other.

A dialogue begins with a line of --starts and has 10 utterances in all, as in the paper. Speaker A is given
the start, B answers it, and so on in turn; with two models --generation is A and --generation2 is B. After an
interruption the same command continues.

[bold]Examples[/]

plato2 self-chat --starts questions.txt --generation RUN --evaluation RUN --out chats.jsonl

plato2 self-chat --starts questions.txt --generation RUN --generation2 RUN --swap --out chats.jsonl
"""

Generation2 = Annotated[
    Path | None, typer.Option(help="Another model, which speaks as B.", rich_help_panel=MODELS)
]
Evaluation2 = Annotated[Path | None, typer.Option(help="The evaluation model of B.", rich_help_panel=MODELS)]
Backward2 = Annotated[Path | None, typer.Option(help="The backward model of B.", rich_help_panel=MODELS)]
Candidates = Annotated[
    bool, typer.Option("--candidates", help="Keep all candidates of each turn.", rich_help_panel=DECODING)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]


@dataclass(frozen=True)
class PlayOptions:
    """What is played and where it is written; checks itself."""

    starts: Annotated[
        Path, typer.Option(help="One start per line: text, JSON lines (.jsonl) or Knover's .tsv.")
    ]
    out: Annotated[Path, typer.Option(help="File to append dialogues to, one JSON object per line.")]
    swap: Annotated[
        bool, typer.Option("--swap", help="Then play all dialogues again with A and B swapped.")
    ] = False
    utterances: Annotated[int, typer.Option(help="Turns of a dialogue, the start included.")] = 10
    batch: Annotated[int, typer.Option(help="Dialogues played at once; does not change the text.")] = 16
    format: Annotated[str, typer.Option(help="jsonl, or parlai: also in ParlAI's format, next to --out.")] = (
        "jsonl"
    )

    def __post_init__(self) -> None:
        """Checks values and files.

        Raises:
            UserError: an impossible value, or a file that cannot be written.
        """
        if self.format not in FORMATS:
            raise UserError(f"--format {self.format}: use {' or '.join(FORMATS)}")
        for option, number, least in (("--utterances", self.utterances, 2), ("--batch", self.batch, 1)):
            if number < least:
                raise UserError(f"{option} {number}: must be at least {least}")
        if not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: {self.out.parent} is not a folder; make it first")
        if self.out.exists() and not self.out.is_file():
            raise UserError(f"--out {self.out}: not a file; give a new one")
        if self.out.exists() and self.starts.exists() and self.out.samefile(self.starts):
            raise UserError(f"--out {self.out}: the same file as --starts; give a new one")


@app.command(help=HELP)
@decodes
@takes(PlayOptions)
def self_chat(
    *,
    options: PlayOptions,
    generation: Generation,
    evaluation: Evaluation = None,
    backward: Backward = None,
    generation2: Generation2 = None,
    evaluation2: Evaluation2 = None,
    backward2: Backward2 = None,
    candidates: Candidates = False,
    as_json: AsJson = False,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Run the verb."""
    of_two = {"--evaluation2": evaluation2, "--backward2": backward2, "--swap": options.swap}
    for option, value in of_two.items():
        if value and generation2 is None:
            raise UserError(f"{option}: there is only one model; give --generation2 too")
    # After the options are checked: importing torch takes seconds.
    from plato2.talk.self_chat import Player, describe, plan, read_starts, unread_starts

    starts = read_starts(options.starts)
    models = [(generation, evaluation, backward)]
    models += [(generation2, evaluation2, backward2)] if generation2 else []
    players = [
        Player(str(model), load_bot(model, judge, decode, device, precision, reader, rank))
        for model, judge, reader in models
    ]
    for player in players:
        say_if_unranked(player.bot)
    dialogues = plan(starts, players, options.utterances, options.swap)
    if unread := unread_starts(starts, players):
        typer.echo(f"warning: {unread}", err=True)
    about = {
        "settings": asdict(decode),
        "rank": rank,
        "precision": precision,
        "utterances": options.utterances,
        "swap": options.swap,
        "candidates": candidates,
        "starts": sha256(json.dumps([start.turns for start in starts]).encode()).hexdigest()[:16],
        **describe(players),
    }
    began = perf_counter()
    n_kept = play_missing(dialogues, players, decode, options, candidates, about)
    print_summary(dialogues, n_kept, options, began, as_json)


def play_missing(
    dialogues: Sequence[SelfChat],
    players: Sequence[Player],
    decode: DecodeConfig,
    options: PlayOptions,
    candidates: bool,
    about: Mapping[str, Any],
) -> int:
    """Plays the dialogues that are not in the file yet and appends them, a batch at a time.

    Returns:
        How many were in the file before.
    """
    from plato2.talk.self_chat import play, resumed, to_dict, to_line

    console = Console(stderr=True)
    with (
        resumed(options.out, about, len(dialogues), options.batch) as (file, n_kept),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        going = dialogues[n_kept:]
        n_missing = sum(options.utterances - len(dialogue.turns) for dialogue in going)
        bar = progress.add_task("utterances", total=n_missing)
        try:
            for first in range(0, len(going), options.batch):
                group = going[first : first + options.batch]
                for n_said in play(group, players, decode, options.utterances, candidates):
                    progress.advance(bar, n_said)
                file.write(b"".join(to_line(to_dict(dialogue, players, decode)) for dialogue in group))
                file.flush()
                os.fsync(file.fileno())
        except KeyboardInterrupt:
            typer.echo("stopped; the same command continues from here", err=True)
            raise
    return n_kept


def print_summary(
    dialogues: Sequence[SelfChat], n_kept: int, options: PlayOptions, began: float, as_json: bool
) -> None:
    """What was played, and where it is; ParlAI's file is written here, of all dialogues."""
    from plato2.talk.self_chat import write_parlai

    going = dialogues[n_kept:]
    summary = {
        "out": str(options.out),
        "parlai": str(write_parlai(options.out)) if options.format == "parlai" else None,
        "dialogues": len(dialogues),
        "played": len(going),
        "utterances": sum(len(dialogue.turns) - len(dialogue.start.turns) for dialogue in going),
        "seconds": round(perf_counter() - began, 3),
    }
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    there = f", {n_kept} of them from before" if n_kept else ""
    typer.echo(f"{len(dialogues)} dialogue{'s' * (len(dialogues) > 1)} in {options.out}{there}")
    if summary["parlai"]:
        typer.echo(f"in ParlAI's format in {summary['parlai']}")
