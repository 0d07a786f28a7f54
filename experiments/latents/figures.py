"""Figures of what was scored and said, with 95 % intervals. Only arithmetic: no model is asked here.

K is the number of latents; stage 1 counts as K = 1 whose posterior is sure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

from plato2.evaluate.latents import entropy, entropy_of_mean
from plato2.evaluate.metrics import Coverage
from plato2.evaluate.results import Figure
from plato2.metrics import bootstrap
from plato2.stages.metrics import IN_USE

DIGITS = 4
Interval = list[float | None]
"""A value, and the low and the high end of its 95 % interval."""


def rounded(value: float, low: float | None, high: float | None) -> Interval:
    """A figure for results.json."""
    return [None if x is None or not math.isfinite(x) else round(x, DIGITS) for x in (value, low, high)]


# ------------------------------------------------------------------------------------------ what z knows


def information(p: np.ndarray, nll: np.ndarray, case: np.ndarray) -> dict[str, float | Interval]:
    """How much z tells of n responses and their contexts.

    Args:
        p: (n, K) p(z|c,r).
        nll: (n, K) -log p(r|c,z), in nats.
        case: (n,) the number of the context of each.

    Returns:
        Mutual information H(mean p) - mean H(p) and its bound log K, in nats; latents in effect and with a
        share of at least `IN_USE`; how often the z that recognition names is the one under which the response
        is most probable, and how often two unrelated z with these frequencies are the same; and, where
        contexts have several responses, the mutual information within a context, beside that of as many
        responses drawn from all of them.
    """
    n, k = p.shape
    entropies = np.array([entropy(row) for row in p])

    def as_list(figure: Figure) -> Interval:
        assert figure.value is not None
        return rounded(figure.value, figure.low, figure.high)

    named, likeliest = (np.eye(k)[place] for place in (p.argmax(axis=1), nll.argmin(axis=1)))  # (n, K)
    same = (named * likeliest).sum(axis=1)
    found: dict[str, float | Interval] = {
        "bound": round(math.log(k), DIGITS),
        "mutual_information": as_list(entropy_of_mean(p, entropies)),
        "latents_in_effect": as_list(entropy_of_mean(p, in_effect=True)),
        "in_use": int((p.mean(axis=0) >= IN_USE).sum()),
        "named": mean_of(same),
        "named_by_chance": round(float(named.mean(axis=0) @ likeliest.mean(axis=0)), DIGITS),
    }
    if len(np.unique(case)) < n:
        found["within"] = mean_of(within(p, case))
        shuffled = np.random.default_rng(0).permutation(n)
        found["within_shuffled"] = mean_of(within(p[shuffled], case))
    return found


def within(p: np.ndarray, case: np.ndarray) -> np.ndarray:
    """H(mean p) - mean H(p) over the responses of each context: (n, K), (n,) -> (contexts,)."""
    groups = [p[case == one] for one in np.unique(case)]
    return np.array([entropy(group.mean(axis=0)) - np.mean([*map(entropy, group)]) for group in groups])


# ------------------------------------------------------------------------------------------ what z is worth


def ways(p: np.ndarray, nll: np.ndarray, case: np.ndarray) -> dict[str, np.ndarray]:
    """-log p of each response by where z comes from, in nats, (n,) each.

    Args:
        p: as `information`.
        nll: as `information`.
        case: as `information`.

    Returns:
        `mixture`: -log mean_z p(r|c,z), which is the model's p(r|c). `uniform`: the mean over z of -log p.
        `other`: z from the posterior of a response to another context; the mean over all of these. `right`: z
        from its own posterior, which has read the response. `paid`: the same and the nats that name this z
        to one who expects a uniform one, KL(p || 1/K); never below `mixture` (Jensen).
    """
    log_k = math.log(nll.shape[1])
    own = np.zeros((int(case.max()) + 1, p.shape[1]))
    np.add.at(own, case, p)
    others = len(p) - np.bincount(case)[case]  # (n,)
    of_others = (p.sum(axis=0) - own[case]) / others[:, None]
    right = (p * nll).sum(axis=1)
    return {
        "mixture": log_k - logsumexp(-nll, axis=1),
        "uniform": nll.mean(axis=1),
        "other": (of_others * nll).sum(axis=1),
        "right": right,
        "paid": right + log_k - np.array([entropy(row) for row in p]),
    }


def per_token(
    nats: np.ndarray, n_tokens: np.ndarray, case: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """The mean over tokens of summed nats, (n,) each; contexts are drawn again for the interval."""
    sums = np.array([np.bincount(case, weights=x) for x in (nats, n_tokens)]).T  # (contexts, 2)
    sums = sums[np.bincount(case) > 0]

    def ratio(rows: np.ndarray) -> float:
        total, tokens = rows.sum(axis=0)
        return float(total / tokens)

    low, high = bootstrap(lambda draw: ratio(sums[draw]), len(sums), seed=seed)
    return ratio(sums), low, high


def perplexity(nats: np.ndarray, n_tokens: np.ndarray, case: np.ndarray, seed: int) -> Interval:
    """exp of `per_token`."""
    value, low, high = map(math.exp, per_token(nats, n_tokens, case, seed))
    return rounded(value, low, high)


# ------------------------------------------------------------------------------------------ what is said


def mean_of(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean over contexts, (n,)."""
    return rounded(
        float(values.mean()), *bootstrap(lambda draw: float(values[draw].mean()), len(values), seed=seed)
    )


def against(similarity: Sequence[np.ndarray], near: float) -> dict[str, np.ndarray]:
    """Candidates against the references of their contexts.

    Args:
        similarity: of each context (references, candidates).
        near: from which similarity on a candidate is near a reference; nan = not asked.

    Returns:
        `one`: of a candidate drawn at random, the similarity to the nearest reference; `best`: of the best
        candidate; `coverage`: the share of references that some candidate is near. (contexts,) each.
    """
    found = {
        "one": np.array([one.max(axis=0).mean() for one in similarity]),
        "best": np.array([one.max() for one in similarity]),
    }
    if not math.isnan(near):
        found["coverage"] = np.array([_covered(one, near) for one in similarity])
    return found


def _covered(similarity: np.ndarray, near: float) -> float:
    metric = Coverage(near, similarity.shape[1])
    metric.update(similarity)
    return float(metric.compute())


def people_are_near(similarity: Sequence[np.ndarray]) -> float:
    """The median over references of the similarity to the nearest other reference of the same context.

    Args:
        similarity: of each context (references, references).

    Returns:
        nan where no context has several references.
    """
    nearest = [
        np.where(np.eye(len(one), dtype=bool), -np.inf, one).max(axis=0) for one in similarity if len(one) > 1
    ]
    return float(np.median(np.concatenate(nearest))) if nearest else math.nan
