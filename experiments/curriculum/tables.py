"""The tables of this experiment as Markdown; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.tables import markdown

Results = dict[str, Any]
Curve = Sequence[dict[str, float]]

CHOICE = {"coherence_acc": ("accuracy", 3), "pair_acc": ("pair accuracy", 3), "p1": ("P@1 of 10", 3)}
MEASURES = {
    "2_gen": {
        "ppl_uniform": ("perplexity, z uniform", 1),
        "ppl": ("perplexity, z from the posterior", 1),
        "z_mutual_information": ("mutual information, nats", 2),
        "z_effective": ("latents in effect", 1),
    },
    "2_eval_dual": CHOICE,
    "2_eval": CHOICE,
}
"""Of each second stage: its measures by their names in metrics.csv, their names here, and their digits."""
SILENT_BELOW = 0.1
"""Nats of mutual information; below it z says nothing (plato2/stages/fine.py)."""


def fine(results: Results) -> str:
    """Stage 2.1 at equal CPU time in all."""
    return _equal_time(results, "2_gen")


def dual(results: Results) -> str:
    """Stage 2.2, dual head, at equal CPU time in all."""
    return _equal_time(results, "2_eval_dual")


def first(results: Results) -> str:
    """Stage 2.2, the paper's head, at equal CPU time in all."""
    return _equal_time(results, "2_eval")


def fine_own(results: Results) -> str:
    """Stage 2.1 at equal time of its own."""
    return _equal_own_time(results, "2_gen")


def dual_own(results: Results) -> str:
    """Stage 2.2, dual head, at equal time of its own."""
    return _equal_own_time(results, "2_eval_dual")


def first_own(results: Results) -> str:
    """Stage 2.2, the paper's head, at equal time of its own."""
    return _equal_own_time(results, "2_eval")


def fine_test(results: Results) -> str:
    """Stage 2.1 at the end of each run, on the test split."""
    return _tested(results, "2_gen")


def dual_test(results: Results) -> str:
    """Stage 2.2, dual head, at the end of each run, on the test split."""
    return _tested(results, "2_eval_dual")


def first_test(results: Results) -> str:
    """Stage 2.2, the paper's head, at the end of each run, on the test split."""
    return _tested(results, "2_eval")


def starts(results: Results) -> str:
    """Stage 1 at the points from which the others start."""
    seeds = list(results["seeds"].values())
    rows = [["words by their frequency", "", "", _number(results["baselines"]["unigram_ppl"], 1)]]
    for point in sorted({int(p) for seed in seeds for p in seed["first"]["points"]}):
        having = [
            seed["first"]["points"][str(point)] for seed in seeds if str(point) in seed["first"]["points"]
        ]
        minutes = _cell([one["cpu_s"] / 60 for one in having], 1)
        curves = [{p["step"]: p["ppl"] for p in seed["first"]["curve"]} for seed in seeds]
        valid = _cell([curve[point] for curve in curves if point in curve], 1)
        rows.append([f"{point:,}", minutes, valid, _interval([one["test"]["ppl"] for one in having], 1)])
    heads = ["steps of stage 1", "CPU minutes", "perplexity, validation", "perplexity, test split"]
    return markdown(heads, rows)


def differences(results: Results) -> str:
    """Random weights against the longest start, nats a token."""
    labels = {"nll_uniform": "z uniform", "nll": "z from the posterior"}
    rows = []
    for pair in dict.fromkeys(p for seed in results["seeds"].values() for p in seed["differences"]):
        for name, label in labels.items():
            found = [
                s["differences"][pair][name] for s in results["seeds"].values() if pair in s["differences"]
            ]
            cells = "; ".join(f"{value:+.3f} ({low:+.3f} to {high:+.3f})" for value, low, high in found)
            rows.append([f"`{pair}`", label, cells])
    head = ["runs", "perplexity with", "nats a token, 95 % interval, each seed"]
    return markdown(head, rows) if rows else NONE


def stability(results: Results) -> str:
    """Gradients, spikes, and when z begins to speak."""
    heads = [
        "run", "gradient norm: median", "99 %", "largest", "clipped steps", "loss spikes", "gradient spikes",
        "setback, nats", "z speaks from CPU minute", "steps", "diverged",
    ]  # fmt: skip
    rows = [_stability(results, "`1_coarse`", lambda seed: seed["first"])]
    for key in _keys(results):
        rows.append(_stability(results, f"`{key[0]}` {_label(key)}", lambda seed, key=key: _run(seed, *key)))
    return markdown(heads, rows)


def runs(results: Results) -> str:
    """What was trained."""
    rows = []
    for name, find in [("`1_coarse`", lambda seed: seed["first"])] + [
        (f"`{key[0]}` {_label(key)}", lambda seed, key=key: _run(seed, *key)) for key in _keys(results)
    ]:
        found = [run for seed in results["seeds"].values() if (run := find(seed))]
        rows.append([
            name, f"{found[0]['lr']:g}", f"{found[0]['warmup_steps']}",
            _cell([run["steps"] for run in found], 0), _cell([run["samples"] / 1e3 for run in found], 0),
            _cell([run["cpu_s"] / 60 for run in found], 1),
            _cell([(run.get("start_cpu_s", 0.0) + run["cpu_s"]) / 60 for run in found], 1),
            _cell([run["cpu_s"] / run["steps"] for run in found], 3),
        ])  # fmt: skip
    heads = ["run", "rate", "warm-up", "steps", "thousand samples", "CPU minutes", "in all", "CPU s a step"]
    return markdown(heads, rows)


NONE = "This stage has not been run yet."


def value_at(curve: Curve, name: str, seconds: float) -> float | None:
    """A measure of a run after so many CPU seconds, between two validations on the line through both; None
    before the first and after the last."""
    points = [point for point in curve if name in point]
    times = [point["cpu_s"] for point in points]
    if not times or not times[0] <= round(seconds, 2) <= times[-1]:  # they are rounded, too
        return None
    return float(np.interp(seconds, times, [point[name] for point in points]))


def _keys(results: Results, stage: str | None = None) -> list[tuple[str, int, str]]:
    """Stage, start and rate of the runs, those from random weights last."""
    found = {
        (run["stage"], run["start"], run["rate"])
        for seed in results["seeds"].values()
        for run in seed["runs"].values()
        if stage in (None, run["stage"])
    }
    return sorted(found, key=lambda key: ([*MEASURES].index(key[0]), key[1] == 0, key[1], key[2] != "own"))


def _run(seed: dict[str, Any], stage: str, start: int, rate: str) -> dict[str, Any] | None:
    named = (stage, start, rate)
    found = (run for run in seed["runs"].values() if (run["stage"], run["start"], run["rate"]) == named)
    return next(found, None)


def _label(key: tuple[str, int, str]) -> str:
    return f"from {f'{key[1]:,} steps' if key[1] else 'random weights'}, {key[2]} rate"


def _equal_time(results: Results, stage: str) -> str:
    """All runs of a stage where those from points of stage 1 end, with the time before their start."""
    seeds, rows = list(results["seeds"].values()), []
    for start in sorted({key[1] for key in _keys(results, stage) if key[1]}):
        ends = [run["start_cpu_s"] + run["cpu_s"] for s in seeds if (run := _run(s, stage, start, "own"))]
        at = f"{min(ends) / 60:.1f}"
        if stage == "2_gen":
            own = [value_at(seed["first"]["curve"], "ppl", min(ends)) for seed in seeds]
            if known := [value for value in own if value is not None]:
                rows.append([at, "stage 1 itself", _cell(known, 1), "", "", ""])
        rows += [[at, *row] for row in _rows(results, stage, min(ends), with_first=True)]
    heads = ["CPU minutes in all", "run", *(label for label, _ in MEASURES[stage].values())]
    return markdown(heads, rows + _baselines(results, stage, "valid")) if rows else NONE


def _equal_own_time(results: Results, stage: str) -> str:
    """All runs of a stage where the first of those from points of stage 1 ends, that time alone counted."""
    found = [run for seed in results["seeds"].values() for run in seed["runs"].values()]
    ends = [run["cpu_s"] for run in found if run["stage"] == stage and run["start"]]
    if not ends:
        return NONE
    rows = [[f"{min(ends) / 60:.1f}", *row] for row in _rows(results, stage, min(ends), with_first=False)]
    heads = ["CPU minutes of this stage", "run", *(label for label, _ in MEASURES[stage].values())]
    return markdown(heads, rows + _baselines(results, stage, "valid"))


def _rows(results: Results, stage: str, seconds: float, with_first: bool) -> list[list[str]]:
    """The measures of each run that has been validated before and after a time."""
    rows = []
    for key in _keys(results, stage):
        cells = []
        for name, (_, digits) in MEASURES[stage].items():
            found = (run for seed in results["seeds"].values() if (run := _run(seed, *key)))
            values = [
                value_at(run["curve"], name, seconds - run["start_cpu_s"] * with_first) for run in found
            ]
            cells.append(_cell([value for value in values if value is not None], digits))
        if any(cells):
            rows.append([_label(key), *cells])
    return rows


def _tested(results: Results, stage: str) -> str:
    """The measures at the end of each run, with intervals where there is one seed."""
    rows = []
    for key in _keys(results, stage):
        found = [run for seed in results["seeds"].values() if (run := _run(seed, *key)) and run["test"]]
        minutes = _cell([(run["start_cpu_s"] + run["cpu_s"]) / 60 for run in found], 1)
        measures = MEASURES[stage].items()
        cells = [_interval([run["test"][name] for run in found], digits) for name, (_, digits) in measures]
        rows.append([minutes, _label(key), *cells])
    heads = ["CPU minutes in all", "run", *(label for label, _ in MEASURES[stage].values())]
    return markdown(heads, rows + _baselines(results, stage, "test")) if rows else NONE


def _baselines(results: Results, stage: str, split: str) -> list[list[str]]:
    known = results["baselines"]
    if stage == "2_gen":
        return [["", "words by their frequency", _number(known["unigram_ppl"], 1), "", "0", ""]]
    shared = known["shared words"][split]
    return [
        ["", "chance", "0.500", "0.500", "0.100"],
        ["", "shared words", "", *(f"{shared[name]:.3f}" for name in ("pair_acc", "p1"))],
    ]


def _stability(
    results: Results, name: str, find: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> list[str]:
    found = [run for seed in results["seeds"].values() if (run := find(seed))]
    shown = {
        "grad_norm_median": 2, "grad_norm_99": 2, "grad_norm_max": 1, "clipped": 2, "loss_spikes": 0,
        "grad_norm_spikes": 0, "setback": 2,
    }  # fmt: skip
    cells = [_cell([run["stability"][key] for run in found], digits) for key, digits in shown.items()]
    spoken = [_speaks_from(run["curve"]) for run in found if run.get("stage") == "2_gen"]
    z = ", ".join("not at the end" if at is None else f"{at / 60:.1f}" for at in spoken)
    steps = _cell([run["steps"] for run in found], 0)
    return [name, *cells, z, steps, str(sum(run["diverged"] is not None for run in found))]


def _speaks_from(curve: Curve) -> float | None:
    """CPU seconds until z says at least SILENT_BELOW, and goes on to; None where it does not in the end."""
    since = None
    for point in curve:
        if point["z_mutual_information"] < SILENT_BELOW:
            since = None
        elif since is None:
            since = point["cpu_s"]
    return since


def _interval(figures: Sequence[Sequence[float | None]], digits: int) -> str:
    """A figure with its interval; of several seeds their mean and range."""
    if len(figures) == 1 and figures[0][1] is not None:
        value, low, high = (_number(x, digits) for x in figures[0])
        return f"{value} ({low} to {high})"
    return _cell([figure[0] for figure in figures if figure[0] is not None], digits)


def _cell(values: Sequence[float], digits: int) -> str:
    """The mean of the seeds, and their range where there are several."""
    if not values:
        return ""
    mean = _number(float(np.mean(values)), digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({_number(min(values), digits)} to {_number(max(values), digits)})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
