"""AdamW and its learning rate (spec section 8)."""

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from plato2.config import OptimConfig


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay touches a parameter: all but layer norms and biases.

    Knover goes by names, and its `recognition_bias` has none of those it leaves out: it is decayed.
    """
    return parameter.ndim >= 2 or name == "recognition.bias"


def adamw(module: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over all parameters of a stage, fused (one kernel for all of them)."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decayed(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decayed(name, p)], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def noam_factor(step: int, warmup_steps: int) -> float:
    """Learning rate over its peak at optimizer step 1, 2, ...: linear warmup, then 1 / sqrt(step).

    sqrt(warmup) * min(n^-0.5, n * warmup^-1.5): 1 at n = warmup; constant when there is no warmup.
    """
    if warmup_steps == 0:
        return 1.0
    return min((warmup_steps / step) ** 0.5, step / warmup_steps)


def noam(optimizer: Optimizer, warmup_steps: int) -> LambdaLR:
    """The schedule of the paper and Knover; `LambdaLR` counts updates from 0, the formula from 1."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: noam_factor(done + 1, warmup_steps))
