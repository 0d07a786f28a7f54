"""Two real gloo processes: the same samples, the same numbers, and runs that move between world sizes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import Forks
from pytorch_lightning.utilities import rank_zero_only
from small import ROOT, Train, assert_one_line, command, environment

from plato2.runs.saved import read_metrics

Run = Callable[..., subprocess.CompletedProcess[str]]
RUN = ["stage=2_gen", "init_from=scratch", "model.dropout=0", "trainer.val_check_interval=3"]
STEP = ["optim.batch_tokens=2048"]  # four units of 512: 4 on one rank, 2 on each of two
DDP = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
FSDP = ["strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=2", "strategy.precision=32-true"]
TWO_RANKS = """
import os, runpy, sys
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if child == 0 else "0"
runpy.run_path("TRAIN", run_name="__main__")
assert child == 0 or os.waitpid(child, 0)[1] == 0
""".replace("TRAIN", str(ROOT / "train.py"))
"""train.py as torchrun starts it for two processes, but as forks."""


COUNTED = TWO_RANKS.replace(
    'runpy.run_path("',
    """
from torch.utils._python_dispatch import TorchDispatchMode

class Counter(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        Counter.n += "reduce_scatter" in str(operator)
        return operator(*args, **(kwargs or {}))

with Counter():
    runpy.run_path(\"""",
).replace("assert child", 'print("reductions:", Counter.n)\nassert child')
"""The same, which says how often it reduced gradients."""


@pytest.fixture
def run_fork(forks: Forks, corpus: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs train.py, with `strategy.devices=2` in two processes; its output."""
    script = tmp_path / "two_ranks.py"

    def run(*overrides: str, run_id: str, source: str = TWO_RANKS) -> str:
        script.write_text(source)
        arguments = command(corpus, tmp_path / "outputs", *overrides)[2:]
        if "strategy.devices=2" not in overrides:
            code, _, output = forks.run(ROOT / "train.py", *arguments, folder=tmp_path, RUN_ID=run_id)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            world = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RUN_ID": run_id}
            code, _, output = forks.run(script, *arguments, folder=tmp_path, **world)
        assert code == 0, output
        return output

    return run


def losses(tmp_path: Path, run_id: str) -> dict[tuple[int, str], float]:
    rows = read_metrics(tmp_path / "outputs" / "tiny-2_gen" / run_id / "metrics.csv")
    kept = {"train": ("nll", "bow", "grad_norm"), "val": ("nll", "bow", "nll_uniform", "z_effective")}
    names = {f"{split}/{name}" for split, some in kept.items() for name in some}
    return {(step, name): value for step, name, value in rows if name in names}


def checkpoint(tmp_path: Path, run_id: str) -> dict[str, object]:
    path = tmp_path / "outputs" / "tiny-2_gen" / run_id / "checkpoints" / "last.ckpt"
    loaded: dict[str, object] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.slow
def test_runs_move_between_one_and_two_processes(run_fork: Callable[..., str], tmp_path: Path) -> None:
    whole = [*RUN, *STEP, "trainer.max_steps=6"]
    half = [*RUN, *STEP, "trainer.max_steps=3"]
    run_fork(*whole, run_id="one")
    run_fork(*half, *DDP, run_id="two_then_one")
    run_fork(*whole, run_id="two_then_one")
    run_fork(*half, run_id="one_then_two")
    done = run_fork(*whole, *DDP, run_id="one_then_two")
    assert "resuming" in done

    reference, position = losses(tmp_path, "one"), checkpoint(tmp_path, "one")["DialogueDataModule"]
    assert len(reference) == 6 * 3 + 2 * 4
    for run_id in ("two_then_one", "one_then_two"):
        assert losses(tmp_path, run_id) == pytest.approx(reference, rel=1e-5)
        assert checkpoint(tmp_path, run_id)["DialogueDataModule"] == position


@pytest.mark.slow
@pytest.mark.parametrize("distributed_checkpoint", ["false", "true"])
def test_sharded_runs_resume_exactly(
    run_fork: Callable[..., str], tmp_path: Path, distributed_checkpoint: str
) -> None:
    option = f"strategy.strategy.save_distributed_checkpoint={distributed_checkpoint}"
    common = [*RUN, *STEP, *FSDP, option]
    run_fork(*common, "trainer.max_steps=6", run_id="whole")
    run_fork(*common, "trainer.max_steps=3", run_id="parts")
    run_fork(*common, "trainer.max_steps=6", run_id="parts")
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "of_a_block"), [("1_coarse", 1), ("2_gen", 2)])
def test_a_sharded_step_reduces_its_gradients_once(
    run_fork: Callable[..., str], stage: str, of_a_block: int
) -> None:
    """Once a block and once for the rest, not for each of four units; twice a block in two passes (2_gen)."""
    step = ["optim.batch_tokens=4096", "trainer.max_steps=2", "model.n_layer=2"]
    said = run_fork(*RUN, f"stage={stage}", *FSDP, *step, run_id="r", source=COUNTED)
    per_step = {int(n) / 2 for n in re.findall(r"reductions: (\d+)", said)}
    assert per_step == {2 * of_a_block + 1}


@pytest.mark.slow
def test_a_sharded_run_starts_where_an_unsharded_one_does_and_warm_starts_the_next_stage(
    run_fork: Callable[..., str], tmp_path: Path
) -> None:
    run_fork(*RUN, *STEP, "trainer.max_steps=3", run_id="plain")
    run_fork(*RUN, *STEP, *FSDP, "trainer.max_steps=3", run_id="sharded")
    plain, sharded = losses(tmp_path, "plain"), losses(tmp_path, "sharded")
    assert sharded == pytest.approx(plain, rel=5e-3)  # bf16 against float32
    coarse = ["stage=1_coarse", *STEP, *FSDP, "trainer.max_steps=2"]
    run_fork(*coarse, run_id="coarse")
    done = run_fork(*STEP, "stage=2_gen", f"init_from={tmp_path}/outputs/tiny-1_coarse/coarse", run_id="warm")
    assert "new: bag_of_words, recognition" in done


@pytest.mark.slow
def test_sigterm_to_all_ranks_saves_one_step_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    """As srun and torchrun send it: every process gets the signal."""
    options = [*RUN, *STEP, *DDP, "trainer.max_steps=300", "trainer.val_check_interval=300"]
    arguments = command(corpus, tmp_path / "outputs", *options, "checkpoint_steps=1000")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, *arguments],
        env=environment(RUN_ID="told"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "outputs" / "tiny-2_gen" / "told" / "metrics.csv"
    until = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("train/loss") >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    saved = checkpoint(tmp_path, "told")
    assert saved["global_step"] == saved["DialogueDataModule"]["step"] >= 3  # type: ignore[index]
    assert f"step {saved['global_step']} is saved" in output


def test_a_sharded_checkpoint_as_a_start_says_how_to_make_one_file_of_it(tmp_path: Path) -> None:
    from plato2.config import UserError
    from plato2.runs.saved import read_checkpoint

    with pytest.raises(UserError, match="consolidate_checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.slow
def test_processes_that_lightning_starts_share_a_run_without_a_name(run_train: Run, tmp_path: Path) -> None:
    steps = ["trainer.val_check_interval=2", *STEP, *DDP]
    run_train(*steps, "trainer.max_steps=2", "resume=never")
    (run,) = (tmp_path / "outputs" / "tiny-1_coarse").iterdir()
    done = run_train(*steps, "trainer.max_steps=4", f"resume={run}")
    assert done.stderr.count("resuming") == 1
    rows = read_metrics(run / "metrics.csv")
    assert [step for step, name, _ in rows if name == "train/loss"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        ((), "give strategy=ddp strategy.devices=2"),
        (("strategy=ddp_64",), "strategy.devices=8 on 8 machine(s): torchrun has started 2 process(es)"),
    ],
)
def test_processes_that_the_strategy_does_not_have(
    train_here: Train, overrides: tuple[str, ...], cure: str
) -> None:
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = train_here(*overrides, "run_id=r", expect=2, **started)
    assert_one_line(done.stderr, cure)


@pytest.mark.slow
def test_a_process_does_not_wait_for_ever_for_one_that_failed(
    train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under srun, which leaves the others alone, or where the first machine cannot be reached."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # Lightning does, and the tests after this one are rank 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        second = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address.partition(":")[2]}
        second |= {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
        second |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = train_here(*DDP, "run_id=r", "startup_timeout_s=1", expect=2, **second)
    told = (f"2 processes were to start together at {address} within 1 s", "rank 0) says why it failed")
    assert_one_line(done.stderr, *told)


@pytest.mark.slow
def test_torchruns_report_closes_with_our_line(corpus: Path, tmp_path: Path) -> None:
    """Which stands above torchrun's own lines once, not once a process."""
    arguments = command(corpus, tmp_path / "outputs", "run_id=r")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, *arguments], env=environment(), capture_output=True, text=True, timeout=200
    )
    *_, last, _ = done.stderr.splitlines()
    assert "traceback : error: strategy.devices=1 on 1 machine(s): " in last, done.stderr
    assert done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") <= 1
