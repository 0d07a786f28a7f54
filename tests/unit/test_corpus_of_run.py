"""The corpus of a run: prepared where there is none, waited for, reused, and never mixed with another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_corpus

from plato2.config import UserError
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.shards import read_index
from plato2.runs.corpus import CorpusOfRun

ROOT = Path(__file__).parents[2]


WAITS = """
import sys
from plato2.config import UserError
from plato2.data.shards import read_index
from plato2.runs import corpus
corpus.PATIENCE_S = 0.5
prepare = {"corpus": "chitchat", "tokenizer": sys.argv[2], "max_dialogues": 2000}
try:
    corpus.CorpusOfRun(sys.argv[1], prepare).make_or_wait()
except UserError as error:
    sys.exit(str(error))
print(read_index(sys.argv[1]).splits["train"].samples)
"""


def waiting(rank: int, path: Path, tokenizer: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITS, str(path), str(tokenizer)]
    variables = os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=variables, text=True, **pipes)


def preparing(path: Path) -> subprocess.Popen[str]:
    """The first process, which has begun to prepare."""
    first = waiting(0, path, ROOT / "tests/fixtures/knover")
    while not path.with_name(f".{path.name}.preparing").exists():
        assert first.poll() is None
        time.sleep(0.02)
    return first


@pytest.mark.slow
def test_a_process_waits_as_long_as_the_first_one_prepares(tmp_path: Path) -> None:
    first = preparing(tmp_path / "out")
    second = waiting(1, tmp_path / "out", ROOT / "tests/fixtures/knover")
    told = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert told[0].splitlines()[-1] == told[1].strip() != ""  # the first one also says what it left out


def test_a_process_does_not_wait_for_one_that_failed(tmp_path: Path) -> None:
    first, second = (waiting(rank, tmp_path / "out", tmp_path / "nowhere") for rank in (0, 1))
    assert "no tokenizer at" in first.communicate(timeout=600)[1]
    assert "no process has been preparing one; the first process" in second.communicate(timeout=600)[1]
    assert (first.returncode, second.returncode) == (1, 1)


@pytest.mark.slow
def test_a_process_does_not_wait_for_one_that_was_killed(tmp_path: Path) -> None:
    first = preparing(tmp_path / "out")
    second = waiting(1, tmp_path / "out", ROOT / "tests/fixtures/knover")
    first.kill()
    assert "no process has been preparing one; the first process" in second.communicate(timeout=600)[1]


def test_a_missing_corpus_is_prepared_and_then_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = ["the weather is nice today", "yes it is sunny in town number {}", "shall we go out"]
    lines = [json.dumps({"turns": [turn.format(i) for turn in turns]}) for i in range(60)]
    file = tmp_path / "dialogues.jsonl"
    file.write_text("\n".join(lines) + "\n")
    prepare = {"corpus": "jsonl", "files": [str(file)], "vocab_pieces": 80, "valid_fraction": 0.1}
    out = tmp_path / "prepared"
    corpus = CorpusOfRun(str(out), prepare)
    assert corpus.will_be_made
    corpus.make()
    assert not corpus.will_be_made
    index = read_index(out)
    assert index.vocab_size == 81
    data = DialogueDataModule(str(out), GenerationBatch(), 512, unit_tokens=256, row_length=256)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["units"]
    data.save_tokenizer(tmp_path / "run" / "tokenizer")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run" / "tokenizer").iterdir()}
    assert saved == {path.name: path.read_bytes() for path in (out / "tokenizer").iterdir()}
    capsys.readouterr()

    CorpusOfRun(str(out), prepare).make_or_wait()
    assert capsys.readouterr().out.startswith(f"data: reusing {out} (")
    assert read_index(out) == index

    other = CorpusOfRun(str(out), {**prepare, "vocab_pieces": 90, "policy": "response"})
    message = (
        r"data.prepare.policy is 'split', asked for 'response'; "
        r"data.prepare.vocab_pieces is 80, asked for 90; use another"
    )
    with pytest.raises(UserError, match=message):
        other.make()
    assert read_index(out) == index

    CorpusOfRun(str(out), {**prepare, "vocab_pieces": 70, "force": True}).make_or_wait()
    assert read_index(out).vocab_size == 71


def test_without_prepare_nothing_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, 150, 40)
    corpus = CorpusOfRun(str(tmp_path), None)
    corpus.make_or_wait()
    CorpusOfRun(str(tmp_path / "none"), None).make_or_wait()
    assert (corpus.exists, corpus.will_be_made) == (True, False)
    assert capsys.readouterr().out == ""
