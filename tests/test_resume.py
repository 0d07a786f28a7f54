"""A run killed at any moment and started again is the run that was never killed: losses, samples, weights."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from small import ROOT, Train, command, environment

from plato2.runs.saved import read_metrics
from plato2.stages import Stage

STEPS = 12


class Start:
    """`python train.py OVERRIDES`, to be killed; the leader of a group of its own, as in a terminal."""

    def __init__(
        self, forks: Forks, corpus: Path, output_dir: Path, *overrides: str, **variables: str
    ) -> None:
        given = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=4", *overrides]
        arguments = command(corpus, output_dir, *given)[2:]
        self.forks = forks
        self.pid = forks.begin(ROOT / "train.py", *arguments, folder=output_dir.parent, **variables)

    def wait_for(self, ready: Callable[[], object]) -> None:
        until = time.monotonic() + 200
        while not ready():
            assert time.monotonic() < until
            assert Path(f"/proc/{self.pid}").exists(), self.forks.end()
            time.sleep(0.01)

    def wait_for_step(self, run: Path, step: int) -> None:
        """Waits until `train/loss` of a step is on disk: the next step is then being computed."""
        metrics = run / "metrics.csv"
        self.wait_for(lambda: metrics.exists() and any(s >= step for s, *_ in read_metrics_quietly(run)))

    def finish(self, expect: int = 0) -> str:
        code, _, output = self.forks.end()
        assert code == expect, output
        return output


def outcome(run: Path) -> tuple[list[Any], dict[str, Any]]:
    """All deterministic metrics and the last checkpoint."""
    rows = [row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("perf/")]
    return rows, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(run: Path, other: Path) -> None:
    rows, checkpoint = outcome(run)
    other_rows, other_checkpoint = outcome(other)
    assert rows == other_rows
    for part in ("state_dict",):
        for key, tensor in checkpoint[part].items():
            assert torch.equal(tensor, other_checkpoint[part][key]), key
    position = checkpoint["DialogueDataModule"]
    assert position == other_checkpoint["DialogueDataModule"]
    moments, other_moments = (c["optimizer_states"][0]["state"] for c in (checkpoint, other_checkpoint))
    for index, state in moments.items():
        assert all(torch.equal(state[key], other_moments[index][key]) for key in state)


def read_metrics_quietly(run: Path) -> list[tuple[int, str, float]]:
    try:
        return read_metrics(run / "metrics.csv")
    except ValueError:  # a row is being written
        return []


CASES = {
    "coarse": ["stage=1_coarse"],
    "fine": ["stage=2_gen", "init_from=scratch"],
    "evaluation": ["stage=2_eval", "init_from=scratch"],
    "dual": ["stage=2_eval_dual", "init_from=scratch"],
    "pmi": ["stage=2_eval_pmi", "init_from=scratch", "data.row_length=256"],
    "linear": ["stage=1_coarse", "optim.schedule=linear"],
    "backward": ["stage=backward", "init_from=scratch"],
    "plato": ["stage=plato"],
    "workers": ["stage=1_coarse", "data.n_workers=2"],
    "balanced": [
        "stage=2_gen",
        "init_from=scratch",
        "stage.recognition_bias=balanced",
        "data.unit_tokens=256",
    ],
    "accumulation": ["stage=2_gen", "init_from=scratch", "data.unit_tokens=256"],
    # about 7 steps an epoch: 12 steps cross its end
    "epochs": ["stage=1_coarse", "optim.batch_tokens=2048", "data.window_samples=128"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_started_again_is_bit_identical(
    forks: Forks, corpus: Path, tmp_path: Path, case: str
) -> None:
    overrides = CASES[case]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Start(forks, corpus, whole, *overrides, RUN_ID="a").finish()
    name = f"tiny-{overrides[0].removeprefix('stage=')}"

    run = killed / name / "a"
    for at_step in (3, 7):
        process = Start(forks, corpus, killed, *overrides, RUN_ID="a")
        process.wait_for_step(run, at_step)
        os.kill(process.pid, signal.SIGKILL)
        process.finish(expect=-signal.SIGKILL)
    assert "resuming" in Start(forks, corpus, killed, *overrides, RUN_ID="a").finish()
    assert_same(whole / name / "a", run)


@pytest.mark.slow
def test_the_unfinished_run_of_the_same_config_goes_on_without_a_name(
    forks: Forks, corpus: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "outputs"
    process = Start(forks, corpus, output_dir)
    process.wait_for(lambda: list(output_dir.glob("*/*/checkpoints/last.ckpt")))
    os.kill(process.pid, signal.SIGTERM)
    process.finish(expect=128 + signal.SIGTERM)
    (run,) = (output_dir / "tiny-1_coarse").iterdir()
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < STEPS

    other = Start(forks, corpus, output_dir, "optim.lr=0.5").finish()  # another config is another run
    assert "new run" in other
    assert f"resuming {run}" in Start(forks, corpus, output_dir).finish()
    assert len(list((output_dir / "tiny-1_coarse").iterdir())) == 2

    whole = tmp_path / "whole"
    Start(forks, corpus, whole, RUN_ID="b").finish()
    assert_same(whole / "tiny-1_coarse" / "b", run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_the_step_at_hand(
    forks: Forks, corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Worker processes go on until the step is saved; the run ends as one that was never stopped."""
    outputs, whole = tmp_path / "outputs", tmp_path / "whole"
    given = ["data.n_workers=2", "checkpoint_steps=1000", "trainer.val_check_interval=1000"]
    process = Start(forks, corpus, outputs, *given, "trainer.max_steps=100000", RUN_ID="a")
    run = outputs / "tiny-1_coarse" / "a"
    process.wait_for_step(run, 2)
    os.killpg(process.pid, number)
    output = process.finish(expect=128 + number)
    assert "Traceback" not in output
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped: step {step} is saved; the same command resumes" in output
    assert max(row[0] for row in read_metrics(run / "metrics.csv")) == step >= 2
    more = [*given, f"trainer.max_steps={step + 2}"]
    assert f"resuming {run} from step {step}" in Start(forks, corpus, outputs, *more, RUN_ID="a").finish()
    Start(forks, corpus, whole, *more, RUN_ID="a").finish()
    assert_same(whole / "tiny-1_coarse" / "a", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "saved"),
    [
        ([signal.SIGTERM], 3),
        pytest.param([signal.SIGINT], 3, marks=pytest.mark.slow),
        ([signal.SIGINT] * 2, 1),
    ],
    ids=str,
)
def test_a_signal_to_a_step_and_its_workers(
    train_here: Train, monkeypatch: pytest.MonkeyPatch, numbers: list[signal.Signals], saved: int
) -> None:
    """One lets the step be finished and saved; a second Ctrl-C stops at once."""
    trained = Stage.training_step

    def training_step(stage: Stage, *given: Any) -> None:
        for number in numbers if stage.global_step == 2 else ():
            for process in (*(child.pid for child in active_children()), os.getpid()):
                os.kill(int(process or 0), number)
        trained(stage, *given)

    given = ["run_id=r", "data.n_workers=2", "checkpoint_steps=100", "trainer.val_check_interval=1"]
    train_here(*given, "trainer.max_steps=1")
    given[-1] = "trainer.val_check_interval=6"
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        done = train_here(*given, expect=128 + numbers[0])
    assert done.stderr.splitlines()[-1].startswith(
        f"stopped: step {saved} is saved; the same command resumes"
    )
    assert f"from step {saved}" in train_here(*given).stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_starting_up_is_one_line(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command(corpus, tmp_path / "outputs"),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 100
    while not handles(process.pid, number):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.001)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, output
    assert "stopped: nothing was being trained" in output
    assert "Traceback" not in output
    assert not (tmp_path / "outputs").exists()


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; Python's for SIGINT does not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> other - 1 & 1 for other in (number, signal.SIGUSR1))


@pytest.mark.slow
def test_slurms_warning_saves_and_puts_the_job_back_into_the_queue(
    forks: Forks, corpus: Path, tmp_path: Path
) -> None:
    """SIGUSR1 with a job id: the run saves, calls `scontrol requeue`, and the requeued job goes on."""
    scontrol, outputs = tmp_path / "bin" / "scontrol", tmp_path / "outputs"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    variables = {"SLURM_JOB_ID": "4711", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    process = Start(forks, corpus, outputs, "trainer.max_steps=400", "checkpoint_steps=1000", **variables)
    run = outputs / "tiny-1_coarse" / "4711"
    process.wait_for_step(run, 2)
    os.kill(process.pid, signal.SIGUSR1)
    process.finish(expect=128 + signal.SIGUSR1)
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    output = Start(forks, corpus, outputs, f"trainer.max_steps={step + 2}", **variables).finish()
    assert f"resuming {run}" in output
