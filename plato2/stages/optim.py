"""AdamW and its learning rate (docs/spec.md, Optimizer)."""

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


def rate_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Learning rate over its peak at optimizer step 1, 2, ..., `max_steps`; 1 at the end of the warmup.

    inverse_sqrt: sqrt(warmup) * min(n^-0.5, n * warmup^-1.5), the paper's and Knover's; constant when there
    is no warmup. linear: up to the end of the warmup, then down to 0 one step after the last.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return step / warmup
    if config.schedule == "linear":
        return max(0.0, (max_steps + 1 - step) / max(1, max_steps + 1 - max(1, warmup)))
    return (warmup / step) ** 0.5 if warmup else 1.0


def schedule(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """The learning rate of each step; `LambdaLR` counts updates from 0, the formula from 1."""
    return LambdaLR(optimizer, lambda done: rate_factor(done + 1, config, max_steps))
