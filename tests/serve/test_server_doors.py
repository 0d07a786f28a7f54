"""Who the server lets in: keys, hosts, idle connections, other sites; and what it logs of them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from clients import (
    ASK,
    CHAT,
    Local,
    ask,
    client_of,
    curl,
    httpx,
    openai,
    post,
    read_all,
    send_requests,
    serving,
    status_of,
    texts,
)
from serving import end, start
from test_batching import SOON, GatedBot, eventually

from plato2.serve.server import LOG_CHARACTERS, LOG_SECONDS, LimitedLog


def test_the_key(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated, api_key="let-me-in") as local:
        assert texts(ask(client_of(local.url, "let-me-in")))
        for key in ("wrong", "let-me-in-", "lét-me-in"):
            status, body = curl(f"{local.url}/v1/models", "-H", f"Authorization: Bearer {key}")
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(local.url, "wrong"))
        for header in ("Authorization: Basic let-me-in", "Authorization: let-me-in", "X-Nothing: 1"):
            status, _ = post(local.url, ASK, "-H", header)
            assert status == 401
        response = httpx.get(f"{local.url}/v1/models")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "let-me-in" not in response.text
        for path in ("/healthz", "/metrics"):
            assert curl(f"{local.url}{path}")[0] == 200


def test_the_list_of_fields_needs_the_key_and_the_page_may(gated: GatedBot) -> None:
    def status(local: Local, path: str, **more: Any) -> Any:
        return httpx.get(f"{local.url}{path}", **more).status_code

    with serving(gated, api_key="let-me-in") as local:
        assert (status(local, "/openapi.json"), status(local, "/")) == (401, 404)
        assert status(local, "/openapi.json", headers={"Authorization": "Bearer let-me-in"}) == 200
    with serving(gated, api_key="let-me-in", page_key=True) as local:
        for path in ("/", "/config", "/gradio_api/info", "/nowhere"):
            assert status(local, path) == status(local, path, auth=("anybody", "wrong")) == 401
            assert status(local, path, auth=("anybody", "let-me-in")) == 404  # there is no page here
        assert httpx.get(local.url).headers["www-authenticate"].startswith("Basic realm=")
        assert httpx.get(f"{local.url}/v1/models").headers["www-authenticate"] == "Bearer"
        for scheme in ("Basic", "Basic ?", "Basic bGV0", "Basic \xff", "Bearer", ""):
            assert status(local, "/", headers={"Authorization": scheme.encode("latin-1")}) == 401
        assert (status(local, "/healthz"), status(local, "/metrics")) == (200, 200)


@pytest.mark.slow
def test_only_names_of_its_own_are_answered(gated: GatedBot) -> None:
    def status(local: Local, host: str, path: str = "/v1/models") -> int:
        return int(httpx.get(f"{local.url}{path}", headers={"Host": host}).status_code)

    with serving(gated) as local:
        port = local.url.rpartition(":")[2]
        for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port}", "[::1]:8000", "127.0.0.2"):
            assert status(local, host) == 200, host
        for host in (
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "10.0.0.1",
            "[",
            "a]",
            "",
            "@",
        ):
            for path in ("/v1/models", "/healthz", "/", "/metrics", "/openapi.json"):
                assert status(local, host, path) == 400, (host, path)
        error = httpx.get(local.url, headers={"Host": "evil.example"}).json()["error"]
        assert error["code"] == "foreign_host"
        assert "--allow-host evil.example" in error["message"]
        with socket.create_connection(("127.0.0.1", int(port)), timeout=SOON) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")  # who names none is no browser
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    with serving(gated, hosts=("chat.example.org",)) as local:
        assert (status(local, "chat.example.org"), status(local, "example.org")) == (200, 400)
    with serving(gated, hosts=("*",)) as local:
        assert status(local, "evil.example") == 200


def test_every_get_has_a_head(url: str) -> None:
    for path, status in (("/healthz", 200), ("/v1/models", 200), ("/metrics", 200), ("/", 404), (CHAT, 405)):
        response = httpx.head(f"{url}{path}")
        assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "nothing"])
def test_a_request_to_upgrade_is_a_request(url: str, upgrade: str) -> None:
    """Whatever other protocols are installed here: none of them is used."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**ASK, "seed": 3}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAAQAAP\r\n"
    with socket.create_connection((host, int(port)), timeout=SOON) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_who_sends_nothing_is_cut_off(gated: GatedBot) -> None:
    gated.gate.set()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    whole = head + b"Content-Length: 2\r\n\r\n{}"
    with serving(gated, receive_s=0.3) as local:
        host, port = local.url.removeprefix("http://").split(":")
        # nothing; half a head; the same after an answer; half a body
        for begin in (b"", head, whole + head, head + b"Content-Length: 9\r\n\r\n{"):
            with socket.create_connection((host, int(port)), timeout=SOON) as connection:
                connection.sendall(begin)
                received = read_all(connection)
            assert received.count(b"HTTP/1.1 400") == begin.startswith(whole), begin
            assert received.count(b"HTTP/1.1 408") == begin.endswith(b"{"), begin
        assert status_of(local.url) == 200
        waiting = send_requests(local.url, 1)[0]  # who waits for an answer is not cut off
        gated.gate.clear()
        time.sleep(0.6)
        gated.gate.set()
        assert read_all(waiting).startswith(b"HTTP/1.1 200")


def test_a_new_connection_takes_the_place_of_an_idle_one(gated: GatedBot) -> None:
    with serving(gated, max_connections=4) as local:
        host, port = local.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=SOON) for _ in range(10)]
        asked = send_requests(local.url, 1)
        assert gated.begun.wait(SOON)
        asked += send_requests(local.url, 2)
        eventually(lambda: local.batcher.queue_length == 2)
        gone = 0
        for connection in idle:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                gone += connection.recv(1) == b""
        assert gone >= 9  # the oldest ones; four may be there, three of which have asked
        fourth = send_requests(local.url, 1)[0]
        eventually(lambda: local.batcher.queue_length == 3)
        with contextlib.suppress(ConnectionError):
            refused = read_all(socket.create_connection((host, int(port)), timeout=SOON))
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"too_many_connections" in refused
        gated.gate.set()
        for connection in [*asked, fourth]:
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        for connection in idle:
            connection.close()


@pytest.mark.slow
def test_a_thousand_idle_connections_beside_two_hundred_clients(runs: dict[str, Path]) -> None:
    """With as few files open as many systems allow a process."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip(f"needs 1,500 open files, the system allows {hard:,}: ulimit -Hn")
    limit = ["prlimit", "--nofile=1024:1024"] if shutil.which("prlimit") else pytest.skip("needs prlimit")
    running = start(runs["2_gen"], "--max-tokens", 4, before=limit)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    host, port = running.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=SOON) for _ in range(1060)]
    assert httpx.get(f"{running.url}/healthz", timeout=SOON).status_code == 200

    async def ask_all() -> list[Any]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120) as client:
            body = {**ASK, "model": "2_gen", "seed": 3}
            return await asyncio.gather(*(client.post(f"{running.url}{CHAT}", json=body) for _ in range(200)))

    assert {answer.status_code for answer in asyncio.run(ask_all())} == {200}
    for connection in idle:
        connection.close()
    code, _, stderr = end(running)
    assert code == 0
    assert stderr.splitlines() == [
        "no --evaluation: candidates are ranked by log-probability, not by coherence"
    ]


def test_the_log_is_bounded() -> None:
    stream = io.StringIO()
    log = LimitedLog(stream)
    for _ in range(100):
        print("x" * 10_000, file=log)
    written = stream.getvalue()
    assert LOG_CHARACTERS <= len(written) < LOG_CHARACTERS + 20_000
    assert written.endswith("the rest of this minute is left out\n")
    log.began -= LOG_SECONDS + 1
    print("later", file=log)
    assert stream.getvalue().endswith("left out\nlater\n")


def test_a_line_for_each_request_has_no_more_than_its_path(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--log-requests", "--max-tokens", 4)
    httpx.get(f"{running.url}/healthz?secret=1")
    httpx.get(f"{running.url}/a%0Ab%20c?secret=2")
    for _ in range(300):  # what is no HTTP
        with socket.create_connection(
            running.url.removeprefix("http://").split(":"), timeout=SOON
        ) as connection:
            connection.sendall(b"\x16\x03\x01\r\n\r\n")
            connection.recv(100)
    code, stdout, stderr = end(running)
    assert code == 0
    assert stdout.splitlines() == ["127.0.0.1 GET /healthz 200", "127.0.0.1 GET /a%0Ab%20c 404"]
    assert len(stderr) < LOG_CHARACTERS + 1000


def test_cors_is_closed_but_for_those_named(gated: GatedBot) -> None:
    gated.gate.set()
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    with serving(gated) as local:
        response = httpx.post(f"{local.url}{CHAT}", json=ASK, headers=asked)
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert httpx.options(f"{local.url}{CHAT}", headers=asked).status_code == 405
    origins = ["https://example.org", "https://example.com"]
    with serving(gated, cors_origins=origins, api_key="key") as local:
        response = httpx.options(f"{local.url}{CHAT}", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        for headers, status in (({}, 401), ({"Authorization": "Bearer key"}, 200)):
            response = httpx.post(
                f"{local.url}{CHAT}", json=ASK, headers={"Origin": "https://example.com", **headers}
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://example.com"
        response = httpx.get(f"{local.url}/healthz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
