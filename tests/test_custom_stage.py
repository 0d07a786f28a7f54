"""A stage that plato2 knows nothing of trains, resumes, is exported, is loaded and talks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT, Train, assert_one_line, environment

import plato2
from examples.custom_stage import SmoothedGeneration
from plato2.runs.saved import read_metrics
from plato2.weights.folder import load_stage, read_saved

GIVEN = [f"--config-dir={ROOT}/examples/conf", "stage=smoothed", "trainer.val_check_interval=4"]


def verb(*arguments: str | Path, expect: int = 0) -> str:
    """`plato2 ...` in a process of its own, which has not imported the example."""
    command = [sys.executable, "-m", "plato2", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == expect, done.stderr
    return done.stdout if not expect else done.stderr


@pytest.fixture
def run(train_here: Train, tmp_path: Path) -> Path:
    train_here("run_id=parent", "trainer.max_steps=4", "trainer.val_check_interval=4")
    start = tmp_path / "outputs" / "tiny-1_coarse" / "parent"
    train_here(*GIVEN, "trainer.max_steps=4", f"init_from={start}", "run_id=a")
    done = train_here(*GIVEN, "trainer.max_steps=8", "run_id=a")
    assert "from step 4" in done.stderr
    return tmp_path / "outputs" / "tiny-smoothed" / "a"


def test_a_stage_of_ones_own(run: Path, train_here: Train, tmp_path: Path) -> None:
    steps = [step for step, name, _ in read_metrics(run / "metrics.csv") if name == "train/smoothed"]
    assert steps == list(range(1, 9))
    assert read_saved(run, role="generation").stage == "smoothed"
    stage = load_stage(run)
    assert isinstance(stage, SmoothedGeneration)
    assert stage.smoothing == 0.1

    told = verb("reply", "--generation", run, "ba de gi", "--json", "--max-tokens", "8")
    assert len(json.loads(told)["candidates"]) == 20
    verb("export", "hf", "--generation", run, "--out", tmp_path / "exported")
    again = plato2.load(tmp_path / "exported", device="cpu")
    weights = dict(again.generation.named_parameters())
    for name, tensor in stage.named_parameters():
        assert torch.equal(tensor, weights[name]), name
    assert json.loads(verb("runs", run, "--json"))[0]["monitor"] == "val/nll"
    error = verb("score", "README.md", "--generation", run, expect=2)
    assert_one_line(error, "stage 'smoothed' is unknown here", "import the module that defines it")


def test_its_loss_is_the_cross_entropy_with_smoothed_targets() -> None:
    from units import make_stage_of, pack_for

    unit = pack_for("1_coarse").unit
    stage = make_stage_of(SmoothedGeneration, smoothing=0.3)
    h = stage.backbone.encode(
        stage.backbone.embed_unit(unit),
        stage.backbone.mask(unit["segment_ids"], unit["type_ids"]),
        read=unit["target_index"],
    )
    expected = torch.nn.functional.cross_entropy(
        stage.backbone.lm_logits(h), unit["target_ids"], reduction="none", label_smoothing=0.3
    )
    torch.testing.assert_close(stage.losses(unit)["smoothed"], expected, rtol=1e-5, atol=1e-5)
