"""Three optimizer steps of each stage are Knover's: losses, gradients, learning rates, parameters (spec 2-8).

The steps are those of `Stage.training_step`, run by Lightning's Trainer on Knover's batches a, c, a. Its files
were recorded with the Adam of Paddle 1.8, which is not the one we train with (spec section 8): for these steps
the optimizer is written out below. The one we train with has a test of its own, against Paddle 2.6.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from knover import CONFIG, from_knover, knover_stage, load
from test_forward import unit
from torch import Tensor, nn

from plato2.config import OptimConfig
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.training.optim import adamw, noam
from plato2.weights.names import knover_names

BATCHES = ("a", "c", "a")
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.01, clip_norm=0.1)
STAGES = {
    "stage1": (CoarseGeneration, "plato_weights.npz"),
    "stage21": (FineGeneration, "plato_weights.npz"),
    "stage22": (CoherenceEstimation, "nsp_weights.npz"),
}
WORDS = "backbone.word.weight"
ZERO_GRADIENT = "attention.key.bias"
"""A constant added to all scores of a query changes nothing: what is recorded there is rounding."""


class Paddle18Adam(torch.optim.Optimizer):
    """AdamW as Paddle 1.8 and Knover's script did it: eps on the uncorrected sqrt(v), decay last.

    w' = w - lr sqrt(1 - b2^n) / (1 - b1^n) m / (sqrt(v) + eps);  w'' = w' - lr wd w'
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                state = self.state[parameter]
                gradient = parameter.grad.double()
                n = state["n"] = state.get("n", 0) + 1
                m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * gradient
                v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * gradient**2
                weight = parameter.double()
                weight = weight - lr * (1 - b2**n) ** 0.5 / (1 - b1**n) * m / (v.sqrt() + group["eps"])
                parameter.copy_(weight - lr * group["weight_decay"] * weight)


@dataclass
class Run(pl.Callback):
    """What three steps showed: gradients before clipping, weights after each step, what was logged."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)

    def on_after_backward(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in stage.named_parameters()})  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: pl.Trainer, stage: pl.LightningModule, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in stage.named_parameters()})
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def step_of(name: str, batch: str) -> dict[str, Any]:
    """Knover's batch as an optimizer step of one unit."""
    arrays = load(f"{name}.npz")
    given = unit(arrays, batch, front_slots=name == "stage21")
    if name == "stage22":
        given["coherence_labels"] = torch.from_numpy(arrays[f"{batch}/in/label"])[:, 0]
    totals = {"step_targets": len(given["target_ids"]), "step_samples": len(given["sample_index"])}
    return {"units": [given | {total: torch.tensor(count) for total, count in totals.items()}]}


def train(name: str) -> Run:
    """Knover's three steps by the real training step, with the noise and the Adam of its files."""
    stage_class, weights = STAGES[name]
    stage = knover_stage(stage_class, weights, optim=OPTIM).train()
    run = Run()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(
            "plato2.stages.base.adamw",
            lambda module, config: Paddle18Adam(adamw(module, config).param_groups, {}),
        )
        if name == "stage21":
            noise = iter([torch.from_numpy(u) for u in load("stage21_train_u.npz").values()])
            patch.setattr("plato2.stages.fine.uniform", lambda *_: next(noise))
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=len(BATCHES), max_epochs=1, logger=False, callbacks=[run], **quiet
        )
        trainer.fit(stage, [step_of(name, batch) for batch in BATCHES])
    return run
