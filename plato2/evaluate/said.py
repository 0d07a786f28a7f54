"""What systems said in the files that are compared, and nothing that was given to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plato2.config import UserError, expand_path
from plato2.evaluate.dialogues import Dialogue, read_dialogues, systems
from plato2.evaluate.options import BOTH, Kind
from plato2.words import split_words


@dataclass(frozen=True)
class Utterance:
    """What a system said."""

    case: int
    dialogue: int
    speaker: str
    before: tuple[str, ...]
    """All turns before it."""
    start: str | None
    """What a dialogue began with; None where the utterance itself is that."""
    text: str
    words: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    """Without doubles."""


System = list[Utterance]


def read_systems(
    files: Sequence[str], kind: Kind, speaker: str = BOTH
) -> tuple[dict[str, System], list[Path]]:
    """What each system said, by its name, and the paths of the files.

    Args:
        files: `FILE`, whose systems have the names of their models, or `NAME=FILE`.
        kind: of `replies` a system says only the last turn of each dialogue.
        speaker: whose turns count, or `both`.

    Raises:
        UserError: a file that cannot be read, two systems of one name, or no turn of that speaker.
    """
    found: dict[str, System] = {}
    paths = []
    for given in files:
        name, path = _named(given)
        paths.append(path)
        dialogues = read_dialogues(path)
        there = systems(dialogues)
        for model in there:
            label = model if not name else name if len(there) == 1 else f"{name} {model}"
            if label in found:
                raise UserError(f"{given}: another file has {label}, too; give each a name: NAME={path}")
            found[label] = _said_by(model, dialogues, kind, speaker, path)
    return found, paths


def _named(given: str) -> tuple[str, Path]:
    path = Path(expand_path(given, "FILE"))
    name, sign, rest = given.partition("=")
    if path.exists() or not (sign and name and rest):
        return "", path
    return name, Path(expand_path(rest, "FILE"))


def _said_by(model: str, dialogues: Sequence[Dialogue], kind: Kind, speaker: str, path: Path) -> System:
    said: System = []
    cases: dict[Any, int] = {}
    for number, dialogue in enumerate(dialogues):
        all_turns = dialogue.said_by(model)
        if kind == "replies" and all_turns and all_turns != [len(dialogue.turns) - 1]:
            raise UserError(
                f"{dialogue.place}: {model} says {len(all_turns)} turns, not only the last one, so it is not "
                "a reply; use plato2 evaluate dialogues, or give only the reply's turn a model"
            )
        texts = dialogue.texts()
        start = " ".join(texts[: dialogue.n_given or 1])
        for turn in dialogue.said_by(model, None if speaker == BOTH else speaker):
            before = tuple(texts[:turn])
            case = cases.setdefault(before if kind == "replies" else number, len(cases))
            is_last = turn == len(texts) - 1
            said.append(
                Utterance(
                    case,
                    number,
                    dialogue.turns[turn].speaker,
                    before,
                    start if turn else None,
                    texts[turn],
                    tuple(split_words(texts[turn])),
                    dialogue.turns[turn].candidates,
                    tuple(dict.fromkeys(dialogue.references)) if is_last else (),
                )
            )
    if not said:
        names = dict.fromkeys(t.speaker for dialogue in dialogues for t in dialogue.turns if t.model == model)
        raise UserError(
            f"speaker={speaker}: {model} in {path} speaks as {', '.join(map(repr, names))}; name one, or both"
        )
    return said


def by_case(said: System) -> list[System]:
    """The utterances of each case."""
    cases: dict[int, System] = {}
    for one in said:
        cases.setdefault(one.case, []).append(one)
    return list(cases.values())


def by_dialogue(said: System) -> list[System]:
    """The utterances in each dialogue."""
    dialogues: dict[int, System] = {}
    for one in said:
        dialogues.setdefault(one.dialogue, []).append(one)
    return list(dialogues.values())
