"""`plato2 self-chat`: a model, or two, play both sides of many dialogues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from plato2.commands.options import takes
from plato2.commands.playing import AsJson, Candidates, check_at_least, check_out, play_missing
from plato2.commands.talking import (
    DEFAULT,
    MODELS,
    Backward,
    Device,
    Evaluation,
    Generation,
    OtherSystem,
    Precision,
    Rank,
    check_is_plato,
    decodes,
    fetches_models,
    load_speaker,
    small,
)
from plato2.config import DecodeConfig, UserError

if TYPE_CHECKING:
    from plato2.talk.self_chat import SelfChat

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

FORMATS = ("jsonl", "parlai")
HELP = """Let a model talk to itself, or two models to each other.

A dialogue begins with a line of --starts and has 10 utterances in all, as in the paper. Speaker A is given
the start, B answers it, and so on in turn; with two models --generation is A and --generation2 is B.
--speaker and --speaker2 are other systems in their place. After an interruption the same command continues.

[bold]Examples[/]

plato2 self-chat --generation RUN --evaluation RUN --out chats.jsonl

plato2 self-chat --starts questions.txt --generation RUN --generation2 RUN --swap --out chats.jsonl

plato2 self-chat --speaker blender:models/blender --out blender.jsonl
"""

Generation2 = Annotated[
    Path | None, typer.Option(help="Another model, which speaks as B.", rich_help_panel=MODELS)
]
Evaluation2 = Annotated[Path | None, typer.Option(help="The evaluation model of B.", rich_help_panel=MODELS)]
Backward2 = Annotated[Path | None, typer.Option(help="The backward model of B.", rich_help_panel=MODELS)]
OtherSystem2 = Annotated[
    str | None,
    typer.Option("--speaker2", help="Another system, which speaks as B.", rich_help_panel=MODELS),
]


@dataclass(frozen=True)
class PlayOptions:
    """What is played and where it is written; checks itself."""

    out: Annotated[Path, typer.Option(help="File to append dialogues to, one JSON object per line.")]
    starts: Annotated[
        Path | None,
        typer.Option(
            help="One start per line: text, JSON lines (.jsonl) or Knover's .tsv.",
            show_default="200 that ship with plato2",
        ),
    ] = None
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
        check_at_least("--utterances", self.utterances, 2)
        check_at_least("--batch", self.batch, 1)
        check_out(self.out, self.starts, "--starts")


@app.command(help=HELP)
@decodes
@takes(PlayOptions)
@fetches_models
def self_chat(
    *,
    options: PlayOptions,
    generation: Generation = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    other: OtherSystem = None,
    generation2: Generation2 = None,
    evaluation2: Evaluation2 = None,
    backward2: Backward2 = None,
    other2: OtherSystem2 = None,
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
        if value and generation2 is other2 is None:
            raise UserError(f"{option}: there is only one model; give --generation2 too")
    generation = small() if generation is other is None else generation
    if generation is generation2 is None:
        check_is_plato(decode, rank=rank, precision=precision if precision != "float32" else None)
    # After the options are checked: importing torch takes seconds.
    from plato2.talk.self_chat import describe, plan, read_starts, settings_of, unread_starts

    starts = read_starts(options.starts)
    speakers = [
        load_speaker(*given, decode, device, precision, rank)
        for given in (
            (generation, evaluation, backward, other, ""),
            (generation2, evaluation2, backward2, other2, "2"),
        )
        if given[-1] == "" or generation2 or other2
    ]
    dialogues = plan(starts, speakers, options.utterances, options.swap)
    if unread := unread_starts(starts, speakers):
        typer.echo(f"warning: {unread}", err=True)
    about = {
        "settings": {**settings_of(speakers), "seed": decode.seed},
        "rank": rank,
        "precision": precision,
        "utterances": options.utterances,
        "swap": options.swap,
        "candidates": candidates,
        "starts": sha256(json.dumps([start.turns for start in starts]).encode()).hexdigest()[:16],
        **describe(speakers),
    }
    began = perf_counter()
    n_kept = play_missing(dialogues, speakers, options.out, options.batch, decode.seed, candidates, about)
    print_summary(dialogues, n_kept, options, began, as_json)


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
