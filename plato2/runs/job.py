"""What the command that starts a run knows beside its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plato2.config import TrainConfig

CURRICULUM = ("1_coarse", "2_gen", "2_eval")
"""The paper's three stages, in their order."""


@dataclass(frozen=True)
class Job:
    """What the command that starts a run knows beside its configuration."""

    number: int | None = None
    """In a sweep; None = not part of one."""
    overrides: tuple[str, ...] = ()
    """How a job of a sweep differs from the others, apart from the stage."""
    sweep_stages: tuple[str, ...] = ()
    """The stages of the sweep, this one's among them, where it says them."""
    side_by_side: bool = False
    """Whether the jobs of the sweep run at the same time."""
    command: str = "python train.py"
    """The command for another stage of the same model, data and strategy, but for `stage=`."""
    other_stages: Callable[[], list[TrainConfig]] = list
    """Composes the same command for the other stages of its curriculum."""

    @property
    def in_sweep(self) -> bool:
        """Whether it is a job of a sweep."""
        return self.number is not None
