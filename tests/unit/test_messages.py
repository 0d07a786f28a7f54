"""Messages name options as they were typed: on `plato2`'s command line, and in train.py's `data.prepare`."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from rich.text import Text
from small import ROOT
from typer.testing import CliRunner

import plato2
from plato2.commands import VERBS, app, every_command, joined_lines, module_of
from plato2.config import UserError, did_you_mean, in_typed_words
from plato2.runs.console import number, quiet_lightning
from plato2.runs.corpus import CorpusOfRun

NAMES = {"valid_dialogues": "--valid-dialogues", "force": "--force", "out": "--out", "reader.": "--reader "}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("valid_dialogues=1: too few", "--valid-dialogues 1: too few"),
        ("out=a/b is there; replace it with force=true", "--out a/b is there; replace it with --force"),
        ("change valid_dialogues, or force it out.", "change --valid-dialogues, or force it out."),
        ("name it in reader.split, or all", "name it in --reader split, or all"),
        ("reader.split='x': no", "--reader split='x': no"),
        ("/data/out=3/valid_dialogues.txt: out.txt", "/data/out=3/valid_dialogues.txt: out.txt"),
        ("min_tokens=3 --out=x", "min_tokens=3 --out=x"),
    ],
)
def test_typed_words(message: str, told: str) -> None:
    assert in_typed_words(message, NAMES, sign=" ") == told


def test_did_you_mean() -> None:
    assert did_you_mean("policcy", ["policy", "out"]) == "did you mean policy?"
    assert did_you_mean("zzz", ["policy", "out"]) == "there are policy, out"
    assert did_you_mean("zzz", []) == "there are none"


def test_a_warning_is_one_line_without_the_place_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # Lightning's, put back at the end
    quiet_lightning()
    told = warnings.formatwarning(UserWarning("z says\n  nothing"), UserWarning, "fine.py", 139, "warn(")  # type: ignore[call-arg]
    assert told == "warning: z says nothing\n"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the extra int8")
def test_torchao_says_nothing_below_a_verb() -> None:
    """By itself it complains that a CPU has no kernels for GPUs whenever transformers or peft import it."""
    verb = "import plato2.commands\ntry: plato2.commands.main()\nexcept SystemExit: pass\n"

    def told(code: str) -> str:
        command = [sys.executable, "-c", code, "runs", "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr

    assert "torchao" in told("import torchao")
    assert told(f"{verb}import torchao") == ""


def dialogues(folder: Path, n: int) -> Path:
    path = folder / "chats.jsonl"
    line = json.dumps({"turns": ["hello my good friend", "what a fine day it is today"]})
    path.write_text(f"{line}\n" * n, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["prepare", "jsonl", "CHATS", "--out", "OUT", "--valid-dialogues", "0"],
            "--valid-dialogues 0: must",
        ),
        (["prepare", "jsonl", "CHATS", "--out", "OUT"], "--valid-fraction 0.02: the corpus jsonl has 1"),
        (["prepare", "jsonl", "CHATS", "--out", "HERE"], "--out HERE exists and is not a prepared corpus"),
        (["prepare", "jsonl", "CHATS", "--out", "OUT", "--reader", "tims=1"], "--reader tims: jsonl has no"),
        (
            ["prepare", "jsonl", "CHATS", "--out", "OUT", "--rule", "max_repats=1"],
            "did you mean max_repeats?",
        ),
        (
            ["prepare", "jsonl", "CHATS", "--out", "OUT", "--rule", "max_repeats=0"],
            "--rule max_repeats=0: must",
        ),
        (["prepare", "jsnl", "CHATS", "--out", "OUT"], "CORPUS 'jsnl' is not known; did you mean jsonl?"),
        (
            ["prepare", "nosuch", "--out", "OUT"],
            "CORPUS 'nosuch' is not known; choose another one (there are ",
        ),
        (["prepare", "chitchat", "NONE", "--out", "OUT"], "FILES 'NONE': no such file"),
        (
            ["prepare", "reddit", "--comments", "RC", "--out", "OUT", "--max-context", "2"],
            "--max-context 2: ",
        ),
        (
            ["prepare", "reddit", "--comments", "RC", "--out", "OUT", "--valid-from", "x"],
            "--valid-from 'x': ",
        ),
        (["prepare", "jsonl", "CHATS", "--vocab-pices", "9"], "--vocab-pieces"),
        (["tokenizer", "train", "CHATS", "--out", "OUT", "--pieces", "2"], "--pieces 2: at least 4"),
        (["reply", "--generation", "NONE", "--top-k", "0", "hi"], "--top-k 0: must be at least 1"),
        (["chat", "--generation", "NONE", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["reply", "--generation", "NONE", "--safety-input", "x", "hi"], "--safety-input x: use off, warn"),
    ],
)
def test_verbs_name_options_as_they_were_typed(tmp_path: Path, arguments: list[str], told: str) -> None:
    places = {"CHATS": dialogues(tmp_path, 1), "OUT": tmp_path / "out", "HERE": tmp_path}
    places |= {"NONE": tmp_path / "none", "RC": tmp_path / "RC_2011-01"}
    done = CliRunner().invoke(app, [str(places.get(word, word)) for word in arguments])
    for name, place in places.items():
        told = told.replace(name, str(place))
    assert done.exit_code == 2
    assert told in done.stderr, done.stderr


def test_a_prepared_corpus_is_replaced_with_the_flag_that_the_verb_has(corpus: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", "jsonl", "x", "--out", str(corpus)])
    assert "use it, name another, or replace it with --force" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        ({"valid_dialogues": 0}, "data.prepare.valid_dialogues=0: must be at least 1"),
        ({"max_context": "long"}, "data.prepare.max_context='long': must be a number"),
        ({"polcy": "split"}, "data.prepare.polcy is not an option; did you mean policy?"),
        ({"clean": {"max_repeats": 0}}, "data.prepare.clean.max_repeats=0: must be"),
        ({"reader": {"tims": 1}}, "data.prepare.reader.tims: jsonl has no such option"),
        ({}, "data.prepare.valid_fraction=0.02: the corpus jsonl has 1 dialogue"),
    ],
)
def test_train_names_the_keys_of_its_configuration(
    tmp_path: Path, prepare: dict[str, object], told: str
) -> None:
    options = {"corpus": "jsonl", "files": [str(dialogues(tmp_path, 1))], **prepare}
    corpus = CorpusOfRun(str(tmp_path / "out"), options)
    with pytest.raises(UserError) as caught:
        corpus.make()
    assert told in str(caught.value)


def test_a_verb_that_there_is_not() -> None:
    done = CliRunner().invoke(app, ["prepar"])
    assert done.exit_code == 2
    assert "did you mean prepare?" in done.stderr
    assert "prepare" in VERBS


def test_numbers_have_no_exponent_where_none_is_needed() -> None:
    shown = [number(value) for value in (10482.0, 5751.0, 999.94, 0.12345, 7.04e-6, -2500.0)]
    assert shown == ["10,482", "5,751", "999.9", "0.1235", "7.04e-06", "-2,500"]


def test_joined_lines() -> None:
    assert joined_lines("One\nsentence.\n\nAnother\none.\n") == "One sentence.\n\nAnother one."


def test_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"plato2 {plato2.__version__}\n")


OWN_HELP = sorted({*every_command()} - {"train"})  # train's is Hydra's


@pytest.mark.parametrize("verb", OWN_HELP)
def test_paragraphs_of_help_are_broken_at_the_edge_only(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a paragraph is full: the next word would not have fitted."""
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*verb.split(), "--help"]).stdout
    text = shown.split("Usage:")[1].split("╭")[0].splitlines()
    lines = [line.strip() for line in text[1:]]
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 76, f"{line}\n{following}"


@pytest.mark.parametrize("verb", OWN_HELP)
def test_nothing_of_a_help_is_taken_for_markup(verb: str) -> None:
    """`[turns]` is a tag of rich's, and would not be shown."""
    command = typer.main.get_command(module_of(verb).app)
    for part in (command, *getattr(command, "commands", {}).values()):
        texts = [part.help, *(getattr(given, "help", None) for given in part.params)]
        spans = [span for text in texts if text for span in Text.from_markup(text).spans]
        assert {str(span.style) for span in spans} <= {"bold"}


def test_a_line_is_one_write_so_that_others_cannot_come_between() -> None:
    """Jobs side by side have one stderr; a seqpacket socket keeps each write apart."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = "from plato2.runs.console import fail, say\nsay('a line')\nfail('no')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=there)
    there.close()
    with here:
        writes = list(iter(lambda: here.recv(1000), b""))
    assert process.wait() == 2
    assert writes == [b"a line\n", b"error: no\n"]
