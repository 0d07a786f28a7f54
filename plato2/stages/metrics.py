"""What a validation sums up over its units and ranks: means of terms, a calibration, what z says.

Sums begin on the CPU even where a stage is built on the meta device: they have values, weights are filled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

IN_USE = 0.02
"""A latent with at least this share of the posteriors is in use; of 20 used alike each has 0.05."""


class TermMeans(Metric):
    """The mean of each term of a validation over its targets or samples; a term without any is left out."""

    sums: Tensor
    counts: Tensor

    def __init__(self, terms: Sequence[str]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.add_state("sums", torch.zeros(len(terms), device="cpu"), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(terms), device="cpu"), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds a unit's values, (M,) or (N,) of each term."""
        for term, value in values.items():
            if value.numel():
                place = self.terms.index(term)
                self.sums[place] += value.float().mean() * value.numel()
                self.counts[place] += value.numel()

    def compute(self) -> dict[str, Tensor]:
        """The means by term."""
        found = zip(self.terms, self.sums, self.counts, strict=True)
        return {term: total / count for term, total, count in found if count}


class Calibration(Metric):
    """p(l=1) = sigmoid(a s + b) fitted to scores s of true and other responses, as many of each.

    Accuracy and cross entropy are those of each half of the scores under the fit to the other half.
    """

    scores: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds scores (N,) and their labels (N,), 1 = true; a true one and another one alternate."""
        assert isinstance(self.scores, list)
        assert isinstance(self.labels, list)
        self.scores.append(scores)
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """(2,) a and b of all scores; accuracy; cross entropy in nats. 1, 0, NaN, NaN without scores."""
        if not len(self.scores):
            return torch.tensor([1.0, 0.0]), torch.tensor(torch.nan), torch.tensor(torch.nan)
        scores, labels = dim_zero_cat(self.scores).double(), dim_zero_cat(self.labels).double()
        half = torch.arange(len(scores), device=scores.device) // 2 % 2 == 0
        logits = torch.zeros_like(scores)
        for fitted, measured in ((half, ~half), (~half, half)):
            a, b = fit_logistic(scores[fitted], labels[fitted])
            logits[measured] = a * scores[measured] + b
        accuracy = ((logits > 0) == (labels > 0)).double().mean()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return fit_logistic(scores, labels).float(), accuracy.float(), entropy.float()


def fit_logistic(scores: Tensor, labels: Tensor, ridge: float = 1e-3) -> Tensor:
    """a and b of p = sigmoid(a s + b) by Newton's method.

    Args:
        scores: (N,) float64.
        labels: (N,) 1.0 or 0.0.
        ridge: squared a and b cost this much, so that separable scores also have a fit.

    Returns:
        (2,).
    """
    mean, std = scores.mean(), scores.std(correction=0).clamp(min=1e-12)
    x = torch.stack([(scores - mean) / std, torch.ones_like(scores)], dim=1)  # (N, 2)
    w = torch.zeros(2, dtype=x.dtype, device=x.device)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        gradient = x.t() @ (p - labels) + ridge * w
        hessian = x.t() @ (x * (p * (1 - p))[:, None]) + ridge * torch.eye(2, dtype=x.dtype, device=x.device)
        step = torch.linalg.solve(hessian, gradient)
        w = w - step
        if step.abs().max() < 1e-10:
            break
    return torch.stack([w[0] / std, w[1] - w[0] * mean / std])


class Usage(NamedTuple):
    """What the posteriors p(z|c,r) of a validation say about the latents."""

    shares: Tensor
    """(K,) the mean posterior: the share of each latent, sums to 1."""
    effective: Tensor
    """() exp of the mean posterior's entropy: 1 = always the same latent, K = all alike."""
    in_use: Tensor
    """() how many latents have a share of at least `IN_USE`."""
    mutual_information: Tensor
    """() I(z; c,r) = H(mean posterior) - mean H(posterior), in nats: what z says about c and r."""


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
        self.add_state("mass", torch.zeros(n_latent, device="cpu"), dist_reduce_fx="sum")
        self.add_state("entropy", torch.zeros((), device="cpu"), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0, device="cpu"), dist_reduce_fx="sum")

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
