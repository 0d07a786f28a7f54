"""docs/pretrained.md, The whole way: every command, from a folder and conversations to an adapted bot."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from decoders import write_decoder
from serving import end, start
from small import ROOT, train_in_process, write_dialogues
from test_docs import Block, commands_of
from typer.testing import CliRunner

from plato2.commands import app
from plato2.runs.saved import read_metrics

SECTION = re.compile(r"^## The whole way\n(.*?)^## ", re.S | re.M)
TINY = ["trainer.max_steps=4", "trainer.val_check_interval=2", "optim.batch_tokens=1024"]
"""Beside what a line says: so much fits into a test."""


def lines() -> list[str]:
    """The commands of the section, each once, in their order."""
    section = SECTION.search((ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8"))
    assert section
    found = re.findall(r"^```(\w*)\n(.*?)^```", section[1], re.S | re.M)
    blocks = [Block("docs/pretrained.md", language, text) for language, text in found]
    return list(dict.fromkeys(line for block in blocks for line in commands_of(block)))


def write_kept(path: Path) -> None:
    """Contexts with their own reply and another's."""
    turns = [json.loads(line)["turns"] for line in write_dialogues(path, 8, seed=5).read_text().splitlines()]
    queries = [
        {"context": [mine[0]], "candidates": [mine[1], other[1]], "labels": [1, 0]}
        for mine, other in pairwise(turns)
    ]
    path.write_text("".join(f"{json.dumps(query)}\n" for query in queries))


def answer(url: str) -> str:
    """Of a server, to `hi`."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        (model,) = json.load(response)["data"]
    asked = {"model": model["id"], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    data, header = json.dumps(asked).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", data, header)
    ) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_from_a_folder_and_a_handful_of_conversations_to_a_bot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for a GPU are planned; that they compose and build is held by tests/test_docs.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLATO2_CACHE", str(tmp_path / "cache"))
    write_decoder(tmp_path / "FOLDER", max_position_embeddings=256)
    write_dialogues(tmp_path / "chats.jsonl", 80)
    write_kept(tmp_path / "kept.jsonl")
    said: dict[str, str] = {}
    for line in lines():
        words = shlex.split(line)
        if words[0] == "pip" or ("strategy=gpu" in words and "plan=true" not in words):
            continue
        if words[:2] == ["plato2", "serve"]:
            server = start(
                *(str(tmp_path / word) if word.startswith("outputs") else word for word in words[2:])
            )
            said[line] = answer(server.url)
            assert end(server)[0] == 0
        elif words[0] == "plato2":
            done = CliRunner().invoke(app, words[1:], input="hi\nand you ?\n")
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"
            said[line] = done.stdout
        else:
            assert words[:2] == ["python", "train.py"]
            tiny = [] if "plan=true" in words else TINY
            trained = train_in_process([*words[2:], *tiny], tmp_path, ROOT / "train.py")
            assert trained.returncode == 0, f"{line}\n{trained.stderr}"
            said[line] = trained.stdout
    of = {
        name: next(text for line, text in said.items() if name in line) for name in ("plan=true", "selection")
    }
    assert "of them trained" in of["plan=true"]
    assert "shared words" in of["selection"]
    run = tmp_path / "outputs" / "pretrained_lora-2_eval" / "own"
    assert {"val/p1", "val/overlap_p1"} <= {name for _, name, _ in read_metrics(run / "metrics.csv")}
    replies = [text.strip() for line, text in said.items() if line.startswith("plato2 reply")]
    assert len(replies) == 2
    assert len(set(replies)) == 1  # what was exported says the same
