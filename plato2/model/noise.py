"""Random numbers as a pure function of a key: the same noise for a sample on any rank, worker or device."""

import torch
from torch import Tensor

from plato2.random import GOLDEN, MIX_1, MIX_2

_GOLDEN, _MIX_1, _MIX_2 = (word - (1 << 64) for word in (GOLDEN, MIX_1, MIX_2))  # tensors have signed words


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, n: int) -> Tensor:
    """n numbers in [0, 1) for each key, by splitmix64.

    Args:
        keys: (N,) int64.
        n: numbers for each key.

    Returns:
        (N, n) float32.
    """
    x = keys[:, None] + _GOLDEN * torch.arange(1, n + 1, device=keys.device)
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).to(torch.float32) / (1 << 24)
