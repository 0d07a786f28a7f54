"""The one attention function of the project: softmax(q k^T / sqrt(d) + bias) v with the mask given."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Masked scaled dot-product attention (spec section 4).

    PyTorch's fused kernel, except in bf16 on a CPU: there its backward pass is slow for the short rows of
    dialogue, and two batched matrix products with a softmax between them are 1.5x to 3x faster
    (docs/benchmarks.md).

    Args:
        query: (B, heads, Q, d).
        key: (B, heads, K, d).
        value: (B, heads, K, d).
        bias: (B, 1, Q, K), added to the scores: 0 = may look, -inf = may not; the dtype of `query`.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, heads, Q, d).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _two_products(query, key, value, bias, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def _two_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
    batch, n_head, n_query, head_size = query.shape
    n_key = key.shape[2]
    scores = torch.baddbmm(
        bias.expand(-1, n_head, -1, -1).reshape(batch * n_head, n_query, n_key),
        query.reshape(batch * n_head, n_query, head_size),
        key.reshape(batch * n_head, n_key, head_size).transpose(1, 2),
        alpha=1.0 / math.sqrt(head_size),
    )
    weights = scores.softmax(dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    context = torch.bmm(weights, value.reshape(batch * n_head, n_key, head_size))
    return context.view(batch, n_head, n_query, head_size)
