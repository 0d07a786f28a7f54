"""L(N, D) = E + A / N^alpha + B / D^beta: the fit, its intervals, and what is simpler.

N are parameters, D tokens read, L nats per token of a response. The form, the Huber loss on ln L and its
width are approach 3 of Hoffmann et al. (2022, arXiv:2203.15556). Besiroglu et al. (2024, arXiv:2404.10102)
repeated it and found that its search had stopped early; here each runs until its loss falls no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy.optimize import least_squares

from plato2.metrics import bootstrap

HUBER = 1e-3
"""Differences of ln L that are larger count by their size, smaller ones by their square."""
SHARES, EXPONENTS = (0.1, 0.4, 0.7), (0.1, 0.4, 1.0)
"""Where searches begin: E over the lowest loss; alpha and beta."""
LEAST, MOST = 0.01, 3.0
"""Bounds of alpha and beta. Near 0 a term is a constant, and cannot be told from E."""
TINY = -20.0
"""The ln of a term that is as good as nothing."""
RESAMPLES = 500
TRIALS, TRIAL_RESAMPLES = 100, 100
OFF = 0.003
"""The standard deviation of ln L between runs in these trials: about 0.013 nats."""


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    e: float
    """What no size and no number of tokens can go below, by this form."""
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """The loss of N parameters after D tokens, of shapes that fit each other; both may be infinite."""
        return np.asarray(self.e + self.a * np.power(n, -self.alpha) + self.b * np.power(d, -self.beta))


def fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, near: Law | None = None) -> Law:
    """The law of the least loss that several searches find.

    A search moves ln of the three terms at the means of ln N and ln D, not ln E, ln A and ln B: those hang on
    the exponents so closely that it would creep.

    Args:
        n: parameters of each point, (P,).
        d: tokens, (P,).
        loss: nats, (P,).
        near: where the only search begins; by default there are 27, which begin everywhere.
    """
    x, y, log_loss = np.log(n), np.log(d), np.log(loss)  # (P,)
    mean_x, mean_y = x.mean(), y.mean()

    def terms(p: np.ndarray) -> np.ndarray:
        """E, A / N^alpha and B / D^beta of each point: (3, P)."""
        return np.exp(np.stack([p[0] + 0 * x, p[1] - p[2] * (x - mean_x), p[3] - p[4] * (y - mean_y)]))

    def difference(p: np.ndarray) -> np.ndarray:
        return np.log(terms(p).sum(axis=0)) - log_loss

    def jacobian(p: np.ndarray) -> np.ndarray:
        """By ln E, ln of the second term, alpha, ln of the third, beta: (P, 5)."""
        of_e, of_n, of_d = terms(p) / terms(p).sum(axis=0)
        return np.stack([of_e, of_n, -of_n * (x - mean_x), of_d, -of_d * (y - mean_y)], axis=1)

    starts = []
    for share, alpha, beta in product(SHARES, EXPONENTS, EXPONENTS):
        rest = np.log((1 - share) * loss.mean() / 2)
        starts.append([np.log(share * loss.min()), rest, alpha, rest, beta])
    if near is not None:
        of_n, of_d = near.a * np.exp(-near.alpha * mean_x), near.b * np.exp(-near.beta * mean_y)
        starts = [[np.log(near.e), np.log(of_n), near.alpha, np.log(of_d), near.beta]]
    lowest, highest = np.log(loss.min()), np.log(loss.max())
    bounds = np.array([[TINY, lowest], [TINY, highest], [LEAST, MOST], [TINY, highest], [LEAST, MOST]]).T
    found = [
        least_squares(difference, np.clip(start, *bounds), jacobian, bounds, loss="huber", f_scale=HUBER)
        for start in starts
    ]
    e, a, alpha, b, beta = min(found, key=lambda one: one.cost).x.tolist()
    a, b = np.exp(a + alpha * mean_x), np.exp(b + beta * mean_y)
    return Law(float(np.exp(e)), float(a), alpha, float(b), beta)


def intervals(
    n: np.ndarray,
    d: np.ndarray,
    loss: np.ndarray,
    law: Law,
    figures: Mapping[str, Callable[[Law], float]],
    resamples: int = RESAMPLES,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of figures of a fit, by drawing whole curves of residuals.

    The points of a run are far from independent: one that is too high at a step is so at the next. So runs
    are drawn, not points: each run gets, in place of its losses, the fitted ones times what the losses of a
    run that was drawn with replacement are over its fitted ones. With k runs there are k^k draws at most.

    Args:
        n: parameters, (runs, steps).
        d: tokens, (runs, steps).
        loss: nats, (runs, steps).
        law: fitted to them; each search begins there.
        figures: what to compute of a fit, by name.
        resamples: how often runs are drawn.
    """
    fitted = law(n, d)
    ratio = loss / fitted

    @cache
    def again(draw: tuple[int, ...]) -> Law:
        return fit(n.ravel(), d.ravel(), (fitted * ratio[list(draw)]).ravel(), near=law)

    def interval(figure: Callable[[Law], float]) -> tuple[float, float]:
        return bootstrap(lambda draw: figure(again(tuple(draw.tolist()))), len(loss), resamples)

    return {name: interval(figure) for name, figure in figures.items()}


def coverage(
    n: np.ndarray, d: np.ndarray, law: Law, figures: Mapping[str, Callable[[Law], float]]
) -> dict[str, float]:
    """How often the intervals hold the truth where it is known: it should be 0.95.

    In each trial the truth is the law, and every run is off by a factor of its own, the same at all steps.

    Args:
        n: parameters, (runs, steps).
        d: tokens, (runs, steps).
        law: the truth.
        figures: what to compute of a fit, by name.

    Returns:
        The share of trials whose interval holds the figure of the law itself.
    """
    random, held = np.random.default_rng(0), dict.fromkeys(figures, 0)
    for _ in range(TRIALS):
        loss = law(n, d) * np.exp(OFF * random.standard_normal((len(n), 1)))
        found = fit(n.ravel(), d.ravel(), loss.ravel(), near=law)
        for name, (low, high) in intervals(n, d, loss, found, figures, TRIAL_RESAMPLES).items():
            held[name] += low <= figures[name](law) <= high
    return {name: times / TRIALS for name, times in held.items()}


def power_law(x: np.ndarray, loss: np.ndarray, at: float) -> float:
    """What a power law in one variable alone, a straight line of ln L over ln x, says at another place.

    Args:
        x: parameters or tokens, (P,).
        loss: nats, (P,).
        at: parameters or tokens.
    """
    slope, level = np.polyfit(np.log(x), np.log(loss), 1)
    return float(np.exp(level + slope * np.log(at)))
