"""Choices of stages 2.2 and 2.1: trains one variant after the other, then records and draws their curves.

    python experiments/choices/choices.py --parent RUN --small RUN --data DIR  # all that are not finished
    python experiments/choices/choices.py --parent RUN --small RUN --data DIR first
    python experiments/choices/choices.py --parent RUN --small RUN --data DIR knover paper
    python experiments/choices/choices.py --only-draw

Each variant of variants.yaml is a run of train.py with a name, so the script can be stopped and started again
at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from experiments.configs import keep_config
from plato2.runs.folder import cpu_name
from plato2.runs.saved import read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHOOSING = ("coherence_acc", "pair_acc", "p1", "mrr", "pair_acc_matched", "p1_matched")
LOSSES = ("rce", "contrast", "mlm", "nll", "ppl", "nll_uniform", "ppl_uniform", "bow")
LATENTS = ("z_mutual_information", "z_effective", "z_in_use", "z_entropy")
SHOWN = (*CHOOSING, *LOSSES, *LATENTS)
"""What is kept of a validation; docs/train.md explains each figure."""


def finished(run: Path) -> bool:
    """Whether a run has reached its last step."""
    lineage = run / "lineage.json"
    return lineage.exists() and json.loads(lineage.read_text())["status"] == "finished"


def train(name: str, overrides: list[str], common: list[str], out: Path) -> None:
    """Trains a variant to its end; one that is finished is left alone."""
    run = out / "runs" / name
    if finished(run):
        return
    command = [sys.executable, "train.py", *common, *overrides]
    command += [f"output_dir={out}", "name=runs", f"run_id={name}"]
    print("+", " ".join(command[1:]), flush=True)
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # heads_and_negatives.py
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": paths})
    (run / "machine.json").write_text(json.dumps(machine()) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """What a variant is trained on, as far as its own record does not say."""
    return {"cpu": cpu_name(), "threads": os.environ.get("OMP_NUM_THREADS", "")}


def curve(run: Path) -> list[dict[str, float]]:
    """What each validation measured, with the samples and CPU seconds until then."""
    steps: dict[int, dict[str, float]] = {}
    for step, metric, value in read_metrics(run / "metrics.csv"):
        steps.setdefault(step, {})[metric] = value
    points, logged = [], 0
    for step, row in sorted(steps.items()):
        if "perf/samples" in row:
            logged = step
        found = {name: round(row[f"val/{name}"], 4) for name in SHOWN if f"val/{name}" in row}
        if found:
            # Validated between two logged steps: at the pace until the last one of them.
            at, pace = steps[logged], step / logged
            samples, cpu_s = (at[f"perf/{name}"] * pace for name in ("samples", "cpu_s"))
            points.append({"step": step, "samples": round(samples), "cpu_s": round(cpu_s, 1), **found})
    return points


def baseline(run: Path) -> dict[str, float]:
    """The figures of shared words on the same contexts."""
    begin = "val/overlap_"
    rows = read_metrics(run / "metrics.csv")
    return {name.removeprefix(begin): round(value, 4) for _, name, value in rows if name.startswith(begin)}


def perplexity(run: Path) -> float | None:
    """The lowest of a stage 1, which is that of its best checkpoint; None where its figures are gone."""
    file = run / "metrics.csv"
    found = [value for _, name, value in read_metrics(file) if name == "val/ppl"] if file.exists() else []
    return round(min(found), 2) if found else None


def record(results: dict[str, Any], part: dict[str, Any], runs: Path) -> None:
    """Puts what is known of each finished variant beside those that are there.

    Args:
        results: a part of results.json, with `variants`.
        part: the same part of variants.yaml.
        runs: the folder of the variants.
    """
    results["common"] = part["common"]
    for name, overrides in part["variants"].items():
        run = runs / name
        if not finished(run):
            continue
        lineage = json.loads((run / "lineage.json").read_text())
        parent = lineage["parent"] or {"sha256": None, "run": None}
        found = {
            "overrides": overrides,
            "parent": parent["sha256"],
            "git": lineage["git"],
            "packages": lineage["packages"],
            "curve": curve(run),
        }
        if "ppl" in found["curve"][-1] and parent["run"]:  # what it compares with
            found["parent_ppl"] = perplexity(Path(parent["run"]))
        if (run / "machine.json").exists():
            found["machine"] = json.loads((run / "machine.json").read_text())
        results["variants"][name] = found
        keep_config(run, HERE / "config" / f"{name}.yaml")


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy, pair accuracy and P@1 over samples and over CPU seconds."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), sharey="col")
    for row, spent in enumerate(("samples", "cpu_s")):
        for column, (name, chance) in enumerate({"coherence_acc": 0.5, "pair_acc": 0.5, "p1": 0.1}.items()):
            axis = axes[row, column]
            for number, (variant, found) in enumerate(results["variants"].items()):
                points = found["curve"]
                style = "--" if variant.startswith("dual") else "-"
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


def draw_writing(results: dict[str, Any], path: Path) -> None:
    """What stage 2.1 is worth and what its z says, over the steps."""
    shown = {
        "ppl": "perplexity, z from the posterior",
        "ppl_uniform": "perplexity, z uniform",
        "z_mutual_information": "mutual information of z, nats",
        "z_effective": "latents in effect",
        "z_in_use": "latents with 2 % or more",
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5))
    for axis, (name, title) in zip(axes.flat, shown.items(), strict=False):
        for number, (variant, found) in enumerate(results["variants"].items()):
            points = found["curve"]
            style = "--" if "seed" in variant else "-"
            steps, values = [p["step"] for p in points], [p[name] for p in points]
            axis.plot(steps, values, style, color=f"C{number}", marker=".", label=variant)
        axis.set_xlabel("steps")
        axis.set_title(title)
    for found in results["variants"].values():
        if found.get("parent_ppl"):
            axes[0, 1].axhline(found["parent_ppl"], color="black", linestyle=":", linewidth=1)
    axes[0, 2].set_ylim(0, math.log(20))
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, loc="center")
    axes[1, 2].set_axis_off()
    note = "dotted: stage 1; dashed: another seed; mutual information is at most log 20"
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
    places = {"runs": out / "runs", "data": given.data, "parent": given.parent, "small": given.small}
    for part in (plan, plan["writing"]):
        common = [*part["common"], f"init_from={given.parent}", f"data.path={given.data}"]
        for name, overrides in part["variants"].items():
            if not given.only_draw and (not given.begins or name.startswith(tuple(given.begins))):
                train(name, [text.format(**places) for text in overrides], common, out)
    results: dict[str, Any] = {"common": [], "overlap": {}, "variants": {}, "writing": {"variants": {}}}
    if (HERE / "results.json").exists():  # also variants that are no longer planned
        results |= json.loads((HERE / "results.json").read_text())
    record(results, plan, out / "runs")
    record(results["writing"], plan["writing"], out / "runs")
    for name in plan["variants"]:
        if finished(out / "runs" / name):
            results["overlap"] = baseline(out / "runs" / name)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, HERE / "curves.png")
    if results["writing"]["variants"]:
        draw_writing(results["writing"], HERE / "writing.png")


if __name__ == "__main__":
    main()
