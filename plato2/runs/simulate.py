"""What a training step holds in memory, found by running it on tensors that have shapes but no memory.

PyTorch's `FakeTensorMode` runs the stage's own code, FSDP2 shards it over a process group that only pretends
(`fake`), and PyTorch's trackers add up what is alive. So a step of 64 GPUs is measured on one CPU in about a
second, whatever the size of the model. The tensors are the CPU's by name: PyTorch without CUDA cannot run a
backward pass on pretended GPU tensors. For a GPU the forms that exist only for CPUs are switched off, and
dropout and attention are those of a GPU: a mask of bytes, and a kernel that keeps no scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from plato2.batch import Unit, n_targets
from plato2.config import UserError
from plato2.data.collate import Window
from plato2.data.order import Batching, lay_out
from plato2.data.samples import BOS_ID, EOS_ID
from plato2.data.shards import Samples
from plato2.data.stream import Batch
from plato2.model import cpu, losses
from plato2.model.pretrained import PretrainedBackbone
from plato2.runs.sharded import PolicyPrecision, Sharded, sharding_mesh
from plato2.stages.base import Stage
from plato2.stages.optim import adamw
from plato2.stages.sharding import exchange_once, shard_fully

Form = Literal["cpu", "gpu"]
"""Whose kernels a step runs on."""


@dataclass(frozen=True)
class Ranks:
    """How the processes of a strategy share the work: groups that hold the whole model, each shared out.

    One process is 1 x 1, DDP n x 1, FSDP2 1 x n; shards inside machines and copies between them (HSDP) are
    machines x devices.
    """

    replicate: int = 1
    """Copies of the model."""
    shard: int = 1
    """Ranks that share one copy."""
    fsdp: bool = False
    """FSDP2 does it."""
    half: bool = True
    """Compute in bf16 (or float16)."""

    @property
    def n(self) -> int:
        """All of them."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Memory:
    """What a rank holds at the peak of a step, in bytes."""

    weights: float
    """float32, the rank's share."""
    gradients: float
    """float32; whole where the sum of several units is exchanged once."""
    optimizer: float
    """Adam's two moments, float32."""
    activations: float
    """Kept for the backward pass, and the operation at hand; in stages of two passes also the gradients of
    blocks from the later pass, which wait in autograd for those from the earlier one."""
    gathered_blocks: float
    """FSDP2's whole weights, in bf16, of the blocks at hand and of the stage around them."""
    exchange_buffers: float
    """Gradients on their way: DDP's buckets, FSDP2's input of the reduction."""
    logits: float
    """Whatever has a column for each word."""
    weight_copies: float
    """The bf16 copies of weights that autocast makes, a copy for each product; without checkpointing they are
    kept until that product's backward pass."""
    average: float
    """Their moving average, float32, the rank's share (`callbacks=ema`)."""

    @property
    def total(self) -> float:
        """The peak."""
        return sum(vars(self).values())

    def plus(self, more: Memory, less: Memory, times: float) -> Memory:
        """This + times (more - less), part by part."""
        parts = zip(*(vars(one).values() for one in (self, more, less)), strict=True)
        return Memory(*(own + times * (a - b) for own, a, b in parts))


# ------------------------------------------------------------------------------------------------- the batch


@dataclass(frozen=True)
class SampleLengths:
    """The mean sample of a corpus."""

    context: int = 102
    """Ids of its context, and below of its response (chitchat's have 117 together, 0.19 of them targets)."""
    response: int = 26


def typical_unit(
    batch: Batch, batching: Batching, lengths: SampleLengths, vocab_size: int, max_response: int = 128
) -> Unit:
    """A full unit of samples of the mean length, made by the stage's own batch maker.

    Raises:
        UserError: the samples do not fit in a row.
    """
    longest = batching.row_length if batching.mode == "packed" else batching.unit_tokens
    if longest < 16:
        raise UserError(f"data.row_length={longest}: is shorter than any sample; use 16 or more")
    response = max(3, min(lengths.response, longest // 3))
    context = max(3, min(lengths.context, longest - response - 2))
    n = 2 * batching.unit_tokens // (context + response) + 8
    ids = np.random.default_rng(0).integers(EOS_ID + 1, vocab_size - 1, (n, context + response))
    ids[:, [0, context]], ids[:, [context - 1, -1]] = BOS_ID, EOS_ID
    samples = Samples(
        token_ids=ids.astype(np.uint32).ravel(),
        offsets=np.arange(n + 1) * (context + response),
        context_len=np.full(n, context),
        sample_ids=np.arange(n),
    )
    window = Window(samples, 0, 0, 0, vocab_size - 1, max_response)
    items = batch.items(window)
    unit = batch.unit(window, items, lay_out(items.slots, batching, 0, shuffle=False).unit(0))
    counts = {"step_targets": n_targets(unit), "step_samples": len(unit["sample_ids"])}
    return cast(Unit, {**unit, **{name: torch.tensor(count) for name, count in counts.items()}})


# -------------------------------------------------------------------------------------------------- the step


def peak_memory(
    stage: Stage, unit: Unit, ranks: Ranks, form: Form, n_units: int = 1, averaged: bool = False
) -> Memory:
    """The memory of a rank at the peak of an optimizer step; see `memory_of_a_step`."""
    found = memory_of_a_step(stage, unit, ranks, form, n_units, averaged).values()
    return max(found, key=lambda memory: memory.total)


def memory_of_a_step(
    stage: Stage, unit: Unit, ranks: Ranks, form: Form, n_units: int = 1, averaged: bool = False
) -> dict[str, Memory]:
    """The memory of a rank at the peak of each part of an optimizer step.

    It is the second step: Adam has its moments by then. Its parts are the forward pass, the backward pass
    through the last block, the next (with what checkpointing has left of the last), those between and the
    first, once for each pass and unit, and what comes after. From one block to the next memory changes by the
    same amount, so each part but `between` is linear in the number of layers, while which of them has the
    peak depends on it. With FSDP2 the step is one part.

    Args:
        stage: built on the meta device; its weights are replaced.
        unit: a unit of a rank, real tensors: only who may see whom is read of them.
        ranks: how they share the model.
        form: whose kernels.
        n_units: units of a rank in a step; two stand for any larger number.
        averaged: whether a moving average of the weights is kept beside them.

    Raises:
        RuntimeError: the process has a process group already.
    """
    n_units, mode = min(n_units, 2), FakeTensorMode()
    with _process_group(ranks) as strategy, _kernels(unit, form, mode), mode:
        _materialize(stage)
        real = cast(dict[str, Tensor], unit)
        fake = cast(Unit, {name: mode.from_tensor(tensor) for name, tensor in real.items()})
        if strategy is not None:
            shard_fully(stage, stage.backbone.blocks, strategy)
        # Trackers know a stage that is called; `losses` alone would pass them by.
        object.__setattr__(stage, "forward", lambda unit: type(stage).losses(stage, unit))
        optimizer = adamw(stage, stage.optim_config)
        autocast = ranks.half and not ranks.fsdp
        step = _Step(stage, optimizer, fake, n_units, autocast)
        step(lambda: None)  # also fills PyTorch's caches of shapes, which the tracker would take for tensors
        tracker = (_FSDPTracker if ranks.fsdp else _Tracker)(stage, optimizer, fake)
        with tracker:
            step(tracker.after_unit)
    buckets = 0
    if not ranks.fsdp and ranks.n > 1:  # DDP's buckets hold all gradients once more
        buckets = 4 * sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    found = tracker.memory()
    for part, memory in found.items():
        if not ranks.fsdp:
            memory = replace(memory, exchange_buffers=buckets)
        # A copy of all weights, frozen ones too; it is updated when activations and gradients are gone.
        found[part] = replace(memory, average=memory.weights) if averaged else memory
    return found


@dataclass
class _Step:
    """An optimizer step as `Stage.training_step` does it, without a Trainer."""

    stage: Stage
    optimizer: torch.optim.Optimizer
    unit: Unit
    n_units: int
    autocast: bool

    def __call__(self, after_unit: Callable[[], None]) -> None:
        stage = self.stage
        # as Lightning does it: without its cache, each product casts its weight anew
        cast = torch.autocast("cpu", torch.bfloat16, enabled=self.autocast, cache_enabled=False)
        with cast:
            for number in range(self.n_units):
                exchange_once(stage, number == self.n_units - 1, stage.between_passes)
                totals = stage.totals(self.unit)
                terms = {term: value.sum() / totals[term] for term, value in stage(self.unit).items()}
                loss = torch.stack([terms[term] for term in stage.loss_terms]).sum()
                loss.backward()
                after_unit()
            nn.utils.clip_grad_norm_(stage.parameters(), stage.optim_config.clip_norm or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad()


def _materialize(stage: Stage) -> None:
    """Gives every parameter and buffer a (pretended) place on the CPU; `to_empty` cannot, of fake tensors."""
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _process_group(ranks: Ranks) -> Iterator[Sharded | None]:
    """A process group of one process that pretends to be the first of all; nothing is sent."""
    if not ranks.fsdp:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("a plan needs a process that has no process group")
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks.n, store=FakeStore())
    try:
        strategy = Sharded(ranks.replicate)
        strategy.precision_plugin = PolicyPrecision("bf16-mixed", "cpu") if ranks.half else Precision()
        strategy._device_mesh = mesh = sharding_mesh("cpu", ranks.n, ranks.replicate)
        for name in mesh.mesh_dim_names or ():
            mesh[name]  # made now: a mesh reads its ranks, and fake tensors cannot be read
        yield strategy
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _kernels(unit: Unit, form: Form, mode: FakeTensorMode) -> Iterator[None]:
    """What cannot run without values, or would run as on another device, in another form."""
    with ExitStack() as stack:

        def instead(module: Any, name: str, form: Any) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, form)

        instead(losses, "hits", _hits)
        shapes = "_propagate_tensor_meta_non_cached"
        instead(ShardingPropagator, shapes, _untracked(getattr(ShardingPropagator, shapes)))
        if form == "gpu":
            instead(cpu, "serves", lambda x: False)
            instead(F, "dropout", _gpu_dropout)
            instead(F, "scaled_dot_product_attention", _gpu_attention)
        else:
            made = cpu.sample_blocks

            def sample_blocks(segments: Tensor, types: Tensor | None, *rest: Any) -> cpu.SampleBlocks:
                with torch._C._DisableTorchDispatch():  # of the real ids
                    blocks = made(unit["segment_ids"], None if types is None else unit["type_ids"], *rest)
                groups = [replace(group, bias=mode.from_tensor(group.bias)) for group in blocks.groups]
                tensors: dict[str, Any] = {
                    name: mode.from_tensor(x) for name, x in vars(blocks).items() if isinstance(x, Tensor)
                }
                return replace(blocks, groups=groups, **tensors)

            instead(cpu, "sample_blocks", sample_blocks)
        level = logging.getLogger("torch.distributed").level
        stack.callback(logging.getLogger("torch.distributed").setLevel, level)
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
        yield


def _untracked(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """How DTensor finds a result's shape, out of a tracker's sight: by whole tensors that take no memory.

    Of PyTorch 2.11, which looks for it in every step, the trackers would count them.
    """

    def found(*given: Any) -> Any:
        with _disable_current_modes():
            return shapes(*given)

    return found


def _hits(logits: Tensor, target_ids: Tensor) -> Tensor:
    """`losses.hits` without its look at ties, for which it needs values."""
    logits = logits.detach()
    return (logits.gather(1, target_ids[:, None])[:, 0] == logits.amax(dim=-1)).float()


def _gpu_dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU's keeps a byte for each element."""
    kept: Tensor = torch.native_dropout(x, p, training)[0]
    return kept


def _gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> Tensor:
    """A GPU's fused kernel that takes a mask and dropout: it keeps its inputs, its output and a row's sum."""
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = kernel(query, key, value, bias, True, dropout_p)[0]
    return out


# ----------------------------------------------------------------------------------------------- the trackers


class _Logits:
    """Counts, at each new peak, what has a column for each word."""

    def __init__(self, stage: Stage, unit: Unit) -> None:
        vocab_size = stage.model_config.vocab_size
        decoder = stage.backbone.n_words if isinstance(stage.backbone, PretrainedBackbone) else vocab_size
        self.words = {vocab_size, decoder}
        rows = {len(unit["target_ids"]), len(unit["sample_index"])}
        rows |= {-(-n // cpu.ROWS_STEP) * cpu.ROWS_STEP for n in rows}
        self.sizes = {n * words * size for n in rows if n for size in (2, 4) for words in self.words}
        self.at_peak = 0

    def count(self, infos: Any) -> None:
        """Adds up the storages that have the size of logits."""
        self.at_peak = sum(info.mem_consumed for info, _ in infos.values() if info.size in self.sizes)


class _Copies:
    """Counts, at each new peak, the copies that autocast has made of weights."""

    def __init__(self) -> None:
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.at_peak = 0

    def note(self, func: Any, args: Any, result: Any, infos: Any) -> None:
        """Looks whether an operation was the cast of a weight."""
        if func is torch.ops.aten._to_copy.default:
            info, _ = infos.get(args[0].untyped_storage(), (None, None))
            if info is not None and info.reftype == _MemRefType.PARAM and result.dtype != args[0].dtype:
                self.made[result.untyped_storage()] = True

    def count(self, infos: Any) -> None:
        """Adds them up."""
        self.at_peak = sum(info.mem_consumed for storage, (info, _) in infos.items() if storage in self.made)


def _ignored(gradient: Tensor) -> None:
    pass


def _as_autograd_adds(func: Any, args: tuple[Any, ...]) -> Any:
    """The operation that it would be without a tracker: autograd adds the gradients of a tensor that is used
    twice, such as the word table, in place, but below a dispatch mode it makes a third one.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if func is not torch.ops.aten.add.Tensor or not in_backward:
        return func
    one, other = args
    alike = isinstance(other, Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    return torch.ops.aten.add_.Tensor if alike else func


@contextmanager
def _of_the_whole(tracker: MemTracker) -> Iterator[None]:
    """Peaks of the whole stage alone: those of each module took as long as all else, with adapters longer."""
    modules, tracker.memory_tracking = tracker.memory_tracking, WeakIdKeyDictionary()
    try:
        yield
    finally:
        tracker.memory_tracking = modules


class _Tracker(MemTracker):
    """PyTorch's, of a model that each rank holds whole."""

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer, unit: Unit) -> None:
        super().__init__()
        self.logits, self.copies = _Logits(stage, unit), _Copies()
        of_none = torch.zeros(1, requires_grad=True)
        for weight in stage.parameters():
            if not weight.requires_grad:  # PyTorch's would wait for its gradient
                handles = of_none.register_hook(_ignored), of_none.register_hook(_ignored)
                self._param_to_grad_hook_handles[weight] = handles
        self.track_external(stage, optimizer, *unit.values())  # type: ignore[arg-type]
        self.part, self.n_passes, self.n_done = "forward", 0, 0
        self.parts: dict[str, Memory] = {}
        blocks = list(stage.backbone.blocks)
        places = ["first", *["between"] * (len(blocks) - 3), "next", "last"][-len(blocks) :]
        for place, block in zip(places, blocks, strict=True):
            block.register_forward_hook(partial(self._at_its_backward, place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(_as_autograd_adds(func, args), types, args, kwargs)
        self.copies.note(func, args, result, self._WINFO)
        return result

    def _at_its_backward(self, place: str, block: nn.Module, given: Any, output: Any) -> None:
        """A part of the step begins when the gradient of a block's output is there."""
        h = output[0] if isinstance(output, tuple) else output

        def begin(_: Tensor) -> None:
            self.n_passes += place == "last"
            self._begin(f"{place} {self.n_passes}")

        if h.requires_grad:
            h.register_hook(begin)

    def _begin(self, part: str) -> None:
        if self._peak_mem:
            found = _parts(self, weights=["Parameter"], gradients=["Gradient"], optimizer=["Optstate"])
            copies = self.copies.at_peak
            found = replace(found, weight_copies=copies, activations=found.activations - copies)
            self.parts[self.part] = max(found, self.parts.get(self.part, found), key=lambda one: one.total)
        self.part, self.logits.at_peak, self.copies.at_peak = part, 0, 0
        self._peak_mem.clear()
        self._peak_mem_snap.clear()

    def after_unit(self) -> None:
        """The next forward pass begins, or what comes after the last one."""
        self.reset_mod_stats()
        self.n_done += 1
        self._begin(f"after {self.n_done}")

    def _update_peak_stats(self, peak_state: Any) -> None:
        before = dict(self._peak_mem)
        with _of_the_whole(self):
            super()._update_peak_stats(peak_state)
        if self._peak_mem != before:
            self.logits.count(self._WINFO)
            self.copies.count(self._WINFO)

    def memory(self) -> dict[str, Memory]:
        """The peak of each part."""
        self._begin("")
        return self.parts


_GRADIENTS = (_FSDPRefType.SHARDED_GRAD, _FSDPRefType.UNSHARDED_GRAD)


class _FSDPTracker(FSDPMemTracker):
    """PyTorch's, of a model that FSDP2 shards."""

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer, unit: Unit) -> None:
        super().__init__(stage, optimizer)
        self.logits, self.summed = _Logits(stage, unit), 0
        self.sharded = [module for module in stage.modules() if hasattr(module, "_get_fsdp_state")]
        self.track_inputs(tuple(unit.values()))

    def _update_peak_stats(self, peak_state: Any) -> None:
        before = dict(self._peak_mem)
        with _of_the_whole(self):
            super()._update_peak_stats(peak_state)
        if self._peak_mem != before:
            self.logits.count(self._WINFO)
            self.summed = sum(map(self._summed, self.sharded))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(_as_autograd_adds(func, args), types, args, kwargs)

    def _summed(self, module: Any) -> int:
        """Bytes of a block's whole gradients that PyTorch's tracker takes for temporary tensors."""
        group = module._get_fsdp_state()._fsdp_param_group
        found = 0
        for one in group.fsdp_params if group else ():
            whole = getattr(one, "_unsharded_param", None)
            for gradient in (one.unsharded_accumulated_grad, whole is not None and whole.grad):
                if isinstance(gradient, Tensor):
                    for storage in get_untyped_storages(gradient):
                        info, _ = self._WINFO.get(storage, (None, None))
                        if info is not None and info.reftype not in _GRADIENTS:
                            found += info.mem_consumed
        return found

    def after_unit(self) -> None:
        """Nothing, but for what PyTorch's tracker needs."""
        self.reset_mod_stats()

    def memory(self) -> dict[str, Memory]:
        """The peak."""
        found = _parts(
            self,
            weights=["Sharded Param"],
            gradients=["Sharded Grad", "Unsharded Grad"],
            optimizer=["OptState"],
            gathered_blocks=["Unsharded Param", "All Gather"],
            exchange_buffers=["Reduce Scatter"],
        )
        summed = {"gradients": found.gradients + self.summed, "activations": found.activations - self.summed}
        return {"step": replace(found, **summed)}


def _parts(tracker: _Tracker | _FSDPTracker, **kinds: list[str]) -> Memory:
    """A tracker's peak; what is not one of its `kinds`, nor logits, counts as activations."""
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    by_name = {getattr(kind, "value", kind): size for kind, size in peak.items()}
    parts = {part: sum(by_name.get(name, 0) for name in names) for part, names in kinds.items()}
    parts["logits"] = tracker.logits.at_peak
    rest = by_name["Total"] - sum(parts.values())
    nothing = {"gathered_blocks": 0, "exchange_buffers": 0, "weight_copies": 0, "average": 0}
    return Memory(**{**nothing, **parts, "activations": rest})
