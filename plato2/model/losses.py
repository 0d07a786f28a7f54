"""The losses of the paper, one value for each target or sample; a stage sums them and divides by true totals.

All logits are taken to float32 before a softmax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.model import cpu


def nll(logits: Tensor, target_ids: Tensor) -> Tensor:
    """-log p(token) of each target (equations 1, 2 and 8): (M, V), (M,) -> (M,)."""
    if cpu.serves(logits):
        return cpu.nll(logits, target_ids)
    return F.cross_entropy(logits.float(), target_ids, reduction="none")


def hits(logits: Tensor, target_ids: Tensor) -> Tensor:
    """1 where the target is the most probable word (of equals the first), else 0: (M, V), (M,) -> (M,)."""
    logits = logits.detach()
    hit = (logits.gather(1, target_ids[:, None])[:, 0] == logits.amax(dim=-1)).float()
    # The maximum is quick, its place is not (15x in bf16 on a CPU): look for it only where ties can matter.
    rows = hit.nonzero()[:, 0]
    hit[rows] = (logits[rows].argmax(dim=-1) == target_ids[rows]).float()
    return hit


def bag_of_words(logits: Tensor, target_ids: Tensor, target_sample: Tensor) -> Tensor:
    """-log f_word of each response word, from its sample's one row of logits (equation 4).

    Args:
        logits: (N, V), one row per sample.
        target_ids: (M,) the words of all responses, the final [SEP] included (docs/spec.md, Inputs).
        target_sample: (M,) which of the N samples each belongs to.

    Returns:
        (M,).
    """
    log_probs = logits.float().log_softmax(dim=-1)
    return -log_probs[target_sample, target_ids]


def contrast(scores: Tensor, texts: Tensor) -> Tensor:
    """-log of the share of the true pair among a unit's, from the context's side and from the response's.

    (-log softmax_j s(c_i, r_j) - log softmax_j s(c_j, r_i)) / 2 at j = i: the other samples of the unit are
    the negatives (Henderson et al., 2020, arXiv:1911.03688, section 2.2), but for those of equal text.

    Args:
        scores: (N, N), [i, j] of context i and response j.
        texts: (N,) a number for each response, equal where the texts are.

    Returns:
        (N,), 0 for a unit of one sample.
    """
    same = texts[:, None] == texts[None, :]
    others = same & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    scores = scores.float().masked_fill(others, float("-inf"))
    of_context, of_response = scores.log_softmax(dim=1), scores.log_softmax(dim=0)
    return -(of_context.diagonal() + of_response.diagonal()) / 2


def gumbel_softmax(logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
    """The relaxed sample of z: softmax((logits + g) / tau), soft (docs/spec.md, Stage 2.1).

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
