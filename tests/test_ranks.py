"""Two real gloo processes of which one is killed, frozen, or started with other things: who says what."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from small import ROOT, command

from plato2.runs.traces import folder_of, read_states

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

    def begin(self, *overrides: str, own: dict[str, Any] | None = None) -> None:
        """Starts both; `own` are further overrides, and Python to run before, of one rank."""
        script = self.folder / "pair.py"
        script.write_text(PAIR)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RUN_ID": "r"}
        given = command(self.corpus, self.folder / "outputs", *DDP, *SHORT, *overrides)[2:]
        self.forks.begin(script, *given, folder=self.folder, OWN=json.dumps(own or {}), **world)

    def end(self) -> tuple[list[int], list[str]]:
        """Waits for both; their exit codes and what they said."""
        _, _, output = self.forks.end()
        codes = json.loads(output.rpartition("codes ")[2])
        said = [(self.folder / f"rank_{rank}.log").read_text() for rank in (0, 1)]
        return [codes["0"], codes["1"]], said

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


def error_of(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    return line


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_step_is_named_by_the_other(pair: Pair) -> None:
    pair.begin(*LONG)
    pair.wait_for_step(3)
    os.kill(pair.pid(1), signal.SIGKILL)
    codes, said = pair.end()
    print(said)
    assert codes == [2, -signal.SIGKILL]
    assert re.search(rf"rank 1 of 2 on {HOST} stopped after step \d+ and does not answer", error_of(said[0]))
