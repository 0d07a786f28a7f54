"""The command line: `plato2 VERB` = `python -m plato2 VERB`.

A verb is one file in this folder that defines `app`, a Typer app with one command (or several
sub-commands). To add one, write the file and give it a line in VERBS. Its module is imported when the verb is
called, so that `plato2 --help` needs neither torch nor any other verb.
"""

from __future__ import annotations

import errno
import functools
import importlib
import keyword
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from plato2 import __version__
from plato2.config import UserError, did_you_mean, expand_path, in_typed_words, install
from plato2.runs.console import print_any_text, quiet_torchao

VERBS = {
    "train": "Train a stage, or sweep; what train.py does (plato2 train --help).",
    "prepare": "Turn a corpus of conversations into shards to train on.",
    "tokenizer": "Train a tokenizer, or see how one splits a text.",
    "reply": "Answer a message or a conversation, with all candidates.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model over HTTP, as OpenAI's chat API; also a web page.",
    "self-chat": "Let a model talk to itself, or two models to each other.",
    "score": "Give the probabilities of responses: p(r|c), p(z|c,r), p(l=1|c,r).",
    "import": "Make a model folder from Knover's or PaddleNLP's weights.",
    "export": "Write a model for Knover or for Hugging Face transformers.",
    "evaluate": "Measure dialogue models as the paper does, and how far each number can be trusted.",
    "report": "Show what the runs of a curriculum reached, and how they answer.",
    "dashboard": "Make the dashboard of a project in Weights & Biases, or write it as a file.",
    "runs": "List runs, compare them, draw their curves.",
}
"""Verb -> its line in `plato2 --help`; the code is in plato2/commands/<verb>.py (import: import_.py)."""

EVALUATIONS = {
    "replies": "Static replies: variety, overlap and similarity with references, coverage.",
    "dialogues": "Self-chats and chats with people: variety, repetition, staying on topic.",
    "selection": "How well scores choose the right ones of a context's candidates (table 8).",
    "systems": "Several systems through replies, self-chat and selection, into one report.",
    "latents": "What the latents say: how often each wins, how candidates differ, an alarm at collapse.",
    "human": "Let people rate dialogues and replies; what their ratings say.",
    "judge": "Let an LLM compare systems side by side, if it can be believed.",
    "audit": "Show which automatic scores have to do with human ratings, and which do not.",
}
"""What `plato2 evaluate` can do, as VERBS; the code is in plato2/commands/evaluate_<name>.py."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, a quota, or a limit on file sizes."""

SPECIAL = {("prepare", "reddit"), ("prepare", "explain")}
"""A verb and a first argument that have a file and a help of their own, plato2/commands/<verb>_<argument>.py:
what a corpus of any other format needs is the same for all."""


class LazyVerbs(TyperGroup):
    """Lists the verbs of a table and imports the module of the one that is called.

    Contexts and commands come from Typer's own copy of Click, which has no public name.
    """

    verbs = VERBS
    before = ""
    """What stands before the verbs: nothing, or `evaluate `."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of their table."""
        return list(self.verbs)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A verb's place in the help: its name and its line."""
        return TyperCommand(cmd_name, help=self.verbs[cmd_name]) if cmd_name in self.verbs else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is to be run; `ctx.obj` keeps it for messages."""
        if not args[0].startswith("-") and args[0] not in self.verbs:
            ctx.fail(f"No such command {args[0]!r}; {did_you_mean(args[0], self.verbs)}")
        name, command, rest = super().resolve_command(ctx, args)
        if name in self.verbs:
            if (name, *rest[:1]) in SPECIAL:
                name, rest = f"{name} {rest[0]}", rest[1:]
            command = typer.main.get_command(module_of(self.before + name).app)
        for part in (command, *getattr(command, "commands", {}).values()):
            part.help = joined_lines(part.help or "")
        ctx.obj = getattr(command, "commands", {}).get(rest[0] if rest else None, command)
        return name, with_paths_expanded(command), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; what the user can fix becomes one line, Ctrl-C a quiet end."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print_error(in_typed_words(str(error), option_names(ctx.obj), sign=" "))
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


class LazyEvaluations(LazyVerbs):
    """The same below `plato2 evaluate`."""

    verbs = EVALUATIONS
    before = "evaluate "


def every_command() -> list[str]:
    """All that can be typed after `plato2`, as `prepare reddit`."""
    return [*VERBS, *map(" ".join, sorted(SPECIAL)), *(f"evaluate {name}" for name in EVALUATIONS)]


def module_of(command: str) -> Any:
    """The module of a command, imported; `command` is one of `every_command`."""
    file = command.replace("-", "_").replace(" ", "_") + "_" * keyword.iskeyword(command)
    return importlib.import_module(f"{__name__}.{file}")


def with_paths_expanded(command: Any) -> Any:
    """A command, and all below it, with `~` and environment variables written out in what is a `Path`.

    Texts that may be addresses, such as the files of a corpus, are for the options they become part of.
    """
    for below in getattr(command, "commands", {}).values():
        with_paths_expanded(below)
    if (run := command.callback) is not None:
        options = {parameter.name: parameter.opts[0] for parameter in command.params}

        @functools.wraps(run)
        def run_expanded(**given: Any) -> Any:
            for name, value in given.items():
                paths = value if isinstance(value, list) else [value]
                if all(isinstance(path, Path) for path in paths):
                    expanded = [Path(expand_path(str(path), options[name])) for path in paths]
                    given[name] = expanded if isinstance(value, list) else expanded[0]
            return run(**given)

        command.callback = run_expanded
    return command


app = typer.Typer(
    cls=LazyVerbs,
    name="plato2",
    help="PLATO-2: prepare conversations, train, talk to trained models, measure them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"plato2 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
    ),
) -> None:
    """What stands before a verb."""


def joined_lines(text: str) -> str:
    """A text with each paragraph on one line, to be wrapped by the terminal."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())


def option_names(command: Any) -> dict[str, str]:
    """What the user types for a field of the library's options: `max_context` -> `--max-context`."""
    names = {"reader.": "--reader ", "clean.": "--rule ", "vocab_pieces": "--pieces"}
    for part in (command, *getattr(command, "commands", {}).values()):
        for given in part.params:
            is_option = given.param_type_name == "option"
            names[given.name] = max(given.opts, key=len) if is_option else given.name.upper()
    return names


@contextmanager
def needs(extra: str, verb: str, brings: Collection[str] = ()) -> Iterator[None]:
    """Says what to install where a module is missing.

    Args:
        extra: of pyproject.toml.
        verb: who needs it.
        brings: modules of the extra; others are our mistake. Empty = any module.

    Raises:
        UserError: one of them is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if brings and str(error.name).partition(".")[0] not in brings:
            raise
        raise UserError(f"plato2 {verb} needs {error.name}: {install(extra)}") from None


def print_error(message: str) -> None:
    """One line `error: ...` on stderr, red where the terminal has colours."""
    from rich.console import Console
    from rich.text import Text

    from plato2.talk.table import printable

    lines = "\n".join(map(printable, message.split("\n")))  # it may hold what a file or a server said
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {lines}", style="red"))


def main(command: typer.Typer = app, name: str = "plato2") -> None:
    """Runs the `plato2` command, or another that is given."""
    try:
        open_streams()
        print_any_text()
        quiet_torchao()
        try:
            command(prog_name=name)
        finally:
            sys.stdout.flush()  # else Python does so at exit, with a traceback
    except KeyboardInterrupt:  # outside of a verb, such as during its import
        sys.exit(130)
    except BrokenPipeError:
        leave_stdout()
        sys.exit(1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print_error(f"{error.filename or 'stdout'}: {error.strerror}; free some space there")
        leave_stdout()
        sys.exit(1)


def leave_stdout() -> None:
    """Discards what is still to be printed: Python would try again at exit, in vain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def open_streams() -> None:
    """What was closed by whoever called (`<&-`, `>&-`, some services) is empty, or takes what nobody reads.

    Python has None in place of such a stream, and the next file that is opened would get its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
