"""The tables of README.md, and the names of what is measured; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.tables import markdown

BY_CONTEXT = {
    "chrf": "chrF",
    "similarity": "similarity",
    "best_chrf": "chrF, best of 20",
    "best_similarity": "similarity, best of 20",
    "coverage": "coverage",
}
"""Against the references of the context: chrF with the best of them, cosine with the nearest, and the share
of them that some of 20 candidates is near."""
OF_ALL = {"matched_2": "distinct-2", "candidates_self_bleu": "self-BLEU of candidates", "length": "words"}
"""Of all replies together, from `plato2 evaluate replies`."""
RUN_FIGURES = (("z_mutual_information", 2), ("pair_acc", 3), ("p1", 3), ("overlap_p1", 3))
"""Of a run's last validation, and their decimals."""
OF_CHATS = {"repeated_3": "trigrams said before"}
SETS = {"dailydialog": "DailyDialog, several references", "chitchat": "chitchat's test split, one reference"}
LABELS = {**BY_CONTEXT, **OF_ALL, **OF_CHATS}


def figures(results: Mapping[str, Any]) -> str:
    """Budget by budget and set by set, the means over seeds of each row; self-chats beside every set."""
    parts = []
    for name, there in results["budgets"].items():
        means = there["means"]
        for chosen, label in SETS.items():
            shown = [m for m in (*BY_CONTEXT, *OF_ALL) if any(m in r.get(chosen, {}) for r in means.values())]
            if not shown:
                continue
            heads = ["row", "CPU minutes", "million tokens", *(LABELS[m] for m in shown), *OF_CHATS.values()]
            rows = []
            for row, of in means.items():
                charged, chats = of.get("charged", {}), of.get("chats", {})
                cells = [charged.get("cpu_minutes"), charged.get("million_tokens")]
                cells += [of.get(chosen, {}).get(m) for m in shown] + [chats.get(m) for m in OF_CHATS]
                known = results["rows"].get(row)
                called = f"({row}) {known['label']}" if known else f"{row}, apart"
                rows.append([called, *("" if cell is None else number(cell) for cell in cells)])
            parts.append(f"{budget(name, there)}; {label}:\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts)


def differences(results: Mapping[str, Any]) -> str:
    """By how much a row is ahead of another over the same contexts."""
    parts = []
    for name, there in results["budgets"].items():
        rows = []
        for pair, sets in there["differences"].items():
            one, _, other = pair.partition(" - ")
            for chosen, measured in sets.items():
                for m, d in measured.items():
                    of = LABELS[m] + ("" if chosen == "chats" else f", {chosen}")
                    by_seed = ", ".join("" if v is None else signed(v) for v in d["seeds"])
                    interval = f"{signed(d['low'])} to {signed(d['high'])}"
                    rows.append([f"({one}) - ({other})", of, signed(d["value"]), interval, by_seed])
        if rows:
            heads = ["difference", "of", "value", "95 % interval", "each seed"]
            parts.append(f"{budget(name, there)}:\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts) or "No seed has both rows of a difference."


def rates(results: Mapping[str, Any]) -> str:
    """What the learning rates of GPT-2 were worth that were tried."""
    rows = []
    for name, there in results["budgets"].items():
        compared = [one for seed in there["seeds"].values() if (one := seed.get("rates", {})).get("tried")]
        found = compared[0] if compared else {"tried": {}}  # all seeds of a budget have the same
        for rate, tried in found["tried"].items():
            chosen = "yes" if float(rate) == found["rate"] else ""
            cells = [f"{tried['steps']:,}", f"{tried['cpu_s']:.0f}", f"{tried['ppl']:.1f}", chosen]
            rows.append([said(name), f"{float(rate):.0e}".replace("e-0", "e-"), *cells])
    heads = ["budget", "rate", "steps", "CPU s", "perplexity on the validation split", "taken"]
    return markdown(heads, rows) if rows else "Only one rate was given, so none was compared."


def trained(results: Mapping[str, Any]) -> str:
    """The runs of the first seed: what they cost, and what they reached on the validation split."""
    rows = []
    for name, there in results["budgets"].items():
        seed = next(iter(there["seeds"].values()))
        for run, of in seed["runs"].items():
            users = [row for row, known in results["rows"].items() if run in known["percent"]]
            perplexity = of.get("ppl_uniform", of.get("ppl"))
            cells = [f"{of['steps']:,}", f"{of['samples']:,.0f}", f"{of['cpu_s']:,.0f}"]
            cells += ["" if of.get(m) is None else f"{of[m]:.{digits}f}" for m, digits in RUN_FIGURES]
            cells[3:3] = ["" if perplexity is None else f"{perplexity:.1f}"]
            rows.append([said(name), f"`{run}`", " ".join(users), *cells])
    heads = ["budget", "run", "of rows", "steps", "samples", "CPU s", "perplexity", "nats of z"]
    return markdown([*heads, "pair accuracy", "P@1 of 10", "by shared words"], rows)


def budget(name: str, there: Mapping[str, Any]) -> str:
    """A budget and its seeds in words."""
    n = len(there["seeds"])
    return f"{said(name)} a row, {n} seed{'s' * (n > 1)}"


def said(name: str) -> str:
    """`cpu-20` or `tokens-5` in words."""
    unit, _, amount = name.partition("-")
    return f"{amount} {'CPU minutes' if unit == 'cpu' else 'million tokens of text'}"


def number(value: float) -> str:
    """A figure of a table."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.2f}" if abs(value) >= 1 else f"{value:+.3f}"
