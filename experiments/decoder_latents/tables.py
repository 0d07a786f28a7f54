"""The tables of README.md; see experiments/tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.tables import markdown

Results = Mapping[str, Any]
DECODERS = {"as_it_is": "SmolLM2 as it is", "1_coarse": "after stage 1"}
SHARES = ("of_context", "of_response", "of_both")
VARIANTS = {
    "recipe": "the recipe: balanced, as long as a word, at the response",
    "learned": "bias learned",
    "short": "as short as ours",
    "front": "in front",
    "as_ours": "all three, as in our own models",
    "rate-1.25e-3": "the recipe, rate 1.25e-3",
    "rate-2e-4": "the recipe, rate 2e-4",
}
FIGURES = {
    "z_mutual_information": "mutual information",
    "z_effective": "latents in effect",
    "bow": "bag of words",
    "nll": "nll, z from the posterior",
    "nll_uniform": "nll, z uniform",
}


def read(results: Results) -> str:
    """How much the outputs of a record's first and last slot differ between records, and by what."""
    rows = []
    for decoder, found in results["slots"]["decoders"].items():
        for mask, slots in found["read"].items():
            for slot, of in slots.items():
                shares = [f"{of[share]:.3f}" for share in SHARES]
                said = f"{of['spread'] ** 2 * of['of_response']:.4f}"
                rows.append([DECODERS[decoder], mask, slot, f"{of['spread']:.3f}", *shares, said])
    head = ["decoder", "contexts read", "slot", "spread", "context", "response", "both", "of the response"]
    return markdown(head, rows, left=3)


def heeded(results: Results) -> str:
    """How much a vector changes what is said, by its place and length."""
    rows = [
        [DECODERS[decoder], place, *(f"{kl:.4f}" for kl in kls)]
        for decoder, found in results["slots"]["decoders"].items()
        for place, kls in found["heeded"].items()
    ]
    lengths = [f"{length:g} words long" for length in results["slots"]["lengths"]]
    return markdown(["decoder", "z stands", *lengths], rows, left=2)


def trained(results: Results) -> str:
    """The variants after their last step."""
    rows = []
    for name, run in results.get("runs", {}).items():
        last = run["curve"][-1]
        rows.append([VARIANTS[name], *(f"{last[figure]:.3f}" for figure in FIGURES)])
    return markdown(["variant", *FIGURES.values()], rows) if rows else "The trainings are still to be run."
