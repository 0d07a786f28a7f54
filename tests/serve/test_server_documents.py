"""docs/serve.md and the Dockerfile say what the server does."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from clients import metrics_of
from small import ROOT

from plato2.commands import VERBS
from plato2.serve.chat_api import ChatRequest


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_copies_what_exists_and_starts_what_parses() -> None:
    found = instructions()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sources = [source for word, rest in found if word == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", "plato2", "conf"} <= {*sources}  # without them no wheel can be built
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert dict(found)["FROM"] == "python:3.11-slim"
    assert dict(found)["USER"] == "plato2"
    assert dict(found)["EXPOSE"] == "8000"
    assert "/healthz" in dict(found)["HEALTHCHECK"]
    program, verb, *arguments = json.loads(dict(found)["ENTRYPOINT"]) + json.loads(dict(found)["CMD"])
    assert (program, verb) == ("plato2", "serve")
    assert verb in VERBS
    from plato2.commands import serve

    context = typer.main.get_command(serve.app).make_context(verb, arguments)
    assert context.params["host"] == "0.0.0.0"
    assert context.params["port"] == 8000
    assert context.params["model"] == Path("/model")
    assert re.search(r"^torch==", (ROOT / "requirements.txt").read_text(), re.M)  # what the grep finds


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_examples_of_the_document_work(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = next(block for block in blocks("sh") if block.startswith("curl "))
    command = command.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    (program,) = blocks("python")
    exec(compile(program.replace("http://127.0.0.1:8000", url), "docs/serve.md", "exec"), {})
    first, *lines = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(first)) == 2
    assert len(lines) == 5 + 1
    assert lines[-1] == ast.literal_eval(first)[0]


def test_the_document_shows_what_the_server_prints(url: str) -> None:
    line, error = blocks("text")
    assert re.fullmatch(r"http://\S+/v1 serves \S+ on cpu; fields: docs/serve\.md and \S+\n", line)
    assert json.loads(error)["error"]["code"] == "invalid_value"
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    names = {re.sub(r"(_bucket|_sum|_count|_created).*", "", name.split("{")[0]) for name in metrics_of(url)}
    for name in re.findall(r"`(plato2_\w+)", text):
        assert name in names
    for field in re.findall(r"^\| `(\w+)`", text.split("## Fields")[1].split("\nIn `plato2`")[0], re.M):
        assert field in ChatRequest.model_fields
