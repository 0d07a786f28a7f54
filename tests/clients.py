"""Clients of `plato2 serve`, well behaved and not, and a server in this process that can be held up."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from test_batching import SOON, GatedBot

from plato2.talk.bot import PlatoBot

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="the server needs pip install '.[serve]'")
pytest.importorskip("prometheus_client", reason="the server needs pip install '.[serve]'")
httpx = pytest.importorskip("httpx", reason="the tests of the server need httpx, which comes with openai")
openai = pytest.importorskip("openai", reason="the tests of the server need openai")
if shutil.which("curl") is None:
    pytest.skip("the tests of the server need curl", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from plato2.serve.app import make_app  # noqa: E402
from plato2.serve.batching import Batcher  # noqa: E402
from plato2.serve.metrics import Metrics  # noqa: E402
from plato2.serve.server import (  # noqa: E402
    Server,
    listen,
    make_server,
    url_of,
)

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi , how was your day ?"}]
CHAT = "/v1/chat/completions"


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SOON)


def ask(client: Any, messages: list[dict[str, Any]] = HI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def texts(answer: Any) -> list[str]:
    return [choice.message.content for choice in answer.choices]


def curl(*arguments: object, stdin: str | bytes = b"") -> tuple[int, str]:
    """Status and body."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = ["curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    body, _, status = done.stdout.decode().rpartition("\n")
    return int(status), body


def post(url: str, body: Any, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a chat request by curl; bodies that are no JSON are text."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    given = ["-H", "Content-Type: application/json", *arguments, "--data-binary", "@-"]
    status, answer = curl(f"{url}{CHAT}", *given, stdin=text)
    return status, json.loads(answer)


def metrics_of(url: str) -> dict[str, float]:
    """`name{labels}` -> value."""
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


ASK = {"model": "tiny", "messages": HI}
USER = {"role": "user", "content": "hi"}


def send_requests(url: str, n: int, **fields: Any) -> list[socket.socket]:
    """Connections on which n requests were sent and not yet answered."""
    host, port = url.removeprefix("http://").split(":")
    connections = []
    for seed in range(n):
        body = json.dumps({**ASK, "seed": seed, **fields}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        connections.append(connection)
    return connections


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@dataclass
class Local:
    """The application in this process."""

    url: str
    batcher: Batcher
    server: Server


@contextlib.contextmanager
def serving(
    bot: PlatoBot,
    max_batch: int = 16,
    max_queue: int = 256,
    receive_s: float = 20.0,
    max_connections: int = 1000,
    **options: Any,
) -> Iterator[Local]:
    metrics = Metrics()
    batcher = Batcher(bot, max_batch, max_queue, on_batch=metrics.count_batch)
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    served = make_app(bot, batcher, metrics, "tiny", receive_s=receive_s, **options)
    limits = {"receive_s": receive_s, "max_connections": max_connections}
    server = make_server(served, batcher, **limits, shutdown_s=5.0, on_ready=ready.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert ready.wait(SOON)
    yield Local(url_of(listener), batcher, server)
    if isinstance(bot, GatedBot):
        bot.gate.set()
    server.should_exit = True
    thread.join(SOON)
    assert not thread.is_alive()
    assert not batcher.is_working


def status_of(url: str, **fields: Any) -> int:
    return int(httpx.post(f"{url}{CHAT}", json={**ASK, **fields}, timeout=SOON).status_code)
