"""The attention of a pretrained decoder: by sample where `cpu` serves, else PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from plato2.model import cpu

NAME = "plato2"
"""Under which transformers knows it; of a name that is its own, it makes no mask that it is not given."""


def register(transformers: Any) -> str:
    """Makes it known to transformers; returns its name."""
    transformers.AttentionInterface.register(NAME, attention)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sample_blocks: cpu.SampleBlocks | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions.

    Args:
        module: the layer's attention.
        query: (B, heads, T, d).
        key: (B, key heads, T, d); each serves as many query heads, which follow each other.
        value: the same.
        attention_mask: (B, 1, T, K), additive, where there is no plan of the rows.
        dropout: probability of dropping an attention weight.
        scaling: of scores; None = 1 / sqrt(d).
        sample_blocks: the plan of the rows, as `Backbone.mask` makes it on a CPU.
        given: what else PyTorch's form is told.

    Returns:
        (B, T, heads, d), and no weights.
    """
    if sample_blocks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )
        return found
    n_head, head_size = query.shape[1], query.shape[-1]
    if scaling is not None and not math.isclose(scaling, usual := 1.0 / math.sqrt(head_size)):
        query = query * (scaling / usual)
    shared = n_head // key.shape[1]
    key, value = (each.repeat_interleave(shared, dim=1) if shared > 1 else each for each in (key, value))
    parts = [each.transpose(1, 2).to(sample_blocks.dtype) for each in (query, key, value)]
    qkv = torch.stack(parts, dim=2)  # (B, T, 3, heads, d)
    context = cpu.block_attention(qkv.flatten(2), sample_blocks, dropout)
    return context.unflatten(-1, (n_head, head_size)), None
