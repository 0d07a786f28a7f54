"""The tables of README.md and docs/pretrained.md; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.tables import markdown

Results = Mapping[str, Any]
FIGURES = {
    "nll": "nll",
    "nll_uniform": "nll, z uniform",
    "bow": "bag of words",
    "z_mutual_information": "mutual information",
    "z_effective": "latents in effect",
    "rce": "rce",
    "pair_acc": "pair accuracy",
    "p1": "P@1 of 10",
    "overlap_pair_acc": "shared words, pair accuracy",
    "overlap_p1": "shared words, P@1",
}


def stage(results: Results, name: str, figures: list[str], last: list[str] | None = None) -> str:
    """A row for each rate and kind of context; figures after each third of the steps, or after the last."""
    runs = [run for run in results["runs"].values() if run["stage"] == name]
    if not runs:
        return "Not run: it starts from a stage 1 (`COARSE`)."
    runs.sort(key=lambda run: (run["context_mask"] != "prefix", run["rate"]))
    steps = [point["step"] for point in runs[-1]["curve"]]
    rows = []
    for run in runs:
        unchanged = run["rate"] < 1e-8
        curve = [{}] * (len(steps) - 1) + run["curve"][-1:] if unchanged else run["curve"]
        cells = [f"{p[figure]:.3f}" if p else "" for figure in figures for p in curve]
        cells += [f"{curve[-1][figure]:.3f}" for figure in last or []]
        rows.append([run["context_mask"], "as it is" if unchanged else f"{run['rate']:g}", *cells])
    head = ["context", "rate", *(f"{FIGURES[figure]}, step {step}" for figure in figures for step in steps)]
    head += [FIGURES[figure] for figure in last or []]
    return markdown(head, rows, left=2)


def coarse(results: Results) -> str:
    """Stage 1."""
    return stage(results, "1_coarse", ["nll"])


def fine(results: Results) -> str:
    """Stage 2.1."""
    return stage(results, "2_gen", ["nll_uniform"], ["bow", "z_mutual_information", "z_effective"])


def ranker(results: Results) -> str:
    """Stage 2.2 with the dual head."""
    return stage(results, "2_eval", ["pair_acc", "p1"], ["overlap_pair_acc", "overlap_p1"])
