"""What only a GPU can show: it computes what a CPU does, in every stage, in decoding and across a resume.

PLATO2_TEST_DEVICE=cpu runs the same on a CPU, to try the tests themselves. All tests marked `gpu` are here,
and need nothing but pytest beside requirements.txt: benchmarks/device.sh runs this file.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_run
from small import Train
from units import BATCHES, MODEL, make_stage, pack

from plato2.config import DecodeConfig
from plato2.data.collate import CoherenceBatch, InformationBatch
from plato2.runs.saved import read_metrics
from plato2.talk.bot import PlatoBot

DEVICE = os.environ.get("PLATO2_TEST_DEVICE", "cuda")
STRATEGY = "strategy=gpu" if DEVICE == "cuda" else "strategy=cpu"
ROWS = "data.row_length=256"  # room for a context with four responses
NAMES = (*BATCHES, "2_eval_dual", "2_eval_pmi")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]


def stage_and_unit(name: str, **model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A stage with large random weights on the CPU, and a unit for it."""
    heads = {"2_eval_dual": CoherenceBatch(mask_prob=0.3, head="dual"), "2_eval_pmi": InformationBatch()}
    if name not in heads:
        return make_stage(name, replace(MODEL, **model)), pack(BATCHES[name]).unit
    batch = heads[name]
    return make_stage("2_eval", replace(MODEL, **model), head=batch.head), pack(batch).unit


def losses_and_gradients(stage: Any, unit: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All terms of a unit, and the gradients of the sum of those that are trained on; on the CPU."""
    device = stage.backbone.word.weight.device
    torch.manual_seed(3)  # for dropout
    terms = stage.losses({key: value.to(device) for key, value in unit.items()})
    torch.stack([value.sum() for term, value in terms.items() if term in stage.loss_terms]).sum().backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in (terms | gradients).items()}


def losses_of(run: Path) -> list[float]:
    return [value for _, metric, value in read_metrics(run / "metrics.csv") if metric == "train/loss"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_cpu(name: str) -> None:
    stage, unit = stage_and_unit(name)
    there = losses_and_gradients(copy.deepcopy(stage).to(DEVICE), unit)
    here = losses_and_gradients(stage, unit)
    assert there.keys() == here.keys()
    for key, value in here.items():
        torch.testing.assert_close(
            there[key], value, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_near(name: str) -> None:
    stage, unit = stage_and_unit(name)
    there = copy.deepcopy(stage).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = losses_and_gradients(there, unit)
    for key, value in losses_and_gradients(stage, unit).items():
        assert bool(half[key].isfinite().all()), key
        if key in stage.loss_terms:
            assert float(half[key].mean()) == pytest.approx(float(value.mean()), rel=0.1), key


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_draw_the_same_dropout(name: str) -> None:
    stage, unit = stage_and_unit(name, dropout=0.1)
    again, _ = stage_and_unit(name, dropout=0.1, checkpoint_activations=True)
    kept, recomputed = (losses_and_gradients(each.to(DEVICE), unit) for each in (stage, again))
    for key, value in kept.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-3, atol=1e-4)


def test_a_run_takes_the_steps_of_one_on_the_cpu(train_here: Train, tmp_path: Path) -> None:
    for stage in ("1_coarse", "2_gen", "2_eval", "2_eval_dual", "2_eval_pmi"):
        same = (f"stage={stage}", "init_from=scratch", "model.dropout=0.0", ROWS)
        train_here(*same, STRATEGY, "run_id=there")
        train_here(*same, "strategy=cpu", "run_id=here")
        there, here = (losses_of(tmp_path / "outputs" / f"tiny-{stage}" / name) for name in ("there", "here"))
        assert there == pytest.approx(here, rel=1e-3), stage


def test_a_run_in_two_parts_takes_the_same_steps(train_here: Train, tmp_path: Path) -> None:
    same = (STRATEGY, "optim.schedule=inverse_sqrt")  # the rates of linear follow from max_steps
    train_here(*same, "run_id=whole")
    train_here(*same, "run_id=parts", "trainer.max_steps=3")
    train_here(*same, "run_id=parts")
    whole, parts = (losses_of(tmp_path / "outputs" / "tiny-1_coarse" / name) for name in ("whole", "parts"))
    assert len(whole) == 6
    assert parts == pytest.approx(whole, rel=1e-3)


def test_the_curriculum_in_the_precision_of_the_device(train_here: Train, tmp_path: Path) -> None:
    shown = ("sample_replies=1", "selection=10", "human_rank=2", "latent_contexts=2", "run_id=r", ROWS)
    for stage in ("1_coarse", "2_gen", "2_eval", "2_eval_dual", "2_eval_pmi"):
        train_here(STRATEGY, "strategy.precision=auto", f"stage={stage}", *shown)
        rows = read_metrics(tmp_path / "outputs" / f"tiny-{stage}" / "r" / "metrics.csv")
        values = {metric: value for _, metric, value in rows}
        assert all(math.isfinite(value) for value in values.values()), stage
        assert {"perf/mfu", "val/loss"} <= values.keys()
        assert ("val/human_rank" in values) == stage.startswith("2_eval")
    outputs = tmp_path / "outputs"
    bot = PlatoBot.load(outputs / "tiny-2_gen" / "r", outputs / "tiny-2_eval" / "r", DEVICE)
    assert bot.reply(["bab den"]).candidates


def test_replies_are_those_of_the_cpu(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name) for name in ("2_gen", "2_eval")]
    settings = DecodeConfig(max_tokens=10)
    contexts = [["hello !", "hi , how was your day ?"], ["what is your name ?"], ["i like tea ."]]
    here, there = (PlatoBot.load(*runs, device, settings).reply_batch(contexts) for device in ("cpu", DEVICE))
    for mine, other in zip(here, there, strict=True):
        by_latent = {candidate.latent: candidate for candidate in other.candidates}
        for candidate in mine.candidates:
            assert by_latent[candidate.latent].token_ids == candidate.token_ids
            assert by_latent[candidate.latent].log_prob == pytest.approx(candidate.log_prob, abs=1e-3)
            assert by_latent[candidate.latent].coherence == pytest.approx(candidate.coherence, abs=1e-3)


def test_many_replies_in_bfloat16(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name) for name in ("2_gen", "2_eval")]
    bot = PlatoBot.load(*runs, DEVICE, DecodeConfig(max_tokens=10), precision="bfloat16")
    for reply in bot.reply_batch([[f"number {n}", "and then ?"] for n in range(40)]):
        assert len(reply.candidates) == 5
        assert all(math.isfinite(c.log_prob) and 0 <= (c.coherence or 0) <= 1 for c in reply.candidates)
