"""Writes the tables of documents from results.json, so that no number is copied by hand.

    python experiments/tables.py

A document has a place for a table between two comments: `<!-- results: table8 suite -->` and `<!-- end -->`.
What stands there is what the function `suite` of experiments/table8/tables.py makes of that experiment's
results.json. A test fails where a table is not that of its results, or where the text of an experiment has a
number with a point that none of its tables has.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PLACE = re.compile(r"(<!-- results: (\w+) (\w+) -->\n).*?(?=<!-- end -->)", re.S)


def documents() -> list[Path]:
    """Those that have places for tables."""
    found = [HERE.parent / "README.md", *(HERE.parent / "docs").glob("*.md"), *HERE.glob("*/README.md")]
    return sorted(path for path in found if PLACE.search(path.read_text(encoding="utf-8")))


def table(experiment: str, name: str) -> str:
    """A table of an experiment, from its results."""
    file = HERE / experiment / "results.json"
    if not file.exists():
        return "Not run yet."
    results = json.loads(file.read_text(encoding="utf-8"))
    return str(runpy.run_path(str(HERE / experiment / "tables.py"))[name](results))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as Markdown, for tables.py of experiments.

    Args:
        head: the columns' names.
        rows: their cells; a bar, as in p(z|c), is escaped.
        left: how many columns are text; those after them are numbers, which stand on the right.
    """
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def filled(text: str) -> str:
    """A document with its tables as the results have them."""
    return PLACE.sub(lambda found: f"{found[1]}\n{table(found[2], found[3])}\n\n", text)


def main() -> None:
    """Fills all documents."""
    for path in documents():
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # tables.py of an experiment imports `markdown` from here
    main()
