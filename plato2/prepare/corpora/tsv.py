"""Knover's tab-separated files: `turn [SEP] turn<TAB>response`, one sample a line.

With a header the columns are found by name: `src`, `tgt` and optionally `knowledge` (texts joined by
[SEP]) and `label` (rows whose label is not 1 are negatives and left out). Without one the first two columns
are taken. Only the last turn of a line is a response: the turns before it are that response's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, read_lines

SEPARATOR = "[SEP]"


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield one dialogue for each line."""
    columns: dict[str, int] = {}
    current = None
    for file, number, text in read_lines(files, report):
        cells = text.split("\t")
        if file != current:
            current = file
            columns = {"src": 0, "tgt": 1}
            if "src" in cells:
                columns = {name: i for i, name in enumerate(cells)}
                if "tgt" not in columns:
                    raise UserError(f"{file}:{number}: the header has no column tgt (the response)")
                continue
        if len(cells) <= max(columns.values()):
            report.broken(file, number, f"{len(cells)} column(s) instead of {max(columns.values()) + 1}")
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


def _is_positive(label: str) -> bool:
    try:
        return float(label) == 1  # 1.0 is how pandas writes it
    except ValueError:
        return False
