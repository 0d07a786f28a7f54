"""An exponential moving average of the weights, with Lightning's callback."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_avg_fn

from plato2.config import UserError
from plato2.stages.sharding import fill_shard


class AveragedWeights(EMAWeightAveraging):
    """Lightning's, so that validations, replies, `export` and the next stage all see the average.

    A checkpoint has the average as its weights, and beside it the weights that training goes on with. What
    differs from Lightning's: the average stays in place until a validation's own callbacks are done, buffers
    are copied and not averaged, and at the end the weights stay as they are: a finished run can go on. Of a
    sharded stage each rank averages its own shares.

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
        self.decay = decay
        self.shares: AveragedShares | None = None
        """Instead of Lightning's copy, where the stage is sharded."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copies the stage, unless it is still to be sharded."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return
        self._device = trainer.strategy.root_device  # where the stage will be; it is still on the CPU
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*doesn't support sharding.*")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the shares of a stage that is sharded by now."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self.shares = AveragedShares(pl_module, self.decay)
            self._average_model = self.shares  # type: ignore[assignment]  # Lightning asks it to update

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        if self.shares:
            self.shares.swap(pl_module)
        else:
            super()._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: replies and figures are still to come."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the weights back that training goes on with."""
        super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: the average is in the checkpoint."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the average in the place of the weights, and these beside it, whole ones on the first rank."""
        if not self.shares:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        current = checkpoint["state_dict"]
        average: dict[str, Tensor] = self.shares.of
        if not getattr(trainer.strategy, "in_shares", False):
            average = {name: whole for name, whole in self.shares.whole() if name in current}
        checkpoint["state_dict"] = current | average
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {"n_averaged": self.shares.n_averaged}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on with both; of a run that had no average, with its weights as the first one."""
        if not self.shares:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        self.shares = AveragedShares(pl_module, self.decay)  # the strategy has filled the stage with it
        self._average_model = self.shares  # type: ignore[assignment]
        if "current_model_state" in checkpoint:
            self.shares.n_averaged = checkpoint["averaging_state"]["n_averaged"]
            with torch.no_grad():
                for name, parameter in pl_module.named_parameters():
                    fill_shard(parameter, checkpoint["current_model_state"][name])


class AveragedShares:
    """What PyTorch's `AveragedModel` is, for the rank's shares of a sharded stage; nothing is sent."""

    def __init__(self, stage: nn.Module, decay: float) -> None:
        self.of = {name: own.detach().clone() for name, own in stage.named_parameters()}
        self.n_averaged = torch.tensor(0)
        self.average = get_ema_avg_fn(decay)

    def update_parameters(self, stage: nn.Module) -> None:
        """Takes in the weights after a step; the first ones are copied."""
        for average, own in self._pairs(stage):
            average.copy_(self.average(average, own, self.n_averaged) if self.n_averaged else own)
        self.n_averaged += 1

    def swap(self, stage: nn.Module) -> None:
        """Gives the stage the average for its weights, and back."""
        for part in stage.modules():
            if isinstance(part, FSDPModule):  # FSDP2 keeps some of them gathered after a validation
                part.reshard()
        for average, own in self._pairs(stage):
            before = average.clone()
            average.copy_(own)
            own.copy_(before)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The average itself, a tensor at a time, on CPUs; all ranks go through it together."""
        for name, average in self.of.items():
            yield name, (average.full_tensor() if isinstance(average, DTensor) else average).cpu()

    def _pairs(self, stage: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, own in stage.named_parameters():
            yield _local(self.of[name]), _local(own.detach())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
