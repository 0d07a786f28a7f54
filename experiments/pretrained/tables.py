"""The tables of README.md and of the model card; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.tables import markdown

Results = Mapping[str, Any]
SETS = {"random": "ten, any", "matched": "ten of one length", "another": "control: after another context"}
SELECTED = {"pair_acc": "pair accuracy", "p1": "P@1", "mrr": "MRR"}
REPLIES = {
    "chrf": "chrF",
    "similarity": "similarity",
    "best_similarity": "similarity, best of 20",
    "coverage": "coverage",
    "matched_2": "distinct-2",
    "length": "words",
}
LABELS = {
    "dailydialog": "DailyDialog, several references",
    "chitchat": "chitchat's test split, one reference",
}
CHATS = {"length": "words", "distinct_2": "distinct-2", "repeated_3": "trigrams said before"}
LATENTS = {
    "mutual_information": "mutual information of z with context and response, nats",
    "heeded": "nats of a response that its own z saves, beside the z of other responses",
    "latents_in_effect": "latents in effect, of 20",
    "greedy_different": "greedy: how many of 20 candidates differ",
    "distinct_2_between_z": "sampled: distinct-2 of one sample of each z",
    "distinct_2_within_z": "sampled: distinct-2 of 20 samples of one z",
    "distinct_2_stage_1": "sampled: distinct-2 of 20 samples of stage 1",
    "distinct_2_difference": "sampled: the difference of the first two",
}
VALIDATED = {
    "val/ppl": "perplexity",
    "val/ppl_uniform": "perplexity, z uniform",
    "val/z_mutual_information": "mutual information",
    "val/pair_acc": "pair accuracy",
    "val/p1": "P@1 of 10",
}


def selection(results: Results) -> str:
    """Who finds the right reply, set by set."""
    parts = []
    for name, label in SETS.items():
        found = results["selection"]["sets"].get(name, {})
        rows = [
            [f"`{scorer}`", *(cell(of[key]) for key in SELECTED)]
            for scorer, of in sorted(found.items(), key=lambda one: -one[1]["p1"][0])
        ]
        parts.append(f"{label}:\n\n{markdown(['chosen by', *SELECTED.values()], rows)}")
    return "\n\n".join(parts)


def replies(results: Results) -> str:
    """What each row said to the contexts of each set."""
    parts = []
    for name, label in LABELS.items():
        shown = [m for m in REPLIES if any(known(of.get(name, {}).get(m)) for of in results["rows"].values())]
        if not shown:
            continue
        rows = [
            [results["labels"][row], *(cell(of.get(name, {}).get(m)) for m in shown)]
            for row, of in results["rows"].items()
        ]
        parts.append(f"{label}:\n\n{markdown(['row', *(REPLIES[m] for m in shown)], rows)}")
    return "\n\n".join(parts)


def chats(results: Results) -> str:
    """Self-chats."""
    rows = [
        [results["labels"][row], *(cell(of.get(m)) for m in CHATS)] for row, of in results["chats"].items()
    ]
    return markdown(["row", *CHATS.values()], rows)


def latents(results: Results) -> str:
    """What z says."""
    rows = [[LATENTS[key], cell(of)] for key, of in results["latents"].items()]
    return markdown(["stage 2.1", "value"], rows)


def training(results: Results) -> str:
    """What each stage cost, and what its last validation found."""
    rows = []
    for of in results["runs"].values():
        found = [f"{VALIDATED[k]} {of['validation'][k]:.3f}" for k in VALIDATED if k in of["validation"]]
        head = f", head `{of['head']}`" if of["head"] else ""
        rows.append(
            [
                f"`{of['stage']}`{head}",
                ", ".join(found),
                f"{of['steps']:,}",
                f"{of['million_tokens']:.2f}",
                f"{of['trained_parameters'] / 1e6:.2f}",
                f"{of['cpu_s'] / 60:.0f}",
                f"{of['memory_gib']:.1f}",
            ]
        )
    head = ["stage", "on the validation split", "steps", "million tokens", "million trained parameters"]
    return markdown([*head, "CPU minutes", "GiB"], rows, left=2)


def costs(results: Results) -> str:
    """What a reply takes of one CPU thread, and the most memory."""
    rows = [
        [results["labels"][row], f"{of['cpu_s']:.2f}", f"{of['memory_gib']:.2f}"]
        for row, of in results["costs"].items()
    ]
    return markdown(["row", "CPU s of a reply", "GiB"], rows)


def card(results: Results) -> dict[str, Any]:
    """What the model card says."""
    runs = results["runs"].values()
    return {
        "hours": f"{sum(of['cpu_s'] for of in runs) / 3600:.1f}",
        "steps": ", ".join(f"{of['steps']:,} steps of {of['stage']}" for of in runs),
        "selection": selection(results),
        "replies": replies(results),
        "latents": latents(results),
    }


def known(figure: Sequence[float | None] | None) -> bool:
    """Whether there is a value."""
    return figure is not None and figure[0] is not None


def cell(figure: Sequence[float | None] | None) -> str:
    """Value (low to high)."""
    if figure is None or figure[0] is None:
        return ""
    value, *interval = figure
    digits = 1 if abs(value) >= 10 else 3
    if len(interval) < 2 or None in interval:
        return f"{value:.{digits}f}"
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
