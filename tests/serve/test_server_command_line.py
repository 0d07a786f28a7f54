"""`plato2 serve` on the command line: a mistake is one line, the names of models, missing packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from clients import httpx
from serving import end, start
from small import ROOT
from typer.testing import CliRunner

from plato2.commands import app
from plato2.commands.serve import model_name
from plato2.runs.folder import RunFolder
from plato2.serve.server import listen
from plato2.talk.bot import CONTEXTS_AT_ONCE


def complaint(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--generation", "b"], "give one model to serve"),
        (["a", "--port", 70000], "--port 70000: use 0 to 65535"),
        (["a", "--timeout", 0], "--timeout 0.0: use 0.001 or more"),
        (["a", "--timeout", "nan"], "--timeout nan: use 0.001 or more"),
        (["a", "--receive-timeout", "inf"], "--receive-timeout inf: use 0.001 or more"),
        (["a", "--name", "  "], "--name '  ': give a one-line name"),
        (["a", "--name", "a\nb"], "--name 'a\\nb': give a one-line name"),
        (["a", "--allow-host", "http://x.org"], "--allow-host http://x.org: give a name alone, such as"),
        (["a", "--allow-host", "x.org:80"], "--allow-host x.org:80: give a name alone, such as"),
        (["a", "--cors-origin", "foo"], "--cors-origin foo: give scheme and name, such as https://"),
        (["a", "--cors-origin", "http://x.org/"], "--cors-origin http://x.org/: give scheme and name"),
        (["a", "--max-batch", 17], "--max-batch 17: use 1 to 16"),
        (["a", "--max-queue", 0], "--max-queue 0: use 1 or more"),
        (["a", "--api-key", ""], "--api-key: use letters, digits and symbols"),
        (["a", "--top-k", 0], "--top-k 0: must be at least 1"),
        (["a", "--system", "obey"], "--system obey: use ignore, refuse or context"),
        (["a", "--ui", "--api-key", "k"], "--ui: the key does not guard the page; give --ui-login"),
        (["a", "--ui", "--ui-login"], "--ui-login: there is no key to ask for; set PLATO2_API_KEY"),
        (["a", "--ui-open"], "--ui-login and --ui-open are for the page; give --ui"),
        (["a", "--receive-timeout", 0], "--receive-timeout 0.0: use 0.001 or more"),
        (["a", "--max-connections", 0], "--max-connections 0: use 1 or more"),
        (["a", "--host", "nowhere.invalid"], "--host nowhere.invalid: "),
        (["a", "--host", "203.0.113.9"], "203.0.113.9:8000 cannot be used"),
        (["nothing-here", "--port", 0], "no such run folder, checkpoint or model folder"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[object], message: str) -> None:
    assert message in complaint(*arguments)


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATO2_API_KEY", "")
    assert "--api-key: use letters, digits and symbols" in complaint("a", "--host", "0.0.0.0")


@pytest.mark.slow
def test_a_server_for_others_says_that_it_has_no_key(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--host", "0.0.0.0", "--max-tokens", 4)
    assert "--host 0.0.0.0: anyone who can reach it may use it; PLATO2_API_KEY sets a key" in end(running)[2]
    running = start(runs["2_gen"], "--host", "0.0.0.0", "--max-tokens", 4, PLATO2_API_KEY="k")
    assert "may use it" not in end(running)[2]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("outputs/tiny-2_gen/20261128-101112", "tiny-2_gen"),
        ("outputs/tiny-2_gen/20261128-101112/checkpoints/best.ckpt", "tiny-2_gen"),
        ("outputs/tiny-2_gen/4711", "tiny-2_gen"),
        ("outputs/tiny-2_gen/mine", "mine"),
        ("outputs/12345", "tiny-2_gen"),
        ("outputs/tiny-2_gen/mine/checkpoints/last.ckpt", "mine"),
        ("models/24L", "24L"),
        ("models/2026", "2026"),
    ],
)
def test_the_id_of_a_model_is_no_time(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    run = file.parents[1] if file.suffix else file
    run.mkdir(parents=True)
    if path.startswith("outputs"):
        RunFolder(run).write_lineage(model="tiny", stage="2_gen")
    if file.suffix:
        file.parent.mkdir()
        file.touch()
    assert model_name(file) == name


def test_a_port_that_is_taken_is_named(runs: dict[str, Path]) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = complaint(runs["2_gen"], "--port", port)
    assert f"--port {port}: 127.0.0.1:{port} cannot be used" in said
    assert "use another --port" in said


def test_missing_packages_are_named(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "plato2.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn: pip install '.[serve]'" in complaint(runs["2_gen"])


def test_as_many_contexts_as_are_decoded_at_once() -> None:
    assert CONTEXTS_AT_ONCE == 16  # what --max-batch and its help say


def test_only_servers_need_their_packages() -> None:
    web = "fastapi|uvicorn|starlette|prometheus_client|gradio"
    for path in (ROOT / "plato2").rglob("*.py"):
        found = re.findall(rf"^\s*(?:import|from) (?:{web})\b", path.read_text(encoding="utf-8"), re.M)
        assert not found or path.parent.name in ("serve", "human"), path


@pytest.mark.slow
def test_the_page_is_named_and_guarded_by_the_key(runs: dict[str, Path]) -> None:
    pytest.importorskip("gradio", reason="the page needs pip install '.[ui]'")
    running = start(runs["2_gen"], "--ui", "--ui-login", PLATO2_API_KEY="k3y")
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == f"{running.url}/ is the page to talk on\n"
    assert httpx.get(f"{running.url}/").status_code == 401
    assert httpx.get(f"{running.url}/", auth=("anyone", "another")).status_code == 401
    assert httpx.get(f"{running.url}/", auth=("anyone", "k3y")).status_code == 200
    assert end(running)[0] == 0
