"""JSON lines: one dialogue a line.

    {"turns": ["hi !", "hello , how are you ?"]}
    {"turns": [{"text": "hi !", "speaker": "a", "time": "2020-02-01T10:00:00Z", "knowledge": ["..."]}, ...],
     "persona": ["I have two cats."], "id": "17"}

`persona` is a list (of whoever responds) or an object of lists by speaker; everything but `turns` is
optional. `time` is a number (seconds since 1970) or an ISO 8601 text. Consecutive turns of one speaker are
joined. `.gz` files, globs and remote paths are fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.data.corpora import ReadReport, json_value, merge_speakers, parse_time, read_lines
from plato2.data.samples import Dialogue, Turn


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the dialogues of JSON lines files."""
    for file, number, text in read_lines(files, report):
        try:
            dialogue = parse(json_value(text))
        except ValueError as error:
            report.broken(file, number, str(error))
        else:
            yield dialogue


def parse(record: Any) -> Dialogue:
    """A dialogue from a parsed line.

    Raises:
        ValueError: it has another form; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("turns"), list):
        raise ValueError('not of the form {"turns": [...]}')
    turns = [_turn(turn, i) for i, turn in enumerate(record["turns"])]
    name = record.get("id")
    return Dialogue(
        merge_speakers(turns), _persona(record.get("persona")), None if name is None else str(name)
    )


def _turn(turn: Any, i: int) -> Turn:
    if isinstance(turn, str):
        return Turn(turn)
    if not isinstance(turn, dict) or not isinstance(turn.get("text"), str):
        raise ValueError(f'turn {i} is neither a text nor {{"text": ...}}')
    speaker = turn.get("speaker")
    return Turn(
        text=turn["text"],
        speaker=None if speaker is None else str(speaker),
        time=parse_time(turn.get("time")),
        knowledge=_texts(turn.get("knowledge"), f"knowledge of turn {i}"),
    )


def _texts(value: Any, name: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is neither a text nor a list of texts")
    return texts


def _persona(value: Any) -> dict[str | None, list[str]]:
    if isinstance(value, dict):
        return {str(speaker): _texts(texts, f"persona of {speaker}") for speaker, texts in value.items()}
    return {None: _texts(value, "persona")} if value else {}
