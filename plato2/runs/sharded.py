"""FSDP2 as Lightning runs it: the ranks' mesh, and a precision that FSDP2's own policy puts into effect."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from plato2.config import UserError
from plato2.stages.sharding import COMPUTED_IN


class Sharded(ModelParallelStrategy):
    """Every rank holds a share of weights, gradients and optimizer state.

    Args:
        replicas: 1 = one copy of the model over all ranks (FSDP). More: as many whole copies, each sharded
            over ranks that are next to each other, so that only the sums of gradients go between the copies
            (HSDP). `auto` = one copy a machine.
        save_distributed_checkpoint: each rank saves its own share, all of them one folder; false = one file.
        process_group_backend: gloo, nccl, ...; None = that of the device.
        timeout: how long a rank waits for the others.
    """

    def __init__(
        self,
        replicas: int | Literal["auto"] = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)
        if isinstance(replicas, int) and replicas < 1:
            raise UserError(f"strategy.strategy.replicas={replicas}: must be at least 1, or auto (machines)")
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Brings up the processes and their mesh.

        Raises:
            UserError: the ranks cannot be shared out over the copies.
        """
        assert self.cluster_environment is not None
        world = self.num_nodes * self.num_processes
        copies = check_replicas(self.replicas, self.num_nodes, world)
        self._data_parallel_size = world  # of Lightning's mesh, which the next line replaces
        super().setup_environment()
        self._device_mesh = sharding_mesh(self.root_device.type, world, copies)


def check_replicas(replicas: int | str, num_nodes: int, ranks: int) -> int:
    """The copies of the model.

    Raises:
        UserError: the ranks cannot be shared out over them.
    """
    copies = num_nodes if replicas == "auto" else int(replicas)
    if ranks % copies:
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(
            f"strategy.strategy.replicas={replicas}: {ranks} ranks cannot be {copies} copies of the model; "
            f"use {' or '.join(map(str, fitting))}, or auto (one copy a machine)"
        )
    return copies


def sharding_mesh(device: str, ranks: int, copies: int) -> DeviceMesh:
    """The mesh that `fully_shard` takes: (shard), or (replicate, shard) where there are several copies."""
    from torch.distributed.device_mesh import init_device_mesh

    if copies == 1:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (copies, ranks // copies), mesh_dim_names=("replicate", "shard"))


class PolicyPrecision(MixedPrecision):
    """`bf16-mixed` or `16-mixed` that FSDP2's policy has cast to: the name, and the loss scale of float16."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """No autocast: weights and inputs of a block are cast as a whole."""
        yield


def precision_plugin(precision: str, device: str, sharded: bool) -> Precision | None:
    """What Lightning would not take by its name, or do something else with; None = its own will do.

    Args:
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        device: `cpu` or `cuda`.
        sharded: whether FSDP2 casts.

    Raises:
        UserError: FSDP2 does not compute in it.
    """
    if sharded and precision not in COMPUTED_IN:
        raise UserError(f"strategy.precision={precision}: FSDP2 takes auto, {', '.join(COMPUTED_IN)}")
    if precision != "bf16-mixed" and precision != "16-mixed":
        return None
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    if sharded:
        return PolicyPrecision(precision, device, scaler)
    return MixedPrecision(precision, device, scaler) if scaler and device == "cpu" else None
