"""Early stopping, with Lightning's callback and the stage's own measure."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from plato2.config import UserError
from plato2.stages import Stage


class StopEarly(EarlyStopping):
    """Lightning's `EarlyStopping` on the metric that picks the stage's best checkpoint, or on another one.

    Args:
        patience: validations without improvement.
        min_delta: the smallest change of the metric that counts as an improvement.
        metric: what has to improve; null = the metric that picks the stage's best checkpoint.
        mode: of a metric that is named: min = lower is better, max = higher.

    Raises:
        UserError: an impossible value.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, metric: str | None = None, mode: str = "min"
    ) -> None:
        if patience < 1:
            raise UserError(f"callbacks.early_stopping.patience={patience}: must be at least 1")
        if mode not in ("min", "max"):
            raise UserError(f"callbacks.early_stopping.mode={mode}: must be min or max")
        self.own, self.given_delta, self.patience = metric is None, min_delta, patience
        self._measure_by(metric or "val/loss", mode)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the stage's own measure, where none is named; its state is restored later."""
        if self.own:
            assert isinstance(pl_module, Stage)
            metric, mode = pl_module.monitor
            self._measure_by(metric, mode)
        super().setup(trainer, pl_module, stage)

    def _measure_by(self, metric: str, mode: str) -> None:
        given = (self.given_delta, self.patience)
        super().__init__(metric, *given, mode=mode, check_on_train_epoch_end=False, strict=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks whether it has improved.

        Raises:
            UserError: the metric is not logged.
        """
        known = trainer.callback_metrics
        if self.monitor not in known:
            shown = ", ".join(sorted(name for name in known if name.startswith("val/")))
            raise UserError(
                f"callbacks.early_stopping.metric={self.monitor}: not logged; choose one of {shown}"
            )
        super().on_validation_end(trainer, pl_module)

    @property
    def has_stopped(self) -> bool:
        """Whether it was this that ended the run."""
        return self.wait_count >= self.patience

    @property
    def state_key(self) -> str:
        """What the state is stored under."""
        return "StopEarly"
