"""What `self-chat` and `reply --contexts` share: playing dialogues into a file, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from plato2.commands.talking import DECODING
from plato2.config import UserError
from plato2.files import check_place

if TYPE_CHECKING:
    from plato2.talk.self_chat import SelfChat
    from plato2.talk.speaker import Speaker

Candidates = Annotated[
    bool, typer.Option("--candidates", help="Keep all candidates of each turn.", rich_help_panel=DECODING)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]


def check_out(out: Path, given: Path | None, option: str) -> None:
    """Whether dialogues can be appended to a file.

    Args:
        out: the file.
        given: the file they begin with, and the option it was given by.
        option: `--starts`, for instance.

    Raises:
        UserError: if not.
    """
    check_place(out, "--out")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: not a file; give a new one")
    if given is not None and out.exists() and given.exists() and out.samefile(given):
        raise UserError(f"--out {out}: the same file as {option}; give a new one")


def check_at_least(option: str, number: int, least: int) -> None:
    """Refuses a smaller number.

    Raises:
        UserError: it is smaller.
    """
    if number < least:
        raise UserError(f"{option} {number}: must be at least {least}")


def play_missing(
    dialogues: Sequence[SelfChat],
    speakers: Sequence[Speaker],
    out: Path,
    batch: int,
    seed: int,
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
        resumed(out, about, len(dialogues), batch) as (file, n_kept),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        going = dialogues[n_kept:]
        bar = progress.add_task("utterances", total=sum(dialogue.missing for dialogue in going))
        try:
            for first in range(0, len(going), batch):
                group = going[first : first + batch]
                for n_said in play(group, speakers, seed, candidates):
                    progress.advance(bar, n_said)
                file.write(b"".join(to_line(to_dict(dialogue, speakers, seed)) for dialogue in group))
                file.flush()
                os.fsync(file.fileno())
        except KeyboardInterrupt:
            typer.echo("stopped; the same command continues from here", err=True)
            raise
    return n_kept
