"""experiments/choices: its variants fit conf/, curves and tables are what runs logged, and all of it."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from runs import write_metrics
from small import ROOT, SMALL, Train, train_in_process

from plato2.commands.train import composed, refuse_unknown
from plato2.runs.parts import build_parts

HERE = ROOT / "experiments" / "choices"
TABLES = runpy.run_path(str(HERE / "tables.py"))
PLAN = yaml.safe_load((HERE / "variants.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(HERE)
    yield importlib.import_module("choices")
    for name in ("choices", "heads_and_negatives"):
        sys.modules.pop(name, None)


def test_every_variant_fits_the_configuration(choices: ModuleType) -> None:
    built = {}
    for part in (PLAN, PLAN["writing"]):
        for name, overrides in part["variants"].items():
            places = {"runs": "runs", "data": "data", "parent": "parent", "small": "small"}
            config = composed(*part["common"], *(text.format(**places) for text in overrides))
            refuse_unknown(config)
            keys: Any = OmegaConf.to_object(config)
            keys.plan = True
            built[name] = keys, *build_parts(keys)
    HydraConfig.instance().cfg = None
    for name, (recognition, bow) in {"knover": ("tied", "tied"), "paper": ("linear", "linear")}.items():
        stage = built[name][1]
        assert (stage.hparams["recognition_head"], stage.hparams["bow_head"]) == (recognition, bow)
    ours, theirs = built["small_first"][0], built["small_first_batch-1024_3e-4"][0]
    for steps in (lambda keys: keys.trainer["max_steps"], lambda keys: keys.optim.warmup_steps):
        assert steps(ours) * ours.optim.batch_tokens == steps(theirs) * theirs.optim.batch_tokens
    assert ours.optim.lr == theirs.optim.lr


def test_every_variant_has_a_row() -> None:
    assert PLAN["variants"].keys() <= TABLES["RANKING"].keys()
    assert PLAN["writing"]["variants"].keys() == TABLES["WRITING"].keys()


def test_a_curve_has_what_was_spent_until_each_validation(choices: ModuleType, tmp_path: Path) -> None:
    rows = [(10, "perf/samples", 600.0), (10, "perf/cpu_s", 5.0), (12, "val/ppl", 50.00004)]
    rows += [(12, "val/z_effective", 3.0), (12, "val/z_usage_00", 0.5), (20, "perf/samples", 1200.0)]
    rows += [(20, "perf/cpu_s", 10.0), (20, "val/ppl", 40.0), (20, "val/overlap_p1", 0.44444)]
    write_metrics(tmp_path, rows)
    assert choices.curve(tmp_path) == [
        {"step": 12, "samples": 720, "cpu_s": 6.0, "ppl": 50.0, "z_effective": 3.0},
        {"step": 20, "samples": 1200, "cpu_s": 10.0, "ppl": 40.0},
    ]
    assert choices.perplexity(tmp_path) == 40.0
    assert choices.baseline(tmp_path) == {"p1": 0.4444}


def test_the_table_of_stage_2_1() -> None:
    writing = TABLES["writing"]
    assert writing({"variants": {}}) == writing({"writing": {"variants": {}}})
    assert "Not run yet." not in writing({})  # of all of an experiment, and stage 2.2 has been run
    point = {"ppl": 60.04, "ppl_uniform": 65.0, "bow": 6.1, "cpu_s": 612.4, "z_mutual_information": 0.512}
    curve = [point | {"z_mutual_information": 0.1}, point]
    variant = {"curve": [one | {"z_effective": 9.51, "z_in_use": 8.0} for one in curve], "parent_ppl": 62.81}
    lines = writing({"writing": {"variants": {"paper": variant, "knover": variant}}}).splitlines()
    assert lines[2] == "| the stage 1 that they start from, without z |  | 62.8 |  |  |  |  |  |"
    assert lines[-2] == "| Knover: both heads tied | 60.0 | 65.0 | 6.100 | 0.10, 0.51 | 9.5 | 8 | 612 |"
    assert lines[-1].startswith("| both linear: the paper's text | 60.0 |")


def test_from_a_stage_1_to_results_and_again(
    choices: ModuleType, train_here: Train, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here("run_id=parent", "trainer.max_steps=2", "trainer.val_check_interval=2")
    own = [*SMALL, "latent_contexts=0", "human_rank=0", "selection=10"]
    own += ["trainer.max_steps=2", "trainer.val_check_interval=1"]
    plan = {
        "common": ["stage=2_eval", *own],
        "variants": {"first": ["optim.lr=1e-3"]},
        "writing": {
            "common": ["stage=2_gen", *own],
            "variants": {"knover": [], "paper": ["stage.recognition_head=linear", "stage.bow_head=linear"]},
        },
    }
    plan = json.loads(json.dumps(plan).replace("valid_units=2", "valid_units=1"))
    folder = tmp_path / "choices"
    folder.mkdir()
    (folder / "variants.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    before = {"common": [], "overlap": {}, "variants": {"first_old": {"curve": []}}}
    (folder / "results.json").write_text(json.dumps(before), encoding="utf-8")
    monkeypatch.setattr(choices, "HERE", folder)
    trained = []

    def run(command: list[str], cwd: Path, check: bool, env: dict[str, str]) -> None:
        trained.append(command[-1])
        done = train_in_process(command[2:], tmp_path, cwd / command[1])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(choices, "subprocess", SimpleNamespace(run=run))
    parent = next((tmp_path / "outputs").glob("*/parent"))
    words = ["choices.py", "--parent", parent, "--data", corpus, "--out", tmp_path / "out"]

    def started(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*map(str, words), *more])
        choices.main()
        found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found

    some = started("knover")
    assert trained == ["run_id=knover"]
    assert some["variants"] == before["variants"]
    every = started()
    assert trained == ["run_id=knover", "run_id=first", "run_id=paper"]
    assert every["writing"]["variants"]["knover"] == some["writing"]["variants"]["knover"]
    assert started("--only-draw") == every
    assert trained[3:] == []
    assert every["variants"].keys() == {"first_old", "first"}
    assert every["variants"]["first"]["curve"][-1].keys() >= {"coherence_acc", "pair_acc", "p1"}
    for name, variant in every["writing"]["variants"].items():
        assert variant["parent_ppl"] == pytest.approx(choices.perplexity(parent)), name
        assert [point["step"] for point in variant["curve"]] == [1, 2]
        assert variant["curve"][-1].keys() >= {"ppl", "ppl_uniform", "z_mutual_information", "z_in_use"}
        assert variant["machine"].keys() == {"cpu", "threads"}
        config = (folder / "config" / f"{name}.yaml").read_text(encoding="utf-8")
        assert str(tmp_path) not in config
    assert TABLES["writing"](every).count("\n| ") == 6
    assert (folder / "writing.png").exists()
    assert (folder / "curves.png").exists()
