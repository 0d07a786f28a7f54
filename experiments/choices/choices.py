"""What takes stage 2.2 off its plateau: trains one variant after the other, then draws and records curves.

    python experiments/choices/choices.py --parent RUN --small RUN --data DIR  # all that are not finished
    python experiments/choices/choices.py --parent RUN --small RUN --data DIR first
    python experiments/choices/choices.py --only-draw

Each variant is a run of train.py with a name, so the script can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHOWN = ("coherence_acc", "pair_acc", "p1", "mrr", "pair_acc_matched", "p1_matched", "rce", "contrast", "mlm")


def finished(run: Path) -> bool:
    """Whether a run has reached its last step."""
    lineage = run / "lineage.json"
    return lineage.exists() and json.loads(lineage.read_text())["status"] == "finished"


def train(name: str, overrides: list[str], common: list[str], out: Path) -> None:
    """Trains a variant to its end; one that is finished is left alone."""
    if finished(out / "runs" / name):
        return
    command = [sys.executable, "train.py", "stage=2_eval", *common, *overrides]
    command += [f"output_dir={out}", "name=runs", f"run_id={name}"]
    print("+", " ".join(command[1:]), flush=True)
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # heads_and_negatives.py
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": paths})


def curve(run: Path) -> list[dict[str, float]]:
    """What each validation measured, with the samples and CPU seconds until then."""
    steps: dict[int, dict[str, float]] = {}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            steps.setdefault(int(row["step"]), {})[row["metric"]] = float(row["value"])
    points, logged = [], 0
    for step, row in sorted(steps.items()):
        if "perf/samples" in row:
            logged = step
        if "val/coherence_acc" in row:
            # Validated between two logged steps: at the pace until the last one of them.
            at, pace = steps[logged], step / logged
            samples, cpu_s = (at[f"perf/{name}"] * pace for name in ("samples", "cpu_s"))
            spent = {"samples": round(samples), "cpu_s": round(cpu_s, 1)}
            found = {name: round(row[f"val/{name}"], 4) for name in SHOWN if f"val/{name}" in row}
            points.append({"step": step, **spent, **found})
    return points


def baseline(run: Path) -> dict[str, float]:
    """The figures of shared words on the same contexts."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"].startswith("val/overlap_")]
    return {row["metric"].removeprefix("val/overlap_"): round(float(row["value"]), 4) for row in rows}


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy, pair accuracy and P@1 over samples and over CPU seconds."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), sharey="col")
    for row, spent in enumerate(("samples", "cpu_s")):
        for column, (name, chance) in enumerate({"coherence_acc": 0.5, "pair_acc": 0.5, "p1": 0.1}.items()):
            axis = axes[row, column]
            for number, (variant, found) in enumerate(results["variants"].items()):
                points = found["curve"]
                style = "-" if variant.startswith("first") else "--"
                axis.plot(
                    [p[spent] for p in points],
                    [p.get(name) for p in points],
                    style,
                    color=f"C{number % 10}",
                    marker=".x+s"[number // 10],
                    label=variant,
                )
            axis.axhline(chance, color="grey", linewidth=0.8)
            if name in results["overlap"]:
                axis.axhline(results["overlap"][name], color="black", linestyle=":", linewidth=1)
            axis.set_xlabel(spent)
            axis.set_title(name)
    axes[0, 2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    note = (
        "grey: chance; dotted: shared words (tf-idf); dashed: dual head; accuracy of negatives-3: chance 0.75"
    )
    figure.text(0.01, 0.005, note, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains what is not finished, then records everything that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", help="the evening's stage-1 run, or a checkpoint of one")
    parser.add_argument("--small", help="the same of experiment=small")
    parser.add_argument("--data", help="the prepared corpus")
    parser.add_argument("--out", type=Path, default=Path("outputs/choices"), help="where runs are kept")
    parser.add_argument("--only-draw", action="store_true", help="train nothing")
    parser.add_argument("begins", nargs="*", help="only variants whose names begin so")
    given = parser.parse_args()
    plan = yaml.safe_load((HERE / "variants.yaml").read_text(encoding="utf-8"))
    out = given.out.absolute()
    for name, overrides in plan["variants"].items():
        if not given.only_draw and (not given.begins or name.startswith(tuple(given.begins))):
            common = [*plan["common"], f"init_from={given.parent}", f"data.path={given.data}"]
            places = {"runs": out / "runs", "data": given.data, "parent": given.parent, "small": given.small}
            train(name, [text.format(**places) for text in overrides], common, out)
    results: dict[str, Any] = {"common": plan["common"], "overlap": {}, "variants": {}}
    if (HERE / "results.json").exists():  # also variants that are no longer planned
        results |= json.loads((HERE / "results.json").read_text()) | {"common": plan["common"]}
    for name, overrides in plan["variants"].items():
        run = out / "runs" / name
        if finished(run):
            lineage = json.loads((run / "lineage.json").read_text())
            results["overlap"] = baseline(run)
            results["variants"][name] = {
                "overrides": overrides,
                "parent": (lineage["parent"] or {}).get("sha256"),
                "git": lineage["git"],
                "packages": lineage["packages"],
                "curve": curve(run),
            }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, HERE / "curves.png")


if __name__ == "__main__":
    main()
