"""A page of sections: written as HTML (one file, offline, printable), as Markdown, and to the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from plato2.config import UserError
from plato2.evaluate.results import print_table
from plato2.files import replace_text
from plato2.talk.table import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header; a cell is text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    ours: frozenset[int] = frozenset()
    """Rows that are ours among others'."""


@dataclass(frozen=True)
class Picture:
    """A drawing, and what it shows in words."""

    drawing: Figure
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Small drawings side by side, as many as there is room for, under a heading of their own."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Legend:
    """What the colours of drawings mean."""

    entries: Sequence[tuple[str, str]]
    """Colour, as `#1f77b4`, and what it means."""


@dataclass(frozen=True)
class Dialogues:
    """Dialogues side by side: a column for each system."""

    names: Sequence[str]
    columns: Sequence[Sequence[tuple[str, str]]]
    """Of each system the turns: who speaks, and the text."""


Block = Paragraph | Table | Picture | Gallery | Legend | Dialogues


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def html(title: str, sections: Sequence[Section]) -> str:
    """One HTML file without scripts or anything from elsewhere; all texts are escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("plato2.report", "")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.tests["number_first"] = _is_number_first
    shown = [
        {
            "title": section.title,
            "blocks": [(type(block).__name__, _for_html(block)) for block in section.blocks],
        }
        for section in sections
    ]
    return environment.get_template("page.html").render(title=title, sections=shown)


def _shown(value: object) -> object:
    """Texts without characters that control whatever shows them; pictures as they are."""
    return printable(value) if type(value) is str else value


def _is_number_first(cell: str) -> bool:
    """Whether a cell is a number, with what may stand behind it: `0.47 [0.41, 0.53]`, `3.1 ± 0.2`, `2 of 3`.

    No stage (`1_coarse`), and no name that begins with a date.
    """
    return bool(re.match(r"[-+]?\d", cell)) and not re.search(r"[^\W\d]{3}", cell)


def _for_html(block: Block) -> object:
    if isinstance(block, Picture):
        return {"alt": block.alt, "svg": _svg(block.drawing)}
    if isinstance(block, Gallery):
        return {"title": block.title, "pictures": [_for_html(picture) for picture in block.pictures]}
    if isinstance(block, Dialogues):
        return {"pairs": list(zip(block.names, block.columns, strict=True))}
    return block


def _svg(drawing: Figure) -> str:
    """The drawing as an element of a page: matplotlib escapes its texts."""
    import matplotlib

    data = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plato2"}):
        drawing.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()[data.getvalue().index("<svg") :]


def markdown(title: str, sections: Sequence[Section], pictures: Path) -> tuple[str, dict[Path, str]]:
    """The page as Markdown, and the pictures it refers to.

    Args:
        title: of the page.
        sections: what stands in it.
        pictures: the folder of the pictures, beside the page.

    Returns:
        The text, and file -> SVG.
    """
    lines: list[str] = [f"# {_plain(title)}", ""]
    files: dict[Path, str] = {}
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Gallery):
                lines += [f"### {_plain(block.title)}", ""]
            if not isinstance(block, Picture | Gallery):
                lines += [*_markdown_lines(block), ""]
                continue
            for picture in block.pictures if isinstance(block, Gallery) else [block]:
                path = pictures / f"{len(files) + 1}.svg"
                files[path] = _svg(picture.drawing)
                lines += [f"![{_plain(picture.alt)}]({pictures.name}/{path.name})", ""]
    return "\n".join(lines), files


def _markdown_lines(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [f"**{_plain(block.text)}**" if block.strong else _plain(block.text)]
    if isinstance(block, Table):
        rule = "|" + "|".join([":---"] + ["---:"] * (len(block.header) - 1)) + "|"
        rows = ["| " + " | ".join(map(_plain, row)) + " |" for row in block.rows]
        caption = [f"*{_plain(block.caption)}*", ""] if block.caption else []
        return [*caption, "| " + " | ".join(map(_plain, block.header)) + " |", rule, *rows]
    if isinstance(block, Legend):
        return [f"- {colour.replace('#', chr(92) + '#')}: {_plain(what)}" for colour, what in block.entries]
    assert isinstance(block, Dialogues)
    lines = []
    for name, column in zip(block.names, block.columns, strict=True):
        lines += [
            f"**{_plain(name)}**",
            "",
            *(f"- {_plain(who)}: {_plain(text)}" for who, text in column),
            "",
        ]
    return lines[:-1]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = printable(" ".join(text.split()))
    for mark in "\\`*_{}[]<>|#":
        line = line.replace(mark, f"\\{mark}")
    return line


def write(path: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Writes the page, HTML or Markdown by the suffix of its name; returns all files.

    Raises:
        UserError: another suffix, or it cannot be written.
    """
    check_name(path)
    try:
        if path.suffix == ".html":
            replace_text(path, html(title, sections))
            return [path]
        text, files = markdown(title, sections, path.with_name(f"{path.stem}_pictures"))
        for file, svg in files.items():
            file.parent.mkdir(exist_ok=True)
            replace_text(file, svg)
        replace_text(path, text)
        return [path, *files]
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another file") from None


def check_name(path: Path) -> None:
    """Refuses a page that is neither HTML nor Markdown, before the work begins.

    Raises:
        UserError: names the two suffixes.
    """
    if path.suffix not in (".html", ".md"):
        raise UserError(f"--out {path}: give a file that ends in .html or .md")


def show(title: str, sections: Sequence[Section], console: Console) -> None:
    """The page on the terminal, without pictures."""
    console.print(RichText(printable(title), style="bold"))
    for section in sections:
        console.print(RichText(f"\n{printable(section.title)}", style="bold"))
        for block in section.blocks:
            if isinstance(block, Paragraph):
                console.print(RichText(printable(block.text), style="bold" if block.strong else ""))
            elif isinstance(block, Table):
                print_table(_rich(block), console)
            elif isinstance(block, Dialogues):
                for name, column in zip(block.names, block.columns, strict=True):
                    console.print(RichText(printable(name), style="italic"))
                    for who, text in column:
                        console.print(RichText(f"  {printable(who)}: {printable(text)}"), soft_wrap=True)


def _rich(block: Table) -> RichTable:
    table = RichTable(title=printable(block.caption) or None, title_justify="left")
    for number, name in enumerate(block.header):
        table.add_column(RichText(printable(name)), justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(block.rows):
        style = "bold" if number in block.ours else ""
        table.add_row(*(RichText(printable(cell)) for cell in row), style=style)
    return table
