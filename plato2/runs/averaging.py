"""An exponential moving average of the weights, with Lightning's callback."""

from __future__ import annotations

import warnings

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy

from plato2.config import UserError


class AveragedWeights(EMAWeightAveraging):
    """Lightning's, so that validations, replies, `export` and the next stage all see the average.

    A checkpoint has the average as its weights, and beside it the weights that training goes on with. What
    differs from Lightning's: the average stays in place until a validation's own callbacks are done, buffers
    are copied and not averaged, and at the end the weights stay as they are: a finished run can go on.

    Args:
        decay: weight of the average so far at each step; the newest weights have the rest.
        start_step: the step at which averaging begins.

    Raises:
        UserError: an impossible value.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        if not 0 < decay < 1:
            raise UserError(f"callbacks.ema.decay={decay}: must be between 0 and 1")
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=start_step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies the stage.

        Raises:
            UserError: its weights are sharded.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "callbacks.ema: Lightning's average does not know sharded weights; use strategy=ddp, or "
                "leave it out"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*doesn't support sharding.*")
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: replies and figures are still to come."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the weights back that training goes on with."""
        super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: the average is in the checkpoint."""
