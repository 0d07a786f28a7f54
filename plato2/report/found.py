"""What lies in folders: runs, and the results of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plato2.config import UserError
from plato2.evaluate.results import FORMAT, Result, read_result
from plato2.evaluate.runs import find_runs
from plato2.report.sweep import SweepOfRuns, is_sweep, sweep_runs, sweeps
from plato2.runs.console import say
from plato2.runs.folder import RunFolder

HEAD_BYTES = 200
"""A result file says in its first line what it is."""


@dataclass(frozen=True)
class Found:
    """What a report is made of."""

    runs: list[Path]
    """Newest first."""
    results: list[tuple[Path, Result]]
    """In the order of their names."""
    sweeps: list[SweepOfRuns] = field(default_factory=list)
    """Of the folders that are a sweep's, by stage."""


def find(places: Sequence[Path]) -> Found:
    """Runs and results in folders and below them; a result file may be given itself.

    A file that is damaged, or of another version, is skipped with a warning that says why.

    Raises:
        UserError: a place that does not exist, or nothing to report in any of them.
    """
    folders = [place for place in places if place.is_dir()]
    files = [place for place in places if place.is_file()]
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such folder; give folders with runs or results of plato2 evaluate")
    results = [(path, read_result(path)) for path in files]
    for folder in folders:
        for depth in ("", "*/", "*/*/"):
            for path in sorted(folder.glob(f"{depth}*.json")):
                if not _is_result(path):
                    continue
                try:
                    results.append((path, read_result(path)))
                except UserError as error:
                    say(f"warning: skipped: {error}")
    others = [folder for folder in folders if not is_sweep(folder)]
    of_sweeps, swept = [], []
    for folder in (folder for folder in folders if is_sweep(folder)):
        try:
            swept += sweep_runs(folder)[1]
        except UserError as error:  # such as a sweep whose command was refused
            if len(places) == 1:
                raise
            say(f"warning: skipped: {error}")
        else:
            of_sweeps.append(folder)
    with_runs = others if any(_has_runs(folder) for folder in others) else []
    runs = find_runs([*with_runs, *swept]) if with_runs or swept else []
    if not runs and not results:
        told = ", ".join(map(str, places))
        raise UserError(
            f"{told}: no runs and no results in it; train (python train.py experiment=quickstart), or write "
            "results there (plato2 evaluate ... --out FILE)"
        )
    return Found(runs, results, [sweep for folder in of_sweeps for sweep in sweeps(folder)])


def last_curriculum(output_dir: Path) -> list[Path]:
    """The runs of the curriculum that was begun last, the newest first.

    Raises:
        UserError: there are no runs.
    """
    runs = find_runs([output_dir])
    names = {run: RunFolder(run).lineage().get("curriculum") for run in runs}
    return [run for run in runs if names[run] == names[runs[0]]]


def _has_runs(folder: Path) -> bool:
    return any(next(folder.glob(f"{depth}lineage.json"), None) for depth in ("", "*/", "*/*/"))


def _is_result(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return FORMAT.rpartition(" ")[0].encode() in file.read(HEAD_BYTES)
    except OSError:
        return False
