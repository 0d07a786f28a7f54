"""The tables of table 5 as Markdown; see experiments/tables.py.

With several seeds a figure is their mean and, in brackets, each of them; with one it has its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
DIGITS = {"chrf": 1, "words": 1}
"""3 of the others."""


def figures(results: Results) -> str:
    """All measures of all systems, as means over contexts."""
    seeds, measures = _seeds(results), _measures(results)
    rows = []
    for name, label in _labels(seeds).items():
        of = [seed["figures"][name] for seed in seeds if name in seed["figures"]]
        cells = [_cell([one[key] for one in of if key in one], DIGITS.get(key, 3)) for key in measures]
        rows.append([f"{label} (`{name}`)", *cells])
    return markdown(["replies of", *measures.values()], rows)


def dual(results: Results) -> str:
    """Pairs where `dual` ranks."""
    return _tests(results, "dual")


def first(results: Results) -> str:
    """Pairs where `first` ranks."""
    return _tests(results, "first")


def judge(results: Results) -> str:
    """What the judge says, or why it is not shown."""
    parts = []
    for number, seed in results["seeds"].items():
        if seed["judge"] is None:
            parts.append(f"Seed {number}: no judge was asked.")
            continue
        for question, found in seed["judge"].items():
            told = f"Seed {number}, {question}, judged by {found['model']}: {'; '.join(found['controls'])}."
            if found["withheld"]:
                parts.append(f"{told} The table is withheld: {'; '.join(found['withheld'])}.")
                continue
            rows = [[f"`{pair}`", *map(str, counts)] for pair, counts in found["pairs"].items()]
            rates = [
                [f"`{name}`", _cell([of["win_rate"]], 3), _cell([of["strength_same_length"]], 2)]
                for name, of in found["systems"].items()
            ]
            parts += [
                told,
                markdown(["pair", "wins", "ties", "losses"], rows),
                markdown(["system", "win rate, a tie is half", "strength at equal length, logits"], rates),
            ]
    return "\n\n".join(parts)


def paper(results: Results) -> str:
    """The paper's table 5, as people judged."""
    rows = [
        [one["question"], *one["systems"], *map(str, one["counts"])] for one in _seeds(results)[-1]["paper"]
    ]
    return markdown(["question", "first", "second", "first better", "ties", "second better"], rows)


def models(results: Results) -> str:
    """The runs, and what they cost."""
    rows = []
    for number, seed in results["seeds"].items():
        for name, one in seed["models"].items():
            shape = f"{one['geometry']['n_layer']} layers of {one['geometry']['hidden_size']}"
            minutes = "" if one["cpu_s"] is None else f"{one['cpu_s'] / 60:.1f}"
            spent = f"{seed['cpu_s'][name] / 60:.1f}" if name in seed["cpu_s"] else ""
            rows.append([number, f"`{name}`", f"`{one['stage']}`", shape, f"{one['step']:,}", minutes, spent])
    head = ["seed", "run", "stage", "size", "steps", "CPU minutes of training", "of writing candidates"]
    return markdown(head, rows)


def picture(results: Results) -> str:
    """What the script has drawn of the seed that it was run with last."""
    return "![Differences of all pairs with their intervals](differences.png)"


def _tests(results: Results, head: str) -> str:
    """Pair by pair and measure by measure: wins, ties and losses, of several seeds one after the other."""
    measures = _measures(results)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in _seeds(results):
        for one in seed["tests"].get(head, []):
            found.setdefault((f"{one['a']} - {one['b']}", one["measure"]), []).append(one)
    if not found:
        return f"No model with head {head} was measured."
    rows = []
    for (pair, key), of in found.items():
        digits = DIGITS.get(key, 3)
        mean = _cell([[one["difference"], one["low"], one["high"]] for one in of], digits, "+")
        if key == "words":  # not tested
            rows.append([f"`{pair}`", measures[key], mean, "", ""])
            continue
        counts = "; ".join(f"{one['wins']} / {one['ties']} / {one['losses']}" for one in of)
        p = "; ".join(f"{one['p_holm']:.4f}" for one in of)
        rows.append([f"`{pair}`", measures[key], mean, counts, p])
    return markdown(["pair", "measure", "difference", "wins / ties / losses", "p, Holm"], rows)


def _seeds(results: Results) -> list[dict[str, Any]]:
    return list(results["seeds"].values())


def _labels(seeds: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Names of all systems that some seed has, and what they are."""
    return {name: label for seed in seeds for name, label in seed["labels"].items()}


def _measures(results: Results) -> dict[str, str]:
    """Those that some system of some seed has, and what they are."""
    seeds = _seeds(results)
    known = {key for seed in seeds for of in seed["figures"].values() for key in of}
    return {key: label for key, label in seeds[-1]["measures"].items() if key in known}


def _cell(found: Sequence[Sequence[float | None]], digits: int, sign: str = "") -> str:
    """Value (low to high) of one seed, or the mean of several [each]."""
    values = [value for value, *_ in found if value is not None]
    if not values:
        return ""
    shown = [f"{value:{sign},.{digits}f}" for value in values]
    if len(values) > 1:
        return f"{sum(values) / len(values):{sign},.{digits}f} [{', '.join(shown)}]"
    low, high = next(of[1:] for of in found if of[0] is not None)
    if low is None or high is None:
        return shown[0]
    return f"{shown[0]} ({low:{sign},.{digits}f} to {high:{sign},.{digits}f})"
