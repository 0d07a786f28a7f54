"""What training shows and evaluation measures: means of terms, calibration of a score, choosing responses."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TermMeans(Metric):
    """The mean of each term of a validation over its targets or samples; a term without any is left out."""

    sums: Tensor
    counts: Tensor

    def __init__(self, terms: Sequence[str]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.add_state("sums", torch.zeros(len(terms)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(terms)), dist_reduce_fx="sum")

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
        ridge: squared a and b cost this much, so that separable scores have a fit, too.

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
