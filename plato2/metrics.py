"""What evaluation measures of scores and texts: choosing a response, intervals, variety."""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np


def choice(scores: np.ndarray) -> dict[str, float]:
    """How well scores tell a context's own response from the others of its group.

    Args:
        scores: (G, k, k); [g, i, j] = of context i and response j of group g, i = j is the true pair.

    Returns:
        `pair_acc`: share of (true, other) pairs in which the true one scores higher; `p1`: how often it is
        the first of the k; `mrr`: the mean of 1 / its rank. Equal scores share what they could get. Chance
        is 0.5, 1/k and (1 + 1/2 + ... + 1/k) / k.
    """
    k = scores.shape[-1]
    true = np.diagonal(scores, axis1=1, axis2=2)[:, :, None]  # (G, k, 1)
    above = (scores > true).sum(axis=-1)  # (G, k)
    equal = (scores == true).sum(axis=-1) - 1
    return {
        "pair_acc": float(1.0 - (above + equal / 2).mean() / (k - 1)),
        "p1": float(((above == 0) / (1 + equal)).mean()),
        "mrr": float((1.0 / (1 + above + equal / 2)).mean()),
    }


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n independent cases (Wilson, 1927)."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def distinct_n(candidates: Sequence[str | Sequence[Hashable]], n: int) -> float:
    """Different n-grams of all candidates over all their n-grams (Li et al., 2016).

    It falls with more or longer candidates, so compare only sets of the same size.

    Args:
        candidates: texts, which are cut at blanks, or lists of tokens.
        n: tokens of an n-gram.

    Returns:
        1 = no n-gram occurs twice; 0 where there is no n-gram at all: silence is not variety.
    """
    n_grams: list[tuple[Hashable, ...]] = []
    for candidate in candidates:
        tokens = candidate.split() if isinstance(candidate, str) else candidate
        n_grams += (tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    return len(set(n_grams)) / len(n_grams) if n_grams else 0.0


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of n cases that are drawn again with replacement.

    The cases are what was sampled: contexts, start utterances, dialogues; never rows that share one of these.

    Args:
        statistic: of the cases with these numbers, (n,) from 0; nan where it is not defined.
        n: cases.
        resamples: how often n cases are drawn.
        seed: the same seed draws the same cases.

    Returns:
        Low and high; nan for no case.
    """
    if n == 0:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    low, high = np.nanquantile([statistic(draw) for draw in draws], (0.025, 0.975))
    return float(low), float(high)


def bootstrap_means(
    values: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`bootstrap` of the means of many columns at once; every column is drawn with the same cases.

    Args:
        values: (n, m), a case per row.
        resamples: how often n cases are drawn.
        seed: the same seed draws the same cases.

    Returns:
        Low and high, (m,) each; nan for no case.
    """
    n, m = values.shape
    if n == 0:
        return np.full(m, math.nan), np.full(m, math.nan)
    random = np.random.default_rng(seed)
    means = np.stack([values[random.integers(0, n, n)].mean(axis=0) for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high


def jackknife(whole: float, left: np.ndarray) -> tuple[float, float, float]:
    """A statistic without its bias of order 1/n, and its 95 % interval (Quenouille, 1956; Tukey, 1958).

    For statistics that are too low on few cases, such as entropies: a bootstrap, which draws cases twice,
    lowers them once more, and its interval lies below the truth.

    Args:
        whole: the statistic of all n cases.
        left: (n,), the statistic without each case, n > 1.

    Returns:
        Value, low and high.
    """
    n = len(left)
    value = n * whole - (n - 1) * float(left.mean())
    half = 1.96 * math.sqrt((n - 1) * float(left.var()))
    return value, value - half, value + half
