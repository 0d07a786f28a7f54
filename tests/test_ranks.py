"""Two real gloo processes of which one is killed, frozen, or started with other things: who says what."""

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
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from small import ROOT, Train, assert_one_line, command, environment, write_dialogues
from test_kills import assert_same, outcome
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.runs.folder import RunFolder
from plato2.runs.ranks import ASLEEP_S, MARGIN_S
from plato2.runs.saved import checkpoint_step
from plato2.runs.traces import (
    CLOCKS_S,
    TRACE_BYTES,
    Arrival,
    Line,
    RankState,
    Trace,
    disagreement,
    flight_of,
    folder_of,
    read_state,
    read_states,
    verdict,
)

PAIR = """
import json, os, runpy, sys
ranks, own = {}, json.loads(os.environ["OWN"])
for rank in ("0", "1"):
    child = os.fork()
    if child == 0:
        log = os.open(f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = rank
        exec(own.get(rank, {}).get("before", ""))
        sys.argv += own.get(rank, {}).get("overrides", [])
        code = 0
        try:
            runpy.run_path("TRAIN", run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    ranks[child] = rank
codes = {}
while len(codes) < 2:
    pid, status = os.wait()
    codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
print("codes", json.dumps(codes))
""".replace("TRAIN", str(ROOT / "train.py"))
"""train.py as two ranks of one machine, without torchrun, which would kill the other one."""
DDP = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2", "optim.batch_tokens=2048"]
LONG = ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "checkpoint_steps=2"]
SHORT = ["startup_timeout_s=20", "step_timeout_s=3"]
HOST = re.escape(socket.gethostname())


class Pair:
    """Two ranks of one run."""

    def __init__(self, forks: Forks, corpus: Path, folder: Path) -> None:
        self.forks, self.corpus, self.folder = forks, corpus, folder
        self.run = folder / "outputs" / "tiny-1_coarse" / "r"

    def begin(self, *overrides: str, own: dict[str, Any] | None = None) -> int:
        """Starts both; `own` are further overrides, and Python to run before, of one rank.

        Returns:
            The pid of their process group.
        """
        script = self.folder / "pair.py"
        script.write_text(PAIR)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RUN_ID": "r"}
        given = command(self.corpus, self.folder / "outputs", *DDP, *SHORT, *overrides)[2:]
        return self.forks.begin(script, *given, folder=self.folder, OWN=json.dumps(own or {}), **world)

    def end(self) -> tuple[list[int], list[str]]:
        """Waits for both; their exit codes and what they said."""
        _, _, output = self.forks.end()
        codes = json.loads(output.rpartition("codes ")[2])
        return [codes["0"], codes["1"]], [self.said(0), self.said(1)]

    def said(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.log").read_text()

    def pid(self, rank: int) -> int:
        lines = (folder_of(self.run) / f"rank_{rank}.jsonl").read_text().splitlines()
        return int([json.loads(line) for line in lines if '"pid"' in line][-1]["pid"])

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: min((s.last.step for s in read_states(self.run)), default=0) >= step)

    def wait(self, ready: Callable[[], object]) -> None:
        until = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < until, [p.read_text() for p in self.folder.glob("rank_*.log")]
            time.sleep(0.02)


@pytest.fixture
def pair(forks: Forks, corpus: Path, tmp_path: Path) -> Pair:
    return Pair(forks, corpus, tmp_path)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def but_for_ranks(found: dict[str, Any]) -> dict[str, Any]:
    """What a run reached; traces tell of its kills."""
    return found | {"files": [name for name in found["files"] if not name.startswith("ranks/")]}


def error_of(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    return line


# -------------------------------------------------------------------------------------- while they train


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_step_is_named_by_the_other(pair: Pair) -> None:
    pair.begin(*LONG)
    pair.wait_for_step(3)
    os.kill(pair.pid(1), signal.SIGKILL)
    codes, said = pair.end()
    assert codes == [2, -signal.SIGKILL]
    assert re.search(rf"rank 1 of 2 on {HOST} stopped after step \d+ and does not answer", error_of(said[0]))
    assert checkpoint_step(pair.run / "checkpoints" / "last.ckpt") >= 2


@pytest.mark.slow
def test_a_frozen_rank_is_named_after_the_time_out_of_a_step_and_the_report_shows_it(
    pair: Pair,
) -> None:
    """Its connections stand: nothing but the time tells."""
    pair.begin(*LONG)
    pair.wait_for_step(3)
    frozen = pair.pid(1)
    os.kill(frozen, signal.SIGSTOP)
    try:  # whatever is found, it is not left frozen
        pair.wait(lambda: "error: " in pair.said(0))
        line = re.search(
            rf"rank 1 of 2 on {HOST} stopped after step (\d+) and.* waited (\d+) s", pair.said(0)
        )
        assert line, pair.said(0)
        assert 3 <= int(line[2]) < 20  # that of a step, not of the start
        state = {state.rank: state for state in read_states(pair.run)}[0]
        assert state.last.event == "late"

        record = json.loads(flight_of(pair.run, 0).read_text())
        limits = [entry["timeout_ms"] / 1000 - MARGIN_S for entry in record["entries"]]
        assert {3, 20} <= set(limits)  # PyTorch's own, of the steps and of what is between them
        last = record["entries"][-1]["profiling_name"]  # of a step, or of a checkpoint between two
        assert last.startswith("gloo:")
        shown = CliRunner().invoke(app, ["report", str(pair.run)])
        assert f"rank 1 of 2 on {socket.gethostname()} stopped after step {line[1]}" in shown.output
        assert last[:8] in shown.output  # a narrow table folds the rest
        told = json.loads(CliRunner().invoke(app, ["report", str(pair.run), "--json"]).stdout)["ranks"][0]
        assert told["summary"] in " ".join(shown.output.split())
        assert told["ranks"][0]["last_collective"]["profiling_name"] == last
        page = pair.folder / "page.html"
        assert CliRunner().invoke(app, ["report", str(pair.run), "--out", str(page)]).exit_code == 0
        assert "Ranks of tiny-1_coarse/r" in page.read_text()
    finally:
        os.kill(frozen, signal.SIGCONT)
    codes, said = pair.end()
    assert codes == [2, 2]
    assert "rank" in error_of(said[1])


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_is_behind_and_says_so_itself(pair: Pair) -> None:
    pair.begin(*LONG, "data.n_workers=1", "checkpoint_steps=100000")
    pair.wait_for_step(3)
    (worker,) = [int(pid) for pid in children(pair.pid(1))]
    os.kill(worker, signal.SIGSTOP)
    try:
        codes, said = pair.end()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert codes == [2, 2]
    for text in said:
        told = rf"rank 1 of 2 on {HOST} stopped after step (\d+) \(has not begun the next one\); the others"
        line = re.search(told + r" waited \d+ s in step (\d+)", error_of(text))
        assert line, text
        assert int(line[2]) == int(line[1]) + 1


@pytest.mark.slow
def test_a_job_that_was_stopped_as_a_whole_goes_on(pair: Pair) -> None:
    """As by `scontrol suspend`, for longer than a step may take."""
    pair.begin(*LONG)
    pair.wait_for_step(3)
    both = [pair.pid(rank) for rank in (0, 1)]
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3 + ASLEEP_S + 1)
    step = max(state.last.step for state in read_states(pair.run))
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    pair.wait_for_step(step + 10)
    for pid in both:
        os.kill(pid, signal.SIGTERM)
    codes, said = pair.end()
    assert codes == [143, 143]
    assert "error" not in said[0] + said[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[], ["strategy=fsdp"]], ids=["ddp", "fsdp"])
def test_a_full_disk_on_the_rank_that_saves_is_told_by_both(pair: Pair, strategy: list[str]) -> None:
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))"
    slow = ["startup_timeout_s=500", "step_timeout_s=500"]
    pair.begin(*LONG, *slow, *strategy, own={"0": {"before": full}})
    codes, said = pair.end()
    assert codes == [2, 2]
    for text in said:  # without the time-out of 500 s
        assert f"the checkpoint of step 2 could not be written (rank 0: {os.strerror(27)})" in error_of(text)
    assert not (pair.run / "checkpoints" / "new.ckpt").exists()


@pytest.mark.slow
def test_a_full_disk_on_one_rank_of_a_sharded_run_is_told_by_both(pair: Pair) -> None:
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"
    sharded = ["strategy=fsdp", "strategy.strategy.save_distributed_checkpoint=true"]
    pair.begin(*LONG, *sharded, own={"1": {"before": full}})
    codes, said = pair.end()
    assert codes == [2, 2]
    for text in said:
        assert "last.ckpt: the checkpoint of step 2 could not be written (rank 1: " in error_of(text), text
        assert "inline_container" not in text  # of PyTorch's own code, which says nothing of a disk


@pytest.mark.slow
def test_a_slurm_job_that_loses_its_first_rank_goes_back_into_the_queue_if_it_has_saved(pair: Pair) -> None:
    asked, programs = pair.folder / "asked", pair.folder / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text(f"#!/bin/sh\necho $* >> {asked}\n")
    (programs / "scontrol").chmod(0o755)
    slurm = f"os.environ |= dict(SLURM_JOB_ID='77', PATH='{programs}:' + os.environ['PATH'])"
    own = {rank: {"before": slurm} for rank in ("0", "1")}
    pair.begin(*LONG, "checkpoint_steps=100000", own=own)
    pair.wait_for_step(2)
    os.kill(pair.pid(0), signal.SIGKILL)
    assert "the same command resumes" in error_of(pair.end()[1][1])
    assert not asked.exists()
    pair.begin(*LONG, own=own)
    pair.wait_for_step(3)
    os.kill(pair.pid(0), signal.SIGKILL)
    assert "job 77 is back in the queue" in error_of(pair.end()[1][1])
    assert asked.read_text().split() == ["requeue", "77"]


@pytest.mark.slow
def test_a_kill_during_a_checkpoint_leaves_the_one_before_it_and_the_run_goes_on_exactly(pair: Pair) -> None:
    dies = """
import os, sys

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("last.ckpt"):
        kill.n += 1
        if kill.n == 2:
            os.kill(os.getpid(), 9)

kill.n = 0
sys.addaudithook(kill)
"""
    whole = ["trainer.max_steps=6", "trainer.val_check_interval=3", "checkpoint_steps=2"]
    pair.begin(*whole)
    assert pair.end()[0] == [0, 0]
    expected = outcome(RunFolder(pair.run))
    pair.run.rename(pair.folder / "whole")
    pair.begin(*whole, own={"0": {"before": dies}})
    codes, said = pair.end()
    assert codes == [-signal.SIGKILL, 2]
    told = rf"rank 0 of 2 on {HOST} stopped after step 3 and .* in the checkpoint of step 3"
    assert re.search(told, error_of(said[1]))
    assert checkpoint_step(pair.run / "checkpoints" / "last.ckpt") == 2
    pair.begin(*whole)
    codes, said = pair.end()
    assert codes == [0, 0], said
    assert "from step 2" in said[0]
    assert_same(but_for_ranks(expected), but_for_ranks(outcome(RunFolder(pair.run))), "after the kill")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_run_is_exact(pair: Pair) -> None:
    options = ["trainer.val_check_interval=100", "checkpoint_steps=5", "trainer.max_steps=40", *DDP]
    outputs = pair.folder / "restarted"
    arguments = command(pair.corpus, outputs, *options, "run_id=r")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (pair.folder / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            [*torchrun, "--max-restarts=1", *arguments], env=environment(), stdout=log, stderr=log
        )
    restarted = Pair(pair.forks, pair.corpus, pair.folder)
    restarted.run = outputs / "tiny-1_coarse" / "r"
    restarted.wait_for_step(7)
    os.kill(restarted.pid(1), signal.SIGKILL)
    assert process.wait(timeout=300) == 0, (pair.folder / "torchrun.log").read_text()
    said = (pair.folder / "torchrun.log").read_text()
    assert re.search(rf"^error: rank 1 of 2 on {HOST} stopped after step \d+ and does", said, re.M), said
    resumed = RunFolder(restarted.run).lineage()["resumed"]
    assert [entry["step"] % 5 for entry in resumed] == [0]
    assert resumed[0]["step"] >= 5
    pair.begin(*options)
    assert pair.end()[0] == [0, 0]
    found = [but_for_ranks(outcome(RunFolder(run))) for run in (pair.run, restarted.run)]
    assert_same(*found, "after the restart")


# ----------------------------------------------------------------------------------------- when they start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["seed=12"], r"seed=12 on rank 1 of 2 on HOST, 11 on rank 0: give all ranks the same command"),
        (
            ["data.path=OTHER"],
            r"data \(training split, sha256\)=\w+ on rank 1 of 2 on HOST, .* prepared",
        ),
        (
            ["+clock=ahead"],
            r"the clock of rank 1 of 2 on HOST is 3,60\d s ahead of the others': set it",
        ),
        (["data.unit_tokens=2048"], "2 ranks cannot share a step of optim.batch_tokens=2048 equally, 1 unit"),
    ],
)
def test_ranks_that_are_started_with_other_things_name_them(
    pair: Pair, own: list[str], told: str, tmp_path: Path
) -> None:
    """On both ranks; nothing is trained."""
    before = ""
    if own == ["+clock=ahead"]:
        own, before = [], "import time\nreal = time.time\ntime.time = lambda: real() + 3600"
    elif own == ["data.path=OTHER"]:
        options = {"vocab_pieces": 300, "max_context": 32, "max_response": 32, "shard_samples": 128}
        tokenizer = str(pair.corpus / "tokenizer")
        files = [str(write_dialogues(tmp_path / "other.jsonl", seed=1))]
        options |= {"valid_dialogues": 20, "tokenizer": tokenizer, "test_fraction": 0.0}
        prepare(PrepareOptions(corpus="jsonl", files=files, out=str(tmp_path / "other"), **options))
        own = [f"data.path={tmp_path / 'other'}"]
    pair.begin(*LONG, own={"1": {"before": before, "overrides": own}})
    codes, said = pair.end()
    assert codes == [2, 2], said
    for text in said:
        assert re.search(told.replace("HOST", HOST), error_of(text)), text
    assert not (pair.run / "lineage.json").exists()


@pytest.mark.slow
def test_an_address_at_which_another_program_listens_is_told_by_both(pair: Pair) -> None:
    """The first rank cannot listen there; what the other one is connected to never answers."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        own = {rank: {"before": f"os.environ['MASTER_PORT'] = '{port}'"} for rank in ("0", "1")}
        group = pair.begin(*LONG, "startup_timeout_s=3", own=own)
        logs = [pair.folder / f"rank_{rank}.log" for rank in (0, 1)]
        try:
            pair.wait(lambda: all(log.exists() and "error: " in log.read_text() for log in logs))
        except AssertionError:
            os.killpg(group, signal.SIGKILL)
            raise
        codes, said = pair.end()
    assert codes == [2, 2]
    for text in said:
        told = f"2 processes were to start together at 127.0.0.1:{port} within 3 s (startup_timeout_s), but"
        assert told in error_of(text), text
    pair.begin("trainer.max_steps=1")  # nothing of it is in the way
    assert pair.end()[0] == [0, 0]


# ------------------------------------------------------------------------------------------------- in words


def lines(*events: dict[str, Any], world: int = 2) -> list[RankState]:
    return [
        RankState(rank, world, f"node{rank // 2}", "a", Line(**{"at": 0.0, "event": "alive", **event}))
        for rank, event in enumerate(events)
    ]


IN_121 = {"step": 120, "phase": "step", "moves": 241, "waited_s": 100.4, "collectives": 9}
BEFORE = IN_121 | {"phase": "between", "moves": 240}


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (
            lines(IN_121, IN_121, IN_121, IN_121 | {"event": "step"}, world=4),
            "rank 3 of 4 on node1 stopped after step 120 and does not answer (killed, or its machine is "
            "gone); the others waited 100 s in step 121",
        ),
        (
            lines(IN_121, IN_121, world=4),
            "ranks 2-3 of 4 stopped before the first step was finished and do not answer (killed, or their",
        ),
        (
            lines(IN_121, BEFORE),
            "rank 1 of 2 on node0 stopped after step 120 (has not begun the next one); the others waited",
        ),
        (
            lines(IN_121 | {"collectives": 7}, IN_121),
            "rank 0 of 2 on node0 stopped after step 120 (is in step 121, 2 collectives behind); the others",
        ),
        (
            lines(IN_121, IN_121 | {"event": "failed", "phase": "save", "error": "the disk is full"}),
            "rank 1 of 2 on node0 failed in the checkpoint of step 120: the disk is full",
        ),
        (
            lines(IN_121 | {"phase": "save"}, BEFORE),  # a save is before a step, or behind a validation
            "rank 1 of 2 on node0 stopped after step 120 (has not begun the next one); the others waited "
            "100 s in the checkpoint of step 120",
        ),
        (lines(IN_121, IN_121), "all 2 ranks answer, none is behind, and no collective ends; they waited"),
        (
            lines(IN_121 | {"step": 0, "phase": "start", "moves": 1}, IN_121 | {"step": 0}),
            "rank 0 of 2 on node0 stopped after step 0 (is in the start); the others waited 100 s in step 1",
        ),
    ],
)
def test_the_rank_that_is_to_blame(states: list[RankState], told: str) -> None:
    assert verdict(states, states[0].world).startswith(told)


def test_ranks_are_compared_and_the_odd_one_is_named() -> None:
    def told(*given: dict[str, Any]) -> str:
        alike = {"host": "a", "attempt": "", "clock": 0.0, "facts": {"seed": 11}}
        return disagreement([Arrival(**alike | own | {"host": f"n{n}"}) for n, own in enumerate(given)])

    assert told({}, {}, {"clock": CLOCKS_S}) == ""
    assert "seed=12 on rank 2 of 4 on n2, 11 on most others" in told({}, {}, {"facts": {"seed": 12}}, {})
    assert "seed=null on rank 1 of 3 on n1" in told({}, {"facts": {}}, {})
    assert "the clock of rank 1 of 3 on n1 is 61 s behind" in told({}, {"clock": -CLOCKS_S - 1}, {})
    assert (
        told({}, {"problem": "no shards"}, {"problem": "no shards"}) == "ranks 1-2 of 3 on n1, n2: no shards"
    )


def test_a_trace_is_bounded_and_read_back_whatever_was_cut(tmp_path: Path) -> None:
    trace = Trace(tmp_path, 1, 2, "first")
    for step in range(1, 6000):
        trace.write("step", step, "between")
    assert trace.path.stat().st_size < 1.1 * TRACE_BYTES
    (state,) = read_states(tmp_path)
    assert (state.rank, state.world, state.attempt, state.last.step) == (1, 2, "first", 5999)
    with trace.path.open("ab") as file:
        file.write(b'{"event": "st')  # a kill in the middle of a line
    assert read_states(tmp_path) == [state]
    again = Trace(tmp_path, 1, 2, "again")
    assert read_states(tmp_path)[0].last.event == "start"
    again.write("failed", 3, "save", error="the disk is full")
    assert read_states(tmp_path, "first") == []
    assert read_states(tmp_path)[0].last.error == "the disk is full"
    trace.path.write_bytes(b"\0\0\n")
    assert read_states(tmp_path) == []
    with pytest.raises(UserError, match="rank_1"):
        read_state(trace.path)


def test_time_outs_are_keys(train_here: Train) -> None:
    assert_one_line(train_here("step_timeout_s=0", expect=2).stderr, "step_timeout_s=0", "above 0")
    assert_one_line(train_here("startup_timeout_s=inf", expect=2).stderr, "startup_timeout_s=inf")
