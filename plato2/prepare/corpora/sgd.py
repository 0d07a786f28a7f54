"""Schema-Guided Dialogue (Google, CC BY-SA 4.0), and every corpus in its form, such as MultiWOZ 2.2.

    [{"dialogue_id": "1_00000", "services": ["Music_3"], "turns": [
       {"speaker": "USER", "utterance": "Play some pop .", "frames": [...]},
       {"speaker": "SYSTEM", "utterance": "How about Alive by Sia ?", "frames": [
         {"service": "Music_3", "actions": [...], "service_call": {"method": "LookupMusic", ...},
          "service_results": [{"track": "Alive", "artist": "Sia"}, ...]}]}]}]

The corpus is a folder of `dialogues_001.json`, `dialogues_002.json`, ...; JSON lines with one dialogue per
line are fine, too. What a SYSTEM turn's own service calls found is its knowledge, one text per result:

    LookupMusic: track Alive, artist Sia
    ReserveRestaurant: no result

A turn that speaks of what an earlier call found has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, in_folders, merge_speakers, read_dialogues

KNOWLEDGE = ("results", "none")


def read(
    files: Sequence[str], report: ReadReport, knowledge: str = "results", max_results: int = 3
) -> Iterator[Dialogue]:
    """Yield the dialogues of folders of `dialogues_*.json`, of such files, or of JSON lines.

    Args:
        files: folders or files.
        report: counts dialogues of another form.
        knowledge: `results` gives a SYSTEM turn what its service calls found; `none` nothing.
        max_results: at most this many results of one call, the first ones.
    """
    most = _at_least_one("max_results", max_results) if with_results(knowledge) else 0
    names = in_folders(files, "dialogues_*.json")
    yield from read_dialogues(names, report, lambda record, _: parse(record, most))


def parse(record: Any, max_results: int) -> Dialogue:
    """A dialogue from a parsed record, with at most `max_results` results of a call as knowledge (0: none).

    Raises:
        ValueError: it has another form; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("turns"), list):
        raise ValueError('not a dialogue of the form {"turns": [...]} (a schema.json is none)')
    turns = []
    for i, turn in enumerate(record["turns"]):
        if not isinstance(turn, dict) or not isinstance(turn.get("utterance"), str):
            raise ValueError(f'turn {i} is not of the form {{"speaker": ..., "utterance": ...}}')
        speaker = turn.get("speaker")
        if speaker not in ("USER", "SYSTEM"):
            raise ValueError(f"turn {i}: speaker {speaker!r} is neither USER nor SYSTEM")
        found = _results(turn.get("frames"), max_results, i) if speaker == "SYSTEM" and max_results else []
        turns.append(Turn(turn["utterance"], speaker, knowledge=found))
    name = record.get("dialogue_id")
    return Dialogue(merge_speakers(turns), id=None if name is None else str(name))


def _results(frames: Any, max_results: int, i: int) -> list[str]:
    """Texts of a turn's results; the first one, which the system mostly offers, stands last.

    A context that is full loses its oldest texts, so the last knowledge text stays longest.
    """
    texts: list[str] = []
    if not isinstance(frames or [], list):
        raise ValueError(f"turn {i}: frames is not a list")
    for frame in frames or []:
        if not isinstance(frame, dict):
            raise ValueError(f"turn {i}: a frame is not an object")
        results = frame.get("service_results")
        if results is None:
            continue
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise ValueError(f"turn {i}: service_results is not a list of objects")
        call = frame.get("service_call")
        method = call.get("method") if isinstance(call, dict) else frame.get("service")
        found = [slot_values(result) for result in results[:max_results]] or ["no result"]
        texts += [f"{method}: {text}" for text in reversed(found)]
    return texts


def slot_values(values: dict[str, Any]) -> str:
    """`name Alive, release year 2013` of {"name": "Alive", "release_year": "2013"}; empty values left out."""
    texts = {slot: " / ".join(map(str, v)) if isinstance(v, list) else str(v) for slot, v in values.items()}
    return ", ".join(f"{slot.replace('_', ' ')} {text}" for slot, text in texts.items() if text)


def _at_least_one(option: str, value: object) -> int:
    """A reader's option that must be a whole number of at least 1; a text from the command line is fine.

    Raises:
        UserError: anything else.
    """
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"reader.{option}={value!r}: must be a whole number of at least 1")
    return number


def with_results(knowledge: str) -> bool:
    """The option `knowledge` of the task-oriented corpora: `results` or `none`.

    Raises:
        UserError: another value.
    """
    if knowledge not in KNOWLEDGE:
        raise UserError(f"reader.knowledge={knowledge!r}: must be one of {', '.join(KNOWLEDGE)}")
    return knowledge == "results"
