"""Dropout that costs little on a CPU.

`F.dropout` draws one random number for each element there, which takes longer than the matrix products of a
small model (docs/benchmarks.md). Here a 64-bit word of the same generator decides for four elements, so the
result is still a function of `torch.manual_seed` alone. Other devices use PyTorch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16
"""A probability is rounded to 1/65536; what is kept is divided by the rounded one: exact in expectation."""


def _n_kept(p: float) -> int:
    """How many of the 65,536 values of a random 16-bit number keep an element."""
    return min(max(round((1.0 - p) * LEVELS), 1), LEVELS - 1)


def kept_share(p: float) -> float:
    """The probability with which `keep_mask` keeps an element: 1 - p, rounded."""
    return _n_kept(p) / LEVELS


def keep_mask(like: Tensor, p: float) -> Tensor:
    """1 with probability 1 - p, else 0, in the shape and dtype of `like` (multiplying by bools is slower)."""
    n = like.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:n].view(like.shape)
    return torch.lt(bits, _n_kept(p) - LEVELS // 2, out=torch.empty_like(like))


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.kept = kept_share(p)
        return (x * mask).div_(ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).div_(ctx.kept), None


class Dropout(nn.Module):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped: Tensor = _CpuDropout.apply(x.contiguous(), self.p)
        return dropped
