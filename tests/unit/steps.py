"""A few optimizer steps through the real Trainer: in this process, or as one rank of two (test_steps.py).

    LOCAL_RANK=0 MASTER_ADDR=... MASTER_PORT=... python tests/unit/steps.py CORPUS OUT ddp|fsdp|fsdp_16

trains every stage (in float16 one, with a loss scale that overflows) and saves what the rank saw as
OUT/<stage>-<rank>.pt.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from units import BATCHES, make_stage

from plato2.config import OptimConfig
from plato2.data.module import DialogueDataModule
from plato2.runs.sharded import PolicyPrecision, Sharded, precision_plugin
from plato2.stages import Stage

N_STEPS = 2
ROW = 64
STEP_TOKENS = 16 * ROW
OVERFLOWING = 6
"""Steps in float16, of which the first ones overflow."""
OPTIM = OptimConfig(lr=1e-3, warmup_steps=3, clip_norm=0.0, eps=1e-4)


class Record(pl.Callback):
    """Gradients at each update (after clipping), metrics and weights after it, samples of each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.samples: list[list[int]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Any, batch_number: int
    ) -> None:
        if not self.weights:
            self.weights.append(whole(dict(stage.named_parameters())))
        self.samples.append([int(sample) for unit in batch["units"] for sample in unit["sample_ids"]])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, stage: pl.LightningModule, optimizer: Any
    ) -> None:
        self.gradients.append(whole({name: p.grad for name, p in stage.named_parameters()}))

    def on_train_batch_end(self, trainer: pl.Trainer, stage: pl.LightningModule, *_: Any) -> None:
        logged = trainer.callback_metrics.items()
        self.metrics.append({name: float(value) for name, value in logged if name.startswith("train/")})
        self.weights.append(whole(dict(stage.named_parameters())))

    def recorded(self) -> dict[str, Any]:
        """All of it, without what Lightning hangs on a callback."""
        return {name: getattr(self, name) for name in ("gradients", "metrics", "samples", "weights")}


def large_scale() -> torch.amp.GradScaler:
    """Of a loss whose gradient overflows in float16 at first; a 256th after each time."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies; a sharded tensor is put together."""
    parts = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in parts.items()}


def train_steps(
    name: str,
    corpus: Path,
    unit_tokens: int,
    optim: OptimConfig = OPTIM,
    n_steps: int = N_STEPS,
    stage: Any = None,
    **trainer: Any,
) -> Record:
    """Trains a stage on `corpus` in steps of `STEP_TOKENS`, shared out in units of `unit_tokens`.

    The stage is a small one with large random weights, or the one given.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = DialogueDataModule(
        str(corpus), BATCHES[name], STEP_TOKENS, unit_tokens=unit_tokens, row_length=ROW
    )
    record = Record()
    options = {"devices": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    pl.Trainer(
        max_steps=n_steps,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[record],
        **{**options, **quiet, **trainer},
    ).fit(stage or make_stage(name, optim=optim), data)
    return record


def on_meta(stage: Stage) -> Stage:
    """The same stage without memory, which is to start from its weights."""
    with torch.device("meta"):
        empty = type(stage)(**stage.hparams)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.start_from(stage.state_dict())
    return empty


if __name__ == "__main__":
    corpus, out, strategy = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    for stage_name in ["2_gen"] if strategy == "fsdp_16" else BATCHES:
        n_steps, optim = N_STEPS, OPTIM
        options: dict[str, Any] = {"strategy": strategy}
        if strategy == "fsdp":
            bf16 = precision_plugin("bf16-mixed", "cpu", sharded=True)
            options = {"strategy": Sharded(), "plugins": [bf16]}
            options["stage"] = on_meta(make_stage(stage_name, optim=OPTIM))
        if strategy == "fsdp_16":
            n_steps, optim = OVERFLOWING, replace(OPTIM, clip_norm=0.5)
            options = {"strategy": Sharded(), "plugins": [PolicyPrecision("16-mixed", "cpu", large_scale())]}
        seen = train_steps(stage_name, corpus, STEP_TOKENS // 4, optim, n_steps, devices=2, **options)
        rank = torch.distributed.get_rank()
        torch.save(seen.recorded(), out / f"{stage_name}-{rank}.pt")
