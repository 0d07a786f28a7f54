"""The table of README.md and of the model card; see experiments/tables.py."""

from __future__ import annotations

from typing import Any

SHOWN = (
    ("selection_random", "coherence", "random/p1", "finds the true response among ten (P@1)"),
    ("selection_random", "coherence", "random/mrr", "its mean reciprocal rank"),
    ("selection_random", "shared words", "random/p1", "P@1 of counting shared words"),
    ("selection_random", "random", "random/p1", "P@1 of random numbers; a tenth is expected"),
    ("selection_matched", "coherence", "matched/p1", "P@1 among ten of one length"),
    ("selection_matched", "shared words", "matched/p1", "P@1 of counting shared words there"),
    (
        "latents",
        "small",
        "mutual_information",
        "mutual information of z, as recognition names it, with context and response, nats",
    ),
    ("latents", "small", "latents_in_effect", "latents in effect, of 20"),
    ("latents", "small", "greedy_different", "greedy: how many of 20 candidates differ, in a word or more"),
    ("latents", "small", "greedy_distinct_2", "greedy: distinct-2 of the 20"),
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
    ("val/ppl_uniform", "with one z, uniform", 1),
    ("val/z_mutual_information", "mutual information", 2),
    ("val/pair_acc", "pair accuracy", 3),
    ("val/p1", "P@1 of 10", 3),
    ("val/overlap_p1", "of shared words", 3),
)


def test_split(results: dict[str, Any]) -> str:
    """What was measured on the test split, with intervals."""
    rows = ["| figure, on the test split | value | 95 % interval |", "| --- | ---: | ---: |"]
    rows.append(f"| perplexity per token, the mean over all z | {results['perplexity']['value']:.1f} | |")
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


def people(results: dict[str, Any]) -> str:
    """Who of the test split also speaks in training."""
    found = results["unmasked"]["people"]
    known = f"{found['conversations_of_a_known_pair']} of {found['conversations']}"
    rows = ["| of the test split, in training, too | number |", "| --- | ---: |"]
    rows.append(f"| conversations | 0 of {found['conversations']} |")
    rows.append(f"| people | {found['known_people']} of {found['people']} |")
    rows.append(f"| turns of such people | {found['turns_of_known_people']:.0%} |")
    rows.append(f"| conversations of two who talk with each other there | {known} |")
    return "\n".join(rows)


def chosen(results: dict[str, Any]) -> str:
    """P@1 of 10 by where the nine others are from."""
    names = ("coherence", "shared words", "typed alike", "coherence less shared words")
    rows = [
        f"| the nine others are of | contexts | {' | '.join(names)} |",
        f"| --- | {'---: | ' * 5}".rstrip(),
    ]
    for kind, found in results["unmasked"]["chosen"].items():
        n = f"{found['contexts']} of {found['conversations']} conversations"
        rows.append(f"| {kind} | {n} | {' | '.join(_cell(found[name]) for name in names)} |")
    return "\n".join(rows)


def spoilt(results: dict[str, Any]) -> str:
    """How often the true pair is ahead of itself in disorder."""
    rows = ["| the true pair against the same with | pairs | is ahead |", "| --- | ---: | ---: |"]
    for name, found in results["unmasked"]["spoilt"].items():
        rows.append(f"| {name} | {found['pairs']} | {_cell(found['the true one is ahead'])} |")
    return "\n".join(rows)


def used(results: dict[str, Any]) -> str:
    """What writing makes of z."""
    found = results["unmasked"]["used"]
    ways = ("one z, uniform", "mean over z", "z from the posterior")
    rows = [
        f"| perplexity: {' | '.join(ways)} | nats a response that z saves |",
        f"| {'---: | ' * 4}".rstrip(),
    ]
    rows.append(f"| {' | '.join(f'{found[way]:.1f}' for way in ways)} | {found['nats saved']:.3f} |")
    return "\n".join(rows)


def _cell(figure: list[float]) -> str:
    value, low, high = figure
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
