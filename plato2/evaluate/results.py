"""The one result file of every evaluation: written, read, shown as a table and as a picture.

A result is figures by system. A figure has a value, the 95 % interval where there is one, and how many cases
it rests on. `plato2 report` reads these files and nothing else of an evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from plato2 import __version__
from plato2.bounded import read_file
from plato2.config import UserError
from plato2.files import file_sha256, replace_text
from plato2.formats import JSON_BYTES, Closed, Count, parse
from plato2.talk.table import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

CURE = "give a file that plato2 evaluate --out wrote"
FORMAT = "plato2 evaluation 1"
_BETWEEN_COLUMNS = 3
"""Characters that a column takes beside its text: two blanks and a line."""
_EASY = 15
"""Characters of a cell that should stand on one line."""
PICTURES = (".png", ".svg", ".pdf")


class Figure(Closed):
    """One number. `value` is None where it is not defined, and `note` says why."""

    value: float | None
    low: float | None = None
    """The 95 % interval, from `low` to `high`."""
    high: float | None = None
    n: Count | None = None
    """Cases that it rests on; what a case is stands in the measure's label or the documents."""
    note: str = ""


class Measure(Closed):
    """What a figure means: for tables and pictures."""

    label: str
    digits: Count = 3
    """Behind the point."""
    better: Literal["high", "low", ""] = ""
    chance: float | None = None
    """What guessing gets."""


class Input(Closed):
    """A file or folder that was evaluated."""

    path: str
    sha256: str | None = None
    """None for a folder of a model."""


class Result(Closed):
    """An evaluation."""

    format: Literal["plato2 evaluation 1"] = "plato2 evaluation 1"
    plato2: str = __version__
    kind: str
    """The verb: replies, dialogues, selection, latents, human, judge, audit."""
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    inputs: list[Input] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    """All options that change a figure, the seed among them."""
    measures: dict[str, Measure]
    systems: dict[str, dict[str, Figure]]
    """System -> measure -> figure; a system may lack a measure."""
    details: dict[str, Any] = Field(default_factory=dict)
    """What does not fit into figures, such as tests between systems; each kind documents its own."""


def inputs(*paths: str | Path) -> list[Input]:
    """Paths with their hashes."""
    return [
        Input(path=str(path), sha256=file_sha256(Path(path)) if Path(path).is_file() else None)
        for path in paths
    ]


def write_result(path: Path, result: Result) -> None:
    """Writes the file, as `write_text`."""
    write_text(path, result.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the file of --out, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another file") from None


def read_result(path: str | Path) -> Result:
    """A result file.

    Raises:
        UserError: no such file, another format, or one of a newer plato2.
    """
    try:
        data = read_file(path, JSON_BYTES, CURE)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {CURE}") from None
    return parse(Result, data, str(path), CURE)


def text(figure: Figure | None, measure: Measure) -> str:
    """A figure for people: the value and its interval; its note where it has no value."""
    if figure is None:
        return ""
    if figure.value is None:
        return f"({figure.note})" if figure.note else "n/a"
    value = f"{figure.value:.{measure.digits}f}"
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({figure.low:.{measure.digits}f} to {figure.high:.{measure.digits}f})"


def result_table(result: Result, title: str = "", only: Sequence[str] = ()) -> Table:
    """Measures as rows, systems as columns; chance where there is one.

    Args:
        result: an evaluation.
        title: above the table.
        only: these measures; all by default.
    """
    heading = Text(printable(title or f"plato2 evaluate {result.kind}"), style="table.title")
    table = Table("measure", title=heading, title_justify="left")
    shown = {name: result.measures[name] for name in only or result.measures}
    with_chance = any(measure.chance is not None for measure in shown.values())
    for column in (*(["chance"] if with_chance else []), *result.systems):  # names are not markup
        table.add_column(Text(printable(column)), justify="right", overflow="fold")
    for name, measure in shown.items():
        if all(name not in figures for figures in result.systems.values()):
            continue
        chance = "" if measure.chance is None else f"{measure.chance:.{measure.digits}f}"
        cells = [text(figures.get(name), measure) for figures in result.systems.values()]
        table.add_row(Text(printable(measure.label)), *([chance] if with_chance else []), *cells)
    return table


def print_table(table: Table, console: Console) -> None:
    """Prints a table; where the terminal is too narrow for its words and numbers, as several.

    Each of them has some of the columns, and the first one again.
    """
    for part in _parts(table, console):
        console.print(part)


def _parts(table: Table, console: Console) -> list[Table]:
    cells = [[column.header, *column.cells] for column in table.columns]
    found = [[Measurement.get(console, console.options, cell) for cell in column] for column in cells]
    shortest = [
        max(cell.maximum if column.no_wrap else cell.minimum for cell in measured) + _BETWEEN_COLUMNS
        for column, measured in zip(table.columns, found, strict=True)
    ]
    if sum(shortest) < console.width or len(table.columns) < 3:
        return [table]
    # An interval on two lines, "0.744 (0.634" and "to 0.833)", is easy to read; on three it is not.
    wanted = [
        max(short, min(max(cell.maximum for cell in measured), _EASY) + _BETWEEN_COLUMNS)
        for short, measured in zip(shortest, found, strict=True)
    ]
    room = console.width - 1 - wanted[0]
    groups: list[list[int]] = [[]]
    for number in range(1, len(wanted)):
        if groups[-1] and sum(wanted[one] for one in [*groups[-1], number]) > room:
            groups.append([])
        groups[-1].append(number)
    parts = []
    for group in groups:
        shown = [0, *group]
        columns = [table.columns[number].copy() for number in shown]
        part = Table(*columns, title_justify=table.title_justify, caption_justify=table.caption_justify)
        part.title_style = table.title_style
        part.title = table.title if group is groups[0] else None
        part.caption = table.caption if group is groups[-1] else None
        for row, about in enumerate(table.rows, 1):
            part.add_row(*(cells[number][row] for number in shown), style=about.style)
        parts.append(part)
    return parts


def picture(result: Result, only: Sequence[str] = ()) -> Picture:
    """A panel for each measure: a dot and its interval for each system, a line at chance."""
    from matplotlib.figure import Figure as Picture

    names = [
        name
        for name in only or result.measures
        if any(_drawn(figures.get(name)) for figures in result.systems.values())
    ]
    columns = min(3, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    height = 0.9 + 0.28 * len(result.systems)
    drawing = Picture(figsize=(4.2 * columns + 1, height * rows), layout="constrained")
    panels = drawing.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    systems = list(result.systems)
    for panel, name in zip(panels, names, strict=False):
        measure = result.measures[name]
        for place, system in enumerate(systems):
            figure = result.systems[system].get(name)
            if figure is None or not _drawn(figure):
                continue
            if figure.low is not None and figure.high is not None:
                panel.plot([figure.low, figure.high], [place, place], color="#4c78a8", linewidth=2)
            panel.plot(figure.value, place, "o", color="#1f3552", markersize=5)
        if measure.chance is not None:
            panel.axvline(measure.chance, color="#b0413e", linestyle="--", linewidth=1)
        arrow = {"high": " \N{RIGHTWARDS ARROW}", "low": " \N{LEFTWARDS ARROW}", "": ""}[measure.better]
        panel.set_title(measure.label + arrow, fontsize=9, loc="left", parse_math=False)
        names_of = [_short(printable(system)) for system in systems]
        panel.set_yticks(range(len(systems)), names_of, fontsize=8, parse_math=False)
        panel.set_ylim(len(systems) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize=8)
        left, right = panel.get_xlim()
        if right - left < 1e-6 * max(abs(left), abs(right)):  # equal but for rounding, as one value is drawn
            panel.set_xlim(left - 0.05 * abs(left), right + 0.05 * abs(right))
        panel.grid(axis="x", alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    return drawing


def save_picture(path: Path, drawing: Picture) -> None:
    """Writes a drawing into an image, by its suffix.

    Raises:
        UserError: another suffix, or it cannot be written.
    """
    check_picture(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(
            f"--picture {path}: cannot be written ({error.strerror}); name another file"
        ) from None


def check_picture(path: Path | None) -> None:
    """Refuses another suffix, before the work begins.

    Raises:
        UserError: names those that can be.
    """
    if path is not None and path.suffix.lower() not in PICTURES:
        raise UserError(f"--picture {path}: give a file that ends in {', '.join(PICTURES)}")


def to_json(result: Result) -> str:
    """The result on one line, for --json."""
    return json.dumps(result.model_dump(), ensure_ascii=False)


def _drawn(figure: Figure | Mapping[str, Any] | None) -> bool:
    return isinstance(figure, Figure) and figure.value is not None and math.isfinite(figure.value)


def _short(system: str) -> str:
    """The end of a long name: paths differ there."""
    return system if len(system) <= 28 else f"\N{HORIZONTAL ELLIPSIS}{system[-27:]}"
