"""Knover's tab-separated files: `turn [SEP] turn<TAB>response`, one sample per line.

With a header the columns are found by name, in any case: `src` or `context`, `tgt` or `response`, and
optionally `knowledge` (texts joined by [SEP]) and `label` (rows whose label is not 1 are negatives and left
out); the report names columns that are not read. Without one a file has two columns: a third could be a
label. Only the last turn of a line is a response: the turns before it are that response's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, read_lines

SEPARATOR = "[SEP]"
NAMES = {
    "src": "src",
    "context": "src",
    "tgt": "tgt",
    "response": "tgt",
    "knowledge": "knowledge",
    "label": "label",
}
"""What each column may be called, and what it is."""


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield one dialogue for each line.

    Raises:
        UserError: a header without a response, or more than two columns without a header.
    """
    columns: dict[str, int] = {}
    width = 2
    current = None
    for file, number, text in read_lines(files, report):
        cells = text.split("\t")
        if file != current:
            current = file
            columns, width = {"src": 0, "tgt": 1}, 2
            if found := _header(cells, f"{file}:{number}"):
                columns, width = found, len(cells)
                _note_unread(cells, columns, report)
                continue
            if any(cells[2:]):
                raise UserError(
                    f"{file}:{number}: {len(cells)} columns, and no header that names them; put a line such "
                    "as src<TAB>tgt<TAB>label above, or keep the first two columns (cut -f1,2)"
                )
        if len(cells) <= max(columns.values()) or any(cells[width:]):
            report.broken(file, number, f"{len(cells)} column(s) instead of {width}")
            continue
        if "label" in columns and not _is_positive(cells[columns["label"]]):
            report.skipped["label is not 1"] += 1
            continue
        turns = [Turn(turn.strip()) for turn in cells[columns["src"]].split(SEPARATOR)]
        response = Turn(cells[columns["tgt"]].strip())
        if "knowledge" in columns:
            facts = cells[columns["knowledge"]].split(SEPARATOR)
            response.knowledge = [fact.strip() for fact in facts if fact.strip()]
        yield Dialogue([*turns, response], first_response=len(turns))


def _header(cells: list[str], place: str) -> dict[str, int]:
    """Where each column is; empty if the first line of a file is no header."""
    columns: dict[str, int] = {}
    for i, cell in enumerate(cells):
        if name := NAMES.get(cell.strip().lower()):
            columns.setdefault(name, i)
    if "src" in columns and "tgt" in columns:
        return columns
    if any(cell.strip().lower() == "src" for cell in cells):
        raise UserError(f"{place}: the header has no column tgt (the response); name it tgt or response")
    return {}


def _note_unread(cells: list[str], columns: dict[str, int], report: ReadReport) -> None:
    read = columns.values()
    if unread := [cell.strip()[:40] for i, cell in enumerate(cells) if cell.strip() and i not in read]:
        report.note(
            f"columns that are not read: {', '.join(unread[:20])} (those that are: {', '.join(NAMES)})"
        )


def _is_positive(label: str) -> bool:
    try:
        return float(label) == 1  # 1.0 is how pandas writes it
    except ValueError:
        return False
