"""The losses of the paper, one value for each target or sample; a stage sums them and divides by true totals.

All logits are taken to float32 before a softmax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, target_ids: Tensor) -> Tensor:
    """-log p(token) of each target (equations 1, 4 and 9): (M, V), (M,) -> (M,)."""
    return F.cross_entropy(logits.float(), target_ids, reduction="none")


def bag_of_words(logits: Tensor, target_ids: Tensor, target_sample: Tensor) -> Tensor:
    """-log f_word of each response word, from its sample's one row of logits (equation 5).

    Args:
        logits: (N, V), one row per sample.
        target_ids: (M,) the words of all responses, the final [SEP] included (spec section 3).
        target_sample: (M,) which of the N samples each belongs to.

    Returns:
        (M,).
    """
    log_probs = logits.float().log_softmax(dim=-1)
    return -log_probs[target_sample, target_ids]


def gumbel_softmax(logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
    """The relaxed sample of z: softmax((logits + g) / tau), soft (spec section 5).

    Args:
        logits: (N, K) posterior logits.
        uniform: (N, K) in [0, 1), turned into Gumbel noise g; None = no noise.
        tau: temperature; Knover's is 0.67, fixed.

    Returns:
        (N, K), rows sum to 1.
    """
    logits = logits.float()
    if uniform is not None:
        logits = logits - torch.log(1e-10 - torch.log(uniform + 1e-10))
    return (logits / tau).softmax(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each posterior in nats, finite also when a probability underflows: (N, K) -> (N,)."""
    log_probs = logits.float().log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
