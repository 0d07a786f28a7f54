"""What can be added to a run: the group `callbacks`."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import ROOT, Train, assert_one_line, command, environment
from torch import Tensor

from plato2.config import UserError
from plato2.runs import callbacks
from plato2.runs.folder import RunFolder
from plato2.runs.guard import SpikeGuard
from plato2.runs.saved import read_metrics
from plato2.stages import Stage
from plato2.stages.coarse import CoarseGeneration

RUN = Path("outputs/tiny-1_coarse/r")
GUARD = ["callbacks=spike_guard", "callbacks.spike_guard.window=8", "run_id=r", "optim.warmup_steps=50"]


def checkpoint(run: Path = RUN) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(run: Path, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value in read_metrics(run / "metrics.csv") if name == metric]


# ------------------------------------------------------------------------------------------- loss spikes


def test_what_is_a_spike() -> None:
    guard = SpikeGuard(deviations=6.0, window=20, in_a_row=3)
    for step in range(1, 30):
        assert not guard.is_far_out(100.0, guard.losses) or step > 10  # off for half a window
        guard.count(False, 4.0 + 0.1 * (step % 2), 1.0, step)
    assert len(guard.losses) == 20
    assert not guard.is_far_out(4.3, guard.losses)  # mean 4.05, deviation 0.05
    assert guard.is_far_out(4.4, guard.losses)
    assert not guard.is_far_out(1.0, guard.losses)  # downwards is fine
    before = list(guard.losses)
    for step in (30, 31):
        guard.count(True, 50.0, 1.0, step)
    assert list(guard.losses) == before  # spikes do not widen what is let through
    restored = SpikeGuard(deviations=6.0, window=20, in_a_row=3)
    restored.load_state_dict(guard.state_dict())
    assert restored.state_dict() == guard.state_dict()
    with pytest.raises(UserError, match="in_a_row=3"):
        restored.count(True, 50.0, 1.0, 32)
    guard.count(False, 4.0, 1.0, 32)  # not in a row any more
    guard.count(True, 50.0, 1.0, 33)
    assert guard.skipped == 3


@contextmanager
def spikes_at(*steps: int) -> Iterator[None]:
    """The losses of these steps are a thousand times what they are."""
    losses = CoarseGeneration.losses

    def spiking(stage: CoarseGeneration, unit: Any) -> dict[str, Tensor]:
        found = losses(stage, unit)
        far = stage.training and stage.global_step + 1 in steps
        return {name: value * 1000 if far else value for name, value in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoarseGeneration, "losses", spiking)
        yield


@pytest.mark.slow
def test_a_spike_changes_nothing_and_resuming_stays_exact(train_here: Train) -> None:
    train_here(*GUARD, "trainer.max_steps=6", "trainer.val_check_interval=6")
    before = checkpoint()
    with spikes_at(7):
        done = train_here(*GUARD, "trainer.max_steps=7", "trainer.val_check_interval=6")
        assert "step 7 is passed over" in done.stderr
        assert_same(before["state_dict"], checkpoint()["state_dict"])
        moments = [one["optimizer_states"][0]["state"] for one in (before, checkpoint())]
        for number, state in moments[0].items():
            assert_same(state, moments[1][number])
        train_here(*GUARD, "trainer.max_steps=9", "trainer.val_check_interval=6")
    assert checkpoint()["global_step"] == 9
    assert rows(RUN, "train/skipped") == [(step, float(step >= 7)) for step in range(1, 10)]
    stopped, losses = checkpoint(), rows(RUN, "train/loss")
    with spikes_at(7):
        train_here(*GUARD, "run_id=s", "trainer.max_steps=9", "trainer.val_check_interval=6")
    other = RUN.with_name("s")
    assert_same(stopped["state_dict"], checkpoint(other)["state_dict"])
    assert rows(other, "train/loss") == losses
    assert stopped["callbacks"]["SpikeGuard"] == checkpoint(other)["callbacks"]["SpikeGuard"]


@pytest.mark.slow
def test_spikes_in_a_row_end_the_run(train_here: Train) -> None:
    with spikes_at(*range(7, 20)):
        done = train_here(
            *GUARD, "callbacks.spike_guard.in_a_row=2", "trainer.max_steps=12", "checkpoint_steps=6", expect=2
        )
    assert_one_line(done.stderr, "callbacks.spike_guard.in_a_row=2", "to step 8", "optim.lr")
    assert checkpoint()["global_step"] == 6


SPIKES = """
import runpy, sys
from plato2.stages.coarse import CoarseGeneration
losses = CoarseGeneration.losses
def spiking(stage, unit):  # on the first rank alone: Lightning starts the other one without this file
    far = stage.training and stage.global_step + 1 == 7
    return {name: value * 1000 if far else value for name, value in losses(stage, unit).items()}
CoarseGeneration.losses = spiking
sys.path.insert(0, sys.argv[1])
del sys.argv[1]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_pass_over_the_same_step(corpus: Path, tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "spikes.py"
    script.write_text(SPIKES)
    several = [f"strategy={strategy}", "strategy.accelerator=cpu", "strategy.devices=2"]
    given = [word for word in GUARD if word != "run_id=r"]
    python, _, *rest = command(
        corpus, tmp_path / "outputs", *given, *several, "trainer.max_steps=8", "run_id=r"
    )
    done = subprocess.run(
        [
            python,
            str(script),
            str(ROOT),
            *(word for word in rest if not word.startswith("strategy.precision")),
        ],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / RUN, "train/skipped") == [(step, float(step >= 7)) for step in range(1, 9)]


# -------------------------------------------------------------------------------------------- the average


@contextmanager
def weights_recorded() -> Iterator[list[dict[str, Tensor]]]:
    """The weights before the first step and after each."""
    found: list[dict[str, Tensor]] = []
    train_step = Stage.training_step

    def training_step(stage: Stage, *given: Any) -> None:
        if not found:
            found.append({name: value.detach().clone() for name, value in stage.named_parameters()})
        train_step(stage, *given)
        found.append({name: value.detach().clone() for name, value in stage.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        yield found


@pytest.mark.slow
def test_the_average_is_what_is_kept_and_resuming_is_exact(train_here: Train) -> None:
    ema = ["callbacks=ema", "callbacks.ema.decay=0.5", "trainer.val_check_interval=3", "sample_replies=1"]
    with weights_recorded() as seen:
        train_here(*ema, "run_id=r")
    whole = checkpoint()
    for name, average in seen[1].items():  # the first is copied
        for weights in seen[2:]:
            average = 0.5 * average + 0.5 * weights[name]
        assert torch.allclose(whole["state_dict"][name], average, atol=1e-6)
        assert torch.equal(whole["current_model_state"][name], seen[-1][name])
    train_here("run_id=plain", "trainer.val_check_interval=3")
    plain = RUN.with_name("plain")
    assert_same(whole["current_model_state"], checkpoint(plain)["state_dict"])  # training is as without
    assert rows(RUN, "train/loss") == rows(plain, "train/loss")
    assert rows(RUN, "val/loss") != rows(plain, "val/loss")

    train_here(*ema, "run_id=s", "trainer.max_steps=3")
    train_here(*ema, "run_id=s", "trainer.max_steps=6")
    other = RUN.with_name("s")
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(whole[part], checkpoint(other)[part])
    assert rows(other, "val/loss") == rows(RUN, "val/loss")
    train_here("stage=2_eval", f"init_from={RUN}", "trainer.max_steps=1")  # weights are weights


@pytest.mark.slow
def test_what_the_average_cannot_do_is_one_line(train_here: Train) -> None:
    done = train_here("callbacks=ema", "callbacks.ema.decay=1.5", expect=2)
    assert_one_line(done.stderr, "callbacks.ema.decay=1.5", "between 0 and 1")


# -------------------------------------------------------------------------------------------- early stopping


@pytest.mark.slow
def test_a_run_that_no_longer_improves_is_finished(train_here: Train) -> None:
    stops = [
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=2",
        "trainer.val_check_interval=1",
    ]
    still = ["optim.lr=1e-30", "trainer.max_steps=9", "run_id=r"]
    train_here(*stops, *still)
    lineage = RunFolder(RUN).lineage()
    assert (lineage["status"], lineage["step"], lineage["stopped_early"]) == ("finished", 3, True)
    done = train_here(*stops, *still, expect=2)
    assert_one_line(done.stderr, "already trained 3 steps", "leave out callbacks=early_stopping")
    done = train_here("stage=2_eval", "run_id=e", "trainer.max_steps=1", "init_from=auto")
    assert f"{RUN}" in done.stderr
    train_here(*still)  # without it the run goes on
    assert RunFolder(RUN).lineage()["step"] == 9
    done = train_here(*stops, "callbacks.early_stopping.metric=val/lss", "run_id=x", expect=2)
    assert_one_line(done.stderr, "callbacks.early_stopping.metric=val/lss", "val/loss")


# ------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("is_long", [True, False])
def test_a_long_validation_shows_in_a_log_file_how_far_it_is(
    train_here: Train, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    """At each tenth, as training does; one that is over in half a minute is quiet."""
    if is_long:
        monkeypatch.setattr(callbacks, "SILENT_S", 0.0)
    five = ["data.unit_tokens=128", "data.valid_units=5"]
    done = train_here("trainer.max_steps=2", "trainer.val_check_interval=2", *five)
    told = [line for line in done.stderr.splitlines() if "validating" in line]
    lines = [f"tiny 1_coarse step 2: validating {number}/5 batches" for number in range(1, 6)]
    assert told == (lines if is_long else [])


@pytest.mark.parametrize(
    ("stage", "given", "told"),
    [
        ("2_gen", ["sample_replies=1", "latent_contexts=2"], ["sample_replies=1", "latent_contexts=2"]),
        ("2_eval", ["selection=20", "human_rank=0"], ["selection=20, human_rank=0"]),
    ],
)
def test_what_takes_long_beside_a_validation_says_so_in_a_log_file(
    train_here: Train, monkeypatch: pytest.MonkeyPatch, stage: str, given: list[str], told: list[str]
) -> None:
    """And what is over in half a minute is quiet; afterwards nothing goes on speaking."""
    steps = ["init_from=scratch", "trainer.max_steps=1", "trainer.val_check_interval=1", *given]
    for silent_s, is_long in ((1e-6, True), (30.0, False)):
        monkeypatch.setattr(callbacks, "SILENT_S", silent_s)
        done = train_here(f"stage={stage}", *steps)
        lines = [line for line in done.stderr.splitlines() if "s so far" in line]
        assert bool(lines) == is_long
        for what in told:
            said = [
                line for line in lines if re.search(rf"^tiny {stage} step 1: \w.*\({what}\), \d+ s", line)
            ]
            assert bool(said) == is_long, lines
    assert not [thread for thread in threading.enumerate() if thread.name == "busy"]


# -------------------------------------------------------------------------------- where time and memory go


@pytest.mark.slow
def test_phases_and_a_trace(train_here: Train) -> None:
    given = ["callbacks=[phases,profile]", "callbacks.profile.first_step=2", "callbacks.profile.last_step=3"]
    train_here(*given, "run_id=r", "trainer.val_check_interval=3")
    for phase in ("data", "forward", "backward", "optimizer"):
        assert [step for step, seconds in rows(RUN, f"perf/{phase}_s") if seconds > 0] == [1, 2, 3, 4, 5, 6]
    for name in ("validation_s", "validation_tokens_per_s"):
        assert [step for step, value in rows(RUN, f"perf/{name}") if value > 0] == [3, 6]
    (file,) = (RUN / "profile").iterdir()
    assert file.name == "steps-2-3-rank0.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert sum("AdamW" in name and "step" in name for name in names) == 2  # two optimizer steps


@pytest.mark.slow
def test_a_snapshot_of_memory_needs_a_gpu(train_here: Train, tmp_path: Path) -> None:
    done = train_here("callbacks=memory_snapshot", expect=2)
    assert_one_line(done.stderr, "callbacks.memory_snapshot", "cpu", "leave it out")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("window=2", "at least 4"),
        ("in_a_row=0", "at least 1"),
        ("deviations=0", "above 0"),
        ("windw=2", "did you mean window"),
    ],
)
def test_impossible_values_are_one_line(override: str, told: str) -> None:
    from plato2.runs.build import build

    name, _, value = override.partition("=")
    node = {"_target_": "plato2.runs.guard.SpikeGuard", name: int(value)}
    with pytest.raises(UserError, match=told):
        build(node, "callbacks.spike_guard")
