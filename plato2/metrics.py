"""What is measured beside losses: how much the latents say, how varied a set of texts is."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

IN_USE = 0.02
"""A latent with at least this share of the posteriors is in use; of 20 used alike each has 0.05."""


class Usage(NamedTuple):
    """What the posteriors p(z|c,r) of a validation say about the latents."""

    shares: Tensor
    """(K,) the mean posterior: the share of each latent, sums to 1."""
    effective: Tensor
    """() exp of the mean posterior's entropy: 1 = always the same latent, K = all alike."""
    in_use: Tensor
    """() how many latents have a share of at least `IN_USE`."""
    mutual_information: Tensor
    """() I(z; c,r) = H(mean posterior) - mean H(posterior), in nats: what z tells of context and response."""


class LatentUsage(Metric):
    """How the latents are used over a validation, on all ranks together.

    The entropy of the mean posterior alone misleads: it is as high as can be, log K, where every posterior is
    uniform and z says nothing. The mutual information is 0 there; it is log K where each posterior is sure of
    its latent and all latents are used alike.
    """

    mass: Tensor
    entropy: Tensor
    samples: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.add_state("mass", torch.zeros(n_latent), dist_reduce_fx="sum")
        self.add_state("entropy", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, posterior: Tensor) -> None:
        """Adds the posteriors (N, K) of a unit, in which there may be none."""
        self.mass += posterior.sum(dim=0)
        self.entropy += torch.special.entr(posterior).sum()  # -p log p, 0 at 0
        self.samples += len(posterior)

    def compute(self) -> Usage:
        """The usage so far; all zeros, and one effective latent, where there was no sample."""
        samples = self.samples.clamp(min=1)
        shares = self.mass / samples
        entropy = torch.special.entr(shares).sum()  # H(mean posterior)
        information = (entropy - self.entropy / samples).clamp(min=0)  # below 0 by rounding alone
        return Usage(shares, entropy.exp(), (shares >= IN_USE).sum().float(), information)


def distinct_n(candidates: Sequence[str | Sequence[Hashable]], n: int) -> float:
    """Different n-grams of all candidates over all their n-grams (Li et al., 2016).

    It falls as candidates get more or longer, so compare sets of the same number only.

    Args:
        candidates: texts, which are cut at blanks, or lists of tokens.
        n: tokens of an n-gram.

    Returns:
        1 = no n-gram occurs twice; 0 where there is no n-gram at all: nothing said is no variety.
    """
    n_grams: list[tuple[Hashable, ...]] = []
    for candidate in candidates:
        tokens = candidate.split() if isinstance(candidate, str) else candidate
        n_grams += (tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    return len(set(n_grams)) / len(n_grams) if n_grams else 0.0
