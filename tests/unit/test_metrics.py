"""How much the latents say and how varied texts are, against slow loops and where the answer is known."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from units import make_stage

from plato2.metrics import IN_USE, LatentUsage, distinct_n


def usage_of(*units: Tensor) -> LatentUsage:
    usage = LatentUsage(units[0].shape[1])
    for unit in units:
        usage.update(unit)
    return usage


def slow_entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


# ----------------------------------------------------------------------------------------- mutual information


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (7, 5), elements=st.floats(-30, 30, width=32)))
def test_usage_is_that_of_a_slow_loop(logits: np.ndarray) -> None:
    posterior = torch.from_numpy(logits).double().softmax(dim=-1)
    rows = posterior.tolist()
    mean = [sum(row[z] for row in rows) / len(rows) for z in range(5)]
    found = usage_of(posterior.float()[:3], posterior.float()[3:]).compute()
    assert found.shares.tolist() == pytest.approx(mean, abs=1e-6)
    assert float(found.effective) == pytest.approx(math.exp(slow_entropy(mean)), rel=1e-5)
    expected = slow_entropy(mean) - sum(map(slow_entropy, rows)) / len(rows)
    assert float(found.mutual_information) == pytest.approx(expected, abs=1e-5)
    assert 0 <= float(found.mutual_information) <= math.log(5) + 1e-6


def test_uniform_posteriors_use_all_latents_and_say_nothing() -> None:
    found = usage_of(torch.full((1000, 20), 1 / 20)).compute()
    assert float(found.effective) == pytest.approx(20, rel=1e-5)
    assert float(found.in_use) == 20
    assert float(found.mutual_information) == pytest.approx(0, abs=1e-5)


def test_sure_posteriors_spread_over_all_latents_say_log_k() -> None:
    found = usage_of(torch.eye(20).repeat(3, 1)).compute()
    assert found.shares.tolist() == pytest.approx([1 / 20] * 20)
    assert float(found.mutual_information) == pytest.approx(math.log(20), rel=1e-6)


def test_one_latent_for_all_says_nothing() -> None:
    found = usage_of(torch.eye(20)[[4] * 9]).compute()
    assert (float(found.effective), float(found.in_use)) == (1.0, 1.0)
    assert float(found.mutual_information) == 0.0


def test_a_latent_is_in_use_from_two_percent_on() -> None:
    assert IN_USE == 0.02
    found = usage_of(torch.eye(4)[[0] * 70 + [1] * 27 + [2] * 2 + [3] * 1]).compute()
    assert found.shares.tolist() == pytest.approx([0.7, 0.27, 0.02, 0.01])
    assert float(found.in_use) == 3


def test_a_validation_without_samples_has_no_usage() -> None:
    empty = usage_of(torch.zeros(0, 5)).compute()
    assert empty.shares.tolist() == [0.0] * 5
    assert (float(empty.effective), float(empty.in_use), float(empty.mutual_information)) == (1.0, 0.0, 0.0)


def test_ranks_are_taken_together() -> None:
    """As torchmetrics gathers and reduces; the ranks have different numbers of samples, one of them none."""
    posterior = torch.randn(17, 6, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    ranks = [usage_of(posterior[:12]), usage_of(posterior[12:]), usage_of(posterior[:0])]
    states = [{name: getattr(rank, name).clone() for name in rank._defaults} for rank in ranks]
    names = iter(states[0])

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        name = next(names)
        assert torch.equal(state, states[0][name])
        return [rank[name] for rank in states]

    ranks[0].dist_sync_fn, ranks[0].distributed_available_fn = gather, lambda: True
    for together, alone in zip(ranks[0].compute(), usage_of(posterior).compute(), strict=True):
        torch.testing.assert_close(together, alone)


UNIFORM, SURE = torch.full((100, 5), 1 / 5), torch.eye(5).repeat(20, 1)
ONE_FOR_MOST = torch.eye(5)[[0] * 95 + [1, 2, 3, 4, 1]]


@pytest.mark.parametrize(("posterior", "warned"), [(UNIFORM, True), (ONE_FOR_MOST, True), (SURE, False)])
def test_the_stage_logs_the_usage_and_warns_of_a_z_that_says_nothing(posterior: Tensor, warned: bool) -> None:
    stage = make_stage("2_gen")
    stage._trainer = SimpleNamespace(sanity_checking=False, global_step=7)
    logged: dict[str, Any] = {}
    stage.log_metrics = logged.update
    stage.latent_usage.update(posterior)
    stage.validation_means.update({term: torch.tensor([2.0]) for term in stage.validation_means.terms})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.on_validation_epoch_end()
    told = [str(w.message) for w in caught if "step 7: z says next to nothing" in str(w.message)]
    assert bool(told) == warned
    usage = usage_of(posterior).compute()
    assert logged["val/z_mutual_information"] == usage.mutual_information
    assert (logged["val/z_effective"], logged["val/z_in_use"]) == (usage.effective, usage.in_use)
    assert logged["val/z_usage_04"] == usage.shares[4]
    assert logged["val/loss"] == 4.0  # nll + bow; that of any latent is only shown
    assert float(logged["val/ppl"]) == float(logged["val/ppl_uniform"]) == pytest.approx(math.exp(2))
    assert not stage.latent_usage.mass.any()


# ------------------------------------------------------------------------------------------------- distinct-n


def slow_distinct(candidates: list[list[int]], n: int) -> float:
    seen: list[list[int]] = []
    total = 0
    for tokens in candidates:
        for start in range(len(tokens)):
            gram = tokens[start : start + n]
            if len(gram) == n:
                total += 1
                if gram not in seen:
                    seen.append(gram)
    return len(seen) / total if total else 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=6), st.integers(1, 3))
def test_distinct_n_is_that_of_a_slow_loop(candidates: list[list[int]], n: int) -> None:
    assert distinct_n(candidates, n) == slow_distinct(candidates, n)


def test_distinct_n_of_texts_and_of_nothing() -> None:
    assert distinct_n(["i see a cat", "i see a dog"], 2) == 4 / 6
    assert distinct_n(["i see a cat"], 2) == 1.0
    assert distinct_n(["the same thing"] * 20, 2) == 2 / 40
    assert distinct_n(["aa", "aa"], 2) == 0.0  # words, not letters: there is no bigram
    assert distinct_n([], 2) == distinct_n([[], [7]], 2) == 0.0
