"""The tables of README.md; see experiments/tables.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

RANKING = {
    "first_3e-4": "as `common`, rate 3e-4, from the evening's stage 1, perplexity 62.8",
    "first_3e-4_seed-12": "another seed",
    "first_1.5e-4": "rate 1.5e-4",
    "first_6e-4": "rate 6e-4",
    "first_3e-4_clip-0.1": "clipping at 0.1 instead of 1.0, as Knover",
    "first_3e-4_masked-0.05": "5 % of the words masked",
    "first_3e-4_masked": "15 % masked, as Knover",
    "first_3e-4_identical": "negatives may be the true text, as Knover",
    "first_3e-4_negatives-3": "three negatives for each response",
    "first_3e-4_same-conversation": "22 % of the negatives are the turn after the response",
    "first_3e-4_mean": "the mean of all slots is read, not the first",
    "first_6e-4_batch-16384": "100 steps of 16,384 tokens, rate 6e-4",
    "first_3e-4_length-32": "32 + 32 tokens per sample; other contexts",
    "first_3e-4_parent-520": "from the quickstart's stage 1, perplexity 141",
    "first_3e-4_after-dual": "from `dual_1e-3`'s backbone",
    "first_3e-4_then-3e-4": "400 steps more, from `first_3e-4`",
    "first_3e-4_then-masked": "the same with 15 % masked: a ramp in two steps",
    "small_first": "from the larger stage 1 of `experiment=small`, perplexity 63.4",
    "small_first_warmup-10": "the same, warm-up of 10 steps instead of 100",
    "small_first_warmup-300": "the same, warm-up of 300 steps",
    "small_first_batch-1024": "the same, 1,600 steps of 1,024 tokens, rate 1.5e-4",
    "small_first_batch-1024_3e-4": "the same, 1,600 steps of 1,024 tokens, rate 3e-4",
    "dual_1e-3": "`dual`, rate 1e-3",
    "dual_3e-4": "`dual`, rate 3e-4",
    "dual_3e-3": "`dual`, rate 3e-3",
    "dual_1e-3_masked": "`dual`, 15 % masked",
    "first_copied-0.5_3e-4": "copied turns in half of the contexts (removed)",
    "first_copied-0.5_3e-4_seed-12": "the same, another seed",
    "first_copied-0.5_3e-4_masked": "the same, 15 % masked",
}
WRITING = {
    "knover": "Knover: both heads tied",
    "knover_seed-12": "the same, another seed",
    "linear-recognition": "linear recognition head, as the paper",
    "linear-bow": "linear bag-of-words head, as the paper",
    "paper": "both linear: the paper's text",
    "paper_seed-12": "the same, another seed",
    "keep-eos": "recognition reads the response's end, as Knover in 2020",
    "tau-0.33": "temperature 0.33 instead of 0.67",
    "tau-1": "temperature 1.0",
}


def ranking(results: dict[str, Any]) -> str:
    """Pair accuracy and P@1 at each validation of stage 2.2, accuracy and CPU seconds at the last one."""
    shared = results["overlap"]
    rows = [
        ["variant", "pair accuracy", "P@1 of 10", "accuracy", "CPU s"],
        ["---", "---", "---", "---:", "---:"],
        ["chance", "0.500", "0.100", "0.500", ""],
        ["counting shared words", f"{shared['pair_acc']:.3f}", f"{shared['p1']:.3f}", "", ""],
    ]
    for name, label in RANKING.items():
        if name in results["variants"]:
            curve = results["variants"][name]["curve"]
            cells = [course(curve, "pair_acc", 3), course(curve, "p1", 3)]
            rows.append([label, *cells, f"{curve[-1]['coherence_acc']:.3f}", f"{curve[-1]['cpu_s']:.0f}"])
    return lines(rows)


def writing(results: dict[str, Any]) -> str:
    """What z says at each validation of stage 2.1; all else and CPU seconds at the last one."""
    variants = results.get("writing", {"variants": {}})["variants"]
    if not variants:
        return "No variant of stage 2.1 has been run yet."
    heads = ["perplexity, z from the posterior", "z uniform", "bag of words, nats"]
    heads += ["mutual information, nats", "latents in effect", "with 2 % or more", "CPU s"]
    rows = [["variant", *heads], ["---", "---:", "---:", "---:", "---", "---:", "---:", "---:"]]
    for value in dict.fromkeys(found.get("parent_ppl") for found in variants.values()):
        if value is not None:
            rows.append(["the stage 1 that they start from, without z", "", f"{value:.1f}", *[""] * 5])
    rows.append(["z says nothing", "", "", "", "0.00", "20.0", "20", ""])
    rows.append(["z says all it can", "", "", "", f"{math.log(20):.2f}", "20.0", "20", ""])
    for name, label in WRITING.items():
        if name in variants:
            last = variants[name]["curve"][-1]
            said = course(variants[name]["curve"], "z_mutual_information", 2)
            cells = [f"{last['ppl']:.1f}", f"{last['ppl_uniform']:.1f}", f"{last['bow']:.3f}", said]
            cells += [f"{last['z_effective']:.1f}", f"{last['z_in_use']:.0f}", f"{last['cpu_s']:.0f}"]
            rows.append([label, *cells])
    return lines(rows)


def course(curve: Sequence[dict[str, float]], name: str, digits: int) -> str:
    """A figure at each validation."""
    return ", ".join(f"{point[name]:.{digits}f}" for point in curve)


def lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
