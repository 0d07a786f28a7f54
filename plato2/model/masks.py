"""Who may see whom: block-diagonal masks of packed rows.

A row holds several samples; `segment_ids` says which slot belongs to which sample (0 = padding) and
`type_ids` which slots are context (0) and response (1). Masks are boolean, True = may look.
"""

import torch
from torch import Tensor


def same_sample(segment_ids: Tensor) -> Tensor:
    """Slots of one sample see each other: the recognition pass and the evaluation model.

    Args:
        segment_ids: (B, T), 0 = padding.

    Returns:
        (B, T, T) bool. A padding slot sees only itself, so that no softmax is empty.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    itself = torch.eye(segment_ids.shape[1], dtype=torch.bool, device=segment_ids.device)
    return ((query == key) & (query > 0)) | itself


def prefix_lm(segment_ids: Tensor, type_ids: Tensor) -> Tensor:
    """Context (and latent) is seen by all of its sample, a response slot only from itself onwards.

    The latent slot counts as context: latent and context see each other and never the response; response
    slots see latent, context and the response so far (docs/spec.md, Inputs, generation_mask).

    Args:
        segment_ids: (B, T), 0 = padding.
        type_ids: (B, T), 1 = response.

    Returns:
        (B, T, T) bool, [b, q, k] = slot q may look at slot k.
    """
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    response = type_ids == 1
    visible = ~response[:, None, :] | (response[:, :, None] & causal)
    return same_sample(segment_ids) & visible


def causal(segment_ids: Tensor) -> Tensor:
    """Every slot sees its sample up to itself, as decoders are pretrained.

    Args:
        segment_ids: (B, T), 0 = padding.

    Returns:
        (B, T, T) bool.
    """
    length = segment_ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return same_sample(segment_ids) & visible


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as attention takes it: 0 where a query may look, -inf elsewhere.

    Args:
        mask: (B, Q, K) bool.
        dtype: the dtype attention computes in.

    Returns:
        (B, 1, Q, K), one for all heads and layers.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, float("-inf"))[:, None]
