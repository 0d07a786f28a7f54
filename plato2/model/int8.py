"""Weights of the blocks in int8, by torchao, for a CPU that has little memory.

One scale for each row of a matrix; what is computed, and all other weights, are bfloat16. What it costs and
gains is in docs/pretrained.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plato2.config import UserError, install
from plato2.model.backbone import Backbone


def quantise(backbone: Backbone) -> None:
    """Turns the matrices of the blocks of a backbone in bfloat16 into int8, but for those of adapters.

    Raises:
        UserError: torchao is not installed.
    """
    quantization = torchao()
    for block in backbone.blocks:
        _as_linear(block)
        quantization.quantize_(block, quantization.Int8WeightOnlyConfig(), filter_fn=_is_matrix)


def _is_matrix(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of the model itself, no part of an adapter."""
    if not isinstance(module, nn.Linear) or ".lora_" in f".{name}":
        return False
    return type(module.weight.data) is Tensor  # not yet: two models may share a base


def _as_linear(module: nn.Module) -> None:
    """Makes linear layers of GPT-2's `Conv1D`, whose matrices are the other way round."""
    child: Any
    for name, child in module.named_children():
        if type(child).__name__ != "Conv1D":
            _as_linear(child)
            continue
        n_in, n_out = child.weight.shape
        linear = nn.Linear(n_in, n_out, device="meta")
        linear.weight = nn.Parameter(child.weight.detach().t().contiguous(), requires_grad=False)
        linear.bias = child.bias
        setattr(module, name, linear)


def torchao() -> Any:
    """torchao's quantisation.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torchao.quantization as found
    except ImportError:
        raise UserError(f"precision=int8: needs torchao; {install('int8')}") from None
    return found
