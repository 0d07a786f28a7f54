"""The paper's tables of results (Bao et al., Findings of ACL 2021), to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HUMAN = ("coherence", "informativeness", "engagingness", "humanness")
AUTOMATIC = ("distinct_1", "distinct_2", "length")
LABELS = {
    "coherence": "Coherence",
    "informativeness": "Informativeness",
    "engagingness": "Engagingness",
    "humanness": "Humanness",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "length": "Average length",
    "map": "MAP",
    "mrr": "MRR",
    "p1": "P@1",
}
DIGITS = {"length": 1}
KAPPA = 0.466
"""Fleiss' kappa of the paper's raters (section 3.4.3)."""


@dataclass(frozen=True)
class PaperTable:
    """A table of systems by measures."""

    number: str
    title: str
    measures: tuple[str, ...]
    rows: Mapping[str, Sequence[float]]
    """System -> its values in the order of `measures`; none where the paper's numbers are not known here."""
    note: str = ""


TALK = PaperTable(
    "1 and 2",
    "Self-chat: 200 start utterances, 10 utterances each, one speaker evaluated; people talking to systems",
    HUMAN + AUTOMATIC,
    {
        "PLATO": (0.568, 0.564, 0.340, 0.280, 0.042, 0.255, 34.961),
        "PLATO-2 93M": (0.688, 0.672, 0.640, 0.560, 0.047, 0.276, 18.292),
        "DialoGPT": (0.720, 0.712, 0.340, 0.100, 0.150, 0.508, 9.335),
        "PLATO-2 314M": (1.572, 1.620, 1.300, 1.160, 0.065, 0.435, 22.732),
        "Blender": (1.856, 1.816, 1.820, 1.540, 0.117, 0.385, 16.873),
        "PLATO-2 1.6B": (1.920, 1.892, 1.840, 1.740, 0.169, 0.613, 15.736),
        "Microsoft XiaoIce (Chinese, with people)": (0.869, 0.822, 0.560, 0.260, 0.289, 0.764, 6.979),
        "PLATO-2 336M (Chinese, with people)": (1.737, 1.683, 1.600, 1.480, 0.212, 0.713, 6.641),
    },
)
STATIC = PaperTable(
    "3",
    "Static: one reply to each context (the paper's three sets of 60)",
    HUMAN[:3],
    {
        "Meena (Meena's samples)": (1.750, 1.617, 1.583),
        "DialoGPT (Meena's samples)": (1.233, 1.067, 1.017),
        "Blender (Meena's samples)": (1.800, 1.767, 1.683),
        "PLATO-2 1.6B (Meena's samples)": (1.900, 1.917, 1.850),
        "DialoGPT (DailyDialog)": (1.117, 1.033, 0.917),
        "Blender (DailyDialog)": (1.767, 1.617, 1.633),
        "PLATO-2 1.6B (DailyDialog)": (1.867, 1.850, 1.833),
        "DialoGPT (Reddit)": (1.283, 1.283, 1.183),
        "Blender (Reddit)": (1.767, 1.550, 1.583),
        "PLATO-2 1.6B (Reddit)": (1.900, 1.900, 1.883),
    },
)
SELECTION = PaperTable(
    "8",
    "Response selection: forward, backward and coherence scores",
    ("map", "mrr", "p1"),
    {},
    "The paper's own numbers are of a Chinese set that is not public, and are not repeated here.",
)


@dataclass(frozen=True)
class PaperPairs:
    """A table of wins, ties and losses of two systems."""

    number: str
    question: str
    systems: tuple[str, str]
    counts: tuple[int, int, int]
    """Wins of the first, ties, wins of the second."""


PAIRS = (
    PaperPairs("4", "depth", ("Blender", "PLATO-2 1.6B"), (8, 18, 24)),
    PaperPairs("5", "engagingness", ("PLATO-2 stage 1", "PLATO-2 stage 2"), (3, 31, 16)),
    PaperPairs("5", "humanness", ("PLATO-2 stage 1", "PLATO-2 stage 2"), (6, 29, 15)),
)
