"""The page of `plato2 evaluate human serve`: over HTTP, in a real Chromium, and with kills."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import rating
from rating import EVIL, Page, page, self_chats, small_chats, small_tasks, start_page, write_tasks

pytest.importorskip("sqlalchemy", reason="the page needs sqlalchemy: pip install '.[eval]'")

import httpx
from fastapi.testclient import TestClient

from plato2.evaluate.dialogues import Dialogue, Turn
from plato2.evaluate.human.formats import Rating, Tasks
from plato2.evaluate.human.ratings import check_ratings
from plato2.evaluate.human.report import human_result
from plato2.evaluate.human.server import make_app
from plato2.evaluate.human.store import Store
from plato2.evaluate.human.tasks import Selection, make_tasks

PICTURES = os.environ.get("PLATO2_PICTURES")
"""A folder for screenshots, to look at."""


class Visitor:
    """A rater without a browser."""

    def __init__(self, client: Any, link: str) -> None:
        self.client, self.link = client, link

    def next(self) -> tuple[str, dict[str, str]] | None:
        """The address of the form of the next item, and its fields; None where there is no item."""
        html = self.client.get(self.link).text
        found = re.search(r'<form id="rate" method="post" action="([^"]+)"', html)
        return (found[1], form_of(html)) if found else None


def form_of(html: str, level: str = "0") -> dict[str, str]:
    """The fields of a form, with one answer to all."""
    fields = dict.fromkeys(re.findall(r'type="radio" name="([^"]+)"', html), level)
    revision = re.search(r'name="revision" value="(\d+)"', html)
    assert revision is not None
    return {**fields, "revision": revision[1]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "study.sqlite", small_tasks(raters=2))
    store.raters(3)
    return store


@pytest.fixture
def client(store: Store) -> TestClient:
    return TestClient(make_app(store), base_url="http://127.0.0.1:8000", follow_redirects=False)


@pytest.fixture
def visitor(store: Store, client: TestClient) -> Visitor:
    return Visitor(client, f"/r/{store.raters()[0].token}")


def test_a_submit_leads_to_the_next_item_and_twice_counts_once(store: Store, visitor: Visitor) -> None:
    action, fields = visitor.next() or ("", {})
    for _ in range(2):
        done = visitor.client.post(action, data=fields)
        assert (done.status_code, done.headers["location"]) == (303, visitor.link)
    assert len(store.ratings()) == 8
    following, _ = visitor.next() or ("", {})
    assert following != action
    assert "1 rated by you" in visitor.client.get(visitor.link).text


def test_what_is_missing_is_shown_and_what_was_given_is_kept(store: Store, visitor: Visitor) -> None:
    action, fields = visitor.next() or ("", {})
    for wrong in ("", "3", "-1", "x", "9" * 5000):
        done = visitor.client.post(action, data={**fields, "q2": wrong, "q0.1": "2"})
        assert done.status_code == 422
        assert "1 not answered yet" in done.text
        assert done.text.count("question missing") == 1
        assert 'name="q0.1" value="2" checked' in done.text
    assert visitor.client.post(action, data={}).status_code == 422
    assert visitor.client.post(action, data={**fields, "revision": "x"}).status_code == 400
    assert store.ratings() == []


def test_back_correct_and_another_window(store: Store, visitor: Visitor) -> None:
    action, fields = visitor.next() or ("", {})
    visitor.client.post(action, data=fields)
    html = visitor.client.get(visitor.link).text
    assert f'id="back" href="{action}"' in html
    html = visitor.client.get(action).text
    assert "You have answered this" in html
    assert 'name="q0.1" value="0" checked' in html
    assert visitor.client.post(action, data=form_of(html, "1")).status_code == 303
    assert {rating.value for rating in store.ratings()} == {1}
    old = visitor.client.post(action, data=form_of(html, "2"))
    assert old.status_code == 409
    assert "You have answered this item in another window" in old.text
    assert {rating.value for rating in store.ratings()} == {1}


def test_stale_foreign_and_late_links(store: Store, client: TestClient, visitor: Visitor) -> None:
    for path in ("/r/no-such-token", "/r/no-such-token/0001", "/admin/no-such-token", "/no/such/page", "/r/"):
        stale = client.get(path)
        assert stale.status_code == 404
        assert "This link does not work" in stale.text
    assert client.post("/r/no-such-token/0001", data={}).status_code == 404
    action, fields = visitor.next() or ("", {})
    other = f"/r/{store.raters()[1].token}/{action.rsplit('/', 1)[1]}"
    assert "not given to you" in client.post(other, data=fields).text
    assert store.ratings() == []
    store.now = lambda: time.time() + 3600
    store.tasks = store.tasks.model_copy(update={"raters_per_item": 0})  # others have answered it
    late = client.post(action, data=fields)
    assert late.status_code == 410
    assert "has gone to others" in late.text


def test_the_end(store: Store, client: TestClient, visitor: Visitor) -> None:
    while found := visitor.next():
        client.post(found[0], data=found[1])
    assert "Thank you, that was all" in client.get(visitor.link).text
    assert "Back to the last item" in client.get(visitor.link).text
    for _ in range(8):
        second = Visitor(client, f"/r/{store.raters()[1].token}")
        if found := second.next():
            assert "with other raters" not in client.get(second.link).text
            if store.standing("r02")[0] < 7:
                client.post(found[0], data=found[1])
    assert "All that is left is with other raters now" in client.get(f"/r/{store.raters()[2].token}").text


def test_other_sites_and_other_names_are_refused(store: Store, client: TestClient, visitor: Visitor) -> None:
    action, fields = visitor.next() or ("", {})
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9000"):
        assert client.post(action, data=fields, headers={"Origin": origin}).status_code == 403
    assert client.get(visitor.link, headers={"Host": "evil.example"}).status_code == 400
    assert client.post(action, content=b"q0.1=" + b"0" * 100_000).status_code == 413
    assert client.post(action, content=b"\xff\xfe").status_code == 400
    assert store.ratings() == []
    own = {"Origin": "http://127.0.0.1:8000"}
    assert client.post(action, data=fields, headers=own).status_code == 303
    for answer in (client.get(visitor.link), client.get("/nothing"), client.get("/rate.js")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_a_disk_that_is_full_loses_nothing(store: Store, client: TestClient, visitor: Visitor) -> None:
    action, fields = visitor.next() or ("", {})
    with store.engine.begin() as step:  # another process writes, and takes too long
        step.exec_driver_sql("select 1")
        store.engine.dispose(close=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plato2.evaluate.human.store.BUSY_S", 0.1)
            store.engine = Store.__init__.__globals__["_engine"](store.path)
            busy = client.post(action, data=fields)
    assert busy.status_code == 503
    assert "This could not be saved" in busy.text
    assert client.post(action, data=fields).status_code == 303
    assert len(store.ratings()) == 8


def test_the_admin_sees_progress_and_takes_ratings(
    store: Store, client: TestClient, visitor: Visitor
) -> None:
    action, fields = visitor.next() or ("", {})
    client.post(action, data=fields)
    html = client.get(f"/admin/{store.admin_token}").text
    assert "1 of\n16 ratings" in html
    assert "<td>r01</td><td>1</td>" in html
    lines = client.get(f"/admin/{store.admin_token}/ratings.jsonl").text.splitlines()
    assert [Rating.model_validate_json(line) for line in lines] == store.ratings()
    assert store.admin_token not in client.get(visitor.link).text


def test_the_admin_sees_agreement_and_where_there_is_too_little(store: Store, client: TestClient) -> None:
    admin = f"/admin/{store.admin_token}"
    assert "Nothing has been rated yet." in client.get(admin).text
    first, second = (Visitor(client, f"/r/{store.raters()[n].token}") for n in (0, 1))

    def rate(visitor: Visitor, level: str, **others: str) -> None:
        action, fields = visitor.next() or ("", {})
        client.post(action, data={**dict.fromkeys(fields, level), **others, "revision": "0"})

    rate(first, "1")
    rows = rows_of(client.get(admin).text)
    assert rows["coherence"] == rows["all"] == ["0", "0", "no two raters yet"]
    rate(second, "1")  # begun items come first
    rows = rows_of(client.get(admin).text)
    assert rows["coherence"] == ["3", "1", "1.000", "1.000, all are equal", "1.000"]
    assert rows["humanness"] == ["1", "1", "1.000", "1.000, all are equal", "1.000"]
    rate(first, "0")
    rate(second, "0", **{"q0.3": "2", "q3": "1"})
    rows = rows_of(client.get(admin).text)
    found = human_result(check_ratings(store.tasks, store.ratings()), []).details["agreement"]
    for name, (units, items, *figures) in rows.items():
        numbers = [found[name][key] for key in ("plain", "fleiss_kappa", "krippendorff_alpha")]
        assert figures == [f"{number:.3f}" for number in numbers], name
        assert (int(units), int(items)) == (found[name]["units"], 2)
    assert rows["coherence"][2] == "0.833"  # five of six


def rows_of(html: str) -> dict[str, list[str]]:
    """Of the admin's table of agreement: question -> cells."""
    (table,) = re.findall(r"<h2>Agreement</h2>.*?<tbody>(.*?)</tbody>", html, re.DOTALL)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("</tr>") if row]
    return {name: cells for name, *cells in rows}


# ------------------------------------------------------------------------------------------------ Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    quiet = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=[f"--{name}" for name in quiet])
        yield browser
        browser.close()


def visit(browser: Any, link: str, width: int = 1280, height: int = 800) -> Any:
    """A tab that may only talk to this machine and complains of nothing."""
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.set_default_timeout(20_000)
    tab.complaints = []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda line: line.type == "error" and tab.complaints.append(line.text))
    tab.goto(link)
    return tab


def picture(tab: Any, name: str) -> None:
    if PICTURES:
        tab.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def assert_fits(tab: Any) -> None:
    assert not tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def evil_tasks() -> Tasks:
    dialogues = [
        *self_chats(2),
        Dialogue("evil", (Turn(EVIL, "A"), Turn(EVIL, "B", "m"), Turn("", "A", "m")), 1),
    ]
    return make_tasks(dialogues, Selection("plato", checks=0, raters=1))


def answer_all(tab: Any, key: str) -> None:
    n = tab.locator(".question").count()
    for _ in range(n):
        tab.keyboard.press(key)
    assert tab.locator(".question input:checked").count() == n


def test_a_rater_with_keys(browser: Any, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks.json", evil_tasks())
    with page(tasks, 1) as running:
        tab = visit(browser, running.links[0])
        assert tab.locator(".question.now").count() == 1
        first = tab.title()
        tab.keyboard.press("2")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowLeft")
        tab.reload()  # what was answered is kept
        assert tab.locator(".question input:checked").count() == 2
        answer_all_left = tab.locator(".question").count() - 2
        for _ in range(answer_all_left):
            tab.keyboard.press("0")
        picture(tab, "keys")
        tab.keyboard.press("Enter")
        tab.get_by_text("1 rated by you").wait_for()
        assert tab.title() != first
        tab.keyboard.press("b")
        tab.get_by_text("You have answered this").wait_for()
        assert tab.title() == first
        tab.keyboard.press("1")
        picture(tab, "correct")
        tab.keyboard.press("Enter")
        for rated in (2, 3):
            tab.locator("[name=revision][value='0']").wait_for(state="attached")
            tab.get_by_text(f"{rated - 1} rated by you").wait_for()
            tab.locator(".question.now").wait_for()
            answer_all(tab, "1")
            tab.keyboard.press("Enter")
        tab.get_by_text("Thank you, that was all").wait_for()
        picture(tab, "done")
        assert tab.complaints == []
        tab.close()
        admin = visit(browser, running.admin, 390)
        assert "3 of 3 ratings" in admin.locator("main").inner_text()
        picture(admin, "admin-390")
        admin.close()
    ratings = Store(tasks.with_suffix(".sqlite")).ratings()
    assert len(ratings) == len({(one.item, one.question, one.place) for one in ratings})
    assert len({one.item for one in ratings}) == 3


@pytest.mark.slow
def test_markup_is_text(browser: Any, tmp_path: Path) -> None:
    tasks = evil_tasks()
    evil = next(item for item in tasks.items if item.start == EVIL)
    path = write_tasks(tmp_path / "tasks.json", tasks.model_copy(update={"items": [evil]}))
    with page(path, 1) as running:
        tab = visit(browser, running.links[0])
        assert tab.title() == "Item " + evil.id
        assert tab.locator(".text").all_inner_texts()[:2] == [EVIL, EVIL]
        assert tab.locator(".text :is(script, img, b)").count() == 0
        assert tab.locator(".nothing").count() == 1
        picture(tab, "markup")
        assert tab.complaints == []
        tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["plato", "acute", "topic", "candidates", "ssa"])
def test_it_fits_a_desk_and_a_phone(browser: Any, tmp_path: Path, preset: str) -> None:
    tasks = small_tasks(preset, n=2)
    long = tasks.items[0].shown[0].turns[-1].model_copy(update={"text": "word " * 60 + "x" * 300})
    tasks.items[0].shown[0].turns[-1] = long
    path = write_tasks(tmp_path / "tasks.json", tasks.model_copy(update={"items": tasks.items[:1]}))
    with page(path, 1) as running:
        tab = visit(browser, running.links[0])
        for width, height in ((1280, 800), (390, 844)):
            tab.set_viewport_size({"width": width, "height": height})
            picture(tab, f"{preset}-{width}")
            assert_fits(tab)
            small = """[...document.querySelectorAll('.answers label')]
                .filter((one) => one.offsetHeight < 36 || one.offsetWidth < 40).length"""
            assert tab.evaluate(small) == 0
        assert tab.complaints == []
        tab.close()


@pytest.mark.slow
def test_a_killed_server_loses_nothing_on_the_page(browser: Any, tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "tasks.json", small_tasks())
    running = start_page(path, 1)
    port = int(running.url.rsplit(":", 1)[1])
    tab = visit(browser, running.links[0])
    answer_all(tab, "1")
    running.kill()
    tab.keyboard.press("Enter")
    tab.get_by_text("The server cannot be reached").wait_for()
    picture(tab, "unreachable")
    again = start_page(path, 1, port=port)
    assert again.links == running.links
    tab.get_by_text("1 rated by you").wait_for()
    tab.close()
    again.kill()
    assert len(Store(path.with_suffix(".sqlite")).ratings()) == 8


@pytest.mark.slow
def test_a_whole_chat_with_a_kill_in_the_middle(browser: Any, tmp_path: Path) -> None:
    with rating.api() as partner:
        path = write_tasks(tmp_path / "chat.json", small_chats({"secret-system": partner.spec}, topics=1))
        running = start_page(path, 1)
        port = int(running.url.rsplit(":", 1)[1])
        tab = visit(browser, running.links[0])
        picture(tab, "chat-begin-1280")
        box = tab.locator("textarea")
        box.fill(EVIL)
        tab.reload()  # what is typed is kept
        assert box.input_value() == EVIL
        box.press("Enter")
        tab.get_by_text(f"reply 1 to: {EVIL}").wait_for()
        assert tab.locator(".text :is(script, img, b)").count() == 0
        partner.go.clear()
        box.fill("are you still there ?")
        box.press("Enter")
        tab.get_by_text("The other speaker is writing").wait_for()
        picture(tab, "chat-writing-1280")
        running.kill()
        tab.get_by_text("The server cannot be reached").wait_for()
        partner.go.set()
        running = start_page(path, 1, port=port)
        tab.get_by_text("reply 2 to: are you still there ?").wait_for()
        tab.complaints.clear()  # of the server that was away
        partner.wrong = ["refused"]
        tab.set_viewport_size({"width": 390, "height": 844})
        box.fill("word " * 40 + "x" * 300)
        tab.get_by_role("button", name="Send").click()
        tab.get_by_text("No reply came").wait_for()
        assert_fits(tab)
        picture(tab, "chat-failed-390")
        tab.get_by_role("button", name="Try again").click()
        tab.get_by_role("button", name="Submit").wait_for()  # the third round was the last
        assert_fits(tab)
        picture(tab, "chat-rating-390")
        tab.set_viewport_size({"width": 1280, "height": 800})
        picture(tab, "chat-rating-1280")
        assert tab.locator(".question").count() == 8
        tab.reload()
        answer_all(tab, "2")
        tab.keyboard.press("Enter")
        tab.get_by_text("1 rated by you").wait_for()
        assert tab.locator("textarea").count() == 1  # the next chat
        picture(tab, "chat-next-1280")
        assert tab.complaints == []
        tab.close()
        running.kill()
    store = Store(path.with_suffix(".sqlite"))
    (item,) = store.rated_chats().items
    said = [turn.text for turn in item.shown[0].turns]
    assert said[:4] == [
        EVIL,
        f"reply 1 to: {EVIL}",
        "are you still there ?",
        "reply 2 to: are you still there ?",
    ]
    assert len(said) == 6
    assert {one.value for one in store.ratings()} == {2}


@pytest.mark.slow
def test_a_second_server_is_told_of_the_first(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "tasks.json", small_tasks())
    with page(path, 1), pytest.raises(AssertionError, match="did not start"):
        start_page(path, 1)


# --------------------------------------------------------------------------------------------------- kills


def free_port() -> int:
    """For servers that follow each other at one address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_20_raters_and_20_kills(tmp_path: Path) -> None:
    """Raters submit while the server is killed again and again: all is saved, once, by three raters."""
    tasks = small_tasks(n=60, checks=0.1)
    path = write_tasks(tmp_path / "tasks.json", tasks)
    port = free_port()
    server = start_page(path, 20, "--lease", "0.5", port=port)
    links, sent, stop = server.links, [Counter[str]() for _ in range(20)], threading.Event()

    def rate(number: int) -> None:
        rng, seen = random.Random(number), sent[number]
        with httpx.Client(timeout=10) as client:
            while not stop.is_set():
                try:
                    html = client.get(links[number]).text
                    action = re.search(r'method="post" action="([^"]+)"', html)
                    if action is None:
                        if "Thank you" in html:
                            return
                        time.sleep(0.2)
                        continue
                    fields = form_of(html, str(rng.randrange(3)))
                    url = str(httpx.URL(links[number]).join(action[1]))
                    for _ in range(rng.choice((1, 1, 2))):  # some press twice
                        while True:
                            try:
                                answer = client.post(url, data=fields)
                                break
                            except httpx.TransportError:  # the server was killed: the same again
                                time.sleep(0.1)
                        assert answer.status_code in (303, 410), answer.text
                        if answer.status_code == 303:
                            seen[url.rsplit("/", 1)[1]] = 1
                except httpx.TransportError:
                    time.sleep(0.1)

    def kill(server: Page) -> Page:
        for number in range(20):
            time.sleep(random.Random(number).uniform(0.05, 0.8))
            server.kill()
            server = start_page(path, 20, "--lease", "0.5", port=port)
        return server

    with ThreadPoolExecutor(21) as pool:
        killer = pool.submit(kill, server)
        raters = [pool.submit(rate, number) for number in range(20)]
        server = killer.result(timeout=500)
        for one in raters:
            one.result(timeout=500)
    server.process.send_signal(signal.SIGINT)
    server.process.communicate(timeout=30)
    ratings = Store(path.with_suffix(".sqlite")).ratings()
    answers = Counter((one.item, one.rater, one.question, one.place) for one in ratings)
    assert set(answers.values()) == {1}
    submits = {(one.item, one.rater) for one in ratings}
    assert Counter(item for item, _ in submits) == Counter({item.id: 3 for item in tasks.items})
    said = {(item, f"r{number + 1:02d}") for number, items in enumerate(sent) for item in items}
    assert said == submits  # all that a rater was told is saved, and nothing else


class Talker:
    """A rater of chats who sends the same again until the server answers, and keeps what it acknowledged."""

    def __init__(self, link: str, number: int) -> None:
        self.link, self.rng = link, random.Random(number)
        self.may_leave = number % 4 == 0
        """Once; the others take what was left."""
        self.said: dict[str, list[str]] = {}
        """Chat -> the turns of the rater that were taken."""
        self.seen: dict[str, list[str]] = {}
        """Chat -> all turns as the page showed them last."""
        self.rated: Counter[str] = Counter()

    def run(self) -> None:
        """Until there is nothing left."""
        with httpx.Client(timeout=20) as self.client:
            while "Thank you" not in (html := self._ask("GET", self.link).text):
                if waiting := re.search(
                    r'data-url="/r/[^/]+/(\d+)/standing" data-standing="(\d+) (\w+)"', html
                ):
                    self._talk(html, *waiting.groups())
                elif found := re.search(r'<form id="rate" method="post" action="[^"]+/(\d+)"', html):
                    fields = form_of(html, str(self.rng.randrange(3)))
                    self._send(found[1], "", fields)
                    self.rated[found[1]] += 1
                else:
                    time.sleep(0.2)

    def _talk(self, html: str, chat: str, n_said: str, standing: str) -> None:
        """One look at a chat, and what the rater does then."""
        turns = [unescape(text) for text in re.findall(r'<p class="text">(.*?)</p>', html)]
        assert len(turns) == int(n_said)
        before = self.seen.get(chat, [])
        assert turns[: len(before)] == before  # nothing that was shown goes away or changes
        self.seen[chat] = turns
        mine = self.said.setdefault(chat, [])
        assert turns[::2] == mine
        if standing == "failed":
            self._send(chat, "/retry", {})
        elif standing != "yours":
            time.sleep(0.2)
        elif self.may_leave and turns:
            self.may_leave = False
            self._send(chat, "/leave", {}, (303, 410))  # 410: it had been left before the kill
        elif "End the chat" in html and self.rng.random() < 0.5:
            self._send(chat, "/end", {})
        else:
            text = f"turn {len(turns)} of {chat} by {self.link[-6:]} <&>"
            fields = {"place": n_said, "text": text}
            self._send(chat, "/say", fields)
            mine.append(text)
            if self.rng.random() < 0.2:  # an old window
                self._send(chat, "/say", {**fields, "text": "something else"}, (409,))

    def _send(self, chat: str, deed: str, fields: dict[str, str], expected: tuple[int, ...] = (303,)) -> None:
        for _ in range(self.rng.choice((1, 1, 2))):  # some press twice
            answer = self._ask("POST", f"{self.link}/{chat}{deed}", fields)
            assert answer.status_code in expected, (deed, answer.status_code, answer.text)

    def _ask(self, method: str, url: str, fields: dict[str, str] | None = None) -> httpx.Response:
        while True:
            try:
                return self.client.request(method, url, data=fields)
            except httpx.TransportError:  # the server was killed
                time.sleep(0.1)


@pytest.mark.slow
def test_20_raters_who_talk_and_20_kills(tmp_path: Path) -> None:
    """Every second kill comes while a reply is written: all chats end whole, and what was shown is kept."""
    with rating.api() as partner:
        # each reply is another one, so that one saved in place of another is seen; some fail
        partner.wrong = ["refused" if n % 15 == 7 else f"reply number {n}" for n in range(2000)]
        partner.seconds = 0.05
        tasks = small_chats({"one": partner.spec, "two": partner.spec}, topics=10, least=2, most=3)
        path, port = write_tasks(tmp_path / "chat.json", tasks), free_port()
        server = start_page(path, 20, port=port)
        talkers = [Talker(link, number) for number, link in enumerate(server.links)]

        def kill(server: Page) -> Page:
            for number in range(20):
                time.sleep(random.Random(number).uniform(0.05, 0.8))
                until = time.monotonic() + 2
                while number % 2 and partner.at_once == 0 and time.monotonic() < until:
                    time.sleep(0.001)
                server.kill()
                server = start_page(path, 20, port=port)
            return server

        with ThreadPoolExecutor(21) as pool:
            killer = pool.submit(kill, server)
            raters = [pool.submit(talker.run) for talker in talkers]
            server = killer.result(timeout=500)
            for one in raters:
                one.result(timeout=500)
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=30)
        asked = partner.asked
    store = Store(path.with_suffix(".sqlite"))
    with store.engine.begin() as step:
        lent = step.exec_driver_sql("select item, rater from lent where submitted_at is not null").all()
        turns = step.exec_driver_sql("select rater, item, text from turns order by rater, item, place").all()
    assert Counter(item for item, _ in lent) == Counter({item.id: 1 for item in tasks.items})
    names = {f"r{number + 1:02d}": talker for number, talker in enumerate(talkers)}
    assert {(chat, name) for name, one in names.items() for chat in one.rated} == {tuple(row) for row in lent}
    kept: dict[tuple[str, str], list[str]] = {}
    for rater, chat, text in turns:
        kept.setdefault((rater, chat), []).append(text)
    told = {(name, chat): said for name, one in names.items() for chat, said in one.said.items() if said}
    assert {key: said[::2] for key, said in kept.items()} == told
    for (name, chat), said in kept.items():
        assert said[: len(names[name].seen[chat])] == names[name].seen[chat]
        for place in range(1, len(said), 2):  # to this and to nothing else
            assert asked[int(said[place].removeprefix("reply number "))] == said[:place]
    whole = {item.id: [turn.text for turn in item.shown[0].turns] for item in store.rated_chats().items}
    assert whole == {chat: kept[rater, chat] for chat, rater in lent}
    assert {len(said) for said in whole.values()} == {4, 6}
    ratings = store.ratings()
    answers = Counter((one.item, one.rater, one.question, one.place) for one in ratings)
    assert set(answers.values()) == {1}
    assert len(answers) == sum(
        2 + len(said) for said in whole.values()
    )  # two of each reply, two of the whole
