"""What every benchmark reports: its ratios beside what the project holds itself to, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any, Literal

import torch

from plato2.runs.parallel import cpu_flags, cpu_info

Target = tuple[Literal[">=", "<="], float]


def report(ratios: Mapping[str, float | None], targets: Mapping[str, Target]) -> dict[str, Any]:
    """`ratios`, `targets` as text, and `met` by name; None where something was not measured."""
    return {
        "ratios": dict(ratios),
        "targets": {name: f"{sign} {value}" for name, (sign, value) in targets.items()},
        "met": {name: met(ratios.get(name), target) for name, target in targets.items()},
    }


def met(value: float | None, target: Target) -> bool | None:
    """Whether a ratio reaches its target; None where it was not measured."""
    sign, limit = target
    if value is None:
        return None
    return value >= limit if sign == ">=" else value <= limit


def machine() -> dict[str, Any]:
    """What was measured on."""
    names = [line.split(":", 1)[1].strip() for line in cpu_info() if line.startswith("model name")]
    shown = ("amx", "avx512_bf16", "avx512f", "avx2", "bf16")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(flag for flag in cpu_flags() if flag.startswith(shown)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
