"""Selection sets: contexts whose candidates are labelled right or wrong, in three formats.

`jsonl`: {"context": [turns], "candidates": [texts], "labels": [1 or 0 each]}, with an `id` or not.
`dailydialog++` (Sai et al., 2020): each context has right replies, and wrong ones of two kinds. Chosen among
random ones, a reply need only be on the topic; adversarial ones share the context's words. So they make two
sets of the same contexts and right replies. `mutual` (Cui et al., 2020): an article, four options and the
letter of the right one, one file each or one line each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from plato2.config import UserError, did_you_mean
from plato2.evaluate.dialogues import read_text
from plato2.formats import Open, parse

Texts = list[str]
LETTERS = "ABCDEFGHIJ"
CURES = {
    "jsonl": 'a line is {"context": ["hi"], "candidates": ["hello", "no"], "labels": [1, 0]}; for other '
    "formats give --format",
    "dailydialog++": "a line has context, positive_responses, adversarial_negative_responses and "
    "random_negative_responses",
    "mutual": "a line has article, options and answers, the letter of the right option",
}
_SPEAKER = re.compile(r"(?:^|\s)[mf]\s?:\s", re.IGNORECASE)
"""Who says it, in MuTual: no model here was trained with such marks."""


@dataclass(frozen=True)
class Query:
    """A context and candidates to choose among."""

    context: tuple[str, ...]
    candidates: tuple[str, ...]
    labels: tuple[bool, ...]
    """Whether each candidate is right."""
    sets: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Set -> the numbers of the candidates that belong to it."""
    place: str = ""
    """FILE:LINE, for messages."""


class _Labelled(Open):
    id: int | str | None = None
    context: Annotated[Texts, Field(min_length=1)]
    candidates: Annotated[Texts, Field(min_length=1)]
    labels: list[Annotated[int, Field(ge=0, le=1)] | bool]


class _DailyDialog(Open):
    id: int | str | None = None
    context: Annotated[Texts, Field(min_length=1)]
    positive_responses: Texts
    adversarial_negative_responses: Texts = Field(default_factory=list)
    random_negative_responses: Texts = Field(default_factory=list)


class _MuTual(Open):
    id: int | str | None = None
    article: str
    options: Annotated[Texts, Field(min_length=1, max_length=len(LETTERS))]
    answers: Literal["A", "B", "C", "D", "E", "F", "G", "H", "I", "J"]


def read_queries(path: str | Path, format: str = "jsonl") -> list[Query]:
    """The contexts of a file, in its order; `.gz` is decompressed.

    Args:
        path: the file; of MuTual also a folder of `.txt` files.
        format: `jsonl`, `dailydialog++` or `mutual`.

    Raises:
        UserError: an unknown format, no such file, a line of another format, unequally many candidates and
            labels, two of the same id, or no context.
    """
    if format not in _READERS:
        raise UserError(f"--format {format}: no such format; {did_you_mean(format, _READERS)}")
    path = Path(path)
    files = [path]
    if path.is_dir() and format == "mutual":
        files = sorted(path.glob("*.txt"))
    name = path.name.split(".")[0]
    queries, places = [], dict[str, str]()
    for file in files:
        for number, line in enumerate(read_text(file, CURES[format]).split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            id, query = _READERS[format](line.encode("utf-8", "surrogatepass"), name, place)
            if not query.context or not query.context[-1].strip():
                raise UserError(f"{place}: the last turn of the context is empty: nothing to reply to")
            if id is not None and str(id) in places:
                raise UserError(
                    f"{place}: the id {id} again, it is that of {places[str(id)]}; give each context an id "
                    "of its own, or none"
                )
            places |= {} if id is None else {str(id): place}
            queries.append(query)
    if not queries:
        raise UserError(f"{path}: no context in it; {CURES[format]}")
    return queries


def _labelled(line: bytes, name: str, place: str) -> tuple[int | str | None, Query]:
    read = parse(_Labelled, line, place, CURES["jsonl"])
    n = len(read.candidates)
    if n != len(read.labels):
        raise UserError(f"{place}: {n} candidates and {len(read.labels)} labels; give each candidate one")
    labels = tuple(map(bool, read.labels))
    return read.id, Query(tuple(read.context), tuple(read.candidates), labels, {name: range(n)}, place)


def _dailydialog(line: bytes, name: str, place: str) -> tuple[int | str | None, Query]:
    read = parse(_DailyDialog, line, place, CURES["dailydialog++"])
    right, adversarial = read.positive_responses, read.adversarial_negative_responses
    candidates = (*right, *adversarial, *read.random_negative_responses)
    first = range(len(right))
    sets = {
        f"{name} random": (*first, *range(len(right) + len(adversarial), len(candidates))),
        f"{name} adversarial": (*first, *range(len(right), len(right) + len(adversarial))),
    }
    labels = tuple(number in first for number in range(len(candidates)))
    return read.id, Query(tuple(read.context), candidates, labels, sets, place)


def _mutual(line: bytes, name: str, place: str) -> tuple[int | str | None, Query]:
    read = parse(_MuTual, line, place, CURES["mutual"])
    right, n = LETTERS.index(read.answers), len(read.options)
    if right >= n:
        raise UserError(f"{place}: answers={read.answers!r} with {n} options; {CURES['mutual']}")
    turns = tuple(turn.strip() for turn in _SPEAKER.split(read.article) if turn.strip())
    options = tuple(" ".join(_SPEAKER.split(option)).strip() for option in read.options)
    labels = tuple(number == right for number in range(n))
    return read.id, Query(turns, options, labels, {name: range(n)}, place)


_READERS: dict[str, Callable[[bytes, str, str], tuple[int | str | None, Query]]] = {
    "jsonl": _labelled,
    "dailydialog++": _dailydialog,
    "mutual": _mutual,
}
