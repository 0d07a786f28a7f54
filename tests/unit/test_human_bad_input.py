"""Files, options and requests that cannot be: each is one line or a status, and nothing is lost."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rating import self_chats, small_tasks, write_chats, write_tasks
from typer.testing import CliRunner

pytest.importorskip("sqlalchemy", reason="the page needs sqlalchemy: pip install '.[eval]'")

from fastapi.testclient import TestClient

from plato2.commands import app
from plato2.evaluate.human.formats import Rating
from plato2.evaluate.human.server import make_app
from plato2.evaluate.human.store import Lent, Store, wanted

API = ("--url", "http://127.0.0.1:9/v1", "--model", "m")


class Study:
    """The files of a study, all of them right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chats = write_chats(folder / "chats.jsonl", self_chats(8))
        others = (turn for turn in self.chats.read_text().splitlines())
        self.others = folder / "others.jsonl"
        self.others.write_text("\n".join(others).replace("secret-system", "other") + "\n")
        self.tasks = write_tasks(folder / "tasks.json", small_tasks("acute"))
        store = Store(folder / "study.sqlite", small_tasks("acute"))
        store.raters(3)
        for rater in ("r01", "r02", "r03"):
            while isinstance(lent := store.next_item(rater), Lent):
                given = wanted(store.tasks.questions, lent.item)
                answers = {(question.name, place): question.levels[0].value for question, place in given}
                store.submit(rater, lent.item.id, answers, 0)
        ratings = store.ratings()
        store.close()
        self.db = folder / "study.sqlite"
        self.ratings = folder / "ratings.jsonl"
        self.ratings.write_text("".join(f"{one.model_dump_json()}\n" for one in ratings))
        self.table = folder / "ratings.csv"
        rows = [f"{one.item},{one.question},{one.rater},{one.value}\n" for one in ratings]
        self.table.write_text("item,question,rater,value\n" + "".join(rows))
        self.answers = folder / "answers.jsonl"
        self.answers.write_text("".join(f'{{"key": "{n}", "answer": "first"}}\n' for n in range(9)))

    def content(self) -> dict[str, bytes]:
        """Of all files, but for what SQLite has beside its own."""
        files = (path for path in self.folder.iterdir() if path.is_file() and path.suffix != ".lock")
        return {path.name: path.read_bytes() for path in files if "sqlite-" not in path.name}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def told(study: Study, *arguments: object) -> str:
    """What the command says, one line; no file is another one afterwards."""
    before = study.content()
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.count("\n") == 1, done.stderr
    assert study.content() == before
    return done.stderr


def commands(study: Study) -> dict[str, tuple[Path, list[object]]]:
    """Every command with the file that is spoilt."""
    out, human = study.folder / "out", ["human"]
    judge = ["judge", study.chats, study.others, *API, "--human", study.chats, "--controls", 8]
    voted = ["--question", "humanness", "--tasks", study.tasks, "--ratings", study.ratings]
    return {
        "make": (study.chats, [*human, "make", study.chats, "--preset", "plato", "--out", out]),
        "serve": (study.tasks, [*human, "serve", study.tasks, "--raters", 3, "--port", 0]),
        "export": (study.db, [*human, "export", study.db, "--out", out]),
        "report tasks": (study.tasks, [*human, "report", study.tasks, study.ratings]),
        "report ratings": (study.ratings, [*human, "report", study.tasks, study.ratings]),
        "import": (
            study.table,
            [*human, "import", study.table, "--from", "csv", "--tasks", study.tasks, "--out", out],
        ),
        "judge": (study.others, judge),
        "judge human": (study.folder / "people.jsonl", [*judge, "--human", study.folder / "people.jsonl"]),
        "judge votes": (study.ratings, [*judge, *voted]),
        "judge answers": (study.answers, [*judge, "--answers", study.answers]),
    }


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # files that have a name by default


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "binary": lambda data: bytes(range(256)) * 40,
    "half": lambda data: data[: len(data) // 2 + 3],
    "utf-16": lambda data: data.decode("latin-1").encode("utf-16"),
    "latin-1": lambda data: data.replace(b"e", b"\xe9"),
}
RIGHT = {("import", "half"), ("judge answers", "half"), ("judge answers", "empty")}
"""A table may be shorter; of the answers a half one is asked for again."""


@pytest.mark.parametrize("spoilt", [*SPOILT, "huge", "folder", "pipe", "missing"])
def test_files_that_are_spoilt(study: Study, spoilt: str) -> None:
    for name, (path, arguments) in commands(study).items():
        if (name, spoilt) in RIGHT or (name, spoilt) == ("judge answers", "missing"):
            continue
        whole = path.read_bytes() if path.exists() else study.chats.read_bytes()
        path.unlink(missing_ok=True)
        if spoilt == "folder":
            path.mkdir()
        elif spoilt == "pipe":
            os.mkfifo(path)
        elif spoilt == "huge":
            path.touch()
            os.truncate(path, 1 << 31)
        elif spoilt in SPOILT:
            path.write_bytes(SPOILT[spoilt](whole))
        if spoilt == "huge":  # not to be read for `told`
            done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
            said = done.stderr
            assert (done.exit_code, said.count("\n")) == (2, 1), (name, done.output, done.exception)
            assert path.stat().st_size == 1 << 31
        else:
            said = told(study, *arguments)
        assert path.name in said, (name, said)
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


def test_a_study_that_is_none_stays_as_it_is(study: Study) -> None:
    other = study.folder / "other.sqlite"
    with sqlite3.connect(other) as file:
        file.execute("create table cookies (name text)")
    file.close()
    done = CliRunner().invoke(
        app, ["evaluate", "human", "export", str(other), "--out", str(study.folder / "x")]
    )
    assert done.stderr == f"error: {other}: not a file of a study; name another --db\n"
    with sqlite3.connect(other) as file:
        assert [name for (name,) in file.execute("select name from sqlite_master")] == ["cookies"]
    file.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "{chats}", "--preset", "plato", "--out", "{chats}"], "--out {chats}: {chats} is read"),
        (["make", "{chats}", "--preset", "plato", "--out", "{folder}"], "--out {folder}: a folder"),
        (
            ["make", "{chats}", "--preset", "plato", "--out", "/proc/none/x"],
            "/proc/none/x: cannot be written",
        ),
        (["serve", "{tasks}", "--links", "{tasks}"], "--links {tasks}: {tasks} is read, and would be lost"),
        (["serve", "{tasks}", "--links", "{db}", "--db", "{db}"], "--links {db}: --db writes there"),
        (["serve", "{tasks}", "--links", "{folder}"], "--links {folder}: a folder; give a file"),
        (["serve", "{tasks}", "--db", "/proc/none/x"], "--db /proc/none/x: cannot be written"),
        (["serve", "{tasks}", "--db", "{chats}"], "{chats}: not a file of a study"),
        (["serve", "{tasks}", "--host", "a..b"], "--host a..b: "),
        (["serve", "{tasks}", "--host", "a" * 300], "--host aaa"),
        (["serve", "{tasks}", "--port", "{port}"], "--port {port}: 127.0.0.1:{port} cannot be used"),
        (["serve", "{tasks}", "--port", "70000"], "--port 70000: use 0 to 65535"),
        (
            ["serve", "{tasks}", "--raters", "1000000000"],
            "--raters 1000000000: must be at least 1 and at most",
        ),
        (["serve", "{tasks}", "--lease", "nan"], "--lease nan: must be more than 0 minutes"),
        (["export", "{db}", "--out", "{db}"], "--out {db}: {db} is read, and would be lost"),
        (["export", "{db}", "--out", "{new}", "--chats", "{new}"], "--chats {new}: --out writes there"),
        (["export", "{db}", "--out", "{new}", "--chats", "{new}2"], "no chat in it that was had and rated"),
        (["report", "{tasks}", "{ratings}", "--out", "{ratings}"], "--out {ratings}: {ratings} is read"),
        (["import", "{table}", "--from", "csv", "--tasks", "{tasks}", "--out", "{table}"], "{table} is read"),
        (["convert", "{tasks}", "--to", "acute", "--out", "{tasks}"], "--out {tasks}: {tasks} is read"),
    ],
)
def test_places_that_cannot_be(study: Study, arguments: list[str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {name: str(path) for name, path in vars(study).items()}
        names |= {"new": str(study.folder / "new"), "port": str(taken.getsockname()[1])}
        more = [] if arguments[0] != "serve" or "--raters" in arguments else ["--raters", "3"]
        more += ["--port", "0"] if arguments[0] == "serve" and "--port" not in arguments else []
        said = told(study, "human", *(one.format(**names) for one in [*arguments, *more]))
    assert message.format(**names) in said


def test_a_judge_writes_over_nothing_that_it_reads(study: Study) -> None:
    judge = ["judge", study.chats, f"b={study.others}", *API]
    for option, file in (("--out", study.others), ("--answers", study.chats), ("--answers", "/proc/none/x")):
        assert f"{option} {file}: " in told(study, *judge, option, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a/b"}, "items.id='a/b': it is a part of an address; use letters, digits, - and _"),
        ({"id": ""}, "items.id='': it is a part of an address"),
        ({"id": ".."}, "items.id='..': it is a part of an address"),
        ({"id": "0002"}, "items.id=0002 twice"),
        ({"shown": []}, "shown=[]: "),
        ({"expected": {"x": None}}, "expected.x"),
        ({"who": 1}, "items.0.who: unknown to plato2"),
    ],
)
def test_tasks_that_were_edited(study: Study, change: dict[str, Any], message: str) -> None:
    tasks = json.loads(study.tasks.read_text())
    number = next(n for n, item in enumerate(tasks["items"]) if item["id"] != "0002")
    tasks["items"].insert(0, tasks["items"].pop(number))
    tasks["items"][0] |= change
    study.tasks.write_text(json.dumps(tasks))
    assert message in told(study, "human", "serve", study.tasks, "--raters", 3, "--port", 0)
    assert not study.tasks.with_suffix(".sqlite").exists()


def test_questions_and_systems_that_cannot_be(study: Study) -> None:
    tasks = json.loads(study.tasks.read_text())
    serve = ("human", "serve", study.tasks, "--raters", 3, "--port", 0)
    study.tasks.write_text(json.dumps({**tasks, "questions": tasks["questions"][:1] * 2}))
    assert "twice; give each question a name of its own" in told(study, *serve)
    study.tasks.write_text(json.dumps({**tasks, "chat": {"speakers": {"a": "log:b"}, "least": 1, "most": 2}}))
    assert "not one of the systems in chat.speakers" in told(study, *serve)


def test_names_that_look_like_markup(study: Study) -> None:
    """Of systems, on the terminal and in a picture; a long word and escapes in what they say do no harm."""
    chats = [
        write_chats(study.folder / f"{n}.jsonl", self_chats(4, system=name))
        for n, name in enumerate(("[/b]\x1b[31m", "$\\no$ :cat:"))
    ]
    for chat in chats:
        chat.write_text(chat.read_text().replace("utterance", "\\u001b[2J<script>" + "x" * 50_000))
    for preset in ("plato", "acute"):
        tasks, ratings = study.folder / f"{preset}.json", study.folder / f"{preset}.jsonl"
        made = ["human", "make", *chats, "--preset", preset, "--checks", 0, "--out", tasks]
        report = ["human", "report", tasks, ratings, "--picture", study.folder / "p.svg"]
        done = CliRunner().invoke(app, ["evaluate", *map(str, made)])
        assert done.exit_code == 0, (done.output, done.exception)
        assert "[/b]" in done.output
        rated = [
            Rating(
                item=item.id, question=question.name, rater=rater, value=question.levels[0].value, place=place
            )
            for item in read(tasks).items
            for question, place in wanted(read(tasks).questions, item)
            for rater in ("[/r]", "b")
        ]
        ratings.write_text("".join(f"{one.model_dump_json()}\n" for one in rated))
        shown = CliRunner().invoke(app, ["evaluate", *map(str, report)])
        assert shown.exit_code == 0, (shown.output, shown.exception)
        assert "\x1b" not in done.output + shown.output


def read(tasks: Path) -> Any:
    from plato2.evaluate.human.formats import read_tasks

    return read_tasks(tasks)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"q0": 0, "revision": 0}', "application/json", 422),
        (b"null", "application/json", 422),
        (b"", "application/x-www-form-urlencoded", 422),
        (b"q9=0&q0.7=0&constructor=0&revision=0", "application/x-www-form-urlencoded", 422),
        (b"q0=%ff%00&q0=\x80", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"a=0" for _ in range(3000)), "application/x-www-form-urlencoded", 400),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422),
        (b"0" * (1 << 20), "application/x-www-form-urlencoded", 413),
    ],
)
def test_answers_that_nobody_asked_for(study: Study, content: bytes, kind: str, status: int) -> None:
    store = Store(study.folder / "new.sqlite", small_tasks("acute"))
    store.raters(2)
    client = TestClient(make_app(store), base_url="http://127.0.0.1:8000", follow_redirects=False)
    token = store.raters()[0].token
    lent = store.next_item("r01")
    assert isinstance(lent, Lent)
    link = f"/r/{token}/{lent.item.id}"
    answer = client.post(link, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert "<h1>" in answer.text or status in (413, 422)
    for method, path, expected in (
        ("PUT", link, 405),
        ("DELETE", f"/r/{token}", 405),
        ("POST", f"/r/{'x' * 5000}/{lent.item.id}", 404),
        ("POST", f"/r/%00%ff/{lent.item.id}", 404),
        ("GET", f"/r/{token}/..%2f..%2fadmin", 404),
        ("GET", f"/r/{token}/{'9' * 5000}", 404),
        ("GET", f"/admin/{token}", 404),
        ("GET", "/admin/\u0436%00", 404),
        ("POST", f"/r/{token}/{lent.item.id}/say", 404),
    ):
        assert client.request(method, path).status_code == expected, (method, path)
    assert store.ratings() == []
    assert store.next_item("r01") == lent
