"""The evening's runs in one file: every validation, times, and what the scripts beside this one measured.

    python experiments/evening/collect.py --minutes N FOLDER RUN [RUN ...]

FOLDER has mixture.json, controls.json and report.json (run.sh), RUN is a run folder. Writes results.json
beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from plato2.runs.folder import RunFolder, cpu_name
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


def collected(path: Path) -> dict[str, Any]:
    """A run: where it came from, its time and its validations."""
    lineage = RunFolder(path).lineage()
    ended = (path / "lineage.json").stat().st_mtime  # written for the last time when the run ends
    config = lineage["config"] | {"output_dir": "outputs", "init_from": "auto"}  # where it ran helps nobody
    return {
        "status": lineage["status"],
        "parent": (lineage["parent"] or {}).get("sha256"),
        "minutes": round((ended - datetime.fromisoformat(lineage["created"]).timestamp()) / 60, 1),
        "config": config | {"data": config["data"] | {"path": "data/chitchat_64"}},
        "validations": validations(path),
    }


def main() -> None:
    """Collects what the runs logged and what was measured of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="what all of run.sh took until then")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    given = parser.parse_args()
    report = json.loads((given.folder / "report.json").read_text(encoding="utf-8"))
    lineage = RunFolder(given.runs[0]).lineage()
    about = {name: lineage[name] for name in ("git", "packages", "python")}
    found = {
        "about": about | {"cpu": cpu_name(), "cores": os.cpu_count(), "minutes": given.minutes},
        "runs": {path.parent.name: collected(path) for path in given.runs},
        "latents": report["latents"],
    }
    for name in ("mixture", "controls"):
        found[name] = json.loads((given.folder / f"{name}.json").read_text(encoding="utf-8"))
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
