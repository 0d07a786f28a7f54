"""What the benchmarks have in common: timing by turns, targets, the machine, and what is printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from plato2.commands import joined_lines, option_names, print_error
from plato2.config import UserError, in_typed_words
from plato2.runs.folder import cpu_name
from plato2.runs.parallel import cpu_flags

Target = tuple[Literal[">=", "<="], float]
Say = Callable[[str], None]
"""Is told what is being measured."""


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Wall seconds of each side by round, after `warm` warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if number >= warm:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of the first side's cost divided by the second's."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def report(ratios: Mapping[str, float | None], targets: Mapping[str, Target]) -> dict[str, Any]:
    """`ratios`, `targets` as text, and `met` by name; None where something was not measured."""
    return {
        "ratios": dict(ratios),
        "targets": {name: f"{sign} {value}" for name, (sign, value) in targets.items()},
        "met": {name: met(ratios.get(name), target) for name, target in targets.items()},
    }


def met(value: float | None, target: Target) -> bool | None:
    """Whether a ratio reaches its target; None where it was not measured."""
    sign, limit = target
    if value is None:
        return None
    return value >= limit if sign == ">=" else value <= limit


def machine() -> dict[str, Any]:
    """The machine that was measured."""
    shown = ("amx", "avx512_bf16", "avx512f", "avx2", "bf16")
    return {
        "cpu": cpu_name() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(flag for flag in cpu_flags() if flag.startswith(shown)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


# ---------------------------------------------------------------------------------------- the command line


class Command(TyperCommand):
    """A command whose help is wrapped by the terminal, and whose errors are one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"help": joined_lines(options["help"])})

    def invoke(self, ctx: Any) -> Any:
        """Runs it; an error that the user can fix ends it with exit code 2."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print_error(in_typed_words(str(error), option_names(self), sign=" "))
            raise SystemExit(2) from None


@contextmanager
def progress() -> Iterator[Say]:
    """A line on stderr that says what is being measured."""
    with Console(stderr=True, highlight=False).status("starting") as status:
        yield lambda text: status.update(escape(text))


def show(found: dict[str, Any], as_json: bool, title: str, details: Iterable[Table | str]) -> None:
    """Prints the ratios beside their targets, the details and the machine; or all of it as JSON."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False, markup=False)
    ratios = table(title, ("what",), ("found", "target", ""))
    words = {True: "met", False: "MISSED", None: ""}
    for name, value in found["ratios"].items():
        shown = "not measured" if value is None else f"{value:g}"
        ratios.add_row(name, shown, found["targets"].get(name, ""), words[found["met"].get(name)])
    on = found["machine"]
    last = (
        f"{on['cpu']}, {on['cores']} cores, {' '.join(on['flags'])}, torch {on['torch']}, "
        f"{on['threads']} threads; {found['wall_s']:.0f} s"
    )
    for part in (ratios, *details, last):
        console.print(part, soft_wrap=isinstance(part, str))


def table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """An empty table: columns of names, then columns of numbers."""
    made = Table(title=title)
    for column in (*left, *right):
        made.add_column(column, justify="left" if column in left else "right", no_wrap=column in left)
    return made
