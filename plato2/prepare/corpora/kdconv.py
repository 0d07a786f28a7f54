"""KdConv (Tsinghua, Apache-2.0): Chinese chats about films, music and travel, each turn with its facts.

    [{"name": "恋恋笔记本", "messages": [
       {"message": "你好。"},
       {"message": "恋恋笔记本是2004年上映的。",
        "attrs": [{"name": "恋恋笔记本", "attrname": "上映时间", "attrvalue": "2004年06月25日"}]}]}]

The two speakers take turns (a, b); the file does not name them. A fact becomes the text
`恋恋笔记本 上映时间 2004年06月25日`; of free text, whose attrname is `Information`, the attrname is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, read_dialogues

FREE_TEXT = "Information"
"""The attrname of a passage of running text."""


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """The dialogues of KdConv's JSON files (`film/train.json`, ...)."""
    return read_dialogues(files, report, parse)


def parse(record: Any, name: str) -> Dialogue:
    """A dialogue from a parsed record; the corpus has no ids, so `name` is its id.

    Raises:
        ValueError: it has another form; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('not a dialogue of the form {"messages": [...]}')
    turns = []
    for i, message in enumerate(record["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("message"), str):
            raise ValueError(f'message {i} is not of the form {{"message": ..., "attrs": [...]}}')
        attrs = message.get("attrs") or []
        if not isinstance(attrs, list):
            raise ValueError(f"message {i}: attrs is not a list")
        facts = dict.fromkeys(_fact(attr, i) for attr in attrs)  # some stand twice
        turns.append(Turn(message["message"], "ab"[i % 2], knowledge=list(facts)))
    return Dialogue(turns, id=name)


def _fact(attr: Any, i: int) -> str:
    keys = ("name", "attrname", "attrvalue")
    if not isinstance(attr, dict) or not all(isinstance(attr.get(key), str) for key in keys):
        raise ValueError(f"message {i}: an attr is not of the form {{name, attrname, attrvalue}}")
    return " ".join(attr[key] for key in keys if attr[key] != FREE_TEXT)
