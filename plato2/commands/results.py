"""What the verbs that measure share: where a result goes, and a bar while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from plato2.config import UserError, option
from plato2.files import check_place

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from plato2.evaluate.results import Result

T = TypeVar("T")


@dataclass(frozen=True)
class ResultOptions:
    """Where a result goes; checks itself, before the work begins.

    Raises:
        UserError: a picture of another kind, or a place where no file can be.
    """

    out: Path | None = option(None, help="Write the result file, for plato2 report.")
    picture: Path | None = option(None, help="Draw into this image (.png, .svg, .pdf).")
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False

    def __post_init__(self) -> None:
        """Checks the files."""
        from plato2.evaluate.results import check_picture

        check_picture(self.picture)
        for name, path in (("--out", self.out), ("--picture", self.picture)):
            if path is not None:
                check_place(path, name)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuses to write over what is read, or two things into one file.

    Args:
        outputs: option -> the file that it names; None: it was not given.
        inputs: what is read.

    Raises:
        UserError: names the option and the file.
    """
    taken = {path.resolve(): f"{path} is read" for path in inputs if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise UserError(f"{name} {path}: {taken[path.resolve()]}, and would be lost; name another file")
        check_place(path, name)
        taken[path.resolve()] = f"{name} writes there"


def deliver(
    result: Result, to: ResultOptions, draw: Callable[[Result], Picture], show: Callable[[Result], None]
) -> None:
    """Writes a result and its picture where they are wanted, and prints it.

    Args:
        result: of an evaluation.
        to: where it goes.
        draw: makes the picture.
        show: prints the result for people, unless it is printed as JSON.

    Raises:
        UserError: a file cannot be written.
    """
    from plato2.evaluate.results import save_picture, to_json, write_result

    if to.out is not None:
        write_result(to.out, result)
    if to.picture is not None:
        save_picture(to.picture, draw(result))
    if to.as_json:
        typer.echo(to_json(result))
    else:
        show(result)


def watch(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The same items, with a bar on stderr that goes when they are done; none where nobody sees it."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)
