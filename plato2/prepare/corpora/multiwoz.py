"""MultiWOZ: people booking hotels, trains and tables in Cambridge, written by two crowd workers.

MultiWOZ 2.0 and 2.1 are one `data.json`; the user begins, the turns alternate, a system turn has `metadata`:

    {"SNG0073.json": {"goal": {...}, "log": [
       {"text": "I need a hotel in the north .", "metadata": {}},
       {"text": "Done , your number is 7GAWK763 .", "metadata": {"hotel": {"semi": {"area": "north"},
          "book": {"booked": [{"name": "acorn house", "reference": "7GAWK763"}], "people": "6"}}}}]}}

MultiWOZ 2.2 is folders of `dialogues_*.json` in the form of Schema-Guided Dialogue (sgd.py). The metadata
grows over a dialogue; knowledge of a system turn is what it has just booked, one text per booking:

    hotel booked: name acorn house, reference 7GAWK763

2.2 names neither bookings nor results: it has no knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, in_folders, read_dialogues, read_lines, sgd


def read(
    files: Sequence[str],
    report: ReadReport,
    knowledge: str = "results",
    only: str | None = None,
    leave_out: str | None = None,
) -> Iterator[Dialogue]:
    """Yield the dialogues of `data.json` (2.0, 2.1) or of folders of `dialogues_*.json` (2.2).

    Args:
        files: files or folders.
        report: counts dialogues of another form, and those left out by `only` and `leave_out`.
        knowledge: `results` gives a SYSTEM turn the bookings just made; `none` nothing.
        only: a file (or glob) with one id per line, such as `testListFile.txt`: read these dialogues.
        leave_out: the same, but leave them out: `data.json` holds validation and test, too.
    """
    kept, left_out = _ids(only, report, "only"), _ids(leave_out, report, "leave_out") or frozenset()
    bookings = sgd.with_results(knowledge)
    names = in_folders(files, "dialogues_*.json")
    for dialogue in read_dialogues(names, report, lambda record, name: parse(record, name, bookings)):
        if kept is not None and _plain(dialogue.id) not in kept:
            report.skipped["not in the list of only"] += 1
        elif _plain(dialogue.id) in left_out:
            report.skipped["in the list of leave_out"] += 1
        else:
            yield dialogue


def parse(record: Any, name: str, bookings: bool) -> Dialogue:
    """A dialogue from one value of `data.json`, or from a record of 2.2.

    Raises:
        ValueError: it has another form; says which.
    """
    if isinstance(record, dict) and "turns" in record:
        return sgd.parse(record, 0)
    if not isinstance(record, dict) or not isinstance(record.get("log"), list):
        raise ValueError('not a dialogue of the form {"log": [...]} (2.0, 2.1) or {"turns": [...]} (2.2)')
    turns: list[Turn] = []
    before: list[str] = []
    for i, message in enumerate(record["log"]):
        if not isinstance(message, dict) or not isinstance(message.get("text"), str):
            raise ValueError(f'turn {i} is not of the form {{"text": ..., "metadata": ...}}')
        turn = Turn(message["text"], ("USER", "SYSTEM")[i % 2])
        if turn.speaker == "SYSTEM" and bookings:
            booked = _booked(message.get("metadata"), i)
            turn.knowledge = [text for text in booked if text not in before]
            before = booked
        turns.append(turn)
    return Dialogue(turns, id=name)


def _booked(metadata: Any, i: int) -> list[str]:
    """What stands booked in all domains."""
    if not isinstance(metadata or {}, dict):
        raise ValueError(f"turn {i}: metadata is not an object")
    texts = []
    for domain, state in (metadata or {}).items():
        book = state.get("book") if isinstance(state, dict) else None
        bookings = book.get("booked") if isinstance(book, dict) else None
        if not isinstance(bookings or [], list) or not all(isinstance(one, dict) for one in bookings or []):
            raise ValueError(f"turn {i}: booked of {domain} is not a list of objects")
        texts += [f"{domain} booked: {sgd.slot_values(booking)}" for booking in bookings or []]
    return texts


def _ids(pattern: str | None, report: ReadReport, option: str) -> frozenset[str] | None:
    """The ids of a list file; the lists name them with and without `.json`."""
    if pattern is None:
        return None
    return frozenset(_plain(text.strip()) for _, _, text in read_lines([pattern], report, f"reader.{option}"))


def _plain(name: str | None) -> str:
    return (name or "").removesuffix(".json").upper()
