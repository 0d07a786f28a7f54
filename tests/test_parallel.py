"""Two real gloo processes: the same samples, the same numbers, and runs that move between world sizes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forks import Forks
from pytorch_lightning.utilities import rank_zero_only
from small import ROOT, Train, assert_one_line, command, environment

from plato2.config import UserError
from plato2.runs import distributed
from plato2.runs.folder import RunFolder
from plato2.runs.parallel import check_launch, n_ranks
from plato2.runs.saved import checkpoint_step, read_checkpoint, read_metrics
from plato2.weights.folder import read_saved

Run = Callable[..., subprocess.CompletedProcess[str]]
RUN = ["stage=2_gen", "init_from=scratch", "model.dropout=0", "trainer.val_check_interval=3"]
STEP = ["optim.batch_tokens=2048"]  # four units of 512: 4 on one rank, 2 on each of two
DDP = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
FSDP = ["strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=2", "strategy.precision=32-true"]
HSDP = ["strategy=hsdp", *FSDP[1:]]
SHARES = "strategy.strategy.save_distributed_checkpoint=true"
PLATO2 = [sys.executable, "-m", "plato2"]
BF16 = "strategy.precision=bf16-mixed"
RANKS = """
import os, runpy, sys
children, rank = [], 0
for number in range(1, int(os.environ["WORLD_SIZE"])):
    children.append(os.fork())
    if not children[-1]:
        children, rank = [], number
        break
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
runpy.run_path("TRAIN", run_name="__main__")
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
""".replace("TRAIN", str(ROOT / "train.py"))
"""train.py as torchrun starts it for several processes, but as forks."""


COUNTED = RANKS.replace(
    'runpy.run_path("',
    """
from torch.utils._python_dispatch import TorchDispatchMode

class Counter(TorchDispatchMode):
    scattered = summed = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        Counter.scattered += "reduce_scatter" in str(operator)
        Counter.summed += "allreduce_" in str(operator) and args[0][0].numel() > 1000
        return operator(*args, **(kwargs or {}))

with Counter():
    runpy.run_path(\"""",
).replace("assert all", 'print("reductions:", Counter.scattered, Counter.summed)\nassert all')
"""The same, which says how often it reduced gradients."""


PEAK = RANKS.replace(
    'runpy.run_path("',
    """
import json, tempfile
from torch.profiler import ProfilerActivity, profile
from plato2.runs import start
from plato2.stages import Stage

profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
warm_start, configure_model = start.warm_start, Stage.configure_model

def begins(*given):
    profiler.start()
    return warm_start(*given)

def ends(stage):
    configure_model(stage)
    profiler.stop()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = [e["args"] for e in json.load(open(file.name))["traceEvents"] if e["name"] == "[memory]"]
    allocated = [0] + [event["Total Allocated"] for event in events]
    whole = 4 * sum(parameter.numel() for parameter in stage.parameters())
    print(f"peak: {max(allocated)} of {whole}", flush=True)

start.warm_start, Stage.configure_model = begins, ends
runpy.run_path(\"""",
)
"""The same, which says what a rank allocates at most while it takes over weights, and their size."""


@dataclass
class RankedForks:
    """train.py on the small corpus, with `strategy.devices=N` in N processes."""

    forks: Forks
    corpus: Path
    folder: Path

    def begin(self, *overrides: str, run_id: str, source: str = RANKS) -> int:
        """Starts one; the pid of rank 0, which leads the group of all."""
        arguments = command(self.corpus, self.folder / "outputs", *overrides)[2:]
        ranks = [item.split("=")[1] for item in overrides if item.startswith("strategy.devices=")][-1:]
        if not ranks:
            return self.forks.begin(ROOT / "train.py", *arguments, folder=self.folder, RUN_ID=run_id)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world |= {"WORLD_SIZE": ranks[0], "LOCAL_WORLD_SIZE": ranks[0], "GROUP_RANK": "0"}
        script = self.folder / "ranks.py"
        script.write_text(source)
        return self.forks.begin(script, *arguments, folder=self.folder, RUN_ID=run_id, **world)

    def __call__(self, *overrides: str, run_id: str, source: str = RANKS) -> str:
        """Its output."""
        self.begin(*overrides, run_id=run_id, source=source)
        code, _, output = self.forks.end()
        assert code == 0, output
        return output


@pytest.fixture
def run_fork(forks: Forks, corpus: Path, tmp_path: Path) -> RankedForks:
    return RankedForks(forks, corpus, tmp_path)


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
def test_runs_move_between_one_and_two_processes(run_fork: RankedForks, tmp_path: Path) -> None:
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
def test_every_strategy_trains_as_one_process_does(run_fork: RankedForks, tmp_path: Path) -> None:
    """The same global batch in float32 without dropout: losses, gradient norms and validations."""
    run_fork(*RUN, *STEP, "trainer.max_steps=6", run_id="one")
    reference = losses(tmp_path, "one")
    for strategy in (DDP, FSDP, HSDP):
        for ranks in (2, 4):
            name = f"{strategy[0].split('=')[1]}_{ranks}"
            run_fork(*RUN, *STEP, *strategy, f"strategy.devices={ranks}", "trainer.max_steps=6", run_id=name)
            assert losses(tmp_path, name) == pytest.approx(reference, rel=1e-5), name


@pytest.mark.slow
def test_ranks_balance_latents_as_one_process_does(run_fork: RankedForks, tmp_path: Path) -> None:
    """What is taken out is a unit's mean, wherever it is computed; the running mean is of all ranks."""
    balanced = [*RUN, *STEP, "stage.recognition_bias=balanced", "trainer.max_steps=6"]
    run_fork(*balanced, run_id="one")
    outputs = tmp_path / "outputs" / "tiny-2_gen"
    centre = saved_weights(outputs / "one")["recognition.centre"]
    assert float(centre.abs().max()) > 1e-4
    for strategy in (DDP, FSDP):
        name = strategy[0].split("=")[1]
        run_fork(*balanced, *strategy, run_id=name)
        assert losses(tmp_path, name) == pytest.approx(losses(tmp_path, "one"), rel=1e-5), name
        found = saved_weights(outputs / name)["recognition.centre"]
        torch.testing.assert_close(found, centre, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sharded_checkpoints_are_read_by_any_number_of_ranks(run_fork: RankedForks, tmp_path: Path) -> None:
    """4 ranks in 2 copies, then 2, 1 and 2 again, the last one from and to one file; saved at each step."""
    common = [*RUN, *STEP, "checkpoint_steps=1"]
    run_fork(*common, "trainer.max_steps=6", run_id="whole")
    run_fork(*common, *HSDP, "strategy.devices=4", SHARES, "trainer.max_steps=3", run_id="parts")
    last = tmp_path / "outputs" / "tiny-2_gen" / "parts" / "checkpoints" / "last.ckpt"
    assert len(list(last.glob("__*.distcp"))) >= 2
    run_fork(*common, *FSDP, SHARES, "trainer.max_steps=4", run_id="parts")
    assert last.is_dir()
    run_fork(*common, "trainer.max_steps=5", run_id="parts")
    assert last.is_file()
    run_fork(*common, *FSDP, "trainer.max_steps=6", run_id="parts")
    parts, whole = losses(tmp_path, "parts"), losses(tmp_path, "whole")
    assert {place: parts[place] for place in whole} == pytest.approx(whole, rel=1e-5)  # parts validate more


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "stage"), [(FSDP, "1_coarse"), (FSDP, "2_gen"), (HSDP, "2_gen")])
def test_a_sharded_step_reduces_its_gradients_once(
    run_fork: RankedForks, strategy: list[str], stage: str
) -> None:
    """Once a block and once for the rest, not for each of four units, nor of two passes (2_gen).

    With HSDP, each sum of a copy is added up over the copies, once as well.
    """
    ranks = 4 if strategy == HSDP else 2
    step = [f"optim.batch_tokens={512 * 4 * ranks}", "trainer.max_steps=2", "model.n_layer=2"]
    devices = f"strategy.devices={ranks}"
    said = run_fork(*RUN, f"stage={stage}", *strategy, devices, *step, run_id="r", source=COUNTED)
    per_step = {(int(n) / 2, int(m) / 2) for n, m in re.findall(r"reductions: (\d+) (\d+)", said)}
    once = 2 + 1
    assert per_step == {(once, once if strategy == HSDP else 0)}


@pytest.mark.slow
def test_a_sharded_run_in_bf16_starts_where_an_unsharded_one_does(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    run_fork(*RUN, *STEP, "trainer.max_steps=3", run_id="plain")
    run_fork(*RUN, *STEP, *FSDP, BF16, "trainer.max_steps=3", run_id="sharded")
    plain, sharded = losses(tmp_path, "plain"), losses(tmp_path, "sharded")
    assert sharded == pytest.approx(plain, rel=5e-3)  # bf16 against float32
    assert sharded != pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_kill_while_shares_are_written_leaves_the_checkpoint_before(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    """All of 4, 4 and 2 ranks are killed, and the run goes on to the end as if nothing had been."""
    common = [*RUN, *STEP, "checkpoint_steps=1", "trainer.max_steps=30", "trainer.val_check_interval=30"]
    run_fork(*common, run_id="whole")
    folder = tmp_path / "outputs" / "tiny-2_gen" / "killed" / "checkpoints"
    for kill, ranks in enumerate((4, 4, 2)):
        pid = run_fork.begin(*common, *FSDP, SHARES, f"strategy.devices={ranks}", run_id="killed")
        before = checkpoint_step(folder / "last.ckpt") if kill else 0
        until = time.monotonic() + 200
        while time.monotonic() < until:  # one is whole, and the next one has begun
            with suppress(OSError, UserError):
                if (folder / "new.ckpt").exists() and checkpoint_step(folder / "last.ckpt") > before:
                    break
        os.killpg(pid, signal.SIGKILL)
        code, _, output = run_fork.forks.end()
        assert code == -signal.SIGKILL, output
        whole, _ = RunFolder(folder.parent).newest_whole()
        assert whole is not None
        assert checkpoint_step(whole) > before
    done = run_fork(*common, *FSDP, SHARES, run_id="killed")
    assert "resuming" in done
    assert losses(tmp_path, "killed") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
    assert not (folder / "new.ckpt").exists()


FULL_DISK = RANKS.replace(
    'runpy.run_path("',
    """
import resource, signal
if rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
runpy.run_path(\"""",
)
"""The same, in which the second rank cannot write more than 9,999 bytes."""


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all_of_them_and_leaves_the_checkpoint_before(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    given = [*RUN, *STEP, *FSDP, SHARES, "strategy.precision=16-mixed", "checkpoint_steps=4"]
    run_fork(*given, "trainer.max_steps=3", run_id="full")
    run_fork.begin(*given, "trainer.max_steps=6", run_id="full", source=FULL_DISK)
    code, _, output = run_fork.forks.end()
    assert code == 2, output
    told = "the checkpoint of step 4 could not be written (rank 1: "
    assert output.count(told) == 2, output
    assert output.count("the one from step 3 is untouched. Free some space") == 2
    run_fork(*given, "trainer.max_steps=6", run_id="full")
    rows = read_metrics(tmp_path / "outputs" / "tiny-2_gen" / "full" / "metrics.csv")
    assert [value for _, name, value in rows if name == "train/overflows"] == [0.0] * 6
    run_fork(*RUN, *STEP, "trainer.max_steps=6", run_id="float32")
    full, whole = losses(tmp_path, "full"), losses(tmp_path, "float32")
    assert full == pytest.approx(whole, rel=5e-3)  # float16 against float32


@pytest.mark.slow
def test_replies_and_figures_stand_beside_the_validations_of_sharded_ranks(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    shown = [*RUN, *STEP, "trainer.max_steps=6", "sample_replies=3", "latent_contexts=3"]
    run_fork(*shown, run_id="one")
    run_fork(*shown, *FSDP, run_id="sharded")
    assert losses(tmp_path, "sharded") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    run_fork(*shown, *FSDP, BF16, run_id="bf16")
    one, sharded, bf16 = (tmp_path / "outputs" / "tiny-2_gen" / name for name in ("one", "sharded", "bf16"))
    replies = [json.loads(line) for line in (one / "replies.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (sharded / "replies.jsonl").read_text().splitlines()]
    assert len(replies) == 2 * 3
    for reply, same in zip(replies, found, strict=True):
        assert [c["text"] for c in same["candidates"]] == [c["text"] for c in reply["candidates"]]
        assert [c["log_prob"] for c in same["candidates"]] == pytest.approx(
            [c["log_prob"] for c in reply["candidates"]], rel=1e-4
        )
    assert len((bf16 / "replies.jsonl").read_text().splitlines()) == 2 * 3
    names = {"val/greedy_different", "val/distinct_2_between_z"}
    values = [{n: v for _, n, v in read_metrics(run / "metrics.csv") if n in names} for run in (one, sharded)]
    assert values[0].keys() == names
    assert values[1] == pytest.approx(values[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP, HSDP], ids=["fsdp", "hsdp"])
def test_sharded_ranks_train_on_after_the_first_one_has_measured_alone(
    run_fork: RankedForks, tmp_path: Path, strategy: list[str]
) -> None:
    """Its passes, which the others have not made, must not change what the ranks exchange in later steps."""
    measured = [*RUN, *STEP, "stage=2_eval", "trainer.max_steps=6", "selection=16"]
    run_fork(*measured, run_id="one")
    run_fork(*measured, *strategy, "strategy.devices=4", SHARES, run_id="sharded")
    runs = [tmp_path / "outputs" / "tiny-2_eval" / name / "metrics.csv" for name in ("one", "sharded")]
    one, sharded = (
        {(step, name): value for step, name, value in read_metrics(run) if not name.startswith("perf/")}
        for run in runs
    )
    assert {(3, "val/p1"), (6, "val/p1"), (6, "train/rce")} < one.keys()
    assert sharded == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["none", "ema"])
def test_the_next_stage_and_every_verb_read_sharded_checkpoints(
    run_fork: RankedForks, tmp_path: Path, callbacks: str
) -> None:
    """Also those of a run that averages its weights: the average is what they read.

    Both the run and its checkpoint, a folder, can be named.
    """
    averaged = ["callbacks=ema", "callbacks.ema.decay=0.5"] if callbacks == "ema" else []
    shares = [*STEP, *FSDP, SHARES, *averaged, "trainer.max_steps=2"]
    run_fork(*shares, "stage=1_coarse", run_id="coarse")
    coarse = tmp_path / "outputs" / "tiny-1_coarse" / "coarse"
    assert RunFolder(coarse).best.is_dir()
    weights = read_checkpoint(RunFolder(coarse).best)["state_dict"]
    if averaged:
        trained = distributed.read_whole(RunFolder(coarse).best)["current_model_state"]
        assert not any(torch.equal(trained[name], weight) for name, weight in weights.items())
    on_one = [*STEP, *averaged, "trainer.max_steps=2"]
    for run_id, given, start in (("warm", shares, coarse), ("alone", on_one, RunFolder(coarse).best)):
        done = run_fork(*given, "stage=2_gen", f"init_from={start}", "optim.lr=1e-30", run_id=run_id)
        assert "new: bag_of_words, recognition" in done
        found = read_checkpoint(tmp_path / "outputs" / "tiny-2_gen" / run_id / "checkpoints" / "last.ckpt")
        for name, weight in weights.items():
            torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=1e-20)
    source = RunFolder(coarse).best if averaged else coarse
    export = ["export", "hf", "--generation", str(source), "--out", "exported"]
    subprocess.run([*PLATO2, *export], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), check=True)
    exported = read_saved(tmp_path / "exported").weights
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_a_rank_never_holds_the_whole_weights_that_it_starts_from(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    """Of a sharded checkpoint it reads its share; one file is mapped, not read."""
    large = ["model.hidden_size=128", "model.n_layer=12", *STEP, *FSDP, "trainer.max_steps=1"]
    run_fork(*large, SHARES, "stage=1_coarse", run_id="coarse")
    shares, file = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "coarse").best, tmp_path / "file.ckpt"
    torch.save(distributed.read_whole(shares), file)
    weights = read_checkpoint(shares)["state_dict"]
    largest = max(weight.nbytes for weight in weights.values())
    for start in (shares, file):
        given = [*large, "strategy.devices=4", "stage=2_gen", f"init_from={start}", "optim.lr=1e-30"]
        said = run_fork(*given, run_id=f"from_{start.stem}", source=PEAK)
        peaks = [(int(peak), int(size)) for peak, size in re.findall(r"peak: (\d+) of (\d+)", said)]
        assert len(peaks) == 4
        for peak, size in peaks:
            assert size / 4 <= peak <= size / 4 + 6 * largest < 0.5 * size
        found = saved_weights(tmp_path / "outputs" / "tiny-2_gen" / f"from_{start.stem}")
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-20)


@pytest.mark.slow
def test_ranks_average_their_shares_as_one_process_does_the_whole(
    run_fork: RankedForks, tmp_path: Path
) -> None:
    """To shares, with a step after a validation; then to a file on other ranks, on one process, and back."""
    common = [*RUN, *STEP, "checkpoint_steps=1", "callbacks=ema", "callbacks.ema.decay=0.5"]
    run_fork(*common, "trainer.max_steps=7", run_id="whole")
    run_fork(*common, *FSDP, SHARES, "trainer.max_steps=4", run_id="parts")
    run_fork(*common, *HSDP, "strategy.devices=4", "trainer.max_steps=5", run_id="parts")
    run_fork(*common, "trainer.max_steps=6", run_id="parts")
    run_fork(*common, *FSDP, SHARES, "trainer.max_steps=7", run_id="parts")
    parts, whole = losses(tmp_path, "parts"), losses(tmp_path, "whole")
    assert {place: parts[place] for place in whole} == pytest.approx(whole, rel=1e-5)
    expected = checkpoint(tmp_path, "whole")
    last = tmp_path / "outputs" / "tiny-2_gen" / "parts" / "checkpoints" / "last.ckpt"
    found = distributed.read_whole(last)
    assert found["averaging_state"] == expected["averaging_state"] == {"n_averaged": torch.tensor(7)}
    for part in ("state_dict", "current_model_state"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)
    assert not torch.equal(*(found[part]["backbone.word.weight"] for part in ("state_dict", part)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2_eval_dual", "2_eval_pmi"])  # parameters of one number, and a buffer
def test_ranks_fill_their_shards_with_the_weights_of_an_unsharded_run(
    run_fork: RankedForks, tmp_path: Path, stage: str
) -> None:
    """After a step that changes nothing, as far as float32 can tell; of 4 ranks, which do not divide all."""
    still = ["optim.lr=1e-30", "optim.batch_tokens=2048", "trainer.max_steps=1", f"stage={stage}"]
    still += ["data.row_length=256"]  # room for four responses
    run_fork(*RUN, *still, run_id="one")
    run_fork(*RUN, *still, *HSDP, "strategy.devices=4", "strategy.strategy.replicas=1", run_id="four")
    one, four = (saved_weights(tmp_path / "outputs" / f"tiny-{stage}" / run) for run in ("one", "four"))
    assert one.keys() == four.keys()
    torch.testing.assert_close(four, one, rtol=0, atol=1e-29)


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return weights


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
        (
            (*HSDP, "strategy.strategy.replicas=3"),
            "2 ranks cannot be 3 copies of the model; use 1 or 2",
        ),
        (
            (*FSDP, "strategy.precision=64-true"),
            "strategy.precision=64-true: FSDP2 takes auto, 32-true, bf16-mixed, 16-mixed",
        ),
    ],
)
def test_processes_that_the_strategy_does_not_have(
    train_here: Train, overrides: tuple[str, ...], cure: str
) -> None:
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = train_here(*overrides, "run_id=r", expect=2, **started)
    assert_one_line(done.stderr, cure)


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("accelerator", "devices", "ranks"),
    [("cpu", "auto", 1), ("mps", "auto", 1), ("auto", "auto", 8), ("gpu", "auto", 8), ("cpu", "2", 2)],
)
def test_auto_counts_the_devices_of_the_accelerator(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, devices: str, ranks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert n_ranks(devices, 2, accelerator) == 2 * ranks


def test_beside_eight_gpus_cpus_are_one_process(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan, and in a run whose step eight ranks could not share."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    given = ["strategy=cpu", "strategy.devices=auto", "data.unit_tokens=512", "optim.batch_tokens=512"]
    done = train_here(*given, "plan=json")
    assert json.loads(done.stdout)["ranks"] == 1
    train_here(*given, "trainer.max_steps=1", "run_id=r")
    assert RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "r").finished
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a script that has called it without srun
    check_launch("auto", 1, "cpu")
    with pytest.raises(UserError, match=r"in a Slurm job srun starts the 8 processes"):
        check_launch("auto", 1, "auto")


@pytest.mark.parametrize(
    ("overrides", "variables", "cure"),
    [
        (
            ("strategy=ddp_64", "strategy.num_nodes=2", "strategy.devices=2", *STEP),
            {},
            "strategy.num_nodes=2: on each machine, torchrun or srun starts its processes (docs/train.md",
        ),
        (
            (),
            {**SRUN, "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"},
            "srun has started 8 process(es), 4 per machine; give strategy=ddp_64 strategy.num_nodes=2 "
            "strategy.devices=4",
        ),
        (
            ("strategy=ddp_64", "strategy.num_nodes=2", "strategy.devices=4"),
            {**SRUN, "SLURM_NTASKS": "8"},
            "wherever there was room; give it --ntasks-per-node=4 --nodes=2",
        ),
        (
            DDP,
            {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "in a Slurm job srun starts the 2 processes; write srun before the command",
        ),
    ],
)
def test_processes_that_nobody_starts_or_starts_otherwise(
    train_here: Train, overrides: tuple[str, ...], variables: dict[str, str], cure: str
) -> None:
    done = train_here(*overrides, "run_id=r", expect=2, **variables)
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
