"""The options of automatic evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plato2.config import check_options, option

Kind = Literal["replies", "dialogues"]
BOTH = "both"


@dataclass(frozen=True)
class AutomaticOptions:
    """What is evaluated, and how; all of it changes figures.

    Raises:
        UserError: an impossible value.
    """

    speaker: str = option(
        BOTH, help="Evaluate only the turns of this speaker: A or B of a self-chat, or another name; or both."
    )
    match_words: int = option(
        0, help="Words of each system that distinct is compared at.", ge=0, means={0: "as the smallest has"}
    )
    vocabulary: int = option(
        30522, help="Words of the vocabulary that expectation-adjusted distinct supposes.", ge=2
    )
    near: float | None = option(
        None,
        help="Similarity from which a candidate is near a reference; default: the median of a reference's "
        "similarity to the nearest other reference of its context.",
        ge=-1,
        le=1,
    )
    offensive: list[str] = option(
        factory=lambda: ["en", "zh"],
        help="A list of offensive words: a file, or en or zh.",
        default_text="en, zh",
    )
    model: Path | None = option(
        None, help="Run, checkpoint or model folder of stage 1_coarse or 2_gen that gives perplexity."
    )
    embedding: bool = option(True, help="Measure similarity by a sentence encoder, which takes long.")
    device: str = option("auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")
    seed: int = option(0, help="Of all that is drawn.", ge=0)

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self)
        if not self.offensive:
            object.__setattr__(self, "offensive", ["en", "zh"])
