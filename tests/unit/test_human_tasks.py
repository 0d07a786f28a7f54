"""Tasks for raters: what is asked of what, what they must not see, checks that have one right answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rating import EVIL, self_chats, small_tasks, static_replies, write_chats, write_tasks
from small import ROOT
from typer.testing import CliRunner

from plato2.commands.evaluate_human import app
from plato2.config import UserError
from plato2.evaluate.dialogues import Dialogue, Turn, read_dialogues
from plato2.evaluate.human.formats import Item, Rating, places, read_tasks
from plato2.evaluate.human.page import item_page
from plato2.evaluate.human.questions import PRESETS
from plato2.evaluate.human.store import Lent
from plato2.evaluate.human.tasks import Selection, make_tasks, selection_set

DATA = ROOT.parent / "shared" / "data"


def real(items: list[Item]) -> list[Item]:
    return [item for item in items if item.expected is None]


def test_plato_asks_table_7_of_one_speaker() -> None:
    tasks = small_tasks()
    assert [(q.name, q.per, [level.value for level in q.levels]) for q in tasks.questions] == [
        ("coherence", "utterance", [0, 1, 2]),
        ("informativeness", "utterance", [0, 1, 2]),
        ("engagingness", "dialogue", [0, 1, 2]),
        ("humanness", "dialogue", [0, 1, 2]),
    ]
    assert all(level.criterion for question in tasks.questions for level in question.levels)
    assert len(tasks.items) == 8
    for item in tasks.items:
        (shown,) = item.shown
        assert item.start == shown.turns[0].text
        assert [said.by_system for said in shown.turns] == [False, True] * 3  # B, who replies to the start
        assert [said.side for said in shown.turns] == [1, 0] * 3
        assert places(tasks.questions[0], item) == [1, 3, 5]
        assert places(tasks.questions[2], item) == [None]


def test_the_other_speaker_can_be_named_and_one_that_is_not_there_is_said() -> None:
    tasks = make_tasks(self_chats(), Selection("plato", speaker="A", checks=0))
    rated = [place for place, said in enumerate(tasks.items[0].shown[0].turns) if said.by_system]
    assert rated == [2, 4]
    with pytest.raises(UserError, match="as speaker C in these files"):
        make_tasks(self_chats(), Selection("plato", speaker="C"))


def test_turns_without_speakers_alternate() -> None:
    turns = (Turn("a", ""), Turn("b", ""), Turn("c", ""), Turn("d", "", "m"))
    tasks = make_tasks([Dialogue("0", turns, 3)], Selection("plato", checks=0))
    assert [said.side for said in tasks.items[0].shown[0].turns] == [1, 0, 1, 0]
    assert tasks.items[0].start == "a\nb\nc"


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "chat"])
def test_nothing_on_the_page_names_a_system(preset: str) -> None:
    tasks = small_tasks(preset, n=12, checks=0.3)
    for item in tasks.items:
        html = item_page(tasks, Lent(item, 0, {}), "/r/token", None, None, (0, 0.0))
        assert "secret" not in html
        assert "expected" not in html
    assert [item.id for item in tasks.items] == [f"{n:04d}" for n in range(1, len(tasks.items) + 1)]
    if preset != "candidates":
        first = [item.shown[0].system for item in real(tasks.items)]
        assert first != sorted(first)
        assert first != sorted(first, reverse=True)


@pytest.mark.parametrize("preset", ["topic", "acute"])
def test_pairs_share_their_start_and_chance_decides_the_side(preset: str) -> None:
    tasks = small_tasks(preset, n=60)
    assert len(tasks.items) == 60
    assert all(
        {shown.system for shown in item.shown} == {"secret-system", "other-secret"} for item in tasks.items
    )
    assert all(
        item.shown[0].turns[0].text == item.shown[1].turns[0].text == item.start for item in tasks.items
    )
    assert 15 < sum(item.shown[0].system == "secret-system" for item in tasks.items) < 45
    values = [level.value for level in tasks.questions[0].levels]
    assert values == (["left", "tie", "right"] if preset == "topic" else ["left", "right"])


def test_pairs_without_a_common_start_are_drawn() -> None:
    others = [
        Dialogue(one.id, (Turn(f"another start {n}", "A"), *one.turns[1:]), 1)
        for n, one in enumerate(self_chats(5, system="other"))
    ]
    tasks = make_tasks([*self_chats(3), *others], Selection("acute", checks=0))
    assert len(tasks.items) == 3
    assert all("\n\n" in item.start for item in tasks.items)
    with pytest.raises(UserError, match="only the system secret-system"):
        make_tasks(self_chats(), Selection("acute"))


def test_the_same_starts_are_drawn_for_all_systems() -> None:
    dialogues = [*self_chats(20), *self_chats(20, system="other")]
    tasks = make_tasks(dialogues, Selection("plato", limit=5, checks=0))
    assert len(tasks.items) == 10
    assert set(Counter(item.start for item in tasks.items).values()) == {2}


def test_a_seed_makes_the_same_and_another_something_else() -> None:
    made = [make_tasks(self_chats(12), Selection("plato", seed=seed)) for seed in (3, 3, 4)]
    assert made[0] == made[1]
    assert made[0].items != made[2].items


def test_a_check_is_a_reply_to_another_start_and_must_get_0() -> None:
    for preset, question in (("plato", "coherence"), ("ssa", "sensible")):
        tasks = small_tasks(preset, n=10, checks=0.25)
        checks = [item for item in tasks.items if item.expected is not None]
        assert len(tasks.items) == 25
        assert len(checks) == 5
        for item in checks:
            turns = item.shown[0].turns
            assert item.expected == {question: 0}
            assert [said.by_system for said in turns] == [False] * (len(turns) - 1) + [True]
            number = item.start.split()[-1]
            assert all(said.text.split()[-1] == number for said in turns[:-1])
            assert turns[-1].text.split()[-1] != number


def test_the_checks_of_pairs_and_candidates() -> None:
    tasks = small_tasks("acute", n=10, checks=0.5)
    checks = [item for item in tasks.items if item.expected is not None]
    assert len(checks) == 5
    for item in checks:
        assert item.expected is not None
        side = {"left": 0, "right": 1}[str(item.expected["humanness"])]
        number = item.start.split()[-1]
        assert all(said.text.split()[-1] == number for said in item.shown[side].turns)
        false = [said.text.split()[-1] for said in item.shown[1 - side].turns if said.by_system]
        assert number not in false

    tasks = small_tasks("candidates", n=10, checks=0.1)
    (check,) = (item for item in tasks.items if item.expected is not None)
    assert check.expected == {"fits": 0}
    known = {text for one in static_replies(10) for text in one.turns[-1].candidates}
    assert not known & set(check.shown[0].candidates)


def test_candidates_are_ten_in_no_order() -> None:
    tasks = small_tasks("candidates", n=8)
    for item in tasks.items:
        (shown,) = item.shown
        assert len(set(shown.candidates)) == 10
        assert shown.candidates != sorted(shown.candidates)
        assert [said.by_system for said in shown.turns] == [False]
        assert places(tasks.questions[0], item) == list(range(10))
    with pytest.raises(UserError, match="no reply has candidates"):
        make_tasks(self_chats(), Selection("candidates"))


def test_ratings_of_candidates_become_a_selection_set() -> None:
    tasks = small_tasks("candidates", n=2, checks=0.5)
    item = real(tasks.items)[0]
    fits = {0: [1, 1, 0], 1: [1, 0], 2: [0, 0, 0]}
    votes = [
        Rating(item=item.id, question="fits", rater=f"r{rater}", value=value, place=place)
        for place, values in fits.items()
        for rater, value in enumerate(values)
    ]
    (check,) = (item for item in tasks.items if item.expected is not None)
    votes.append(Rating(item=check.id, question="fits", rater="r1", value=1, place=0))
    (found,) = selection_set(tasks, votes)
    assert found["context"] == [said.text for said in item.shown[0].turns]
    assert found["candidates"] == item.shown[0].candidates
    assert found["labels"] == [1] + [0] * 9
    with pytest.raises(UserError, match="nobody has rated"):
        selection_set(tasks, [])
    with pytest.raises(UserError, match="these are tasks of plato"):
        selection_set(small_tasks(), votes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "plata"}, "--preset plata: unknown; did you mean plato?"),
        ({"preset": "plato", "raters": 0}, "--raters 0: must be at least 1"),
        ({"preset": "plato", "checks": 1.5}, "--checks 1.5: must be from 0"),
        ({"preset": "plato", "checks": float("nan")}, "--checks nan"),
        ({"preset": "plato", "limit": 0}, "--limit 0"),
    ],
)
def test_impossible_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        Selection(**options)  # type: ignore[arg-type]


def test_one_start_gives_no_checks() -> None:
    with pytest.raises(UserError, match="there is only one start; give --checks 0"):
        make_tasks(self_chats(1), Selection("plato"))


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_any_text_is_shown_as_text(texts: list[str]) -> None:
    turns = (Turn("start", "A"), *(Turn(text + EVIL, "B", "m") for text in texts))
    tasks = make_tasks([Dialogue("0", turns, 1)], Selection("plato", checks=0))
    html = item_page(tasks, Lent(tasks.items[0], 0, {}), "/r/token", None, None, (0, 0.0))
    assert "<img" not in html
    assert "<b>fat" not in html
    assert html.count("<script") == 1


def test_the_command_reads_files_and_says_what_it_made(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", self_chats(6))
    out = tmp_path / "tasks.json"
    given = ["make", str(chats), "--preset", "plato", "--out", str(out), "--checks", "0.2"]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert json.loads(done.output) == {
        "preset": "plato",
        "items": 8,
        "systems": {"secret-system": 6, "attention checks": 2},
        "answers": 3 * (6 * 8 + 2 * 4),
        "out": str(out),
    }
    assert read_tasks(out) == make_tasks(read_dialogues(chats), Selection("plato", checks=0.2))
    assert "8 items for 3 raters each" in CliRunner().invoke(app, given).output


def test_tasks_of_which_there_are_ratings_are_not_replaced(tmp_path: Path) -> None:
    """Ratings need the very tasks that were rated; the same command makes the same, so it may be repeated."""
    chats = write_chats(tmp_path / "chats.jsonl", self_chats(6))
    out = tmp_path / "tasks.json"
    given = ["make", str(chats), "--preset", "plato", "--out", str(out)]
    assert CliRunner().invoke(app, given).exit_code == 0
    before = out.read_bytes()
    out.with_suffix(".sqlite").touch()
    assert CliRunner().invoke(app, given).exit_code == 0
    done = CliRunner().invoke(app, [*given, "--seed", "7"])
    assert isinstance(done.exception, UserError)
    assert "ratings of those are in" in str(done.exception)
    assert out.read_bytes() == before
    out.with_suffix(".sqlite").unlink()
    assert CliRunner().invoke(app, [*given, "--seed", "7"]).exit_code == 0
    assert out.read_bytes() != before


def test_a_file_of_tasks_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a file that plato2 evaluate human make wrote"):
        read_tasks(tmp_path / "none.json")
    tasks = small_tasks()
    twice = tasks.model_copy(update={"items": [*tasks.items, tasks.items[2]]})
    with pytest.raises(UserError, match=r"items\.id=0003 twice"):
        read_tasks(write_tasks(tmp_path / "twice.json", twice))
    newer = tasks.model_dump() | {"format": "plato2 human tasks 2"}
    (tmp_path / "newer.json").write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(UserError, match="format='plato2 human tasks 2'"):
        read_tasks(tmp_path / "newer.json")


def test_released_transcripts_become_tasks() -> None:
    folder = DATA / "meena"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/meena")
    dialogues = [one for name in ("meena", "mitsuku") for one in read_dialogues(folder / f"{name}.txt")]
    tasks = make_tasks(dialogues, Selection("acute", limit=20))
    systems = {frozenset(shown.system for shown in item.shown) for item in real(tasks.items)}
    assert systems == {frozenset(("Meena", "Mitsuku"))}
    for item in real(tasks.items):
        for shown in item.shown:
            assert any(said.by_system for said in shown.turns)
            assert {said.by_system for said in shown.turns if said.side} == {False}


def test_chats_with_people_that_begin_alike_are_cases_of_their_own() -> None:
    """As in the released transcripts: a limit counts chats, and a check takes the reply of another chat."""
    chats = [
        Dialogue(
            str(n),
            (
                Turn("Hi!", "Human"),
                Turn(f"this is the first reply {n}", "Bot", "bot"),
                Turn("and then ?", "Human"),
                Turn(f"this is the second reply {n}", "Bot", "bot"),
            ),
            1,
        )
        for n in range(20)
    ]
    tasks = make_tasks(chats, Selection("plato", limit=5, checks=0.2))
    rated = [item for item in tasks.items if item.expected is None]
    assert len({item.start for item in rated}) == len(rated) == 5
    (check,) = (item for item in tasks.items if item.expected is not None)
    swapped = check.shown[0].turns[-1].text
    assert swapped.split()[-1] != check.shown[0].dialogue
