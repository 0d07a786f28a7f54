"""When one of several ranks stops: time-outs, and one line on every other rank that names it.

A thread of each rank watches that it goes on. All meet once, when their process group exists, and compare
what they were started with. When a rank does not go on for longer than its phase may take, or its connection
to another one breaks, it calls the roll (a file in the run folder); every rank answers with where it is,
dumps its flight recorder, reads the others' answers, says who is missing or behind, and ends.

PyTorch's own time-outs are set to half a minute more, for a rank whose thread cannot run. They say less:
gloo an address, NCCL the rank that waited. Before the meeting they do not hold: PyTorch waits twice as long
for an address that does not answer, and for ever for one where another program listens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import Strategy
from torch import distributed

from plato2.config import UserError
from plato2.data.module import DialogueDataModule
from plato2.files import read_sha256, replace_text
from plato2.runs.checkpoint import Checkpoints
from plato2.runs.console import STOP_SIGNALS, VERBS, leave_report
from plato2.runs.folder import back_in_the_queue, slurm_job
from plato2.runs.traces import (
    Arrival,
    Event,
    Phase,
    RankError,
    RankState,
    Trace,
    disagreement,
    folder_of,
    read_states,
    verdict,
)

MARGIN_S = 30.0
"""By which PyTorch's time-outs are longer than ours."""
GRACE_S = 5.0
"""How long an answer to the roll call may take."""
TICK_S = 0.5
"""Between two looks at the roll call."""
ASLEEP_S = 5.0
"""A thread that was not run for this long does not know what was late."""
LEAVING_S = 20.0
"""How long a process may take to end once it has said why: closing NCCL's connections to a dead one hangs."""
RECORDED = "1000"
"""Collectives that the flight recorder keeps."""
LOST = ("gloo/", "NCCL", "onnection closed by peer", "onnection reset by peer", "onnection refused")
"""What is in the messages of PyTorch's backends when another process is gone or does not answer."""


def limit_start(strategy: Strategy, seconds: float) -> None:
    """Sets how long the processes wait for each other, before the Trainer connects them.

    Lightning's strategies take it in their constructors, but the Trainer makes that of `strategy=ddp` itself.
    """
    if hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=seconds)


def watch_ranks(
    trainer: pl.Trainer, run: Path, startup_s: float, step_s: float, facts: Callable[[], dict[str, Any]]
) -> RankWatch | None:
    """Gives a Trainer of several ranks its time-outs and a `RankWatch`; None where there is one rank."""
    if trainer.world_size == 1:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    at = next(number for number, callback in enumerate(callbacks) if isinstance(callback, Checkpoints))
    due = partial(getattr, callbacks[at], "due")
    watch = RankWatch(run, trainer.world_size, startup_s, step_s, facts(), saving=due)
    callbacks.insert(at, watch)  # behind `BetweenSteps`: a step begins when the save before it is done
    limit_start(trainer.strategy, startup_s)
    record_flights(run)
    return watch


def facts(config: dict[str, Any], data: DialogueDataModule, start: Path | None, step: int) -> dict[str, Any]:
    """What all ranks must have alike.

    Args:
        config: the decisive keys of the configuration, see `folder.decisive`.
        data: the corpus; compared by the hashes of its splits and of its tokenizer.
        start: the checkpoint or model folder that the run starts from.
        step: the step that it resumes from.
    """
    from plato2 import __version__

    hashes = {key: value for key, value in data.identity.items() if key != "path"}
    names = {"sha256": "training split", "valid_sha256": "validation split", "tokenizer_sha256": "tokenizer"}
    return {
        "version of plato2": __version__,
        "version of torch": torch.__version__,
        **{key: value for key, value in config.items() if key != "data.path"},  # compared by its hashes
        **{f"data ({names.get(key, key)}, sha256)": value for key, value in hashes.items()},
        "start (sha256 of the weights)": read_sha256(start) if start else [],
        "resume (step)": step,
    }


@dataclass(frozen=True)
class Position:
    """Where this rank is."""

    step: int
    phase: Phase
    since: float
    """By the monotonic clock."""
    moves: int = 0
    """Phases before this one."""


class RankWatch(Callback):
    """Meets the other ranks, traces this one's steps, and ends it when another one has stopped.

    Args:
        run: the run folder.
        world: how many ranks there are.
        startup_s: what a start, the first step, a save or a load may take.
        step_s: what a step may take.
        facts: what all ranks must have alike.
        saving: whether a checkpoint is about to be written.
    """

    def __init__(
        self,
        run: Path,
        world: int,
        startup_s: float,
        step_s: float,
        facts: dict[str, Any],
        saving: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run, self.startup_s, self.step_s, self.facts, self.saving = run, startup_s, step_s, facts, saving
        self.met, self.stepped, self.saved, self.failed, self.leaving = False, False, False, False, ""
        self.attempt, self.rank, self.world = "", 0, world
        self.trace: Trace | None = None
        self.position = Position(0, "start", time.monotonic())
        self.lock, self.stopped = threading.Lock(), threading.Event()

    # ------------------------------------------------------------------------------------------- the meeting

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Meets the others: all are connected, and their data are open.

        Raises:
            RankError: they were started with different things, on every rank.
        """
        self._meet(trainer)
        limit_groups(groups(trainer.strategy), self.startup_s + MARGIN_S)
        self._go("start", 0)
        self.trace = Trace(self.run, self.rank, self.world, self.attempt)

    def _meet(self, trainer: pl.Trainer, problem: str = "") -> None:
        self.met, self.rank = True, trainer.global_rank
        if self.rank == 0:
            with suppress(OSError):
                folder_of(self.run).mkdir(parents=True, exist_ok=True)
                self._roll.write_bytes(b"")
        trainer.strategy.barrier("meeting")
        mine = Arrival(socket.gethostname(), uuid.uuid4().hex[:12], time.time(), self.facts, problem)
        arrived: list[Any] = [None] * self.world
        distributed.all_gather_object(arrived, mine)
        self.attempt = arrived[0].attempt
        if told := disagreement(arrived):
            raise RankError(told)

    # ------------------------------------------------------------------------------------------ where it is

    def _go(self, phase: Phase, step: int | None = None) -> None:
        at = self.position
        self.saved |= at.phase == "save"
        self.position = Position(at.step if step is None else step, phase, time.monotonic(), at.moves + 1)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is read."""
        self._go("start")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored."""
        self._go("start", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        if self.stepped:
            limit_groups(groups(trainer.strategy), self.step_s + MARGIN_S)
        self._go("step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is finished."""
        self._go("between", trainer.global_step)
        self.stepped = True
        limit_groups(groups(trainer.strategy), self.startup_s + MARGIN_S)
        if self.trace:
            self.trace.write("step", trainer.global_step, "between")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self._go("validation", trainer.global_step)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """A validation goes on."""
        self._go("validation", trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What happens beside it comes next, on the first rank only."""
        self._go("validation", trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is written."""
        self._go("save", trainer.global_step)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tells the others why this rank ends."""
        told = (str(exception).splitlines() or [""])[0] or type(exception).__name__
        if not isinstance(exception, Exception):
            return
        if is_lost(exception):
            self.explain(exception)
        elif not self.met and distributed.is_initialized():  # the others are about to meet
            with suppress(RankError):
                self._meet(trainer, told)
        elif self.trace:
            self.failed = True
            self.trace.write("failed", self.position.step, self.position.phase, error=told)

    # ------------------------------------------------------------------------------------------- the watching

    def begin(self) -> None:
        """Begins the watching, before there is a connection to another rank."""
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def limit_s(self) -> float:
        """What the phase at hand may take."""
        if not self.trace:  # PyTorch's own time-out, where it holds, knows the reason
            return self.startup_s + GRACE_S
        in_steps = self.position.phase in ("step", "between") and self.stepped and not self.saving()
        return self.step_s if in_steps else self.startup_s

    def _watch(self) -> None:
        """Ends this process when it does not go on, or when another one calls the roll."""
        tick = min(TICK_S, self.step_s / 10, self.startup_s / 10)
        seen = awake = time.monotonic()
        while not self.stopped.wait(tick) and not self.failed:
            before, seen = seen, time.monotonic()
            if seen - before > tick + ASLEEP_S:  # all of the job was stopped for a while, as Slurm can
                awake = seen
            late = seen - max(self.position.since, awake) > self.limit_s
            if not late and not (self.trace and self._called()):
                continue
            with self.lock:
                if not self.leaving and not self.failed and not self.stopped.is_set():
                    told = self._told("late" if late else "alive") if self.trace else self._not_met()
                    self._leave(told)
            break
        if self.leaving:  # the main thread says it, but GPUs that wait for each other can hold it up
            if not self.stopped.wait(LEAVING_S):
                self._leave(self.leaving)
            threading.main_thread().join()
            time.sleep(LEAVING_S)
            os._exit(2)

    def explain(self, error: Exception) -> str:
        """Who is to blame for a broken connection; nothing, if `error` is none."""
        if not is_lost(error) or not distributed.is_initialized():
            return ""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:  # of torchrun or srun, which end the others when one is gone
                signal.signal(number, signal.SIG_IGN)
        if not self.trace:
            return self._not_met()
        with self.lock:
            self.leaving = self.leaving or self._told("lost", (str(error).splitlines() or [""])[0][:200])
            return self.leaving

    def _not_met(self) -> str:
        if not distributed.is_initialized():
            return not_together(self.world, self.startup_s)
        return (
            f"another rank stopped before all {self.world} had met, or did not come within "
            f"{self.startup_s:g} s (startup_timeout_s); its own message says why"
        )

    def stop(self) -> None:
        """Ends the watching."""
        if self.trace and not self.leaving and not self.failed:
            self.trace.write("end", self.position.step, self.position.phase)
        self.stopped.set()

    @property
    def _roll(self) -> Path:
        return folder_of(self.run) / "roll_call"

    def _called(self) -> bool:
        """Opened, not only asked for its size: so file systems of other machines look again."""
        try:
            with self._roll.open("rb") as file:
                return os.fstat(file.fileno()).st_size > 0
        except OSError:
            return False

    def _told(self, event: Event, error: str = "") -> str:
        """Answers the roll, calls it, and reads the other answers."""
        now, at = time.monotonic(), self.position
        with suppress(OSError), self._roll.open("ab") as file:
            file.write(f"{self.rank}\n".encode())
        record = flight_record()
        more = {"waited_s": round(now - at.since, 1), "moves": at.moves, "error": error}
        assert self.trace
        self.trace.write(event, at.step, at.phase, collectives=collectives(record), **more)
        if record:
            with suppress(OSError):
                replace_text(self.trace.flight, record)
        while True:
            states = read_states(self.run, self.attempt)
            done = len(states) == self.world and all(state.answered for state in states)
            if done or time.monotonic() - now > GRACE_S or any(s.last.event == "failed" for s in states):
                told = f"{verdict(states, self.world)}; {self._go_on(states)}"
                return f"{told} ({VERBS} report {self.run} shows all ranks)"
            time.sleep(0.1)

    def _go_on(self, states: list[RankState]) -> str:
        """What becomes of the run: a Slurm job whose rank is gone or hangs goes back into the queue.

        The first rank that answered asks for it, if the run has saved since it began: what fails again before
        that would be queued for ever. torchrun starts its processes again by itself.
        """
        by_hand = "the same command resumes from the last checkpoint"
        if any(state.last.event == "late" for state in states) and all(state.answered for state in states):
            key = "step_timeout_s" if self.limit_s == self.step_s else "startup_timeout_s"
            by_hand += f"; if it may take longer than {self.limit_s:g} s, raise {key}"
        job, by_torchrun = slurm_job(), "TORCHELASTIC_RESTART_COUNT" in os.environ
        events = {state.rank: state.last.event for state in states if state.answered}
        if not job or by_torchrun or not self.saved or "failed" in events.values():
            return by_hand
        if self.rank != min(events):
            return f"rank {min(events)} asks Slurm to requeue job {job}"
        return back_in_the_queue(job)

    def _leave(self, told: str) -> None:
        """Ends this process from beside its main thread, which waits for what will not come."""
        leave_report(told)
        os.write(2, f"error: {told}\n".encode())
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(2)


@contextmanager
def watched(watch: RankWatch | None) -> Iterator[None]:
    """Turns a broken connection into the line that names the rank behind it.

    Raises:
        RankError: another rank stopped.
    """
    try:
        if watch:
            watch.begin()
            meet_afresh(watch.startup_s)
        yield
    except Exception as error:
        if watch and not isinstance(error, UserError) and (told := watch.explain(error)):
            raise RankError(told) from error
        raise
    finally:
        if watch:
            watch.stop()


def not_together(world: int, seconds: float, reason: str = "") -> str:
    """Why a run does not start: not all of its processes came to the address of the first one."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    why = f" ({reason})" if reason else ""
    return (
        f"strategy: {world} processes were to start together at {address} within {seconds:g} s "
        f"(startup_timeout_s), but some did not{why}; the first one (rank 0) says why it failed or does not "
        "run"
    )


def meet_afresh(seconds: float) -> None:
    """Where torchrun may restart the processes: agrees on a new address at which they connect.

    Until PyTorch 2.13 the restarted processes share the store of the ones before them, find those' addresses
    in it, and wait for each other in vain (pytorch/pytorch#135712). torchrun's count of restarts is no common
    name for an attempt, since each machine has its own. So each rank leaves a new mark, the first one makes a
    list of them with a new name, and when all ranks have found their marks in one list, that one is complete.

    Args:
        seconds: how long to wait for the others.

    Raises:
        DistError: they did not come.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not of_agent or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit, until = timedelta(seconds=seconds), time.monotonic() + seconds
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(host, port, is_master=False, timeout=limit)
    mark, named, marks = uuid.uuid4().hex, "", [""]
    store.set(f"plato2/mark/{rank}", mark)
    while time.monotonic() < until:
        if rank == 0 and store.check([f"plato2/mark/{other}" for other in range(world)]):
            found = [store.get(f"plato2/mark/{other}").decode() for other in range(world)]
            if found != marks:
                marks, named = found, uuid.uuid4().hex
                store.set("plato2/list", f"{named} {' '.join(marks)}")
            if store.check([f"plato2/{named}/{other}" for other in range(world)]):
                store.set(f"plato2/{named}/port", str(_free_port()))
        name, *listed = store.get("plato2/list").decode().split() if store.check(["plato2/list"]) else [""]
        if mark in listed:
            store.set(f"plato2/{name}/{rank}", "here")
            if store.check([f"plato2/{name}/port"]):
                os.environ["MASTER_PORT"] = store.get(f"plato2/{name}/port").decode()
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # of which rank 0 makes a new one there
                return
        time.sleep(0.05)
    raise distributed.DistStoreError("not all of them left a mark in torchrun's store")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process is gone, or does not answer."""
    is_networks = isinstance(error, distributed.DistError)
    return is_networks or (isinstance(error, RuntimeError) and any(word in str(error) for word in LOST))


def groups(strategy: Strategy) -> list[distributed.ProcessGroup]:
    """The process groups of a strategy: that of all ranks, and those of FSDP2's mesh."""
    found = [distributed.group.WORLD]
    with suppress(AttributeError, RuntimeError):  # DDP has no mesh; FSDP2 none yet
        found += strategy.device_mesh.get_all_groups()  # type: ignore[attr-defined]
    return [group for group in found if group is not None]


def limit_groups(found: list[distributed.ProcessGroup], seconds: float) -> None:
    """Sets what collectives that begin from now on may take, on gloo and on NCCL."""
    for group in found:
        group.set_timeout(timedelta(seconds=seconds))


def record_flights(run: Path) -> None:
    """Lets PyTorch record the last collectives, before it makes a process group.

    On a time-out of its own, which comes later than ours, NCCL writes them as well, as a pickle for
    `torchfrtrace`.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    name, ours = "TORCH_FR_DUMP_TEMP_FILE", "ranks/nccl_trace_rank_"
    if os.environ.get(name, ours).endswith(ours):  # not the user's, but perhaps that of the run before
        os.environ[name] = str(run.absolute() / ours)


def flight_record() -> str:
    """The last collectives of this process as JSON; empty where this PyTorch has no recorder of them."""
    from torch._C import _distributed_c10d as c10d  # there is no public name for it

    is_nccl = "nccl" in str(distributed.get_backend())
    dump = getattr(c10d, "_dump_nccl_trace_json" if is_nccl else "_dump_fr_trace_json", None)
    try:
        return dump().decode("utf-8", "replace") if dump else ""
    except Exception:  # whatever it is, who is missing is to be said all the same
        return ""


def collectives(record: str) -> int | None:
    """How many collectives a rank has begun, over all process groups."""
    try:
        status = json.loads(record)["pg_status"]
        return sum(max(0, int(group["last_enqueued_collective"])) for group in status.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
