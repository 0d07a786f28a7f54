"""The tables of table 1 as Markdown; see experiments/tables.py.

With several seeds a cell has their mean and, in brackets, each of them; with one its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
DIFFERENCES = {
    "length": ("words per utterance", 1),
    "distinct_1": ("distinct-1, equal size", 3),
    "distinct_2": ("distinct-2, equal size", 3),
    "repeated_3": ("trigrams said before", 3),
    "topic": ("similarity to the start", 3),
}


def variety(results: Results) -> str:
    """Length and distinct of all systems, with the paper's; their sizes."""
    seeds = _seeds(results)
    size = " or ".join(dict.fromkeys(f"{seed['size']:,}" for seed in seeds))
    head = [
        "system", "utterances", "words", "words per utterance", "distinct-1", "distinct-2",
        f"distinct-1, {size} words each", f"distinct-2, {size} words each",
    ]  # fmt: skip
    rows = [
        [f"{name}, the paper", "", "", f"{of['length']:.1f}", f"{of['distinct_1']:.3f}",
         f"{of['distinct_2']:.3f}", "", ""]
        for name, of in seeds[-1]["paper"].items()
    ]  # fmt: skip
    for name, label in _labels(seeds).items():
        cells = [_figure(seeds, name, key, 0) for key in ("utterances", "words")]
        cells.append(_figure(seeds, name, "length", 1))
        cells += [
            _figure(seeds, name, key, 3) for key in ("distinct_1", "distinct_2", "matched_1", "matched_2")
        ]
        rows.append([label, *cells])
    return markdown(head, rows)


def coherence(results: Results) -> str:
    """What they repeat, and whether they stay on the start's topic."""
    seeds = _seeds(results)
    head = [
        "system", "dialogues", "trigrams said before", "similarity to the start",
        "to the start of another dialogue",
    ]  # fmt: skip
    rows = [
        [
            label,
            " or ".join(dict.fromkeys(str(s["dialogues"][name]) for s in seeds if name in s["dialogues"])),
            *(_figure(seeds, name, key, 3) for key in ("repeated_3", "topic", "topic_other")),
        ]
        for name, label in _labels(seeds).items()
    ]
    return markdown(head, rows)


def differences(results: Results) -> str:
    """Pairs of systems over the same starts."""
    seeds = _seeds(results)
    pairs = dict.fromkeys(pair for seed in seeds for pair in seed["differences"])
    rows = []
    for pair in pairs:
        of = [seed["differences"][pair] for seed in seeds if pair in seed["differences"]]
        cells = [
            _cell([one[key] for one in of if key in one], digits, "+")
            for key, (_, digits) in DIFFERENCES.items()
        ]
        rows.append([f"`{pair}`", *cells])
    return markdown(["difference", *(label for label, _ in DIFFERENCES.values())], rows)


def systems(results: Results) -> str:
    """What the names mean, and what the replies cost."""
    seeds = _seeds(results)
    rows = []
    for name, label in _labels(seeds).items():
        spent = [seed["cpu_s"][name] / 60 for seed in seeds if name in seed["cpu_s"]]
        rows.append([f"`{name}`", label, _cell([[minutes] for minutes in spent], 1)])
    return markdown(["name", "system", "CPU minutes of its self-chats"], rows)


def models(results: Results) -> str:
    """The runs, and what they cost."""
    rows = []
    for number, seed in results["seeds"].items():
        for name, one in seed["models"].items():
            shape = f"{one['geometry']['n_layer']} layers of {one['geometry']['hidden_size']}"
            minutes = "" if one["cpu_s"] is None else f"{one['cpu_s'] / 60:.1f}"
            rows.append([number, f"`{name}`", f"`{one['stage']}`", shape, f"{one['step']:,}", minutes])
    return markdown(["seed", "run", "stage", "size", "steps", "CPU minutes of training"], rows)


def picture(results: Results) -> str:
    """What the script has drawn of the seed that it was run with last."""
    return "![Length, variety and repetition of all systems](self_chats.png)"


def _seeds(results: Results) -> list[dict[str, Any]]:
    return list(results["seeds"].values())


def _labels(seeds: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Names of all systems that some seed has, and what they are."""
    return {name: label for seed in seeds for name, label in seed["labels"].items()}


def _figure(seeds: Sequence[dict[str, Any]], name: str, key: str, digits: int) -> str:
    """A measure of a system."""
    return _cell([of[key] for seed in seeds if key in (of := seed["figures"].get(name, {}))], digits)


def _cell(found: Sequence[Sequence[float | None]], digits: int, sign: str = "") -> str:
    """Value (low to high) of one seed, or the mean of several [each]."""
    values = [value for value, *_ in found if value is not None]
    if not values:
        return ""
    shown = [f"{value:{sign},.{digits}f}" for value in values]
    if len(values) > 1:
        return f"{sum(values) / len(values):{sign},.{digits}f} [{', '.join(shown)}]"
    interval = next(of[1:] for of in found if of[0] is not None)
    if len(interval) < 2 or None in interval:
        return shown[0]
    low, high = interval
    return f"{shown[0]} ({low:{sign},.{digits}f} to {high:{sign},.{digits}f})"
