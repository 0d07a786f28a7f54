"""The dashboard's panels, drawn from what runs have logged: several runs over each other, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.bounded import read_file
from plato2.config import UserError
from plato2.report.page import Block, Gallery, Legend, Paragraph, Picture, Section, Table
from plato2.runs.console import say
from plato2.runs.folder import RunFolder
from plato2.runs.panels import PANELS, Panel, shown_metrics
from plato2.runs.saved import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 300
"""Of a line; of a longer one each point is the mean of some neighbours."""
SIZE = (4.0, 2.8)
"""Of a picture, in inches: as wide as a telephone, so that its words need not shrink."""
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 4)))
"""Of the metrics of a panel; colours are runs."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""The same, of points: a single one has no dashes."""
MARKED = 30
"""A line of fewer points has a mark at each."""
REPLIES = 3
"""Of a run, those of its last validation that are shown."""
REPLIES_BYTES = 64 << 20
"""The largest `replies.jsonl` that is read."""
Logged = Mapping[str, Sequence[tuple[int, float]]]
"""Metric -> (step, value) of its finite values."""


def section(runs: Sequence[Path]) -> Section:
    """The panels with something in them; a run whose metrics cannot be read is left out, with a warning."""
    logged = {run: found for run in runs if (found := _logged(run))}
    stages = {run: str(RunFolder(run).lineage().get("stage")) for run in logged}
    colours = dict(zip(logged, _colours(len(logged)), strict=True))
    galleries: list[Block] = []
    for title, panels in PANELS.items():
        pictures = [
            drawn
            for panel in panels
            if panel.kind != "replies" and (drawn := _drawn(panel, logged, stages, colours))
        ]
        if pictures:
            galleries.append(Gallery(title, pictures))
    blocks: list[Block] = []
    if galleries:
        names = [(colours[run], f"{stages[run]}: {'/'.join(run.parts[-2:])}") for run in logged]
        note = f"A colour is a run. Of lines with more than {POINTS} values, a point is a mean of neighbours."
        blocks = [Paragraph(note), Legend(names), *galleries]
    if rows := [row for run in runs for row in _replies(run)]:
        header = ["run", "step", "context", "human", "candidate"]
        blocks.append(Table(header, rows, "replies at the last validation, the first candidate of each"))
    return Section("Dashboard", blocks)


def _logged(run: Path) -> Logged:
    try:
        rows = read_metrics(run / "metrics.csv")
    except FileNotFoundError:
        return {}
    except UserError as error:
        say(f"warning: skipped: {error}")
        return {}
    found: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in rows:
        if math.isfinite(value):
            found.setdefault(name, []).append((step, value))
    return found


def _colours(number: int) -> list[str]:
    """A colour for each run: of up to 20 those that are told apart best, of more those of a rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if number > 20:
        return [to_hex(colormaps["turbo"](0.05 + 0.9 * run / (number - 1))) for run in range(number)]
    table = colormaps["tab10" if number <= 10 else "tab20"]
    return [to_hex(table(run % table.N)) for run in range(number)]


def _drawn(
    panel: Panel, logged: Mapping[Path, Logged], stages: Mapping[Path, str], colours: Mapping[Path, str]
) -> Picture | None:
    """A panel; None where no run has anything of it."""
    shown = {
        run: names
        for run, metrics in logged.items()
        if panel.about(stages[run]) and (names := shown_metrics(panel, metrics))
    }
    if not shown:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=96)
    axes = figure.subplots()
    used: list[str] = []
    for run, names in shown.items():
        if panel.kind == "latents":
            last = [logged[run][name][-1][1] for name in names]
            axes.plot(range(len(last)), last, marker="o", markersize=3, linewidth=1, color=colours[run])
            continue
        for name in names:
            used += [name] if name not in used else []
            steps, values = zip(*thinned(logged[run][name]), strict=True)
            look = _look(panel, name) | ({} if len(steps) < MARKED else {"marker": None})
            axes.plot(steps, values, color=colours[run], linewidth=1.2, markersize=3, **look)
    _finish(figure, axes, panel, used)
    said = ", ".join(used) or "val/z_usage"
    return Picture(figure, f"{panel.title}: {said} of {len(shown)} run{'s' if len(shown) > 1 else ''}")


def _look(panel: Panel, name: str) -> dict[str, Any]:
    """Dashes and mark of a metric."""
    place = panel.metrics.index(name)
    return {"linestyle": DASHES[place % len(DASHES)], "marker": MARKS[place % len(MARKS)]}


def _finish(figure: Figure, axes: Axes, panel: Panel, used: Sequence[str]) -> None:
    """Title, axes, and which dashes and marks are which metric."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("latent" if panel.kind == "latents" else "step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 60, not 6 x 10^1
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.tick_params(which="minor", labelsize=9)
    axes.locator_params(axis="x", nbins=5)
    if len(used) > 1:
        lines = [Line2D([], [], color="#444", markersize=3, **_look(panel, name)) for name in used]
        axes.legend(lines, used, fontsize=8, framealpha=0.7)
    figure.subplots_adjust(left=0.19, right=0.97, top=0.9, bottom=0.18)


def thinned(line: Sequence[tuple[int, float]], points: int = POINTS) -> list[tuple[float, float]]:
    """A line with at most so many points: means of as many neighbours each, the last group maybe smaller.

    Args:
        line: (step, value).
        points: at most.
    """
    size = math.ceil(len(line) / points)
    groups = [line[first : first + size] for first in range(0, len(line), size)]
    return [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]


def _replies(run: Path) -> list[list[str]]:
    """Some replies of a run's last validation; none where there are none that can be read."""
    try:
        data = read_file(run / "replies.jsonl", REPLIES_BYTES, "move it away")
        lines = [json.loads(line) for line in data.decode("utf-8").splitlines()]
        last = [reply for reply in lines if reply["step"] == lines[-1]["step"]]
        return [_reply(run, reply) for reply in last[:REPLIES]]
    except FileNotFoundError:
        return []
    except (UserError, ValueError, KeyError, TypeError, IndexError) as error:  # damaged, or cut off by a kill
        say(f"warning: skipped: {run / 'replies.jsonl'}: {str(error) or type(error).__name__}")
        return []


def _reply(run: Path, reply: Mapping[str, Any]) -> list[str]:
    first = reply["candidates"][0]["text"] if reply["candidates"] else ""
    context = " / ".join(map(str, reply["context"]))
    return ["/".join(run.parts[-2:]), str(reply["step"]), context, str(reply["reference"]), str(first)]
