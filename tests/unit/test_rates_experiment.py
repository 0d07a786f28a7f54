"""experiments/rates: its trainings fit conf/, and a run's figures become a row of a table."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from decoders import write_decoder
from runs import write_metrics

from experiments.rates import tables
from experiments.rates.rates import MADE_WITH, plan, recorded
from plato2.commands.train import composed, refuse_unknown


def test_every_training_fits_the_configuration(tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", max_position_embeddings=256)
    rates: dict[str, list[str]] = {}
    for name, options in plan(tmp_path / "coarse").items():
        config = composed(*options, f"model.path={base}", "data.path=data")
        refuse_unknown(config)
        assert config.trainer.val_check_interval * 3 == config.trainer.max_steps
        assert config.model.adapter == "lora"
        assert config.model.context_mask == (
            "causal" if name.startswith("2_") or "causal" in name else "prefix"
        )
        rates.setdefault(name.split("-")[0], []).append(name)
    tried = {name: len(found) for name, found in rates.items()}
    masks = {"as_it_is_prefix": 1, "as_it_is_causal": 1, "1_coarse": 4, "1_coarse_causal": 4}
    assert tried == masks | {"2_gen": 3, "2_eval_dual": 2}
    assert plan(None).keys() == {name for name in plan(Path("run")) if not name.startswith("2_")}


def write_run(run: Path, rate: float, mask: str, losses: dict[int, float]) -> Path:
    run.mkdir(parents=True)
    config = {"optim": {"lr": rate}, "model": {"context_mask": mask}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run / "lineage.json").write_text(
        json.dumps({"stage": "1_coarse"} | dict.fromkeys(MADE_WITH, "x")), encoding="utf-8"
    )
    rows = [row for step, loss in losses.items() for row in ((step, "val/nll", loss), (step, "val/acc", 0.2))]
    write_metrics(run, [*rows, (max(losses), "perf/cpu_s", 7.51)])
    return run


def test_a_run_is_a_row(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", 5e-4, "causal", {20: 4.5, 40: 4.25, 60: 4.0}),
        write_run(tmp_path / "b", 5e-4, "prefix", {20: 4.6, 40: 4.3, 60: 4.0}),
        write_run(tmp_path / "c", 1e-9, "prefix", {1: 5.3, 2: 5.3, 3: 5.3}),
        write_run(tmp_path / "d", 2e-4, "prefix", {20: 4.7, 40: 4.4, 60: 4.12345}),
    ]
    found = {run.name: recorded(run) for run in runs}
    assert found["d"]["cpu_s"] == 7.5
    assert found["d"]["curve"][-1] == {"step": 60, "nll": 4.1235}
    head, _, *rows = tables.coarse({"runs": found}).splitlines()
    assert head == "| context | rate | nll, step 20 | nll, step 40 | nll, step 60 |"
    assert rows == [
        "| prefix | as it is |  |  | 5.300 |",
        "| prefix | 0.0002 | 4.700 | 4.400 | 4.123 |",
        "| prefix | 0.0005 | 4.600 | 4.300 | 4.000 |",
        "| causal | 0.0005 | 4.500 | 4.250 | 4.000 |",
    ]
    assert tables.fine({"runs": found}).startswith("Not run: it starts from a stage 1")
