"""How long a run is: its tokens, its epochs of the corpus, and its hours at the speed of the first steps.

All are said when a run starts: a recipe made for a billion conversations starts just as well on seven
thousand of them, and on a laptop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from plato2.runs.console import say

MANY_EPOCHS = 100
"""Above this there is a warning: BERT, which went through its corpus often, did so about 40 times."""
MANY_DAYS = 30
"""Above this there is a warning: the paper's largest model took three weeks."""
WARM_UP_UNITS, WARM_UP_S = 3, 10.0
"""This many units are not timed, fewer where they take longer, but at least one: memory is allocated, kernels
are chosen, processes meet."""
TIMED_STEPS, TIMED_S = 20, 30.0
"""Steps after which the time is told; seconds, where steps are long."""
DAY_S, YEAR_S = 86_400.0, 365.25 * 86_400


@dataclass(frozen=True)
class RunLength:
    """What a run has before it, in tokens and epochs.

    Args:
        corpus: where the data are.
        max_steps: optimizer steps of the whole run.
        done_steps: steps already done, when it resumes.
        batch_tokens: tokens of a step over all ranks, padding included.
        epoch_tokens: tokens of one pass over the corpus in the batches of this stage, padding included.
    """

    corpus: str
    max_steps: int
    done_steps: int
    batch_tokens: int
    epoch_tokens: int
    model: str = ""
    """Its name."""

    @property
    def epochs(self) -> float:
        """Passes over the corpus that are left."""
        return (self.max_steps - self.done_steps) * self.batch_tokens / self.epoch_tokens

    def of_the_corpus(self) -> str:
        """The epochs in words: `about 0.25 epochs of data/chitchat (16.7 million tokens each)`."""
        epochs = "less than 0.01" if self.epochs < 0.01 else f"about {rounded(self.epochs)}"
        plural = "" if epochs == "about 1" else "s"
        return f"{epochs} epoch{plural} of {self.corpus} ({in_words(self.epoch_tokens)} tokens each)"

    def sentence(self) -> str:
        """The run in one line."""
        left = self.max_steps - self.done_steps
        before = f"{self.done_steps:,} of {self.max_steps:,} steps are done; " if self.done_steps else ""
        tokens = f"{self.batch_tokens:,} tokens = {in_words(left * self.batch_tokens)} tokens"
        return f"{before}{left:,} steps x {tokens}: {self.of_the_corpus()}"

    def warning(self) -> str:
        """What to do about too many epochs; empty where they are few."""
        if self.epochs <= MANY_EPOCHS:
            return ""
        steps = self.done_steps + max(1, round(10 * self.epoch_tokens / self.batch_tokens))
        smaller = "" if self.model == "tiny" else ", or model=tiny, whose recipe is for small corpora"
        return (
            f"warning: about {rounded(self.epochs)} epochs: the corpus is memorized long before that; set "
            f"trainer.max_steps={steps} (10 epochs; mind optim.warmup_steps){smaller}, or take more data "
            "(data=shards data.path=DIR)"
        )


class TimeLeft(Callback):
    """Says once, after the first steps, how long the run will take at their speed; warns of very long ones.

    Every backward pass of a unit is timed, since a step of a large model on a small machine can take an hour.
    Validations are not counted, neither in the measurement nor in what it tells.

    Args:
        unit_tokens: tokens of a unit, padding included.
        units_per_step: units of a step over all ranks.
        model: its name.
    """

    def __init__(self, unit_tokens: int, units_per_step: int, model: str = "") -> None:
        self.model = model
        self.unit_tokens, self.units_per_step = unit_tokens, units_per_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts what is left to do."""
        self.units, self.timed, self.told = 0, 0, not trainer.is_global_zero
        self.begun = self.started = time.perf_counter()
        self.paused = 0.0
        self.step_units = self.units_per_step // trainer.world_size
        self.all_units = (trainer.max_steps - trainer.global_step) * self.step_units

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the end of a unit."""
        if self.told:
            return
        self.units += 1
        now = time.perf_counter()
        if self.units == 1 or (self.units <= WARM_UP_UNITS and now - self.begun < WARM_UP_S):
            self.started = now
            return
        self.timed += 1
        seconds = now - self.started
        due = self.timed >= TIMED_STEPS * self.step_units or seconds >= TIMED_S
        if due and self.units < self.all_units:
            self.tell(trainer, seconds / self.timed)

    def tell(self, trainer: pl.Trainer, unit_s: float) -> None:
        """Says how long the units that are left will take, at this many seconds each."""
        self.told = True
        left_s = (self.all_units - self.units) * unit_s
        speed = trainer.world_size * self.unit_tokens / unit_s
        say(f"about {duration(left_s)} at {rounded(speed)} tokens/s, validations not counted")
        if left_s > MANY_DAYS * DAY_S:
            steps = trainer.global_step + max(1, int(DAY_S / (unit_s * self.step_units)))
            smaller = "" if self.model == "tiny" else ", or model=tiny with its recipe"
            say(
                f"warning: about {duration(left_s)}: set a smaller trainer.max_steps ({steps}: a day)"
                f"{smaller}, or take more devices (strategy=ddp)"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self.paused = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lets the clock go on after a validation, its replies and its checkpoint."""
        if self.paused:
            self.started += time.perf_counter() - self.paused
            self.paused = 0.0


def duration(seconds: float) -> str:
    """A time in words: `41 minutes`, `3.2 hours`, `4.1 years`."""
    for unit, length in (("years", YEAR_S), ("days", DAY_S), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{rounded(seconds / length)} {unit}"
    return f"{rounded(seconds)} seconds"


def in_words(number: float) -> str:
    """A large number in words: `4.1 million`, `105 billion`."""
    for unit, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def rounded(number: float) -> str:
    """Two significant digits, without an exponent: `0.25`, `4.1`, `6,300`."""
    value = float(f"{number:.2g}")
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
