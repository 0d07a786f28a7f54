"""ConvAI2 and Persona-Chat: numbered lines, a new dialogue begins where the number is 1.

    1 your persona: i like to ski.
    2 partner's persona: i have two cats.
    3 hi , how are you ?<TAB>great ! i was skiing .<TAB><TAB>a candidate|another candidate
    4 lucky you .<TAB>do you ski ?

The speaker `partner` says the first column, `self` replies with the second; the candidates are left out.
`your persona` is that of `self`. `__SILENCE__` instead of an utterance is no turn: then `self` begins.
The training file has each conversation twice, once from either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, merge_speakers, read_lines

SELF, PARTNER = "self", "partner"
SILENCE = "__SILENCE__"
_NUMBERED = re.compile(r"\s*([0-9]{1,9}) (.*)")
_PERSONA = re.compile(r"\s*(your|partner's) persona:(.*)", re.IGNORECASE)


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the dialogues of `train_self_original.txt` and the like; a damaged one is left out as a whole.

    Args:
        files: text files; with the persona of one side, of both, or of none.
        report: counts dialogues with a line that cannot be read or is missing.
    """
    lines: list[str] = []
    start, fault = ("", 0), ""
    for file, number, text in read_lines(files, report):
        match = _NUMBERED.fullmatch(text)
        if file != start[0] or (match and match[1] == "1"):
            yield from _finished(lines, start, fault, report)
            lines, start, fault = [], (file, number), ""
        if not fault and match is None:
            fault = f"line {number} does not begin with a number and a blank"
        elif not fault and match and int(match[1]) != len(lines) + 1:
            fault = f"line {number} has the number {match[1]} instead of {len(lines) + 1}: lines are missing"
        lines.append(match[2] if match else text)
    yield from _finished(lines, start, fault, report)


def _finished(lines: list[str], start: tuple[str, int], fault: str, report: ReadReport) -> Iterator[Dialogue]:
    """The dialogue of these lines, if it can be used."""
    dialogue = parse(lines)
    if fault:
        report.broken(*start, f"the dialogue that begins here: {fault}")
    elif dialogue.turns:
        yield dialogue
    elif lines:
        report.broken(*start, "the dialogue that begins here has no turn")


def parse(lines: Sequence[str]) -> Dialogue:
    """A dialogue from its lines without their numbers."""
    persona: dict[str | None, list[str]] = {}
    turns: list[Turn] = []
    for line in lines:
        if (found := persona_of(line)) is not None:
            speaker, sentence = found
            persona.setdefault(speaker, []).append(sentence)
            continue
        said = zip((PARTNER, SELF), line.split("\t"), strict=False)  # reward and candidates are no turns
        turns += [Turn(text.strip(), speaker) for speaker, text in said if is_said(text)]
    return Dialogue(merge_speakers(turns), persona)


def persona_of(line: str) -> tuple[str, str] | None:
    """(speaker, sentence) of a line such as `your persona: i like to ski.`; None for any other line."""
    match = _PERSONA.fullmatch(line)
    return None if match is None else (SELF if match[1].lower() == "your" else PARTNER, match[2].strip())


def is_said(text: str) -> bool:
    """Whether it is a turn: neither blank nor `__SILENCE__`."""
    return text.strip() not in ("", SILENCE)
