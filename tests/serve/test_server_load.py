"""The server under load: many clients, a full queue, clients that hang up, batches that fail, and the end."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clients import (
    ASK,
    CHAT,
    HI,
    ask,
    client_of,
    curl,
    httpx,
    metrics_of,
    openai,
    read_all,
    send_requests,
    serving,
    status_of,
    texts,
)
from serving import MAX_TOKENS, start
from test_batching import SOON, GatedBot, eventually

import plato2.serve.app as app_module


def test_two_hundred_clients_at_once(url: str) -> None:
    before = metrics_of(url)

    async def ask_all() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(CHAT, json={**ASK, "seed": n % 7, "max_tokens": 4}) for n in range(200))
            )

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 200
    for n in range(7):
        said = {answer.json()["choices"][0]["message"]["content"] for answer in answers[n::7]}
        assert len(said) == 1
    after = metrics_of(url)
    assert after["plato2_batch_contexts_sum"] - before["plato2_batch_contexts_sum"] == 200
    assert after["plato2_batch_contexts_count"] - before["plato2_batch_contexts_count"] < 100
    assert after["plato2_queue_length"] == 0


@pytest.mark.slow
def test_memory_stays_bounded(url: str) -> None:
    def ask_often(n: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for m in range(10):
                assert (
                    client.post(CHAT, json={**ASK, "user": "x" * 500_000, "seed": n * m}).status_code == 200
                )

    sizes = []
    for _ in range(3):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask_often, range(64)))
        sizes.append(metrics_of(url)["process_resident_memory_bytes"])
    assert sizes[2] < sizes[0] * 1.1


@pytest.mark.slow
def test_sigterm_under_load_answers_all_that_was_accepted(runs: dict[str, Path]) -> None:
    running = start("--generation", runs["2_gen"], "--max-batch", 4)
    assert "serves 2_gen on" in running.line
    connections = send_requests(running.url, 40, model="2_gen", max_tokens=40)
    eventually(lambda: metrics_of(running.url).get(f"plato2_requests_total{{{CHAT}}}{{200}}", 0) > 0)
    running.process.send_signal(signal.SIGTERM)
    answers = [read_all(connection) for connection in connections]
    for answer in answers:
        assert answer.count(b"HTTP/1.1 ") == 1
        status = int(answer.split()[1])
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (status, "choices" in body) in ((200, True), (503, False)), body
    assert sum(b"HTTP/1.1 200" in answer for answer in answers) > 30
    stdout, stderr = running.process.communicate(timeout=60)
    assert running.process.returncode == 0
    assert stdout == ""
    assert stderr.splitlines() == [
        "no --evaluation: candidates are ranked by log-probability, not by coherence"
    ]


HARD = {"model": "2_gen", "max_tokens": 128, "plato2": {"n_samples": 20, "min_tokens": 128}}
"""Settings with which 30 requests take many seconds."""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"])
    connections = send_requests(running.url, 30, **HARD)
    time.sleep(1.0)
    running.process.send_signal(signal.SIGINT)
    eventually(lambda: httpx.get(f"{running.url}/healthz").status_code == 503)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(5) == 128 + signal.SIGTERM
    running.process.communicate()
    for connection in connections:
        connection.close()


@pytest.mark.slow
def test_the_end_comes_in_time(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--shutdown-timeout", 1)
    connections = send_requests(running.url, 30, **HARD)
    time.sleep(1.0)
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    statuses = {int(read_all(connection).split()[1]) for connection in connections}
    assert running.process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert 503 in statuses
    assert statuses <= {200, 503}
    running.process.communicate()


def test_a_full_queue_is_429(gated: GatedBot) -> None:
    with serving(gated, max_queue=2) as local, ThreadPoolExecutor(3) as pool:
        first = pool.submit(status_of, local.url)
        assert gated.begun.wait(SOON)
        others = [pool.submit(status_of, local.url) for _ in range(2)]
        eventually(lambda: local.batcher.queue_length == 2)
        assert metrics_of(local.url)["plato2_queue_length"] == 2
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        with pytest.raises(openai.RateLimitError):
            ask(client_of(local.url), stream=True)
        gated.gate.set()
        assert [job.result(SOON) for job in [first, *others]] == [200, 200, 200]
        patient = openai.OpenAI(base_url=f"{local.url}/v1", api_key="none", timeout=SOON)
        assert texts(ask(patient))


def test_time_is_up(gated: GatedBot) -> None:
    with serving(gated, timeout_s=0.2) as local:
        assert (status_of(local.url), status_of(local.url)) == (504, 504)
        error = httpx.post(f"{local.url}{CHAT}", json=ASK, timeout=SOON).json()["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert local.batcher.queue_length == 0
        with pytest.raises(openai.APIError, match=r"no reply within 0\.2 s"):
            list(ask(client_of(local.url), stream=True))
        assert len(gated.batches) == 1  # the others were never begun
        gated.gate.set()
        eventually(lambda: status_of(local.url) == 200)
        counted = metrics_of(local.url)[f"plato2_requests_total{{{CHAT}}}{{504}}"]
        assert counted >= 4  # the stream's, too


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_the_queue(gated: GatedBot, stream: bool) -> None:
    with serving(gated) as local:
        first = send_requests(local.url, 1)[0]
        assert gated.begun.wait(SOON)
        gone = send_requests(local.url, 3, messages=[{"role": "user", "content": "gone"}], stream=stream)
        stays = send_requests(local.url, 1, messages=[{"role": "user", "content": "stays"}])[0]
        eventually(lambda: local.batcher.queue_length == 4)
        if stream:
            assert gone[0].recv(4096).startswith(b"HTTP/1.1 200")
        for connection in gone:
            connection.close()
        eventually(lambda: local.batcher.queue_length == 1)
        gated.gate.set()
        assert b"HTTP/1.1 200" in read_all(first)
        assert b"HTTP/1.1 200" in read_all(stays)
        assert gated.batches == [[HI[0]["content"]], ["stays"]]
        name = f"plato2_requests_total{{{CHAT}}}{{499}}"
        eventually(lambda: metrics_of(local.url).get(name) == 3)


def test_hanging_up_in_the_middle_of_a_stream_harms_nobody(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated) as local:
        client = client_of(local.url)
        stream = ask(client, stream=True, n=5, extra_body={"plato2": {"min_tokens": MAX_TOKENS}})
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        assert texts(ask(client))
        connection = send_requests(local.url, 1, stream=True)[0]
        connection.recv(10)
        connection.close()
        assert status_of(local.url) == 200


def test_a_waiting_stream_is_kept_alive(gated: GatedBot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "KEEP_ALIVE_S", 0.05)
    with serving(gated) as local:
        connection = send_requests(local.url, 1, stream=True)[0]
        received = b""
        while received.count(b": waiting\n\n") < 3:
            received += connection.recv(4096)
        assert b'"role": "assistant"' in received
        assert b"content-type: text/event-stream" in received.lower()
        waiting = iter(ask(client_of(local.url), stream=True))
        assert next(waiting).choices[0].delta.role == "assistant"
        time.sleep(0.2)
        gated.gate.set()
        assert b"data: [DONE]" in read_all(connection)
        assert [chunk.choices[0].finish_reason for chunk in waiting][-1] in ("stop", "length")


def test_a_batch_that_fails_is_500_and_the_server_goes_on(
    gated: GatedBot, caplog: pytest.LogCaptureFixture
) -> None:
    gated.gate.set()
    with serving(gated) as local:
        gated.error = RuntimeError("the secret reason")
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "reply_failed"
        assert "secret" not in response.text
        assert "the secret reason" in caplog.text
        gated.error = RuntimeError("again")
        with pytest.raises(openai.APIError, match="the reply failed"):
            list(ask(client_of(local.url), stream=True))
        assert status_of(local.url) == 200
        counted = metrics_of(local.url)
        assert counted[f"plato2_requests_total{{{CHAT}}}{{500}}"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_cannot_answer_says_so(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated) as local:
        assert curl(f"{local.url}/healthz")[0] == 200
        gated.error = SystemExit(1)
        assert status_of(local.url) == 503
        eventually(lambda: not local.batcher.is_working)
        assert curl(f"{local.url}/healthz") == (503, '{"status":"stopping"}')
        assert status_of(local.url) == 503


def test_while_stopping_nothing_new_is_begun(gated: GatedBot) -> None:
    with serving(gated) as local, ThreadPoolExecutor(1) as pool:
        first = pool.submit(status_of, local.url)
        assert gated.begun.wait(SOON)
        local.server.should_exit = True  # what a signal does
        eventually(lambda: curl(f"{local.url}/healthz")[0] == 503)
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        assert response.headers["connection"] == "close"
        gated.gate.set()
        assert first.result(SOON) == 200
