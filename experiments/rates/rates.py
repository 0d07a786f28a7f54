"""Records and draws the curves of experiments/rates/run.sh.

    python -m experiments.rates.rates outputs/rates
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from experiments.configs import keep_config
from plato2.runs.folder import provenance
from plato2.runs.saved import read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHOWN = ("nll", "nll_uniform", "z_mutual_information", "rce", "pair_acc", "p1")
"""What is kept of a validation; docs/train.md explains each figure."""
DRAWN = {"1_coarse": "nll", "2_gen": "nll_uniform", "2_eval_dual": "pair_acc"}


def recorded(run: Path) -> dict[str, Any]:
    """What a run was, and its figures by step."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    lineage = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
    rows = read_metrics(run / "metrics.csv")
    curve: dict[int, dict[str, float]] = {}
    for step, name, value in rows:
        if name.startswith("val/") and (figure := name.removeprefix("val/")) in SHOWN:
            curve.setdefault(step, {})[figure] = round(value, 4)
    return {
        "stage": lineage["stage"],
        "rate": config["optim"]["lr"],
        "context_mask": config["model"]["context_mask"],
        "cpu_s": round(max(value for _, name, value in rows if name == "perf/cpu_s"), 1),
        "curve": [{"step": step, **found} for step, found in sorted(curve.items())],
    }


def draw(runs: dict[str, Any], path: Path) -> None:
    """The figure by which each stage's rate is chosen, over its steps."""
    stages = [stage for stage in DRAWN if any(run["stage"] == stage for run in runs.values())]
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        for run in runs.values():
            if run["stage"] == stage:
                steps, values = zip(*((p["step"], p[DRAWN[stage]]) for p in run["curve"]), strict=True)
                causal = run["context_mask"] == "causal"
                label = f"{run['rate']:g}{', causal context' * causal}"
                axis.plot(steps, values, "--" if causal else "-", marker=".", label=label)
        axis.set(title=stage, xlabel="steps", ylabel=DRAWN[stage])
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Of every finished run in a folder."""
    runs = {}
    for done in sorted(Path(sys.argv[1]).glob("*/done")):
        runs[done.parent.name] = recorded(done.parent)
        keep_config(done.parent, HERE / "config" / f"{done.parent.name}.yaml")
    results = {"runs": runs, **provenance()}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(runs, HERE / "curves.png")


if __name__ == "__main__":
    main()
