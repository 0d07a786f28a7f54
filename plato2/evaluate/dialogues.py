"""The one file format of what is evaluated, and its reader.

A line is a dialogue, as `plato2 self-chat` and `plato2 reply --contexts` write it: `turns`, each with a
`text`, a `speaker` and the `model` that said it; a turn without a model was given, or said by a person. A
static reply is a dialogue in which only the last turn has a model, and `references` are what people said in
its place. Transcripts in the form of Meena's release (`Meena: hi`) and ParlAI's logs are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from plato2 import bounded
from plato2.config import UserError
from plato2.formats import Open, parse

DIALOGUES_BYTES = 1 << 28
"""The largest file of dialogues."""
PEOPLE = "human"
"""The system of a file in which no turn has a model: both sides are people."""
CURE = 'a line is {"turns": [{"speaker": "A", "model": "NAME", "text": "hi"}, ...]}, as of plato2 self-chat'
_HEADING = re.compile(r"(?:\S+ )?Conversation \d+$")
_NAMED = re.compile(r"([^:]{1,40}): ?(.*)$")


@dataclass(frozen=True)
class Turn:
    """What was said."""

    text: str
    speaker: str
    model: str | None = None
    """The system that said it; None: it was given, or said by a person."""
    candidates: tuple[str, ...] = ()
    """What it was chosen from, best first; empty where that was not kept."""


@dataclass(frozen=True)
class Dialogue:
    """What is evaluated: a self-chat, a chat with a person, or a context with one reply."""

    id: str
    turns: tuple[Turn, ...]
    n_given: int
    """Turns at its start that no system said: the start utterance, or the context."""
    references: tuple[str, ...] = ()
    """What people said in the place of the last turn."""
    place: str = ""
    """FILE:LINE, for messages."""
    topic: str = ""
    """What a person was asked to talk about, if that is known."""

    def texts(self) -> list[str]:
        """What was said."""
        return [turn.text for turn in self.turns]

    @property
    def start(self) -> str:
        """What it began with: the topic, the start utterance or context, else the first turn."""
        return self.topic or "\n".join(self.texts()[: self.n_given or 1])

    @property
    def case(self) -> str:
        """What was sampled, and is drawn again for intervals.

        Dialogues of one start are one case. A chat with a person is a case of its own: people begin alike
        ("Hi!") and go on differently. So is one between people.
        """
        with_person = self.n_given == 0 or any(turn.model is None for turn in self.turns[self.n_given :])
        return f"{self.start}\n[{self.id}]" if with_person else self.start

    def said_by(self, system: str, speaker: str | None = None) -> list[int]:
        """Which turns a system said, from 0; of one speaker only where one is named."""
        return [
            number
            for number, turn in enumerate(self.turns)
            if turn.model == system and speaker in (None, turn.speaker)
        ]


class _SavedTurn(Open):
    text: str
    speaker: str = ""
    model: str | None = None
    candidates: list[dict[str, Any]] | None = None


class _SavedDialogue(Open):
    turns: Annotated[list[_SavedTurn], Field(min_length=1)]
    id: int | str | None = None
    references: list[str] | None = None
    topic: str = ""


class _ParlaiTurn(Open):
    id: str
    text: str


class _ParlaiLog(Open):
    dialog: list[list[_ParlaiTurn]]


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """The dialogues of a file; `.gz` is decompressed.

    Texts are joined where one speaker has several in a row without candidates in between; blanks are single.

    Args:
        path: JSON lines of ours or of ParlAI's logs, or a transcript in the form of Meena's (`.txt`).

    Raises:
        UserError: no such file, not one of these formats, no dialogue in it, or two of the same id.
    """
    path = Path(path)
    lines = read_text(path).split("\n")
    read = _transcript if path.name.removesuffix(".gz").endswith(".txt") else _json_lines
    dialogues = [_tidy(dialogue) for dialogue in read(path, lines)]
    if not dialogues:
        raise UserError(f"{path}: no dialogue in it; {CURE}")
    places: dict[str, str] = {}
    for dialogue in dialogues:
        if dialogue.id in places:
            raise UserError(
                f"{dialogue.place}: the id {dialogue.id} again, it is that of {places[dialogue.id]}; give "
                "each dialogue an id of its own, or none"
            )
        places[dialogue.id] = dialogue.place
    if all(turn.model is None for dialogue in dialogues for turn in dialogue.turns):
        return [_by_people(dialogue) for dialogue in dialogues]
    return dialogues


def systems(dialogues: Sequence[Dialogue]) -> list[str]:
    """The systems that say something in them, in the order in which they appear."""
    return list(
        dict.fromkeys(
            turn.model for dialogue in dialogues for turn in dialogue.turns if turn.model is not None
        )
    )


def read_text(path: str | Path, cure: str = CURE) -> str:
    """A user's text file within bounds; `.gz` is decompressed.

    Raises:
        UserError: no such file, too large, damaged, or not UTF-8.
    """
    return bounded.read_text(path, DIALOGUES_BYTES, cure)


def _json_lines(path: Path, lines: Sequence[str]) -> Iterator[Dialogue]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        if line.lstrip().startswith('{"dialog"'):
            log = parse(_ParlaiLog, line.encode(), place, CURE)
            turns = tuple(Turn(act.text, act.id, act.id) for pair in log.dialog for act in pair)
            yield Dialogue(str(number - 1), turns, 0, place=place)
            continue
        saved = parse(_SavedDialogue, line.encode("utf-8", "surrogatepass"), place, CURE)
        turns = tuple(
            Turn(
                turn.text,
                turn.speaker,
                turn.model,
                tuple(str(c.get("text", "")) for c in turn.candidates or ()),
            )
            for turn in saved.turns
        )
        name = str(number - 1 if saved.id is None else saved.id)
        yield Dialogue(name, turns, 0, tuple(saved.references or ()), place, saved.topic)


def _transcript(path: Path, lines: Sequence[str]) -> Iterator[Dialogue]:
    """`NAME: text` lines under headings like `Meena Conversation 1`; whoever is called Human is a person."""
    turns: list[Turn] = []
    place, name, count = "", "", 0
    for number, line in enumerate([*lines, "Conversation 0"], start=1):
        line = line.strip()
        if _HEADING.match(line):
            if turns:
                yield Dialogue(name, tuple(turns), 0, place=place)
            turns, place, name, count = [], f"{path}:{number}", str(count), count + 1
        elif named := _NAMED.match(line) if line else None:
            speaker, text = named.groups()
            turns.append(Turn(text, speaker, None if speaker.lower().startswith("human") else speaker))
        elif line and turns:  # a line break in what was said
            turns[-1] = replace(turns[-1], text=f"{turns[-1].text} {line}")
        elif line:
            raise UserError(f"{path}:{number}: {line!r:.60} is neither a heading nor NAME: text; {CURE}")


def _tidy(dialogue: Dialogue) -> Dialogue:
    """Single blanks, one turn for the texts of one speaker in a row, and the count of the given turns."""
    joined = []
    for (speaker, model), run in groupby(dialogue.turns, key=lambda turn: (turn.speaker, turn.model)):
        said = list(run)
        if len(said) == 1 or not speaker:
            joined += said
        else:
            joined.append(Turn(" ".join(turn.text for turn in said), speaker, model, said[-1].candidates))
    turns = tuple(replace(turn, text=" ".join(turn.text.split())) for turn in joined)
    first = next((number for number, turn in enumerate(turns) if turn.model is not None), len(turns))
    return replace(dialogue, turns=turns, n_given=first)


def _by_people(dialogue: Dialogue) -> Dialogue:
    """People are the system where there is no other."""
    return replace(dialogue, turns=tuple(replace(turn, model=PEOPLE) for turn in dialogue.turns), n_given=0)
