"""A filter on what is said to the bot and by it: word lists, or a classifier of the user's own.

safety = Safety([WordList.read("words.txt")])
PlatoBot.load("DIR", safety=safety).reply(["hi"]).flags  # which side and which rule acted

A rule is anything that says of each text what is wrong with it, or None: a function, or an object with
`__call__`. A named one (`read_rule("my_package.my_module:my_rule")`) is imported from the user's own
environment, as a corpus reader is.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from plato2.bounded import TEXT_BYTES, read_file
from plato2.config import UserError, expand_path

Mode = Literal["off", "warn", "block"]
Side = Literal["input", "output"]
Rule = Callable[[Sequence[str]], Sequence[str | None]]
"""For each text the name of what is wrong with it, or None."""

REFUSAL = "I would rather not talk about that."
NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters: no blank tells where a word ends."""


@dataclass(frozen=True)
class Flag:
    """A rule that acted."""

    side: Side
    """Whether it was said to the bot or by it."""
    rule: str
    action: Literal["warn", "block"]


@dataclass(frozen=True)
class Safety:
    """What is checked, and what becomes of what a rule finds."""

    rules: Sequence[Rule]
    input: Mode = "block"
    """Of the message that is answered; `block` answers with `refusal`."""
    output: Mode = "block"
    """Of candidates; `block` takes the best one that breaks no rule, or `refusal` where all do."""
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for side in get_args(Side):
            mode = getattr(self, side)
            if mode not in get_args(Mode):
                raise UserError(f"safety {side}={mode!r}: use {', '.join(get_args(Mode))}")

    def check(self, side: Side, texts: Sequence[str]) -> list[str | None]:
        """The first rule that each text breaks, or None; nothing is checked on a side that is off."""
        found: list[str | None] = [None] * len(texts)
        if not texts or getattr(self, side) == "off":
            return found
        for rule in self.rules:
            verdicts = list(rule(texts))
            if len(verdicts) != len(texts):
                raise UserError(
                    f"safety rule {rule!r} gave {len(verdicts)} verdicts for {len(texts)} texts; it must "
                    "give one a text: a name of what is wrong, or None"
                )
            found = [before or verdict for before, verdict in zip(found, verdicts, strict=True)]
        return found

    def flag(self, side: Side, rule: str) -> Flag:
        """What a rule does on that side."""
        return Flag(side, rule, cast(Literal["warn", "block"], getattr(self, side)))


class WordList:
    """Words and phrases that must not be said: whole words, whatever their case, width and blanks.

    In scripts without blanks a word is found anywhere.
    """

    def __init__(self, words: Iterable[str], name: str = "words") -> None:
        self.name = name
        words = [words] if isinstance(words, str) else words  # not its letters
        parts = sorted({folded for word in words if (folded := _fold(word))}, key=len, reverse=True)
        patterns = [
            re.escape(part) if NO_SPACES.search(part) else rf"(?<!\w){re.escape(part)}(?!\w)"
            for part in parts
        ]
        self.pattern = re.compile("|".join(patterns)) if patterns else None

    @classmethod
    def read(cls, path: str | Path) -> WordList:
        """A UTF-8 file with a word or phrase a line; empty lines and lines that begin with # do not count.

        Raises:
            UserError: no such file, not UTF-8, or no words in it.
        """
        try:
            data = read_file(path, TEXT_BYTES, "give a file with a word a line", "word list ")
            lines = data.decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"word list {path}: {reason}") from None
        words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not words:
            raise UserError(f"word list {path}: there are no words in it; write one a line")
        return cls(words, Path(path).name)

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """`NAME: WORD` for each text with one of the words."""
        if self.pattern is None:
            return [None] * len(texts)
        found = (self.pattern.search(_fold(text)) for text in texts)
        return [f"{self.name}: {match[0]}" if match else None for match in found]

    def __repr__(self) -> str:
        """The name of the file."""
        return f"WordList({self.name})"


def read_rule(name: str) -> Rule:
    """A word list by its path, or a rule of the user's own by its dotted name, `package.module:rule`.

    Raises:
        UserError: no such file, or nothing that can be called under that name.
    """
    name = expand_path(name, "--safety")
    if Path(name).exists() or not re.fullmatch(r"[\w.]+:\w+", name):
        return WordList.read(name)
    module, _, attribute = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"safety rule {name}: {error}") from None
    if not callable(rule):
        raise UserError(
            f"safety rule {name}: cannot be called; give a function from texts to what is wrong with each"
        )
    return cast(Rule, rule)


def _fold(text: str) -> str:
    """Case, width and blanks do not count, nor do characters that have no width."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = "".join(char for char in folded if unicodedata.category(char) != "Cf")
    return " ".join(seen.split())
