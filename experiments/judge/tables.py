"""The tables of the judges as Markdown; see experiments/tables.py."""

from __future__ import annotations

from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
NAMES = {"smollm2": "SmolLM2-135M-Instruct", "words": "shared words", "coherence": "coherence by `small`"}


def controls(results: Results) -> str:
    """How each judge did in the controls."""
    rows = []
    for judge, found in results["judges"].items():
        readable, shuffled = found["controls"]["readable"], found["controls"]["shuffled"]
        tied = shuffled["n"] - shuffled["won"] - shuffled["lost"]
        rows.append(
            [
                NAMES[judge],
                f"{readable['unreadable']:.2f}",
                f"{shuffled['won']}, {shuffled['lost']}, {tied}",
                f"{shuffled['p']:.2g}",
                f"{shuffled['won_by_words']}",
                f"{shuffled['better']}, {shuffled['worse']}",
                f"{shuffled['p_words']:.2g}",
                f"{shuffled['consistency']:.2f}",
                f"{shuffled['first']:.2f}" if "first" in shuffled else "",
                "withheld" if found["withheld"] else "shown",
            ]
        )
    head = ["judge", "without a verdict", "won, lost, tied", "p", "found by shared words"]
    head += ["found by the judge alone, by words alone", "p", "consistent", "first", "table"]
    return markdown(head, rows)


def systems(results: Results) -> str:
    """Win rates, of the judges that passed."""
    rows = [
        [
            NAMES[judge],
            system,
            _interval(found["win_rate"]),
            _interval(found["strength"]),
            _interval(found["strength_same_length"]),
            f"{found['words']['value']:.1f}",
        ]
        for judge, one in results["judges"].items()
        for system, found in one["systems"].items()
    ]
    if not rows:
        return "No judge passed its controls."
    head = ["judge", "system", "win rate", "strength", "strength at equal length", "words"]
    return markdown(head, rows, left=2)


def _interval(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return figure["note"]
    if figure["low"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"
