"""The Chit-Chat Challenge corpus (PyPI `chitchat-dataset`, MIT): 7,168 real conversations of 2018-2020.

A conversation is a list of messages, a message a list of utterances that one sender typed in a row. Both are
joined with a blank: a turn is everything one person says before the other one answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, merge_speakers, parse_time, read_json


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the conversations of the installed package (or of one given `dataset.json`)."""
    path = Path(files[0]) if files else _installed()
    if not path.is_file():
        raise UserError(f"files={str(path)!r}: no such file; leave files out to read the installed package")
    parts = read_json(str(path), lambda depth, _: depth == 0, "install chitchat-dataset again")
    for line, keys, conversation in parts:  # one at a time: as a whole they would take 0.5 GB
        try:
            yield Dialogue(merge_speakers(_turns(conversation)), id=keys[0])
        except (LookupError, TypeError, ValueError) as error:
            report.broken(str(path), line, f"not a conversation of this corpus ({error!r})")


def _turns(conversation: dict[str, Any]) -> list[Turn]:
    return [
        Turn(
            text=" ".join(utterance["text"] for utterance in message),
            speaker=message[0]["sender"],
            time=parse_time(message[0]["timestamp"]),
        )
        for message in conversation["messages"]
        if message
    ]


def _installed() -> Path:
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("the corpus chitchat is a package: pip install chitchat-dataset==0.9.0")
    return Path(spec.origin).with_name("dataset.json")
