"""plato2: PLATO-2 (Bao et al., 2021) in PyTorch Lightning. `python -m plato2 --help` lists the verbs.

bot = plato2.load("DIR")            # a model folder, a run or a checkpoint
bot.reply(["hi , how was your day ?"]).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from plato2.talk.bot import PlatoBot

__version__ = "0.1.0"


def load(generation: str | Path, evaluation: str | Path | None = None, device: str = "auto") -> PlatoBot:
    """A model to talk to; see `PlatoBot.load`. A model folder needs torch and sentencepiece, no Lightning."""
    from plato2.talk.bot import PlatoBot

    return PlatoBot.load(generation, evaluation, device)


def __getattr__(name: str) -> Any:
    """`plato2.PlatoBot`, imported when it is asked for: torch takes seconds."""
    if name == "PlatoBot":
        from plato2.talk.bot import PlatoBot

        return PlatoBot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
