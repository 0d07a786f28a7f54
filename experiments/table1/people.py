"""Conversations between people, which no model has seen, beside self-chats; and the same in disorder.

python experiments/table1/people.py DATA FILE  # those of the test split of a prepared corpus
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plato2.data.shards import read_index
from plato2.prepare.corpora import ReadReport, read_corpus
from plato2.prepare.options import PrepareOptions
from plato2.prepare.survey import Survey
from plato2.talk.self_chat import SPEAKERS
from plato2.words import split_words

LEAST_WORDS = 6
"""Of the turn that counts as the start: before it people greet, and a greeting has no topic to stay on."""


def held_out(data: Path) -> list[list[str]]:
    """The turns of the conversations of the test split.

    Shards have samples, not conversations. So the corpus is read once more, and divided as when it was
    prepared.
    """
    options = PrepareOptions.from_dict({**read_index(data).prepare, "out": str(data)})

    found = list(read_corpus(options.corpus, options.files, ReadReport(), options.reader))
    survey = Survey(strict=False)
    for dialogue in found:
        survey.add(dialogue)
    is_test = survey.choose_splits(options)["test"]
    return [
        [" ".join(turn.text.split()) for turn in dialogue.turns]
        for number, dialogue in enumerate(found)
        if is_test[number]
    ]


def excerpts(conversations: Sequence[Sequence[str]], turns: int) -> list[list[str]]:
    """So many turns of each conversation, from the first one that is a start and has as many behind it.

    Args:
        conversations: their turns.
        turns: of an excerpt; a conversation without one is left out.
    """
    found = []
    for said in conversations:
        starts = (n for n in range(len(said) - turns + 1) if len(split_words(said[n])) >= LEAST_WORDS)
        if (first := next(starts, None)) is not None:
            found.append(list(said[first : first + turns]))
    return found


def shuffled(dialogues: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each start with turns of other dialogues: every turn is said once, in its place, but elsewhere.

    Turn p comes from the p-th dialogue after, so that no two of one dialogue meet again if there are at least
    as many dialogues as turns. What all of them say together stays the same, and so do length and variety.
    """
    n = len(dialogues)
    return [
        [said[0], *(dialogues[(number + place) % n][place] for place in range(1, len(said)))]
        for number, said in enumerate(dialogues)
    ]


def write(path: Path, name: str, dialogues: Sequence[Sequence[str]]) -> Path:
    """Dialogues as `plato2 self-chat` writes them: the start is given, `name` says the others."""
    lines = []
    for number, said in enumerate(dialogues):
        turns = [
            {"speaker": SPEAKERS[place % 2], "model": name if place else None, "text": text}
            for place, text in enumerate(said)
        ]
        lines.append(json.dumps({"id": number, "turns": turns}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    write(Path(sys.argv[2]), "people", held_out(Path(sys.argv[1])))
