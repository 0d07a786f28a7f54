"""`plato2 self-chat` as a person starts it, stops it and starts it again."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import make_run
from test_reply_cli import Done, plato2

from plato2.weights.export import export_to_huggingface

ROOT = Path(__file__).parents[2]
QUESTIONS = ["what is love ?", "how old are you ?", "is the sky blue ?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: make_run(folder / name, name) for name in ("1_coarse", "2_gen", "2_eval")}
    export_to_huggingface(folder / "both", runs["2_gen"], runs["2_eval"])
    return runs | {"both": folder / "both"}


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    file = tmp_path / "starts.txt"
    file.write_text("\n".join(QUESTIONS), encoding="utf-8")
    return file


def self_chat(runs: dict[str, Path], starts: Path, out: Path, *options: object) -> Done:
    given = ["--generation", runs["2_gen"], "--evaluation", runs["2_eval"], "--max-tokens", 6]
    return plato2("self-chat", "--starts", starts, "--out", out, *given, *options)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_dialogue_of_ten_utterances_for_each_start(runs: dict[str, Path], starts: Path) -> None:
    out = starts.with_name("chats.jsonl")
    done = self_chat(runs, starts, out, "--json", "--format", "parlai")
    assert done.returncode == 0
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") > 0
    assert summary == {
        "out": str(out),
        "parlai": str(starts.with_name("chats.parlai.jsonl")),
        "dialogues": 3,
        "played": 3,
        "utterances": 27,
    }
    dialogues = read(out)
    assert [dialogue["id"] for dialogue in dialogues] == [0, 1, 2]
    for dialogue, question in zip(dialogues, QUESTIONS, strict=True):
        assert dialogue.keys() == {"id", "start", "speakers", "turns", "seed", "settings"}
        assert dialogue["start"] == [question]
        assert [turn["speaker"] for turn in dialogue["turns"]] == ["A", "B"] * 5
        assert dialogue["seed"] == 11
        assert dialogue["settings"]["max_tokens"] == 6
        model = str(runs["2_gen"])
        assert [turn["model"] for turn in dialogue["turns"]] == [None, *[model] * 9]
        assert all(turn.keys() == set(dialogue["turns"][0]) for turn in dialogue["turns"])
    assert len(read(starts.with_name("chats.parlai.jsonl"))) == 3


def test_a_finished_file_is_only_converted(runs: dict[str, Path], starts: Path) -> None:
    out = starts.with_name("chats.jsonl")
    assert self_chat(runs, starts, out).stdout == f"3 dialogues in {out}\n"
    before = out.read_bytes()
    done = self_chat(runs, starts, out, "--format", "parlai", "--batch", 7)
    converted = starts.with_name("chats.parlai.jsonl")
    assert done.stdout == f"3 dialogues in {out}, 3 of them from before\nin ParlAI's format in {converted}\n"
    assert out.read_bytes() == before


def test_two_models_play_each_other(runs: dict[str, Path], starts: Path) -> None:
    out = starts.with_name("chats.jsonl")
    options = ["--generation2", runs["1_coarse"], "--swap", "--utterances", 4, "--candidates"]
    done = self_chat(runs, starts, out, *options)
    assert done.returncode == 0
    assert "no --evaluation: candidates are ranked by log-probability" in done.stderr
    one, two = str(runs["2_gen"]), str(runs["1_coarse"])
    dialogues = read(out)
    assert [dialogue["speakers"] for dialogue in dialogues] == [{"A": one, "B": two}] * 3 + [
        {"A": two, "B": one}
    ] * 3
    assert [turn["model"] for turn in dialogues[3]["turns"]] == [None, one, two, one]
    assert [len(turn.get("candidates", [])) for turn in dialogues[0]["turns"]] == [0, 20, 5, 20]


@pytest.mark.slow
def test_killed_and_interrupted_it_becomes_the_same_file(runs: dict[str, Path], tmp_path: Path) -> None:
    starts, out, whole = tmp_path / "starts.txt", tmp_path / "chats.jsonl", tmp_path / "whole.jsonl"
    starts.write_text("".join(f"question {n} ?\n" for n in range(12)), encoding="utf-8")
    options = ["--generation", runs["both"], "--max-tokens", 30, "--batch", 2]
    options += ["--min-tokens", 30, "--utterances", 4]  # slow enough to be stopped on its way
    given = [str(option) for option in ["--starts", starts, *options]]
    command = [sys.executable, "-m", "plato2", "self-chat", *given, "--out", str(out)]
    assert plato2("self-chat", *given, "--out", whole).returncode == 0

    def begin(stderr: int) -> subprocess.Popen[bytes]:
        """Starts it and waits until it has written dialogues."""
        size = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
        end = time.monotonic() + 120
        while not out.exists() or out.stat().st_size <= size:
            assert process.poll() is None
            assert time.monotonic() < end
            if select.select([master], [], [], 0.005)[0]:
                shown.append(os.read(master, 4096))
        return process

    master, terminal = pty.openpty()
    shown: list[bytes] = []
    killed = begin(terminal)
    killed.kill()
    killed.communicate()
    assert b"utterances" in b"".join(shown)  # the progress bar
    first = out.read_bytes()
    assert 0 < first.count(b"\n") < 12
    with out.open("ab") as file:
        file.write(b'{"id": 2, "start": ["half a li')

    interrupted = begin(subprocess.PIPE)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate()
    assert interrupted.returncode == 130
    assert stderr == b"stopped; the same command continues from here\n"  # and no progress bar
    assert first.count(b"\n") < out.read_bytes().count(b"\n") < 12

    os.close(terminal)
    os.close(master)
    summary = json.loads(plato2(*command[3:], "--json").stdout)
    assert 0 < summary["played"] < 12
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_the_paper_s_200_questions_are_starts_as_they_are(tmp_path: Path) -> None:
    questions = ROOT.parent / "shared" / "data" / "ncm200" / "ncm.txt"
    if not questions.exists():
        pytest.skip(f"no {questions.name} here")
    run = make_run(tmp_path / "run", "2_gen", n_latent=1, max_position=32)
    out = tmp_path / "chats.jsonl"
    options = ["--generation", run, "--max-tokens", 3, "--batch", 200, "--json"]
    summary = json.loads(plato2("self-chat", "--starts", questions, "--out", out, *options).stdout)
    assert (summary["dialogues"], summary["utterances"]) == (200, 1800)
    lines = questions.read_text(encoding="utf-8").splitlines()
    assert [dialogue["start"] for dialogue in read(out)] == [[line] for line in lines]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0.7"], "was begun with settings.temperature=1.0, not 0.7; give the same"),
        (["--seed", "4"], "was begun with settings.seed=11, not 4"),
        (["--utterances", "6"], "was begun with --utterances 4, not 6"),
        (["--rank", "forward"], "was begun with --rank None, not forward"),
        (["--precision", "bfloat16"], "was begun with --precision float32, not bfloat16"),
        (["--generation2", "{2_gen}"], "was begun with model2.name=None, not "),
        (["--generation", "{both}"], "was begun with model1.name="),
        (["--starts", "{starts}x"], "was begun with --starts "),
    ],
)
def test_a_file_goes_on_with_its_own_settings_only(
    runs: dict[str, Path], starts: Path, options: list[str], message: str
) -> None:
    out = starts.with_name("chats.jsonl")
    starts.with_name("starts.txtx").write_text("hi\nyou\nthere\n", encoding="utf-8")
    assert self_chat(runs, starts, out, "--utterances", 4).returncode == 0
    before = out.read_bytes()
    filled = [option.format(**runs, starts=starts) for option in options]
    done = self_chat(runs, starts, out, *["--utterances", 4, *filled])
    assert done.returncode == 2
    assert f"error: --out {out}: " in done.stderr
    assert message in done.stderr
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "xml"], "--format xml: use jsonl or parlai"),
        (["--utterances", "1"], "--utterances 1: must be at least 2"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--swap"], "--swap: there is only one model; give --generation2 too"),
        (["--evaluation2", "{2_eval}"], "--evaluation2: there is only one model"),
        (["--temperature", "3"], "--temperature 3.0: must be between 0 (greedy) and 2"),
        (["--rank", "coherense"], "--rank coherense: no such score; did you mean coherence?"),
        (["--rank", "backward"], "--rank backward: needs a model of stage=backward; give --backward"),
        (["--starts", "{starts}x"], "--starts {starts}x: No such file or directory"),
        (["--out", "{starts}"], "--out {starts}: the same file as --starts; give a new one"),
        (["--out", "{starts}/x"], "--out {starts}/x: {starts} is not a folder; name another file"),
        (["--out", "/dev/full"], "--out /dev/full: not a file; give a new one"),
        (["--generation", "{2_eval}"], "this is a 2_eval run; give a run of 2_gen or 1_coarse"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    runs: dict[str, Path], starts: Path, options: list[str], message: str
) -> None:
    filled = [option.format(**runs, starts=starts) for option in options]
    done = self_chat(runs, starts, starts.with_name("chats.jsonl"), *filled)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message.format(starts=starts) in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(starts.parent.iterdir()) == [starts]
