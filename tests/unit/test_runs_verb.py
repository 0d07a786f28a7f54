"""`plato2 runs`: listing, comparing and drawing run folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plato2.commands import app
from plato2.runs.folder import RunFolder
from plato2.runs.saved import best_direction
from plato2.stages import known_stages

STAGES = known_stages()


def written(folder: Path, stage: str, created: str, values: list[float], **config: Any) -> Path:
    """A run folder with its record and one validation every 10 steps."""
    run = RunFolder(folder)
    parent = {"run": "outputs/tiny-1_coarse/first", "checkpoint": "x"} if stage != "1_coarse" else None
    config = {"seed": 11, "run_id": folder.name, "optim": {"lr": 1e-3, "eps": 1e-8}} | config
    status = "running" if len(values) < 2 else "finished"
    monitor = STAGES[stage].monitor
    run.write_lineage(
        stage=stage, monitor=list(monitor), created=created, status=status, parent=parent, config=config
    )
    rows = [f"{10 * n},{monitor[0]},{value}\n" for n, value in enumerate(values, start=1)]
    (folder / "metrics.csv").write_text("".join(["step,metric,value\n", *rows]), encoding="utf-8")
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    written(folder / "tiny-1_coarse" / "first", "1_coarse", "2026-01-01", [5.0, 4.0])
    written(
        folder / "tiny-1_coarse" / "second", "1_coarse", "2026-01-02", [4.5, 3.5, 3.75], optim={"lr": 2e-3}
    )
    written(folder / "tiny-2_eval" / "judge", "2_eval", "2026-01-03", [0.5])
    (folder / "sweeps" / "s").mkdir(parents=True)
    return folder


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["runs", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def test_all_runs_newest_first(outputs: Path) -> None:
    found = json.loads(run(outputs, "--json")[0])
    assert [Path(line["path"]).name for line in found] == ["judge", "second", "first"]
    judge, second, first = found
    assert (judge["status"], judge["parent"], judge["step"]) == ("running", "tiny-1_coarse/first", 10)
    assert (judge["best"], judge["monitor"], judge["differs"]) == (0.5, "val/coherence_acc", {})
    assert (second["best"], second["best_step"], second["step"], second["parent"]) == (3.5, 20, 30, None)
    assert second["differs"] == {"optim.eps": None, "optim.lr": 2e-3}
    assert first["differs"] == {"optim.eps": 1e-8, "optim.lr": 1e-3}


def test_the_table_is_one_of_a_stage_with_what_differs(outputs: Path) -> None:
    shown, _ = run(outputs)
    assert shown.index("tiny-2_eval, by val/coherence_acc") < shown.index("tiny-1_coarse, by val/loss")
    assert "10 (running)" in shown
    assert "optim.lr=0.002" in shown


def test_a_table_tells_runs_of_one_name_apart_and_counts_the_keys_it_leaves_out(outputs: Path) -> None:
    """An experiment changes many keys at once; its learning rate and a seed of one's own stay in sight."""
    many = {"data": {"path": "data/own", **{f"option_{n}": n for n in range(9)}}}
    many["optim"] = {"lr": 2e-3, "eps": 1e-8}
    written(outputs / "93m-1_coarse" / "own", "1_coarse", "2026-01-04", [3.0], **many, model={"n_layer": 12})
    written(outputs / "93m-1_coarse" / "seed", "1_coarse", "2026-01-05", [3.0], model={"n_layer": 12}, seed=5)
    shown, _ = run(outputs, "--stage", "1_coarse")
    text = " ".join(" ".join(line.strip("│").rpartition("│")[2] for line in shown.splitlines()).split())
    assert "optim.eps=1e-08 optim.lr=0.002 seed=11 data.path=data/own" in text  # `second` has no eps
    assert "seed=5" in text
    assert "n_layer" not in text  # the name says it
    keys = json.loads(run(outputs, "--stage", "1_coarse", "--json")[0])[0]["differs"]
    assert {"model.n_layer", "seed", *(f"data.option_{n}" for n in range(9))} < keys.keys()
    told = {key for key in keys if f"{key}=" in text}
    assert len(told) == 6
    assert f"{len(keys) - 1 - 6} more keys differ: --json has them" in text


def test_what_differs_of_pretrained_models_can_be_read(tmp_path: Path) -> None:
    """No config.json of a decoder, no whole hash; and in a narrow terminal no key is cut off."""
    place = tmp_path / "outputs"
    written(place / "small-1_coarse" / "20261130-000354", "1_coarse", "2026-01-01", [5.0, 4.0])
    model = {
        "path": "/somewhere/llama",
        "architecture": '{"config": {"a": 1}}',
        "base_sha256": "0123456789ab" * 5,
    }
    model["base_sha256"] += "cdef"
    name = place / "pretrained_lora-1_coarse" / "20261130-000447"
    written(name, "1_coarse", "2026-01-02", [6.0, 5.0], model=model)
    other = {
        **model,
        "path": "/somewhere/else",
        "base_sha256": "f" * 64,
        "architecture": '{"config": {"a": 2}}',
    }
    written(name.with_name("20261129-000501"), "1_coarse", "2025-12-31", [7.0, 6.0], model=other)
    shown = CliRunner().invoke(app, ["runs", str(place)], env={"COLUMNS": "80"}).stdout
    lines = [line.split("│") for line in shown.splitlines() if "│" in line]
    first = "".join(line[-2].strip() for line in lines)
    assert "model.base_sha256=0123456789abmodel.path=/somewhere/llama" in first
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "┓" in shown  # the right edge is there
    assert "config" not in shown
    assert [line[1].strip() for line in lines][:2] == ["pretrained_lora-1_coarse/", "20261130-000447"]


def test_the_best_first_also_where_more_is_better(outputs: Path) -> None:
    written(outputs / "tiny-2_eval" / "better", "2_eval", "2026-01-01", [0.4, 0.75])
    found = json.loads(run(outputs, "--best", "--json")[0])
    assert [Path(line["path"]).name for line in found] == ["second", "first", "better", "judge"]


def test_named_runs_and_one_stage(outputs: Path) -> None:
    named = [outputs / "tiny-1_coarse" / "first", outputs / "tiny-2_eval"]
    assert len(json.loads(run(*named, "--json")[0])) == 2
    assert len(json.loads(run(outputs, "--stage", "1_coarse", "--json")[0])) == 2


def test_curves_are_drawn(outputs: Path, tmp_path: Path) -> None:
    shown, _ = run(outputs, "--draw", tmp_path / "curves.png")
    assert f"drawn: {tmp_path / 'curves.png'}" in shown
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_run_does_not_hide_the_others(outputs: Path) -> None:
    (outputs / "tiny-1_coarse" / "first" / "lineage.json").write_text("")
    found, told = run(outputs, "--json")
    assert len(json.loads(found)) == 2
    assert "skipped" in told
    assert "first" in told


@pytest.mark.parametrize(
    "damage",
    [b"x,y\n", b"banana", b"step,metric,value\n1,loss\n", b"step,metric,value\n1,\xff,2\n", None],
    ids=str,
)
def test_damaged_metrics_do_not_hide_the_others(outputs: Path, damage: bytes | None) -> None:
    file = outputs / "tiny-1_coarse" / "first" / "metrics.csv"
    file.unlink()
    if damage is None:
        os.mkfifo(file)
    else:
        file.write_bytes(damage)
    found, told = run(outputs, "--json")
    assert len(json.loads(found)) == 2
    assert f"warning: skipped: {file}: not " in told
    _, told = run(file.parent, code=2)
    assert "nothing is compared" in told


def test_an_empty_record_is_told_of(outputs: Path) -> None:
    (outputs / "tiny-1_coarse" / "first" / "lineage.json").write_text("{}")
    found, told = run(outputs, "--json")
    assert len(json.loads(found)) == 2
    assert "first/lineage.json: not the record of a run" in told


def test_help_says_where_it_looks() -> None:
    assert "default: outputs" in " ".join(run("--help")[0].split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: no such folder; give run folders"),
        (["{outputs}/sweeps"], "there are no runs; python train.py experiment=quickstart"),
        (
            ["{outputs}", "--stage", "1_corse"],
            "--stage 1_corse: no run of that stage there; did you mean 1_coarse?",
        ),
        (["{outputs}", "--stage", "2_gen"], "--stage 2_gen: no run of that stage there"),
        (["{outputs}", "--metric", "val/los", "--draw", "{outputs}/x.png"], "did you mean val/loss?"),
        (["{outputs}", "--metric", "val/los"], "val/los: no run has logged it; did you mean val/loss?"),
        (["{outputs}", "--draw", "{outputs}/x.wav"], "x.wav: cannot be written"),
    ],
)
def test_mistakes_are_one_line(outputs: Path, arguments: list[str], told: str) -> None:
    _, stderr = run(*[word.format(outputs=outputs) for word in arguments], code=2)
    assert stderr.startswith("error: ")
    assert told in stderr
    assert stderr.count("\n") == 1


def test_which_way_a_stages_own_metric_is_better() -> None:
    assert all(best_direction(stage.monitor[0]) == stage.monitor[1] for stage in STAGES.values())
