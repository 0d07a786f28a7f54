"""What each rank of a run did last, as lines of JSON that the others read when one of them stops.

    <run>/ranks/rank_3.jsonl          a line a step, and one when it starts, ends, fails or waits too long
    <run>/ranks/rank_3.flight.json    its last collectives: PyTorch's flight recorder, written on a time-out
    <run>/ranks/roll_call             not empty: a rank has noticed that another one stopped, and asks all

Nothing here compares the clocks of two machines, and nothing needs torch: the report reads the same lines.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from plato2.bounded import read_file
from plato2.config import UserError
from plato2.files import replaced
from plato2.formats import Count, Open, parse

Phase = Literal["start", "between", "step", "validation", "save"]
"""What a rank is in: `between` = behind one step, before the next one (reading its data)."""
Event = Literal["start", "step", "alive", "late", "lost", "failed", "end"]
"""`alive`: an answer to the roll call; `late`: its own time-out; `lost`: its connection to another one."""
ANSWERS = ("alive", "late", "lost", "failed", "end")
TRACE_BYTES = 1 << 18
"""A longer trace is cut to its newer half: some 2,000 steps."""
MOST_RANKS = 1 << 16
MOST_BYTES = 1 << 20
"""The longest trace that is read."""


class RankError(UserError):
    """What one rank of several did; every rank says it."""


class Line(Open):
    """A line of a trace."""

    event: Event
    step: Count = 0
    """Finished steps."""
    phase: Phase = "between"
    at: Annotated[float, Field(ge=0, le=1 << 36)]
    """Seconds since 1970 by the clock of its machine."""
    attempt: str = ""
    """Of `start`: the same for all ranks that were started together."""
    rank: Annotated[int, Field(ge=0, lt=MOST_RANKS)] = 0
    world: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    host: str = ""
    waited_s: float | None = None
    """How long it had not gone on when it wrote the line."""
    moves: Count = 0
    """How many phases it had begun: all ranks go through the same ones."""
    collectives: Count | None = None
    """How many it had begun, over all process groups."""
    error: str = ""


@dataclass(frozen=True)
class RankState:
    """What is known of a rank from its trace."""

    rank: int
    world: int
    host: str
    attempt: str
    last: Line

    @property
    def answered(self) -> bool:
        """Whether it is known how it ended, or that it was there when the roll was called."""
        return self.last.event in ANSWERS


def folder_of(run: Path) -> Path:
    """Where the traces of a run are."""
    return run / "ranks"


def flight_of(run: Path, rank: int) -> Path:
    """The file of a rank's last collectives."""
    return folder_of(run) / f"rank_{rank}.flight.json"


class Trace:
    """The trace of this rank; what cannot be written, on a full disk, is left out.

    Args:
        run: the run folder.
        rank: of this process.
        world: how many ranks there are.
        attempt: a name that all ranks of this start share.
    """

    def __init__(self, run: Path, rank: int, world: int, attempt: str) -> None:
        self.path = folder_of(run) / f"rank_{rank}.jsonl"
        self.size = 0
        self.file: FileIO | None = None  # kept open: on a shared file system, closing waits for the server
        self.first: dict[str, Any] = {
            "attempt": attempt,
            "rank": rank,
            "world": world,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            self.flight.unlink(missing_ok=True)  # of an earlier attempt
            self._open()
        self.write("start", 0, "start", **self.first)

    @property
    def flight(self) -> Path:
        """Where the last collectives of this rank are written."""
        return flight_of(self.path.parents[1], int(self.first["rank"]))

    def write(self, event: Event, step: int, phase: Phase, **more: Any) -> None:
        """Appends a line; one that others wait for is on the disk when this returns."""
        line = {"event": event, "step": step, "phase": phase, "at": round(time.time(), 3), **more}
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        with suppress(OSError):
            if self.size > TRACE_BYTES:
                self._cut()
            if self.file is None:
                return
            self.file.write(data)
            self.size += len(data)
            if event != "step":
                os.fsync(self.file.fileno())

    def _open(self) -> None:
        self.file = self.path.open("ab", buffering=0)
        self.size = self.file.tell()
        if self.size:
            self.size += self.file.write(b"\n")  # an earlier attempt may have been killed in a line

    def _cut(self) -> None:
        kept = self.path.read_bytes()[-TRACE_BYTES // 2 :].partition(b"\n")[2]
        begin = {"event": "start", "step": 0, "phase": "start", "at": round(time.time(), 3), **self.first}
        kept = (json.dumps(begin, ensure_ascii=False) + "\n").encode() + kept
        with replaced(self.path) as new:
            new.write_bytes(kept)
        self._open()


def read_state(path: Path) -> RankState | None:
    """What a trace says of the newest attempt; None where there is none.

    Raises:
        UserError: not a trace.
    """
    cure = "move it away"
    try:
        data = read_file(path, MOST_BYTES, cure)
    except (FileNotFoundError, NotADirectoryError):
        return None
    lines: list[Line] = []
    wrong: UserError | None = None
    for line in filter(None, data.split(b"\n")):
        try:
            lines.append(parse(Line, line, f"{path}: cannot be read", cure))
        except UserError as error:  # cut by a kill, or damaged
            wrong = error
    if wrong and not lines:
        raise wrong
    starts = [number for number, line in enumerate(lines) if line.event == "start"]
    if not starts:
        return None
    first, last = lines[starts[-1]], lines[-1]
    return RankState(first.rank, first.world, first.host, first.attempt, last)


def read_states(run: Path, attempt: str = "") -> list[RankState]:
    """The ranks of an attempt, in their order, by default the newest; what cannot be read is left out."""
    states = []
    for path in folder_of(run).glob("rank_*.jsonl"):
        with suppress(UserError):
            if state := read_state(path):
                states.append(state)
    newest = max(states, key=lambda state: state.last.at, default=None)
    wanted = attempt or (newest.attempt if newest else "")
    kept = [state for state in states if state.attempt == wanted]
    return sorted(kept, key=lambda state: state.rank)


# -------------------------------------------------------------------------------------- who stopped, in words


def verdict(states: Sequence[RankState], world: int) -> str:
    """One line that names the rank for which the others waited.

    In this order: a rank that says why it failed; one that did not answer; the one that is furthest behind.

    Args:
        states: what is known of the ranks, after the roll was called.
        world: how many there are.
    """
    found = {state.rank: state for state in states}
    failed = [state for state in states if state.last.event == "failed"]
    silent = [rank for rank in range(world) if rank not in found or not found[rank].answered]
    if failed:
        last = failed[0].last
        same = [state.rank for state in failed if state.last.error == last.error]
        return f"{named(same, world, states)} failed in {place(last)}: {' '.join(last.error.split())[:500]}"
    if silent:
        others = [state for state in states if state.rank not in silent]
        steps = [found[rank].last.step for rank in silent if rank in found]
        after = f"after step {min(steps):,}" if any(steps) else "before the first step was finished"
        gone = "does not answer (killed, or its machine is gone)"
        if len(silent) > 1:
            gone = "do not answer (killed, or their machines are gone)"
        return f"{named(silent, world, states)} stopped {after} and {gone}; {_waiting(others)}"
    behind = _behind(states)
    if not behind:
        return f"all {world} ranks answer, none is behind, and no collective ends; {_waiting(states, 'they')}"
    others = [state for state in states if state not in behind]
    last = behind[0].last
    is_in = "has not begun the next one" if last.phase == "between" else f"is in {place(last)}"
    fewer = _collectives(others) - _collectives(behind)
    began = f", {fewer} collectives behind" if last.phase == others[0].last.phase and fewer > 0 else ""
    return (
        f"{named([state.rank for state in behind], world, states)} stopped after step {last.step:,} "
        f"({is_in}{began}); {_waiting(others)}"
    )


def _behind(states: Sequence[RankState]) -> list[RankState]:
    """The ranks that have done least, by steps, phases, collectives; none where all did the same."""
    done = {state.rank: (state.last.step, state.last.moves, state.last.collectives or 0) for state in states}
    least, most = min(done.values()), max(done.values())
    return [] if least == most else [state for state in states if done[state.rank] == least]


def named(ranks: Iterable[int], world: int, states: Sequence[RankState]) -> str:
    """`rank 3 of 4 on HOST`, `ranks 8-15 of 64 on HOST`."""
    numbers = sorted(ranks)
    hosts = ", ".join(dict.fromkeys(state.host for state in states if state.rank in numbers))
    return f"rank{'s' * (len(numbers) > 1)} {ranges(numbers)} of {world}" + (f" on {hosts}" if hosts else "")


def ranges(ranks: Iterable[int]) -> str:
    """`0, 8-15`."""
    parts: list[list[int]] = []
    for number in sorted(ranks):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def place(line: Line) -> str:
    """What a rank was in, in words."""
    return {
        "start": "the start",
        "between": f"the work between steps {line.step:,} and {line.step + 1:,}",
        "step": f"step {line.step + 1:,}",
        "validation": f"the validation after step {line.step:,}",
        "save": f"the checkpoint of step {line.step:,}",
    }[line.phase]


def _waiting(others: Sequence[RankState], they: str = "the others") -> str:
    """How long the others waited, and where."""
    if not others:
        return "nobody answers"
    line = others[0].last
    waited = max(state.last.waited_s or 0.0 for state in others)
    verb = f"waited {waited:.0f} s" if waited >= 1 else "were"
    return f"{they} {verb} in {place(line)}"


def _collectives(states: Sequence[RankState]) -> int:
    return max((state.last.collectives or 0 for state in states), default=0)


# ----------------------------------------------------------------------------- whether all were started alike

CLOCKS_S = 60.0
"""Clocks that differ by more are wrong."""
CURES = {
    "version": "install the same one on all machines",
    "data": "give all ranks the same prepared corpus",
    "resume": "all machines must see the same run folder; wait until they do, and start again",
    "start": "all ranks must start from the same weights",
}
"""By the first word of a fact's name; of all others: the configuration."""


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself when all meet."""

    host: str
    attempt: str
    clock: float
    facts: dict[str, Any]
    problem: str = ""


def disagreement(arrivals: Sequence[Arrival]) -> str:
    """What keeps the ranks from training together, in one line that names a rank; nothing if they can.

    Args:
        arrivals: of all ranks, in their order.
    """
    world = len(arrivals)

    def who(ranks: Iterable[int]) -> str:
        numbers = sorted(ranks)
        hosts = ", ".join(dict.fromkeys(arrivals[rank].host for rank in numbers))
        return f"{named(numbers, world, [])} on {hosts}"

    problems = [rank for rank, arrival in enumerate(arrivals) if arrival.problem]
    if problems:
        first = arrivals[problems[0]].problem
        return f"{who(rank for rank in problems if arrivals[rank].problem == first)}: {first}"
    keys = list(dict.fromkeys(key for arrival in arrivals for key in arrival.facts))
    differing = []
    for key in keys:
        values = [json.dumps(arrival.facts.get(key), sort_keys=True) for arrival in arrivals]
        if len(set(values)) > 1:
            differing.append((key, values))
    if differing:
        key, values = differing[0]
        usual = max(Counter(values).items(), key=lambda item: (item[1], item[0] == values[0]))[0]
        odd = next(value for value in values if value != usual)
        ranks = [rank for rank, value in enumerate(values) if value == odd]
        rest = "rank 0" if world == 2 and 1 in ranks else "rank 1" if world == 2 else "most others"
        more = f" ({len(differing) - 1} more keys differ)" if differing[1:] else ""
        cure = CURES.get(key.split(" ")[0], "give all ranks the same command and configuration")
        shown, others = (value.strip('"')[:80] for value in (odd, usual))
        return f"{key}={shown} on {who(ranks)}, {others} on {rest}{more}: {cure}"
    clocks = sorted(arrival.clock for arrival in arrivals)
    middle = clocks[world // 2] if world > 2 else arrivals[0].clock
    wrong = [rank for rank, arrival in enumerate(arrivals) if abs(arrival.clock - middle) > CLOCKS_S]
    if wrong:
        off = arrivals[wrong[0]].clock - middle
        told = f"{abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} the others'"
        return (
            f"the clock of {who(wrong)} is {told}: set it right (NTP), or leave that machine out; times of "
            "files and records would be wrong"
        )
    return ""
