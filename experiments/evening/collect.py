"""Every validation of the evening's runs, in one file.

    python experiments/evening/collect.py RUN [RUN ...]

RUN is a run folder. Writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

HERE = Path(__file__).parent
SPENT = ("perf/samples", "perf/cpu_s")


def validations(run: Path) -> list[dict[str, float]]:
    """What each validation measured, with the samples and CPU seconds of training until then."""
    steps: dict[int, dict[str, float]] = {}
    for step, name, value in read_metrics(run / "metrics.csv"):
        steps.setdefault(step, {})[name] = value
    return [
        {"step": step}
        | {name.partition("/")[2]: round(row[name], 4) for name in SPENT if name in row}
        | {name.partition("/")[2]: round(value, 4) for name, value in row.items() if name.startswith("val/")}
        for step, row in sorted(steps.items())
        if any(name.startswith("val/") for name in row)
    ]


def main() -> None:
    """Collects what the runs logged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    found: dict[str, Any] = {}
    for path in parser.parse_args().runs:
        lineage = RunFolder(path).lineage()
        parent = lineage["parent"] or {}
        name = path.parent.name
        found[f"{name} {path.name}" if name in found else name] = {
            "status": lineage["status"],
            "parent": parent.get("sha256"),
            "git": lineage["git"],
            "packages": lineage["packages"],
            "config": lineage["config"],
            "validations": validations(path),
        }
    for run in found.values():  # where it ran is of no use to others
        run["config"].update(output_dir="outputs", init_from="auto")
        run["config"]["data"]["path"] = "data/chitchat_64"
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
