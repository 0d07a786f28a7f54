"""What raters are asked, and of what: dialogues become tasks (section 3.3.2, tables 4 and 7, appendix E).

Raters must not know which system they see: names, files and the order in which systems were given appear
nowhere on the page, items are shuffled and then numbered, and of a pair chance decides which is left.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from plato2.config import UserError, did_you_mean
from plato2.evaluate.dialogues import Dialogue, systems
from plato2.evaluate.human.formats import Chat, Item, Rating, Said, Shown, Tasks
from plato2.evaluate.human.questions import PRESETS

SHORT = 4
"""Words: what is shorter may fit anywhere, so that no attention check is made of it."""
CHECKED = {"plato": "coherence", "ssa": "sensible", "candidates": "fits"}
"""Which of their questions has but one right answer, 0, where a reply belongs to another context."""


@dataclass(frozen=True)
class Selection:
    """What tasks are made of; checks itself."""

    preset: str
    speaker: str | None = None
    """Whose turns are rated where a system plays both sides; None: who replies first."""
    limit: int | None = None
    """Contexts or starts that are drawn, the same for all systems; None: all."""
    candidates: int = 10
    """Of the preset `candidates`: how many are shown."""
    checks: float = 0.1
    """Attention checks for each item."""
    raters: int = 3
    """For each item."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks values.

        Raises:
            UserError: an impossible one.
        """
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset}: unknown; {did_you_mean(self.preset, PRESETS)}")
        for option, value, least in (
            ("limit", self.limit, 1),
            ("candidates", self.candidates, 2),
            ("raters", self.raters, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--{option} {value}: must be at least {least}")
        if not 0 <= self.checks <= 1:
            raise UserError(f"--checks {self.checks}: must be from 0 (none) to 1 (as many as items)")


@dataclass(frozen=True)
class _Seen:
    """A dialogue of which one system's turns are rated."""

    system: str
    start: str
    case: str
    """What is drawn, and drawn again for intervals (`Dialogue.case`)."""
    shown: Shown
    candidates: tuple[str, ...] = ()

    @property
    def rated(self) -> list[int]:
        """Which turns are rated."""
        return [place for place, said in enumerate(self.shown.turns) if said.by_system]


def make_tasks(dialogues: Sequence[Dialogue], selection: Selection) -> Tasks:
    """Tasks of every system that says something in the dialogues.

    Args:
        dialogues: self-chats, chats with people, or static replies; of one or several files.
        selection: what is asked, of how many.

    Raises:
        UserError: nothing to rate in them, one system where two are compared, or too little for checks.
    """
    rng = random.Random(selection.seed)
    seen = _drawn([_seen(d, system, selection.speaker) for d, system in _parts(dialogues)], selection, rng)
    if selection.preset == "chat":
        raise UserError("--preset chat: takes no FILES, raters talk themselves; name systems with --meet")
    questions = PRESETS[selection.preset]
    if questions[0].per == "pair":
        items, make_check = _pairs(seen, rng), _pair_check
    elif selection.preset == "candidates":
        items = [_with_candidates(one, selection.candidates, rng) for one in seen if one.candidates]
        make_check = _candidates_check
        if not items:
            raise UserError(
                "--preset candidates: no reply has candidates; write them with plato2 reply --candidates, "
                'or as {"turns": [..., {"candidates": [{"text": "..."}, ...]}]}'
            )
    else:
        items, make_check = [Item(id="", start=one.case, shown=[one.shown]) for one in seen], _swapped_reply
    n_checks = -(-len(items) * round(selection.checks * 1000) // 1000)
    for _ in range(n_checks):
        items.append(make_check(seen, selection, rng))
    return _numbered(items, selection, rng)


def chat_tasks(topics: Sequence[str], chat: Chat, selection: Selection) -> Tasks:
    """Chats that raters will have: about each topic with each system, as often as an item gets raters.

    Args:
        topics: what to talk about.
        chat: with whom, and for how long.
        selection: of the preset `chat`; its limit draws topics.
    """
    rng = random.Random(selection.seed)
    topics = list(dict.fromkeys(topics))
    if selection.limit is not None and selection.limit < len(topics):
        topics = rng.sample(topics, selection.limit)
    items = [
        Item(id="", start=topic, shown=[Shown(system=system, dialogue="", turns=[])])
        for topic in topics
        for system in chat.speakers
        for _ in range(selection.raters)
    ]
    tasks = _numbered(items, selection, rng)
    return tasks.model_copy(update={"raters_per_item": 1, "chat": chat})  # who talks is who rates


def _numbered(items: list[Item], selection: Selection, rng: random.Random) -> Tasks:
    """Tasks whose order and ids say nothing of where they come from."""
    rng.shuffle(items)
    items = [item.model_copy(update={"id": f"{number:04d}"}) for number, item in enumerate(items, start=1)]
    return Tasks(
        preset=selection.preset,
        questions=list(PRESETS[selection.preset]),
        items=items,
        raters_per_item=selection.raters,
        seed=selection.seed,
    )


def _parts(dialogues: Iterable[Dialogue]) -> list[tuple[Dialogue, str]]:
    return [(dialogue, system) for dialogue in dialogues for system in systems([dialogue])]


def _seen(dialogue: Dialogue, system: str, speaker: str | None) -> _Seen | None:
    """A dialogue as raters see it: no names, only sides; None where that speaker has no turn in it."""
    said = dialogue.said_by(system, speaker)
    if not said:
        return None
    rated_one = dialogue.turns[said[0]].speaker
    rated = dialogue.said_by(system, rated_one)
    sides = {rated_one: 0}
    for turn in dialogue.turns:
        sides.setdefault(turn.speaker, len(sides))
    named = all(turn.speaker for turn in dialogue.turns)
    turns = [
        Said(
            text=turn.text,
            by_system=number in rated,
            side=sides[turn.speaker] if named else (rated[0] - number) % 2,
        )
        for number, turn in enumerate(dialogue.turns)
    ]
    return _Seen(
        system,
        dialogue.start,
        dialogue.case,
        Shown(system=system, dialogue=dialogue.id, turns=turns),
        dialogue.turns[-1].candidates if rated[-1] == len(turns) - 1 else (),
    )


def _drawn(found: Sequence[_Seen | None], selection: Selection, rng: random.Random) -> list[_Seen]:
    """Those of as many cases as wanted: the same starts for all systems."""
    seen = [one for one in found if one is not None]
    if not seen:
        whose = f" as speaker {selection.speaker}" if selection.speaker else ""
        raise UserError(
            f"no system says anything{whose} in these files; give files of plato2 self-chat or reply"
        )
    cases = list(dict.fromkeys(one.case for one in seen))
    if selection.limit is not None and selection.limit < len(cases):
        kept = set(rng.sample(cases, selection.limit))
        seen = [one for one in seen if one.case in kept]
    return seen


def _with_candidates(one: _Seen, most: int, rng: random.Random) -> Item:
    """A context and some of the candidates for its reply, in an order that says nothing of their rank."""
    texts = list(dict.fromkeys(one.candidates))
    texts = rng.sample(texts, min(most, len(texts)))
    shown = one.shown.model_copy(
        update={
            "turns": [said.model_copy(update={"by_system": False}) for said in one.shown.turns[:-1]],
            "candidates": texts,
        }
    )
    return Item(id="", start=one.case, shown=[shown])


def _pairs(seen: Sequence[_Seen], rng: random.Random) -> list[Item]:
    """Two systems side by side: dialogues of the same start where both have such, else drawn ones."""
    by_system: dict[str, list[_Seen]] = defaultdict(list)
    for one in seen:
        by_system[one.system].append(one)
    if len(by_system) < 2:
        raise UserError(
            f"only the system {seen[0].system} is in these files, and two are compared; give another's file"
        )
    items = []
    for first, second in combinations(by_system.values(), 2):
        others: dict[str, list[_Seen]] = defaultdict(list)
        for one in second:
            others[one.start].append(one)
        pairs = [(one, others[one.start].pop(0)) for one in first if others.get(one.start)]
        if not pairs:
            pairs = list(zip(rng.sample(first, len(first)), rng.sample(second, len(second)), strict=False))
        for one, other in pairs:
            start = one.case if one.case == other.case else f"{one.case}\n\n{other.case}"
            left_right = [one.shown, other.shown]
            rng.shuffle(left_right)
            items.append(Item(id="", start=start, shown=left_right))
    return items


# ----------------------------------------------------------------------------------------- attention checks


def _foreign(seen: Sequence[_Seen], one: _Seen, rng: random.Random) -> list[str]:
    """Rated turns of other cases, in random order; short ones only if there is no other."""
    own = {said.text for said in one.shown.turns}
    texts = [
        other.shown.turns[place].text for other in seen if other.case != one.case for place in other.rated
    ]
    texts = list(dict.fromkeys(text for text in texts if text and text not in own))
    if not texts:
        raise UserError(
            "--checks: an attention check takes a reply to another start, and there is only one start; "
            "give --checks 0"
        )
    long = [text for text in texts if len(text.split()) >= SHORT or not text.isascii()]
    return rng.sample(long or texts, len(long or texts))


def _swapped_reply(seen: Sequence[_Seen], selection: Selection, rng: random.Random) -> Item:
    """A dialogue up to a reply that belongs to another one; only this reply is rated."""
    one = rng.choice([one for one in seen if one.rated[-1] > 0] or list(seen))
    place = rng.choice([place for place in one.rated if place > 0] or one.rated)
    turns = [said.model_copy(update={"by_system": False}) for said in one.shown.turns[:place]]
    turns.append(
        one.shown.turns[place].model_copy(update={"text": _foreign(seen, one, rng)[0], "by_system": True})
    )
    shown = one.shown.model_copy(update={"turns": turns})
    return Item(id="", start=one.case, shown=[shown], expected={CHECKED[selection.preset]: 0})


def _candidates_check(seen: Sequence[_Seen], selection: Selection, rng: random.Random) -> Item:
    """A context and candidates for other contexts, whose words are out of order: none fits."""
    one = rng.choice([one for one in seen if one.candidates])
    texts = [
        text
        for other in seen
        if other.case != one.case
        for text in other.candidates
        if len(text.split()) >= SHORT
    ]
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise UserError(
            f"--checks: an attention check takes candidates of {SHORT} words or more for other contexts, and "
            "there is none; give --checks 0"
        )
    jumbled = [
        " ".join(rng.sample(words, len(words)))
        for words in map(str.split, rng.sample(texts, min(selection.candidates, len(texts))))
    ]
    item = _with_candidates(one, selection.candidates, rng)
    shown = item.shown[0].model_copy(update={"candidates": jumbled})
    return Item(id="", start=one.case, shown=[shown], expected={CHECKED[selection.preset]: 0})


def _pair_check(seen: Sequence[_Seen], selection: Selection, rng: random.Random) -> Item:
    """A dialogue beside itself with all replies from other dialogues: the real one is better in all."""
    one = rng.choice(seen)
    turns, foreign = list(one.shown.turns), _foreign(seen, one, rng)
    for number, place in enumerate(one.rated):
        turns[place] = turns[place].model_copy(update={"text": foreign[number % len(foreign)]})
    false = one.shown.model_copy(update={"turns": turns})
    real_left = rng.random() < 0.5
    shown = [one.shown, false] if real_left else [false, one.shown]
    right = "left" if real_left else "right"
    expected: dict[str, int | str] = {question.name: right for question in PRESETS[selection.preset]}
    return Item(id="", start=one.case, shown=shown, expected=expected)


def chat_dialogues(tasks: Tasks) -> list[dict[str, Any]]:
    """Chats that raters had, as `evaluate.dialogues` reads them: A is the rater, B the system.

    Args:
        tasks: of the preset `chat`, with what was said (`Store.rated_chats`).
    """
    return [
        {
            "id": item.id,
            "topic": item.start,
            "turns": [
                {
                    "speaker": "B" if said.by_system else "A",
                    "model": item.shown[0].system if said.by_system else None,
                    "text": said.text,
                }
                for said in item.shown[0].turns
            ],
        }
        for item in tasks.items
    ]


def selection_set(tasks: Tasks, ratings: Sequence[Rating]) -> list[dict[str, Any]]:
    """What raters said of candidates, as a set to choose from: `context`, `candidates`, `labels`.

    A label is 1 where more raters said that the candidate fits than that it does not; a tie is 0.

    Args:
        tasks: of the preset `candidates`.
        ratings: of them; items without a rating and attention checks are left out.

    Raises:
        UserError: tasks of another preset, or no rating.
    """
    if tasks.preset != "candidates":
        raise UserError(
            f"--selection: these are tasks of {tasks.preset}; only those of candidates have labels"
        )
    votes: dict[tuple[str, int | None], int] = defaultdict(int)
    for rating in ratings:
        votes[rating.item, rating.place] += 1 if rating.value == 1 else -1
    rated = {item for item, _ in votes}
    found = [
        {
            "id": item.id,
            "context": [said.text for said in item.shown[0].turns],
            "candidates": item.shown[0].candidates,
            "labels": [int(votes[item.id, place] > 0) for place in range(len(item.shown[0].candidates))],
        }
        for item in tasks.items
        if item.id in rated and item.expected is None
    ]
    if not found:
        raise UserError("--selection: nobody has rated an item yet; export again later")
    return found
