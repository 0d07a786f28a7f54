"""What benchmarks/train.py compares: our optimizer step and Hugging Face's, on the same samples.

A step is forward, backward, clipping and fused AdamW. Hugging Face's GPT-2 has the same geometry; its loss is
over the response tokens as ours, its logits are computed everywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import gpt2
from benchmarks.report import median_ratio
from plato2.batch import Unit
from plato2.config import ModelConfig, OptimConfig
from plato2.data.units import Records, build_unit, one_a_row
from plato2.stages import Stage
from plato2.stages.optim import adamw


@dataclass
class Side:
    """One side of a comparison: a step, and its cost in each round."""

    step: Callable[[int], int]
    """Takes the number of the round, returns the real tokens of the samples it trained on."""
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def run(self, number: int) -> None:
        """One timed step."""
        begin = time.process_time()
        tokens = self.step(number)
        self.seconds.append(time.process_time() - begin)
        self.tokens.append(tokens)

    @property
    def costs(self) -> list[float]:
        """CPU seconds for each 1,000 real tokens, by round."""
        return [1000 * s / n for s, n in zip(self.seconds, self.tokens, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The part for the report."""
        return {
            "cpu_s_per_1000_tokens": round(statistics.median(self.costs), 4),
            "tokens": sum(self.tokens),
            "steps": len(self.tokens),
        }


def alternate(sides: Iterable[Side], warm: int, rounds: int, deadline: float) -> None:
    """Lets the sides take turns, after `warm` warm-up steps each.

    A round that would end after `deadline` (on `time.monotonic`) is left out, but never the first.
    """
    sides, round_s = list(sides), 0.0
    for side in sides:
        for number in range(warm):
            side.step(number)
    for number in range(rounds):
        if number and time.monotonic() + round_s > deadline:
            return
        begin = time.monotonic()
        for side in sides:
            side.run(number)
        round_s = time.monotonic() - begin


def ratio(numerator: Side, denominator: Side) -> float:
    """The median over rounds of the ratio of costs."""
    return median_ratio(numerator.costs, denominator.costs)


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Record:
    """One sample: its ids, context and response, and how many of the last are predicted."""

    token_ids: Tensor
    n_target: int

    def parts(self) -> tuple[list[int], list[int]]:
        """Context and response, whose [CLS] is no target."""
        ids, n_response = self.token_ids.tolist(), self.n_target + 1
        return ids[:-n_response], ids[-n_response:]


def records(unit: Unit) -> list[Record]:
    """The samples of a stage-1 unit, each with its last id, which is only a target there."""
    tokens, segments = unit["token_ids"].flatten(), unit["segment_ids"]
    found = []
    for sample, first in enumerate(unit["sample_index"].tolist()):
        row, column = divmod(first, segments.shape[1])
        length = int((segments[row] == segments[row, column]).sum())
        targets = unit["target_ids"][unit["target_sample"] == sample]
        found.append(Record(torch.cat([tokens[first : first + length], targets[-1:]]), len(targets)))
    return found


def real_tokens(unit: Unit) -> int:
    """Ids of a unit's samples: stage 1 leaves out the last of each, stage 2.1 adds a front slot to that."""
    has_front = bool((unit["token_ids"].flatten()[unit["sample_index"]] != 1).any())
    return int((unit["segment_ids"] > 0).sum()) + (0 if has_front else len(unit["sample_index"]))


def padded_unit(samples: list[Record]) -> Unit:
    """The samples as a stage-1 unit of ours with one sample a row, padded to the longest."""
    records = Records.of([sample.parts() for sample in samples])
    unit = build_unit(records, one_a_row(records.length.sum(axis=1) - 1))
    unit["step_targets"] = torch.tensor(len(unit["target_ids"]))
    unit["step_samples"] = torch.tensor(len(samples))
    return unit


def padded_batch(samples: list[Record]) -> dict[str, Tensor]:
    """The samples as Hugging Face takes them; labels only where we have targets."""
    width = max(len(sample.token_ids) for sample in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(samples), width, dtype=torch.int64),
        "labels": torch.full((len(samples), width), -100),
    }
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        batch["input_ids"][row, :length] = sample.token_ids
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, length - sample.n_target : length] = sample.token_ids[-sample.n_target :]
    return batch


# -------------------------------------------------------------------------------------------------- sides


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    """bf16 or not."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def our_side(stage_class: type[Stage], model: ModelConfig, units: list[Unit], bf16: bool) -> Side:
    """The optimizer step of a stage, as its `training_step` takes it."""
    optim = OptimConfig()
    stage = stage_class(model, optim).train()
    optimizer = adamw(stage, optim)

    def step(number: int) -> int:
        unit = units[number % len(units)]
        with autocast(bf16):
            values, totals = stage.losses(unit), stage.totals(unit)
            loss = torch.stack([values[term].sum() / totals[term] for term in stage.loss_terms]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return real_tokens(unit)

    return Side(step)


def huggingface_side(model: ModelConfig, batches: list[dict[str, Tensor]], variant: str) -> Side:
    """GPT-2 of the same geometry. `variant` = attention:precision, e.g. `sdpa:autocast`, `eager:bf16`.

    Raises:
        UserError: transformers is not installed.
    """
    attention, precision = variant.split(":")
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout)
    network = gpt2(model, attention, **dropout, use_cache=False, loss_type="ForCausalLM").train()
    if precision == "bf16":
        network = network.to(torch.bfloat16)
    optim = OptimConfig()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True
    )

    def step(number: int) -> int:
        batch = batches[number % len(batches)]
        with autocast(precision == "autocast"):
            loss = network(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["attention_mask"].sum())

    return Side(step)
