"""Fully sharded data parallelism (FSDP2) for what does not fit on one device.

Only FSDP2 (`ModelParallelStrategy` + `fully_shard`): `FSDPStrategy` refuses CPUs and clipping by norm.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from plato2.model.backbone import in_order_of_drawing, initialize_parameter

ReadShares = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors of these names: of a DTensor the rank's share alone."""
COMPUTED_IN = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What matrix products are computed in, by the Trainer's precision."""


def shard_fully(stage: LightningModule, blocks: Iterable[nn.Module], strategy: Strategy) -> None:
    """Shards each block, then the rest of the stage, over the mesh of a `ModelParallelStrategy`.

    A mesh of two dimensions (replicate, shard) makes whole copies of the stage that are sharded inside each
    (HSDP). The stage may be on the meta device, to be filled by `fill_shards`. Compute is in the strategy's
    precision, with float32 master weights and float32 sums of gradients. The weights of the stage itself
    (embeddings, heads) are gathered around `losses`.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh, computed_in = strategy.device_mesh, COMPUTED_IN[str(strategy.precision_plugin.precision)]
    policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(stage, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(stage, "losses")


def fill_shards(
    stage: nn.Module,
    device: torch.device,
    weights: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    seed: int,
    initial: bool = True,
    read: ReadShares | None = None,
) -> None:
    """Allocates a rank's shards of a stage on the meta device, and fills them.

    Every rank draws all initial weights as an unsharded stage does, a tensor at a time, and keeps its share.

    Args:
        stage: sharded, its parameters on the meta device.
        device: where the shards are to be.
        weights: those of another model, by name, in place of initial ones; whole tensors, or only described,
            on the meta device.
        base: those of a pretrained decoder, by their names in the backbone, where they are to be read: frozen
            ones, and those that training begins with.
        seed: of the initial weights.
        initial: whether there are any; without, all is read from a checkpoint later.
        read: fills the shards of `weights` where these are only described; all ranks call it.
    """
    # As `to_empty`, which would also empty what has its values: buffers, sums of metrics.
    stage._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in in_order_of_drawing(stage):
            if (of_base := name.removeprefix("backbone.")) in base:
                fill_shard(parameter, base[of_base])
            elif initial:
                whole = torch.empty(parameter.shape)
                initialize_parameter(name, whole)
                if not read or name not in weights:
                    fill_shard(parameter, weights.get(name, whole))
        if not initial:
            return
        if read:
            own = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
            read({name: tensor for name, tensor in own.items() if name in weights})
            return
        for name, buffer in stage.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


def fill_shard(share: Tensor, whole: Tensor) -> None:
    """Copies a rank's share of a tensor that each rank has, or that is shared out alike; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(share, DTensor) and not isinstance(whole, DTensor):
        here = whole.to(share.device, share.dtype)
        whole = distribute_tensor(here, share.device_mesh, share.placements, src_data_rank=None)
    share.copy_(whole)


@contextmanager
def gathered(stage: nn.Module) -> Iterator[None]:
    """Whole weights on every rank meanwhile, in the precision of compute, so that a rank can work by itself.

    All ranks enter and leave it together. A stage that is not sharded has them anyway.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in stage.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        if part is not stage:
            part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            if part is not stage:
                part.set_reshard_after_forward(True, recurse=False)
        _forget_passes(stage, parts)


def _forget_passes(stage: Any, parts: list[Any]) -> None:
    """Forgets which parts passes without a backward went through, and gives their whole weights back.

    The next backward gathers ahead what was passed before: each rank what it has passed by itself, so that
    ranks would wait for each other for ever.
    """
    if parts and hasattr(stage, "reset_iter_state"):
        stage.reset_iter_state()
        return
    for part in parts:  # PyTorch 2.11 and 2.12 have no public name for it
        state = part._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in filter(None, groups):
            group._post_forward_indices.clear()
        part.reshard()


def exchange_once(stage: LightningModule, last: bool, between_passes: nn.Module | None = None) -> None:
    """Lets a sharded stage add up the gradients of a step's units, and reduce their sum in the last backward.

    Lightning's `block_backward_sync` does so for DDP only: here every unit would send its gradients, within a
    copy of the model and, with HSDP, between the copies. Until the last one a rank holds whole gradients, not
    its share alone, in float32.

    In two passes through the blocks, the backward of the later one would send the sums of the units before,
    and that of the earlier one the last unit's gradients, which autograd adds up over both passes first. So
    blocks wait until the backward has come to what lies between the passes.

    Args:
        stage: sharded or not; if not, there is nothing to do.
        last: whether the next backward is the last one of the step.
        between_passes: a part of the stage that all gradients of the later pass go through on their way to
            the earlier one.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(stage, FSDPModule):
        return
    stage.set_requires_gradient_sync(last)  # within a copy
    stage.set_requires_all_reduce(last)  # between the copies
    if last and between_passes is not None:
        blocks = [part for part in stage.modules() if isinstance(part, FSDPModule) and part is not stage]
        for block in blocks:
            block.set_requires_gradient_sync(False)

        def at_the_earlier_pass(*_: object) -> None:
            hook.remove()
            for block in blocks:
                block.set_requires_gradient_sync(True)

        hook = between_passes.register_full_backward_pre_hook(at_the_earlier_pass)
