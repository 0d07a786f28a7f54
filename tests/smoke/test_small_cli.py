"""`small`, the model that comes with plato2: what is taken where no model is given."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path

import pytest
import torch
from small import ROOT
from typer.testing import CliRunner, Result

from plato2 import PlatoBot
from plato2.commands import app
from plato2.commands.talking import TOLD
from plato2.config import SMALL, UserError
from plato2.evaluate.results import read_result
from plato2.runs.start import named_start
from plato2.weights.folder import read_saved
from plato2.weights.model_folder import model_path

FOLDER = ROOT / "plato2" / "weights" / SMALL


def plato2(*arguments: object, stdin: str = "") -> Result:
    """The command in this process, with its worst failures raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def test_it_is_small_and_whole() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    for file in ("config.json", "model.safetensors"):
        said, name = (FOLDER / f"{file}.sha256").read_text().split()
        assert (hashlib.sha256((FOLDER / file).read_bytes()).hexdigest(), file) == (said, name)
    for role in ("generation", "evaluation"):
        weights = read_saved(SMALL, role=role).weights.values()  # type: ignore[arg-type]
        assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
        millions = sum(tensor.numel() for tensor in weights) / 1e6
        assert f"{millions:.0f} million parameters" in TOLD
        assert all(tensor.isfinite().all() for tensor in weights)


def test_it_answers_and_says_what_it_is() -> None:
    done = plato2("reply", "hi , how was your day ?", "--json")
    assert TOLD in done.stderr
    candidates = json.loads(done.stdout)["candidates"]
    assert sorted(candidate["latent"] for candidate in candidates) == list(range(20))
    assert all(0 < candidate["coherence"] < 1 for candidate in candidates)
    named = plato2("reply", "hi , how was your day ?", "--json", "--generation", SMALL)
    assert TOLD not in named.stderr
    assert json.loads(named.stdout)["candidates"] == candidates
    half = json.loads(plato2("reply", "hi , how was your day ?", "--json", "--precision", "bfloat16").stdout)
    assert all(0 < candidate["coherence"] < 1 for candidate in half["candidates"])


def test_it_talks_in_the_terminal_and_with_itself(tmp_path: Path) -> None:
    done = plato2("chat", stdin="hello !\n/candidates\n")
    assert "bot  " in done.stdout
    assert TOLD in done.stderr
    (tmp_path / "starts.txt").write_text("do you like music ?\n")
    out = tmp_path / "chats.jsonl"
    plato2("self-chat", "--starts", tmp_path / "starts.txt", "--utterances", 4, "--out", out)
    turns = json.loads(out.read_text().splitlines()[-1])["turns"]
    assert [turn.get("model") for turn in turns] == [None, SMALL, SMALL, SMALL]


def test_it_chooses_and_scores(tmp_path: Path) -> None:
    texts = ["i love it , i play the piano .", "no , the car is red ."]
    query = {"context": ["do you like music ?"], "candidates": texts, "labels": [1, 0]}
    (tmp_path / "set.jsonl").write_text(json.dumps(query) + "\n")
    plato2("evaluate", "selection", tmp_path / "set.jsonl", "--out", tmp_path / "found.json")
    assert {"coherence", "forward"} <= read_result(tmp_path / "found.json").systems.keys()
    (tmp_path / "pairs.tsv").write_text(f"do you like music ?\t{texts[0]}\n")
    score = json.loads(plato2("score", tmp_path / "pairs.tsv").stdout)
    assert score.keys() == {"n_tokens", "posterior", "nll_by_latent", "coherence"}
    assert sum(score["posterior"]) == pytest.approx(1, abs=1e-4)


def test_it_is_the_default_in_python_and_a_start_for_training() -> None:
    assert PlatoBot.load(device="cpu").reply(["hi"]).candidates[0].coherence is not None
    assert named_start(SMALL, "2_gen", ("1_coarse", "2_gen")) == FOLDER


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_path(SMALL) == FOLDER
    (tmp_path / SMALL).mkdir()
    assert model_path(SMALL) == Path(SMALL)
    with pytest.raises(UserError, match="there is no checkpoint in it"):
        read_saved(SMALL)


def test_its_card_has_the_figures_that_were_measured() -> None:
    experiment = ROOT / "experiments" / SMALL
    written = runpy.run_path(str(experiment / "small_model.py"))
    results = json.loads((experiment / "results.json").read_text())
    assert (FOLDER / "README.md").read_text() == written["card"](results)
