"""A stage that plato2 knows nothing of trains, resumes, is exported, is loaded and talks.

All in processes of their own: what a process has imported is known to it from then on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import ROOT, environment

from plato2.runs.saved import read_metrics
from plato2.weights.folder import load_generation, read_saved

pytestmark = pytest.mark.slow
GIVEN = [f"--config-dir={ROOT}/examples/conf", "stage=smoothed", "trainer.val_check_interval=4"]
LOADED = """
import sys, torch
from examples.custom_stage import SmoothedGeneration
from plato2.weights.folder import load_stage
stage = load_stage(sys.argv[1])
assert type(stage) is SmoothedGeneration and stage.smoothing == 0.1
"""
LOSS = """
import torch
from examples.custom_stage import SmoothedGeneration
from units import make_stage_of, pack_for
unit, stage = pack_for("1_coarse").unit, make_stage_of(SmoothedGeneration, smoothing=0.3)
x, mask = stage.backbone.embed_unit(unit), stage.backbone.mask(unit["segment_ids"], unit["type_ids"])
logits = stage.backbone.lm_logits(stage.backbone.encode(x, mask, read=unit["target_index"]))
options = {"reduction": "none", "label_smoothing": 0.3}
expected = torch.nn.functional.cross_entropy(logits, unit["target_ids"], **options)
torch.testing.assert_close(stage.losses(unit)["smoothed"], expected, rtol=1e-5, atol=1e-5)
"""


def python(*arguments: str | Path, expect: int = 0) -> str:
    """What a Python process prints, or where it should fail its errors."""
    search = ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "unit")))
    command = [sys.executable, *map(str, arguments)]
    given = environment(PYTHONPATH=search)
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == expect, done.stderr
    return done.stderr if expect else done.stdout


def test_a_stage_of_ones_own(
    run_train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    run_train("run_id=parent", "trainer.max_steps=4", "trainer.val_check_interval=4")
    parent, run = outputs / "tiny-1_coarse" / "parent", outputs / "tiny-smoothed" / "a"
    run_train(*GIVEN, "trainer.max_steps=4", f"init_from={parent}", "run_id=a")
    assert "from step 4" in run_train(*GIVEN, "trainer.max_steps=8", "run_id=a").stderr
    steps = [step for step, name, _ in read_metrics(run / "metrics.csv") if name == "train/smoothed"]
    assert steps == list(range(1, 9))

    assert read_saved(run, role="generation").stage == "smoothed"
    python("-c", LOADED, run)
    told = python("-m", "plato2", "reply", "--generation", run, "ba de gi", "--json", "--max-tokens", "8")
    assert len(json.loads(told)["candidates"]) == 20
    python("-m", "plato2", "export", "hf", "--generation", run, "--out", tmp_path / "exported")
    exported = load_generation(tmp_path / "exported").state_dict()
    weights = load_generation(run).state_dict()
    assert all(tensor.equal(exported[name]) for name, tensor in weights.items())
    assert json.loads(python("-m", "plato2", "runs", run, "--json"))[0]["monitor"] == "val/nll"
    (tmp_path / "pairs.tsv").write_text("ba de gi\tba\n")
    scores = json.loads(python("-m", "plato2", "score", tmp_path / "pairs.tsv", "--generation", run))
    assert scores.keys() == {"n_tokens", "nll"}
    error = python("-c", LOADED.replace("from examples", "# from examples"), run, expect=1)
    assert "stage 'smoothed' is not known" in error
    assert "import the module that defines it" in error


def test_its_loss_is_the_cross_entropy_with_smoothed_targets() -> None:
    python("-c", LOSS)
