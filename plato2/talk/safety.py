"""A filter on what is said to the bot and by it: word lists, or the user's own classifier.

safety = Safety([WordRule.read("words.txt")])
PlatoBot.load("DIR", safety=safety).reply(["hi"]).flags  # which side and which rule acted

A rule is anything that gives for each text what is wrong with it, or None: a function, or an object with
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

from plato2.config import UserError, expand_path
from plato2.data.samples import as_texts
from plato2.words import WordList, read_words

Mode = Literal["off", "warn", "block"]
Side = Literal["input", "output"]
Rule = Callable[[Sequence[str]], Sequence[str | None]]
"""For each text the name of what is wrong with it, or None."""

REFUSAL = "I would rather not talk about that."


@dataclass(frozen=True)
class Flag:
    """A rule that acted."""

    side: Side
    """Whether it was said to the bot or by it."""
    rule: str
    action: Literal["warn", "block"]


@dataclass(frozen=True)
class Safety:
    """What is checked, and what is done with what a rule finds."""

    rules: Sequence[Rule]
    input: Mode = "block"
    """Of the message that is answered; `block` answers with `refusal`."""
    output: Mode = "block"
    """Of candidates; `block` takes the best one that breaks no rule, or `refusal` where all do."""
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for side in get_args(Side):
            mode = getattr(self, side)
            if mode not in get_args(Mode):
                raise UserError(f"safety {side}={mode!r}: use {', '.join(get_args(Mode))}")

    def check(self, side: Side, texts: Sequence[str]) -> list[str | None]:
        """The first rule that each text breaks, or None; nothing is checked on a side that is off.

        Raises:
            UserError: not texts, or a rule that does not give a verdict for each of them.
        """
        texts = as_texts(texts)
        found: list[str | None] = [None] * len(texts)
        if not texts or getattr(self, side) == "off":
            return found
        for rule in self.rules:
            verdicts = list(rule(texts))
            if len(verdicts) != len(texts):
                raise UserError(
                    f"safety rule {rule!r} gave {len(verdicts)} verdicts for {len(texts)} texts; it must "
                    "give one per text: a name for what is wrong, or None"
                )
            found = [before or verdict for before, verdict in zip(found, verdicts, strict=True)]
        return found

    def flag(self, side: Side, rule: str) -> Flag:
        """What a rule does on that side."""
        return Flag(side, rule, cast(Literal["warn", "block"], getattr(self, side)))


class WordRule:
    """Words and phrases that must not be said: whole words, whatever their case, width and blanks.

    In scripts without blanks a word is found anywhere. Cleaning rule 8 looks for such entries in a text as it
    stands; here people may try to hide one, so characters without width and full width do not count.
    """

    def __init__(self, words: Iterable[str], name: str = "words") -> None:
        words = [words] if isinstance(words, str) else words  # not its letters
        self.name, self.words = name, WordList(folded for word in words if (folded := _fold(word)))

    @classmethod
    def read(cls, name_or_path: str | Path) -> WordRule:
        """A list that ships with plato2, `en` or `zh`, or a UTF-8 file with one entry per line (words.py).

        Raises:
            UserError: no such file, not UTF-8, or no words in it.
        """
        return cls(read_words(str(name_or_path), "--safety"), Path(name_or_path).name)

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """`NAME: WORD` for each text with one of the words."""
        found = (self.words.find(_fold(text)) for text in texts)
        return [None if word is None else f"{self.name}: {word}" for word in found]

    def __repr__(self) -> str:
        """The name of the list."""
        return f"WordRule({self.name})"


def read_rule(name: str) -> Rule:
    """A word list by its name or path, or a rule of the user's own by its dotted name, `package.module:rule`.

    Raises:
        UserError: no such file, or nothing that can be called under that name.
    """
    name = expand_path(name, "--safety")
    if Path(name).exists() or not re.fullmatch(r"[\w.]+:\w+", name):
        return WordRule.read(name)
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
