"""A chat API as a speaker: our own server, and servers that misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from clients import serving
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate.endpoint import retry_after
from plato2.evaluate.openai_chat import OpenAIChat
from plato2.talk.bot import PlatoBot
from plato2.talk.safety import Safety, WordRule
from plato2.talk.self_chat import turn_seed

Deed = Callable[[BaseHTTPRequestHandler], None]
NOTHING_SAID = {"latent": None, "log_prob": None, "coherence": None}


def answers(body: Any, status: int = 200, **headers: str) -> Deed:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def deed(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return deed


def says(text: str | None, **more: Any) -> Deed:
    return answers({"choices": [{"message": {"role": "assistant", "content": text, **more}}], "usage": {}})


def hangs(request: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


def dribbles(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(15):  # never long without a byte
        request.wfile.write(b" ")
        request.wfile.flush()
        time.sleep(0.1)


def cuts(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"choices": [')


@contextmanager
def server(*deeds: Deed) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the requests that it got; the last deed is done again and again."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            with contextlib.suppress(OSError):  # whoever asked has left
                deeds[min(len(seen), len(deeds)) - 1](self)
            self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", seen
    running.shutdown()
    thread.join()
    running.server_close()


def ask(url: str, **options: Any) -> Any:
    speaker = OpenAIChat(url, "m", **{"wait_s": 0.01, "timeout_s": 0.5, **options})
    (said,) = speaker.reply_batch([["hi", "who are you ?"]], [2**40 + 5])
    return said


def test_what_is_asked_and_what_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with server(says("I am\n\n a  bot ."), says(None), says(None, refusal="No."), says("")) as (url, seen):
        said = ask(f"{url}/", settings={"temperature": 0.5})
        assert said.candidates == [{"text": "I am a bot .", **NOTHING_SAID}]
        assert [ask(url).text for _ in range(3)] == ["", "No.", ""]
    messages = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "who are you ?"}]
    fields = {"model": "m", "messages": messages, "seed": 5}
    asked = {"path": "/v1/chat/completions", "key": "Bearer k", **fields}
    assert seen == [{**asked, "temperature": 0.5}, asked, asked, asked]


@pytest.mark.parametrize(
    "deed",
    [hangs, dribbles, cuts, answers(b"", 500), answers(b"slow down", 429, Retry_After="0"), answers({}, 503)],
)
def test_what_fails_for_a_while_is_asked_again(deed: Deed) -> None:
    with server(deed, says("yes .")) as (url, seen):
        assert ask(url).text == "yes ."
        assert len(seen) == 2


def test_it_waits_as_long_as_the_server_asks() -> None:
    with server(answers(b"", 429, Retry_After="0.4"), says("yes .")) as (url, _):
        began = time.monotonic()
        assert ask(url).text == "yes ."
        assert time.monotonic() - began >= 0.4
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (retry_after("Sun, 01 Jan 2175 00:00:00 GMT") or 0) > 3e9  # cut to a minute where it is used
    assert retry_after(None) is retry_after("soon") is retry_after("Wed, 40 Oct") is None


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (answers(b"no room", 503), "{url}: no answer after 6 tries, the last: status 503: no room; the same"),
        (hangs, "no answer after 6 tries, the last: nothing within 0.05 seconds; the same command continues"),
        (cuts, "no answer after 6 tries, the last: RemoteProtocolError"),
        (answers(b'{"error": "no such model"}', 404), '{url}: status 404: {"error": "no such model"}'),
        (answers(b"who ?", 401), "{url}: status 401: who ?; set OPENAI_API_KEY"),
        (answers(b"", 307, Location="http://elsewhere"), "{url}: status 307"),
        (
            answers(b"<html>\n<p>hi"),
            "{url}: the answer: not valid JSON (expected value at line 1 column 1); is",
        ),
        (answers({"choices": []}), "{url}: the answer: choices=[]: "),
        (answers({"choices": [{"text": "hi"}]}), "{url}: the answer: choices.0.message is missing; is this"),
        (answers(b" " * (1 << 24) + b"{}"), "{url}: an answer of more than 16,777,216 bytes"),
    ],
)
def test_what_goes_on_failing_is_one_line(deed: Deed, message: str) -> None:
    with server(deed) as (url, _), pytest.raises(UserError) as caught:
        ask(url, timeout_s=0.05 if deed is hangs else 5.0)
    assert message.replace("{url}", url) in str(caught.value)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)


def test_an_address_without_a_server_is_told_at_once() -> None:
    with server(says("hi")) as (url, _):
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(.*\); is the server running\?"):
        ask(url)


def test_our_own_server_says_what_the_model_says(bot: PlatoBot, tmp_path: Path) -> None:
    careful = PlatoBot(bot.generation, bot.tokenizer, bot.evaluation, bot.decode_config,
                       safety=Safety([WordRule(["piano"])]))  # fmt: skip
    contexts = tmp_path / "contexts.jsonl"
    turns = [["hello !"], ["hi", "what is love ?"], ["do you play the piano ?"]]
    contexts.write_text("\n".join(json.dumps({"turns": some}) for some in turns), encoding="utf-8")
    out = tmp_path / "replies.jsonl"
    with serving(careful) as local:
        given = ["reply", "--contexts", str(contexts), "--speaker", f"openai:{local.url}/v1#tiny"]
        done = CliRunner().invoke(app, [*given, "--out", str(out)])
    assert done.exit_code == 0, done.output
    replies = [json.loads(line)["turns"][-1]["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert replies[2] == "I would rather not talk about that."
    for number in range(2):
        seed = turn_seed(11, number, len(turns[number])) % (1 << 31)
        assert replies[number] == careful.reply_batch([turns[number]], seeds=[seed])[0].text
