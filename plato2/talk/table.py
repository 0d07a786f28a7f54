"""Candidates as a table for the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal would obey instead of showing; it is never printed."""


def printable(text: str) -> str:
    """The text with a mark in place of each character that would control the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def candidate_table(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """Candidates (`{"text", "latent", "log_prob", "coherence"}`) in the order given."""
    table = Table()
    for column in ("rank", "z", "coherence", "log p"):
        table.add_column(column, justify="right")
    table.add_column("reply", overflow="fold")
    for number, candidate in enumerate(candidates, start=1):
        latent, score, log_prob = (candidate[key] for key in ("latent", "coherence", "log_prob"))
        table.add_row(
            str(number),
            "" if latent is None else str(latent),
            "" if score is None else f"{score:.3f}",
            "" if log_prob is None else f"{log_prob:.2f}",
            Text(printable(candidate["text"])),
        )
    scores = [candidate["coherence"] for candidate in candidates]
    if None not in scores and scores != sorted(scores, reverse=True):
        table.caption = "the last ones repeat words or have no end (penalties)"
        table.caption_justify = "left"
    return table
