"""What a run will need, before it starts: parameters, memory of a rank, arithmetic, time.

`python train.py ... plan=true` prints it. The arithmetic counts matrix products only, forward and backward
(three times the forward); one multiplication and one addition are two FLOP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from plato2.config import ModelConfig

BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "L40": 181e12, "A10": 125e12}
"""Dense bf16 (V100: fp16) FLOP/s of data-centre GPUs, from NVIDIA's data sheets."""
ASSUMED_MFU = 0.4
"""For the time a plan states; typical of dense transformers in bf16."""


def step_flops(config: ModelConfig, tokens: int, samples: int, targets: int, passes: int) -> float:
    """FLOP to train on some tokens, forward and backward.

    Per layer and token 24 H^2 for the six matrix products and 4 T H for attention over the sample's own T
    tokens (their mean length, so packed rows count no more than padded ones); 2 H (H + V) for each target.

    Args:
        config: the geometry.
        tokens: real tokens, front slots included.
        samples: samples they belong to.
        targets: tokens that go through the LM head.
        passes: passes through the backbone (2 in stage 2.1).
    """
    hidden, length = config.hidden_size, tokens / max(samples, 1)
    layers = config.n_layer * tokens * (24 * hidden**2 + 4 * length * hidden)
    head = targets * 2 * hidden * (hidden + config.vocab_size)
    return 3.0 * (passes * layers + head)


@lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a device at best: a GPU's data sheet, else the fastest matrix product here (0.2 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu, peak in BF16_PEAK.items():
            if gpu in name:
                return peak
    dtype = torch.bfloat16 if "bf16" in precision else torch.float32
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < until or best == 0.0:
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


@dataclass(frozen=True)
class Plan:
    """The needs of a run; sizes in bytes, of one rank."""

    parameters: int
    state: int
    """float32 weights, gradients and the two Adam moments."""
    activations: int
    """What the backward pass of one unit keeps, without the workspace of single operations."""
    steps: int
    accumulation: int
    step_tokens: int
    flops: float
    """Of the whole run, over all ranks."""

    def rows(self, world_size: int, peak: float | None, device: str) -> list[tuple[str, str]]:
        """The plan as (name, text), for a table."""
        gib = 1024**3
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("ranks", f"{world_size}, each {self.accumulation} unit(s) a step"),
            ("batch", f"{self.step_tokens:,} tokens a step, {self.steps:,} steps"),
            ("weights, gradients, Adam", f"{self.state / gib:.2f} GiB a rank"),
            ("activations", f"{self.activations / gib:.2f} GiB a rank"),
            ("arithmetic", f"{self.flops:.3g} FLOP"),
        ]
        if peak:
            seconds = self.flops / (peak * world_size * ASSUMED_MFU)
            rows.append((f"time on {device}", f"about {_duration(seconds)} at {ASSUMED_MFU:.0%} of the peak"))
        return rows


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
