"""A stage that plato2 knows nothing of trains, resumes, is exported, is loaded and talks.

All in processes of their own: what a process has imported is known to it from then on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from small import ROOT, command

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
LOSS = f"""
import sys, torch
sys.path.insert(0, "{ROOT}/tests/unit")
from examples.custom_stage import SmoothedGeneration
from units import make_stage_of, pack_for
unit, stage = pack_for("1_coarse").unit, make_stage_of(SmoothedGeneration, smoothing=0.3)
x, mask = stage.backbone.embed_unit(unit), stage.backbone.mask(unit["segment_ids"], unit["type_ids"])
logits = stage.backbone.lm_logits(stage.backbone.encode(x, mask, read=unit["target_index"]))
options = dict(reduction="none", label_smoothing=0.3)
expected = torch.nn.functional.cross_entropy(logits, unit["target_ids"], **options)
torch.testing.assert_close(stage.losses(unit)["smoothed"], expected, rtol=1e-5, atol=1e-5)
"""


class Python:
    """Processes that know of no stage but plato2's own."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self.forks, self.folder = forks, folder

    def run(self, script: Path, *arguments: str | Path, expect: int = 0) -> str:
        """What a file prints as `__main__`."""
        code, _, output = self.forks.run(script, *map(str, arguments), folder=self.folder)
        assert code == expect, output
        return output

    def lines(self, lines: str, *arguments: str | Path, expect: int = 0) -> str:
        """The same of lines of code."""
        script = self.folder / "lines.py"
        script.write_text(lines)
        return self.run(script, *arguments, expect=expect)

    def plato2(self, *arguments: str | Path) -> Any:
        """The JSON that a verb prints, if any."""
        for line in self.run(ROOT / "plato2" / "__main__.py", *arguments).splitlines():
            if line.startswith(("{", "[")):
                return json.loads(line)


def test_a_stage_of_ones_own(forks: Forks, corpus: Path, tmp_path: Path) -> None:
    python, outputs = Python(forks, tmp_path), tmp_path / "outputs"

    def train(*overrides: str) -> str:
        return python.run(ROOT / "train.py", *command(corpus, outputs, *overrides)[2:])

    train("run_id=parent", "trainer.max_steps=4", "trainer.val_check_interval=4")
    parent, run = outputs / "tiny-1_coarse" / "parent", outputs / "tiny-smoothed" / "a"
    train(*GIVEN, "trainer.max_steps=4", f"init_from={parent}", "run_id=a")
    assert "from step 4" in train(*GIVEN, "trainer.max_steps=8", "run_id=a")
    steps = [step for step, name, _ in read_metrics(run / "metrics.csv") if name == "train/smoothed"]
    assert steps == list(range(1, 9))

    assert read_saved(run, role="generation").stage == "smoothed"
    python.lines(LOADED, run)
    told = python.plato2("reply", "--generation", run, "ba de gi", "--json", "--max-tokens", "8")
    assert len(told["candidates"]) == 20
    python.plato2("export", "hf", "--generation", run, "--out", tmp_path / "exported")
    exported = load_generation(tmp_path / "exported").state_dict()
    weights = load_generation(run).state_dict()
    assert all(tensor.equal(exported[name]) for name, tensor in weights.items())
    assert python.plato2("runs", run, "--json")[0]["monitor"] == "val/nll"
    (tmp_path / "pairs.tsv").write_text("ba de gi\tba\n")
    scores = python.plato2("score", tmp_path / "pairs.tsv", "--generation", run)
    assert scores.keys() == {"n_tokens", "nll"}
    error = python.lines(LOADED.replace("from examples", "# from examples"), run, expect=99)
    assert "stage 'smoothed' is not known" in error
    assert "import the module that defines it" in error


def test_its_loss_is_the_cross_entropy_with_smoothed_targets(forks: Forks, tmp_path: Path) -> None:
    Python(forks, tmp_path).lines(LOSS)
