"""A study in one SQLite file: its tasks, who rates, which item is whose, and what was answered.

Every step is one transaction that takes the write lock first, so two raters at the same instant come one
after the other, and a kill leaves a step done or not begun. An item is lent to a rater for a time; it has
room while those who answered it and those who have it are fewer than the raters an item gets.

Of the preset `chat` an item is a chat that is still to be had; its turns are kept one by one, as they are
said.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError

from plato2.config import UserError
from plato2.evaluate.human.formats import CURE, Item, Question, Rating, Said, Tasks, places
from plato2.formats import parse

FORMAT = "plato2 human study 2"
LEASE_S = 30 * 60.0
"""Seconds for which an item is a rater's own; seeing it again starts them anew."""
BUSY_S = 30.0
"""Seconds for which a step waits for others' steps."""
SQLITE = b"SQLite format 3\0"
"""What such a file begins with."""
SYNCHRONOUS = "FULL"
"""SQLite's word for: a step is on the disk when it ends, so that a power cut does not undo it."""
GIVEN_UP = -1.0
"""`until` of a chat that its rater gave up: it is for others."""
TOKEN_BYTES = 18
"""Of chance in a secret link: nobody guesses 144 bits."""

_META = MetaData()
_STUDY = Table("study", _META, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))
_RATERS = Table(
    "raters",
    _META,
    Column("name", Text, primary_key=True),
    Column("token", Text, nullable=False, unique=True),
)
_LENT = Table(
    "lent",
    _META,
    Column("item", Text, primary_key=True),
    Column("rater", Text, primary_key=True),
    Column("shown_at", Float, nullable=False),
    Column("until", Float, nullable=False),
    Column("submitted_at", Float),
    Column("seconds", Float),
    Column("revision", Integer, nullable=False, default=0),
    Column("answers", Text),
    Column("ended_at", Float),  # of a chat, which from then on is rated
)
_TURNS = Table(
    "turns",
    _META,
    Column("item", Text, primary_key=True),
    Column("rater", Text, primary_key=True),
    Column("place", Integer, primary_key=True),  # from 0; even: the rater's
    Column("text", Text, nullable=False),
    Column("said_at", Float, nullable=False),
)

Place: TypeAlias = int | None
Answers: TypeAlias = dict[tuple[str, Place], int | str]
"""(question, place) -> value."""
Outcome = Literal["saved", "known", "changed", "conflict", "late", "foreign"]
"""Of a submit. Saved: the first answers. Known: they were saved before. Changed: a correction. Conflict:
others came in meanwhile, from another window. Late: the item went to other raters. Foreign: it was never
lent.
"""
Step = Literal["done", "known", "conflict", "late", "foreign"]
"""Of a turn in a chat, as for `Outcome`. Conflict: another turn stands there, or none may now."""


@dataclass(frozen=True)
class Rater:
    """Who rates, and the secret of the link."""

    name: str
    token: str


@dataclass(frozen=True)
class Lent:
    """An item in a rater's hands."""

    item: Item
    revision: int
    """How often it was answered; a form carries the number that it was made with."""
    answers: Answers
    """Empty before the first submit."""
    ended: bool = True
    """False: a chat that goes on."""


@dataclass(frozen=True)
class RaterProgress:
    """What one rater did."""

    name: str
    n_rated: int
    n_open: int
    """1: an item is in the rater's hands."""
    checks: tuple[int, int]
    """Attention checks passed, and answered."""
    median_s: float | None
    last_at: float | None
    """Unix time of the last submit."""


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    n_items: int
    raters_per_item: int
    n_ratings: int
    """Submits, each of one rater for one item."""
    by_count: dict[int, int]
    """Ratings -> items that have so many."""
    raters: list[RaterProgress]
    met: dict[str, tuple[int, int]]
    """Of the preset `chat`: system -> chats that raters have or had with it, and those that are rated."""

    @property
    def share(self) -> float:
        """Of all submits that are wanted."""
        return self.n_ratings / (self.n_items * self.raters_per_item)


class Store:
    """The file of a study.

    Args:
        path: the SQLite file; made where there is none and tasks are given.
        tasks: what is rated; None takes those in the file.
        lease_s: seconds for which an item is a rater's own.
        now: the time in seconds; for tests.

    Raises:
        UserError: no such file, not one of a study, or one of other tasks.
    """

    def __init__(
        self,
        path: Path,
        tasks: Tasks | None = None,
        lease_s: float = LEASE_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.lease_s, self.now = path, lease_s, now
        if tasks is None:
            _check_file(path)
        if tasks is not None:
            _make_private(path)
        self.engine = _engine(path)
        try:
            with self._step() as step:
                self.tasks = self._open(step, tasks)
        except DatabaseError as error:
            raise UserError(f"{path}: not a file of a study ({error.orig}); name another --db") from None
        self.items = {item.id: item for item in self.tasks.items}

    def _open(self, step: Connection, tasks: Tasks | None) -> Tasks:
        """The tasks of the file, which are written where it is new."""
        _META.create_all(step)
        said = {row.key: row.value for row in step.execute(select(_STUDY)).all()}
        if not said and tasks is not None:
            text = tasks.model_dump_json()
            said = {"format": FORMAT, "tasks": text, "admin": secrets.token_urlsafe(TOKEN_BYTES)}
            step.execute(insert(_STUDY), [{"key": key, "value": value} for key, value in said.items()])
        if not said:
            raise UserError(f"{self.path}: not a file of a study; name another --db")
        if said.get("format") != FORMAT:
            raise UserError(
                f"{self.path}: format={said.get('format')}: this plato2 reads {FORMAT!r}; name another --db"
            )
        found = parse(Tasks, said["tasks"].encode(), str(self.path), CURE)
        if tasks is not None and _hash(found) != _hash(tasks):
            raise UserError(
                f"--db {self.path}: it has the ratings of other tasks; name another file, or give these tasks"
            )
        self.admin_token = said["admin"]
        return found

    @contextmanager
    def _step(self) -> Iterator[Connection]:
        """A transaction: all of it or nothing, one at a time."""
        with self.engine.begin() as step:
            yield step

    def close(self) -> None:
        """Closes the file."""
        self.engine.dispose()

    # -------------------------------------------------------------------------------------------- raters

    def raters(self, at_least: int = 0) -> list[Rater]:
        """Who may rate; new ones are added up to a number."""
        with self._step() as step:
            n = step.execute(select(func.count()).select_from(_RATERS)).scalar_one()
            for number in range(n + 1, at_least + 1):
                row = {"name": f"r{number:02d}", "token": secrets.token_urlsafe(TOKEN_BYTES)}
                step.execute(insert(_RATERS).values(row))
            rows = step.execute(select(_RATERS)).all()
        return sorted((Rater(row.name, row.token) for row in rows), key=lambda one: (len(one.name), one.name))

    def rater_of(self, token: str) -> str | None:
        """The name of the rater with that link; None where there is none."""
        with self._step() as step:
            return step.execute(select(_RATERS.c.name).where(_RATERS.c.token == token)).scalar()

    def is_admin(self, token: str) -> bool:
        """Whether it is the secret of the admin's link."""
        return secrets.compare_digest(token.encode(), self.admin_token.encode())

    # ------------------------------------------------------------------------------------------- lending

    def next_item(self, rater: str) -> Lent | Literal["wait", "done"]:
        """What a rater has to do next: the item in hand, or another one, which is lent.

        Returns:
            `wait`: others have all that is left, and some of it may come back. `done`: nothing is left.
        """
        with self._step() as step:
            for row in step.execute(
                select(_LENT).where(_LENT.c.rater == rater, _LENT.c.submitted_at.is_(None))
            ).all():
                if self._renewed(step, row):
                    return self._lent(step, row)
            taken = self._taken(step)
            mine = set(step.execute(select(_LENT.c.item).where(_LENT.c.rater == rater)).scalars())
            free = [name for name in self.items if name not in mine]
            room = [name for name in free if taken[name] < self.tasks.raters_per_item]
            if room:
                name = self._best(step, rater, room, taken)
                now = self.now()
                step.execute(
                    insert(_LENT).values(item=name, rater=rater, shown_at=now, until=now + self.lease_s)
                )
                this = (_LENT.c.item == name) & (_LENT.c.rater == rater)
                return self._lent(step, step.execute(select(_LENT).where(this)).one())
            answered = self._counts(step, _LENT.c.submitted_at.is_not(None))
        return "wait" if any(answered[name] < self.tasks.raters_per_item for name in free) else "done"

    def lent(self, rater: str, item: str) -> Lent | Literal["late", "foreign"]:
        """An item that a rater has or has answered, to go on or to correct.

        Returns:
            `late`: it went to others meanwhile. `foreign`: it was never lent to that rater.
        """
        with self._step() as step:
            row = self._row(step, rater, item)
            if row is None:
                return "foreign"
            if row.submitted_at is None and not self._renewed(step, row):
                return "late"
            return self._lent(step, row)

    def submit(self, rater: str, item: str, answers: Answers, revision: int) -> Outcome:
        """Saves what a rater answered; the same once more changes nothing.

        Args:
            rater: the name.
            item: its id.
            answers: to all questions.
            revision: that of the form; see `Lent`.
        """
        text = _written(answers)
        with self._step() as step:
            row = self._row(step, rater, item)
            if row is None:
                return "foreign"
            this = (_LENT.c.item == item) & (_LENT.c.rater == rater)
            if row.submitted_at is not None:
                if row.answers == text:
                    return "known"
                if row.revision != revision:
                    return "conflict"
                step.execute(update(_LENT).where(this).values(answers=text, revision=revision + 1))
                return "changed"
            if not self._renewed(step, row, again=False):
                return "late"
            now = self.now()
            step.execute(
                update(_LENT)
                .where(this)
                .values(answers=text, submitted_at=now, seconds=max(0.0, now - row.shown_at), revision=1)
            )
            return "saved"

    def neighbours(self, rater: str, item: str) -> tuple[str | None, str | None]:
        """The items that a rater answered before this one and after it; one in hand is the last."""
        with self._step() as step:
            order = list(
                step.execute(
                    select(_LENT.c.item)
                    .where(_LENT.c.rater == rater)
                    .order_by(_LENT.c.submitted_at.is_(None), _LENT.c.submitted_at, _LENT.c.shown_at)
                ).scalars()
            )
        if item not in order:
            return (order[-1] if order else None), None
        place = order.index(item)
        return (order[place - 1] if place else None), (order[place + 1] if place + 1 < len(order) else None)

    def standing(self, rater: str) -> tuple[int, float]:
        """How many items a rater has answered, and which share of all submits that are wanted is done."""
        answered = _LENT.c.submitted_at.is_not(None)
        count = select(func.count()).select_from(_LENT).where(answered)
        with self._step() as step:
            mine = step.execute(count.where(_LENT.c.rater == rater)).scalar_one()
            done = step.execute(count).scalar_one()
        return mine, done / (len(self.items) * self.tasks.raters_per_item)

    def _row(self, step: Connection, rater: str, item: str) -> Row[Any] | None:
        return step.execute(select(_LENT).where(_LENT.c.rater == rater, _LENT.c.item == item)).first()

    def _lent(self, step: Connection, row: Row[Any]) -> Lent:
        item = self.items[row.item]
        if self.tasks.chat is not None:
            item = with_turns(item, self._said(step, row.rater, row.item))
        ended = self.tasks.chat is None or row.ended_at is not None
        return Lent(item, row.revision, _answers(row.answers), ended)

    def _best(self, step: Connection, rater: str, room: Sequence[str], taken: Counter[str]) -> str:
        """Which of the items that have room a rater gets; among equals chance decides.

        Those that others have begun come first, so that few are left half rated. Of chats those with the
        system that was met least, by all and then by this rater, and about what the rater has not talked
        about yet; systems that the rater gave up come last.
        """
        chance = {name: (zlib.crc32(f"{rater} {name}".encode()), name) for name in room}
        if self.tasks.chat is None:
            return min(room, key=lambda name: (-taken[name], chance[name]))
        gave_up, by_all, by_rater, starts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for name, n in taken.items():
            by_all[self.items[name].shown[0].system] += n
        for row in step.execute(select(_LENT).where(_LENT.c.rater == rater)).all():
            item = self.items[row.item]
            gave_up[item.shown[0].system] += row.until == GIVEN_UP
            by_rater[item.shown[0].system] += 1
            starts[item.start] += 1

        def rank(name: str) -> tuple[Any, ...]:
            system, start = self.items[name].shown[0].system, self.items[name].start
            return gave_up[system], by_all[system], by_rater[system], starts[start], chance[name]

        return min(room, key=rank)

    def _renewed(self, step: Connection, row: Row[Any], again: bool = True) -> bool:
        """Whether an item is still a rater's own, who gets the full time again; else it is taken back."""
        if row.until == GIVEN_UP:
            return False
        now = self.now()
        this = (_LENT.c.item == row.item) & (_LENT.c.rater == row.rater)
        live = row.until > now
        if not live and self._taken(step)[row.item] >= self.tasks.raters_per_item:
            step.execute(delete(_LENT).where(this))
            return False
        shown_at = row.shown_at if live or not again else now
        step.execute(update(_LENT).where(this).values(until=now + self.lease_s, shown_at=shown_at))
        return True

    def _taken(self, step: Connection) -> Counter[str]:
        """Item -> raters who answered it or have it."""
        return self._counts(step, or_(_LENT.c.submitted_at.is_not(None), _LENT.c.until > self.now()))

    def _counts(self, step: Connection, those: Any) -> Counter[str]:
        counts = select(_LENT.c.item, func.count().label("raters")).where(those).group_by(_LENT.c.item)
        return Counter({row.item: row.raters for row in step.execute(counts).all()})

    # --------------------------------------------------------------------------------------------- chats

    def say(self, rater: str, item: str, place: int, text: str) -> Step:
        """Saves a turn of the rater; the same once more changes nothing.

        Args:
            rater: the name.
            item: the chat.
            place: of the turn, as the page has it.
            text: what is said.
        """
        chat = self.tasks.chat
        with self._step() as step:
            row = self._row(step, rater, item)
            if row is None or chat is None:
                return "foreign"
            said = self._said(step, rater, item)
            if place % 2 == 0 and place < len(said) and said[place] == text:
                return "known"
            if row.submitted_at is None and not self._renewed(step, row, again=False):
                return "late"
            if place != len(said) or place % 2 or row.ended_at is not None or place >= 2 * chat.most:
                return "conflict"
            self._add_turn(step, rater, item, place, text)
        return "done"

    def reply(self, rater: str, item: str, place: int, text: str) -> bool:
        """Saves a reply; False: there is one, or the chat has ended, as it does with the last round."""
        chat = self.tasks.chat
        with self._step() as step:
            row = self._row(step, rater, item)
            if chat is None or row is None or row.ended_at is not None:
                return False
            if len(self._said(step, rater, item)) != place or place % 2 == 0:
                return False
            self._add_turn(step, rater, item, place, text)
            if place + 1 == 2 * chat.most:
                self._end(step, rater, item)
        return True

    def end(self, rater: str, item: str) -> Step:
        """Ends a chat, which may be rated then; conflict: too few rounds."""
        chat = self.tasks.chat
        with self._step() as step:
            row = self._row(step, rater, item)
            if row is None or chat is None:
                return "foreign"
            if row.ended_at is not None:
                return "known"
            if not self._renewed(step, row, again=False):
                return "late"
            if len(self._said(step, rater, item)) < 2 * chat.least:
                return "conflict"
            self._end(step, rater, item)
        return "done"

    def give_up(self, rater: str, item: str) -> None:
        """Leaves a chat that has not ended to others; what was said in it is kept."""
        with self._step() as step:
            this = (_LENT.c.item == item) & (_LENT.c.rater == rater) & _LENT.c.ended_at.is_(None)
            step.execute(update(_LENT).where(this).values(until=GIVEN_UP))

    def said(self, rater: str, item: str) -> list[str]:
        """The turns of a chat until now."""
        with self._step() as step:
            return self._said(step, rater, item)

    def _said(self, step: Connection, rater: str, item: str) -> list[str]:
        those = select(_TURNS.c.text).where(_TURNS.c.rater == rater, _TURNS.c.item == item)
        return list(step.execute(those.order_by(_TURNS.c.place)).scalars())

    def _add_turn(self, step: Connection, rater: str, item: str, place: int, text: str) -> None:
        row = {"item": item, "rater": rater, "place": place, "text": text, "said_at": self.now()}
        step.execute(insert(_TURNS).values(row))

    def _end(self, step: Connection, rater: str, item: str) -> None:
        this = (_LENT.c.item == item) & (_LENT.c.rater == rater)
        step.execute(update(_LENT).where(this).values(ended_at=self.now()))

    def rated_chats(self) -> Tasks:
        """The tasks with what was said, of the chats that are rated: like any others, but for the preset.

        Raises:
            UserError: nobody has rated a chat.
        """
        with self._step() as step:
            rows = step.execute(select(_LENT).where(_LENT.c.submitted_at.is_not(None))).all()
            items = {row.item: self._lent(step, row).item for row in rows}
        kept = [items[name] for name in self.items if name in items]
        if self.tasks.chat is None or not kept:
            raise UserError(f"{self.path}: no chat in it that was had and rated; export again later")
        return self.tasks.model_copy(update={"items": kept, "chat": None})

    # ------------------------------------------------------------------------------------------- results

    def ratings(self) -> list[Rating]:
        """All answers, in the order of the tasks."""
        with self._step() as step:
            rows = step.execute(select(_LENT).where(_LENT.c.submitted_at.is_not(None))).all()
        order = {name: number for number, name in enumerate(self.items)}
        rows = sorted(rows, key=lambda row: (order[row.item], len(row.rater), row.rater))
        return [
            Rating(
                item=row.item,
                question=question,
                rater=row.rater,
                value=value,
                place=place,
                seconds=round(row.seconds, 1),
            )
            for row in rows
            for (question, place), value in _answers(row.answers).items()
        ]

    def progress(self) -> Progress:
        """How far the study is, and what each rater did."""
        with self._step() as step:
            rows = step.execute(select(_LENT)).all()
            names = step.execute(select(_RATERS.c.name)).scalars().all()
        counts = Counter(row.item for row in rows if row.submitted_at is not None)
        by_rater: dict[str, list[Row[Any]]] = defaultdict(list)
        for row in rows:
            by_rater[row.rater].append(row)
        return Progress(
            len(self.items),
            self.tasks.raters_per_item,
            counts.total(),
            dict(sorted(Counter(counts[name] for name in self.items).items())),
            [self._of(name, by_rater[name]) for name in sorted(names, key=lambda one: (len(one), one))],
            self._met(rows),
        )

    def _met(self, rows: Sequence[Row[Any]]) -> dict[str, tuple[int, int]]:
        if self.tasks.chat is None:
            return {}
        begun = Counter(self.items[row.item].shown[0].system for row in rows)
        open_ones = Counter(self.items[row.item].shown[0].system for row in rows if row.submitted_at is None)
        return {name: (begun[name], begun[name] - open_ones[name]) for name in self.tasks.chat.speakers}

    def _of(self, name: str, rows: Sequence[Row[Any]]) -> RaterProgress:
        done = [row for row in rows if row.submitted_at is not None]
        checks = [
            passes(self.items[row.item], _answers(row.answers))
            for row in done
            if self.items[row.item].expected is not None
        ]
        seconds = sorted(row.seconds for row in done)
        return RaterProgress(
            name,
            len(done),
            sum(row.submitted_at is None and row.until > self.now() for row in rows),
            (sum(checks), len(checks)),
            seconds[len(seconds) // 2] if seconds else None,
            max((row.submitted_at for row in done), default=None),
        )


def with_turns(item: Item, said: Sequence[str]) -> Item:
    """A chat with what was said in it: the rater's turns and the system's replies, one after the other."""
    turns = [Said(text=text, by_system=place % 2 == 1, side=1 - place % 2) for place, text in enumerate(said)]
    shown = item.shown[0].model_copy(update={"dialogue": item.id, "turns": turns})
    return item.model_copy(update={"shown": [shown]})


def passes(item: Item, answers: Answers) -> bool:
    """Whether the answers to an attention check are the expected ones, wherever they are asked."""
    expected = item.expected or {}
    return all(value == expected[name] for (name, _), value in answers.items() if name in expected)


def wanted(questions: Sequence[Question], item: Item) -> list[tuple[Question, Place]]:
    """What has to be answered of an item, in the order in which it is shown."""
    return [(question, place) for question in questions for place in places(question, item)]


def _hash(tasks: Tasks) -> str:
    return sha256(tasks.model_dump_json(exclude={"plato2"}).encode()).hexdigest()


def _written(answers: Answers) -> str:
    return json.dumps([[name, place, value] for (name, place), value in answers.items()])


def _answers(text: str | None) -> Answers:
    return {(name, place): value for name, place, value in json.loads(text or "[]")}


def _check_file(path: Path) -> None:
    """Refuses what is no SQLite file, before SQLite makes one of it.

    Raises:
        UserError: no such file, a folder, or something else.
    """
    cure = "give the one that plato2 evaluate human serve wrote"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {cure}")
    try:
        with path.open("rb") as file:
            is_sqlite = file.read(len(SQLITE)) == SQLITE
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {cure}") from None
    if not is_sqlite:
        raise UserError(f"{path}: not a file of a study; {cure}")


def _make_private(path: Path) -> None:
    """An empty file that others on the machine cannot read: the links are in it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(f"--db {path}: cannot be written ({error.strerror}); name another file") from None


def _engine(path: Path) -> Engine:
    """SQLite whose transactions take the write lock when they begin, and are on the disk when they end."""
    engine = create_engine(f"sqlite:///{path.absolute()}", connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions by itself, without the lock
        connection.execute("PRAGMA journal_mode=WAL")  # one wait for the disk per step instead of four
        connection.execute(f"PRAGMA synchronous={SYNCHRONOUS}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
