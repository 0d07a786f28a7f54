"""The table of README.md and of the model card; see experiments/tables.py."""

from __future__ import annotations

from typing import Any

SHOWN = (
    ("selection_random", "coherence", "random/p1", "finds the true response among ten (P@1)"),
    ("selection_random", "coherence", "random/mrr", "its mean reciprocal rank"),
    ("selection_random", "shared words", "random/p1", "P@1 of counting shared words"),
    ("selection_random", "random", "random/p1", "P@1 of guessing"),
    ("selection_matched", "coherence", "matched/p1", "P@1 among ten of one length"),
    ("selection_matched", "shared words", "matched/p1", "P@1 of counting shared words there"),
    ("latents", "small", "mutual_information", "mutual information of z with context and response, nats"),
    ("latents", "small", "latents_in_effect", "latents in effect, of 20"),
    ("latents", "small", "greedy_different", "greedy: how many of 20 candidates differ"),
    (
        "latents",
        "small",
        "distinct_2_difference",
        "sampled: distinct-2 of 20 latents less that of 20 samples of one",
    ),
    ("replies", "small", "length", "static replies: words"),
    ("replies", "small", "distinct_2", "static replies: distinct-2"),
    ("replies", "small", "similarity", "static replies: similarity to the human reply"),
    ("dialogues", "small", "length", "self-chats: words per utterance"),
    ("dialogues", "small", "distinct_2", "self-chats: distinct-2"),
    ("dialogues", "small", "repeated_3", "self-chats: trigrams said before"),
    ("dialogues", "small", "offensive_list", "self-chats: utterances with an offensive word of our list"),
)
"""Of the card: verb, system, measure, and what it is called there."""
VALIDATED = (
    ("val/ppl", "perplexity", 1),
    ("val/ppl_uniform", "with z uniform", 1),
    ("val/z_mutual_information", "mutual information", 2),
    ("val/pair_acc", "pair accuracy", 3),
    ("val/p1", "P@1 of 10", 3),
    ("val/overlap_p1", "of shared words", 3),
)


def test_split(results: dict[str, Any]) -> str:
    """What was measured on the test split, with intervals."""
    rows = ["| figure, on the test split | value | 95 % interval |", "| --- | ---: | ---: |"]
    rows.append(f"| perplexity per token, z uniform | {results['perplexity']['value']:.1f} | |")
    for verb, system, key, label in SHOWN:
        figure, digits = results[verb]["systems"][system][key], results[verb]["measures"][key]["digits"]
        low, high = figure.get("low"), figure.get("high")
        interval = "" if low is None else f"{low:.{digits}f} to {high:.{digits}f} "
        rows.append(f"| {label} | {figure['value']:.{digits}f} | {interval}|")
    return "\n".join(rows)


def training(results: dict[str, Any]) -> str:
    """What each stage cost, and what its last validation found."""
    rows = ["| stage | steps | CPU minutes | on the validation split |", "| --- | ---: | ---: | --- |"]
    for stage, run in results["runs"].items():
        found = run["validation"]
        shown = [f"{label} {found[key]:.{digits}f}" for key, label, digits in VALIDATED if key in found]
        rows.append(f"| `{stage}` | {run['steps']:,} | {run['cpu_s'] / 60:.0f} | {', '.join(shown)} |")
    return "\n".join(rows)


def controls(results: dict[str, Any]) -> str:
    """What the evaluation model finds on texts that were spoilt."""
    rows = ["| texts | pair accuracy | P@1 of 10 | P@1, one length |", "| --- | ---: | ---: | ---: |"]
    for name, found in results["controls"].items():
        shown = (f"{found[key]:.3f}" for key in ("pair_acc", "p1", "p1_matched"))
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)
