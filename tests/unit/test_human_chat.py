"""Chats of raters with systems: whom they meet, turn by turn, what is said once, and what comes out."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rating import EVIL, Api, api, self_chats, small_chats, write_chats
from small import ROOT
from typer.testing import CliRunner

pytest.importorskip("sqlalchemy", reason="the page needs sqlalchemy: pip install '.[eval]'")
pytest.importorskip("httpx", reason="the API is asked through httpx")

from fastapi.testclient import TestClient

from plato2.commands.evaluate_dialogues import app as automatic
from plato2.commands.evaluate_human import app
from plato2.commands.evaluate_judge import read_contest
from plato2.commands.report import app as report
from plato2.config import UserError
from plato2.evaluate.dialogues import read_dialogues
from plato2.evaluate.human.chat import Partners
from plato2.evaluate.human.formats import read_tasks
from plato2.evaluate.human.server import make_app
from plato2.evaluate.human.store import Lent, Store, wanted


@pytest.fixture
def partner() -> Iterator[Api]:
    with api() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path, partner: Api) -> Store:
    store = Store(
        tmp_path / "study.sqlite", small_chats({"secret": partner.spec, "other-secret": "log:none"})
    )
    store.raters(4)
    return store


class Talker:
    """A rater without a browser, who talks."""

    def __init__(self, store: Store, number: int = 0, **options: Any) -> None:
        self.store, self.token = store, store.raters()[number].token
        self.partners = Partners(store, **options)
        self.client = TestClient(make_app(store, partners=self.partners), base_url="http://127.0.0.1:8000")

    def page(self) -> str:
        return str(self.client.get(f"/r/{self.token}").text)

    @property
    def address(self) -> str:
        found = re.search(rf"/r/{self.token}/(\d+)/standing", self.page())
        assert found is not None
        return f"/r/{self.token}/{found[1]}"

    def post(self, deed: str, **fields: Any) -> Any:
        return self.client.post(f"{self.address}/{deed}", data=fields, follow_redirects=False)

    def say(self, place: int, text: str) -> str:
        """Says something and waits for the reply; the standing then."""
        assert self.post("say", place=place, text=text).status_code == 303
        return self.wait()

    def wait(self) -> str:
        for _ in range(500):
            standing = str(self.client.get(f"{self.address}/standing").text)
            if not standing.endswith("writing"):
                return standing
            time.sleep(0.02)
        raise AssertionError("no reply")


def meeting(store: Store, system: str) -> None:
    """Leaves only chats with one system."""
    items = [item for item in store.tasks.items if item.shown[0].system == system]
    store.items = {item.id: item for item in items}


def test_a_chat_from_the_first_word_to_the_report(store: Store, partner: Api, tmp_path: Path) -> None:
    meeting(store, "secret")
    rater = Talker(store)
    html = rater.page()
    assert "Talk about: <b>topic" in html
    assert "0 of 2 to 3 rounds" in html
    assert "secret" not in html
    address = rater.address
    assert rater.say(0, EVIL) == "2 yours"
    assert "End the chat" not in rater.page()
    assert rater.post("end").status_code == 409
    assert rater.client.post(address, data={}, follow_redirects=False).status_code == 303  # not yet rated
    assert rater.say(2, "  two\nlines ") == "4 yours"
    assert partner.asked[-1] == [EVIL, f"reply 1 to: {EVIL}", "two lines"]
    html = rater.page()
    assert EVIL not in html
    assert html.count("&lt;script&gt;") == 2
    assert "End the chat and rate it" in html
    assert rater.post("end").status_code == 303
    assert rater.client.get(f"{address}/standing").text == "over"
    assert rater.client.post(f"{address}/say", data={"place": 4, "text": "more"}).status_code == 409
    html = rater.page()
    fields = dict.fromkeys(re.findall(r'type="radio" name="([^"]+)"', html), "2")
    assert set(fields) == {"q0.1", "q0.3", "q1.1", "q1.3", "q2", "q3"}  # the system's turns alone
    rater.client.post(address, data={**fields, "revision": "0"})
    admin = rater.client.get(f"/admin/{store.admin_token}").text
    assert "<td>secret</td><td>2</td><td>1</td><td></td>" in admin
    assert admin.count("no two raters yet") == 5
    store.close()
    files = [str(tmp_path / name) for name in ("r.jsonl", "chats.jsonl", "rated.json", "human.json")]
    run = CliRunner().invoke
    done = run(app, ["export", str(store.path), "--out", files[0], "--chats", files[1], "--tasks", files[2]])
    assert done.exit_code == 0, done.output
    (dialogue,) = read_dialogues(files[1])
    assert [(turn.speaker, turn.model) for turn in dialogue.turns] == [("A", None), ("B", "secret")] * 2
    assert dialogue.texts()[2:] == ["two lines", "reply 2 to: two lines"]
    assert dialogue.start.startswith("topic ")
    assert dialogue.case != dialogue.start
    done = run(app, ["report", files[2], files[0], "--out", files[3]])
    assert done.exit_code == 0, done.output
    figures = json.loads(Path(files[3]).read_text())["systems"]["secret"]
    assert (figures["coherence"]["value"], figures["coherence"]["n"], figures["humanness"]["n"]) == (2, 2, 1)
    assert read_tasks(files[2]).items[0].shown[0].dialogue == dialogue.id


def test_the_last_round_ends_the_chat(store: Store) -> None:
    meeting(store, "secret")
    rater = Talker(store)
    address = rater.address
    rater.say(0, "a")
    rater.say(2, "b")
    assert rater.post("say", place=4, text="c").status_code == 303
    for _ in range(500):
        if (standing := rater.client.get(f"{address}/standing").text) == "over":
            break
        time.sleep(0.02)
    assert standing == "over"
    assert rater.page().count('name="revision"') == 1


def test_what_is_sent_twice_counts_once_and_an_old_window_is_told(store: Store, partner: Api) -> None:
    meeting(store, "secret")
    rater = Talker(store)
    for _ in range(3):
        assert rater.post("say", place=0, text="hello").status_code == 303
    assert rater.wait() == "2 yours"
    assert rater.post("say", place=0, text="hello").status_code == 303
    old = rater.post("say", place=0, text="another")
    assert old.status_code == 409
    assert "gone on in another window" in old.text
    assert rater.post("say", place=1, text="for the other").status_code == 409
    assert len(partner.asked) == 1
    for text in ("", "   ", "x" * 2001):
        refused = rater.post("say", place=2, text=text)
        assert refused.status_code == 422
        assert ("too long" if len(text) > 2000 else "Say something.") in refused.text
    assert rater.post("say", place="x", text="hi").status_code == 400
    assert rater.post("shout", place=2, text="hi").status_code == 404
    other = f"/r/{store.raters()[1].token}/{rater.address.rsplit('/', 1)[1]}"
    assert "not given to you" in rater.client.post(f"{other}/say", data={"place": 2, "text": "hi"}).text
    evil = {"Origin": "https://evil.example"}
    assert rater.client.post(f"{rater.address}/say", data={}, headers=evil).status_code == 403
    assert len(store.said("r01", rater.address.rsplit("/", 1)[1])) == 2


def test_a_system_that_fails_can_be_tried_again_or_left(
    store: Store, partner: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    meeting(store, "secret")
    rater = Talker(store)
    partner.wrong = ["refused", "", "half"]
    assert rater.say(0, "hello") == "1 failed"
    html = rater.page()
    assert "No reply came. What you said is kept." in html
    assert "status 400" not in html
    assert "secret: no reply in chat" in capfd.readouterr().err
    assert "status 400" in rater.partners.trouble["secret"]
    admin = rater.client.get(f"/admin/{store.admin_token}").text
    assert "<td>secret</td><td>1</td><td>0</td><td>http://127" in admin
    rater.post("retry")
    assert rater.wait() == "1 failed"
    assert rater.partners.trouble["secret"] == "it has nothing to say"
    rater.post("retry")
    assert rater.wait() == "2 yours"
    first = rater.address
    assert store.said("r01", first.rsplit("/", 1)[1]) == ["hello", "half"]
    partner.wrong = ["refused"]
    assert rater.say(2, "and you ?") == "3 failed"
    assert "End the chat" not in rater.page()
    assert rater.post("leave").headers["location"] == f"/r/{rater.token}"
    assert rater.address != first
    assert rater.client.get(first).status_code == 410
    found = {store.next_item(name).item.id for name in ("r02", "r03", "r04")}  # type: ignore[union-attr]
    assert first.rsplit("/", 1)[1] in found  # others may have it


def test_raters_and_apis_need_no_torch() -> None:
    """A server for them is ready a few seconds earlier."""
    code = (
        "import sys, plato2.evaluate.human.chat, plato2.evaluate.openai_chat; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_system_goes_on_though_nobody_reads_the_log(
    store: Store, partner: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    meeting(store, "secret")
    rater = Talker(store)
    partner.wrong = ["refused"]
    assert rater.say(0, "hello") == "1 failed"
    rater.post("retry")
    assert rater.wait() == "2 yours"


def test_a_chat_long_enough_can_be_rated_though_the_system_fails(store: Store, partner: Api) -> None:
    meeting(store, "secret")
    rater = Talker(store)
    item = rater.address.rsplit("/", 1)[1]
    rater.say(0, "a")
    rater.say(2, "b")
    partner.wrong = ["refused"]
    assert rater.say(4, "c") == "5 failed"
    assert "End the chat and rate it" in rater.page()
    rater.post("retry")
    assert rater.client.post(f"/r/{rater.token}/{item}/end", follow_redirects=False).status_code == 303
    assert not store.reply("r01", item, 5, "too late")
    assert rater.page().count("fieldset class") == 6


def test_a_system_that_cannot_be_loaded_is_met_less(store: Store) -> None:
    rater = Talker(store)
    met = []
    for _ in range(4):
        system = next(
            item.shown[0].system for item in store.tasks.items if item.id == rater.address.rsplit("/", 1)[1]
        )
        met.append(system)
        if system == "other-secret":
            assert rater.say(0, "hello") == "1 failed"
        rater.post("leave")
    assert Counter(met) == {"secret": 2, "other-secret": 2}
    assert "none" in rater.partners.trouble["other-secret"]


def test_a_slow_system_is_waited_for_and_asked_once(store: Store, partner: Api) -> None:
    meeting(store, "secret")
    rater = Talker(store, slow_s=0.05)
    partner.go.clear()
    rater.post("say", place=0, text="hello")
    assert rater.wait() == "1 slow"
    assert "The reply takes long" in rater.page()
    rater.post("retry")
    assert rater.wait() == "1 slow"
    partner.go.set()
    for _ in range(500):
        if (standing := rater.client.get(f"{rater.address}/standing").text) == "2 yours":
            break
        time.sleep(0.02)
    assert standing == "2 yours"
    assert len(partner.asked) == 1


def test_a_system_replies_to_one_rater_at_a_time(store: Store, partner: Api) -> None:
    meeting(store, "secret")
    partners = Partners(store)
    chats = [(f"r{n:02d}", store.next_item(f"r{n:02d}")) for n in range(1, 5)]

    def talk(rater: str, lent: Any) -> list[str]:
        item = lent.item
        for place in (0, 2):
            assert store.say(rater, item.id, place, f"{rater} {place}") == "done"
            while len(store.said(rater, item.id)) < place + 2:
                found = store.lent(rater, item.id)
                assert isinstance(found, Lent)
                partners.standing(rater, found.item)
                time.sleep(0.01)
        return store.said(rater, item.id)

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda one: talk(*one), chats))
    for (rater, _), turns in zip(chats, said, strict=True):
        assert turns[::2] == [f"{rater} 0", f"{rater} 2"]
        assert turns[1] == f"reply 1 to: {rater} 0"
    assert partner.most_at_once == 1
    assert len(partner.asked) == 8


def test_systems_are_met_equally_often_by_raters_at_the_same_instant(tmp_path: Path) -> None:
    tasks = small_chats({name: f"log:{name}" for name in "abc"}, topics=10)
    assert len(tasks.items) == 60
    assert tasks.raters_per_item == 1
    store = Store(tmp_path / "study.sqlite", tasks)
    names = [one.name for one in store.raters(12)]
    start = threading.Barrier(12)

    def begin(name: str) -> str:
        start.wait()
        found = store.next_item(name)
        assert isinstance(found, Lent)
        return found.item.id

    with ThreadPoolExecutor(12) as pool:
        begun = list(pool.map(begin, names))
    assert len(set(begun)) == 12
    assert Counter(store.items[name].shown[0].system for name in begun) == {"a": 4, "b": 4, "c": 4}


def test_one_rater_meets_all_systems_about_new_topics(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.sqlite", small_chats({"a": "log:a", "b": "log:b"}, topics=4, least=1))
    store.raters(1)
    seen = []
    for _ in range(4):
        found = store.next_item("r01")
        assert isinstance(found, Lent)
        store.say("r01", found.item.id, 0, "hi")
        assert store.reply("r01", found.item.id, 1, "hello")
        assert not store.reply("r01", found.item.id, 1, "hello again")
        assert store.end("r01", found.item.id) == "done"
        assert store.end("r01", found.item.id) == "known"
        assert store.submit("r01", found.item.id, {("humanness", None): 1}, 0) == "saved"
        seen.append((found.item.shown[0].system, found.item.start))
    assert Counter(system for system, _ in seen) == {"a": 2, "b": 2}
    assert len({start for _, start in seen}) == 4
    assert len(store.rated_chats().items) == 4


def test_a_study_goes_on_where_it_was(store: Store, partner: Api) -> None:
    """A turn without a reply, as a kill leaves it, is replied to by the next server."""
    meeting(store, "secret")
    rater = Talker(store)
    item = rater.address.rsplit("/", 1)[1]
    assert store.say("r01", item, 0, "hello") == "done"
    again = Store(store.path)
    meeting(again, "secret")
    rater = Talker(again)
    assert "is writing" in rater.page()
    assert rater.wait() == "2 yours"
    assert again.said("r01", item) == ["hello", "reply 1 to: hello"]
    with pytest.raises(UserError, match="no chat in it that was had and rated"):
        again.rated_chats()


def test_chats_are_dialogues_for_the_other_verbs(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.sqlite", small_chats({"ours": "log:a", "theirs": "log:b"}, topics=1))
    store.raters(1)
    for n in range(4):
        found = store.next_item("r01")
        assert isinstance(found, Lent)
        system, item = found.item.shown[0].system, found.item.id
        for place in (0, 2):
            store.say("r01", item, place, f"hi {n} {place}")
            store.reply("r01", item, place + 1, f"{system} says {n} and {place}")
        store.end("r01", item)
        had = store.lent("r01", item)
        assert isinstance(had, Lent)
        places = wanted(store.tasks.questions, had.item)
        answers = {(question.name, place): 2 if system == "ours" else 1 for question, place in places}
        assert store.submit("r01", item, answers, 0) == "saved"
    chats, ratings, rated = (str(tmp_path / name) for name in ("chats.jsonl", "r.jsonl", "rated.json"))
    results = tmp_path / "results"
    results.mkdir()
    for verb, arguments in (
        (app, ["export", str(store.path), "--out", ratings, "--chats", chats, "--tasks", rated]),
        (app, ["report", rated, ratings, "--out", str(results / "human.json")]),
        (automatic, [chats, "--no-embedding", "--out", str(results / "automatic.json")]),
        (report, [str(results), "--out", str(tmp_path / "report.md")]),
    ):
        done = CliRunner().invoke(verb, arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
    page = (tmp_path / "report.md").read_text()
    (ours,) = (line for line in page.splitlines() if line.startswith("| ours | 2.000"))
    assert "not measured" not in ours  # table 2: four scores, distinct-1/2 and length
    contest = read_contest([Path(chats)], "B", None, 0)
    assert len(contest) == 2  # about the same topic, though people began differently
    assert all({one.left.system, one.right.system} == {"ours", "theirs"} for one in contest)
    assert {sum(judged for judged, _ in one.left.lines) for one in contest} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --meet, a system"),
        (["--meet", "x:y"], "--meet x:y: must be KIND:WHERE, and x is no kind"),
        (["--meet", "log:a", "--meet", "b=log:a"], "--meet b=log:a: named before"),
        (["--meet", "log:a", "--rounds", "3", "2"], "--rounds 3 2: must be 1 or more"),
        (["--meet", "log:a", "--topics", "none.txt"], "--topics none.txt"),
        (["chats.jsonl"], "--preset chat: takes no FILES"),
        (["--preset", "plato", "--meet", "log:a"], "--meet and --topics are for --preset chat"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, arguments: list[str], message: str) -> None:
    arguments = [
        str(write_chats(tmp_path / one, self_chats(1))) if one == "chats.jsonl" else one for one in arguments
    ]
    done = CliRunner().invoke(
        app, ["make", "--preset", "chat", *arguments, "--out", str(tmp_path / "t.json")]
    )
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def test_make_chats(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("music\nfilms\nmusic\nfood\n")
    made = ["make", "--preset", "chat", "--meet", "ours=log:a,b.jsonl", "--meet", "log:c", "--raters", "1"]
    made += ["--topics", str(tmp_path / "topics.txt"), "--limit", "2", "--rounds", "3", "5"]
    done = CliRunner().invoke(app, [*made, "--out", str(tmp_path / "t.json")])
    assert done.exit_code == 0, done.output
    assert "4 chats of 3 to 5 rounds" in done.output
    tasks = read_tasks(tmp_path / "t.json")
    assert tasks.chat is not None
    assert tasks.chat.speakers == {"ours": "log:a,b.jsonl", "log:c": "log:c"}
    assert Counter(item.shown[0].system for item in tasks.items) == {"ours": 2, "log:c": 2}
    assert len({item.start for item in tasks.items}) == 2
    done = CliRunner().invoke(app, ["report", str(tmp_path / "t.json"), str(tmp_path / "topics.txt")])
    assert done.exit_code != 0
