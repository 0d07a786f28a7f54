"""FSDP2 as Lightning runs it: the ranks' mesh, checkpoints, and the precision of FSDP2's policy."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from plato2.config import UserError
from plato2.runs import distributed
from plato2.runs.parallel import check_replicas
from plato2.stages.sharding import COMPUTED_IN, fill_shard


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
        self.replicas = replicas
        self.written: Future[Any] | None = None
        """Of the newest sharded checkpoint, which is written in the background."""

    @property
    def in_shares(self) -> bool:
        """Whether each rank saves its own share."""
        return bool(self._save_distributed_checkpoint)

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
        if self._save_distributed_checkpoint:  # not the one that training talks in at the same time
            self.writers = torch.distributed.new_group(backend="gloo", timeout=self._timeout)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: shares for a sharded checkpoint, else whole ones on rank 0."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, likewise; in one file with numbers for names, as an unsharded run has it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        assert self.model is not None
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._save_distributed_checkpoint:
            return get_optimizer_state_dict(self.model, own)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_optimizer_state_dict(self.model, own, options=whole)
        return distributed.numbered(found) if self.is_global_zero else found

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Writes one file, or begins to write a folder: `written` is done once all ranks have.

        The folder must not be there yet.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        folder = Path(self.broadcast(str(filepath)))
        folder.mkdir(parents=True, exist_ok=True)
        weights, (optimizer,) = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states")
        tensors = distributed.named(weights, optimizer["state"], checkpoint.pop("current_model_state", None))
        rest = checkpoint | {"optimizer_groups": optimizer["param_groups"]}
        self.written = distributed.write(tensors, rest, folder, self.writers)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fills the ranks' shares of weights and optimizer from a file or folder; returns the rest."""
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.model is not None
        weights: dict[str, Any] = get_model_state_dict(self.model)
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizers)
        tensors = distributed.named(weights, optimizer["state"])
        if path.is_dir():
            rest = distributed.read_meta(path)
            if "averaging_state" in rest:
                current = {name: torch.empty_like(share) for name, share in weights.items()}
                rest["current_model_state"] = current
                tensors = distributed.named(weights, optimizer["state"], current)
            distributed.read_into(tensors, path, together=True)
            groups = rest.pop("optimizer_groups")
        else:
            rest = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            saved_weights, (saved,) = rest.pop("state_dict"), rest.pop("optimizer_states")
            saved = distributed.with_names(saved, optimizer["param_groups"])
            whole, groups = distributed.named(saved_weights, saved["state"]), saved["param_groups"]
            with torch.no_grad():
                for name, share in tensors.items():
                    fill_shard(share, whole[name])
        restored = {"state": optimizer["state"], "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizers, optim_state_dict=restored)
        return rest


def sharding_mesh(device: str, ranks: int, copies: int) -> DeviceMesh:
    """The mesh that `fully_shard` takes: (shard), or (replicate, shard) where there are several copies."""
    from torch.distributed.device_mesh import init_device_mesh

    if copies == 1:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (copies, ranks // copies), mesh_dim_names=("replicate", "shard"))


class WholeCheckpoints(TorchCheckpointIO):
    """Reads sharded checkpoints, too, for a strategy that does not shard."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A checkpoint of one file or a folder."""
        if Path(path).is_dir():
            return distributed.read_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


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
    if precision not in ("bf16-mixed", "16-mixed"):
        return None
    name: Literal["bf16-mixed", "16-mixed"] = "16-mixed" if precision == "16-mixed" else "bf16-mixed"
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    if sharded:
        return PolicyPrecision(name, device, scaler)
    return MixedPrecision(name, device, scaler) if scaler and device == "cpu" else None
