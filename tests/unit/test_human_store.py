"""The file of a study: who gets which item, what is saved once, and what comes back."""

from __future__ import annotations

import json
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from rating import self_chats, small_tasks, write_tasks
from typer.testing import CliRunner

from plato2.commands.evaluate_human import app
from plato2.config import UserError
from plato2.evaluate.human.formats import Rating, Tasks
from plato2.evaluate.human.store import Answers, Lent, Store, wanted
from plato2.evaluate.human.tasks import Selection, make_tasks


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    store = Store(tmp_path / "study.sqlite", small_tasks(), lease_s=60, now=clock)
    store.raters(5)
    return store


def full(store: Store, item: str, level: int = 0) -> Answers:
    return {
        (question.name, place): question.levels[level % len(question.levels)].value
        for question, place in wanted(store.tasks.questions, store.items[item])
    }


def given(store: Store, rater: str) -> Lent:
    found = store.next_item(rater)
    assert isinstance(found, Lent)
    return found


def test_an_item_stays_until_it_is_answered_and_then_comes_the_next(store: Store) -> None:
    first = given(store, "r01")
    assert given(store, "r01").item.id == first.item.id
    assert store.submit("r01", first.item.id, full(store, first.item.id), 0) == "saved"
    second = given(store, "r01")
    assert second.item.id != first.item.id
    assert store.neighbours("r01", second.item.id) == (first.item.id, None)
    assert store.neighbours("r01", first.item.id) == (None, second.item.id)


def test_begun_items_are_finished_first_and_raters_see_another_order(store: Store) -> None:
    first = given(store, "r01").item.id
    assert given(store, "r02").item.id == first
    assert given(store, "r03").item.id == first
    assert given(store, "r04").item.id != first


def test_the_same_answers_count_once_and_others_correct_them(store: Store, clock: Clock) -> None:
    item = given(store, "r01").item.id
    clock.time += 12.5
    assert store.submit("r01", item, full(store, item), 0) == "saved"
    assert store.submit("r01", item, full(store, item), 0) == "known"
    assert store.submit("r01", item, full(store, item, 1), 0) == "conflict"  # of a window from before
    assert {rating.value for rating in store.ratings()} == {0}
    found = store.lent("r01", item)
    assert isinstance(found, Lent)
    assert (found.revision, found.answers) == (1, full(store, item))
    clock.time += 1000
    assert store.submit("r01", item, full(store, item, 1), 1) == "changed"
    assert store.submit("r01", item, full(store, item, 1), 1) == "known"
    ratings = store.ratings()
    assert {rating.value for rating in ratings} == {1}
    assert {rating.seconds for rating in ratings} == {12.5}
    assert len(ratings) == 8
    assert ratings[0] == Rating(item=item, question="coherence", rater="r01", value=1, place=1, seconds=12.5)


def test_who_takes_too_long_loses_the_item_only_if_others_want_it(tmp_path: Path, clock: Clock) -> None:
    tasks = make_tasks(self_chats(1), Selection("plato", checks=0))
    store = Store(tmp_path / "study.sqlite", tasks, lease_s=60, now=clock)
    store.raters(5)
    item = given(store, "r01").item.id
    clock.time += 61
    assert given(store, "r01").item.id == item  # nobody else wanted it
    given(store, "r02")
    clock.time += 61
    assert store.submit("r01", item, full(store, item), 0) == "saved"  # late, but there is room
    for rater in ("r03", "r04"):
        assert given(store, rater).item.id == item
        assert store.submit(rater, item, full(store, item), 0) == "saved"
    assert store.submit("r02", item, full(store, item), 0) == "late"
    assert store.lent("r02", item) == "foreign"
    assert store.next_item("r02") == "done"
    assert Counter(rating.rater for rating in store.ratings()) == {"r01": 8, "r03": 8, "r04": 8}


def test_waiting_and_done(store: Store, clock: Clock) -> None:
    for rater in ("r01", "r02", "r03"):
        while isinstance(found := store.next_item(rater), Lent):
            if rater == "r03" and store.standing("r03")[0] == 7:
                break
            store.submit(rater, found.item.id, full(store, found.item.id), 0)
    assert store.next_item("r01") == "done"
    assert store.next_item("r04") == "wait"
    clock.time += 61
    last = given(store, "r04").item.id
    store.submit("r04", last, full(store, last), 0)
    assert store.next_item("r03") == store.next_item("r04") == "done"
    progress = store.progress()
    assert progress.share == 1.0
    assert progress.by_count == {3: 8}
    assert [one.n_rated for one in progress.raters] == [8, 8, 7, 1, 0]


def test_nobody_can_answer_what_was_not_given(store: Store) -> None:
    item = given(store, "r01").item.id
    assert store.submit("r02", item, full(store, item), 0) == "foreign"
    assert store.lent("r02", item) == "foreign"
    assert store.lent("r02", "no such item") == "foreign"
    assert store.rater_of("no such token") is None


def test_links_are_secret_and_stay_the_same(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    store = Store(path, small_tasks())
    first = store.raters(2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert store.raters(12)[:2] == first
    assert [one.name for one in store.raters()] == [f"r{n:02d}" for n in range(1, 13)]
    tokens = {one.token for one in store.raters()} | {store.admin_token}
    assert len(tokens) == 13
    assert min(map(len, tokens)) >= 24
    again = Store(path, small_tasks())
    assert again.raters(2) == store.raters()
    assert again.admin_token == store.admin_token
    assert again.rater_of(first[1].token) == "r02"


def test_other_tasks_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    with pytest.raises(UserError, match="no such file; give the one that"):
        Store(path)
    Store(path, small_tasks()).close()
    with pytest.raises(UserError, match="it has the ratings of other tasks"):
        Store(path, small_tasks("ssa"))
    other = tmp_path / "other.sqlite"
    other.write_text("this is no SQLite file, but a text that is long enough for a header" * 20)
    with pytest.raises(UserError, match="not a file of a study"):
        Store(other)
    with pytest.raises(UserError, match=r"--db .*: cannot be written"):
        Store(tmp_path / "nowhere" / "study.sqlite", small_tasks())
    store = Store(path)
    with store.engine.begin() as step:
        step.exec_driver_sql("update study set value = 'plato2 human study 1' where key = 'format'")
    with pytest.raises(UserError, match="format=plato2 human study 1"):
        Store(path)


def test_checks_that_raters_pass_are_counted(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.sqlite", small_tasks(checks=0.5))
    store.raters(2)
    for rater, level in (("r01", 0), ("r02", 2)):
        while isinstance(found := store.next_item(rater), Lent):
            store.submit(rater, found.item.id, full(store, found.item.id, level), 0)
    assert [one.checks for one in store.progress().raters] == [(4, 4), (0, 4)]


def test_raters_at_the_same_instant(tmp_path: Path) -> None:
    tasks = small_tasks(n=10, raters=2)
    store = Store(tmp_path / "study.sqlite", tasks)
    names = [one.name for one in store.raters(8)]

    def rate(name: str) -> list[str]:
        mine = []
        while isinstance(found := store.next_item(name), Lent):
            assert store.submit(name, found.item.id, full(store, found.item.id), 0) == "saved"
            mine.append(found.item.id)
        return mine

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(rate, names))
    assert all(len(mine) == len(set(mine)) for mine in done)
    # who waited for the last items may have left them to others
    assert Counter(item for mine in done for item in mine) == Counter({item.id: 2 for item in tasks.items})


class Study(RuleBasedStateMachine):
    """Raters come, wait, submit early, late, twice and from old windows, in any order."""

    raters = Bundle("raters")
    folder: Path
    tasks: Tasks
    count = 0

    def __init__(self) -> None:
        super().__init__()
        Study.count += 1
        self.clock = Clock()
        self.path = self.folder / f"{Study.count}.sqlite"
        self.store = Store(self.path, self.tasks, lease_s=10, now=self.clock)
        self.names = [one.name for one in self.store.raters(4)]
        self.held: dict[str, list[Lent]] = {name: [] for name in self.names}
        self.saved: dict[tuple[str, str], Any] = {}

    def teardown(self) -> None:
        self.store.close()

    @rule(who=st.integers(0, 3))
    def ask(self, who: int) -> None:
        found = self.store.next_item(self.names[who])
        if isinstance(found, Lent):
            assert (found.item.id, self.names[who]) not in self.saved  # never the same item twice
            self.held[self.names[who]].append(found)

    @rule(seconds=st.integers(1, 12))
    def wait(self, seconds: int) -> None:
        self.clock.time += seconds

    @rule(who=st.integers(0, 3), which=st.integers(0, 9), level=st.integers(0, 2))
    def submit(self, who: int, which: int, level: int) -> None:
        name = self.names[who]
        if not self.held[name]:
            return
        lent = self.held[name][which % len(self.held[name])]
        key, answers = (lent.item.id, name), full(self.store, lent.item.id, level)
        outcome = self.store.submit(name, lent.item.id, answers, lent.revision)
        if key in self.saved:
            assert outcome == ("known" if self.saved[key] == answers else "conflict")
        else:
            assert outcome in ("saved", "late", "foreign")
            if outcome == "saved":
                self.saved[key] = answers

    @rule(which=st.integers(0, 9), level=st.integers(0, 2))
    def correct(self, which: int, level: int) -> None:
        if not self.saved:
            return
        key = sorted(self.saved)[which % len(self.saved)]
        lent = self.store.lent(key[1], key[0])
        assert isinstance(lent, Lent)
        assert lent.answers == self.saved[key]
        answers = full(self.store, key[0], level)
        outcome = self.store.submit(key[1], key[0], answers, lent.revision)
        assert outcome == ("known" if self.saved[key] == answers else "changed")
        self.saved[key] = answers

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.path, self.tasks, lease_s=10, now=self.clock)

    @invariant()
    def what_was_saved_is_there_once_and_no_item_is_full_twice(self) -> None:
        found: dict[tuple[str, str], Any] = {}
        for rating in self.store.ratings():
            answers = found.setdefault((rating.item, rating.rater), {})
            assert (rating.question, rating.place) not in answers
            answers[rating.question, rating.place] = rating.value
        assert found == self.saved
        with self.store.engine.begin() as step:
            taken = Counter(self.store._taken(step))
        assert max(taken.values(), default=0) <= self.tasks.raters_per_item


def test_no_item_gets_too_many_raters_and_none_twice_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plato2.evaluate.human.store.SYNCHRONOUS", "OFF")  # power cuts are not tested
    Study.folder, Study.tasks = tmp_path, small_tasks("ssa", n=2, raters=2).model_copy()
    run_state_machine_as_test(
        Study,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_export_writes_ratings_and_a_selection_set(tmp_path: Path) -> None:
    tasks = small_tasks("candidates")
    store = Store(tmp_path / "study.sqlite", tasks)
    store.raters(1)
    item = given(store, "r01").item
    store.submit("r01", item.id, full(store, item.id, 1), 0)
    out, chosen = tmp_path / "ratings.jsonl", tmp_path / "selection.jsonl"
    command = ["export", str(store.path), "--out", str(out), "--selection", str(chosen), "--json"]
    done = CliRunner().invoke(app, command)
    assert json.loads(done.output) == {"ratings": 10, "submits": 1, "done": 0.0833, "out": str(out)}
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [Rating.model_validate_json(line) for line in lines] == store.ratings()
    assert json.loads(chosen.read_text(encoding="utf-8"))["labels"] == [1] * 10


def test_serve_says_what_is_wrong_before_it_begins(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks.json", small_tasks())
    for options, message in (
        (["--raters", "0"], "--raters 0: must be at least 1"),
        (["--raters", "3", "--lease", "0"], "--lease 0: must be more than 0 minutes"),
        (
            ["--raters", "3", "--address", "rate.example.org"],
            "--address rate.example.org: give it with its scheme",
        ),
        (
            ["--raters", "3", "--db", f"{tasks}/x"],
            f"--db {tasks}/x: {tasks} is not a folder",
        ),
    ):
        done = CliRunner().invoke(app, ["serve", str(tasks), *options, "--port", "0"])
        assert message in str(done.exception)
