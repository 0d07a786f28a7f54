"""The plan of a run: its arithmetic against PyTorch's own count, its traffic, time and advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plato2.config import ModelConfig
from plato2.model import masks
from plato2.model.backbone import Backbone
from plato2.model.cpu import ROWS_STEP
from plato2.runs import plan as plan_module
from plato2.runs.plan import GIB, GPUS, PAPER, Plan, Terms, Work, step_flops, step_traffic
from plato2.runs.simulate import Memory, Ranks

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


BILLIONS = ModelConfig(n_layer=32, n_head=32, hidden_size=2048)
BLOCKS, REST = 1_611_726_848, 20_864_833
FSDP_64, DDP_64 = Ranks(1, 64, fsdp=True), Ranks(64, 1)


def test_traffic_is_what_the_collectives_of_a_step_move() -> None:
    """FSDP2: bf16 weights twice a pass and unit, float32 gradients once a step; DDP: an all-reduce a step."""
    share = 63 / 64
    one = step_traffic(BLOCKS, REST, 1, 1, FSDP_64)
    assert one == pytest.approx(share * (8 * BLOCKS + 6 * REST))
    whole = step_traffic(BLOCKS, REST, 1, 1, Ranks(1, 64, fsdp=True, half=False))
    assert whole == pytest.approx(share * (12 * BLOCKS + 8 * REST))
    four = step_traffic(BLOCKS, REST, 1, 4, FSDP_64)
    assert four - one == pytest.approx(3 * share * (4 * BLOCKS + 2 * REST))
    two_passes = step_traffic(BLOCKS, REST, 2, 1, FSDP_64)
    assert two_passes - one == pytest.approx(share * 4 * BLOCKS)
    for units in (1, 4):
        assert step_traffic(BLOCKS, REST, 1, units, DDP_64) == pytest.approx(2 * share * 4 * (BLOCKS + REST))
    assert step_traffic(BLOCKS, REST, 1, 4, Ranks()) == 0
    machines = step_traffic(BLOCKS, REST, 1, 1, Ranks(8, 8, fsdp=True))
    inside, between = (
        step_traffic(BLOCKS, REST, 1, 1, Ranks(1, 8, fsdp=True)),
        2 * 7 / 8 * (BLOCKS + REST) / 2,
    )
    assert machines == pytest.approx(inside + between)


def planned(**changes: Any) -> Plan:
    """Stage 2.1 of the paper on 64 ranks, which has room on all GPUs."""
    work = Work("2_gen", 100_000, 65_536, 1024, 512.0, 1.28e15, BLOCKS + REST, BLOCKS, 2, FSDP_64)
    room = {"with_checkpointing": 65_536, "without_checkpointing": 4096}
    memory = Memory(*(float(2**28) for _ in range(9)))
    limits = dict.fromkeys(GPUS, room)
    given: dict[str, Any] = {"memory": memory, "form": "gpu", "checkpointing": True, "largest_unit": limits}
    return Plan("1.6b-2_gen", work, (work,), **{**given, "terms": Terms(0.5, 350.0, 2.0), **changes})


def test_a_step_that_is_too_small_for_its_ranks_is_bound_by_the_network_and_told_the_cures() -> None:
    """Stage 2.1 of the paper: 1,024 tokens a rank, 56 ms of traffic beside 39 of arithmetic on an H100."""
    plan = planned()
    figures = plan.figures()
    assert figures["network_s_per_step"] == pytest.approx(0.055, abs=0.001)
    assert figures["gpus"]["H100-80G"]["arithmetic_s_per_step"] == pytest.approx(0.040, abs=0.001)
    assert {gpu: info["bound_by"] for gpu, info in figures["gpus"].items()} == {
        "L4-24G": "arithmetic",
        "V100-32G": "arithmetic",
        "A100-80G": "arithmetic",
        "H100-80G": "network",
        "H200-141G": "network",
    }
    (said,) = [one for one in figures["advice"] if "traffic" in one]
    assert said.startswith("H100-80G and H200-141G: 1,024 tokens a rank and step are too few for 64 ranks")
    assert "strategy=fsdp strategy.devices=8 data.unit_tokens=8192" in said
    assert "HSDP" in said
    hours = figures["gpus"]["H100-80G"]["hours"]
    assert hours == pytest.approx(100_000 * figures["network_s_per_step"] / 3600)  # not the arithmetic's
    fast = planned(terms=Terms(0.5, 3500.0))
    assert {info["bound_by"] for info in fast.figures()["gpus"].values()} == {"arithmetic"}
    assert not [one for one in fast.advice() if "traffic" in one]


def test_time_and_money_follow_from_the_arithmetic() -> None:
    figures = planned(terms=Terms(0.115, 1e6, 2.0)).figures()
    v100 = figures["gpus"]["V100-32G"]
    assert v100["curriculum_gpu_hours"] == pytest.approx(1.28e20 / (125e12 * 0.115) / 3600)
    assert v100["curriculum_hours"] * 64 == pytest.approx(v100["curriculum_gpu_hours"])
    assert v100["curriculum_cost"] == pytest.approx(2 * v100["curriculum_gpu_hours"])
    assert planned(terms=Terms(0.115, 1e6)).figures()["gpus"]["V100-32G"]["curriculum_cost"] is None
    assert 1.67e21 / (125e12 * PAPER["mfu"]) / 3600 == pytest.approx(PAPER["gpu_hours"], rel=0.01)


def test_what_does_not_fit_is_told_what_would() -> None:
    large = Memory(50 * GIB, 0, 0, 0, 0, 0, 0, 0, 0)
    room = {"with_checkpointing": 4096, "without_checkpointing": 512}
    small = {**dict.fromkeys(GPUS, room), "V100-32G": {"with_checkpointing": 0, "without_checkpointing": 0}}
    assert (
        "V100-32G: a unit of 1,024 tokens does not fit, nor any smaller one; take more devices"
        in planned(memory=large, largest_unit=small).advice()
    )
    plan = planned(memory=large, largest_unit=dict.fromkeys(GPUS, room), checkpointing=False)
    told = "does not fit; model.checkpoint_activations=true makes room"
    assert f"L4-24G and V100-32G: a unit of 1,024 tokens {told}" in (plan.advice())
    unknown = planned(largest_unit=None)
    assert unknown.figures()["largest_unit_tokens"] is None
    assert not [one for one in unknown.advice() if "fit" in one]


def test_a_frozen_base_in_bfloat16_is_told_before_what_costs_time() -> None:
    """Checkpointing costs a third more time; a smaller unit more steps; a V100 has no bf16."""
    room, none = ({"with_checkpointing": n, "without_checkpointing": n // 16} for n in (65_536, 512))
    limits = dict.fromkeys(GPUS, room)
    tight = Memory(30 * GIB, *(0.0,) * 8)
    given: dict[str, Any] = {"memory": tight, "largest_unit": limits, "checkpointing": False}
    told = "L4-24G: a unit of 1,024 tokens does not fit; model.base_dtype=bfloat16"
    assert f"{told} makes room" in planned(**given, half_base={True: 16 * GIB, False: 20 * GIB}).advice()
    assert "L4-24G and V100-32G: a unit of 1,024 tokens does not fit; model.checkpoint_activations=true" in (
        "".join(planned(**given, half_base={True: 16 * GIB, False: 21 * GIB}).advice())
    )
    given["largest_unit"] = dict.fromkeys(GPUS, none)
    advice = planned(**given, half_base={True: 16 * GIB, False: 21 * GIB}).advice()
    assert f"{told} and model.checkpoint_activations=true make room" in advice
    assert any(one.startswith("V100-32G:") and one.endswith("activations=true") for one in advice)
    advice = planned(**given, half_base={True: 21 * GIB, False: 22 * GIB}).advice()
    assert not [one for one in advice if "bfloat16" in one]
    given["memory"] = Memory(19 * GIB, *(0.0,) * 8)
    advice = planned(**given, half_base={True: 8 * GIB, False: 10 * GIB}).advice()
    assert "L4-24G: a unit barely fits; model.base_dtype=bfloat16 takes 9.0 GiB less" in advice


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
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA A40", 149.7e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla T4", 65e12),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    plan_module.peak_flops.cache_clear()
    assert plan_module.peak_flops(torch.device("cuda"), "bf16-mixed") == peak
    plan_module.peak_flops.cache_clear()
