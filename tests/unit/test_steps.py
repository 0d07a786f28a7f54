"""One optimizer step is the same step for any split into units and ranks; and it is Knover's step."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins.precision import MixedPrecision
from steps import N_STEPS, OPTIM, OVERFLOWING, STEP_TOKENS, Record, large_scale, train_steps
from torch import Tensor
from units import BATCHES, MODEL, make_stage, write_answers

from plato2.config import OptimConfig
from plato2.data.order import Batching
from plato2.data.shards import read_index
from plato2.data.stream import Corpus, TrainStream
from plato2.stages import known_stages
from plato2.stages.optim import adamw, rate_factor
from plato2.weights.names import knover_names, released_apart

STAGES = known_stages()

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder, 300)
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path) -> dict[str, Record]:
    """Every stage trained with each step computed at once, in one process."""
    return {name: train_steps(name, corpus, STEP_TOKENS) for name in BATCHES}


def assert_same_run(run: dict[str, Any], whole: Record, tolerance: float = 1e-6) -> None:
    for step in range(N_STEPS):
        for name, gradient in whole.gradients[step].items():
            assert_near(run["gradients"][step][name], gradient, tolerance, f"gradient of {name}, step {step}")
    for name, weight in whole.weights[-1].items():
        assert_near(run["weights"][-1][name], weight, tolerance, name)
    for metrics, expected in zip(run["metrics"], whole.metrics, strict=True):
        assert metrics == pytest.approx(expected, rel=max(1e-5, tolerance))


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max())), what


# -------------------------------------------------------------------------- ranks x accumulation = one batch


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("n_units", [2, 8])
def test_a_step_in_several_units_is_the_step_at_once(
    corpus: Path, whole: dict[str, Record], name: str, n_units: int
) -> None:
    run = train_steps(name, corpus, STEP_TOKENS // n_units)
    assert run.samples == whole[name].samples
    assert_same_run(run.recorded(), whole[name])


def two_processes(corpus: Path, out: Path, strategy: str) -> None:
    """Runs steps.py as ranks 0 and 1 (what torchrun does, less its own start of some seconds)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    command = [sys.executable, str(HERE / "steps.py"), str(corpus), str(out), strategy]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"LOCAL_RANK": rank, "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


@pytest.mark.slow
def test_two_processes_of_two_units_each_are_one_process(
    corpus: Path, whole: dict[str, Record], tmp_path: Path
) -> None:
    two_processes(corpus, tmp_path, "ddp")
    for name in BATCHES:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for step in range(N_STEPS):
            shares = [rank["samples"][step] for rank in ranks]
            assert sorted(shares[0] + shares[1]) == sorted(whole[name].samples[step])
        for rank in ranks:
            assert_same_run(rank, whole[name])
        assert all(torch.equal(ranks[1]["weights"][-1][key], w) for key, w in ranks[0]["weights"][-1].items())


@pytest.mark.slow
def test_two_sharded_processes_are_one_process_as_far_as_bf16_goes(
    corpus: Path, whole: dict[str, Record], tmp_path: Path
) -> None:
    two_processes(corpus, tmp_path, "fsdp")
    for name in BATCHES:
        run = torch.load(tmp_path / f"{name}-0.pt", weights_only=True)
        start = whole[name].weights[0]
        assert all(torch.equal(run["weights"][0][key], weight) for key, weight in start.items())
        for step in range(N_STEPS):
            assert run["metrics"][step]["train/loss"] == pytest.approx(
                whole[name].metrics[step]["train/loss"], rel=0.02
            )
            found, expected = (flat(record["gradients"][step]) for record in (run, whole[name].recorded()))
            assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
            assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.05)


def assert_skips_and_goes_on(run: dict[str, Any], corpus: Path) -> None:
    """What overflows in float16 changes nothing but the scale; then clipping is that of float32 gradients."""
    still = replace(OPTIM, lr=1e-30)
    reference = train_steps("2_gen", corpus, STEP_TOKENS, still, OVERFLOWING)  # never leaves its start
    overflown = [metrics["train/overflows"] for metrics in run["metrics"]]
    n = int(overflown[-1])
    assert 1 <= n < OVERFLOWING
    assert overflown == [min(step + 1, n) for step in range(OVERFLOWING)]
    scales = [metrics["train/loss_scale"] for metrics in run["metrics"]]
    assert scales == [2.0 ** (40 - 8 * min(step + 1, n)) for step in range(OVERFLOWING)]
    for skipped in run["weights"][1 : n + 1]:
        assert all(torch.equal(skipped[name], weight) for name, weight in run["weights"][0].items())
    first = run["weights"][n + 1]
    assert any(not torch.equal(first[name], weight) for name, weight in run["weights"][0].items())
    norm = reference.metrics[n]["train/grad_norm"]
    assert run["metrics"][n]["train/grad_norm"] == pytest.approx(norm, rel=0.02)
    assert float(flat(run["gradients"][n]).norm()) == pytest.approx(0.5, rel=1e-3)


def test_an_overflow_in_float16_skips_the_step_and_is_counted(corpus: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", large_scale())
    clipped = replace(OPTIM, clip_norm=0.5)
    run = train_steps("2_gen", corpus, STEP_TOKENS // 4, clipped, OVERFLOWING, plugins=[plugin])
    assert_skips_and_goes_on(run.recorded(), corpus)


@pytest.mark.slow
def test_an_overflow_on_sharded_ranks_skips_the_step_on_all(corpus: Path, tmp_path: Path) -> None:
    two_processes(corpus, tmp_path, "fsdp_16")
    ranks = [torch.load(tmp_path / f"2_gen-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert_skips_and_goes_on(rank, corpus)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("name", BATCHES)
def test_a_loss_is_the_mean_over_all_targets_of_the_step(
    corpus: Path, whole: dict[str, Record], name: str
) -> None:
    """Not the mean of the units' means: the units of a step have different numbers of targets."""
    batching = Batching(unit_tokens=STEP_TOKENS // 4, row_length=64)
    shards = Corpus(str(corpus), read_index(str(corpus)), "train", BATCHES[name], batching)
    step = next(iter(TrainStream(shards, seed=11, units_per_step=4)))
    n_targets = [len(unit["target_ids"]) for unit in step["units"]]
    assert len(set(n_targets)) > 1
    assert {int(unit["step_targets"]) for unit in step["units"]} == {sum(n_targets)}
    stage = make_stage(name)
    with torch.no_grad():
        terms = [stage.losses(unit) for unit in step["units"]]
    logged = whole[name].metrics[0]
    for term in (*stage.loss_terms, *stage.metric_terms):
        assert logged[f"train/{term}"] == pytest.approx(
            float(torch.cat([values[term] for values in terms]).mean()), rel=1e-5
        )
    total = sum(logged[f"train/{term}"] for term in stage.loss_terms)  # equations 6 and 7
    assert logged["train/loss"] == pytest.approx(total, rel=1e-6)


# ------------------------------------------------------------------------------------ the update, section 8


def test_clipping_is_by_the_norm_of_the_whole_steps_gradient(corpus: Path, whole: dict[str, Record]) -> None:
    expected = whole["2_gen"]
    norm = float(flat(expected.gradients[0]).norm())
    assert expected.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    for limit in (0.1, 2.0 * norm):
        run = train_steps("2_gen", corpus, STEP_TOKENS // 4, replace(OPTIM, clip_norm=limit), n_steps=1)
        assert run.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
        gradient = flat(run.gradients[0])
        assert float(gradient.norm()) == pytest.approx(min(norm, limit), rel=1e-4)
        torch.testing.assert_close(
            gradient / gradient.norm(), flat(expected.gradients[0]) / norm, rtol=0, atol=1e-6
        )


def test_updates_are_adamw_at_the_rate_of_the_schedule(corpus: Path) -> None:
    """From the gradients of four steps, the weights by AdamW's formula in float64 (Loshchilov and Hutter)."""
    config = OptimConfig(
        lr=0.02, warmup_steps=2, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3, clip_norm=1.0
    )
    run = train_steps("2_gen", corpus, STEP_TOKENS, config, n_steps=4)
    assert [metrics["train/lr"] for metrics in run.metrics] == pytest.approx(
        [0.01, 0.02, 0.02 * math.sqrt(2 / 3), 0.02 * math.sqrt(2 / 4)]
    )
    knover = knover_names(MODEL.n_layer)
    for name, start in run.weights[0].items():
        weight = start.double()
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        for n, (gradients, metrics) in enumerate(zip(run.gradients, run.metrics, strict=True), start=1):
            gradient, rate = gradients[name].double(), metrics["train/lr"]
            m = 0.8 * m + 0.2 * gradient
            v = 0.95 * v + 0.05 * gradient**2
            if not_excluded(knover[released_apart(name)[0]]):
                weight = weight - rate * 0.3 * weight
            weight = weight - rate * (m / (1 - 0.8**n)) / ((v / (1 - 0.95**n)).sqrt() + 1e-3)
        torch.testing.assert_close(run.weights[-1][name].double(), weight, rtol=1e-5, atol=1e-6)


def not_excluded(knovers_name: str) -> bool:
    """Knover's rule for weight decay, by its own names (docs/spec.md, Optimizer)."""
    return ".b_" not in knovers_name and "layer_norm" not in knovers_name


@pytest.mark.parametrize("name", BATCHES)
def test_weight_decay_goes_to_the_parameters_it_goes_to_in_knover(name: str) -> None:
    stage = STAGES[name](replace(MODEL, n_role=2))
    knover = knover_names(MODEL.n_layer)
    groups = adamw(stage, OptimConfig(weight_decay=0.01)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    parameters = dict(stage.named_parameters())
    assert len(decay) == len(parameters)
    for ours, parameter in parameters.items():
        assert decay[id(parameter)] == (0.01 if not_excluded(knover[released_apart(ours)[0]]) else 0.0), ours


def test_the_papers_own_heads_decay_matrices_only() -> None:
    stage = STAGES["2_gen"](MODEL, recognition_head="linear", bow_head="linear")  # type: ignore[call-arg]
    decay = {
        id(p): group["weight_decay"]
        for group in adamw(stage, OptimConfig()).param_groups
        for p in group["params"]
    }
    named = dict(stage.named_parameters())
    assert decay[id(named["bag_of_words.classifier.weight"])] == 0.01
    assert decay[id(named["recognition.classifier.weight"])] == 0.01
    assert decay[id(named["bag_of_words.bias"])] == 0.0


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_noam_is_the_specs_formula(step: int, warmup_steps: int) -> None:
    formula = math.sqrt(warmup_steps) * min(step**-0.5, step * warmup_steps**-1.5)
    config = OptimConfig(warmup_steps=warmup_steps)
    assert rate_factor(step, config, max_steps=10) == pytest.approx(formula, rel=1e-9)


def test_noam_at_the_turning_points() -> None:
    config = OptimConfig(warmup_steps=4000)
    assert rate_factor(1, config, max_steps=10) == pytest.approx(1 / 4000)
    assert rate_factor(4000, config, max_steps=10) == 1.0
    assert rate_factor(16000, config, max_steps=10) == pytest.approx(0.5)
    config = OptimConfig(warmup_steps=0)
    assert {rate_factor(step, config, max_steps=10) for step in (1, 10, 10**6)} == {1.0}


def test_linear_rises_and_falls_in_straight_lines() -> None:
    config = OptimConfig(warmup_steps=4, schedule="linear")
    factors = [rate_factor(step, config, max_steps=8) for step in range(1, 11)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    constant = OptimConfig(warmup_steps=0, schedule="linear")
    assert rate_factor(1, constant, max_steps=1) == 1.0
    for warmup_steps in (8, 9, 10):  # a run that ends in its warmup
        config = OptimConfig(warmup_steps=warmup_steps, schedule="linear")
        assert rate_factor(8, config, max_steps=8) == pytest.approx(8 / warmup_steps)
        assert rate_factor(9, config, max_steps=8) >= 0.0
