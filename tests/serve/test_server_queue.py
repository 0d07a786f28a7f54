"""`plato2 serve` with more requests than it can answer: those who watch it are answered all the same."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from pathlib import Path

import httpx
import pytest
from runs import make_run
from serving import start

SOON = 60
ASK = json.dumps({"model": "2_gen", "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.mark.slow
@pytest.mark.parametrize("queue", [(), ("--max-queue", 1000)], ids=["default", "1000"])
def test_waiting_requests_leave_room_for_those_who_watch(tmp_path: Path, queue: tuple[object, ...]) -> None:
    """Where the system allows a process 512 files, there is room for 256 connections."""
    limit = ["prlimit", "--nofile=512:512"] if shutil.which("prlimit") else pytest.skip("needs prlimit")
    slow = ("--max-batch", 1, "--n-samples", 500, *queue)  # none is answered meanwhile
    running = start(make_run(tmp_path / "2_gen", "2_gen"), *slow, before=limit)
    try:
        host, port = running.url.removeprefix("http://").split(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(ASK)}\r\n\r\n".encode() + ASK
        asking = []
        for number in range(300):
            asking.append(socket.create_connection((host, int(port)), timeout=SOON))
            with contextlib.suppress(ConnectionError):  # refused already, where there is no room
                asking[-1].sendall(request)
            time.sleep(0.1 if number >= 290 else 0)  # the last ones take what room the crowd has left
        until, refused = time.monotonic() + SOON, "no 429 yet"
        while 'status="429"' not in refused:  # 129 wait or are answered, the others know that they cannot
            assert time.monotonic() < until
            time.sleep(1)
            answers = [httpx.get(f"{running.url}/{path}", timeout=SOON) for path in ("healthz", "metrics")]
            assert [answer.status_code for answer in answers] == [200, 200]
            refused = answers[1].text
    finally:
        running.process.kill()
        _, stderr = running.process.communicate()
    assert f"--max-queue {queue[1] if queue else 256}: 128, which leaves half" in stderr
