"""Ratings held against their tasks: which of them count, and how many do not and why.

Nothing is counted twice and nothing is lost in silence: `Checked.counts` has a number for whatever was left
out, and the report prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plato2.config import UserError
from plato2.evaluate.dialogues import read_text
from plato2.evaluate.human.formats import Item, Question, Rating, Tasks, places
from plato2.formats import parse

RATINGS_CURE = (
    'a line is {"item": "...", "question": "...", "rater": "...", "value": 2}, as of plato2 evaluate human '
    "export or import"
)


@dataclass(frozen=True)
class Unit:
    """What one question is asked of: a turn, a dialogue, a pair, a candidate."""

    item: Item
    question: Question
    place: int | None
    """The turn or the candidate, from 0."""


@dataclass(frozen=True)
class Rated:
    """A unit and the answers that count."""

    unit: Unit
    answers: dict[str, int | str]
    """Rater -> value."""


@dataclass(frozen=True)
class Checked:
    """What is left when ratings were held against their tasks."""

    tasks: Tasks
    rated: list[Rated]
    """Units with an answer at least, attention checks left out; in the order of the tasks."""
    counts: dict[str, int]
    """`ratings` read; `again`, answered twice by one rater (the last counts), `changed` of them with another
    answer; `unknown` items; of attention `checks`; `excluded` with their raters; `used`. `raters`, and those
    `raters_excluded`; `unfinished` items of a rater; `units`, `unrated` ones, `short` ones with fewer raters
    than planned."""
    failed: dict[str, int]
    """Rater -> attention checks failed, of those who failed one."""


def read_ratings(paths: Sequence[str | Path]) -> list[Rating]:
    """The ratings of all files, in their order.

    Raises:
        UserError: no such file, a line of another format, or no rating at all.
    """
    found = []
    for path in paths:
        for number, line in enumerate(read_text(path, RATINGS_CURE).split("\n"), start=1):
            if line.strip():
                data = line.encode("utf-8", "surrogatepass")
                found.append(parse(Rating, data, f"{path}:{number}", RATINGS_CURE))
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no rating in it; {RATINGS_CURE}")
    return found


def units_of(item: Item, questions: Sequence[Question]) -> Iterator[Unit]:
    """All that raters are asked of an item; a question about pairs is asked of items with two dialogues."""
    for question in questions:
        if (question.per == "pair") != (len(item.shown) == 2):
            continue
        yield from (Unit(item, question, place) for place in places(question, item))


def check_ratings(tasks: Tasks, ratings: Sequence[Rating], failed_checks: int = 0) -> Checked:
    """Which ratings count.

    Args:
        tasks: what was to be rated.
        ratings: what was answered; where a rater answers again, the last answer counts.
        failed_checks: attention checks that a rater may fail; with more, none of the rater's ratings count.

    Raises:
        UserError: a question, an answer or a place that the tasks do not have, or no rating of these tasks.
    """
    if tasks.chat is not None:
        raise UserError(
            "these tasks say whom to talk with, not what was said; give the file that plato2 evaluate human "
            "export --tasks wrote"
        )
    units = {
        (unit.item.id, unit.question.name, unit.place): unit
        for item in tasks.items
        for unit in units_of(item, tasks.questions)
    }
    items = {item.id: item for item in tasks.items}
    counts = Counter(ratings=len(ratings))
    answers: dict[tuple[str, str, int | None], dict[str, int | str]] = {key: {} for key in units}
    for rating in ratings:
        if rating.item not in items:
            counts["unknown"] += 1
            continue
        key = rating.item, rating.question, rating.place
        _check_answer(rating, units.get(key), tasks)
        before = answers[key].get(rating.rater)
        counts["again"] += before is not None
        counts["changed"] += before not in (None, rating.value)
        answers[key][rating.rater] = rating.value
    if counts["unknown"] == len(ratings):
        raise UserError(
            f"item {ratings[0].item}: not in these tasks, nor is that of any other rating; give the tasks "
            "that were rated"
        )
    failed = _failed(tasks, answers)
    out = {rater for rater, n in failed.items() if n > failed_checks}
    raters = {rater for given in answers.values() for rater in given}
    counts.update(raters=len(raters), raters_excluded=len(out), unfinished=_unfinished(tasks, answers, out))
    rated = []
    for key, unit in units.items():
        if unit.item.expected is not None:
            counts["checks"] += len(answers[key])
            continue
        kept = {rater: value for rater, value in answers[key].items() if rater not in out}
        counts.update(units=1, excluded=len(answers[key]) - len(kept), used=len(kept), unrated=not kept)
        counts["short"] += 0 < len(kept) < tasks.raters_per_item
        if kept:
            rated.append(Rated(unit, kept))
    names = ["ratings", "used", "again", "changed", "unknown", "checks", "excluded", "raters"]
    names += ["raters_excluded", "unfinished", "units", "unrated", "short"]
    return Checked(tasks, rated, {name: counts[name] for name in names}, failed)


def told(counts: dict[str, int]) -> list[str]:
    """What the counts say, a line for each that is not as it should be."""
    lines = {
        "again": "{again} answers were given twice by one rater, {changed} of them changed: the last counts",
        "unknown": "{unknown} ratings are of items that these tasks do not have: left out",
        "excluded": "{raters_excluded} of {raters} raters failed attention checks: their {excluded} ratings "
        "are left out",
        "unfinished": "{unfinished} times a rater left an item unfinished: the answers given count",
        "unrated": "{unrated} of {units} units have no rating",
        "short": "{short} of {units} units have fewer raters than planned",
    }
    return [line.format(**counts) for name, line in lines.items() if counts[name]]


def _check_answer(rating: Rating, unit: Unit | None, tasks: Tasks) -> None:
    """Whether the tasks have such a question, place and answer.

    Raises:
        UserError: if not.
    """
    where = f"rating of item {rating.item} by {rating.rater}"
    if unit is None:
        names = [question.name for question in tasks.questions]
        if rating.question not in names:
            raise UserError(f"{where}: question={rating.question}: the tasks ask {', '.join(names)}")
        raise UserError(
            f"{where}: place={rating.place}: {rating.question} is not asked there; give the tasks that were "
            "rated"
        )
    levels = [level.value for level in unit.question.levels]
    if rating.value not in levels:
        raise UserError(
            f"{where}: value={rating.value!r}: {rating.question} can be {', '.join(map(repr, levels))}"
        )


def _failed(tasks: Tasks, answers: dict[tuple[str, str, int | None], dict[str, int | str]]) -> dict[str, int]:
    """Rater -> attention checks failed: items in which an answer is not the expected one."""
    failed: Counter[str] = Counter()
    for item in tasks.items:
        if item.expected is None:
            continue
        wrong = {
            rater
            for unit in units_of(item, tasks.questions)
            if unit.question.name in item.expected
            for rater, value in answers[item.id, unit.question.name, unit.place].items()
            if value != item.expected[unit.question.name]
        }
        failed.update(wrong)
    return dict(failed)


def _unfinished(
    tasks: Tasks, answers: dict[tuple[str, str, int | None], dict[str, int | str]], out: set[str]
) -> int:
    """How often a rater answered some questions of an item and not all."""
    n = 0
    for item in tasks.items:
        units = list(units_of(item, tasks.questions))
        given = Counter(rater for u in units for rater in answers[item.id, u.question.name, u.place])
        n += sum(count < len(units) for rater, count in given.items() if rater not in out)
    return n
