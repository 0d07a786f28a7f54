"""Studies for the tests of human evaluation: dialogues of made-up systems, an API that raters talk with, and
their page in a process.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from small import ROOT, environment

from plato2.evaluate.dialogues import Dialogue, Turn
from plato2.evaluate.human.formats import Chat, Tasks
from plato2.evaluate.human.tasks import Selection, chat_tasks, make_tasks

EVIL = '<script>document.title = "owned"</script><img src=x onerror="alert(1)"> & "quoted" <b>fat</b>'


def self_chats(n: int = 4, utterances: int = 6, system: str = "secret-system") -> list[Dialogue]:
    """Self-chats in which every utterance says of which dialogue and which turn it is."""
    return [
        Dialogue(
            f"{system}-{chat}",
            tuple(
                Turn(
                    f"utterance {turn} of the dialogue number {chat}",
                    "AB"[turn % 2],
                    system if turn else None,
                )
                for turn in range(utterances)
            ),
            1,
        )
        for chat in range(n)
    ]


def static_replies(n: int = 4) -> list[Dialogue]:
    """Contexts with twelve candidates each."""
    return [
        Dialogue(
            str(number),
            (
                Turn(f"what do you think of number {number} ?", "A"),
                Turn(
                    f"candidate 0 for the number {number}",
                    "B",
                    "secret-system",
                    tuple(f"candidate {rank} for the number {number}" for rank in range(12)),
                ),
            ),
            1,
        )
        for number in range(n)
    ]


def small_tasks(preset: str = "plato", n: int = 4, checks: float = 0.0, raters: int = 3) -> Tasks:
    """Tasks of two systems."""
    dialogues = [*self_chats(n), *self_chats(n, system="other-secret")]
    if preset == "candidates":
        dialogues = static_replies(n)
    return make_tasks(dialogues, Selection(preset, checks=checks, raters=raters))


class Api:
    """A chat API whose reply says to what it replies, and that can be slow, refuse, or say nothing."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        """The turns of each request."""
        self.go = threading.Event()
        """Replies wait for it."""
        self.go.set()
        self.wrong: list[str] = []
        """What the next replies are instead: `refused` or a text."""
        self.seconds = 0.0
        """How long each reply takes."""
        self.at_once = self.most_at_once = 0
        api, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if not data:  # whoever asked was killed
                    return
                body = json.loads(data)
                turns = [message["content"] for message in body["messages"]]
                with lock:
                    api.asked.append(turns)
                    api.at_once += 1
                    api.most_at_once = max(api.most_at_once, api.at_once)
                    wrong = api.wrong.pop(0) if api.wrong else None
                api.go.wait(60)
                time.sleep(api.seconds)
                with lock:
                    api.at_once -= 1
                text = f"reply {len(turns) // 2 + 1} to: {turns[-1]}" if wrong is None else wrong
                said = {"role": "assistant", "content": text}
                data = json.dumps({"choices": [{"finish_reason": "stop", "message": said}]}).encode()
                try:
                    self.send_response(400 if wrong == "refused" else 200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # whoever asked was killed
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.spec = f"openai:http://127.0.0.1:{self.server.server_port}/v1#m"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@contextmanager
def api() -> Iterator[Api]:
    """One that ends afterwards."""
    running = Api()
    try:
        yield running
    finally:
        running.go.set()
        running.server.shutdown()
        running.server.server_close()


def small_chats(speakers: dict[str, str], topics: int = 2, least: int = 2, most: int = 3) -> Tasks:
    """Chats with systems, two for each topic."""
    chat = Chat(speakers=speakers, least=least, most=most)
    return chat_tasks([f"topic {n}" for n in range(topics)], chat, Selection("chat", raters=2))


def write_tasks(path: Path, tasks: Tasks) -> Path:
    """A file of tasks."""
    path.write_text(tasks.model_dump_json(), encoding="utf-8")
    return path


def write_chats(path: Path, dialogues: list[Dialogue]) -> Path:
    """Dialogues as `plato2 self-chat` writes them."""
    lines = []
    for dialogue in dialogues:
        turns = []
        for turn in dialogue.turns:
            kept = {"candidates": [{"text": text} for text in turn.candidates]} if turn.candidates else {}
            turns.append({"speaker": turn.speaker, "model": turn.model, "text": turn.text, **kept})
        lines.append(json.dumps({"id": dialogue.id, "turns": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass
class Page:
    """`plato2 evaluate human serve` in a process."""

    process: subprocess.Popen[str]
    url: str
    links: list[str]
    """Of the raters."""
    admin: str

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def start_page(tasks: Path, raters: int, *more: object, port: int = 0) -> Page:
    """Starts the page and waits until it takes connections."""
    command = [
        sys.executable,
        "-m",
        "plato2",
        "evaluate",
        "human",
        "serve",
        str(tasks),
        "--raters",
        str(raters),
    ]
    process = subprocess.Popen(
        [*command, "--port", str(port), *map(str, more)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    while not re.match(r"http://\S+ serves ", line := process.stdout.readline()):
        assert line, f"the page did not start: {lines}"
        lines.append(line.split()[1])
    return Page(process, line.split()[0], lines[:-1], lines[-1])


@contextmanager
def page(tasks: Path, raters: int, *more: object) -> Iterator[Page]:
    """The page, which ends afterwards as by Ctrl-C."""
    running = start_page(tasks, raters, *more)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=30)
