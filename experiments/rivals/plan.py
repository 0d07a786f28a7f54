"""Who is trained on what, and what is charged to whom. Only arithmetic: nothing heavy is imported.

A row is a system that is compared. It is charged every run that it needs, its ranker and what that starts
from included, and its runs together take the budget: so many CPU minutes, or so many tokens of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gpt2", "1_coarse", "2_gen", "2_eval_dual", "plato"]


@dataclass(frozen=True)
class Run:
    """A training."""

    kind: Kind
    """gpt2, or a stage of train.py."""
    percent: int
    """Of the budget."""
    parent: str | None = None
    """The run whose weights it starts from."""


@dataclass(frozen=True)
class Row:
    """A system."""

    label: str
    generation: str
    """The run that writes."""
    ranker: str | None = None
    """The run that chooses."""
    charged: tuple[str, ...] = ()
    """Runs whose cost it bears."""
    candidates: int = 1
    """Written for each reply."""


RUNS = {
    "gpt2_100": Run("gpt2", 100),
    "gpt2_85": Run("gpt2", 85),
    "gpt2_35": Run("gpt2", 35),
    "coarse_85": Run("1_coarse", 85),
    "coarse_50": Run("1_coarse", 50),
    "latent_50": Run("2_gen", 50, "coarse_50"),
    "latent_35": Run("2_gen", 35, "coarse_50"),
    "ranker_of_85": Run("2_eval_dual", 15, "coarse_85"),
    "ranker_of_50": Run("2_eval_dual", 15, "coarse_50"),
    "plato_100": Run("plato", 100),
}
"""Stage 1 gets half of PLATO-2's budget, stage 2.1 a third and the ranker the rest, about as in
`experiment=evening`; none of it was tuned here."""
ROWS = {
    "a": Row("GPT-2, one sample", "gpt2_100", None, ("gpt2_100",)),
    "b": Row(
        "GPT-2, 20 samples, our ranker", "gpt2_35", "ranker_of_50",
        ("gpt2_35", "coarse_50", "ranker_of_50"), 20,
    ),
    "b2": Row(
        "the same, the ranker's stage 1 for free", "gpt2_85", "ranker_of_50", ("gpt2_85", "ranker_of_50"), 20
    ),
    "c": Row("stage 1, 20 samples, ranker", "coarse_85", "ranker_of_85", ("coarse_85", "ranker_of_85"), 20),
    "d": Row("stage 2.1, a random z", "latent_50", None, ("coarse_50", "latent_50")),
    "e": Row(
        "PLATO-2: stage 2.1, 20 latents, ranker", "latent_35", "ranker_of_50",
        ("coarse_50", "latent_35", "ranker_of_50"), 20,
    ),
    "f": Row("PLATO, one stage", "plato_100", None, ("plato_100",), 20),
}  # fmt: skip
FIRST = ("e", "b", "c", "a", "d", "f", "b2")
"""The order in which rows are made: those of the main question first."""
SMOLLM2 = "SmolLM2-135M"
"""The line apart: trained by others on 2 trillion tokens."""
RATE = 1e-3
"""Of GPT-2 where no other is tried."""
TRIED = Run("gpt2", 10)
"""What each rate of GPT-2 gets to show what it is worth; not charged."""
DIFFERENCES = (("e", "b"), ("e", "b2"), ("e", "c"))


@dataclass(frozen=True)
class Budget:
    """What every row may use up."""

    unit: Literal["cpu", "tokens"]
    amount: float
    """CPU minutes, or millions of tokens of text."""

    @property
    def name(self) -> str:
        """In files and tables: `cpu-20`, `tokens-10`."""
        return f"{self.unit}-{self.amount:g}"


@dataclass(frozen=True)
class Pace:
    """What an optimizer step takes."""

    cpu_s: float
    samples: float


def steps_of(run: Run, budget: Budget, paces: Mapping[str, Pace], tokens_per_sample: float) -> int:
    """Optimizer steps that a run's part of the budget pays for, to the nearest one; at least one.

    Args:
        run: the training.
        budget: the whole.
        paces: by kind.
        tokens_per_sample: tokens of text in a sample, ends included; padding does not count.
    """
    pace = paces[run.kind]
    part = budget.amount * run.percent / 100
    if budget.unit == "cpu":
        return max(1, round(60 * part / pace.cpu_s))
    return max(1, round(1e6 * part / (pace.samples * tokens_per_sample)))


def needed(rows: str | list[str]) -> list[str]:
    """The runs of some rows, each after the one that it starts from."""
    found: dict[str, None] = {}
    for row in rows:
        for name in (*ROWS[row].charged, ROWS[row].generation, ROWS[row].ranker):
            if name is not None:
                parent = RUNS[name].parent
                found |= dict.fromkeys([parent, name] if parent else [name])
    return list(found)
