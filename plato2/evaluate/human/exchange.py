"""Tasks and ratings in the formats of other tools: CSV, ACUTE-Eval (ParlAI), Potato.

Only formats; none of these tools is needed. CSV and Potato carry all kinds of tasks, ACUTE-Eval pairs.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from plato2.config import UserError
from plato2.evaluate.dialogues import read_text
from plato2.evaluate.human.formats import Item, Level, Question, Rating, Said, Shown, Tasks, places
from plato2.files import replace_text
from plato2.formats import Open, parse

COLUMNS = ("item", "start", "systems", "dialogues", "question", "place", "rater", "value", "seconds")
"""Of our CSV; an import needs item, question, rater and value."""
ACUTE_COLUMNS = (
    *("worker", "time_taken", "question", "correct", "winner", "loser", "eval_choice_0", "eval_choice_1"),
    *("reason", "is_onboarding", "matchup", "pairing_id"),
)
"""Of the table that ParlAI's analysis of ACUTE-Eval makes; an import needs worker, winner and pairing_id."""
ACUTE_QUESTION = "Who would you prefer to talk to for a long conversation?"
OTHER = "other_speaker"
ANSWERS = "annotated_instances.jsonl"
"""Potato's file of one rater's answers; its folder has the rater's name."""


# ------------------------------------------------------------------------------------------------------ CSV


def to_csv(tasks: Tasks, ratings: Sequence[Rating]) -> str:
    """A row for each rating; of a pair `systems` and `dialogues` are left and right, with | between."""
    items = {item.id: item for item in tasks.items}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for rating in ratings:
        item = items.get(rating.item)
        shown = item.shown if item else []
        systems, dialogues = "|".join(one.system for one in shown), "|".join(one.dialogue for one in shown)
        start = item.start if item else ""
        of_item = (rating.item, start, systems, dialogues, rating.question, rating.place)
        rows.writerow([*of_item, rating.rater, rating.value, rating.seconds])
    return text.getvalue()


def from_csv(path: Path) -> list[Rating]:
    """Ratings of a table with the columns item, question, rater, value, and place if there are turns.

    Raises:
        UserError: no such file, a column that is missing, or a cell that cannot be.
    """
    cure = "a table needs the columns item, question, rater, value"
    found = []
    for number, row in _rows(path, ("item", "question", "rater", "value"), cure):
        place, seconds = row.get("place", ""), row.get("seconds", "")
        try:
            found.append(
                Rating(
                    item=row["item"],
                    question=row["question"],
                    rater=row["rater"],
                    value=_level(row["value"]),
                    place=int(place) if place else None,
                    seconds=float(seconds) if seconds else None,
                )
            )
        except ValueError:
            raise UserError(
                f"{path}: row {number}: place={place!r}, seconds={seconds!r}: not numbers; {cure}"
            ) from None
    return found


def _rows(path: Path, needed: Sequence[str], cure: str) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv.DictReader(io.StringIO(read_text(path, cure), newline=""), restval="", restkey="")
    try:
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise UserError(f"{path}: no column {missing[0]}; {cure}")
        yield from enumerate(rows, start=1)
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error}); {cure}") from None


def _level(text: str) -> int | str:
    """A level as tasks have it: whole numbers are numbers."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else text


# ----------------------------------------------------------------------------------------------- ACUTE-Eval


class _Act(Open):
    text: str
    id: str | None = None
    speaker: str | None = None


class _Spoken(Open):
    dialogue: list[_Act]
    speakers: list[str] = Field(default_factory=list)
    id: int | str | None = None


class _Pairing(Open):
    speakers_to_eval: Annotated[list[str], Field(min_length=2, max_length=2)]
    dialogue_dicts: Annotated[list[_Spoken], Field(min_length=2, max_length=2)]
    is_onboarding: bool = False
    correct_answer: str | None = None


def to_acute(tasks: Tasks) -> str:
    """The lines of `pairings.jsonl`: the items of two dialogues; attention checks are its onboarding.

    Raises:
        UserError: no item has two dialogues.
    """
    lines = []
    for number, item in enumerate(_pairs_of(tasks)):
        names = _speakers(item)
        dicts = [
            {
                "speakers": [name, OTHER],
                "id": shown.dialogue,
                "dialogue": [
                    {"id": name if turn.by_system else OTHER, "text": turn.text} for turn in shown.turns
                ],
            }
            for name, shown in zip(names, item.shown, strict=True)
        ]
        pairing: dict[str, Any] = {
            "is_onboarding": item.expected is not None,
            "speakers_to_eval": names,
            "tags": [item.id],
            "dialogue_ids": [2 * number, 2 * number + 1],
            "dialogue_dicts": dicts,
        }
        for right in (item.expected or {}).values():
            pairing["correct_answer"] = names[("left", "right").index(str(right))]
        lines.append(json.dumps(pairing, ensure_ascii=False) + "\n")
    return "".join(lines)


def acute_tasks(path: Path, question: str = ACUTE_QUESTION) -> Tasks:
    """Tasks of a `pairings.jsonl`; its items are called after the number of their line, from 0.

    Raises:
        UserError: no such file, or a line of another format.
    """
    cure = 'a line is {"speakers_to_eval": [two names], "dialogue_dicts": [two dialogues]}'
    items = []
    for number, line in enumerate(filter(str.strip, read_text(path, cure).split("\n"))):
        data = line.encode("utf-8", "surrogatepass")
        pairing = parse(_Pairing, data, f"{path}:{number + 1}", cure)
        names = pairing.speakers_to_eval
        shown = [
            Shown(
                system=name,
                dialogue=str(number if spoken.id is None else spoken.id),
                turns=[
                    Said(text=act.text, by_system=name in (act.id, act.speaker)) for act in spoken.dialogue
                ],
            )
            for name, spoken in zip(names, pairing.dialogue_dicts, strict=True)
        ]
        expected: dict[str, int | str] | None = None
        if pairing.is_onboarding:
            if pairing.correct_answer not in names:
                raise UserError(
                    f"{path}:{number + 1}: correct_answer={pairing.correct_answer!r}: neither of "
                    f"speakers_to_eval; {cure}"
                )
            expected = {"preference": "left" if pairing.correct_answer == names[0] else "right"}
        starts = dict.fromkeys(one.turns[0].text for one in shown if one.turns)
        items.append(Item(id=str(number), start="\n".join(starts), shown=shown, expected=expected))
    if not items:
        raise UserError(f"{path}: no pairing in it; {cure}")
    sides = [Level(value=side, label=side) for side in ("left", "right")]
    asked = Question(name="preference", text=question, per="pair", levels=sides)
    return Tasks(preset="acute", questions=[asked], items=items)


def to_acute_table(tasks: Tasks, ratings: Sequence[Rating]) -> str:
    """A row for each rating of a pair, as ParlAI's analysis of ACUTE-Eval has it; `from_acute` reads it.

    Raises:
        UserError: no item has two dialogues, a rating of something else, or a tie, which ACUTE-Eval lacks.
    """
    pairs = _pairs_of(tasks)
    number_of = {item.id: number for number, item in enumerate(pairs)}
    asked = {question.name: question.text for question in tasks.questions}
    text = io.StringIO()
    rows = csv.DictWriter(text, ACUTE_COLUMNS, lineterminator="\n")
    rows.writeheader()
    for rating in ratings:
        if rating.item not in number_of or rating.value not in ("left", "right"):
            raise UserError(
                f"rating of item {rating.item} by {rating.rater}: value={rating.value}: ACUTE-Eval has pairs "
                "and their winners only; use --to csv"
            )
        number = number_of[rating.item]
        item = pairs[number]
        names, right = _speakers(item), (item.expected or {}).get(rating.question)
        winner, loser = names if rating.value == "left" else names[::-1]
        first, second = sorted(names)
        rows.writerow(
            {
                "worker": rating.rater,
                "time_taken": rating.seconds,
                "question": asked.get(rating.question, rating.question),
                "correct": -1 if item.expected is None else rating.value == right,
                "winner": winner,
                "loser": loser,
                "eval_choice_0": first,
                "eval_choice_1": second,
                "is_onboarding": item.expected is not None,
                "matchup": f"{first}__vs__{second}",
                "pairing_id": number,
            }
        )
    return text.getvalue()


def from_acute(path: Path, tasks: Tasks) -> list[Rating]:
    """Ratings of a table with columns of ACUTE-Eval's analysis: worker, winner, pairing_id; question and
    time_taken if they are there.

    Args:
        path: the table.
        tasks: what was exported to ACUTE-Eval, or imported from its pairings: pairing 0 is the first pair.

    Raises:
        UserError: a column that is missing, a pairing or a winner that the tasks do not have.
    """
    cure = "a table needs the columns worker, winner, pairing_id"
    pairs = _pairs_of(tasks)
    questions = [question for question in tasks.questions if question.per == "pair"]
    named = {text: q.name for q in questions for text in (q.name, q.text)}
    found = []
    for number, row in _rows(path, ("worker", "winner", "pairing_id"), cure):
        where = f"{path}: row {number}"
        place = _level(row["pairing_id"].removesuffix(".0"))
        if not isinstance(place, int) or not 0 <= place < len(pairs):
            raise UserError(f"{where}: pairing_id={row['pairing_id']}: the tasks have {len(pairs)} pairs")
        item, asked = pairs[place], row.get("question", "")
        if asked not in named and len(questions) > 1:
            raise UserError(
                f"{where}: question={asked!r}: the tasks ask {', '.join(q.name for q in questions)}"
            )
        if row["winner"] not in (names := _speakers(item)):
            raise UserError(f"{where}: winner={row['winner']}: pairing {place} has {' and '.join(names)}")
        value = "left" if row["winner"] == names[0] else "right"
        name = named.get(asked, questions[0].name)
        try:
            seconds = float(row["time_taken"]) if row.get("time_taken") else None
        except ValueError:
            raise UserError(f"{where}: time_taken={row['time_taken']!r}: not a number; {cure}") from None
        found.append(Rating(item=item.id, question=name, rater=row["worker"], value=value, seconds=seconds))
    return found


def _pairs_of(tasks: Tasks) -> list[Item]:
    pairs = [item for item in tasks.items if len(item.shown) == 2]
    if not pairs:
        raise UserError(f"preset={tasks.preset}: no item has two dialogues, and ACUTE-Eval compares two")
    return pairs


def _speakers(item: Item) -> list[str]:
    """Names of left and right; they differ even where a system stands beside itself, as in a check."""
    left, right = (shown.system for shown in item.shown)
    return [left, right if right != left else f"{right} (2)"]


# --------------------------------------------------------------------------------------------------- Potato


def to_potato(tasks: Tasks, folder: Path) -> list[Path]:
    """A project for each kind of question, FOLDER/KIND/config.yaml and data.jsonl, for `potato start`.

    An instance is an item, or ITEM@PLACE where turns or candidates are rated one by one. Texts are escaped.

    Returns:
        The configurations.

    Raises:
        UserError: the folder cannot be written.
    """
    written = []
    for per in dict.fromkeys(question.per for question in tasks.questions):
        questions = [question for question in tasks.questions if question.per == per]
        lines = [
            json.dumps({"id": _instance(item.id, place), "text": _page(item, place)}, ensure_ascii=False)
            for item in tasks.items
            if (len(item.shown) == 2) == (per == "pair")
            for place in places(questions[0], item)
        ]
        config = {
            "annotation_task_name": f"{tasks.preset}: {per}",
            "data_files": ["data.jsonl"],
            "item_properties": {"id_key": "id", "text_key": "text"},
            "task_dir": ".",
            "output_annotation_dir": "annotation_output",
            "output_annotation_format": "jsonl",
            "max_annotations_per_item": tasks.raters_per_item,
            "annotation_schemes": [_scheme(question) for question in questions],
        }
        place_of = folder / per
        try:
            place_of.mkdir(parents=True, exist_ok=True)
            replace_text(place_of / "data.jsonl", "".join(f"{line}\n" for line in lines))
            # JSON is YAML
            replace_text(place_of / "config.yaml", json.dumps(config, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"out={folder}: cannot be written ({error.strerror}); name another") from None
        written.append(place_of / "config.yaml")
    return written


def to_potato_answers(tasks: Tasks, ratings: Sequence[Rating], folder: Path) -> None:
    """Adds answers to the projects of `to_potato`, where Potato keeps them; `from_potato` reads them.

    Raises:
        UserError: a question that the tasks do not ask, a rater who cannot have a folder, or a folder that
            cannot be written.
    """
    per = {question.name: question.per for question in tasks.questions}
    answers: dict[Path, dict[str, dict[str, dict[str, str]]]] = {}
    for rating in ratings:
        is_name = rating.rater not in ("", "..") and Path(rating.rater).name == rating.rater
        if rating.question not in per or not is_name:
            raise UserError(
                f"rating of item {rating.item} by {rating.rater}: question={rating.question}: Potato needs a "
                "question of the tasks, and a rater whose name can be a folder's; use --to csv"
            )
        path = folder / per[rating.question] / "annotation_output" / rating.rater / ANSWERS
        labels = answers.setdefault(path, {}).setdefault(_instance(rating.item, rating.place), {})
        labels[rating.question] = {str(rating.value): str(rating.value)}
    for path, instances in answers.items():
        lines = [
            json.dumps({"id": name, "label_annotations": labels, "span_annotations": {}}, ensure_ascii=False)
            for name, labels in instances.items()
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"out={folder}: cannot be written ({error.strerror}); name another") from None


def from_potato(folder: Path, tasks: Tasks) -> list[Rating]:
    """The answers in all files RATER/annotated_instances.jsonl below a folder.

    Args:
        folder: of one project, or of all that were exported.
        tasks: what was exported.

    Raises:
        UserError: no such file, a line of another format, or an answer that is not one of the levels.
    """
    paths = sorted(folder.rglob(ANSWERS))
    cure = f"give Potato's folder of answers, with RATER/{ANSWERS}"
    if not paths:
        raise UserError(f"{folder}: no {ANSWERS} below it; {cure}")
    levels = {q.name: {str(level.value): level.value for level in q.levels} for q in tasks.questions}
    ids = {item.id for item in tasks.items}
    found = []
    for path in paths:
        for number, line in enumerate(read_text(path, cure).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            answers = parse(_Answers, line.encode("utf-8", "surrogatepass"), where, cure)
            item, sign, place = str(answers.id).rpartition("@")
            if not sign or item not in ids:
                item, place = str(answers.id), ""
            for question, given in answers.label_annotations.items():
                chosen = [label for label, value in given.items() if value not in (False, None, "", "false")]
                if question not in levels or not chosen:
                    continue  # a scheme that was added in Potato
                if len(chosen) > 1 or chosen[0] not in levels[question]:
                    known = ", ".join(levels[question])
                    raise UserError(f"{where}: {question}={', '.join(chosen)}: give one of {known}")
                found.append(
                    Rating(
                        item=item,
                        question=question,
                        rater=path.parent.name,
                        value=levels[question][chosen[0]],
                        place=int(place) if place.isdecimal() else None,
                    )
                )
    return found


class _Answers(Open):
    id: int | str
    label_annotations: dict[str, dict[str, Any]]


def _instance(item: str, place: int | None) -> str:
    return item if place is None else f"{item}@{place}"


def _scheme(question: Question) -> dict[str, Any]:
    labels = []
    for level in question.levels:
        told = f"{level.label}: {level.criterion}" if level.criterion else level.label
        labels.append({"name": str(level.value), "tooltip": told})
    return {
        "annotation_type": "radio",
        "name": question.name,
        "description": question.text,
        "labels": labels,
        "label_requirement": {"required": True},
        "sequential_key_binding": True,
    }


def _page(item: Item, place: int | None) -> str:
    """What a rater sees of an item, up to the turn that is rated, which is in bold."""
    sides = []
    for shown in item.shown:
        turns = shown.turns if place is None or shown.candidates else shown.turns[: place + 1]
        texts = [
            (turn.text, turn.by_system, place == n and not shown.candidates) for n, turn in enumerate(turns)
        ]
        if shown.candidates and place is not None:
            texts.append((shown.candidates[place], True, True))
        lines = []
        for text, by_system, is_rated in texts:
            line = f"{'A' if by_system else 'B'}: {html.escape(text)}"
            lines.append(f"<b>{line}</b>" if is_rated else line)
        sides.append("<br>".join(lines))
    if len(sides) == 1:
        return sides[0]
    left, right = sides
    return f"<table><tr><th>left</th><th>right</th></tr><tr><td>{left}</td><td>{right}</td></tr></table>"
