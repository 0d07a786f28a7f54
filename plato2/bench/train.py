"""Side-by-side measurements: training steps in CPU seconds for each 1,000 real tokens, as ratios.

All sides of a comparison take turns in one process on one thread, on the same samples, and a ratio is the
median over rounds of the two costs of a round, so that a busy machine slows all sides alike. A step is
forward, backward, clipping and fused AdamW. The rival is Hugging Face's GPT-2 of the same geometry on batches
of 32 samples padded to the longest, with its loss over the response tokens as ours.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from plato2.bench.sides import (
    alternate,
    huggingface_side,
    our_side,
    padded_batch,
    padded_unit,
    ratio,
    records,
)
from plato2.config import ModelConfig
from plato2.data.collate import GenerationBatch, Unit
from plato2.data.module import DialogueDataModule
from plato2.stages import CoarseGeneration, FineGeneration

TARGETS = {
    "small_bf16_over_huggingface": (">=", 3.5),
    "93m_bf16_over_huggingface": (">=", 2.0),
    "small_fp32_over_huggingface": (">=", 3.5),
    "93m_fp32_over_huggingface": (">=", 1.7),
    "packed_over_padded": (">=", 1.6),
    "stage_2_gen_cost_over_1_coarse": ("<=", 1.9),
    "activation_checkpointing_cost": ("<=", 1.45),
}
"""What the project holds itself to. `over`: times as many tokens a second; `cost`: times the CPU seconds."""

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""CPU flags of bf16 matrix or dot-product units (x86, x86, Arm)."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    geometries: dict[str, tuple[int, int, int]]
    """Layers, heads, hidden size."""
    unit_tokens: int = 8192
    row_length: int = 512
    padded_samples: int = 32
    """Samples of a padded batch, of the rival's and of ours."""
    probe_samples: int = 8
    """Samples of the batches on which the rival's variants are compared at the larger geometry."""
    rounds: dict[str, int] = field(default_factory=lambda: {"small": 5, "93m": 2, "own": 7})
    finalists: dict[str, int] = field(default_factory=lambda: {"small": 2, "93m": 1})
    """How many of the rival's variants, the best of a probe, take part in the rounds."""
    budget_s: float = 480.0
    """Wall time after which no comparison takes another round."""


FULL = Plan({"small": (4, 4, 256), "93m": (12, 12, 768)})
QUICK = Plan(
    {"small": (1, 2, 32), "93m": (2, 2, 32)},
    1024,
    512,
    4,
    2,
    rounds={"small": 1, "93m": 1, "own": 1},
    budget_s=60.0,
)


@dataclass
class Bench:
    """Corpus, plan and what has been found so far."""

    data: str
    plan: Plan
    say: Callable[[str], None]
    ratios: dict[str, float | None] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Units and padded batches of the same samples."""
        self.deadline = time.monotonic() + self.plan.budget_s
        most = max(self.plan.rounds.values())
        self.units = self.load_units(GenerationBatch(), most)
        self.fine_units = self.load_units(GenerationBatch(latent_slot=True), most)
        samples = [sample for unit in self.units for sample in records(unit)]
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        size = self.plan.padded_samples
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)] or [order]
        self.samples = [[samples[i] for i in group] for group in groups]

    def module(self, batch: GenerationBatch, n_steps: int) -> DialogueDataModule:
        """The corpus in units of the plan, one a step."""
        plan = self.plan
        module = DialogueDataModule(
            self.data,
            batch,
            plan.unit_tokens,
            n_steps,
            unit_tokens=plan.unit_tokens,
            row_length=plan.row_length,
        )
        module.setup()
        return module

    def load_units(self, batch: GenerationBatch, n: int) -> list[Unit]:
        """The first units of a run."""
        return [step["units"][0] for step in islice(self.module(batch, n).train_dataloader(), n)]

    def model(self, geometry: str, dropout: float, **changes: Any) -> ModelConfig:
        """The configuration of a geometry."""
        n_layer, n_head, hidden_size = self.plan.geometries[geometry]
        return ModelConfig(
            n_layer=n_layer,
            n_head=n_head,
            hidden_size=hidden_size,
            dropout=dropout,
            vocab_size=self.vocab_size,
            **changes,
        )

    @property
    def vocab_size(self) -> int:
        """Words of the corpus's tokenizer."""
        return self.module(GenerationBatch(), 1).vocab_size

    def over_huggingface(self, geometry: str, bf16: bool, dropout: float) -> None:
        """Our packed step against the best variant of the rival's padded one."""
        name = ratio_name(geometry, bf16, dropout)
        self.say(name)
        model = self.model(geometry, dropout)
        costs = self.probe(model, geometry, bf16)
        finalists = sorted(costs, key=lambda variant: costs[variant])[: self.plan.finalists[geometry]]
        batches = [padded_batch(samples) for samples in self.samples]
        ours = our_side(CoarseGeneration, model, self.units, bf16)
        theirs = {variant: huggingface_side(model, batches, variant) for variant in finalists}
        alternate([ours, *theirs.values()], self.plan.rounds[geometry], self.deadline)
        ratios = {variant: ratio(side, ours) for variant, side in theirs.items()}
        best = min(ratios, key=lambda variant: ratios[variant])
        self.ratios[name] = ratios[best]
        self.parts[name] = {
            "plato2": ours.summary(),
            "huggingface": theirs[best].summary(),
            "best_variant": best,
            "ratios_to_finalists": ratios,
            "probed_cpu_s_per_1000_tokens": costs,
        }

    def probe(self, model: ModelConfig, geometry: str, bf16: bool) -> dict[str, float]:
        """Cost of each variant of the rival: one step after one that does not count."""
        precisions = ("autocast", "bf16") if bf16 else ("fp32",)
        size = self.plan.probe_samples if geometry == "93m" else self.plan.padded_samples
        batches = [padded_batch(samples[:size]) for samples in self.samples]
        costs = {}
        for variant in (f"{kind}:{precision}" for kind in ("eager", "sdpa") for precision in precisions):
            side = huggingface_side(model, batches, variant)
            side.step(0)
            side.run(0)
            costs[variant] = round(side.costs[0], 4)
        return costs

    def within(self, bf16: bool) -> None:
        """Our own choices against each other at the small geometry."""
        model = self.model("small", 0.1)
        padded = [padded_unit(samples) for samples in self.samples]
        sides = {
            "stage_1_packed": our_side(CoarseGeneration, model, self.units, bf16),
            "stage_1_padded": our_side(CoarseGeneration, model, padded, bf16),
            "stage_1_checkpointing": our_side(
                CoarseGeneration, self.model("small", 0.1, checkpoint_activations=True), self.units, bf16
            ),
            "stage_2_gen_packed": our_side(FineGeneration, model, self.fine_units, bf16),
        }
        self.say("packing, stage 2.1, activation checkpointing")
        alternate(sides.values(), self.plan.rounds["own"], self.deadline)
        base = sides["stage_1_packed"]
        self.ratios["packed_over_padded"] = ratio(sides["stage_1_padded"], base)
        self.ratios["stage_2_gen_cost_over_1_coarse"] = ratio(sides["stage_2_gen_packed"], base)
        self.ratios["activation_checkpointing_cost"] = ratio(sides["stage_1_checkpointing"], base)
        self.parts["own"] = {name: side.summary() for name, side in sides.items()}

    def loader(self) -> None:
        """Samples a second of the train loader, in one process, after the first window has been planned."""
        self.say("loader")
        steps: Iterator[Any] = iter(self.module(GenerationBatch(), 1_000_000).train_dataloader())
        next(steps)
        begin, n_samples = time.process_time(), 0
        for step in islice(steps, 100):
            n_samples += len(step["units"][0]["sample_index"])
        self.parts["loader_samples_per_cpu_s"] = round(n_samples / (time.process_time() - begin))


def bench_train(
    data: str, quick: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """All ratios of a training step (README: speed), their parts, the machine and the settings.

    Args:
        data: folder of a prepared corpus.
        quick: a smoke test of a few seconds whose numbers mean nothing.
        say: told what is being measured.

    Raises:
        UserError: no corpus, or transformers is missing.
    """
    plan, begin = QUICK if quick else FULL, time.monotonic()
    has_bf16 = bool(set(BF16_UNITS) & cpu_flags())
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = Bench(data, plan, say)
        for geometry, dropout in (("small", 0.1), ("small", 0.0), ("93m", 0.1)):
            if geometry == "93m":  # last, for it takes most of the time
                bench.within(has_bf16)
                bench.loader()
            for bf16 in (True, False):
                if bf16 and not has_bf16:
                    bench.ratios[ratio_name(geometry, bf16, dropout)] = None
                else:
                    bench.over_huggingface(geometry, bf16, dropout)
    finally:
        torch.set_num_threads(n_threads)
    return {
        "ratios": bench.ratios,
        "targets": {name: f"{sign} {value}" for name, (sign, value) in TARGETS.items()},
        "met": {name: met(name, bench.ratios[name]) for name in TARGETS},
        "parts": bench.parts,
        "machine": machine(),
        "settings": {
            **asdict(plan),
            "geometries": {name: "/".join(map(str, shape)) for name, shape in plan.geometries.items()},
            "dropout": "0.1 on both sides; 0 on both in *_no_dropout",
            "own_precision": "bf16" if has_bf16 else "fp32",
            "data": data,
            "quick": quick,
        },
        "wall_s": round(time.monotonic() - begin, 1),
    }


def ratio_name(geometry: str, bf16: bool, dropout: float) -> str:
    """What a comparison with Hugging Face is called in the report."""
    precision, suffix = "bf16" if bf16 else "fp32", "" if dropout else "_no_dropout"
    return f"{geometry}_{precision}_over_huggingface{suffix}"


def met(name: str, value: float | None) -> bool | None:
    """Whether a ratio reaches its target; None where it was not measured."""
    sign, target = TARGETS[name]
    if value is None:
        return None
    return value >= target if sign == ">=" else value <= target


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU; empty where the system does not tell."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def machine() -> dict[str, Any]:
    """What was measured on."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(
            flag for flag in cpu_flags() if flag.startswith(("amx", "avx512_bf16", "avx512f", "avx2", "bf16"))
        ),
        "threads": 1,
        "torch": torch.__version__,
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
