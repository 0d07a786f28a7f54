"""What Lightning's own counters do when a run goes on: one endless epoch, validated at the same steps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small import Train

from plato2.runs.saved import read_metrics
from plato2.stages.base import Stage


def steps_of(run: Path, metric: str) -> list[int]:
    return [step for step, name, _ in read_metrics(run / "metrics.csv") if name == metric]


def only_names(stage: Stage, checkpoint: dict[str, Any]) -> None:
    checkpoint |= {"stage": stage.name, "use": asdict(stage.use)}


def run_of(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "tiny-1_coarse" / "a"


@pytest.mark.parametrize("validated", [[4, 8, 9], []])
def test_a_finished_run_goes_on_with_more_steps(
    train_here: Train, tmp_path: Path, validated: list[int]
) -> None:
    given = ["trainer.val_check_interval=4", *([] if validated else ["+trainer.limit_val_batches=0"])]
    for steps in (4, 8, 9):
        train_here("stage=1_coarse", f"trainer.max_steps={steps}", *given, RUN_ID="a")
        assert steps_of(run_of(tmp_path), "train/loss") == list(range(1, steps + 1))
    assert steps_of(run_of(tmp_path), "val/loss") == validated


@pytest.mark.parametrize(("mended", "validated"), [(True, [4, 8]), (False, [3, 7, 8])])
def test_a_killed_run_is_validated_where_it_would_have_been(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool, validated: list[int]
) -> None:
    """Without what `Stage.on_save_checkpoint` mends Lightning counts a batch twice."""
    given = ["stage=1_coarse", "trainer.max_steps=8", "trainer.val_check_interval=4", "checkpoint_steps=1"]
    if not mended:
        monkeypatch.setattr(Stage, "on_save_checkpoint", only_names)

    class Killed(BaseException):
        pass

    trained = Stage.training_step

    def killed_in_step_3(stage: Stage, *step: Any) -> None:
        if stage.global_step == 2:
            raise Killed
        trained(stage, *step)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "training_step", killed_in_step_3)
        with pytest.raises(Killed):
            train_here(*given, RUN_ID="a")
    train_here(*given, RUN_ID="a")
    assert steps_of(run_of(tmp_path), "train/loss") == list(range(1, 9))
    assert steps_of(run_of(tmp_path), "val/loss") == validated
