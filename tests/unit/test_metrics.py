"""How much the latents say and how varied texts are, against slow loops and where the answer is known."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from units import MODEL, make_stage

from plato2.metrics import choice, distinct_n, wilson
from plato2.stages.metrics import IN_USE, Calibration, LatentUsage, TermMeans, fit_logistic


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


def test_a_single_latent_has_a_share() -> None:
    stage = make_stage("2_gen", replace(MODEL, n_latent=1))
    stage._trainer = SimpleNamespace(sanity_checking=True, global_step=0)
    stage.validation_means.update({term: torch.tensor([2.0]) for term in stage.validation_means.terms})
    logged: dict[str, Any] = {}
    stage.log_metrics = logged.update
    stage.latent_usage.update(torch.ones(3, 1))
    stage.on_validation_epoch_end()
    assert logged["val/z_usage_00"] == 1.0
    assert logged["val/z_mutual_information"] == 0.0


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


# --------------------------------------------------------------------------------------------- means of terms


def test_term_means_leave_out_what_had_no_value() -> None:
    means = TermMeans(["rce", "mlm"])
    assert means.compute() == {}
    means.update({"rce": torch.tensor([1.0, 2.0]), "mlm": torch.zeros(0)})
    means.update({"rce": torch.tensor([6.0])})
    assert {term: float(mean) for term, mean in means.compute().items()} == {"rce": 3.0}
    means.update({"mlm": torch.tensor([math.nan])})
    assert math.isnan(float(means.compute()["mlm"]))  # a loss that is not a number is not hidden


# -------------------------------------------------------------------------------------- scores, probabilities


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 3.0), st.floats(-2.0, 2.0), st.integers(0, 99))
def test_a_logistic_fit_finds_what_made_the_labels(a: float, b: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(20_000, generator=generator, dtype=torch.double) * 2
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(a * scores + b)).double()
    fitted = fit_logistic(scores, labels)
    assert fitted.tolist() == pytest.approx([a, b], abs=0.15)
    p = torch.sigmoid(fitted[0] * scores + fitted[1])  # the slope of the likelihood vanishes
    assert float(((p - labels) * scores).sum()) == pytest.approx(0, abs=0.05)
    assert float((p - labels).sum()) == pytest.approx(0, abs=0.05)


def test_a_logistic_fit_of_separable_or_equal_scores_is_finite() -> None:
    labels = torch.tensor([1.0, 0.0] * 8).double()
    separable = fit_logistic(labels * 2 - 1, labels)
    assert torch.isfinite(separable).all()
    assert separable[0] > 1
    assert fit_logistic(torch.full((16,), 3.0).double(), labels).isfinite().all()


def test_calibration_measures_on_scores_that_it_was_not_fitted_to() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([1.0, 0.0]).repeat(500)
    told = Calibration()
    scores = labels * 2 + torch.randn(1000, generator=generator) + 7
    told.update(scores[:400], labels[:400])
    told.update(scores[400:], labels[400:])
    calibration, accuracy, rce = told.compute()
    assert float(accuracy) == pytest.approx(0.841, abs=0.03)  # two bells 2 apart, split between them
    assert float(-calibration[1] / calibration[0]) == pytest.approx(8, abs=0.15)
    assert 0.3 < float(rce) < 0.45
    noise = Calibration()  # as many parameters as could learn nothing by heart: noise stays near chance
    noise.update(torch.randn(1000, generator=generator), labels)
    assert float(noise.compute()[1]) == pytest.approx(0.5, abs=0.06)
    assert float(noise.compute()[2]) == pytest.approx(math.log(2), abs=0.01)
    assert Calibration().compute()[0].tolist() == [1.0, 0.0]


# ---------------------------------------------------------------------------------------- choosing a response


@settings(max_examples=50, deadline=None)
@given(arrays(np.int64, (3, 4, 4), elements=st.integers(-2, 2)))
def test_choice_is_that_of_a_slow_loop_also_with_equal_scores(scores: np.ndarray) -> None:
    pairs, first, reciprocal = [], [], []
    for group in scores:
        for i, row in enumerate(group):
            above = sum(row[j] > row[i] for j in range(4) if j != i)
            equal = sum(row[j] == row[i] for j in range(4) if j != i)
            pairs += [
                1.0 if row[j] < row[i] else 0.5 if row[j] == row[i] else 0.0 for j in range(4) if j != i
            ]
            first.append(0.0 if above else 1 / (1 + equal))
            reciprocal.append(1 / (1 + above + equal / 2))
    found = choice(scores.astype(float))
    assert found["pair_acc"] == pytest.approx(np.mean(pairs))
    assert found["p1"] == pytest.approx(np.mean(first))
    assert found["mrr"] == pytest.approx(np.mean(reciprocal))


def test_choice_of_the_perfect_and_of_chance() -> None:
    assert choice(np.tile(np.eye(10), (5, 1, 1))) == {"pair_acc": 1.0, "p1": 1.0, "mrr": 1.0}
    noise = np.random.default_rng(0).normal(size=(4000, 10, 10))
    found = choice(noise)
    assert found["pair_acc"] == pytest.approx(0.5, abs=0.01)
    assert found["p1"] == pytest.approx(0.1, abs=0.01)
    assert found["mrr"] == pytest.approx(sum(1 / k for k in range(1, 11)) / 10, abs=0.01)


def test_the_wilson_interval_is_the_books() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson(1 / 21, 400)
    assert 0 < low < 1 / 21 < high
