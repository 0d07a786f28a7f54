"""The paper's cleaning rules (appendix A) that need no comment tree, and what to do after a failing turn.

A rule judges one message; None or False switches it off. Each rule counts every message it hits, also one
that another rule has hit before. Rules 9 and 10 (quarantined forums, bots) are about Reddit.

One of three policies decides what becomes of a dialogue with a failing turn:

- `subtree`: the failing turn and everything after it is removed, as the paper prunes its comment trees;
- `split`: the failing turn is removed and a new conversation starts after it: right for long linear chats;
- `response`: failing turns stay as context, but never are the response.

The rules run over billions of messages, so each takes 2 microseconds or less on most of them: what is ASCII
goes through byte tables, and a pattern only sees a message that a search for plain text lets through.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from plato2.config import UserError
from plato2.words import UNSPACED, WordList, split_words

Policy = Literal["split", "subtree", "response"]

_UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_BLANKS = bytes(code for code in range(128) if chr(code).isspace())
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_URL_SIGNS = ("://", "www.", ".com", ".org", ".net", ".edu", ".gov")  # every _URL has one
# No \b: to Python a Chinese character beside an address is part of its word.
_URL = re.compile(r"(?i)(?<![a-z0-9_])(?:https?://|www\.)\S|[a-z0-9-]\.(?:com|org|net|edu|gov)(?![a-z0-9_])")
_SPECIAL = re.compile(r"(?<!\w)[ru]/|&(?:amp|lt|gt|quot|nbsp|#\d+|#x[0-9A-Fa-f]+);")  # "and/or" is no forum


@dataclass
class CleanRules:
    """The rules with the paper's thresholds; None or False = off.

    Raises:
        UserError: a threshold that makes no sense.
    """

    min_tokens: int | None = 2
    """Rule 1: fewer BPE tokens."""
    max_tokens: int | None = 128
    """Rule 1: more BPE tokens."""
    max_word_chars: int | None = 30
    """Rule 2: a longer word (scripts without spaces have none)."""
    max_chars: int | None = 1024
    """Rule 2: a longer message."""
    min_letters: float | None = 0.7
    """Rule 3: a smaller share of letters (of any script) among the characters that are not blank. A message
    of punctuation or emoji alone has the share 0 and fails; an empty one fails rule 1 only."""
    urls: bool = True
    """Rule 4: a web address."""
    special_strings: bool = True
    """Rule 5: r/ or u/ at the beginning of a word, or an HTML entity such as &amp; (the paper: "such as")."""
    max_overlap: float | None = 0.8
    """Rule 6: a larger share of the message's words is in the previous turn."""
    max_repeats: int | None = 100
    """Rule 7: the same message occurs more often in the whole corpus."""
    offensive_words: str | None = None
    """Rule 8: the shipped list `en` or `zh`, or a file with one word or phrase per line; none by default."""

    def __post_init__(self) -> None:
        """Check the thresholds."""
        for name in ("min_tokens", "max_tokens", "max_word_chars", "max_chars", "max_repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"clean.{name}={value}: must be at least 1, or off (null in a config)")
        for name in ("min_letters", "max_overlap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"clean.{name}={value}: must be between 0 and 1, or off (null in a config)")

    @classmethod
    def off(cls) -> CleanRules:
        """No rule at all."""
        return cls(None, None, None, None, None, False, False, None, None, None)


_OPTIONS = {
    "1. fewer": "min_tokens",
    "1. more": "max_tokens",
    "2. a word": "max_word_chars",
    "2. more": "max_chars",
    "3.": "min_letters",
    "4.": "urls",
    "5.": "special_strings",
    "6.": "max_overlap",
    "7.": "max_repeats",
    "8.": "offensive_words",
}
"""How the name of a rule in counts begins, and its option."""


def option_of(rule: str) -> str:
    """The option of CleanRules that switches a rule on or off, by the rule's name in counts."""
    return next(option for start, option in _OPTIONS.items() if rule.startswith(start))


class Cleaner:
    """Applies the rules to dialogues and counts.

    `hits` counts messages by rule, `n_messages` and `n_failing` all of them and those hit by any rule.
    """

    def __init__(self, rules: CleanRules, repeated: frozenset[int] = frozenset()) -> None:
        """Take the rules and, for rule 7, the `message_key`s of the messages repeated too often."""
        self.rules = rules
        self._checks = _checks(rules, repeated)
        self.hits: Counter[str] = Counter(dict.fromkeys(self._checks, 0))
        self._needs_words = rules.max_overlap is not None
        self.n_messages = 0
        self.n_failing = 0

    def check(self, texts: Sequence[str], n_tokens: Sequence[int]) -> list[bool]:
        """Whether each turn of a dialogue passes all rules.

        Args:
            texts: the turns.
            n_tokens: their lengths in BPE tokens.
        """
        passing = []
        previous: list[str] = []
        for text, length in zip(texts, n_tokens, strict=True):
            words = split_words(text) if self._needs_words else []
            message = _Message(text, length, words, previous)
            failed = [name for name, fails in self._checks.items() if fails(message)]
            if failed:
                self.hits.update(failed)
            passing.append(not failed)
            previous = words
        self.n_messages += len(passing)
        self.n_failing += passing.count(False)
        return passing


def conversations(passing: Sequence[bool], policy: str) -> list[range]:
    """The parts of a dialogue that remain as conversations, as ranges of turns.

    Under `response` the whole dialogue stays; only passing turns may then be responses.
    """
    n = len(passing)
    if policy == "response":
        return [range(n)]
    parts: list[range] = []
    start = 0
    for turn in [i for i in range(n) if not passing[i]] + [n]:
        if turn > start:
            parts.append(range(start, turn))
        if policy == "subtree":
            break
        start = turn + 1
    return parts


def message_key(text: str) -> int:
    """Eight bytes that stand for a message in rule 7; case and white space do not count."""
    if not text.isprintable() or "  " in text or text[:1] == " " or text[-1:] == " ":
        text = " ".join(text.split())  # the only printable white space is the blank
    folded = text.casefold().encode("utf-8", "replace")
    return int.from_bytes(blake2b(folded, digest_size=8).digest(), "little")


class RepeatCounter:
    """Counts messages for rule 7 in 8 bytes each, whatever their length."""

    def __init__(self) -> None:
        """Start with no message."""
        self._keys = array("Q")

    def add(self, text: str) -> int:
        """Count one message; returns its key."""
        self._keys.append(key := message_key(text))
        return key

    def __len__(self) -> int:
        """Messages counted."""
        return len(self._keys)

    def above(self, max_repeats: int) -> frozenset[int]:
        """Keys of the messages counted more than `max_repeats` times."""
        if not self._keys:
            return frozenset()
        keys = np.sort(np.frombuffer(self._keys, dtype=np.uint64))
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        counts = np.diff(np.append(starts, len(keys)))
        return frozenset(keys[starts[counts > max_repeats]].tolist())


@dataclass(slots=True)
class _Message:
    """What the rules look at; words are found once for a message and its successor."""

    text: str
    n_tokens: int
    words: list[str]
    previous_words: list[str]


def length_rules(rules: CleanRules) -> dict[str, Callable[[int], bool]]:
    """Rule 1 as name -> whether a message of this many BPE tokens breaks it."""
    checks: dict[str, Callable[[int], bool]] = {}
    if (fewest := rules.min_tokens) is not None:
        checks[f"1. fewer than {fewest} tokens"] = lambda n_tokens: n_tokens < fewest
    if (most := rules.max_tokens) is not None:
        checks[f"1. more than {most} tokens"] = lambda n_tokens: n_tokens > most
    return checks


def text_rules(
    rules: CleanRules, list_key: str = "clean.offensive_words"
) -> dict[str, Callable[[str], bool]]:
    """Rules 2-5 and 8 as name -> whether a text breaks it; `list_key` names rule 8's list in errors."""
    checks: dict[str, Callable[[str], bool]] = {}
    if (longest := rules.max_chars) is not None:
        checks[f"2. more than {longest} characters"] = lambda text: len(text) > longest
    if (word_chars := rules.max_word_chars) is not None:
        checks[f"2. a word over {word_chars} characters"] = lambda text: has_long_word(text, word_chars)
    if (share := rules.min_letters) is not None:
        checks[f"3. under {share:.0%} letters"] = lambda text: letter_share(text) < share
    if rules.urls:
        checks["4. a web address"] = has_url
    if rules.special_strings:
        checks["5. r/, u/ or an HTML entity"] = has_special_string
    if rules.offensive_words is not None:
        offensive = WordList.read(rules.offensive_words, list_key)
        checks["8. an offensive word"] = lambda text: offensive.find(text) is not None
    return checks


def _checks(rules: CleanRules, repeated: frozenset[int]) -> dict[str, Callable[[_Message], bool]]:
    """The rules that are on: name -> whether a message fails."""

    def of_length(breaks: Callable[[int], bool]) -> Callable[[_Message], bool]:
        return lambda message: breaks(message.n_tokens)

    def of_text(breaks: Callable[[str], bool]) -> Callable[[_Message], bool]:
        return lambda message: breaks(message.text)

    checks = {name: of_length(breaks) for name, breaks in length_rules(rules).items()}
    checks |= {name: of_text(breaks) for name, breaks in text_rules(rules).items()}
    if (overlap := rules.max_overlap) is not None:
        name = f"6. over {overlap:.0%} of its words in the previous turn"
        checks[name] = lambda message: overlaps(message.words, message.previous_words, overlap)
    if rules.max_repeats is not None:
        name = f"7. repeated more than {rules.max_repeats} times"
        checks[name] = lambda message: message_key(message.text) in repeated
    return checks


def has_long_word(text: str, max_word_chars: int) -> bool:
    """Whether a run of more than `max_word_chars` characters stands in `text` without a blank."""
    blank = -1
    while len(text) - blank - 1 > max_word_chars:  # from blank to blank, each time as far as words may reach
        blank = text.rfind(" ", blank + 1, blank + max_word_chars + 2)
        if blank < 0:
            break
    else:
        return False
    candidates = [word for word in text.split() if len(word) > max_word_chars]
    return any(len(run) > max_word_chars for word in candidates for run in _UNSPACED_RUN.split(word))


def letter_share(text: str) -> float:
    """Letters (with their marks, of any script) among the characters that are not blank; empty text: 1."""
    ascii_only = text.encode("ascii", "ignore")
    n_letters = len(ascii_only.translate(None, _NO_LETTERS))
    n_characters = len(ascii_only.translate(None, _BLANKS))
    if len(ascii_only) < len(text):
        others = "".join("".join(_NOT_ASCII.findall(text)).split())
        n_characters += len(others)
        if others.isalpha():
            n_letters += len(others)
        else:
            n_letters += sum(char.isalpha() or unicodedata.category(char)[0] == "M" for char in others)
    return n_letters / n_characters if n_characters else 1.0


def has_url(text: str) -> bool:
    """Whether a web address stands in `text`."""
    if "." not in text and "://" not in text:
        return False
    lower = text.lower()
    return any(map(lower.__contains__, _URL_SIGNS)) and bool(_URL.search(text))


def has_special_string(text: str) -> bool:
    """Whether `r/`, `u/` (not inside a word, as in "and/or") or an HTML entity (`&amp;`) stands in `text`."""
    return ("/" in text or "&" in text) and bool(_SPECIAL.search(text))


def overlaps(words: Sequence[Hashable], previous: Sequence[Hashable], max_overlap: float) -> bool:
    """Whether more than this share of `words` (or ids) is in `previous` too, each as often as it is there."""
    known = set(previous)
    if not words or sum(map(known.__contains__, words)) / len(words) <= max_overlap:
        return False  # most messages, without counting
    return (Counter(words) & Counter(previous)).total() / len(words) > max_overlap  # a product would round
