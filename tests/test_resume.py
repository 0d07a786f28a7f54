"""A run killed at any moment and started again is the run that was never killed: losses, samples, weights."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Train, command, environment

from plato2.runs.saved import read_metrics
from plato2.stages import Stage

STEPS = 12


def start(corpus: Path, output_dir: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(corpus, output_dir, f"trainer.max_steps={STEPS}", "trainer.val_check_interval=4", *overrides),
        env=environment(**variables),
        cwd=output_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, to be signalled as a terminal, `timeout` and Slurm do
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
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


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until `train/loss` of a step is on disk: the next step is then being computed."""
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.csv").exists() and any(s >= step for s, *_ in read_metrics_quietly(run)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


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
    "linear": ["stage=1_coarse", "optim.schedule=linear"],
    "backward": ["stage=backward", "init_from=scratch"],
    "plato": ["stage=plato"],
    "workers": ["stage=1_coarse", "data.n_workers=2"],
    "accumulation": ["stage=2_gen", "init_from=scratch", "data.unit_tokens=256"],
    # about 7 steps an epoch: 12 steps cross its end
    "epochs": ["stage=1_coarse", "optim.batch_tokens=2048", "data.window_samples=128"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_started_again_is_bit_identical(corpus: Path, tmp_path: Path, case: str) -> None:
    overrides = CASES[case]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(corpus, whole, *overrides, RUN_ID="a"))
    name = f"tiny-{overrides[0].removeprefix('stage=')}"

    run = killed / name / "a"
    for at_step in (3, 7):
        process = start(corpus, killed, *overrides, RUN_ID="a")
        wait_for_step(run, at_step, process)
        os.kill(process.pid, signal.SIGKILL)
        finish(process, expect=-signal.SIGKILL)
    output = finish(start(corpus, killed, *overrides, RUN_ID="a"))
    assert "resuming" in output
    assert_same(whole / name / "a", run)


@pytest.mark.slow
def test_the_unfinished_run_of_the_same_config_goes_on_without_a_name(corpus: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "outputs"
    process = start(corpus, output_dir)
    until = time.monotonic() + 200
    while not list(output_dir.glob("*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, expect=128 + signal.SIGTERM)
    (run,) = (output_dir / "tiny-1_coarse").iterdir()
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < STEPS

    other = finish(start(corpus, output_dir, "optim.lr=0.5"))  # another config is another run
    assert "new run" in other
    output = finish(start(corpus, output_dir))
    assert f"resuming {run}" in output
    assert len(list((output_dir / "tiny-1_coarse").iterdir())) == 2

    whole = tmp_path / "whole"
    finish(start(corpus, whole, RUN_ID="b"))
    assert_same(whole / "tiny-1_coarse" / "b", run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_the_step_at_hand(
    corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Worker processes go on until the step is saved; the run ends as one that was never stopped."""
    given = ["data.n_workers=2", "checkpoint_steps=1000", "trainer.val_check_interval=1000"]
    process = start(corpus, tmp_path / "outputs", *given, "trainer.max_steps=100000", RUN_ID="a")
    run = tmp_path / "outputs" / "tiny-1_coarse" / "a"
    wait_for_step(run, 2, process)
    os.killpg(process.pid, number)
    output = finish(process, expect=128 + number)
    assert "Traceback" not in output
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped: step {step} is saved; the same command resumes" in output
    assert max(row[0] for row in read_metrics(run / "metrics.csv")) == step >= 2
    more = [*given, f"trainer.max_steps={step + 2}"]
    assert f"resuming {run} from step {step}" in finish(
        start(corpus, tmp_path / "outputs", *more, RUN_ID="a")
    )
    finish(start(corpus, tmp_path / "whole", *more, RUN_ID="a"))
    assert_same(tmp_path / "whole" / "tiny-1_coarse" / "a", run)


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
    process = start(corpus, tmp_path / "outputs")
    until = time.monotonic() + 100
    while not handles(process.pid, number):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.001)
    os.killpg(process.pid, number)
    output = finish(process, expect=128 + number)
    assert "stopped: nothing was being trained" in output
    assert "Traceback" not in output
    assert not (tmp_path / "outputs").exists()


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; Python's for SIGINT does not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> other - 1 & 1 for other in (number, signal.SIGUSR1))


@pytest.mark.slow
def test_slurms_warning_saves_and_puts_the_job_back_into_the_queue(corpus: Path, tmp_path: Path) -> None:
    """SIGUSR1 with a job id: the run saves, calls `scontrol requeue`, and the requeued job goes on."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    variables = {"SLURM_JOB_ID": "4711", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    process = start(
        corpus, tmp_path / "outputs", "trainer.max_steps=400", "checkpoint_steps=1000", **variables
    )
    run = tmp_path / "outputs" / "tiny-1_coarse" / "4711"
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    finish(process, expect=128 + signal.SIGUSR1)
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    more = f"trainer.max_steps={step + 2}"
    output = finish(start(corpus, tmp_path / "outputs", more, **variables))
    assert f"resuming {run}" in output
