"""Lists of words and names: those that ship with plato2 (`plato2/lists`) and the user's own files.

words = WordList.read("en", "clean.offensive_words")  # or a path
words.find("What the HELL ?")                         # "hell"
bots = read_names("bots", "reddit.bots")              # or a path

A file has one entry per line, in UTF-8. Empty lines do not count, nor do comments, which begin with `# `;
`#tag` is an entry.

A corpus has billions of messages, and few of them hold a listed word. So a message is cut into words once,
and these are looked up in a dictionary: 2 microseconds, where an alternation of 900 words takes over 100.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from plato2.bounded import TEXT_BYTES, read_file
from plato2.config import UserError, expand_path

WORD_LISTS = {"en": "offensive_en.txt", "zh": "offensive_zh.txt"}
"""What `WordList.read` takes instead of a path; lists/SOURCES.md says where each list comes from."""
NAME_LISTS = {"bots": "bots.txt", "quarantined": "quarantined.txt"}
"""What `read_names` takes instead of a path."""

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
"""Scripts written without blanks between words, to stand inside [] of a pattern."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(r"\w+")
_COUNTED = re.compile(rf"(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+(?:'[^\W{UNSPACED}]+)*")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")
_WORDS_ONLY = bytes(ord(char if _ASCII_WORD.match(char) else " ") for char in map(chr, range(256)))
"""Bytes to themselves where they belong to an ASCII word, else to a blank."""


def words_of(text: str) -> list[str]:
    """The words of a text, to be counted: in lower case, without punctuation; in scripts without blanks, its
    characters."""
    return _COUNTED.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


class WordList:
    """Words and phrases to be found in messages: whole words, whatever the case.

    An entry with a character of a script without blanks is found anywhere. Blanks and punctuation of an entry
    stand for themselves: `sh!t` is neither `sht` nor `sh ! t`.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        folded = sorted({entry.casefold() for entry in entries}, key=lambda entry: (-len(entry), entry))
        self.entries = tuple(folded)  # what the list says, whatever the order and case of its lines
        spaced = [entry for entry in folded if not _UNSPACED.search(entry)]
        glued = [entry for entry in folded if _UNSPACED.search(entry)]
        self._by_word: dict[str, list[str]] = {}  # entries by a word that every text with one has
        symbols = []  # entries without any
        for entry in spaced:
            if words := _ASCII_WORD.findall(entry) or _WORD.findall(entry):
                # The longest is the rarest; among those of `s.o.b.` any but `s`, which is in every `it's`.
                word = max(sorted(words), key=len)
                self._by_word.setdefault(word, []).append(entry)
            else:
                symbols.append(entry)
        self._words = frozenset(self._by_word)
        self._is_ascii = all(map(str.isascii, self._words))
        self._symbols = re.compile("|".join(map(_whole, symbols))) if symbols else None
        self._glued = re.compile("|".join(map(re.escape, glued))) if glued else None

    @classmethod
    def read(cls, name_or_path: str, key: str) -> WordList:
        """The list of these entries; see `read_words`."""
        return cls(read_words(name_or_path, key))

    def find(self, text: str) -> str | None:
        """An entry that stands in `text`, casefolded, or None."""
        folded = text.casefold()
        words = ascii_words(folded)  # in a text that is not ASCII some are parts of words
        is_ascii = text.isascii()
        if not is_ascii:
            if self._glued and (match := self._glued.search(folded)):
                return match[0]
            if not self._is_ascii:
                words += _WORD.findall(folded)
        if not self._words.isdisjoint(words):
            for word in words:
                for entry in self._by_word.get(word, ()):
                    if (is_ascii and entry == word) or (entry in folded and re.search(_whole(entry), folded)):
                        return entry
        if self._symbols and (match := self._symbols.search(folded)):
            return match[0]
        return None


def read_words(name_or_path: str, key: str) -> list[str]:
    """The words and phrases of a list that ships with plato2, or of a file.

    Args:
        name_or_path: a name (`WORD_LISTS`) goes before a file; `./en` is a file.
        key: what the user sets it by, for error messages.

    Raises:
        UserError: no such file, not UTF-8, or no words in it.
    """
    return _read(name_or_path, key, WORD_LISTS, "word or phrase")


def ascii_words(folded: str) -> list[str]:
    """The runs of a-z, 0-9 and _ in a casefolded text; three times as fast as a pattern."""
    return folded.encode("ascii", "replace").translate(_WORDS_ONLY).decode().split()


def read_names(name_or_path: str, key: str) -> frozenset[str]:
    """Names of Reddit accounts or forums, casefolded and without `u/` or `r/`.

    Args:
        name_or_path: of a list that ships with plato2 (`NAME_LISTS`), or a file with one name per line.
        key: what the user sets it by, for error messages.

    Raises:
        UserError: no such file, not UTF-8, or no names in it.
    """
    names = (line.casefold() for line in _read(name_or_path, key, NAME_LISTS, "name"))
    return frozenset(re.sub(r"^/?[ru]/", "", name) for name in names)


def _whole(entry: str) -> str:
    """A pattern for `entry` where no word goes on before or after it."""
    return rf"(?<!\w){re.escape(entry)}(?!\w)"


def _read(name_or_path: str, key: str, shipped: Mapping[str, str], what: str) -> list[str]:
    """The entries of a list that ships with plato2, or of a file."""
    name = shipped.get(name_or_path)
    if not name:
        name_or_path = expand_path(name_or_path, key)
    source = files("plato2") / "lists" / name if name else Path(name_or_path)
    cure = f"give a file with one {what} per line, or a list that ships with plato2: {', '.join(shipped)}"
    try:
        data = source.read_bytes() if name else read_file(name_or_path, TEXT_BYTES, cure, f"{key}=")
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{key}={name_or_path}: cannot be read ({reason}); {cure}") from error
    entries = [line.strip() for line in lines if not (line + " ").startswith("# ") and line.strip()]
    if not entries:
        raise UserError(f"{key}={name_or_path}: the file has no {what}; {cure}")
    return entries
