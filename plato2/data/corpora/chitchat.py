"""The Chit-Chat Challenge corpus (PyPI `chitchat-dataset`, MIT): 7,168 real conversations of 2018-2020.

A conversation is a list of messages, a message a list of utterances that one sender typed in a row. Both are
joined with a blank: a turn is everything one person says before the other one answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plato2.config import UserError
from plato2.data.corpora import ReadReport, merge_speakers, parse_time
from plato2.data.samples import Dialogue, Turn


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the conversations of the installed package (or of one given `dataset.json`)."""
    path = Path(files[0]) if files else _installed()
    if not path.is_file():
        raise UserError(f"files={str(path)!r}: no such file; leave files out to read the installed package")
    for key, conversation in _values(path):
        turns = [
            Turn(
                text=" ".join(utterance["text"] for utterance in message),
                speaker=message[0]["sender"],
                time=parse_time(message[0]["timestamp"]),
            )
            for message in conversation["messages"]
            if message
        ]
        yield Dialogue(merge_speakers(turns), id=key)


def _installed() -> Path:
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("the corpus chitchat is a package: pip install chitchat-dataset==0.9.0")
    return Path(spec.origin).with_name("dataset.json")


def _values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, value) of a large JSON object, one at a time: parsed as a whole it would take 0.5 GB."""
    text = path.read_text(encoding="utf-8")
    decode = json.JSONDecoder().raw_decode
    try:
        position = text.index("{") + 1
        while (quote := text.find('"', position)) >= 0:
            key, position = decode(text, quote)
            value, position = decode(text, text.index("{", position))
            yield key, value
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); install chitchat-dataset again") from error
