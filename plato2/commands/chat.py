"""`plato2 chat`: a conversation in the terminal.

A line is a message, or a command if it begins with a slash. On a terminal lines can be edited and are kept
for the next call, a spinner turns while the bot thinks and its words appear one after another; with a pipe on
either side it reads lines and writes lines.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from plato2.commands.talking import (
    DEFAULT,
    Backward,
    Device,
    Evaluation,
    Generation,
    Model,
    Precision,
    Rank,
    SafetyInput,
    SafetyOutput,
    SafetyRules,
    decodes,
    fetches_models,
    load_bot,
    load_safety,
    one_model,
    say_if_unranked,
)
from plato2.config import DecodeConfig, UserError, did_you_mean
from plato2.talk.conversation import Conversation, Exchange, now
from plato2.talk.table import candidate_table, printable

if TYPE_CHECKING:
    from plato2.talk.bot import PlatoBot, Reply

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

COMMANDS = {
    "/candidates": "the other candidates for the last reply",
    "/choose N": "continue from candidate N instead",
    "/undo": "take back the last message and its reply",
    "/reset": "begin a new conversation",
    "/save FILE.jsonl": "append the conversation to a file",
    "/set": "show the decoding settings",
    "/set NAME VALUE": "change one, as in /set temperature 0.7",
    "/help": "show these lines",
    "/quit": "leave, as Ctrl-D does; Ctrl-C also leaves, or takes back a message while the bot thinks",
}

HELP = (
    "Talk to a model; everything said so far is its context.\n\n"
    + "\n\n".join(f"[bold]{name}[/]  {what}" for name, what in COMMANDS.items())
    + "\n\n[bold]Examples[/]\n\n"
    "plato2 chat --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN\n\n"
    "plato2 chat 24L  the authors' model of 314M parameters, fetched when you have agreed; without a network "
    "get 24L.tar elsewhere: plato2 import knover 24L.tar --out ~/.cache/plato2/models/24L\n"
)

SAFETY_LINES = {
    ("input", "block"): "your message breaks {rule}: it is not answered and not kept",
    ("input", "warn"): "your message breaks {rule}: it is answered anyway",
    ("output", "block"): "a candidate that breaks {rule} was not said",
    ("output", "warn"): "this reply breaks {rule}: it was said anyway",
}
WORD = re.compile(r"\s*(?:[\u3040-\u9fff]|[^\s\u3040-\u9fff]+)|\s+")
"""A word, or a Chinese or Japanese character, with the blanks before it."""
SECONDS_A_WORD, SECONDS_A_REPLY = 0.04, 1.0
"""How slowly a reply appears on a terminal, at most."""
HISTORY_LINES = 1000


@app.command(help=HELP)
@decodes
@fetches_models
def chat(
    model: Model = None,
    generation: Generation = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    safety: SafetyRules = None,
    safety_input: SafetyInput = "block",
    safety_output: SafetyOutput = "block",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Run the verb."""
    generation = one_model(model, generation, "chat", "talk to")
    checks = load_safety(safety, safety_input, safety_output)
    bot = load_bot(generation, evaluation, decode, device, precision, backward, rank, checks)
    say_if_unranked(bot)
    if isinstance(sys.stdin, io.TextIOWrapper) and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="ignore")  # bytes that are not text
        sys.stdout.reconfigure(errors="replace")  # text that the terminal's encoding lacks
    if evaluation is None and bot.evaluation is not None:
        evaluation = generation  # a model folder with both, or a model that ranks its own candidates
    models = {"generation": generation, "evaluation": evaluation, "backward": backward}
    Chat(bot, {name: None if path is None else str(path) for name, path in models.items()}).run()


class Chat:
    """One person's sitting.

    Args:
        bot: who answers.
        models: the names of its models, for `/save`.
    """

    def __init__(self, bot: PlatoBot, models: dict[str, str | None]) -> None:
        self.bot, self.models = bot, models
        self.decode = bot.decode_config
        self.conversation = Conversation()
        self.console = Console(highlight=False)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Reads lines until /quit, the end of the input, or Ctrl-C at the prompt."""
        self.note("/help shows the commands, /quit or Ctrl-D leaves")
        with line_editing() if self.interactive else nullcontext():
            prompt = self.prompt()
            try:
                while (line := self.read(prompt)) != "/quit":
                    self.take(line)
            except (EOFError, KeyboardInterrupt):
                if self.interactive:
                    self.console.show_cursor(True)  # in case Ctrl-C hit the spinner
                    self.console.print()

    def read(self, prompt: str) -> str:
        """The next line.

        Raises:
            EOFError: no more lines.
            UserError: the input cannot be read.
        """
        try:
            return input(prompt).strip()
        except OSError as error:  # not open for reading, a terminal that is gone
            raise UserError(f"the input cannot be read ({error.strerror}); give a file, or type") from None

    def take(self, line: str) -> None:
        """Answers a message or obeys a command; whatever goes wrong costs that line only."""
        try:
            if line.startswith("/"):
                self.obey(line)
            else:
                self.answer(line)
        except UserError as error:
            self.note(str(error), "yellow")
        except KeyboardInterrupt:
            self.note("(taken back; Ctrl-C again leaves)")

    def answer(self, message: str) -> None:
        """Finds a reply, shows it and keeps it; an exception on the way leaves the conversation as it was."""
        asked_at = now()
        most = self.bot.max_context  # no more turns fit: each takes a token
        turns = Conversation(self.conversation.exchanges[-most:]).turns[-most:]
        with self.console.status("thinking") if self.interactive else nullcontext():
            try:
                reply = self.bot.reply([*turns, message], self.decode)
            except (IndexError, MemoryError, OverflowError, RuntimeError) as error:
                reason = str(error).split("\n")[0]  # out of memory, or not finite
                raise UserError(f"no reply with these settings ({reason}); /set shows them") from error
        self.show(reply)
        if not any((flag.side, flag.action) == ("input", "block") for flag in reply.flags):
            self.conversation = self.conversation.answered(message, reply, self.decode, asked_at)

    def show(self, reply: Reply) -> None:
        """The reply, on a terminal word by word, and what the safety filter found."""
        self.console.print(Text("bot  ", style="bold cyan"), end="")
        words = WORD.findall(printable(reply.text))
        for word in words:
            self.console.print(Text(word), end="", soft_wrap=True)
            if self.interactive:
                time.sleep(min(SECONDS_A_WORD, SECONDS_A_REPLY / len(words)))
        self.console.print()
        if reply.warning:
            self.note(reply.warning, "yellow")
        lines = [SAFETY_LINES[flag.side, flag.action].format(rule=flag.rule) for flag in reply.flags]
        for line in dict.fromkeys(lines):  # several candidates may break one rule
            self.note(f"safety: {line}")

    def obey(self, line: str) -> None:
        """Runs a command.

        Raises:
            UserError: there is no such command, or it cannot do that.
        """
        name, _, argument = line.partition(" ")
        match name, argument.strip():
            case "/candidates", "":
                self.show_candidates()
            case "/choose", number:
                self.choose(number)
            case "/undo", "":
                self.last("/undo")
                self.conversation = self.conversation.undo()
                self.note("(taken back)")
            case "/reset", "":
                self.conversation = Conversation()
                self.note("(a new conversation)")
            case "/save", file:
                self.save(file)
            case "/set", "":
                for key, value in asdict(self.decode).items():
                    self.note(f"{key:<16} {setting_text(value)}")
            case "/set", setting:
                self.set(setting)
            case "/help", "":
                for known, what in COMMANDS.items():
                    self.note(f"{known:<17} {what}")
            case _:
                raise UserError(f"{line[:60]}: no such command; /help shows them")

    def show_candidates(self) -> None:
        """All candidates of the last reply, best first."""
        candidates = self.last("/candidates").reply.candidates
        if not candidates:
            raise UserError("/candidates: there are none")
        self.console.print(candidate_table([candidate.to_dict() for candidate in candidates]))
        for number, candidate in enumerate(candidates, start=1):
            if candidate.flag:
                self.note(f"safety: candidate {number} breaks {candidate.flag}")

    def choose(self, number: str) -> None:
        """Continues from another candidate of the last reply, by its rank."""
        candidates = self.last("/choose").reply.candidates
        if not number.isdecimal() or not 1 <= int(number) <= len(candidates):
            raise UserError(f"/choose {number}: give a rank that /candidates shows, 1 to {len(candidates)}")
        chosen = candidates[int(number) - 1]
        if self.bot.holds_back(chosen):
            raise UserError(f"/choose {number}: that candidate breaks {chosen.flag}; choose another one")
        self.conversation = self.conversation.choose(int(number))
        self.console.print(Text.assemble(("bot  ", "bold cyan"), printable(chosen.text)), soft_wrap=True)

    def set(self, setting: str) -> None:
        """Changes one setting, from the next message on."""
        name, _, text = setting.partition(" ")
        key = name.removeprefix("--").replace("-", "_")
        if key not in asdict(self.decode):
            raise UserError(f"/set {name}: no such setting; {did_you_mean(key, asdict(self.decode))}")
        if text.strip():
            value = setting_value(key, text.strip())
            self.decode = self.bot.fitting(replace(self.decode, **{key: value}))
        self.note(f"{key} {setting_text(getattr(self.decode, key))}")

    def save(self, name: str) -> None:
        """Appends the conversation to a file."""
        self.last("/save")
        if not name:
            raise UserError("/save: give a file, as in /save chats.jsonl")
        try:
            appended = self.conversation.save(Path(name).expanduser(), self.models, self.decode)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of nobody; ValueError: a NUL
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"/save {name}: {reason}; give a file that can be written") from None
        self.note(f"({'appended' if appended else 'saved'} to {name})")

    def last(self, command: str) -> Exchange:
        """The last exchange.

        Raises:
            UserError: nothing has been said yet.
        """
        if self.conversation.last is None:
            raise UserError(f"{command}: nothing has been said yet")
        return self.conversation.last

    def note(self, text: str, style: str = "dim") -> None:
        """A line that nobody said."""
        self.console.print(Text(printable(text), style=style), soft_wrap=True)

    def prompt(self) -> str:
        """What stands before a message that is typed."""
        if not self.interactive:
            return ""
        if self.console.color_system is None or self.console.no_color or "readline" not in sys.modules:
            return "you  "
        return "\x01\x1b[1;32m\x02you  \x01\x1b[0m\x02"  # 1 and 2 enclose what has no width


@contextmanager
def line_editing() -> Iterator[None]:
    """Arrow keys and earlier lines in `input`, those of earlier calls too where a file can be written."""
    try:
        import readline
    except ImportError:  # Windows: its terminal can do that
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "plato2" / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def setting_text(value: object) -> str:
    """A setting as `/set` shows and takes it."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return "none" if value is None else str(value)


def setting_value(key: str, text: str) -> Any:
    """A setting from what was typed; `DecodeConfig` checks it further."""
    kind = type(getattr(DEFAULT, key))
    if kind is tuple:  # stop: one text here
        return () if text == "none" else (text,)
    if kind is str:
        return text
    if kind is type(None) and text == "none":  # length_penalty
        return None
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise UserError(f"{key}={text}: must be a {'whole ' * (kind is int)}number") from None
