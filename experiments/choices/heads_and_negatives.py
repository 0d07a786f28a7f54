"""What some variants need and plato2 does not have: other negatives, and a head that reads all slots.

The variants name these classes in their overrides; choices.py puts this folder on the path.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plato2.config import Head, ModelConfig, OptimConfig
from plato2.data.collate import CoherenceBatch, Items, Window
from plato2.data.tokenizer import EOS_ID
from plato2.model.backbone import Backbone, mean_slots
from plato2.stages.evaluation import CoherenceEstimation


@dataclass(frozen=True)
class ManyNegatives(CoherenceBatch):
    """Each context with its own response and with `negatives` others."""

    negatives: int = 3

    def items(self, window: Window) -> Items:
        """1 + negatives items for each sample, its own response first."""
        drawn = [
            super(ManyNegatives, self).items(replace(window, number=window.number * 64 + k))
            for k in range(self.negatives)
        ]
        one, n = drawn[0], 1 + self.negatives
        contexts = np.repeat(one.contexts[0::2], n)
        responses = np.stack(
            [one.responses[0::2], *(items.responses[1::2] for items in drawn)], axis=1
        ).ravel()
        slots = window.samples.context_len[contexts] + window.response_len[responses]
        return Items(contexts, responses, np.tile([1] + [0] * self.negatives, len(contexts) // n), slots)


@dataclass(frozen=True)
class SameConversation(CoherenceBatch):
    """Every second negative is the turn after the true response, where the window has it (45 % of them)."""

    def items(self, window: Window) -> Items:
        """Two items for each sample, its own response and another."""
        items = super().items(window)
        responses, samples = items.responses.copy(), window.samples
        begins: dict[bytes, int] = {}  # the last two turns of a context -> its row
        wanted = []
        for row in range(len(samples)):
            first, middle, end = (
                samples.offsets[row],
                samples.offsets[row] + samples.context_len[row],
                samples.offsets[row + 1],
            )
            context, response = samples.token_ids[first + 1 : middle], samples.token_ids[middle + 1 : end]
            ends = np.flatnonzero(context == EOS_ID) + 1
            turns = [0, *ends[:-1]]
            begins[context[turns[-2] if len(turns) > 1 else 0 :].tobytes()] = row
            wanted.append(np.concatenate([context[turns[-1] :], response]).tobytes())
        later = np.array([begins.get(key, -1) for key in wanted])
        use = (later >= 0) & (np.arange(len(later)) % 2 == 0)
        responses[1::2] = np.where(use, later, responses[1::2])
        slots = samples.context_len[items.contexts] + window.response_len[responses]
        return replace(items, responses=responses, slots=slots)


class MeanHead(CoherenceEstimation):
    """Knover's head, which reads the mean of all slots in place of the first."""

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
        head: Head = "first",
    ) -> None:
        super().__init__(model, optim, seed, head)
        self.backbone.__class__ = _MeanBackbone


class _MeanBackbone(Backbone):
    """Its first slots read the mean of their samples."""

    def encode(self, x: Tensor, mask: Any, cache: Any = None, read: Tensor | None = None) -> Tensor:
        h = super().encode(x, mask, cache)
        if read is None:
            return h
        starts = torch.zeros(x.shape[:2], dtype=torch.long).flatten().index_fill(0, read, 1)
        parts = starts.cumsum(0).view(x.shape[:2]) * (self.segment_ids > 0)
        return mean_slots(h, torch.ones_like(h[..., 0]), parts, len(read))

    def mask(self, segment_ids: Tensor, type_ids: Tensor | None = None) -> Any:
        self.segment_ids = segment_ids
        return super().mask(segment_ids, type_ids)
