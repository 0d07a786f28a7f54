"""`python -m benchmarks.train`: training steps in CPU seconds for each 1,000 real tokens, as ratios.

All sides of a comparison take turns in one process on one thread, on the same samples, and a ratio is the
median over rounds of the two costs of a round, so that a busy machine slows all sides alike. A step is
forward, backward, clipping and fused AdamW. The rival is Hugging Face's GPT-2 of the same geometry on batches
of samples padded to the longest, with its loss over the response tokens as ours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.report import Command, Say, Target, machine, progress, report, show, table
from benchmarks.sides import (
    Record,
    alternate,
    huggingface_side,
    our_side,
    padded_batch,
    padded_unit,
    ratio,
    records,
)
from plato2.batch import Unit
from plato2.commands import main
from plato2.config import ModelConfig, expand_path
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.shards import has_index
from plato2.prepare.dialogues import prepare
from plato2.prepare.options import PrepareOptions
from plato2.runs.parallel import best_precision
from plato2.stages import CoarseGeneration, FineGeneration

TARGETS: dict[str, Target] = {
    "small_bf16_over_huggingface": (">=", 3.5),
    "93m_bf16_over_huggingface": (">=", 2.0),
    "small_fp32_over_huggingface": (">=", 3.5),
    "93m_fp32_over_huggingface": (">=", 1.7),
    "packed_over_padded": (">=", 1.6),
    "stage_2_gen_cost_over_1_coarse": ("<=", 1.9),
    "activation_checkpointing_cost": ("<=", 1.45),
}
"""What the project holds itself to. `over`: times as many tokens a second; `cost`: times the CPU seconds."""


@dataclass(frozen=True)
class Size:
    """A geometry and how much of it is measured."""

    geometry: tuple[int, int, int]
    """Layers, heads, hidden size."""
    unit_tokens: int
    """Slots of our units."""
    padded_samples: int
    """Samples of a padded batch, of the rival's and of ours."""
    warm: int
    """Units and batches each side trains on before the rounds, which take them in turn again: in a run of
    thousands of steps what is compiled or allocated at first does not count."""
    rounds: int
    finalists: int
    """How many of the rival's variants, the best of a probe, take part in the rounds."""
    probe_samples: int
    """Samples of the batches on which the rival's variants are probed."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: dict[str, Size]
    own_rounds: int
    """Rounds of our own choices against each other."""
    row_length: int = 512
    budget_s: float = 480.0
    """Wall time after which no comparison takes another round."""


FULL = Plan(
    {
        "small": Size((4, 4, 256), 8192, 32, warm=4, rounds=5, finalists=2, probe_samples=32),
        "93m": Size((12, 12, 768), 8192, 32, warm=1, rounds=2, finalists=1, probe_samples=8),
    },
    own_rounds=9,
)
QUICK = Plan(
    {
        "small": Size((1, 2, 32), 1024, 4, warm=1, rounds=1, finalists=2, probe_samples=4),
        "93m": Size((2, 2, 32), 1024, 4, warm=1, rounds=1, finalists=1, probe_samples=2),
    },
    own_rounds=1,
    row_length=512,
    budget_s=60.0,
)


@dataclass
class Bench:
    """Corpus, plan and what has been found so far."""

    data: str
    plan: Plan
    say: Say
    ratios: dict[str, float | None] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Starts the clock."""
        self.deadline = time.monotonic() + self.plan.budget_s

    def module(self, size: Size, batch: GenerationBatch) -> DialogueDataModule:
        """The corpus in units of a size, one a step."""
        module = DialogueDataModule(
            self.data,
            batch,
            size.unit_tokens,
            unit_tokens=size.unit_tokens,
            row_length=self.plan.row_length,
        )
        module.setup()
        return module

    def units(self, size: Size, batch: GenerationBatch) -> list[Unit]:
        """The first units of a run."""
        loader = self.module(size, batch).train_dataloader()
        return [step["units"][0] for step in islice(loader, size.warm)]

    def padded(self, size: Size, units: list[Unit]) -> list[list[Record]]:
        """The samples of the units in random order, a batch's worth at a time."""
        samples = [sample for unit in units for sample in records(unit)]
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        n = size.padded_samples
        groups = [order[i : i + n] for i in range(0, len(order) - n + 1, n)] or [order]
        return [[samples[i] for i in group] for group in groups[: size.warm]]

    def model(self, size: Size, dropout: float, **changes: Any) -> ModelConfig:
        """The configuration of a geometry."""
        n_layer, n_head, hidden_size = size.geometry
        return ModelConfig(
            n_layer=n_layer,
            n_head=n_head,
            hidden_size=hidden_size,
            dropout=dropout,
            vocab_size=self.module(size, GenerationBatch()).vocab_size,
            **changes,
        )

    def over_huggingface(self, name: str, bf16: bool) -> None:
        """Our packed step against the best variant of the rival's padded one."""
        size, ratio_name = self.plan.sizes[name], f"{name}_{'bf16' if bf16 else 'fp32'}_over_huggingface"
        self.say(ratio_name)
        model, units = self.model(size, 0.1), self.units(size, GenerationBatch())
        groups = self.padded(size, units)
        costs = self.probe(size, model, groups, bf16)
        finalists = sorted(costs, key=lambda variant: costs[variant])[: size.finalists]
        batches = [padded_batch(samples) for samples in groups]
        ours = our_side(CoarseGeneration, model, units, bf16)
        theirs = {variant: huggingface_side(model, batches, variant) for variant in finalists}
        alternate([ours, *theirs.values()], size.warm, size.rounds, self.deadline)
        ratios = {variant: ratio(side, ours) for variant, side in theirs.items()}
        best = min(ratios, key=lambda variant: ratios[variant])
        self.ratios[ratio_name] = ratios[best]
        self.parts[ratio_name] = {
            "plato2": ours.summary(),
            "huggingface": theirs[best].summary(),
            "best_variant": best,
            "ratios_to_finalists": ratios,
            "probed_cpu_s_per_1000_tokens": costs,
        }

    def probe(
        self, size: Size, model: ModelConfig, groups: list[list[Record]], bf16: bool
    ) -> dict[str, float]:
        """Cost of each variant of the rival: one step after one that does not count."""
        precisions = ("autocast", "bf16") if bf16 else ("fp32",)
        batches = [padded_batch(groups[0][: size.probe_samples])]
        costs = {}
        for variant in (f"{kind}:{precision}" for kind in ("eager", "sdpa") for precision in precisions):
            side = huggingface_side(model, batches, variant)
            side.step(0)
            side.run(0)
            costs[variant] = round(side.costs[0], 4)
        return costs

    def within(self, bf16: bool) -> None:
        """Our own choices against each other at the small geometry."""
        self.say("packing, stage 2.1, activation checkpointing")
        size = self.plan.sizes["small"]
        model, units = self.model(size, 0.1), self.units(size, GenerationBatch())
        padded = [padded_unit(samples) for samples in self.padded(size, units)]
        fine_units = self.units(size, GenerationBatch(latent_slot=True))
        checkpointing = self.model(size, 0.1, checkpoint_activations=True)
        sides = {
            "stage_1_packed": our_side(CoarseGeneration, model, units, bf16),
            "stage_1_padded": our_side(CoarseGeneration, model, padded, bf16),
            "stage_1_checkpointing": our_side(CoarseGeneration, checkpointing, units, bf16),
            "stage_2_gen_packed": our_side(FineGeneration, model, fine_units, bf16),
        }
        alternate(sides.values(), size.warm, self.plan.own_rounds, self.deadline)
        base = sides["stage_1_packed"]
        self.ratios["packed_over_padded"] = ratio(sides["stage_1_padded"], base)
        self.ratios["stage_2_gen_cost_over_1_coarse"] = ratio(sides["stage_2_gen_packed"], base)
        self.ratios["activation_checkpointing_cost"] = ratio(sides["stage_1_checkpointing"], base)
        self.parts["own"] = {name: side.summary() for name, side in sides.items()}

    def loader(self) -> None:
        """Samples a second of the train loader, in one process, after the first window has been planned."""
        self.say("loader")
        module = self.module(self.plan.sizes["small"], GenerationBatch())
        steps: Iterator[Any] = iter(module.train_dataloader())
        next(steps)
        begin, n_samples = time.process_time(), 0
        for step in islice(steps, 100):
            n_samples += len(step["units"][0]["sample_index"])
        self.parts["loader_samples_per_cpu_s"] = round(n_samples / (time.process_time() - begin))


def bench_train(data: str, quick: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """All ratios of a training step, their parts, the machine and the settings.

    Args:
        data: folder of a prepared corpus.
        quick: a smoke test of a few seconds whose numbers mean nothing.
        say: told what is being measured.

    Raises:
        UserError: no corpus, or transformers is missing.
    """
    plan, begin = QUICK if quick else FULL, time.monotonic()
    bf16 = best_precision("cpu") == "bf16-mixed"
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = Bench(data, plan, say)
        for name in plan.sizes:
            if name == "93m":  # last, for it takes most of the time
                bench.within(bf16)
                bench.loader()
            if bf16:
                bench.over_huggingface(name, bf16=True)
            else:
                bench.ratios[f"{name}_bf16_over_huggingface"] = None
            bench.over_huggingface(name, bf16=False)
        measured_on = machine()
    finally:
        torch.set_num_threads(n_threads)
    return {
        **report(bench.ratios, TARGETS),
        "parts": bench.parts,
        "machine": measured_on,
        "settings": {
            **asdict(plan),
            "dropout": 0.1,
            "own_precision": "bf16" if bf16 else "fp32",
            "data": data,
            "quick": quick,
        },
        "wall_s": round(time.monotonic() - begin, 1),
    }


# ---------------------------------------------------------------------------------------- the command line

DEFAULT_DATA = "data/chitchat"
HELP = """The cost of a training step beside Hugging Face's GPT-2 and our own alternatives, in CPU seconds.

Needs transformers (pip install transformers) and about ten minutes.

[bold]Examples[/]

python -m benchmarks.train

python -m benchmarks.train --data data/mine --json
"""
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command, help=HELP)
def run(
    data: Annotated[
        str | None,
        typer.Option(
            help=f"A prepared corpus; else {DEFAULT_DATA}, prepared in a temporary folder if need be."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test; its numbers mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """`python -m benchmarks.train`."""
    with tempfile.TemporaryDirectory(prefix="plato2-bench-") as folder, progress() as say:
        if data is None:
            data = DEFAULT_DATA
            if not has_index(data):
                say("preparing chitchat")
                data = str(prepare(PrepareOptions(corpus="chitchat", out=f"{folder}/chitchat")))
        found = bench_train(expand_path(data, "--data"), quick, say)
    title = "Ratios (medians of alternating rounds, CPU seconds, one thread)"
    show(found, as_json, title, details(found["parts"]))


def details(parts: dict[str, Any]) -> Iterator[Table | str]:
    """What each side cost."""
    costs = table("CPU seconds for each 1,000 real tokens", ("what", "side"), ("cost", "steps"))
    for name, part in parts.items():
        for side, summary in part.items() if isinstance(part, dict) else ():
            if isinstance(summary, dict) and "steps" in summary:
                shown = f"{side} ({part['best_variant']})" if side == "huggingface" else side
                costs.add_row(name, shown, f"{summary['cpu_s_per_1000_tokens']:.3f}", str(summary["steps"]))
    yield costs
    yield f"loader: {parts['loader_samples_per_cpu_s']:,} samples/s of CPU time"


if __name__ == "__main__":
    main(app, "python -m benchmarks.train")
