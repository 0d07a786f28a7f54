"""Distinct, repetition and coverage against slow loops of their definitions."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plato2.evaluate.metrics import Coverage, Distinct, SelfRepetition

DIALOGUES = st.lists(st.lists(st.lists(st.sampled_from("abcd"), max_size=6), max_size=4), max_size=5)


def distinct_of(dialogues: list[list[list[str]]], n: int = 1, vocabulary: int | None = None) -> Distinct:
    metric = Distinct(n, vocabulary)
    for dialogue in dialogues:
        metric.update(dialogue)
    return metric


def slow_distinct(dialogues: list[list[list[str]]], n: int) -> float:
    seen: list[list[str]] = []
    words = 0
    for dialogue in dialogues:
        for utterance in dialogue:
            words += len(utterance)
            for start in range(len(utterance) - n + 1):
                if utterance[start : start + n] not in seen:
                    seen.append(utterance[start : start + n])
    return len(seen) / words if words else math.nan


@settings(max_examples=60, deadline=None)
@given(DIALOGUES, st.integers(1, 3))
def test_distinct_is_that_of_a_slow_loop(dialogues: list[list[list[str]]], n: int) -> None:
    metric = distinct_of(dialogues, n)
    if dialogues:
        assert float(metric.compute()) == pytest.approx(slow_distinct(dialogues, n), nan_ok=True)
    if len(dialogues) < 2:
        assert all(map(math.isnan, metric.interval()))
        return
    left = [slow_distinct(dialogues[:i] + dialogues[i + 1 :], n) for i in range(len(dialogues))]
    half = 1.96 * math.sqrt((len(left) - 1) / len(left) * sum((x - np.mean(left)) ** 2 for x in left))
    value = slow_distinct(dialogues, n)
    bounds = [math.nan] * 2 if math.isnan(half) else [max(0.0, value - half), min(1.0, value + half)]
    assert metric.interval() == pytest.approx(bounds, abs=1e-9, nan_ok=True)


def test_distinct_divides_by_words_and_not_by_n_grams() -> None:
    assert float(distinct_of([[["i", "see", "i", "see"]]], 2).compute()) == pytest.approx(2 / 4)


def test_the_jackknife_covers_where_the_bootstrap_does_not() -> None:
    """Words of a Zipf law: the mean of distinct-1 over many corpora lies in about 95 % of the intervals."""
    generator = np.random.default_rng(0)
    p = 1 / np.arange(1, 3001)
    corpora = [
        [[list(map(str, generator.choice(3000, 8, p=p / p.sum())))] for _ in range(60)] for _ in range(120)
    ]
    metrics = [distinct_of(corpus) for corpus in corpora]
    truth = np.mean([float(metric.compute()) for metric in metrics])
    inside = [low <= truth <= high for low, high in (metric.interval() for metric in metrics)]
    assert np.mean(inside) >= 0.9
    corpus = corpora[0]
    drawn = [
        float(distinct_of([corpus[i] for i in generator.integers(0, 60, 60)]).compute()) for _ in range(50)
    ]
    assert max(drawn) < float(metrics[0].compute())


def test_expectation_adjusted_distinct_is_that_of_a_simulation() -> None:
    """Words drawn evenly from the vocabulary have as many different ones as is expected: 1, at any length."""
    generator = np.random.default_rng(1)
    for words in (50, 400, 3000):
        drawn = [
            float(distinct_of([[list(map(str, generator.integers(0, 500, words)))]], 1, 500).compute())
            for _ in range(20)
        ]
        assert np.mean(drawn) == pytest.approx(1, abs=0.02)
    n, v, c = 2, 10, 3  # a b a
    assert float(distinct_of([[["a", "b", "a"]]], 1, 10).compute()) == pytest.approx(
        n / (v * (1 - ((v - 1) / v) ** c))
    )


@settings(max_examples=60, deadline=None)
@given(DIALOGUES, st.sampled_from([None, 1, 2]))
def test_self_repetition_is_that_of_a_slow_loop(dialogues: list[list[list[str]]], n: int | None) -> None:
    metric = SelfRepetition(n)
    repeated = total = 0
    for dialogue in dialogues:
        metric.update(dialogue[::2], dialogue[1::2])
        for speaker in (dialogue[::2], dialogue[1::2]):
            for turn, words in enumerate(speaker):
                size = n or len(words)
                parts = [words[i : i + size] for i in range(len(words) - size + 1)] if words else []
                total += len(parts)
                for part in parts:
                    if n is None:
                        repeated += part in speaker[:turn]
                    else:
                        repeated += any(
                            part == before[i : i + n] for before in speaker[:turn] for i in range(len(before))
                        )
    expected = repeated / total if total else math.nan
    assert not dialogues or float(metric.compute()) == pytest.approx(expected, nan_ok=True)


def test_a_speaker_does_not_repeat_the_other() -> None:
    metric = SelfRepetition()
    metric.update([["hi"]], [["hi"], ["hi"]])
    assert float(metric.compute()) == pytest.approx(1 / 3)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (3, 5), elements=st.floats(-1, 1)), st.integers(1, 7))
def test_coverage_is_the_mean_over_all_choices(similarity: np.ndarray, k: int) -> None:
    metric = Coverage(0.5, k)
    metric.update(similarity)
    choices = list(combinations(range(5), min(k, 5)))
    shares = [(similarity[:, list(chosen)] >= 0.5).any(axis=1).mean() for chosen in choices]
    assert float(metric.compute()) == pytest.approx(np.mean(shares))


def test_coverage_of_nothing_by_nothing() -> None:
    metric = Coverage(0.5, 3)
    metric.update(np.zeros((2, 0)))
    assert float(metric.compute()) == 0.0
    metric = Coverage(0.5, 3)
    metric.update(np.zeros((0, 4)))
    assert math.isnan(float(metric.compute()))
