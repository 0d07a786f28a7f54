"""Studies for the tests of human evaluation: dialogues of made-up systems, and their page in a process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from small import ROOT, environment

from plato2.evaluate.dialogues import Dialogue, Turn
from plato2.evaluate.human.formats import Tasks
from plato2.evaluate.human.tasks import Selection, make_tasks

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
