"""`plato2 serve` in a process of its own, for the tests of the server and of its page."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from small import ROOT, environment

from plato2.data.tokenizer import Tokenizer

MAX_TOKENS = 12
"""Of the replies of the servers that the tests start."""


@dataclass
class Running:
    """`plato2 serve` in a process."""

    process: subprocess.Popen[str]
    url: str
    line: str
    """What it printed."""


def start(*arguments: object, before: Sequence[str] = (), **variables: str) -> Running:
    """`plato2 serve ARGUMENTS` on a free port, ready; `before` is a command that runs commands."""
    command = [*before, sys.executable, "-m", "plato2", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    found = re.match(r"(http://(?:127\.0\.0\.1|0\.0\.0\.0):\d+)/v1 serves ", line)
    if found is None:
        process.kill()
        pytest.fail(f"the server did not start: {line}{process.stderr.read()}")
    return Running(process, found[1].replace("0.0.0.0", "127.0.0.1"), line)


def end(running: Running, sig: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Exit code, and what else it printed."""
    running.process.send_signal(sig)
    stdout, stderr = running.process.communicate(timeout=60)
    return running.process.returncode, stdout, stderr


class Counted:
    """A tokenizer's SentencePiece, which notes each text that it cuts into pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_batch(["hi"])  # what it finds out once, at its first text
        self.processor: Any = tokenizer._processor
        self.cut: list[str] = []
        tokenizer._processor = self

    def encode(self, text: str | list[str], **options: Any) -> Any:
        self.cut += [text] if isinstance(text, str) else text
        return self.processor.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)
