"""The plan of a run: its arithmetic against PyTorch's own count, its memory against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plato2.config import ModelConfig
from plato2.model import masks
from plato2.model.backbone import Backbone
from plato2.model.cpu import ROWS_STEP
from plato2.runs import plan as plan_module
from plato2.runs.plan import activation_bytes, plan, step_flops

CONFIG = ModelConfig(n_layer=2, n_head=4, hidden_size=128, vocab_size=1001, dropout=0.0)


def dense_forward(config: ModelConfig, rows: int, length: int, targets: int) -> torch.Tensor:
    """A pass over rows of one sample each, with the dense mask that GPUs take; the sum of some logits."""
    backbone = Backbone(config)
    ids = torch.zeros(rows, length, dtype=torch.long)
    x = backbone.embed(ids, ids, ids)
    h = backbone.encode(x, masks.additive(masks.same_sample(ids + 1), x.dtype))
    return backbone.lm_logits(h.flatten(0, 1)[:targets]).sum()


def test_flops_are_what_pytorch_counts() -> None:
    rows, length, targets = 3, 64, ROWS_STEP  # whole steps: padding is not the model's arithmetic
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused kernel
        dense_forward(CONFIG, rows, length, targets).backward()
    planned = step_flops(CONFIG, rows * length, rows, targets, passes=1)
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-6)


def kept_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes autograd keeps of a pass, and of weights."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = dense_forward(config, rows, length, targets=1)
    total = sum(storages.values())
    loss.backward()
    return total


def test_activations_of_a_layer_are_what_autograd_keeps() -> None:
    length = 128

    def of_two_layers_and_four_rows(count: Callable[[ModelConfig, int], int]) -> int:
        """What two layers more need for four rows more: no weights, no embeddings, no mask."""
        two, four = replace(CONFIG, n_layer=2), replace(CONFIG, n_layer=4)
        return count(four, 8) - count(four, 4) - count(two, 8) + count(two, 4)

    kept = of_two_layers_and_four_rows(lambda config, rows: kept_bytes(config, rows, length))
    planned = of_two_layers_and_four_rows(
        lambda config, rows: activation_bytes(config, rows * length, 1, half=False)
    )
    assert planned == pytest.approx(kept, rel=0.01)


def test_checkpointing_keeps_little_and_ranks_share_what_is_sharded() -> None:
    billions = ModelConfig(n_layer=32, n_head=32, hidden_size=2048)
    whole = activation_bytes(billions, 8192, 1, half=True)
    checkpointed = activation_bytes(replace(billions, checkpoint_activations=True), 8192, 1, half=True)
    assert checkpointed < whole / 6

    def made(sharded: bool) -> int:
        return plan(
            billions,
            parameters=1_632_591_681,
            passes=1,
            ranks=64,
            sharded=sharded,
            half=True,
            unit_tokens=8192,
            batch_tokens=524288,
            steps=200_000,
        ).state

    assert made(sharded=False) == 18 * 1_632_591_681
    assert made(sharded=True) == 16 * 1_632_591_681 // 64


def test_the_papers_stage_1_is_a_sextillion_flop() -> None:
    """1.67e21 FLOP for the 1.6B curriculum, 61 % of them in stage 1, by an independent count."""
    config = ModelConfig(n_layer=32, n_head=32, hidden_size=2048)
    tokens = 200_000 * 524_288
    assert step_flops(config, tokens, tokens // 128, tokens // 5, passes=1) == pytest.approx(1.02e21, rel=0.1)


def test_the_peak_of_a_cpu_is_taken_over_the_time_that_its_threads_have_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not over the time that passes, most of which may be another process's."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(plan_module.time, "process_time", lambda: next(ticks) / 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    plan_module.peak_flops.cache_clear()  # it is measured once a process
    peak = plan_module.peak_flops(torch.device("cpu"), "32-true")
    plan_module.peak_flops.cache_clear()
    assert peak == pytest.approx(2 * 2048**3 / (0.5 / 4))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    plan_module.peak_flops.cache_clear()
    assert plan_module.peak_flops(torch.device("cuda"), "bf16-mixed") == peak
    plan_module.peak_flops.cache_clear()
