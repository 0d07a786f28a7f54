"""The two files of human evaluation: tasks, which are rated, and ratings, one per line.

Others' tools come in and go out through the same two (`exchange.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from plato2 import __version__
from plato2.bounded import TEXT_BYTES, read_file
from plato2.config import UserError
from plato2.formats import Closed, Count, parse

CURE = "give a file that plato2 evaluate human make wrote"
PER = Literal["utterance", "dialogue", "pair", "candidate"]
"""What a question is asked of: each turn of the system, a dialogue, two dialogues, a candidate."""


class Level(Closed):
    """One answer that a rater can give."""

    value: int | str
    """A score such as 0, 1, 2; of a pair `left`, `right` or `tie`."""
    label: str
    criterion: str = ""
    """When to give it, as the rater reads it (table 7)."""


class Question(Closed):
    """What raters are asked."""

    name: str
    """coherence, informativeness, engagingness, humanness, ..."""
    text: str
    per: PER
    levels: Annotated[list[Level], Field(min_length=2)]


class Said(Closed):
    """A turn as raters see it."""

    text: str
    by_system: bool
    """False: it was given, or said by a person; it is shown and not rated."""
    side: Count | None = None
    """Who said it: 0 is the side that is rated, 1, 2, ... are the others; None: `by_system` says it."""


class Shown(Closed):
    """A dialogue, or a context with a reply, of one system."""

    system: str
    """Never shown to raters."""
    dialogue: str
    """Its id in the file it comes from."""
    turns: list[Said]
    candidates: list[str] = Field(default_factory=list)
    """For the preset `candidates`: replies to the context, in the order in which they are shown."""


class Item(Closed):
    """What one rater rates at a time: one dialogue, or two for a pair (left, then right)."""

    id: str
    start: str
    """The start utterance, or the context: items that share it are resampled together."""
    shown: Annotated[list[Shown], Field(min_length=1, max_length=2)]
    expected: dict[str, int | str] | None = None
    """Of an attention check: question -> the only right answer."""


class Chat(Closed):
    """Of the preset `chat`: who may be met, and for how long raters talk."""

    speakers: Annotated[dict[str, str], Field(min_length=1)]
    """System -> KIND:WHERE, as `evaluate.speakers` reads it."""
    least: Annotated[int, Field(ge=1)] = 7
    """Rounds, a turn of the rater and a reply each, after which the chat may be rated."""
    most: Annotated[int, Field(ge=1)] = 14
    """Rounds after which it has to be."""


class Tasks(Closed):
    """A whole evaluation, before anyone has rated."""

    format: Literal["plato2 human tasks 1"] = "plato2 human tasks 1"
    plato2: str = __version__
    preset: str
    questions: Annotated[list[Question], Field(min_length=1)]
    items: Annotated[list[Item], Field(min_length=1)]
    raters_per_item: Annotated[int, Field(ge=1)] = 3
    seed: Count = 0
    chat: Chat | None = None
    """None: all that is rated has been said."""


def places(question: Question, item: Item) -> list[int | None]:
    """What a question is asked of in an item: turns or candidates, from 0; `[None]` for the whole."""
    if question.per == "utterance":
        return [place for place, said in enumerate(item.shown[0].turns) if said.by_system]
    return list(range(len(item.shown[0].candidates))) if question.per == "candidate" else [None]


class Rating(Closed):
    """One answer of one rater."""

    item: str
    question: str
    rater: str
    value: int | str
    """One of the question's levels; of a pair `left`, `right` or `tie`, whatever stood there."""
    place: int | None = None
    """The turn, or the candidate, from 0; None for a whole dialogue or a pair."""
    seconds: float | None = None
    """From when the item was shown until it was submitted."""


def read_tasks(path: str | Path) -> Tasks:
    """A file of tasks.

    Raises:
        UserError: no such file, another format, two items of one id or questions of one name, a chat with
            none of its systems.
    """
    try:
        data = read_file(path, TEXT_BYTES, CURE)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {CURE}") from None
    tasks = parse(Tasks, data, str(path), CURE)
    ids = [item.id for item in tasks.items]
    if len(set(ids)) < len(ids):
        again = next(name for number, name in enumerate(ids) if name in ids[:number])
        raise UserError(f"{path}: items.id={again} twice; give each item an id of its own")
    names = [question.name for question in tasks.questions]
    if len(set(names)) < len(names):
        again = next(name for number, name in enumerate(names) if name in names[:number])
        raise UserError(f"{path}: questions.name={again} twice; give each question a name of its own")
    if tasks.chat is not None:
        for item in tasks.items:
            if len(item.shown) != 1 or item.shown[0].system not in tasks.chat.speakers:
                raise UserError(f"{path}: item {item.id}: not one of the systems in chat.speakers; {CURE}")
    return tasks
