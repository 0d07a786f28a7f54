"""p(z|c): which latent a reply will have, told from the context alone. Stage 2.1 has no such part.

A linear layer on the frozen model of stage 2.1 is fitted to p(z|c,r) of training samples. Since the
cross-entropy to many posteriors is least at their mean, it learns the mean of p(z|c,r) over the replies to a
context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from plato2.batch import record_numbers
from plato2.data.units import Pairs, pack
from plato2.model.backbone import mean_slots, read_slots
from plato2.model.heads import Recognition
from plato2.model.networks import GenerationNetwork

AT_ONCE = 64
STEPS = 100
PENALTY = 1e-4
"""Of the squared weights."""


class Prior:
    """log p(z|c) of a model of stage 2.1.

    Args:
        network: of stage 2.1, with its recognition head.
        pairs: training samples, contexts and responses as ids.
    """

    def __init__(self, network: GenerationNetwork, pairs: Pairs) -> None:
        self.network = network
        x, p_z = context_vectors(network, [c for c, _ in pairs]), posteriors(network, pairs)
        self.mean, self.std = x.mean(dim=0), x.std(dim=0) + 1e-6
        self.linear = nn.Linear(x.shape[1], p_z.shape[1])
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = p_z.mean(dim=0).log()
        self.marginal = p_z.mean(dim=0)
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = cross_entropy(p_z, self._log_probs(x)) + PENALTY * self.linear.weight.square().sum()
            found.backward()
            return found

        optimizer.step(loss)

    def log_probs(self, contexts: Sequence[Sequence[int]]) -> np.ndarray:
        """log p(z|c) of n contexts: (n, K)."""
        with torch.no_grad():
            return self._log_probs(context_vectors(self.network, contexts)).double().numpy()

    def figures(self, pairs: Pairs) -> dict[str, float]:
        """How much of z the context tells, in nats, on samples that it was not fitted to."""
        p_z, found = posteriors(self.network, pairs), torch.from_numpy(self.log_probs([c for c, _ in pairs]))
        return {
            "samples": len(pairs),
            "cross-entropy without the context": cross_entropy(p_z, self.marginal.log()).item(),
            "cross-entropy": cross_entropy(p_z, found).item(),
            "entropy of the posterior": cross_entropy(p_z, p_z.clamp(min=1e-30).log()).item(),
            "latents in effect": (-(found.exp() * found).sum(dim=-1)).exp().mean().item(),
        }

    def _log_probs(self, x: Tensor) -> Tensor:
        return self.linear((x - self.mean) / self.std).log_softmax(dim=-1)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_z p(z) log q(z), the mean over samples: (n, K), (n, K) or (K,)."""
    return -(p * log_q).sum(dim=-1).mean()


@torch.no_grad()
def context_vectors(network: GenerationNetwork, contexts: Sequence[Sequence[int]]) -> Tensor:
    """What the model makes of a context: the slot of [MASK] and the mean of all slots, (n, 2 H)."""
    backbone, found = network.backbone, []
    for start in range(0, len(contexts), AT_ONCE):
        pairs = [(context, ()) for context in contexts[start : start + AT_ONCE]]
        unit, order = pack(pairs, latent_slot=backbone.config.mask_id, roles=backbone.role is not None)
        front = unit["sample_index"]
        mask_vector = backbone.mask_vector.expand(len(front), -1)  # as in recognition
        x = backbone.put_front(backbone.embed_unit(unit), front, mask_vector)
        h = backbone.encode(x, backbone.mask(unit["segment_ids"]))  # (B, T, H)
        mean = mean_slots(h, torch.ones(h.shape[:2]), record_numbers(unit), len(pairs))
        both = torch.cat([read_slots(h, front), mean], dim=-1)
        found.append(torch.empty_like(both).index_copy(0, order, both))
    return torch.cat(found)


@torch.no_grad()
def posteriors(network: GenerationNetwork, pairs: Pairs) -> Tensor:
    """p(z|c,r) (equation 3): (n, K)."""
    backbone, found = network.backbone, []
    for start in range(0, len(pairs), AT_ONCE):
        slot, roles = backbone.config.mask_id, backbone.role is not None
        unit, order = pack(pairs[start : start + AT_ONCE], drop_last=True, latent_slot=slot, roles=roles)
        h = backbone.encode_masked(unit, backbone.embed_unit(unit), unit["sample_index"])
        p_z = cast(Recognition, network.recognition)(h).softmax(dim=-1)
        found.append(torch.empty_like(p_z).index_copy(0, order, p_z))
    return torch.cat(found)
