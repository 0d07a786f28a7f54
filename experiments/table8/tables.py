"""The tables of table 8 as Markdown; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]

ASKED = (
    ("coherence, dual", "coherence, first"),
    ("coherence, first", "shared words"),
    ("coherence, first", "backward"),
    ("forward, stage 2.1, uniform z", "forward, stage 1"),
    ("forward, stage 2.1, p(z|c)", "forward, stage 2.1, uniform z"),
)
"""Pairs of scores that the conclusion is about: the first less the second."""
ASKED_OF_CONTROLS = (
    *((name, f"{name}, another context") for name in ("coherence, dual", "coherence, first")),
    ("forward, stage 1, difference", "forward, stage 1"),
    ("backward", "forward, stage 1, difference"),
    *((f"length and frequencies, coherence, {head}", "length and frequencies") for head in ("dual", "first")),
)


def suite(results: Results) -> str:
    """MAP of each score on each set, with its interval."""
    return _figures(results["suite"], "map", interval=True)


def first(results: Results) -> str:
    """P@1 of each score on each set."""
    return _figures(results["suite"], "p1", interval=False)


def controls(results: Results) -> str:
    """MAP of the scores and their controls."""
    return _figures(results["controls"], "map", interval=False)


def tests(results: Results) -> str:
    """By how much the best score of each set is ahead of each other one in MAP."""
    found, rows = results["suite"], []
    best = {
        name: max(found["figures"], key=lambda one: found["figures"][one][f"{name}/map"][0])
        for name in found["sets"]
    }
    for system in found["figures"]:
        cells = []
        for name in found["sets"]:
            cells.append(
                "best" if system == best[name] else _difference(found["tests"], name, best[name], system)
            )
        rows.append([system, *cells])
    return markdown(["score", *found["sets"]], rows)


def asked(results: Results) -> str:
    """MAP of pairs of scores, the first less the second."""
    return _pairs(results["suite"], ASKED)


def asked_of_controls(results: Results) -> str:
    """The same of scores and their controls."""
    return _pairs(results["controls"], ASKED_OF_CONTROLS)


def sources(results: Results) -> str:
    """What the sets hold."""
    rows = [
        [
            name,
            f"{one['contexts']:,}",
            str(one["candidates"][1]),
            f"{results['suite']['chance'][f'{name}/map']:.3f}",
        ]
        for name, one in results["suite"]["sets"].items()
    ]
    return markdown(["set", "contexts", "candidates", "MAP by chance"], rows)


def models(results: Results) -> str:
    """What scored, and what it cost."""
    rows = []
    for name, one in results["models"].items():
        shape = f"{one['geometry']['n_layer']} layers of {one['geometry']['hidden_size']}"
        rows.append(
            [name, f"`{one['stage']}`", shape, f"{one['step']:,}", f"{sum(one['cpu_s'].values()):,.0f}"]
        )
    return markdown(["model", "stage", "size", "steps", "CPU s of scoring"], rows)


def prior(results: Results) -> str:
    """How much of z a context tells."""
    found = results["models"].get("fine", {}).get("prior")
    if found is None:
        return "No model of stage 2.1 was measured."
    names = (
        "cross-entropy without the context",
        "cross-entropy",
        "entropy of the posterior",
        "latents in effect",
    )
    cells = [f"{found['fitted to']:,}", f"{found['samples']:,}", *(f"{found[name]:.3f}" for name in names)]
    return markdown(["fitted to", "checked on", *names], [cells])


def _figures(found: dict[str, Any], measure: str, interval: bool) -> str:
    """Scores as rows, sets as columns."""
    chance = [f"{found['chance'][f'{name}/{measure}']:.3f}" for name in found["sets"]]
    rows = [["chance", *chance]]
    for system, figures in found["figures"].items():
        values = [figures[f"{name}/{measure}"] for name in found["sets"]]
        rows.append([system, *(_cell(*value) if interval else f"{value[0]:.3f}" for value in values)])
    return markdown(["score", *found["sets"]], rows)


def _pairs(found: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> str:
    """Pairs of scores as rows, sets as columns; those that were not measured are left out."""
    there = [(one, other) for one, other in pairs if {one, other} <= set(found["figures"])]
    rows = [
        [f"{one} less {other}", *(_difference(found["tests"], name, one, other) for name in found["sets"])]
        for one, other in there
    ]
    return markdown(["pair", *found["sets"]], rows)


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _difference(tests: Sequence[dict[str, Any]], name: str, best: str, other: str) -> str:
    """How far `best` is ahead of another score, and Holm's p."""
    test = next(one for one in tests if one["set"] == name and {one["a"], one["b"]} == {best, other})
    sign = 1 if test["a"] == best else -1
    low, high = sorted((sign * test["low"], sign * test["high"]))
    return f"{sign * test['difference']:.3f} ({low:.3f} to {high:.3f}), p {test['p_holm']:.4f}"
