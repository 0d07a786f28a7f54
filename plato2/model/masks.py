"""Who may see whom: block-diagonal masks of packed rows.

A row holds several samples; `segment_ids` says which slot belongs to which sample (0 = padding) and
`type_ids` which slots are context (0) and response (1). Where several responses follow one context they are
numbered, 1, 2, ..., and do not see each other. Masks are boolean, True = may look.
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
        type_ids: (B, T), 0 = context, 1, 2, ... = a response.

    Returns:
        (B, T, T) bool, [b, q, k] = slot q may look at slot k.
    """
    of_context = type_ids == 0
    same_part = type_ids[:, :, None] == type_ids[:, None, :]
    visible = of_context[:, None, :] | (same_part & _up_to_itself(segment_ids))
    return same_sample(segment_ids) & visible


def causal(segment_ids: Tensor, type_ids: Tensor | None = None) -> Tensor:
    """Every slot sees its sample up to itself, as decoders are pretrained; other responses it does not.

    Args:
        segment_ids: (B, T), 0 = padding.
        type_ids: see `prefix_lm`; None = one response.

    Returns:
        (B, T, T) bool.
    """
    visible = _up_to_itself(segment_ids)
    if type_ids is not None:
        same_part = type_ids[:, :, None] == type_ids[:, None, :]
        visible = visible & (same_part | (type_ids == 0)[:, None, :])
    return same_sample(segment_ids) & visible


def _up_to_itself(segment_ids: Tensor) -> Tensor:
    length = segment_ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()


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
