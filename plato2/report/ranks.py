"""What each rank of a run did last, from the lines and the flight records in `<run>/ranks`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from plato2.bounded import read_file
from plato2.config import UserError
from plato2.formats import JSON_BYTES, Open, parse
from plato2.report.page import Block, Paragraph, Section, Table
from plato2.runs.console import say
from plato2.runs.traces import (
    Line,
    RankState,
    flight_of,
    folder_of,
    named,
    place,
    ranges,
    read_states,
    verdict,
)

ENDS = {
    "start": "started",
    "step": "no further line",
    "alive": "answered the others",
    "late": "its own time-out",
    "lost": "lost its connection",
    "failed": "failed",
    "end": "ended",
}
"""What the last line of a trace says."""


class Collective(Open):
    """An entry of a flight record."""

    profiling_name: str
    process_group: list[str] = Field(default_factory=list)
    collective_seq_id: int = 0
    input_sizes: list[list[int]] = Field(default_factory=list)


class FlightRecord(Open):
    """A flight record, as PyTorch writes it."""

    entries: list[Collective] = Field(default_factory=list)
    pg_status: dict[str, dict[str, Any]] = Field(default_factory=dict)


def rank_sections(runs: Sequence[Path]) -> list[Section]:
    """A section for each run of several ranks."""
    return [
        Section(f"Ranks of {run.parent.name}/{run.name}", blocks) for run in runs if (blocks := ranks(run))
    ]


def ranks(run: Path) -> list[Block]:
    """Who stopped, where all of them were, and their last collectives; nothing for a run of one rank."""
    states = read_states(run)
    if not states:
        return []
    blocks: list[Block] = [Paragraph(summary(states), strong=True), _last_lines(states)]
    if flights := _flights(run, states):
        blocks.append(flights)
    pickles = sorted(folder_of(run).glob("nccl_trace_rank_*"))
    if pickles:
        where = folder_of(run)
        blocks.append(
            Paragraph(f"NCCL's own records of {len(pickles)} ranks: torchfrtrace -p nccl_trace_rank_ {where}")
        )
    return blocks


def rank_facts(run: Path) -> dict[str, Any]:
    """The same as plain values, for `--json`; nothing for a run of one rank."""
    states = read_states(run)
    if not states:
        return {}
    return {
        "run": str(run),
        "summary": summary(states),
        "world": states[0].world,
        "without_a_trace": _missing(states),
        "ranks": [_facts(run, state) for state in states],
        "nccl_records": [str(path) for path in sorted(folder_of(run).glob("nccl_trace_rank_*"))],
    }


def _facts(run: Path, state: RankState) -> dict[str, Any]:
    record = _flight(run, state)
    own = {*Collective.model_fields}
    last = record.entries[-1].model_dump(include=own) if record and record.entries else None
    line = state.last.model_dump(include={"event", "step", "phase", "at", "waited_s", "collectives", "error"})
    return {"rank": state.rank, "host": state.host, **line, "last_collective": last}


def _missing(states: Sequence[RankState]) -> list[int]:
    return sorted({*range(states[0].world)} - {state.rank for state in states})


def summary(states: Sequence[RankState]) -> str:
    """The end of the newest attempt in one sentence."""
    world, steps = states[0].world, [state.last.step for state in states]
    if len(states) == world and all(state.last.event == "end" for state in states):
        return f"all {world} ranks ended after step {max(steps):,}"
    if not any(state.answered for state in states):
        return (
            f"training, or all {world} ranks were killed together; the last finished step is {max(steps):,}"
        )
    return verdict(states, world)


def _last_lines(states: Sequence[RankState]) -> Table:
    """Ranks that did the same are one row."""
    alike: dict[tuple[str, ...], list[RankState]] = defaultdict(list)
    for state in states:
        line = state.last
        alike[state.host, f"{line.step:,}", place(line), ENDS[line.event], line.error].append(state)
    rows = [
        [
            ranges(state.rank for state in same),
            host,
            step,
            "" if ended == ENDS["step"] else phase,
            ended,
            max((f"{state.last.waited_s:.0f} s" for state in same if state.last.waited_s), default=""),
            _time(min(same, key=lambda state: state.last.at).last),
            error,
        ]
        for (host, step, phase, ended, error), same in alike.items()
    ]
    header = ["ranks", "machine", "last step", "it was in", "last line", "waited", "at (UTC)", "error"]
    missing = _missing(states)
    caption = f"without a trace: {named(missing, states[0].world, [])}" if missing else ""
    return Table(header, rows, caption)


def _time(line: Line) -> str:
    return f"{datetime.fromtimestamp(line.at, UTC):%Y-%m-%d %H:%M:%S}"


def _flights(run: Path, states: Sequence[RankState]) -> Table | None:
    """How many collectives each rank had begun, and its last one; the one with fewest holds up the others."""
    rows = []
    for state in states:
        record = _flight(run, state)
        if record is None:
            continue
        last = record.entries[-1] if record.entries else None
        begun = state.last.collectives
        rows.append(
            [
                str(state.rank),
                "" if begun is None else f"{begun:,}",
                "" if last is None else last.profiling_name,
                "" if last is None else " ".join("x".join(map(str, size)) for size in last.input_sizes),
                "" if last is None else f"{last.collective_seq_id:,} of {' '.join(last.process_group)}",
            ]
        )
    header = ["rank", "collectives begun", "the last one", "of size", "number and group"]
    caption = "Flight records: a rank that has begun fewer collectives than the others is who they wait for"
    return Table(header, rows, caption) if rows else None


def _flight(run: Path, state: RankState) -> FlightRecord | None:
    try:
        return read_flight(flight_of(run, state.rank))
    except FileNotFoundError:
        return None
    except UserError as error:
        say(f"warning: skipped: {error}")
        return None


def read_flight(path: Path) -> FlightRecord:
    """A flight record.

    Raises:
        UserError: not one.
        FileNotFoundError: there is none.
    """
    cure = "move it away"
    return parse(FlightRecord, read_file(path, JSON_BYTES, cure), f"{path}: cannot be read", cure)
