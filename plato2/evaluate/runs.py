"""Runs beside each other: what each is, what it reached, and how their configurations differ.

Everything is read from `lineage.json` and `metrics.csv`, without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plato2.config import UserError, did_you_mean, dotted
from plato2.runs.console import number, say
from plato2.runs.folder import NOT_PART_OF_A_RUN, RunFolder
from plato2.runs.saved import best_direction, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNSAID = ("logger", "name", "model_name", *NOT_PART_OF_A_RUN)
"""Keys whose values say nothing of what a run is."""
TOLD = 6
"""Keys that a table of any runs tells at most."""
MOST_TELLING = ("optim.", "stage.", "model.", "seed", "data.path")
"""Beginnings of the keys that a table tells first."""
FILLED_IN = "model.architecture"
"""All of a pretrained decoder's config.json, which `model.path` stands for."""
NAMED = 10
"""Runs of a stage that a picture names, each with a colour of its own; of more than that the best."""


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    path: str
    stage: str
    status: str
    created: str
    parent: str | None
    """Name of the run, or path of the model folder, that it started from."""
    step: int | None
    """The last one that was logged."""
    monitor: str
    best: float | None
    """The best value of `monitor`."""
    best_step: int | None
    differs: dict[str, Any]
    """Keys in which the runs of its stage differ, and its values."""


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The run folders among some folders and below them, newest first.

    Raises:
        UserError: a folder does not exist, or none of them holds a run.
    """
    created: dict[Path, str] = {}
    places = list(places)
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder; give run folders, or a folder with runs below it")
        for depth in ("", "*/", "*/*/"):
            for record in place.glob(f"{depth}lineage.json"):
                if (when := _created(record.parent)) is not None:
                    created[record.parent] = when
    if not created:
        told = ", ".join(map(str, places))
        raise UserError(f"{told}: there are no runs; python train.py experiment=quickstart trains the first")
    return sorted(created, key=lambda path: created[path], reverse=True)


def compare(paths: Sequence[Path], monitor: str | None = None) -> list[Run]:
    """A line for each run, in the order given.

    Args:
        paths: run folders.
        monitor: a metric to compare them by, instead of each stage's own.

    A run whose `metrics.csv` is damaged is skipped with a warning.

    Raises:
        UserError: a record that cannot be read, or no run is left.
    """
    logged = _readable(paths)
    if paths and not logged:
        raise UserError(f"{', '.join(map(str, paths))}: no metrics.csv can be read, so nothing is compared")
    lineages = {path: RunFolder(path).lineage() for path in logged}
    flat = {path: _said(lineage.get("config") or {}) for path, lineage in lineages.items()}
    found = []
    for path, lineage in lineages.items():
        stage = str(lineage.get("stage"))
        alike = [flat[other] for other in logged if lineages[other].get("stage") == stage]
        keys = sorted({key for config in alike for key in config})
        differing = [key for key in keys if len({repr(config.get(key)) for config in alike}) > 1]
        metric, direction = lineage.get("monitor") or ("val/loss", "min")
        if monitor is not None:
            metric, direction = monitor, best_direction(monitor)
        rows = logged[path]
        values = _finite(rows, metric)
        best = (min if direction == "min" else max)(values, key=lambda row: row[1], default=(None, None))
        found.append(
            Run(
                path=str(path),
                stage=stage,
                status=str(lineage.get("status")),
                created=str(lineage.get("created", "")),
                parent=_parent(lineage.get("parent")),
                step=max((step for step, _, _ in rows), default=None),
                monitor=metric,
                best=best[1],
                best_step=best[0],
                differs={key: flat[path].get(key) for key in differing},
            )
        )
    return found


def check_logged(runs: Sequence[Run]) -> None:
    """Refuses a metric that no run has a value of.

    Raises:
        UserError: names it, and the nearest that they have logged.
    """
    if all(run.best is None for run in runs):
        known = sorted({name for run in runs for _, name, _ in _rows(Path(run.path))})
        raise UserError(f"{runs[0].monitor}: no run has logged it; {did_you_mean(runs[0].monitor, known)}")


def winners_first(runs: Sequence[Run]) -> list[Run]:
    """Runs stage by stage, the best of each first; those without a value last."""

    def place(run: Run) -> tuple[str, float]:
        value = math.inf if run.best is None else run.best
        return run.stage, -value if run.best is not None and best_direction(run.monitor) == "max" else value

    return sorted(runs, key=place)


def runs_tables(runs: Sequence[Run], most: int | None = None) -> list[Table]:
    """The runs as a table for each stage; a name that all runs of it share goes to the top.

    Args:
        runs: as `compare` gives them.
        most: keys that a table tells at most; None = all that tell runs of one name apart.
    """
    return [
        _table([run for run in runs if run.stage == stage], most)
        for stage in dict.fromkeys(run.stage for run in runs)
    ]


def telling_keys(runs: Sequence[Run]) -> list[str]:
    """Keys in which runs of one name, such as `tiny-1_coarse`, differ: what differs between names these say.

    The most telling first; of those that always change together, as with an experiment, one comes before the
    next that changes otherwise.
    """
    names = [Path(run.path).parent.name for run in runs]
    changes: dict[str, tuple[int, ...]] = {}
    for key in sorted({key for run in runs for key in run.differs}):
        values = [repr(run.differs.get(key)) for run in runs]
        if len(set(zip(names, values, strict=True))) > len(set(names)):
            changes[key] = tuple(map(values.index, values))
    rank = {start: place for place, start in enumerate(MOST_TELLING)}
    ordered = sorted(changes, key=lambda key: min((rank[s] for s in rank if key.startswith(s)), default=9))
    first = dict.fromkeys(changes[key] for key in ordered)
    leading = [next(key for key in ordered if changes[key] == change) for change in first]
    return [*leading, *(key for key in ordered if key not in leading)]


def _table(runs: Sequence[Run], most: int | None) -> Table:
    keys = telling_keys(runs)
    told = keys[:most]
    names = {Path(run.path).parent.name for run in runs}
    title = names.pop() if len(names) == 1 else runs[0].stage
    table = Table(title=f"{title}, by {runs[0].monitor}", title_justify="left", title_style="bold")
    for heading in ("run", "steps", "best"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    table.add_column("from", overflow="fold")
    if told:
        table.add_column("what differs", overflow="fold")
    if left := len(keys) - len(told):
        table.caption, table.caption_justify = f"{left} more keys differ: --json has them", "left"
    for run in runs:
        path = Path(run.path)
        steps = "-" if run.step is None else f"{run.step:,}"
        table.add_row(
            path.name if not names else f"{path.parent.name}/\n{path.name}",
            steps if run.status == "finished" else f"{steps} ({run.status})",
            "-" if run.best is None else number(run.best),
            (run.parent or "-").rpartition("/")[2],
            *([" ".join(f"{key}={text_of(run.differs.get(key))}" for key in told)] if told else []),
        )
    return table


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draws the curves of the runs into an image.

    Raises:
        UserError: no run has logged what they are compared by, or the file cannot be written.
    """
    try:
        curves(runs).savefig(file)
    except (OSError, ValueError) as error:  # no such format
        raise UserError(f"{file}: cannot be written ({error}); give a file such as runs.png") from None


def curves(runs: Sequence[Run]) -> Figure:
    """What the runs are compared by over the steps, a panel for each stage.

    Raises:
        UserError: no run has logged it.
    """
    from matplotlib.figure import Figure

    check_logged(runs)
    logged = {run.path: _rows(Path(run.path)) for run in runs}
    shown = [run for run in runs if run.best is not None]
    stages = sorted({run.stage for run in shown})
    figure = Figure(figsize=(8, 4 * len(stages)), dpi=120, layout="tight")
    panels = figure.subplots(len(stages), squeeze=False)
    for stage, panel in zip(stages, panels[:, 0], strict=True):
        own = [run for run in shown if run.stage == stage]
        named = {run.path for run in (own if len(own) <= NAMED else winners_first(own)[:NAMED])}
        for run in own:
            steps, values = zip(*_finite(logged[run.path], run.monitor), strict=True)
            look: dict[str, Any] = {"label": "/".join(Path(run.path).parts[-2:]), "zorder": 2}
            if run.path not in named:
                look = {"color": "#c4c9ce", "linewidth": 0.8, "zorder": 1}
            panel.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3, **look)
            panel.set(xlabel="step", ylabel=run.monitor)
        others = f" (grey: all but the best {NAMED} of {len(own)})" if len(own) > NAMED else ""
        panel.set_title(f"{stage}{others}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", framealpha=0.7)
    return figure


def plain(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as plain values."""
    return [asdict(run) for run in runs]


def _created(path: Path) -> str | None:
    """When a run was begun; None for what is not a run, or cannot be read: it must not hide the others."""
    try:
        lineage = RunFolder(path).lineage()
    except UserError as error:
        say(f"warning: skipped: {error}")
        return None
    if not lineage:
        say(f"warning: skipped: {path / 'lineage.json'}: not the record of a run of this version of plato2")
        return None
    return str(lineage.get("created", ""))


def _readable(paths: Iterable[Path]) -> dict[Path, list[tuple[int, str, float]]]:
    """What the runs have logged, without those whose `metrics.csv` is damaged."""
    found = {}
    for path in paths:
        try:
            found[path] = _rows(path)
        except UserError as error:
            say(f"warning: skipped: {error}")
    return found


def _rows(path: Path) -> list[tuple[int, str, float]]:
    try:
        return read_metrics(path / "metrics.csv")
    except FileNotFoundError:  # logger=none, or nothing logged yet
        return []


def _finite(rows: Sequence[tuple[int, str, float]], metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value in rows if name == metric and math.isfinite(value)]


def _parent(parent: Any) -> str | None:
    if not isinstance(parent, dict):
        return None
    run = parent.get("run")
    return "/".join(Path(str(run)).parts[-2:]) if run else str(parent.get("checkpoint"))


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    said = dotted({key: value for key, value in config.items() if key not in UNSAID})
    said.pop(FILLED_IN, None)
    return said


def text_of(value: Any) -> str:
    """A value of the configuration as it is typed; the beginning of a drawn number (17 digits) or a hash."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    if isinstance(value, float) and len(repr(value)) > 8:
        return number(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
