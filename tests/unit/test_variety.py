"""What talking shows of the latents: against decoding by hand, and where z says nothing or everything."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import make_corpus, make_stage

from plato2.config import DecodeConfig, UserError
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.metrics import distinct_n
from plato2.talk.decode import decode
from plato2.talk.replies import ValidationVariety
from plato2.talk.variety import Variety, _mean, variety

SMALL = {"vocab_size": 61, "max_position": 64}
SAMPLING = DecodeConfig(max_tokens=8)
K = 5
CONTEXTS = [[1, *range(3 + n, 9 + 2 * n), 2] for n in range(18)]  # more than are decoded at once
SHOWN = ("greedy_different", "greedy_distinct_2", "distinct_2_between_z", "distinct_2_within_z")


def with_equal_latents(stage: Any) -> Any:
    with torch.no_grad():
        table = stage.recognition.latent_embedding
        table.copy_(table[:, :1].expand_as(table))
    return stage


@pytest.fixture(scope="module")
def found() -> Variety:
    coarse = make_stage("1_coarse", **SMALL)
    return variety(make_stage("2_gen", **SMALL), CONTEXTS, coarse, SAMPLING)


def test_the_means_are_those_of_decoding_by_hand(found: Variety) -> None:
    fine, coarse = make_stage("2_gen", **SMALL), make_stage("1_coarse", **SMALL)

    def words(generator: Any, config: DecodeConfig, latent: int | None = None) -> list[list[Any]]:
        some = None if latent is None else [latent]
        return [
            [hypothesis.words for hypothesis in decode(generator, [context], config, latents=some)[0]]
            for context in CONTEXTS
        ]

    def distinct(candidates: list[list[Any]]) -> list[float]:
        assert {len(some) for some in candidates} == {K}
        return [distinct_n(some, 2) for some in candidates]

    greedy = words(fine, replace(SAMPLING, top_k=1))
    assert found.greedy_different.mean == pytest.approx(np.mean([len(set(some)) for some in greedy]))
    assert found.greedy_distinct_2.mean == pytest.approx(np.mean(distinct(greedy)))
    between = distinct(words(fine, SAMPLING))
    samples = [distinct(words(fine, replace(SAMPLING, n_samples=K), latent)) for latent in (0, 2, 4)]
    within = [samples[number % 3][number] for number in range(len(CONTEXTS))]
    assert found.distinct_2_between_z.mean == pytest.approx(np.mean(between))
    assert found.distinct_2_within_z.mean == pytest.approx(np.mean(within))
    assert found.distinct_2_difference.mean == pytest.approx(np.mean(np.subtract(between, within)))
    assert found.distinct_2_stage_1 is not None
    stage_1 = distinct(words(coarse, replace(SAMPLING, n_candidates=K)))
    assert found.distinct_2_stage_1.mean == pytest.approx(np.mean(stage_1))
    assert (found.n_contexts, found.n_candidates) == (len(CONTEXTS), K)
    for mean in (found.greedy_different, found.distinct_2_between_z, found.distinct_2_difference):
        assert mean.low < mean.mean < mean.high


def test_it_is_the_same_again_and_uses_no_random_number_of_the_run(found: Variety) -> None:
    fine, coarse = make_stage("2_gen", **SMALL), make_stage("1_coarse", **SMALL)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert variety(fine, CONTEXTS, coarse, SAMPLING) == found
    assert torch.equal(torch.rand(2), expected[0])
    assert np.random.rand() == expected[1]
    assert json.loads(json.dumps(found.to_dict()))["greedy_different"]["mean"] == found.greedy_different.mean
    assert variety(fine, CONTEXTS, None, SAMPLING).distinct_2_stage_1 is None


def test_latents_that_are_all_equal_make_no_difference() -> None:
    """Sampling makes candidates differ all the same, as much within a latent as between latents."""
    same = variety(with_equal_latents(make_stage("2_gen", **SMALL)), CONTEXTS, sampling=SAMPLING)
    assert same.greedy_different.mean == 1.0
    assert same.distinct_2_between_z == same.distinct_2_within_z
    assert same.distinct_2_between_z.mean > 0.5
    assert set(asdict(same.distinct_2_difference).values()) == {0.0}


def test_latents_that_differ_are_seen(found: Variety) -> None:
    same = variety(with_equal_latents(make_stage("2_gen", **SMALL)), CONTEXTS, sampling=SAMPLING)
    assert found.greedy_different.mean > 1.5
    assert found.greedy_distinct_2.mean > same.greedy_distinct_2.mean
    assert found.distinct_2_difference.mean != 0.0


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found, half = _mean(values), 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    one = _mean(np.array([0.5]))
    assert (one.mean, one.low, one.high) == (0.5, 0.5, 0.5)


def test_what_has_no_latents_or_nothing_to_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="a generator with latents and at least one context"):
        variety(make_stage("1_coarse", **SMALL), CONTEXTS)
    with pytest.raises(ValueError, match="a generator with latents and at least one context"):
        variety(make_stage("2_gen", **SMALL), [])


# ---------------------------------------------------------------------------- a stage that is being trained


def test_a_stage_in_training_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    pairs = [([f"question {n} ?", f"and {n} ?"], f"answer {n} .") for n in range(10)]
    data = DialogueDataModule(str(make_corpus(tmp_path, pairs)), GenerationBatch(), 8192)
    measure, stage = ValidationVariety(data, n_contexts=2), make_stage("2_gen").train()
    stage.backbone.blocks[0].eval()  # a part someone keeps out of training stays out
    modes = {name: module.training for name, module in stage.named_modules()}
    first, again = measure(stage), measure(stage)
    assert first == again
    assert {name: module.training for name, module in stage.named_modules()} == modes
    assert len(measure.contexts) == 2
    expected = variety(stage.eval(), measure.contexts)
    assert first == {name: getattr(expected, name).mean for name in SHOWN}
    short = ValidationVariety(data, n_contexts=2)
    with pytest.raises(UserError, match=r"latent contexts 2: no validation context of .* at most 3 tokens"):
        short(make_stage("2_gen", max_position=6))
