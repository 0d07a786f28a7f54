"""LCCC (Chinese conversations of Weibo): a dialogue is a list of texts; two people take turns.

    [["生 快", "姐 也 要 快 哈"], ...]               JSON
    {"train": [["生 快", ...], ...], "valid": ...}   JSON with splits: name one with the option `split`
    ["生 快", "姐 也 要 快 哈"]                       JSON lines: one dialogue per line

The text is segmented, into characters or into words; blanks that Chinese does not have are taken out. A JSON
file is read one dialogue at a time, so its size does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, expand, json_value, read_json, read_lines, readable

SPEAKERS = ("A", "B")
ALL = "all"
# Chinese and Japanese letters and punctuation
_UNSPACED = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
# A blank beside one of them, or between two characters that each stand alone: "p a r t y", "2 0 1 9", ". . ."
_NO_BLANK = re.compile(rf"(?<=[{_UNSPACED}])\s+|\s+(?=[{_UNSPACED}])|(?<=(?<!\S)\S)\s+(?=\S(?!\S))")
_BEYOND_UTF8 = re.compile("[\ud800-\udfff]")


def read(
    files: Sequence[str], report: ReadReport, split: str | None = None, keep_blanks: bool = False
) -> Iterator[Dialogue]:
    """Yield the dialogues of JSON or JSON lines files.

    Args:
        files: the files; what is in them decides which form they have.
        report: counts dialogues that are not a list of texts.
        split: which split of a file with several, or `all`; it must be said, so that a test split is never
            trained on by accident.
        keep_blanks: leave the text as it is.

    Raises:
        UserError: a file without that split, or with several and none was named.
    """
    for file in expand(files):
        opening = _opening(file)
        if opening.startswith("{") and split is None:
            _check_one_split(file)
        parts = _lines(file, report) if opening == '["' else _dialogues(file, split)
        for number, value in parts:
            try:
                yield parse(value, keep_blanks)
            except ValueError as error:
                report.broken(file, number, str(error))


def parse(value: Any, keep_blanks: bool = False) -> Dialogue:
    """A dialogue from a list of texts.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError('not a dialogue of the form ["text", ...]')
    texts = [text.strip() if keep_blanks else join_characters(text) for text in value]
    if not texts:
        raise ValueError("a dialogue without texts")
    for i, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {i} of the dialogue is empty")
        if _BEYOND_UTF8.search(text):
            raise ValueError(f"text {i} of the dialogue is not valid UTF-8")
    return Dialogue([Turn(text, SPEAKERS[i % 2]) for i, text in enumerate(texts)])


def join_characters(text: str) -> str:
    """Segmented text without the blanks that its script does not have; those between Latin words stay.

    Where Latin words are segmented into characters, too, their ends are lost: `p a r t y` is `party`, and
    `o h n o` is `ohno`.
    """
    words = text.split()
    joined = "".join(words)
    if len(joined) == len(words):  # all are characters: most of the corpus, and five times as fast
        return joined
    return _NO_BLANK.sub("", text.strip())


def _opening(file: str) -> str:
    """The first two characters that are not blank: what form a file has."""
    with readable(file) as stream:
        return "".join(stream.read(4096).decode("utf-8-sig", errors="ignore").split())[:2]


def _lines(file: str, report: ReadReport) -> Iterator[tuple[int, Any]]:
    for _, number, text in read_lines([file], report):
        try:
            value = json_value(text)
        except ValueError as error:
            report.broken(file, number, str(error))
        else:
            yield number, value


def _check_one_split(file: str) -> None:
    names = list(dict.fromkeys(keys[0] for _, keys, _ in read_json(file, _holds_dialogues) if keys))
    if len(names) > 1:
        raise UserError(f"{file} holds the splits {', '.join(names)}: name one in reader.split, or {ALL}")


def _dialogues(file: str, split: str | None) -> Iterator[tuple[int, Any]]:
    """(line, dialogue) of a JSON file, or of a split of it."""
    names: dict[str, None] = {}
    for number, keys, value in read_json(file, _holds_dialogues):
        names |= dict.fromkeys(keys[:1])
        if keys and (value == [] or split not in (None, ALL, keys[0])):  # an empty split; another split
            continue
        yield number, value
    if names and split not in (None, ALL, *names):
        raise UserError(f"reader.split={split!r}: {file} holds the splits {', '.join(names)}")


def _holds_dialogues(depth: int, opening: str) -> bool:
    """Whether to go into a container: an object of splits, or a list of lists."""
    return (opening[0] == "{" and depth == 0) or (opening in ("[[", "[{") and depth < 2)
