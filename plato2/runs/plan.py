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
from plato2.runs.length import RunLength, duration, in_words

BF16_PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
BF16_PEAK |= {"V100": 125e12, "L40S": 362e12, "L40": 181e12, "A10": 125e12}
"""Dense bf16 (V100: fp16) FLOP/s of data-centre GPUs, from NVIDIA's data sheets; the first name that fits."""
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
    """FLOP/s of a device at best: a GPU's data sheet, else the fastest matrix product here (0.2 s).

    A CPU's is taken over the processor time of its threads: what other processes take does not count, or the
    peak of a busy machine would be low and the share of it that training reaches high.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu, peak in BF16_PEAK.items():
            if gpu in name:
                return peak
    dtype = torch.bfloat16 if "bf16" in precision else torch.float32
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock, threads = time.perf_counter, 1
    if device.type == "cpu":
        clock, threads = time.process_time, torch.get_num_threads()
    best, until = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < until or best == 0.0:
        started = clock()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 * threads / (clock() - started))
    return best


TARGET_SHARE = 0.2
"""Response tokens among all tokens, for a plan without data (chitchat: 0.19)."""
SAMPLE_TOKENS = 128
"""Tokens of a sample, for a plan without data (chitchat: 117)."""
GIB = 1024**3


def activation_bytes(config: ModelConfig, slots: int, passes: int, half: bool) -> int:
    """What a unit's forward pass keeps for its backward pass, with a fused attention kernel.

    Per layer and slot, in units of H: the residual stream before both norms (4 bytes each), the norms'
    outputs, q, k, v and the attention's output, the inputs of gelu and of W2 (4H each; all in the compute
    dtype) and two dropout masks of one byte. With activation checkpointing only each block's input, and one
    block in full. Logits, their float32 log-softmax and its gradient exist for the targets.

    Args:
        config: the geometry.
        slots: slots of a unit, padding included.
        passes: passes through the backbone whose activations live at once.
        half: compute in bf16 rather than float32.
    """
    size = 2 if half else 4
    kept = 8 + 14 * size + (2 if config.dropout else 0)
    block = slots * config.hidden_size * kept
    if config.checkpoint_activations:
        layers = config.n_layer * slots * config.hidden_size * 4 * passes + block
    else:
        layers = config.n_layer * block * passes
    return layers + int(slots * TARGET_SHARE) * config.vocab_size * (size + 8)


@dataclass(frozen=True)
class Plan:
    """The needs of a run; sizes in bytes, of one rank."""

    parameters: int
    state: int
    """float32 weights, gradients and two Adam moments, 16 bytes per parameter over the ranks that share them,
    and 4 more for the sum of gradients where a step has several units; where they are not shared, 2 more for
    the bf16 copy that autocast keeps."""
    activations: int
    ranks: int
    units: int
    """Micro-batches of a rank in one step."""
    batch_tokens: int
    steps: int
    flops: float
    """Of the whole run, over all ranks."""

    def rows(self, length: RunLength | None = None) -> list[tuple[str, str]]:
        """The plan as (name, text), for a table; with epochs where the corpus is prepared."""
        tokens = self.steps * self.batch_tokens
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("ranks", f"{self.ranks}, each {self.units} unit{'s' if self.units > 1 else ''} a step"),
            ("a step", f"{self.batch_tokens:,} tokens"),
            ("the run", f"{self.steps:,} steps, {in_words(tokens)} tokens, {self.flops:.3g} FLOP"),
            ("weights, gradients, Adam", f"{self.state / GIB:.2f} GiB a rank"),
            ("activations", f"{self.activations / GIB:.2f} GiB a rank"),
        ]
        if length:
            rows.append(("the corpus", length.of_the_corpus()))
        for gpu in ("A100", "H100"):
            seconds = self.flops / (BF16_PEAK[gpu] * self.ranks * ASSUMED_MFU)
            rows.append((f"time on {gpu}", f"about {duration(seconds)} at {ASSUMED_MFU:.0%} of its peak"))
        return rows


def plan(
    config: ModelConfig,
    parameters: int,
    passes: int,
    ranks: int,
    sharded: bool,
    half: bool,
    unit_tokens: int,
    batch_tokens: int,
    steps: int,
) -> Plan:
    """The plan of a run.

    Args:
        config: the geometry.
        parameters: of the stage, heads included.
        passes: passes through the backbone in a step (2 in stage 2.1).
        ranks: devices.
        sharded: weights and optimizer state are shared out over the ranks (FSDP2).
        half: compute in bf16.
        unit_tokens: of a micro-batch.
        batch_tokens: of a step over all ranks.
        steps: of the run.
    """
    tokens, units = steps * batch_tokens, batch_tokens // unit_tokens // ranks
    # Gradients of several units are added up whole, then reduced once (`sharding.exchange_once`).
    summed = 4 * parameters if units > 1 else 0
    samples, targets = tokens // SAMPLE_TOKENS, int(tokens * TARGET_SHARE)
    return Plan(
        parameters=parameters,
        state=16 * parameters // ranks + summed if sharded else (18 if half else 16) * parameters,
        activations=activation_bytes(config, unit_tokens, passes, half),
        ranks=ranks,
        units=units,
        batch_tokens=batch_tokens,
        steps=steps,
        flops=step_flops(config, tokens, samples, targets, passes),
    )
