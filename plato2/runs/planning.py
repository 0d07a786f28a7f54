"""`plan=true`: the plan of a configuration (runs/plan.py), made and printed."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from plato2.config import TrainConfig
from plato2.runs.build import build
from plato2.runs.console import say
from plato2.runs.job import CURRICULUM
from plato2.runs.parts import build_parts, build_stage, is_sharded, on_gpus, precision_of, run_length

if TYPE_CHECKING:  # heavy imports wait until something is planned: --help and tab completion stay fast
    from plato2.batch import Unit
    from plato2.data.module import DialogueDataModule
    from plato2.runs.plan import Plan, Work
    from plato2.runs.simulate import Form, Ranks
    from plato2.stages import Stage


def print_plan(keys: TrainConfig, stage: Stage, data: DialogueDataModule, others: list[TrainConfig]) -> None:
    """Prints what a run will need; nothing is prepared or trained.

    Args:
        keys: the configuration.
        stage: of the run, on the meta device.
        data: its batches.
        others: the same command for the other stages of the curriculum.
    """
    from rich.console import Console
    from rich.table import Table

    gc.freeze()  # a simulation makes and drops so many tensors that walking through all modules costs 8 %
    try:
        made = make_plan(keys, stage, data, others)
    finally:
        gc.unfreeze()
    if keys.plan == "json":
        print(json.dumps(made.figures(), indent=2))
        return
    console = Console()
    table = Table(title=f"{keys.name}: what the run needs", title_justify="left", show_header=False)
    for name, text in made.rows():
        table.add_row(name, text)
    console.print(table)
    n = made.work.ranks.n
    rented = Table(*made.gpu_columns, title=f"on {n} GPU{'s' * (n > 1)}", title_justify="left")
    for row in made.gpu_rows():
        rented.add_row(*row)
    Console(width=max(console.width, 96)).print(rented)  # numbers cut off are worse than a wide table
    for sentence in (*made.about_gpus(), *(f"- {one}" for one in made.advice())):
        console.print(sentence, soft_wrap=True, highlight=False)
    if made.length and made.length.warning():
        say(made.length.warning())


def make_plan(keys: TrainConfig, stage: Stage, data: DialogueDataModule, others: list[TrainConfig]) -> Plan:
    """The plan of a run and its curriculum; see `print_plan`."""
    from plato2.model.decoder_folder import with_layers
    from plato2.runs.plan import GPUS, Plan, Terms, is_tight, largest_units, memory_of_a_rank, work

    form: Form = "gpu" if on_gpus(keys) else "cpu"
    ranks = ranks_of(keys)
    data.check_ranks(ranks.n)

    def work_of(keys: TrainConfig, stage: Stage, data: DialogueDataModule) -> Work:
        tokens, steps = data.batching.unit_tokens, keys.trainer["max_steps"]
        return work(stage, planned_unit(keys, data, tokens), tokens, data.batch_tokens, steps, ranks)

    def build(n_layer: int, checkpointing: bool, **changed: Any) -> Stage:
        model = replace(with_layers(keys.model, n_layer), checkpoint_activations=checkpointing, **changed)
        return build_stage(replace(keys, model=model), "meta")

    own, model = work_of(keys, stage, data), keys.model
    curriculum = [own]
    for other in others:
        other_stage, _, other_data = build_parts(other)
        curriculum.append(work_of(other, other_stage, other_data))
    if others:
        curriculum.sort(key=lambda one: CURRICULUM.index(one.stage))
    unit = planned_unit(keys, data, own.unit_tokens)
    averaged = keeps_an_average(keys)
    memory = memory_of_a_rank(
        build, model.n_layer, model.checkpoint_activations, unit, ranks, form, own.units, averaged
    )
    limits = other_total = half_base = None
    if form == "gpu":
        other_way = not model.checkpoint_activations
        other_total = memory_of_a_rank(
            build, model.n_layer, other_way, unit, ranks, form, own.units, averaged
        ).total
        make = partial(planned_unit, keys, data)
        step = data.batching.row_length
        limits = largest_units(build, model.n_layer, make, step, ranks, own.units, averaged)
        tight = any(is_tight(memory.total, gpu) for gpu in GPUS)
        could_be_half = model.has_adapter and model.base_dtype == "float32"
        if could_be_half and precision_of(keys) == "bf16-mixed" and tight:
            half = partial(build, base_dtype="bfloat16")
            half_base = {
                way: memory_of_a_rank(half, model.n_layer, way, unit, ranks, form, own.units, averaged).total
                for way in {True, model.checkpoint_activations}
            }
    return Plan(
        name=keys.name,
        work=own,
        curriculum=tuple(curriculum),
        memory=memory,
        form=form,
        checkpointing=model.checkpoint_activations,
        largest_unit=limits,
        terms=Terms(keys.plan_mfu, keys.plan_gb_per_s, keys.plan_gpu_hour_price),
        other_total=other_total,
        half_base=half_base,
        length=run_length(keys, data, 0) if data.exists else None,
    )


def planned_unit(keys: TrainConfig, data: DialogueDataModule, tokens: int) -> Unit:
    """A unit of this many tokens, of samples as long as the corpus's on average, where there is one."""
    from plato2.runs.simulate import SampleLengths, typical_unit

    lengths = SampleLengths()
    if data.exists:
        shards = data.index.splits["train"].shards
        n = max(1, sum(shard.samples for shard in shards))
        context, response = (
            round(sum(getattr(shard, f"{part}_tokens") for shard in shards) / n)
            for part in ("context", "response")
        )
        lengths = SampleLengths(context, response)
    return typical_unit(
        data.batch, replace(data.batching, unit_tokens=tokens), lengths, keys.model.vocab_size
    )


def ranks_of(keys: TrainConfig) -> Ranks:
    """How the processes of the strategy share the model."""
    from plato2.runs.parallel import n_ranks
    from plato2.runs.sharded import check_replicas
    from plato2.runs.simulate import Ranks

    strategy, machines = keys.strategy, keys.strategy.get("num_nodes", 1)
    n = n_ranks(strategy["devices"], machines, strategy.get("accelerator", "auto"))
    half = "16" in precision_of(keys)
    if not is_sharded(keys):
        return Ranks(replicate=n, half=half)
    copies = check_replicas(strategy["strategy"].get("replicas", 1), machines, n)
    return Ranks(copies, n // copies, fsdp=True, half=half)


def keeps_an_average(keys: TrainConfig) -> bool:
    """Whether a callback keeps a moving average of the weights; what they are is checked as in a run."""
    from pytorch_lightning.callbacks import WeightAveraging

    made = [build(node, f"callbacks.{name}") for name, node in keys.callbacks.items()]
    return any(isinstance(callback, WeightAveraging) for callback in made)
