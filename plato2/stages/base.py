"""What the stages of the curriculum have in common: one optimizer step, validation, AdamW, and no more.

One Lightning batch is one optimizer step: the loader hands a rank all the units it computes in that step, and
`training_step` accumulates their gradients by hand. So the totals a loss is divided by are known before the
first backward, a checkpoint can only fall between steps, and Lightning's counters mean the same on any number
of ranks.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from plato2.batch import Unit
from plato2.config import ModelConfig, OptimConfig, Use
from plato2.model.backbone import initialize
from plato2.model.heads import AnyCoherence, coherence_head
from plato2.model.pretrained import build_backbone
from plato2.stages.metrics import TermMeans
from plato2.stages.optim import adamw, schedule
from plato2.stages.sharding import exchange_once, fill_shards, shard_fully


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm of a step is NaN or infinite; the weights are still those before it."""

    def __init__(self, step: int, loss: float, grad_norm: float | None, sample_ids: list[int]) -> None:
        norm = "" if grad_norm is None else f", gradient norm {grad_norm}"
        shown = ", ".join(map(str, sample_ids[:16]))
        shown += f" and {len(sample_ids) - 16} more" if len(sample_ids) > 16 else ""
        super().__init__(f"step {step}: loss {loss}{norm} on samples {shown}")


class Stage(pl.LightningModule):
    """A stage: the shared backbone, the heads it trains, and `losses(unit)`.

    A subclass names the terms that its `losses` may have and says over what each is averaged: `targets`
    (tokens to predict) or `samples`. `loss_terms` are summed into the loss, `metric_terms` only reported.
    """

    name: ClassVar[str]
    use: ClassVar[Use]
    """What the trained stage is used for."""
    loss_terms: ClassVar[dict[str, str]]
    metric_terms: ClassVar[dict[str, str]] = {}
    validation_terms: ClassVar[tuple[str, ...]] = ()
    """Terms that `losses` gives in evaluation mode only."""
    warm_starts_from: ClassVar[tuple[str, ...]]
    """Stages whose weights this one can start from."""
    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """The validation metric that picks the best checkpoint, and its direction."""
    passes: ClassVar[int] = 1
    """Passes through the backbone for each sample (for FLOP counts)."""

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
    ) -> None:
        super().__init__()
        self.model_config = ModelConfig(**model) if isinstance(model, dict) else model
        self.optim_config = OptimConfig(**(optim or {})) if not isinstance(optim, OptimConfig) else optim
        self.seed = seed
        self.refuses_step: Callable[[float, float], bool] | None = None
        """Whether a step of this loss and gradient norm is to be passed over; the same on all ranks."""
        self.automatic_optimization = False
        self.backbone = build_backbone(self.model_config)
        head = self.use.coherence_head
        self.coherence: AnyCoherence | None = (
            None if head is None else coherence_head(self.model_config, head)
        )
        self.start_weights: Mapping[str, Tensor] = {}
        self.overflows = 0
        """Steps of the run that float16 was too small for, and that were skipped."""
        self.validation_means = TermMeans([*self.loss_terms, *self.metric_terms, *self.validation_terms])

    def finish_init(self, **arguments: Any) -> None:
        """Called last by each stage's constructor: initial weights, and primitives for the checkpoint."""
        optim = asdict(self.optim_config) | {"betas": list(self.optim_config.betas)}
        primitives = {"model": asdict(self.model_config), "optim": optim, "seed": self.seed}
        self.save_hyperparameters(primitives | arguments, logger=False)
        if self.backbone.device.type != "meta":
            with torch.random.fork_rng(devices=[]):  # every rank builds the same weights
                torch.manual_seed(self.seed)
                initialize(self)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over whole tensors by name; on the meta device as soon as there is memory for its own."""
        if self.backbone.device.type == "meta":
            self.start_weights = weights
        else:
            self.load_state_dict(weights, strict=False)

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """All terms of one unit, a value for each target (M,) or each sample (N,)."""
        raise NotImplementedError

    def totals(self, unit: Unit) -> dict[str, Tensor]:
        """What each term of a step's sum is divided by: the targets or samples of the step, at least 1."""
        counts = {"targets": unit["step_targets"], "samples": unit["step_samples"]}
        terms = self.loss_terms | self.metric_terms
        return {term: counts[counted].clamp(min=1) for term, counted in terms.items()}

    def configure_model(self) -> None:
        """Shards the parameters when the strategy asks for it (FSDP2), and fills those of the meta device."""
        strategy = self.trainer.strategy
        shard_fully(self, self.backbone.blocks, strategy)
        if self.backbone.device.type == "meta":
            resumed = self.trainer.ckpt_path is not None
            is_read = self.model_config.has_adapter or not (resumed or self.start_weights)
            base = self.backbone.base_weights() if is_read else {}
            fill_shards(self, strategy.root_device, self.start_weights, base, self.seed, not resumed)
            self.start_weights = {}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and its learning rate, stepped by `training_step`."""
        optimizer = adamw(self, self.optim_config)
        rates = schedule(optimizer, self.optim_config, self.trainer.max_steps)
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=rates)

    def training_step(self, step: dict[str, Any], step_number: int) -> None:
        """One optimizer step over this rank's units.

        The gradient is that of sum(term) / total of the step over all ranks and units; `world_size` undoes
        the mean that data-parallel strategies take over ranks. In float16 a gradient that overflows by its
        scale changes no weight: the scale is lowered, and the step is counted in `train/overflows`.
        """
        units: list[Unit] = step["units"]
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        torch.manual_seed(self._dropout_seed())
        parts: list[Tensor] = []
        for number, unit in enumerate(units):
            with self._gradient_sync(number == len(units) - 1):
                totals = self.totals(unit)
                terms = {  # each unit's share of the step's mean
                    term: value.sum() / totals[term] for term, value in self.losses(unit).items()
                }
                loss = torch.stack([terms[term] for term in self.loss_terms]).sum()
                self.manual_backward(loss * self.trainer.world_size)
            parts.append(torch.stack([loss, *terms.values()]).detach())
        total = self._over_ranks(torch.stack(parts).sum(dim=0))
        means = dict(zip(["loss", *terms], total, strict=True))
        self._refuse_non_finite(means["loss"], None, units)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16
        if scaler:
            scaler.unscale_(optimizer.optimizer)
        grad_norm = self._clip()
        overflown = scaler is not None and scaler.get_scale() >= 1 and not bool(torch.isfinite(grad_norm))
        if not overflown:
            self._refuse_non_finite(means["loss"], grad_norm, units)
            if self.refuses_step is not None and self.refuses_step(float(means["loss"]), float(grad_norm)):
                optimizer.zero_grad()  # the step counts, but changes neither weights nor moments
        optimizer.step()  # after an overflow: of the loss scale alone
        optimizer.zero_grad()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        rate = schedule.get_last_lr()[0]
        schedule.step()
        logged: dict[str, Any] = {f"train/{term}": value for term, value in means.items()}
        logged |= {"train/lr": rate} | ({} if overflown else {"train/grad_norm": grad_norm})
        if scaler:
            self.overflows += overflown
            logged |= {"train/overflows": float(self.overflows), "train/loss_scale": scaler.get_scale()}
        self.log_metrics(logged)

    def validation_step(self, batch: dict[str, Any], batch_number: int) -> None:
        """Adds one unit's terms to the means of this validation."""
        for unit in batch["units"]:
            self.validation_means.update(self.losses(unit))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/<term>`, `val/loss` and, of every `val/nll...`, its exponential `val/ppl...`."""
        found = self.validation_means.compute()
        self.validation_means.reset()
        means = {f"val/{term}": mean for term, mean in found.items()}
        means["val/loss"] = torch.stack([found[term] for term in self.loss_terms if term in found]).sum()
        nlls = {name: mean for name, mean in means.items() if name.startswith("val/nll")}
        self.log_metrics(means | {name.replace("nll", "ppl"): nll.exp() for name, nll in nlls.items()})

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Logs under the number of finished optimizer steps (Lightning's own count is one behind)."""
        self.log_dict({**metrics, "step": float(self.global_step)}, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores which stage the checkpoint is of and what that is for, so that nothing else needs to know.

        A checkpoint falls between two steps, where Lightning has counted the next batch as ready. It would
        count it again on resuming, and validate a step early from then on (tests/test_going_on.py).
        """
        checkpoint |= {"stage": self.name, "use": asdict(self.use), "overflows": self.overflows}
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches["total"]["ready"] = batches["total"]["completed"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on counting."""
        self.overflows = checkpoint.get("overflows", 0)

    def _dropout_seed(self) -> int:
        """Dropout as a pure function of seed, step and rank: nothing to save, exact after any kill."""
        return (self.seed * 1_000_003 + self.global_step) * 65_537 + self.global_rank

    def _gradient_sync(self, last: bool) -> Any:
        """Ranks exchange gradients only in the last backward of a step."""
        exchange_once(self, last)
        strategy = self.trainer.strategy
        return (
            nullcontext()
            if last or not isinstance(strategy, ParallelStrategy)
            else strategy.block_backward_sync()
        )

    def _over_ranks(self, sums: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _clip(self) -> Tensor:
        """Clips the global gradient norm; returns the norm before clipping."""
        limit = self.optim_config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _refuse_non_finite(self, loss: Tensor, grad_norm: Tensor | None, units: list[Unit]) -> None:
        if torch.isfinite(loss if grad_norm is None else grad_norm):
            return
        samples = [int(sample) for unit in units for sample in unit["sample_ids"]]
        norm = None if grad_norm is None else float(grad_norm)
        raise NonFiniteLoss(self.global_step + 1, float(loss), norm, samples)
