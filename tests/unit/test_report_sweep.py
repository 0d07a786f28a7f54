"""`plato2 report` of a sweep: points over seeds, importance, parallel coordinates, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from runs import write_metrics
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.report.sweep import sweeps
from plato2.runs.folder import RunFolder

RATES, DROPOUTS, SEEDS = ("0.0005", "0.001", "0.002"), ("0.0", "0.1"), (11, 12)


def loss(rate: str, dropout: str, seed: int) -> float:
    """The rate matters a lot, dropout little."""
    return 3 + 1000 * abs(float(rate) - 1e-3) + float(dropout) / 10 + 0.01 * (seed - 11)


def add_run(outputs: Path, name: str, rate: str, dropout: str, seed: int, **more: Any) -> Path:
    config = {
        "seed": seed,
        "optim": {"lr": float(rate), "clip_norm": 0.1},
        "model": {"dropout": float(dropout)},
        "sweep_metric": None,
    }
    run = RunFolder(outputs / "tiny-1_coarse" / name)
    about: dict[str, Any] = {
        "stage": "1_coarse",
        "status": "finished",
        "curriculum": "s",
        "monitor": ["val/loss", "min"],
    }
    about["use"] = {"role": "generation", "has_latents": False}
    overrides = ["model=tiny", f"optim.lr={rate}", f"model.dropout={dropout}", f"seed={seed}"]
    run.write_lineage(
        **about | {"overrides": overrides, "config": config, "run_id": name, "created": name} | more
    )
    best = loss(rate, dropout, seed)
    write_metrics(run.path, [(2, "val/loss", best + 1), (4, "val/loss", best), (6, "val/loss", best + 0.5)])
    return run.path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of six points, and one point that was pruned."""
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"command": {}, "name": "s", "finished": True}))
    grid = [(rate, dropout, seed) for rate in RATES for dropout in DROPOUTS for seed in SEEDS]
    for number, point in enumerate(grid):
        add_run(tmp_path, f"s-{number}", *point)
    add_run(tmp_path, "s-12", "0.004", "0.0", 11, status="pruned", step=4)
    add_run(tmp_path, "s-2-0", "0.1", "0.0", 11, curriculum="s-2")  # of another sweep
    return folder


def test_points_are_the_best_first_with_mean_and_spread(sweep: Path) -> None:
    (found,) = sweeps(sweep)
    assert (found.stage, found.metric, found.keys) == ("1_coarse", "val/loss", ["model.dropout", "optim.lr"])
    assert len(found.points) == 7
    best = found.points[0]
    values = [loss("0.001", "0.0", seed) for seed in SEEDS]
    assert best.values == {"model.dropout": "0.0", "optim.lr": "0.001"}
    assert (best.mean, best.spread) == (pytest.approx(fmean(values)), pytest.approx(stdev(values)))
    assert [point.mean for point in found.points[:6]] == sorted(point.mean or 0 for point in found.points[:6])
    assert (found.points[-1].status, found.points[-1].spread) == ("pruned at step 4", None)
    assert found.importance is not None
    assert sum(found.importance.values()) == pytest.approx(1)
    assert found.importance["optim.lr"] > 0.9  # its losses differ by 1, those of dropout by 0.01


def test_the_page_of_a_sweep(sweep: Path, tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["report", str(sweep)], env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    assert (
        "Best by val/loss (min): model.dropout=0.0 optim.lr=0.001: 3.005 ± 0.0071 over 2 seeds."
        in printed.output
    )
    done = CliRunner().invoke(app, ["report", str(sweep), "--out", str(tmp_path / "page.html"), "--json"])
    (plain,) = json.loads(done.stdout)["sweeps"]
    assert plain["points"][0]["results"] == pytest.approx([3.0, 3.01])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a line for each point through its values of model.dropout, optim.lr to its val/loss" in page
    assert "functional ANOVA" in page
    assert "pruned at step 4" in page
    assert "<script" not in page


def test_a_search_of_many_runs_stays_readable(sweep: Path, tmp_path: Path) -> None:
    """Numbers of 17 digits are shown with four, a column for each key; the best runs are named, not all."""
    add_run(tmp_path, "s-98", "0.0009512345678901234", "0.05", 11)
    add_run(tmp_path, "s-99", "0.005", "0.05", 11, status="pruned", step=4)
    done = CliRunner().invoke(app, ["report", str(sweep), "--out", str(tmp_path / "page.html"), "--json"])
    assert done.exit_code == 0, done.output
    (plain,) = json.loads(done.stdout)["sweeps"]
    assert "0.0009512345678901234" in [point["values"]["optim.lr"] for point in plain["points"]]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.0009512345678901234" not in page
    head, _, rows = page.partition("run folders</th>")
    assert '<th scope="col" class="number">optim.lr</th>' in head
    row = next(row for row in rows.split("<tr") if ">98</td>" in row)
    assert '<td class="number">0.0009512</td>' in row
    assert "grey: all but the best 10 of 15" in page
    (curriculum,) = [part for part in page.split("<h2") if ">The curriculum</h2>" in part]
    assert "tiny-1_coarse/s-98" in curriculum  # the newest that was not pruned


def test_runs_of_two_configurations_are_refused(sweep: Path, tmp_path: Path) -> None:
    add_run(tmp_path, "s-13", "0.001", "0.1", 13)
    run = RunFolder(tmp_path / "tiny-1_coarse" / "s-13")
    config = run.lineage()["config"]
    run.write_lineage(config=config | {"optim": config["optim"] | {"clip_norm": 1.0}})
    with pytest.raises(
        UserError, match=r"two configurations: optim.clip_norm=0.1 in s-0 and 1.0 in s-13, which is"
    ):
        sweeps(sweep)


def test_stages_are_in_the_order_of_the_curriculum(sweep: Path, tmp_path: Path) -> None:
    """Not in that of their names: 2_gen comes before 2_eval, and what is no part of it last."""
    for number, (stage, role) in enumerate(
        [("backward", "backward"), ("2_eval", "evaluation"), ("2_gen", "generation")], 20
    ):
        run_folder = RunFolder(add_run(tmp_path, f"s-{number}", "0.001", "0.0", 11, stage=stage))
        run_folder.write_lineage(use={"role": role, "has_latents": stage == "2_gen"})
    assert [found.stage for found in sweeps(sweep)] == ["1_coarse", "2_gen", "2_eval", "backward"]


def test_a_sweep_whose_runs_are_gone_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"name": "s"}))
    with pytest.raises(UserError, match="no run of the sweep s"):
        sweeps(folder)


def test_a_sweep_without_runs_does_not_hide_the_others(sweep: Path) -> None:
    """Such as one whose command had a typo: `plato2 report outputs/sweeps/*` meets it."""
    empty = sweep.parent / "r"
    empty.mkdir()
    (empty / "sweep.json").write_text(json.dumps({"name": "r"}))
    alone = CliRunner().invoke(app, ["report", str(empty)])
    assert (alone.exit_code, alone.stderr.count("\n")) == (2, 1)
    done = CliRunner().invoke(app, ["report", str(empty), str(sweep)])
    assert done.exit_code == 0, done.output
    assert "no run of the sweep r" in done.stderr
    assert "The sweep s, 1_coarse" in done.stdout
