"""Who speaks to the person at the terminal, and what Lightning says that does not help here."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def is_first_process() -> bool:
    """Whether this process writes the run folder and speaks; before Lightning knows the ranks."""
    variables = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((os.environ[name] for name in variables if os.environ.get(name)), "0") == "0"


def say(sentence: str) -> None:
    """A line for the person at the terminal, from the first process only."""
    if is_first_process():
        print(sentence, file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Four significant digits, `0.1234`; of large numbers all before the point, `10,482`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def quiet_lightning() -> None:
    """Leaves out what Lightning says that does not help here; its warnings stay."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics reduces over ranks
