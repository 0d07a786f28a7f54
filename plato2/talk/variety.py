"""What talking shows of the latents: how much the candidates of a context differ, and whether z makes it so.

Sampling makes variety too. So the candidates of the K latents are held against K samples of one latent, and
of stage 1. All draw with the same random numbers, which are those of (seed, context, number of the
candidate): what z says is the whole difference, and latents that say nothing give none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from plato2.config import DecodeConfig
from plato2.metrics import distinct_n
from plato2.model.networks import Generator
from plato2.talk.bot import CONTEXTS_AT_ONCE
from plato2.talk.decode import decode

LATENTS_ALONE = 3
"""How many latents, spread over all K, give samples of their own: the contexts take turns with them."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean over contexts."""

    mean: float
    low: float
    """The 95 % bootstrap interval over contexts, from `low` to `high`."""
    high: float


@dataclass(frozen=True)
class Variety:
    """Means over contexts; distinct-2 is that of the token ids of one context's candidates."""

    n_contexts: int
    n_candidates: int
    """K, in each set of candidates."""
    greedy_different: Mean
    """How many of the K latents' greedy candidates differ: 1 = z changes nothing, K = each says its own."""
    greedy_distinct_2: Mean
    distinct_2_between_z: Mean
    """Of one sample of each latent."""
    distinct_2_within_z: Mean
    """Of K samples of one latent; the contexts take turns with a few latents."""
    distinct_2_difference: Mean
    """Between less within, paired by context: the part of the variety that is due to z."""
    distinct_2_stage_1: Mean | None
    """Of K samples of a stage-1 model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def variety(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    coarse: Generator | None = None,
    sampling: DecodeConfig | None = None,
) -> Variety:
    """Decodes each context greedily and by sampling; the same numbers at every call.

    Args:
        generator: a network or stage with latents, in evaluation mode.
        contexts: lists of ids, [CLS] (turn [SEP])*.
        coarse: a stage-1 network or stage to compare with.
        sampling: as for talking, top-k 10 by default; how many samples is given here.

    Raises:
        ValueError: no contexts, or a generator without latents.
        UserError: as `decode`.
    """
    found = variety_by_context(generator, contexts, coarse, sampling)
    k = generator.model_config.n_latent
    return Variety(len(contexts), k, **variety_means(found))  # type: ignore[arg-type]


def variety_by_context(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    coarse: Generator | None = None,
    sampling: DecodeConfig | None = None,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """What the means of `variety` are of, (n,) each; stage 1's only where there is one.

    Args:
        generator: as `variety`.
        contexts: as `variety`.
        coarse: as `variety`.
        sampling: as `variety`.
        first: the number of the first context, where they are decoded part by part.

    Raises:
        ValueError: as `variety`.
    """
    if generator.recognition is None or not contexts:
        raise ValueError("variety needs a generator with latents and at least one context")
    k = generator.model_config.n_latent
    sampling = replace(sampling or DecodeConfig(), n_samples=1, n_candidates=k)
    greedy = _candidates(generator, contexts, replace(sampling, strategy="top_k", top_k=1))
    between = _distinct_2(_candidates(generator, contexts, sampling))
    alone = sorted({(2 * number + 1) * k // (2 * LATENTS_ALONE) for number in range(LATENTS_ALONE)})
    k_samples = replace(sampling, n_samples=k)
    within = np.empty(len(contexts))
    for turn, z in enumerate(alone):
        every = slice((turn - first) % len(alone), None, len(alone))
        within[every] = _distinct_2(_candidates(generator, contexts[every], k_samples, z))
    found = {
        "greedy_different": np.array([len(set(candidates)) for candidates in greedy]),
        "greedy_distinct_2": _distinct_2(greedy),
        "distinct_2_between_z": between,
        "distinct_2_within_z": within,
        "distinct_2_difference": between - within,
    }
    if coarse is not None:
        found["distinct_2_stage_1"] = _distinct_2(_candidates(coarse, contexts, sampling))
    return found


def variety_means(found: Mapping[str, np.ndarray]) -> dict[str, Mean | None]:
    """The means of what `variety_by_context` found, by their names in `Variety`."""
    return {"distinct_2_stage_1": None} | {name: _mean(values) for name, values in found.items()}


def _candidates(
    generator: Generator, contexts: Sequence[Sequence[int]], config: DecodeConfig, latent: int | None = None
) -> list[list[tuple[int, ...]]]:
    """The words of each context's candidates: of all latents, or of one."""
    latents = None if latent is None else [latent]
    found: list[list[tuple[int, ...]]] = []
    for start in range(0, len(contexts), CONTEXTS_AT_ONCE):
        part = decode(generator, contexts[start : start + CONTEXTS_AT_ONCE], config, latents=latents)
        found += [[hypothesis.words for hypothesis in hypotheses] for hypotheses in part]
    return found


def _distinct_2(found: Sequence[Sequence[tuple[int, ...]]]) -> np.ndarray:
    return np.array([distinct_n(candidates, 2) for candidates in found])


def _mean(values: np.ndarray) -> Mean:
    """Of one value per context; the contexts that are drawn again are the same at every call."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return Mean(float(values.mean()), float(low), float(high))
