"""`plato2 chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from plato2.commands.talking import Device, Evaluation, Generation, MaxTokens, Seed, TopK, say_if_unranked
from plato2.config import DecodeConfig, UserError

if TYPE_CHECKING:
    from plato2.talk.bot import PlatoBot

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
DEFAULT = DecodeConfig()
COMMANDS = "/candidates shows what else could have been said, /reset starts anew, /quit (or Ctrl-D) leaves"

HELP = f"""Talk to a model; all that was said is its context.

{COMMANDS}.

[bold]Example[/]

plato2 chat --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN
"""


@app.command(help=HELP)
def chat(
    generation: Generation,
    evaluation: Evaluation = None,
    top_k: TopK = DEFAULT.top_k,
    max_tokens: MaxTokens = DEFAULT.max_tokens,
    seed: Seed = DEFAULT.seed,
    device: Device = "auto",
) -> None:
    """Run the verb."""
    from plato2.talk.bot import PlatoBot  # after the options are checked: importing torch takes seconds

    decode = DecodeConfig(top_k=top_k, max_tokens=max_tokens, seed=seed)
    bot = PlatoBot.load(generation, evaluation, device, decode)
    say_if_unranked(bot)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines in `input`)
    console = Console(highlight=False)
    console.print(COMMANDS, style="dim")
    try:
        converse(bot, console)
    except (KeyboardInterrupt, EOFError):
        console.print()


def converse(bot: PlatoBot, console: Console) -> None:
    """Reads a line, answers it, until /quit."""
    from plato2.talk.bot import as_dict
    from plato2.talk.table import candidate_table

    history: list[str] = []
    candidates: list[dict[str, object]] = []
    while True:
        line = _read_line(console)
        if line == "/quit":
            return
        if line == "/reset":
            history, candidates = [], []
            console.print("(a new conversation)", style="dim")
        elif line == "/candidates":
            console.print(candidate_table(candidates) if candidates else "(nothing was said yet)")
        elif line.startswith("/"):
            console.print(Text(f"{line}: no such command; {COMMANDS}", style="yellow"), soft_wrap=True)
        else:
            try:
                reply = bot.reply([*history, line])
            except UserError as error:
                console.print(Text(str(error), style="yellow"), soft_wrap=True)
                continue
            history += [line, reply.text]
            candidates = [as_dict(candidate) for candidate in reply.candidates]
            console.print(Text.assemble(("bot  ", "bold cyan"), reply.text), soft_wrap=True)


def _read_line(console: Console) -> str:
    """What the person types, without blanks around it; bytes that are not text are dropped."""
    prompt = Text("you  ", style="bold green") if sys.stdin.isatty() else ""
    return console.input(prompt).encode("utf-8", "ignore").decode().strip()
