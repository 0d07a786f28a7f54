"""JSON lines, one dialogue per line, or a JSON list of dialogues.

    {"turns": ["hi !", "hello , how are you ?"]}
    {"turns": [{"text": "hi !", "speaker": "a", "time": "2020-02-01T10:00:00Z", "knowledge": ["..."]}, ...],
     "persona": ["I have two cats."], "id": "17"}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "hi !"}, ...]}      OpenAI
    {"conversations": [{"from": "human", "value": "hi !"}, {"from": "gpt", "value": "hello ."}]}      ShareGPT

`persona` is a list (of whoever responds) or an object of lists by speaker; everything but `turns` is
optional. `time` is a number (seconds since 1970) or an ISO 8601 text. Consecutive turns of one speaker are
joined. What a `system` or `developer` says becomes persona, for whoever responds; a content of several parts
is the text of those that are text, without images. Compressed files, globs and remote paths are fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, merge_speakers, parse_time, read_records

FORMS = ("turns", "messages", "conversations")
"""Where the turns of a dialogue are: ours, OpenAI's, ShareGPT's."""
KEYS = (("speaker", "text"), ("role", "content"), ("from", "value"))
"""What a turn calls its speaker and its text, in the same order."""
SYSTEM = ("system", "developer")


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the dialogues of JSON lines files or JSON lists."""
    for file, number, record in read_records(files, report):
        try:
            yield parse(record)
        except ValueError as error:
            report.broken(file, number, str(error))


def parse(record: Any) -> Dialogue:
    """A dialogue from a parsed line.

    Raises:
        ValueError: it has another form; says which.
    """
    found = [record[form] for form in FORMS if form in record] if isinstance(record, dict) else []
    turns = next((value for value in found if value), found[0] if found else None)
    if not isinstance(turns, list):
        raise ValueError('not of the form {"turns": [...]}, {"messages": [...]} or {"conversations": [...]}')
    dialogue = parse_turns(turns)
    for speaker, texts in _persona(record.get("persona")).items():
        dialogue.persona[speaker] = [*dialogue.persona.get(speaker, []), *texts]
    name = record.get("id")
    dialogue.id = None if name is None else str(name)
    return dialogue


def parse_turns(turns: list[Any]) -> Dialogue:
    """A dialogue from its turns: texts, or objects in one of the forms of `KEYS`.

    Raises:
        ValueError: one of them has another form.
    """
    parsed = [_turn(turn, i) for i, turn in enumerate(turns)]
    system = [turn.text for turn in parsed if turn.speaker in SYSTEM]
    spoken = merge_speakers(turn for turn in parsed if turn.speaker not in SYSTEM)
    return Dialogue(spoken, {None: system} if system else {})


def _turn(turn: Any, i: int) -> Turn:
    if isinstance(turn, str):
        return Turn(turn)
    for speaker_key, text_key in KEYS:
        if isinstance(turn, dict) and (text := _content(turn.get(text_key))) is not None:
            speaker = turn.get(speaker_key)
            return Turn(
                text=text,
                speaker=None if speaker is None else str(speaker),
                time=parse_time(turn.get("time")),
                knowledge=_texts(turn.get("knowledge"), f"knowledge of turn {i}"),
            )
    keys = [key for _, key in KEYS]
    if isinstance(turn, dict) and (key := next((key for key in keys if key in turn), None)):
        reason = "a call of a tool" if turn.get("tool_calls") else "null" if turn[key] is None else "no text"
        raise ValueError(f"turn {i}: {key} must be a text, or a list with parts of type text; it is {reason}")
    raise ValueError(f"turn {i} is neither a text nor an object with {', '.join(keys[:-1])} or {keys[-1]}")


def _content(value: Any) -> str | None:
    """A text; OpenAI's may be a list of parts, of which those of other types, such as images, have none."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict)]
        parts = [part for part in parts if str(part.get("type", "text")).endswith("text")]  # also input_text
        spoken = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        return " ".join(spoken) if spoken else None
    return value if isinstance(value, str) else None


def _texts(value: Any, name: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is neither a text nor a list of texts")
    return texts


def _persona(value: Any) -> dict[str | None, list[str]]:
    if isinstance(value, dict):
        return {str(speaker): _texts(texts, f"persona of {speaker}") for speaker, texts in value.items()}
    return {None: _texts(value, "persona")} if value else {}
