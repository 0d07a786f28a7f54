"""A guard against loss spikes: steps that are far out of those before them are passed over."""

from __future__ import annotations

from collections import deque
from statistics import fmean, pstdev
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from plato2.config import UserError
from plato2.runs.console import say
from plato2.stages import Stage


class SpikeGuard(Callback):
    """Passes over a step whose loss or gradient norm is too far above the mean of the steps before it.

    The step counts, and so does its learning rate, but weights and optimizer stay as they were. All ranks
    decide alike, the statistics are in the checkpoint, and NaN or infinity still ends the run. The rule is
    that of OLMo's `SkipStepOptimizer` (mean plus 6 deviations of the last 128 steps), but only steps that
    were taken go into the statistics, so that one spike does not widen what is let through.

    Args:
        deviations: how far out: standard deviations above the mean of the last steps.
        window: steps that mean and deviation are taken over; the guard is off for the first half of as many.
        in_a_row: the run stops after this many steps in a row were passed over.

    Raises:
        UserError: an impossible value.
    """

    def __init__(self, deviations: float = 6.0, window: int = 128, in_a_row: int = 10) -> None:
        for name, value, least in (("window", window, 4), ("in_a_row", in_a_row, 1)):
            if value < least:
                raise UserError(f"callbacks.spike_guard.{name}={value}: must be at least {least}")
        if deviations <= 0:
            raise UserError(f"callbacks.spike_guard.deviations={deviations}: must be above 0")
        self.deviations, self.window, self.in_a_row = deviations, window, in_a_row
        self.losses, self.norms = deque[float](maxlen=window), deque[float](maxlen=window)
        self.skipped, self.skipped_in_a_row = 0, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the run is recorded.

        Raises:
            UserError: losses are scaled.
        """
        if trainer.scaler is not None:
            raise UserError(
                f"callbacks.spike_guard: precision {trainer.precision} scales losses and passes over steps "
                "by itself; use bf16-mixed or 32-true"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the stage ask before each step."""
        assert isinstance(pl_module, Stage)

        def refuses(loss: float, grad_norm: float) -> bool:
            own = self.is_far_out(loss, self.losses) or self.is_far_out(grad_norm, self.norms)
            spike = trainer.strategy.reduce_boolean_decision(own, all=False)
            self.count(spike, loss, grad_norm, trainer.global_step + 1)
            pl_module.log_metrics({"train/skipped": float(self.skipped)})
            return spike

        pl_module.refuses_step = refuses

    def is_far_out(self, value: float, before: deque[float]) -> bool:
        """Whether a value is a spike, given those before it; no, where there are too few of them."""
        if len(before) < self.window // 2:
            return False
        return value > fmean(before) + self.deviations * pstdev(before)

    def count(self, spike: bool, loss: float, grad_norm: float, step: int) -> None:
        """Counts a step.

        Raises:
            UserError: too many were passed over one after the other.
        """
        if not spike:
            self.losses.append(loss)
            self.norms.append(grad_norm)
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        told = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        usual = f"{fmean(self.losses):.4g} and {fmean(self.norms):.4g} before"
        say(f"step {step} is passed over: {told} ({usual})")
        if self.skipped_in_a_row >= self.in_a_row:
            raise UserError(
                f"callbacks.spike_guard.in_a_row={self.in_a_row}: as many steps, to step {step}, were far "
                f"out ({told}), which is no spike any more; lower optim.lr, or look at the data there"
            )

    def state_dict(self) -> dict[str, Any]:
        """Statistics and counts, kept across a resume."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.losses = deque(state_dict["losses"], maxlen=self.window)
        self.norms = deque(state_dict["norms"], maxlen=self.window)
        self.skipped, self.skipped_in_a_row = state_dict["skipped"], state_dict["skipped_in_a_row"]
