"""The memory of a simulated step: against PyTorch's profiler on real ones, and how it grows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import MODEL, WORDS, Case, write_decoder
from torch.utils._python_dispatch import TorchDispatchMode
from units import BATCHES, STAGES, write_answers

from plato2.config import ModelConfig, OptimConfig
from plato2.data.order import Batching, Position
from plato2.model import cpu
from plato2.runs import plan, simulate
from plato2.runs.plan import memory_of_a_rank, step_traffic
from plato2.runs.simulate import Memory, Ranks, SampleLengths, peak_memory, typical_unit

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder, 3000, vocab_size=WORDS)
    return folder


def stage_of(name: str, model: ModelConfig) -> Any:
    with torch.device("meta"):
        return STAGES[name](model, OptimConfig())


def unit_of(name: str, tokens: int = 1024) -> Any:
    lengths = SampleLengths(context=22, response=10)
    return typical_unit(BATCHES[name], Batching(unit_tokens=tokens, row_length=64), lengths, WORDS)


def simulated(case: Case, corpus: Path) -> Memory:
    """On a unit of the corpus itself."""
    read = case.data(corpus)._corpus("train")
    planned = read.load(read.windows(11, 0, True)[0], 11, Position(), True)
    unit: Any = read.batch.unit(planned.window, planned.items, planned.layout.unit(0))
    totals = {name: torch.tensor(100) for name in ("step_targets", "step_samples")}
    stage = stage_of(case.stage, case.model)
    return peak_memory(stage, unit | totals, case.ranks, "cpu", case.n_units, case.averaged)


def measured(case: Case, corpus: Path, out: Path) -> list[int]:
    """The peak of each rank, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
    shared["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    arguments = [str(HERE / "memory.py"), str(corpus), str(out), json.dumps(asdict(case))]
    numbers = [str(rank) for rank in range(case.ranks.n)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | ({"LOCAL_RANK": rank} if case.ranks.n > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in numbers
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text())["peak"] for rank in numbers]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("2_eval", half=False, checkpoint=True),
        Case(strategy="ddp", checkpoint=True, n_units=2),
        Case("2_gen", "fsdp", checkpoint=True, n_layer=6, hidden_size=512, unit_tokens=512, n_units=2),
        Case(strategy="fsdp", n_units=2),
        Case(hidden_size=512, unit_tokens=128),
        Case("2_eval", checkpoint=True, unit_tokens=128),
    ],
    ids=lambda case: f"{case.stage}-{case.strategy}-{case.unit_tokens}",
)
def test_the_peak_is_what_the_profiler_finds_in_a_real_run(case: Case, corpus: Path, tmp_path: Path) -> None:
    """Within 10 %; a rank's units are not exactly as full as the one that was simulated.

    Of FSDP2 the lowest of four counts: in stage 2.1 runs differ by up to a third, probably because over gloo
    a rank that is ahead of the other holds what it has sent until the other takes it.
    """
    peaks = measured(case, corpus, tmp_path / "peak")
    if case.ranks.fsdp:
        peaks = [min(peaks + measured(case, corpus, tmp_path / "again"))]
    for peak in peaks:
        assert simulated(case, corpus).total == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("2_gen", unit_tokens=2048, adapter="lora"),
        Case("1_coarse", half=False, unit_tokens=2048, checkpoint=True),
        Case("1_coarse", "fsdp", unit_tokens=2048, adapter="lora"),
    ],
    ids=lambda case: f"{case.stage}-{case.strategy}-{case.adapter}",
)
def test_the_peak_of_a_decoder_is_what_the_profiler_finds(case: Case, corpus: Path, tmp_path: Path) -> None:
    """Within 10 %, whole and low-rank."""
    case = replace(case, decoder=str(write_decoder(tmp_path / "decoder")))
    for peak in measured(case, corpus, tmp_path / "peak"):
        assert simulated(case, corpus).total == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_the_average_of_the_weights_is_counted(strategy: str, corpus: Path, tmp_path: Path) -> None:
    """Of a model whose weights outweigh its activations: without the average the peak would be far off."""
    case = Case(strategy=strategy, hidden_size=512, unit_tokens=512, averaged=True)
    said, peaks = simulated(case, corpus), measured(case, corpus, tmp_path / "peak")
    assert said.average == said.weights > 0.13 * said.total
    for peak in [min(peaks)] if case.ranks.fsdp else peaks:
        assert said.total == pytest.approx(peak, rel=0.1)
        assert said.total - said.average < 0.9 * peak


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 8, fsdp=True)], ids=["one", "fsdp"])
def test_a_deep_model_is_what_three_and_five_layers_say(ranks: Ranks) -> None:
    def build(n_layer: int, checkpointing: bool) -> Any:
        return stage_of("1_coarse", replace(MODEL, n_layer=n_layer, checkpoint_activations=checkpointing))

    unit = unit_of("1_coarse")
    said = memory_of_a_rank(build, 10, True, unit, ranks, "gpu", 1)
    assert said.total == pytest.approx(peak_memory(build(10, True), unit, ranks, "gpu").total, rel=0.03)


@pytest.mark.parametrize("name", BATCHES)
def test_every_stage_can_be_simulated_on_both_kinds_of_kernels(name: str) -> None:
    stage, unit = stage_of(name, replace(MODEL, n_layer=1)), unit_of(name)
    n_parameters = sum(parameter.numel() for parameter in stage.parameters())
    for form in ("gpu", "cpu") if name in ("1_coarse", "plato") else ("gpu",):
        found = peak_memory(stage_of(name, replace(MODEL, n_layer=1)), unit, Ranks(), form)  # type: ignore[arg-type]
        assert found.weights == 4 * n_parameters
        assert found.optimizer == pytest.approx(8 * n_parameters, rel=1e-3)  # and a step's number each
        assert min(vars(found).values()) >= 0
        assert found.activations > 0


def test_ranks_share_what_is_sharded_and_sums_of_units_are_whole() -> None:
    model, unit = replace(MODEL, n_layer=2, hidden_size=256), unit_of("1_coarse", 256)
    size = 4 * sum(parameter.numel() for parameter in stage_of("1_coarse", model).parameters())
    one = peak_memory(stage_of("1_coarse", model), unit, Ranks(), "gpu")
    shared = peak_memory(stage_of("1_coarse", model), unit, Ranks(1, 8, fsdp=True), "gpu")
    assert shared.weights == pytest.approx(size / 8, rel=0.01)  # shares are padded to whole rows
    assert shared.optimizer == pytest.approx(size / 4, rel=0.01)
    assert one.optimizer == pytest.approx(2 * size, rel=0.01)
    summed = peak_memory(stage_of("1_coarse", model), unit, Ranks(1, 8, fsdp=True), "gpu", n_units=4)
    assert summed.gradients - shared.gradients > 0.6 * size
    ddp = peak_memory(stage_of("1_coarse", model), unit, Ranks(8), "gpu")
    assert ddp.total - one.total == size  # the buckets
    averaged = peak_memory(stage_of("1_coarse", model), unit, Ranks(1, 8, fsdp=True), "gpu", averaged=True)
    assert averaged.total - shared.total == averaged.average == shared.weights


class Collectives(TorchDispatchMode):
    """Bytes that are gathered and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_allgather_base_" in str(func):
            self.gathered += args[0].nbytes
        elif "_reduce_scatter_base_" in str(func):
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "n_units"), [("1_coarse", 1), ("1_coarse", 2), ("2_gen", 1), ("2_gen", 2)])
def test_traffic_is_that_of_the_collectives(name: str, n_units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step, the second: counted as FSDP2 calls them."""
    counts: list[Collectives] = []
    whole = simulate._Step.__call__

    def counted(step: Any, after_unit: Any) -> None:
        with Collectives() as count:
            whole(step, after_unit)
        counts.append(count)

    monkeypatch.setattr(simulate._Step, "__call__", counted)
    stage = stage_of(name, replace(MODEL, n_layer=2))
    blocks = sum(parameter.numel() for parameter in stage.backbone.blocks.parameters())
    rest = sum(parameter.numel() for parameter in stage.parameters()) - blocks
    ranks = Ranks(1, 4, fsdp=True)
    peak_memory(stage, unit_of(name), ranks, "gpu", n_units)
    found = 3 / 4 * (counts[1].gathered + counts[1].reduced)
    assert step_traffic(blocks, rest, stage.passes, n_units, ranks) == pytest.approx(found, rel=0.02)


@pytest.mark.slow
def test_one_exchange_for_both_passes_costs_at_most_what_autograd_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sums of the units before wait beside the bf16 gradients of the later pass, which are new then."""
    model, ranks = replace(MODEL, n_layer=6, checkpoint_activations=True), Ranks(1, 8, fsdp=True)
    blocks = sum(p.numel() for p in stage_of("2_gen", model).backbone.blocks.parameters())
    waiting = peak_memory(stage_of("2_gen", model), unit_of("2_gen", 256), ranks, "gpu", n_units=2)
    monkeypatch.setattr(STAGES["2_gen"], "between_passes", None)
    at_once = peak_memory(stage_of("2_gen", model), unit_of("2_gen", 256), ranks, "gpu", n_units=2)
    assert 0 < waiting.total - at_once.total <= 2 * blocks
    assert waiting.gradients > 4 * blocks


def test_a_latent_after_the_context_can_be_planned() -> None:
    """Where it stands is found without knowing what is in a unit; it costs what one in front does."""
    front, response = (
        peak_memory(
            stage_of("2_gen", replace(MODEL, n_layer=2, latent_at=place)), unit_of("2_gen"), Ranks(), "gpu"
        )
        for place in ("front", "response")
    )
    assert response.total == pytest.approx(front.total, rel=0.02)


def test_a_plan_leaves_the_process_as_it_was() -> None:
    """Also where the simulation fails."""
    before = (cpu.serves, cpu.sample_blocks, torch.nn.functional.dropout, simulate.losses.hits)
    peak_memory(
        stage_of("1_coarse", replace(MODEL, n_layer=1)), unit_of("1_coarse"), Ranks(1, 4, fsdp=True), "gpu"
    )
    broken: Any = {"token_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(KeyError):
        peak_memory(stage_of("1_coarse", replace(MODEL, n_layer=1)), broken, Ranks(1, 4, fsdp=True), "gpu")
    assert before == (cpu.serves, cpu.sample_blocks, torch.nn.functional.dropout, simulate.losses.hits)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_the_largest_unit_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.GPUS, "V100-32G", plan.Gpu(2**29, 125e12))

    def build(n_layer: int, checkpointing: bool) -> Any:
        return stage_of("1_coarse", replace(MODEL, n_layer=n_layer, checkpoint_activations=checkpointing))

    def unit(tokens: int) -> Any:
        return unit_of("1_coarse", tokens)

    limits = plan.largest_units(build, 6, unit, 64, Ranks(), 1)["V100-32G"]
    assert 0 < limits["without_checkpointing"] < limits["with_checkpointing"]
    usable = plan.USABLE * 2**29
    for name, checkpointing in (("without_checkpointing", False), ("with_checkpointing", True)):
        here = peak_memory(build(6, checkpointing), unit(limits[name]), Ranks(), "gpu").total
        assert 0.97 * usable < here < 1.01 * usable
