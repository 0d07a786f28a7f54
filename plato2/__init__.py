"""plato2: PLATO-2 (Bao et al., 2021) in PyTorch Lightning. `python -m plato2 --help` lists the verbs.

found = plato2.train("model=tiny", "stage=1_coarse")   # as `python train.py model=tiny stage=1_coarse`
bot = plato2.load(found.run)                           # a run, a checkpoint or a model folder
bot.reply(["hi , how was your day ?"]).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from plato2.runs.train import Trained
    from plato2.talk.bot import PlatoBot

__version__ = "0.1.0"


def load(generation: str | Path, evaluation: str | Path | None = None, device: str = "auto") -> PlatoBot:
    """A model to talk to; see `PlatoBot.load`. A model folder needs torch and sentencepiece, no Lightning."""
    from plato2.talk.bot import PlatoBot

    return PlatoBot.load(generation, evaluation, device)


def train(*overrides: str) -> Trained | None:
    """Trains one stage in this process, as `python train.py OVERRIDES` does; a sweep is for the command line.

    Args:
        overrides: groups and keys, e.g. `"model=tiny"`, `"optim.lr=1e-4"`.

    Returns:
        The run's folder, its best checkpoint, the value of its monitor and its metrics; None for `plan=true`.

    Raises:
        UserError: anything a user can fix.
    """
    from plato2.commands.train import train_overrides

    return train_overrides(*overrides)


def __getattr__(name: str) -> Any:
    """`plato2.PlatoBot` and `plato2.Trained`, imported when asked for: torch takes seconds."""
    if name == "PlatoBot":
        from plato2.talk.bot import PlatoBot

        return PlatoBot
    if name == "Trained":
        from plato2.runs.train import Trained

        return Trained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
