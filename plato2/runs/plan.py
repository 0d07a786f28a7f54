"""What a run will need, before it starts: parameters, memory of a rank, arithmetic, traffic, time and money.

`python train.py ... plan=true` prints it, `plan=json` gives every figure under a plain name. The arithmetic
counts matrix products only, forward and backward (three times the forward); one multiplication and one
addition are two FLOP. Memory is that of a simulated step (`simulate`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from plato2.batch import Unit
from plato2.config import ModelConfig
from plato2.model.backbone import Backbone
from plato2.model.pretrained import PretrainedBackbone
from plato2.runs.length import RunLength, duration, in_words, rounded
from plato2.runs.simulate import Form, Memory, Ranks, memory_of_a_step
from plato2.stages.base import Stage

GIB = 1024**3

# --------------------------------------------------------------------------------------- arithmetic and peaks


@dataclass(frozen=True)
class Products:
    """What a pretrained decoder multiplies with in a pass."""

    trained: int
    """Weights of the blocks' matrices that learn; each is multiplied with once for each token."""
    frozen: int
    """Those that do not: their gradients are not computed, but those of what goes into them."""
    attention: int
    """Width of all heads of all layers."""
    output: int
    """Weights of the output table, for each target."""
    trains_output: bool


def decoder_products(backbone: Backbone) -> Products | None:
    """The products of a pretrained decoder; None = a backbone of ours."""
    if not isinstance(backbone, PretrainedBackbone):
        return None
    config, (_, head_size) = backbone.config, backbone.cache_heads
    matrices = [weight for weight in backbone.blocks.parameters() if weight.ndim == 2]
    trained = sum(weight.numel() for weight in matrices if weight.requires_grad)
    return Products(
        trained=trained,
        frozen=sum(weight.numel() for weight in matrices) - trained,
        attention=config.n_layer * config.n_head * head_size,
        output=backbone.n_words * config.hidden_size,
        trains_output=not config.has_adapter,
    )


def step_flops(
    config: ModelConfig,
    tokens: float,
    samples: float,
    targets: float,
    passes: int,
    decoder: Products | None = None,
) -> float:
    """FLOP to train on some tokens, forward and backward.

    Per layer and token 24 H^2 for the six matrix products and 4 T H for attention over the sample's own T
    tokens (their mean length, so packed rows count no more than padded ones); 2 H (H + V) for each target.
    The backward pass takes twice as much, but only as much for a weight that is frozen.

    Args:
        config: the geometry.
        tokens: real tokens, front slots included.
        samples: samples they belong to.
        targets: tokens that go through the LM head.
        passes: passes through the backbone (2 in stage 2.1).
        decoder: the products of a pretrained one.
    """
    hidden, length = config.hidden_size, tokens / max(samples, 1)
    if decoder:
        products = 6 * decoder.trained + 4 * decoder.frozen + 3 * 4 * length * decoder.attention
        return passes * tokens * products + targets * (6 if decoder.trains_output else 4) * decoder.output
    layers = config.n_layer * tokens * (24 * hidden**2 + 4 * length * hidden)
    head = targets * 2 * hidden * (hidden + config.vocab_size)
    return 3.0 * (passes * layers + head)


DATA_SHEETS = {"H200 NVL": 835e12, "H200": 989.4e12, "H100 NVL": 835e12, "L40S": 362e12, "L40": 181e12}
DATA_SHEETS |= {"A10": 125e12, "A40": 149.7e12, "RTX A6000": 154.8e12}
"""Dense bf16 FLOP/s of GPUs on which Lightning's table (2.6.6) is silent or wrong: it takes an L40 for an L4,
gives H200 and H100 NVL with sparsity, A40 and A6000 without tensor cores, and does not know `NVIDIA H200`."""


@lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a device at best: a GPU's data sheet, else the fastest matrix product here (0.2 s).

    A GPU's is that of its tensor cores in 16 bits, from Lightning's own table, which tells an H100 SXM from
    an H100 PCIe. A CPU's is taken over the processor time of its threads: what other processes take does not
    count, or the peak of a busy machine would be low and the share of it that training reaches high.
    """
    if device.type == "cuda":
        known = _data_sheet(torch.cuda.get_device_name(device), device)
        if known:
            return known
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


def _data_sheet(name: str, device: torch.device) -> float | None:
    """A GPU's FLOP/s by its name; None = unknown."""
    from lightning_fabric.utilities.throughput import get_available_flops

    words = f"{name} "
    for gpu, peak in DATA_SHEETS.items():
        if f" {gpu} " in words or f" {gpu}-" in words:
            return peak
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know the GPU, or that a V100 has no bf16
        kinds = (torch.bfloat16, torch.float16)
        found = (get_available_flops(device, kind) for kind in kinds)
        return next((float(peak) for peak in found if peak), None)


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be rented."""

    memory: int
    """Bytes."""
    peak: float
    """Dense FLOP/s in bf16 (V100: float16)."""


GPUS = {
    "L4-24G": Gpu(int(22.5 * GIB), 121e12),
    "V100-32G": Gpu(32 * GIB, 125e12),
    "A100-80G": Gpu(80 * GIB, 312e12),
    "H100-80G": Gpu(80 * GIB, 989.4e12),
    "H200-141G": Gpu(140 * GIB, 989.4e12),
}
NO_BF16 = ("V100-32G",)
"""Those that do not compute in bf16, and take no frozen weights in it."""
USABLE = 0.9
"""Share of a GPU's memory that tensors can have: CUDA, NCCL and gaps between tensors take the rest."""
TIGHT = 0.9
"""Share of that from which on a unit barely fits: samples differ, and so do the peaks of steps."""

# ------------------------------------------------------------------------------------------------ the network


def step_traffic(
    blocks: int, rest: int, passes: int, units: int, ranks: Ranks, trained: int | None = None
) -> float:
    """Bytes that a rank receives in a step, and as many that it sends.

    FSDP2 gathers a block's weights before each pass through it, forward and backward, and the rest of the
    stage once a unit, in the precision it computes in; it reduces float32 gradients once a step. Gathering or
    reducing S bytes over n ranks moves S (n - 1) / n to and from each; an all-reduce, of copies of the model,
    twice that.

    Args:
        blocks: parameters of all blocks.
        rest: the stage's other parameters.
        passes: passes through the blocks for each unit.
        units: of a rank in a step.
        ranks: how they share the model.
        trained: parameters with a gradient; None = all.
    """
    inside, between = ((n - 1) / n for n in (ranks.shard, ranks.replicate))
    learning = blocks + rest if trained is None else trained
    traffic = 2 * between * 4 * learning / ranks.shard
    if ranks.fsdp:
        gathered = (2 if ranks.half else 4) * (2 * passes * blocks + rest) * units
        traffic += inside * (gathered + 4 * learning)
    return traffic


# ----------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Work:
    """A stage of the curriculum as it is to be trained."""

    stage: str
    steps: int
    step_tokens: int
    """Over all ranks, padding included."""
    unit_tokens: int
    """Of a unit of a rank, padding included."""
    step_samples: float
    step_flop: float
    parameters: int
    blocks: int
    """Parameters of all blocks."""
    passes: int
    ranks: Ranks
    trained: int | None = None
    """Parameters that are; None = all."""

    @property
    def units(self) -> int:
        """Units of a rank in a step."""
        return max(1, self.step_tokens // self.unit_tokens // self.ranks.n)

    @property
    def traffic(self) -> float:
        """Bytes that a rank receives in a step."""
        rest = self.parameters - self.blocks
        return step_traffic(self.blocks, rest, self.passes, self.units, self.ranks, self.trained)

    @property
    def flop(self) -> float:
        """Of all steps and ranks."""
        return self.steps * self.step_flop


@dataclass(frozen=True)
class Terms:
    """What is taken for granted."""

    mfu: float
    """Share of a GPU's peak that the model's own arithmetic reaches."""
    link_gb_per_s: float
    """GB/s at which a rank receives while it sends."""
    gpu_hour_price: float | None = None


def work(stage: Stage, unit: Unit, unit_tokens: int, step_tokens: int, steps: int, ranks: Ranks) -> Work:
    """The work of a stage whose units are like one that is typical.

    Args:
        stage: on any device, also meta.
        unit: a typical one.
        unit_tokens: of a unit, padding included.
        step_tokens: of a step over all ranks.
        steps: of the run.
        ranks: how they share the model.
    """
    per_step = step_tokens / unit_tokens
    tokens = float((unit["segment_ids"] > 0).sum()) * per_step
    samples = (len(unit["sample_ids"]) + len(unit.get("random_index", ()))) * per_step
    targets = len(unit["target_index"]) * per_step
    decoder = decoder_products(stage.backbone)
    return Work(
        stage=stage.name,
        steps=steps,
        step_tokens=step_tokens,
        unit_tokens=unit_tokens,
        step_samples=samples,
        step_flop=step_flops(stage.model_config, tokens, samples, targets, stage.passes, decoder),
        parameters=sum(parameter.numel() for parameter in stage.parameters()),
        blocks=sum(parameter.numel() for parameter in stage.backbone.blocks.parameters()),
        passes=stage.passes,
        ranks=ranks,
        trained=sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad),
    )


def arithmetic_s(work: Work, gpu: Gpu, terms: Terms) -> float:
    """Seconds of a step that a rank computes."""
    return work.step_flop / work.ranks.n / (gpu.peak * terms.mfu)


def network_s(work: Work, terms: Terms) -> float:
    """Seconds of a step that a rank's links are busy."""
    return work.traffic / (terms.link_gb_per_s * 1e9)


def hours(work: Work, gpu: Gpu, terms: Terms) -> float:
    """Of a stage; traffic is hidden behind the arithmetic as far as that goes."""
    return work.steps * max(arithmetic_s(work, gpu, terms), network_s(work, terms)) / 3600


PAPER = {"gpus": 64, "gpu": "V100-32G", "hours": 3 * 7 * 24.0, "gpu_hours": 64 * 3 * 7 * 24.0, "mfu": 0.115}
"""The paper's 1.6B: three weeks (section 3.2); its share of the peak follows from 1.67e21 FLOP."""

Build = Callable[[int, bool], Stage]
"""(layers, activation checkpointing) -> the stage on the meta device."""
MakeUnit = Callable[[int], Unit]
"""Tokens -> a typical unit."""
SIMULATED, SIMULATED_SHARDED = (3, 4), (3, 5)
"""Layers of the models that are simulated in place of a deeper one; the second with FSDP2."""
FITTED = (16384, 32768)
"""Tokens of two units from which on memory is taken to be a line: activations outweigh all else."""


def memory_of_a_rank(
    build: Build,
    n_layer: int,
    checkpointing: bool,
    unit: Unit,
    ranks: Ranks,
    form: Form,
    n_units: int,
    averaged: bool = False,
) -> Memory:
    """Memory at the peak of a step; of many layers from that of a few, to which each layer adds the same.

    It does so in each part of a step, but which of them has the peak depends on the depth.
    With two layers FSDP2 does not yet hold the block at hand and the next one at once.
    """

    def of(layers: int) -> dict[str, Memory]:
        return memory_of_a_step(build(layers, checkpointing), unit, ranks, form, n_units, averaged)

    few, more = SIMULATED_SHARDED if ranks.fsdp else SIMULATED
    if n_layer <= more:
        found = of(n_layer)
    else:
        shallow, deeper = of(few), of(more)
        times = (n_layer - few) / (more - few)
        found = {part: shallow[part].plus(deeper[part], shallow[part], times) for part in shallow}
    return max(found.values(), key=lambda memory: memory.total)


def largest_units(
    build: Build,
    n_layer: int,
    make_unit: MakeUnit,
    step: int,
    ranks: Ranks,
    n_units: int,
    averaged: bool = False,
) -> dict[str, dict[str, int]]:
    """GPU -> the largest unit, in tokens, that fits with and without activation checkpointing; 0 = none.

    Args:
        build: makes the stage.
        n_layer: of the model.
        make_unit: makes a unit.
        step: units are multiples of this many tokens.
        ranks: how they share the model.
        n_units: of a rank in a step.
        averaged: whether a moving average of the weights is kept.
    """
    found: dict[str, dict[str, int]] = {name: {} for name in GPUS}
    small, large = (-(-tokens // step) * step for tokens in FITTED)
    for name, checkpointing in (("with_checkpointing", True), ("without_checkpointing", False)):
        at = [
            memory_of_a_rank(
                build, n_layer, checkpointing, make_unit(tokens), ranks, "gpu", n_units, averaged
            ).total
            for tokens in (small, large)
        ]
        per_token = (at[1] - at[0]) / (large - small)
        for gpu, info in GPUS.items():
            left = USABLE * info.memory - at[0]
            found[gpu][name] = max(0, int((small + left / per_token) // step) * step)
    return found


def is_tight(total: float, gpu: str) -> bool:
    """Whether so many bytes do not fit a GPU, or barely."""
    return total > TIGHT * USABLE * GPUS[gpu].memory


@dataclass(frozen=True)
class Plan:
    """The needs of a run and of its curriculum."""

    name: str
    work: Work
    curriculum: tuple[Work, ...]
    """All stages, this one among them."""
    memory: Memory
    form: Form
    checkpointing: bool
    largest_unit: dict[str, dict[str, int]] | None
    """`largest_units`; None where the run is one on CPUs."""
    terms: Terms
    other_total: float | None = None
    """Bytes at the peak with activation checkpointing the other way; None where it is not known."""
    half_base: dict[bool, float] | None = None
    """With activation checkpointing, and as the run has it -> bytes at the peak with the frozen base in
    bfloat16; None where it is, there is none, or all GPUs have room."""
    length: RunLength | None = None
    """Where the corpus is prepared."""

    def figures(self) -> dict[str, Any]:
        """Every figure under a plain name: bytes, seconds, hours, tokens."""
        work, terms = self.work, self.terms
        tokens = work.steps * work.step_tokens
        return {
            "run": self.name,
            "parameters": work.parameters,
            "trained_parameters": work.parameters if work.trained is None else work.trained,
            "ranks": work.ranks.n,
            "copies_of_the_model": work.ranks.replicate,
            "ranks_per_copy": work.ranks.shard,
            "unit_tokens": work.unit_tokens,
            "units_per_rank_and_step": work.units,
            "tokens_per_rank_and_step": work.step_tokens // work.ranks.n,
            "tokens_per_step": work.step_tokens,
            "steps": work.steps,
            "tokens": tokens,
            "samples": round(work.steps * work.step_samples),
            "epochs": self.length.epochs if self.length else None,
            "flop_per_token": work.step_flop / work.step_tokens,
            "flop_per_step": work.step_flop,
            "flop": work.flop,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "total_memory_bytes": self._totals(),
            "total_memory_bytes_base_in_bfloat16": self.half_base
            and {
                "with_checkpointing": self.half_base[True],
                "without_checkpointing": self.half_base.get(False),
            },
            "memory_on": self.form,
            "checkpoint_activations": self.checkpointing,
            "largest_unit_tokens": self.largest_unit,
            "network_bytes_per_step": work.traffic,
            "network_s_per_step": network_s(work, terms),
            "assumed": asdict(terms),
            "gpus": {gpu: self._on(info) for gpu, info in GPUS.items()},
            "curriculum": {
                "stages": {
                    one.stage: {"steps": one.steps, "tokens": one.steps * one.step_tokens, "flop": one.flop}
                    for one in self.curriculum
                },
                "flop": sum(one.flop for one in self.curriculum),
            },
            "paper": PAPER,
            "advice": self.advice(),
        }

    def _totals(self) -> dict[str, float | None]:
        own, other = self.memory.total, self.other_total
        both = (own, other) if self.checkpointing else (other, own)
        return dict(zip(("with_checkpointing", "without_checkpointing"), both, strict=True))

    def _on(self, gpu: Gpu) -> dict[str, Any]:
        total = sum(hours(one, gpu, self.terms) for one in self.curriculum)
        gpu_hours, price = total * self.work.ranks.n, self.terms.gpu_hour_price
        return {
            "memory_bytes": gpu.memory,
            "peak_flop_per_s": gpu.peak,
            "arithmetic_s_per_step": arithmetic_s(self.work, gpu, self.terms),
            "bound_by": "network" if self._network_bound(gpu) else "arithmetic",
            "hours": hours(self.work, gpu, self.terms),
            "curriculum_hours": total,
            "curriculum_gpu_hours": gpu_hours,
            "curriculum_cost": None if price is None else gpu_hours * price,
        }

    def _network_bound(self, gpu: Gpu, of: Work | None = None) -> bool:
        of = of or self.work
        return network_s(of, self.terms) > arithmetic_s(of, gpu, self.terms)

    def fits(self, gpu: str) -> bool | None:
        """Whether a unit of the run fits; None where that is not known."""
        if self.largest_unit is None:
            return None
        return self.memory.total <= USABLE * GPUS[gpu].memory

    def _fits_with_half_base(self, gpu: str, checkpointing: bool) -> bool:
        """Whether a unit does once the frozen base is in bfloat16."""
        return self.half_base is not None and self.half_base[checkpointing] <= USABLE * GPUS[gpu].memory

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (name, text), for a table."""
        work = self.work
        tokens = work.steps * work.step_tokens
        parts = [(n.replace("_", " "), size) for n, size in asdict(self.memory).items() if size >= 5e-3 * GIB]
        part = "" if work.trained in (None, work.parameters) else f", {work.trained:,} of them trained"
        rows = [
            ("parameters", f"{work.parameters:,}{part}"),
            ("ranks", f"{work.ranks.n}, each {work.units} unit{'s' * (work.units > 1)} a step"),
            ("a step", f"{work.step_tokens:,} tokens, {work.step_flop:.3g} FLOP"),
            ("the run", f"{work.steps:,} steps, {in_words(tokens)} tokens, {work.flop:.3g} FLOP"),
        ]
        if self.length:
            rows.append(("the corpus", self.length.of_the_corpus()))
        share = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        held = f"{self.memory.total / GIB:.2f} GiB at its peak ({share})"
        if self.other_total is not None:
            held += f"; {self.other_total / GIB:.2f} with" + "out" * self.checkpointing + " checkpointing"
        rows.append(("memory of a rank", held))
        if work.ranks.n > 1:
            sent = f"{work.traffic / 1e9:.3g} GB to and from a rank, {_ms(network_s(work, self.terms))}"
            rows.append(("traffic of a step", f"{sent} at {self.terms.link_gb_per_s:g} GB/s"))
        stages = ", ".join(f"{one.stage} {one.flop:.3g}" for one in self.curriculum)
        rows.append(("the curriculum", f"{sum(one.flop for one in self.curriculum):.3g} FLOP ({stages})"))
        return rows

    def gpu_rows(self) -> list[list[str]]:
        """A line for each GPU: its name, step, largest units, and the time and cost of the curriculum."""
        lines = []
        for name, gpu in GPUS.items():
            found = self._on(gpu)
            cost = found["curriculum_cost"]
            step = f"{_ms(found['arithmetic_s_per_step'])}{' *' * self._network_bound(gpu)}"
            limit = self.largest_unit and [
                f"{tokens:,}" if tokens else "none" for tokens in self.largest_unit[name].values()
            ]
            lines.append(
                [
                    name,
                    step,
                    *(limit or []),
                    duration(3600 * found["hours"]),
                    duration(3600 * found["curriculum_hours"]),
                    f"{found['curriculum_gpu_hours']:,.0f}",
                    *([] if cost is None else [f"{cost:,.0f}"]),
                ]
            )
        return lines

    @property
    def gpu_columns(self) -> list[str]:
        """What the columns of `gpu_rows` are."""
        fits = ["unit", "unit, no ckpt"] if self.largest_unit else []
        cost = [] if self.terms.gpu_hour_price is None else ["cost"]
        return ["GPU", "a step", *fits, "the run", "curriculum", "GPU-hours", *cost]

    def about_gpus(self) -> list[str]:
        """What the table of GPUs says, and on what terms."""
        units = (
            ""
            if self.largest_unit is None
            else ("unit: the largest that fits, in tokens, with and without activation checkpointing. ")
        )
        link = f"{self.terms.link_gb_per_s:g} GB/s to and from a rank"
        return [
            f"{units}a step: its arithmetic at {self.terms.mfu:.0%} of the peak (plan_mfu), * where its "
            f"traffic at {link} (plan_gb_per_s) takes longer. GPU-hours: of the curriculum.",
            f"The paper's 1.6B took {PAPER['gpus']} {PAPER['gpu']} three weeks: {PAPER['gpu_hours']:,.0f} "
            f"GPU-hours at {PAPER['mfu']:.1%} of their peak.",
        ]

    # ------------------------------------------------------------------------------------------ in words

    def advice(self) -> list[str]:
        """What to change, and why; a sentence each."""
        return [*self._about_memory(), *self._about_network()]

    def _about_memory(self) -> list[str]:
        if self.largest_unit is None:
            return []
        work, said = self.work, []
        too_small: dict[str, list[str]] = {}
        for gpu in (gpu for gpu in GPUS if not self.fits(gpu)):
            best = self.largest_unit[gpu]["with_checkpointing"]
            half = "" if gpu in NO_BF16 else "model.base_dtype=bfloat16"
            if half and self._fits_with_half_base(gpu, self.checkpointing):
                cure = f"; {half} makes room"
            elif not self.checkpointing and best >= work.unit_tokens:
                cure = "; model.checkpoint_activations=true makes room"
            elif half and self._fits_with_half_base(gpu, True):
                cure = f"; {half} and model.checkpoint_activations=true make room"
            elif best > 0:
                also = "" if self.checkpointing else " and model.checkpoint_activations=true"
                cure = f"; give data.unit_tokens={best} or less{also}"
            elif not work.ranks.fsdp:
                cure = ", nor any smaller one; strategy=fsdp_64 shares the model out"
            else:
                cure = ", nor any smaller one; take more devices"
            too_small.setdefault(cure, []).append(gpu)
        for cure, gpus in too_small.items():
            said.append(f"{listed(gpus)}: a unit of {work.unit_tokens:,} tokens does not fit{cure}")
        barely = [
            gpu for gpu in GPUS if gpu not in NO_BF16 and self.fits(gpu) and is_tight(self.memory.total, gpu)
        ]
        if self.half_base and barely:
            less = (self.memory.total - self.half_base[self.checkpointing]) / GIB
            said.append(
                f"{listed(barely)}: a unit barely fits; model.base_dtype=bfloat16 takes {less:.1f} GiB less"
            )
        room = [gpu for gpu in GPUS if self.largest_unit[gpu]["without_checkpointing"] >= work.unit_tokens]
        if self.checkpointing and room:
            said.append(
                f"{listed(room)}: a unit also fits with model.checkpoint_activations=false; without "
                "checkpointing a step takes about 1.3 times less"
            )
        return said

    def _about_network(self) -> list[str]:
        work = self.work
        bound = [gpu for gpu, info in GPUS.items() if self._network_bound(info)]
        if work.ranks.n == 1 or not bound:
            return []
        fastest = max((GPUS[gpu] for gpu in bound), key=lambda gpu: gpu.peak)
        per_rank = work.step_tokens // work.ranks.n
        said = (
            f"{listed(bound)}: {per_rank:,} tokens a rank and step are too few for {work.ranks.n} "
            f"ranks, {_ms(network_s(work, self.terms))} of traffic beside "
            f"{_ms(arithmetic_s(work, fastest, self.terms))} of arithmetic"
        )
        cures = []
        key = "with_checkpointing" if self.checkpointing else "without_checkpointing"
        one = work.step_tokens // 8
        fit = min(self.largest_unit[gpu][key] for gpu in bound) if self.largest_unit else one
        if work.ranks.n > 8 and one:
            unit = next((one // n for n in range(1, 65) if one % n == 0 and one // n <= max(fit, 1)), 0)
            if unit >= work.unit_tokens:
                ranks = Ranks(1, 8, True, True) if work.ranks.fsdp else Ranks(8, 1, False, True)
                single = Work(**{**vars(work), "unit_tokens": unit, "ranks": ranks})
                kind = "fsdp" if work.ranks.fsdp else "ddp"
                cures.append(
                    f"one machine of 8 (strategy={kind} strategy.devices=8 data.unit_tokens={unit}: "
                    f"{_ms(network_s(single, self.terms))} beside "
                    f"{_ms(arithmetic_s(single, fastest, self.terms))})"
                )
        if work.ranks.fsdp and work.ranks.replicate == 1 and work.ranks.n > 8:
            cures.append("HSDP, which gathers inside a machine (strategy=hsdp_64)")
        if work.units > 1 and self.largest_unit and fit >= 2 * work.unit_tokens:
            cures.append(f"larger units (data.unit_tokens={min(per_rank, fit)})")
        cures.append("a larger optim.batch_tokens, which is not the recipe's")
        return [f"{said}: take {', or '.join(cures)}"]


def listed(names: list[str]) -> str:
    """`A, B and C`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _ms(seconds: float) -> str:
    return f"{rounded(1000 * seconds)} ms" if seconds < 1 else f"{rounded(seconds)} s"
