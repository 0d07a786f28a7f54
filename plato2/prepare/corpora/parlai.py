"""ParlAI: episodes in its text format, and its logs of conversations (one dialogue per line of JSON).

    text:your persona: i ski.\\nMusic\\nhi , who are you ?<TAB>labels:a skier !|i ski .
    text:nice<TAB>labels:and you ?<TAB>episode_done:True

    {"dialog": [[{"id": "model_1", "text": "hi !"}, {"id": "model_2", "text": "hello ."}], ...],
     "context": [{"id": "context", "text": "your persona: i ski."}, ...]}

In text, `partner` says `text` and `self` replies with the first label. Persona lines are of `self` or, as
`partner's persona`, of `partner`. Lines between them and the last line of an episode's first text are its
context (a topic, what was said before): knowledge of the first reply, as is `checked_sentence` (Wizard of
Wikipedia) of its own. In a log a speaker has the name of its `id`; persona and context of the first one are
in the first entry of `context`. `plato2 self-chat --format parlai` writes such a log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, expand, json_value, merge_speakers, read_lines
from plato2.prepare.corpora.convai2 import PARTNER, SELF, is_said, persona_of

NO_KNOWLEDGE = "no_passages_used"
_ESCAPES = (("\\t", "\t"), ("\\n", "\n"), ("__PIPE__", "|"))
_Persona = dict[str | None, list[str]]


def read(files: Sequence[str], report: ReadReport, context: bool = True) -> Iterator[Dialogue]:
    """Yield the episodes of text files and of logs; a damaged one is left out as a whole.

    Args:
        files: text files and logs; each line tells what it is.
        report: counts episodes with a line that cannot be read.
        context: whether the lines before the last one of an episode's first text are knowledge; else they are
            part of that turn.
    """
    for file in expand(files):
        yield from _read_file(file, report, context)


def _read_file(file: str, report: ReadReport, context: bool) -> Iterator[Dialogue]:
    episode: list[dict[str, str]] = []
    start, fault, n_broken = 0, "", report.n_broken
    for _, number, line in read_lines([file], report):
        if report.n_broken != n_broken:  # it may have been the end of an episode
            fault = fault or f"a line before line {number} is not valid UTF-8"
        if line.lstrip().startswith("{"):
            try:
                yield parse_log(json_value(line), context)
            except ValueError as error:
                report.broken(file, number, str(error))
            n_broken = report.n_broken
            continue
        start = start if episode else number
        columns = [column for column in line.split("\t") if column]
        message = dict(column.partition(":")[::2] for column in columns)
        if not all(":" in column for column in columns):
            fault = fault or f"line {number} has a column that is not of the form key:value"
        elif not message.keys() & {"text", "labels", "eval_labels"}:
            fault = fault or f"line {number} has neither text: nor labels:"
        episode.append(message)
        if message.get("episode_done", "False").strip() != "False":
            yield from _finished(episode, (file, start), fault, report, context)
            episode, fault = [], ""
        n_broken = report.n_broken
    if episode:  # ParlAI, too, takes the end of a file for the end of an episode
        if report.n_broken != n_broken:
            fault = fault or "a line after it is not valid UTF-8"
        yield from _finished(episode, (file, start), fault, report, context)


def _finished(
    episode: list[dict[str, str]], start: tuple[str, int], fault: str, report: ReadReport, context: bool
) -> Iterator[Dialogue]:
    """The dialogue of an episode, if it can be used."""
    if fault:
        report.broken(*start, f"the episode that begins here: {fault}")
        return
    try:
        yield parse_episode(episode, context)
    except ValueError as error:
        report.broken(*start, str(error))
        return
    alternatives = sum(len(_labels(message)[1:]) for message in episode)
    if alternatives:
        report.skipped["labels after the first one"] += alternatives


def parse_episode(episode: Sequence[Mapping[str, str]], context: bool = True) -> Dialogue:
    """A dialogue from the fields of the lines of an episode.

    Raises:
        ValueError: nothing is said in it.
    """
    persona: _Persona = {}
    turns: list[Turn] = []
    knowledge: list[str] = []
    for message in episode:
        lines = _without_persona(_plain(message.get("text", "")), PARTNER, SELF, persona)
        before, said = _divided(lines, context and message is episode[0], message.get("chosen_topic"))
        knowledge += before
        if said:
            turns.append(Turn(said, PARTNER))
        if labels := _labels(message):
            fact = _plain(message.get("checked_sentence", "")).strip()
            knowledge += [fact] if fact not in ("", NO_KNOWLEDGE) else []
            turns.append(Turn(labels[0], SELF, knowledge=knowledge))
            knowledge = []
    return _dialogue(turns, persona)


def parse_log(record: Any, context: bool = True) -> Dialogue:
    """A dialogue from a line of a log of conversations.

    Raises:
        ValueError: it has another form, or nothing is said in it.
    """
    pairs = record.get("dialog") if isinstance(record, dict) else None
    shown = record.get("context") or [] if isinstance(record, dict) else []
    if not isinstance(pairs, list) or not all(isinstance(part, list) for part in [shown, *pairs]):
        raise ValueError('not of the form {"dialog": [[{"id": ..., "text": ...}, ...], ...]}')
    acts = [(place, act) for part in [shown, *pairs] for place, act in enumerate(part)]
    for i, (_, act) in enumerate(acts):
        if not isinstance(act, dict) or not isinstance(act.get("text"), str):
            raise ValueError(f"entry {i} of context and dialog has no text")
    spoken = [(place, act) for place, act in acts if act.get("id") != "context"]
    names = _names(spoken)

    persona: _Persona = {}
    knowledge: dict[str | None, list[str]] = {}
    for place, act in acts:
        if act.get("id") == "context":  # it is shown to the speaker in that place
            owner, other = names.get(place), names.get(1 - place)
            knowledge.setdefault(owner, []).extend(_without_persona(act["text"], other, owner, persona))
    turns: list[Turn] = []
    for i, (place, act) in enumerate(spoken):
        name = str(act.get("id"))
        speaker = name if name in names.values() else names[place]
        listener = next((name for name in names.values() if name != speaker), None)
        before, said = _divided(_without_persona(act["text"], speaker, listener, persona), context and i == 0)
        knowledge.setdefault(listener, []).extend(before)
        if said:
            turns.append(Turn(said, speaker, knowledge=knowledge.pop(speaker, [])))
    return _dialogue(turns, persona)


def _names(spoken: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[int, str]:
    """Who speaks in each place of a pair; where one id is in both, they are told apart by the place."""
    names: dict[int, str] = {}
    for place, act in spoken:
        names.setdefault(place, str(act.get("id", "speaker")))
    if len(set(names.values())) < len(names):
        return {place: f"{name}_{place + 1}" for place, name in names.items()}
    return names


def _dialogue(turns: list[Turn], persona: _Persona) -> Dialogue:
    if not turns:
        raise ValueError("nothing is said in this dialogue")
    return Dialogue(merge_speakers(turns), persona)


def _plain(text: str) -> str:
    """A field's text without ParlAI's escapes."""
    for escape, plain in _ESCAPES:
        text = text.replace(escape, plain)
    return text


def _labels(message: Mapping[str, str]) -> list[str]:
    """What may be replied: the label that was chosen first."""
    labels = message.get("labels", message.get("eval_labels", "")).split("|")
    texts = [" ".join(_plain(label).split()) for label in labels]
    return [text for text in texts if is_said(text)]


def _without_persona(text: str, speaker: str | None, listener: str | None, persona: _Persona) -> list[str]:
    """The lines of what `speaker` says to `listener`; persona lines among them are added to `persona`."""
    lines = []
    for line in text.split("\n"):
        found = persona_of(line)
        if found is not None:  # "your": of the one who reads it
            persona.setdefault(listener if found[0] == SELF else speaker, []).append(found[1])
        elif is_said(line):
            lines.append(line.strip())
    return lines


def _divided(lines: list[str], has_context: bool, topic: str | None = None) -> tuple[list[str], str]:
    """(context, what is said): the last line is said, unless it is the topic that the two were given."""
    if not has_context:
        return [], " ".join(lines)
    n_said = 0 if not lines or lines[-1] == topic else 1
    return lines[: len(lines) - n_said], "".join(lines[len(lines) - n_said :])
