"""The web page of `plato2 serve --ui`: over HTTP, with gradio_client, and in a real Chromium."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from runs import make_run
from serving import Counted, end, start

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from gradio_client import Client
from starlette.routing import Route

from plato2.config import DecodeConfig, UserError
from plato2.data.samples import Context
from plato2.serve.batching import Batcher, Job, QueueFull
from plato2.serve.page import mount_page
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.rank import Candidate
from plato2.talk.safety import Flag, Safety, WordRule

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # of gradio's own

N_LATENT = 20
EVIL = """<script>document.title = "owned"</script><img src=x onerror="alert()"> **bold** [a](b)
`c` ${document.title = "owned"} {{document.title}} &amp; <b>fat</b> $$x^2$$
    indented"""


class ScriptedBot:
    """A tiny random model that does as it is told by some messages."""

    def __init__(self, bot: PlatoBot) -> None:
        self.own = bot.reply_to

    def __call__(
        self,
        contexts: Sequence[Context],
        decode: DecodeConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        message = contexts[0].turns[-1]
        if message == "break":
            raise RuntimeError("out of memory")
        if message == "wrong":
            raise UserError("no <b>such</b> 'rule' & more")
        if message == "slow":
            time.sleep(0.8)
        if message == "two are bad":
            found = [("good", None), ("bad <i>one</i>", "words: bad"), ("worse", "words: <worse>")]
            candidates = [
                Candidate(text, (), number, -1.0 - number, 0.9 - number / 10, flag=flag)
                for number, (text, flag) in enumerate(found)
            ]
            return [Reply("good", candidates, (Flag("output", "words: bad", "block"),))]
        if message == EVIL:
            candidates = [Candidate(f"{EVIL} {number}", (), number, -1.0, 0.5) for number in range(3)]
            return [Reply(candidates[0].text, candidates)]
        return self.own(contexts, decode, seeds)


class FullBatcher(Batcher):
    """Full for one message."""

    def submit(self, turns: Sequence[str], decode: DecodeConfig | None = None) -> Job:
        if turns[-1] == "full":
            raise QueueFull("256 requests are waiting")
        return super().submit(turns, decode)


@pytest.fixture(scope="module", autouse=True)
def _no_other_machine_is_asked() -> Iterator[None]:
    """Not by the server, that is; gradio_client asks in the thread of the tests, and may."""
    asked = set()
    look_up = socket.getaddrinfo

    def listen(host: Any, *rest: Any, **more: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            asked.add(host)
        return look_up(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", listen)
        yield
    assert asked <= {"127.0.0.1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "1_coarse": make_run(folder / "1_coarse", "1_coarse"),
        "2_gen": make_run(folder / "2_gen", "2_gen", n_latent=N_LATENT),
        "2_eval": make_run(folder / "2_eval", "2_eval"),
    }


def serve(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def app(runs: dict[str, Path]) -> Iterator[FastAPI]:
    safety = Safety([WordRule(["forbidden"])])
    bot = PlatoBot.load(runs["2_gen"], runs["2_eval"], decode=DecodeConfig(max_tokens=12), safety=safety)
    bot.reply_to = ScriptedBot(bot)
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> str:
        return "fine"

    batcher = FullBatcher(bot)
    yield mount_page(app, bot, batcher, "tiny <random>")
    batcher.close(10)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    yield from serve(app)


@pytest.fixture(scope="module")
def session(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


@pytest.fixture
def client(session: Client) -> Client:
    """Somebody who has said nothing yet."""
    session.predict(api_name="/reset")
    return session


def said(chat: list[dict[str, Any]]) -> list[str]:
    """The texts in the chat window, as HTML."""
    return [message["content"][0]["text"] for message in chat]


def exported(client: Client) -> list[dict[str, Any]]:
    lines = client.predict(api_name="/export").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------- HTTP


@pytest.mark.slow
def test_the_page_changes_nothing_of_the_api(runs: dict[str, Path]) -> None:
    pytest.importorskip("prometheus_client", reason="the server needs pip install '.[serve]'")
    from plato2.serve.app import make_app
    from plato2.serve.metrics import Metrics

    bot = PlatoBot.load(runs["1_coarse"])
    batcher = Batcher(bot)

    def answers(with_page: bool) -> list[tuple[int, str]]:
        app = make_app(bot, batcher, Metrics(), "tiny")
        if with_page:
            mount_page(app, bot, batcher, "tiny")
        found = []
        for address in serve(app):
            for path in (
                "/healthz",
                "/v1/models",
                "/v1/chat/completions",
                "/nowhere",
                "/v1/nowhere",
                "/docs",
            ):
                for method in ("GET", "HEAD", "OPTIONS", "DELETE", "POST"):
                    answer = httpx.request(method, f"{address}{path}", json={})
                    text = answer.text if path != "/v1/models" or method != "GET" else ""  # when it began
                    found.append((answer.status_code, f"{method} {path} {text}"))
            page = httpx.get(address)
            assert (page.status_code, "gradio" in page.text) == ((200, True) if with_page else (404, False))
        return found

    assert answers(with_page=True) == answers(with_page=False)
    batcher.close(10)


def test_other_routes_of_the_application_stay(address: str) -> None:
    assert httpx.get(f"{address}/healthz").json() == "fine"
    page = httpx.get(address)
    assert page.status_code == 200
    assert "tiny &lt;random&gt;" in page.text
    assert "tiny <random>" not in page.text


OPEN = (
    "/gradio_api/app_id",
    "/gradio_api/api/{api_name}",
    "/gradio_api/call/v2/{api_name}",
    "/gradio_api/call/v2/{api_name}/{event_id}",
    "/gradio_api/call/{api_name}",
    "/gradio_api/call/{api_name}/{event_id}",
    "/gradio_api/cancel",
    "/gradio_api/heartbeat/{session_hash}",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/queue/status",
    "/gradio_api/reset",
    "/gradio_api/run/{api_name}",
    "/gradio_api/startup-events",
    "/gradio_api/theme.css",
)
"""What talking needs."""


def gradios_routes(app: FastAPI) -> set[tuple[str, str]]:
    """Method and path of all that Gradio has, also of what this page does not need."""
    door = next(route.app for route in app.routes if isinstance(route, Route) and route.path == "/config")
    routes = iter_route_contexts(door.app.routes)
    return {(m, route.path) for route in routes for m in getattr(route, "methods", None) or ()}


def own_routes(app: FastAPI) -> set[tuple[str, str]]:
    """Method and path of all that the application has."""
    return {(m, route.path) for route in app.routes if isinstance(route, Route) for m in route.methods}


def filled(path: str) -> str:
    path = path.replace("{path_or_url:path}", "/etc/hostname").replace("{url_path:path}", "a")
    return path.replace("{api_name}", "chat").replace("{", "").replace("}", "")


def test_what_takes_or_gives_files_is_closed(app: FastAPI, address: str) -> None:
    """Whatever Gradio has below /gradio_api is closed or known, also after an update."""
    tried = 0
    for method, path in sorted(gradios_routes(app)):
        if path.startswith("/gradio_api") and path.rstrip("/") not in OPEN:
            answer = httpx.request(method, address + filled(path))
            assert answer.status_code in (403, 404), (method, path, answer.status_code)
            tried += 1
    assert tried > 20


PLAIN = [None, "top_k", 10, 0.9, 10, 1.0, 1, 8, 0, 1, 3]
"""What /chat takes after the message."""
SESSION = {"fn_index": 0, "session_hash": "abc", "trigger_id": 1}


WAITING = {
    (method, f"/gradio_api/{path}")
    for method in ("GET", "HEAD")
    for path in (
        "call/{api_name}/{event_id}",
        "call/v2/{api_name}/{event_id}",
        "heartbeat/{session_hash}",
        "queue/data",
    )
}
"""What answers when something happens, or never; a body of theirs is thrown away."""


def bodies(path: str) -> Iterator[Any]:
    """File data wherever it could stand in a request."""
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    yield {**SESSION, "data": [file, *PLAIN]}
    for hidden in ([file], {"value": file}, [[[file | {"is_stream": True}]]]):
        yield {**SESSION, "data": ["hi", *PLAIN[:-1], hidden]}
    yield {**SESSION, "data": [file]}
    yield {**SESSION, "data": file}
    yield {**SESSION, "data": [None], "fn_index": 1, "event_data": file}
    yield {"message": file, "seed": 3}
    yield {"message": "hi", "strategy": [file]}
    yield {"message": {"path": path}, "data": [{"path": path, "meta": path}]}


@pytest.mark.slow
def test_no_route_takes_a_file(app: FastAPI, runs: dict[str, Path], tmp_path: Path) -> None:
    """Gradio would copy a file, wait for ever at a device or a pipe, and fetch an address."""
    pipe, cache, secret = tmp_path / "pipe", tmp_path / "cache", tmp_path / "secret.txt"
    os.mkfifo(pipe)
    secret.write_text("a secret", encoding="utf-8")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(0.2)
        elsewhere = f"http://127.0.0.1:{other.getsockname()[1]}/file.txt"
        running = start(runs["1_coarse"], "--ui", "--max-tokens", 4, GRADIO_TEMP_DIR=str(cache))
        routes = own_routes(app) | gradios_routes(app)
        assert {path for _, path in routes} > set(OPEN)
        tried = set()
        with httpx.Client(base_url=running.url, timeout=60) as visitor:
            for method, path in sorted(routes - WAITING):
                for body in bodies(str(secret)):
                    status = visitor.request(method, filled(path), json=body).status_code
                    assert status < 500, (path, body)
                    assert method != "POST" or status >= 400, (path, body)
                    if (method, path) not in own_routes(app):
                        break  # closed for this body, closed for all
            for path in sorted(path for method, path in own_routes(app) if method == "POST"):
                for target in (pipe, "/dev/zero", "/dev/stdin", tmp_path, elsewhere, "ftp://127.0.0.1/a"):
                    for body in bodies(str(target)):
                        status = visitor.post(filled(path), json=body).status_code
                        assert 400 <= status < 500, (path, body)
                        if status == 400:
                            tried.add(path)
            assert {f"/gradio_api/{name}" for name in ("queue/join", "run/{api_name}")} <= tried
            assert {f"/gradio_api/{name}/{{api_name}}" for name in ("api", "call", "call/v2")} <= tried
            with pytest.raises(TimeoutError):
                other.accept()
        with pytest.raises(OSError, match="No such device"):  # nobody reads it
            os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert not [path for path in cache.rglob("*") if path.is_file()]
        client = Client(running.url, verbose=False, analytics_enabled=False)
        chat, *_ = client.predict(str(secret), api_name="/chat")  # a text that is a path is a text
        assert said(chat)[0] == str(secret)
        assert not [path for path in cache.rglob("*") if path.is_file()]
        code, _stdout, stderr = end(running)
    assert code == 0
    assert "Traceback" not in stderr


@pytest.mark.parametrize("route", ["call", "call/v2", "run", "api"])
def test_the_open_routes_answer_texts_and_numbers(address: str, route: str) -> None:
    body = {"message": "hi", "seed": 3} if route == "call/v2" else {"data": ["hi", *PLAIN]}
    answer = httpx.post(f"{address}/gradio_api/{route}/chat", json=body)
    assert answer.status_code == 200, answer.text
    if route.startswith("call"):
        with httpx.stream("GET", f"{address}/gradio_api/call/chat/{answer.json()['event_id']}") as events:
            assert "event: complete" in [line for line in events.iter_lines() if line.startswith("event: c")]


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        "",
        '{"data": [NaN]}',
        '{"data": [1e999]}',
        "[" * 100_000,
        b"\xff",
        '{"a":' + "9" * 5000 + "}",
    ],
    ids=["cut", "list", "nothing", "nan", "infinite", "deep", "bytes", "digits"],
)
def test_what_is_no_plain_json_is_refused(address: str, body: str | bytes) -> None:
    answer = httpx.post(
        f"{address}/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_type", "invalid_value")


def test_the_page_is_for_its_own_scripts(address: str) -> None:
    join, body = f"{address}/gradio_api/queue/join", {**SESSION, "data": ["hi", *PLAIN]}
    port = address.rpartition(":")[2]
    for origin in (
        "http://localhost:1",
        "http://127.0.0.1",
        f"http://localhost:{port}",
        "null",
        "https://a.b",
    ):
        answer = httpx.post(join, json=body, headers={"Origin": origin})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "foreign_origin"
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(join, headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.post(join, json=body, headers={"Origin": address}).status_code == 200


def test_no_other_site_can_show_or_read_the_page(address: str) -> None:
    for path in ("/", "/config", "/theme.css", "/gradio_api/info"):
        headers = httpx.get(f"{address}{path}").headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"


def test_no_file_of_the_server_can_be_read(address: str, runs: dict[str, Path]) -> None:
    own = Path(__file__)
    with httpx.Client() as visitor:
        for path in (str(own), str(runs["2_gen"] / "lineage.json")):
            for route in ("gradio_api/file=", "file=", "static/", "assets/", "svelte/", "gradio_api/file/"):
                for spelled in (path, path.replace("/", "%2F"), "..%2F" * 12 + path.lstrip("/")):
                    answer = visitor.get(f"{address}/{route}{spelled}")
                    assert answer.status_code in (403, 404), (route, spelled)


# ------------------------------------------------------------------------------------------- gradio_client


def test_a_conversation_by_its_endpoints(client: Client) -> None:
    chat, _box, panel, line = client.predict("hi , how was your day ?", seed=3, api_name="/chat")
    first = exported(client)
    assert said(chat) == [escape(line["text"]) for line in first]
    assert panel.count("<tr ") == panel.count('<div class="bar') - 1 == N_LATENT  # and the bars' axis
    assert "20 candidates in" in line
    assert "the model saw 1 turn" in line

    bot = first[1]
    assert bot["role"] == "bot"
    assert bot["chosen"] == 1
    assert bot["text"] == bot["candidates"][0]["text"]
    assert bot["settings"]["seed"] == 3
    assert bot["settings"]["max_tokens"] == 12
    assert {c["latent"] for c in bot["candidates"]} == set(range(N_LATENT))
    scores = [candidate["score"] for candidate in bot["candidates"]]
    assert scores == sorted(scores, reverse=True)

    chosen, *_ = client.predict(4, api_name="/choose")
    assert said(chosen)[-1] == escape(bot["candidates"][3]["text"])
    chat, *_ = client.predict("do you like music ?", api_name="/chat")
    assert said(chat)[1] == said(chosen)[1]  # the conversation goes on from it
    lines = exported(client)
    assert lines[1]["chosen"] == 4
    assert lines[3]["seen"] == 3

    chat, box, panel, _line = client.predict(api_name="/undo")
    assert len(chat) == 2
    assert box == "do you like music ?"
    assert 'class="row chosen" data-rank="4"' in panel
    chat, *_ = client.predict(api_name="/reset")
    assert chat == []
    assert exported(client) == []
    assert client.predict(api_name="/undo")[0] == []
    assert client.predict(1, api_name="/choose")[0] == []


def test_the_same_seed_says_the_same_and_another_something_else(client: Client) -> None:
    texts = []
    for seed in (1, 1, 2):
        client.predict("hello there", seed=seed, api_name="/chat")
        texts.append([candidate["text"] for candidate in exported(client)[1]["candidates"]])
        client.predict(api_name="/reset")
    assert texts[0] == texts[1] != texts[2]


def test_nobody_sees_the_conversation_of_another(address: str, client: Client) -> None:
    other = Client(address, verbose=False, analytics_enabled=False)
    client.predict("my secret", api_name="/chat")
    chat, *_ = other.predict("hello", api_name="/chat")
    assert said(chat)[0] == "hello"
    assert len(exported(other)) == len(exported(client)) == 2


@pytest.mark.parametrize(
    "message",
    [
        "word " * 20_000,
        "😀👩‍👩‍👧 ok",
        "\x00\x07\x1b[31m\u202eabc\u2028d",
        "你好 مرحبا नमस्ते สวัสดี",
        "[SEP] [CLS] </s> [MASK]",
        '"quotes" \\ and\na second line',
        "a.",
    ],
    ids=["100 KB", "emoji", "control", "scripts", "special", "json", "short"],
)
def test_any_text_is_a_message(client: Client, message: str) -> None:
    client.predict(message, api_name="/chat")
    client.predict("and then ?", api_name="/chat")
    lines = exported(client)
    assert len(lines) == 4
    assert lines[0]["text"] == message


def test_a_message_that_cannot_be_read_is_said(client: Client) -> None:
    assert "cannot read" not in client.predict("hello there", api_name="/chat")[2]
    assert "The model cannot read 100% of this message" in client.predict("你好", api_name="/chat")[2]


@pytest.mark.parametrize("message", ["", "  \n\t", "full", "wrong", "break"])
def test_what_is_not_answered_stays_in_the_box(client: Client, message: str) -> None:
    client.predict("hello", api_name="/chat")
    chat, box, panel, _line = client.predict(message, api_name="/chat")
    assert len(chat) == 2
    assert box == message
    assert 'class="ready"' in panel


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 0},
        {"top_p": 1.5},
        {"temperature": -1},
        {"temperature": 2.5},
        {"min_tokens": 99},
        {"seed": None},
        {"samples": 21},
        {"samples": 0},
        {"beam_size": 1000},
        {"no_repeat_ngram": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_keep_the_message(client: Client, settings: dict[str, Any]) -> None:
    chat, box, *_ = client.predict("hello", **settings, api_name="/chat")
    assert chat == []
    assert box == "hello"


def test_near_zero_is_greedy(client: Client) -> None:
    texts = []
    for settings in (
        {"top_k": 1},
        {"temperature": 0},
        {"temperature": 1e-9},
        {"strategy": "top_p", "top_p": 0},
    ):
        client.predict("hello", **settings, api_name="/chat")
        texts.append([candidate["text"] for candidate in exported(client)[1]["candidates"]])
        client.predict(api_name="/reset")
    assert texts == [texts[0]] * 4


def test_a_beam_search_and_more_samples(client: Client) -> None:
    client.predict("hello", strategy="beam", beam_size=2, samples=3, api_name="/chat")
    client.predict("hello", strategy="top_p", top_p=0.5, samples=2, api_name="/chat")
    lines = exported(client)
    assert [len(line["candidates"]) for line in lines[1::2]] == [2 * N_LATENT] * 2
    assert [line["settings"]["strategy"] for line in lines[1::2]] == ["beam", "top_p"]


def test_what_the_safety_filter_holds_back_is_not_shown_and_cannot_be_chosen(client: Client) -> None:
    _chat, _box, panel, _line = client.predict("two are bad", api_name="/chat")
    assert panel.count("data-rank") == 2  # the good one as row and bar
    assert "bad &lt;i&gt;one" not in panel
    assert "words: &lt;worse&gt;" in panel
    chat, *_ = client.predict(2, api_name="/choose")
    assert said(chat)[-1] == "good"
    texts = [candidate["text"] for candidate in exported(client)[1]["candidates"]]
    assert texts == ["good", None, None]

    chat, _box, panel, _line = client.predict("something forbidden", api_name="/chat")
    assert said(chat)[-1] == "I would rather not talk about that."
    assert "stopped the message: words: forbidden" in panel
    assert exported(client)[3] | {"settings": None, "timing": None} == {
        "role": "bot",
        "text": "I would rather not talk about that.",
        "chosen": None,
        "candidates": [],
        "flags": [{"side": "input", "rule": "words: forbidden", "action": "block"}],
        "settings": None,
        "seen": 3,
        "timing": None,
    }


def test_a_stage_1_model_has_samples_and_bars_of_log_probability(runs: dict[str, Path]) -> None:
    bot = PlatoBot.load(runs["1_coarse"], decode=DecodeConfig(max_tokens=8))
    batcher = Batcher(bot)
    for address in serve(mount_page(FastAPI(), bot, batcher, "coarse")):
        client = Client(address, verbose=False, analytics_enabled=False)
        _chat, _box, panel, _line = client.predict("hello", samples=7, api_name="/chat")
        assert len(exported(client)[1]["candidates"]) == 7
        assert "Log-probability" in panel
        assert "<th>rank</th><th>log p</th><th>reply</th>" in panel
    batcher.close(10)


@pytest.mark.slow
def test_each_turn_is_cut_into_tokens_once(runs: dict[str, Path]) -> None:
    bot = PlatoBot.load(runs["1_coarse"], decode=DecodeConfig(max_tokens=8))
    batcher, counted = Batcher(bot), Counted(bot.tokenizer)
    for address in serve(mount_page(FastAPI(), bot, batcher, "coarse")):
        client = Client(address, verbose=False, analytics_enabled=False)
        _chat, _box, panel, line = client.predict("hi 你好", api_name="/chat")
        assert "The model cannot read" in panel
        assert "the model saw 1 turn" in line
        assert counted.cut == ["hi 你好"]
    batcher.close(10)


@pytest.mark.slow
def test_who_waits_too_long_keeps_the_message(runs: dict[str, Path]) -> None:
    bot = PlatoBot.load(runs["1_coarse"])
    bot.reply_to = ScriptedBot(bot)
    batcher = Batcher(bot)
    for address in serve(mount_page(FastAPI(), bot, batcher, "coarse", timeout_s=0.2)):
        client = Client(address, verbose=False, analytics_enabled=False)
        chat, box, *_ = client.predict("slow", api_name="/chat")
        assert (chat, box) == ([], "slow")
    batcher.close(10)


def test_an_open_page_does_not_hold_up_the_end(runs: dict[str, Path]) -> None:
    bot = PlatoBot.load(runs["1_coarse"])
    batcher = Batcher(bot)
    for address in serve(mount_page(FastAPI(), bot, batcher, "coarse")):
        with httpx.stream("GET", f"{address}/gradio_api/heartbeat/abc", timeout=10) as heartbeat:
            beats = heartbeat.iter_lines()
            assert next(beats) == "data: ALIVE"
            batcher.close(10)
            began = time.monotonic()
            assert len(list(beats)) < 3  # which ends
            assert time.monotonic() - began < 5


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "plato2.serve.page")
    with pytest.raises(UserError, match=r"pip install '\.\[ui\]'"):
        importlib.import_module("plato2.serve.page")


# ------------------------------------------------------------------------------------------------ Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    quiet = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    quiet += ["disable-sync", "no-first-run"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=[f"--{name}" for name in quiet])
        yield browser
        browser.close()


class Visit:
    """Somebody who looks at the page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(15_000)
        self.hosts: set[str | None] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.goto(address)
        self.box = self.page.locator("#message textarea")
        self.box.wait_for()

    def say(self, message: str) -> None:
        """Sends a message and waits for the reply."""
        before = self.page.locator("#chat .bot.message").count()
        self.box.fill(message)
        self.box.press("Enter")
        self.page.locator("#chat .bot.message").nth(before).wait_for()
        self.page.locator("#panel .ready").wait_for()

    def wait_for_box(self, text: str) -> None:
        """Waits until that is in the box: what changes at once may be shown one after the other."""
        from playwright.sync_api import expect

        expect(self.box).to_have_value(text)

    def wait_for_texts(self, n: int) -> list[str]:
        """What stands in the chat window, as soon as there is so much of it."""
        from playwright.sync_api import expect

        expect(self.page.locator("#chat .message-content")).to_have_count(n)
        return self.texts()

    def texts(self) -> list[str]:
        """What stands in the chat window."""
        return self.page.locator("#chat .message-content").all_inner_texts()

    def rows(self) -> list[str]:
        """The replies in the table."""
        return self.page.locator("#panel td:last-child").all_inner_texts()


def test_a_visit(browser: Any, address: str, tmp_path: Path) -> None:
    visit = Visit(browser, address)
    page = visit.page
    assert page.title() == "tiny <random>"
    assert page.get_by_role("button", name="Undo").is_disabled()
    visit.say("hi , how was your day ?")
    rows = visit.rows()
    assert len(rows) == page.locator("#panel .bar[data-rank]").count() == N_LATENT
    assert visit.texts() == ["hi , how was your day ?", rows[0]]
    label = page.locator("#panel .bar .label").nth(2).inner_text()
    assert label.startswith("z ")
    assert label.endswith(rows[2])

    page.locator("#panel tr[data-rank='3']").click()
    page.locator("#panel tr.chosen[data-rank='3']").wait_for()
    assert visit.texts()[1] == rows[2]
    page.locator("#panel .bar[data-rank='2']").press("Enter")  # a bar, and by keyboard
    page.locator("#panel tr.chosen[data-rank='2']").wait_for()
    assert visit.texts()[1] == rows[1]

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("seed").wait_for()
    page.wait_for_timeout(300)  # Gradio sets the fields a moment after they appear
    page.get_by_label("seed").fill("5")
    visit.say("do you like music ?")
    assert visit.texts()[1] == rows[1]
    assert "the model saw all 3 turns" in page.locator("#line").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "conversation.jsonl"
    download.value.save_as(tmp_path / "conversation.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "conversation.jsonl").open(encoding="utf-8")]
    assert [line["text"] for line in lines] == visit.texts()
    assert lines[1]["chosen"] == 2
    assert lines[3]["settings"]["seed"] == 5

    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 2")
    visit.wait_for_box("do you like music ?")
    assert visit.rows() == rows
    page.get_by_role("button", name="New conversation").click()
    page.locator("#panel .hint").wait_for()
    assert visit.texts() == []
    assert visit.hosts <= {"127.0.0.1", None}  # None: made in the browser, as the download is
    assert visit.complaints == []
    page.close()


@pytest.mark.slow
def test_what_is_written_is_shown_as_text(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    visit.say(EVIL)
    visit.page.wait_for_timeout(300)  # time for an image to fail to load
    assert visit.page.title() == "tiny <random>"
    shown = [" ".join(text.split()) for text in [*visit.texts(), *visit.rows()]]
    evil = " ".join(EVIL.split())
    assert shown == [evil, f"{evil} 0", f"{evil} 0", f"{evil} 1", f"{evil} 2"]
    foreign = "#chat .message-content :is(img, script, b, strong, a, code), #panel td :is(img, script, b, a)"
    assert visit.page.locator(foreign).count() == 0
    assert visit.complaints == []
    visit.page.close()


@pytest.mark.slow
def test_hints_and_warnings(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    toast = visit.page.locator(".toast-body")
    for message, expected in (
        ("", "the message is empty"),
        ("full", "too many messages are waiting"),
        ("wrong", "no <b>such</b> 'rule' & more"),
    ):
        visit.box.fill(message)
        visit.box.press("Enter")
        toast.filter(has_text=expected).wait_for()
        visit.wait_for_box(message)
        visit.wait_for_texts(0)
    visit.say("hello")
    visit.wait_for_texts(2)
    visit.page.close()


@pytest.mark.slow
def test_while_it_waits_the_message_is_there_and_nothing_can_be_chosen(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    visit.say("hello")
    visit.box.fill("slow")
    visit.box.press("Enter")
    visit.page.locator("#panel .waiting").wait_for()
    assert visit.wait_for_texts(3)[2] == "slow"
    assert visit.page.get_by_role("button", name="Undo").is_disabled()
    visit.page.locator("#panel tr[data-rank='3']").click()
    visit.box.fill("typed meanwhile")
    visit.page.locator("#panel .ready").wait_for()
    visit.wait_for_box("typed meanwhile")
    visit.wait_for_texts(4)
    assert visit.page.locator("#panel tr.chosen").get_attribute("data-rank") == "1"
    visit.page.close()


@pytest.mark.slow
def test_it_fits(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    visit.say("word " * 60 + "x" * 300)
    visit.page.get_by_role("button", name="Settings").click()
    too_wide = """[...document.querySelectorAll('html, #chat, #panel .table, #panel figure, #settings')]
        .filter((element) => element.scrollWidth > element.clientWidth + 1).map((element) => element.id)"""
    for width, height in ((1280, 800), (390, 844)):
        visit.page.set_viewport_size({"width": width, "height": height})
        assert visit.page.evaluate(too_wide) == []
    visit.page.close()
