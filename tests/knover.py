"""Knover's tiny models as stages of ours, for the tests that compare with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plato2.config import ModelConfig
from plato2.weights.names import is_transposed, knover_names, released_apart

KNOVER = Path(__file__).parent / "fixtures" / "knover"
CONFIG = ModelConfig(n_layer=2, n_head=4, hidden_size=32, n_latent=5, dropout=0.0)


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a fixture file."""
    with np.load(KNOVER / name, allow_pickle=False) as arrays:
        return dict(arrays)


def from_knover(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Knover's arrays under our names, matrices turned; those that are not in `arrays` are left out.

    Query, key and value are apart, as there.
    """
    state = {}
    for ours, theirs in knover_names(CONFIG.n_layer).items():
        if theirs in arrays:
            array = arrays[theirs].T if is_transposed(ours) else arrays[theirs]
            state[ours] = torch.from_numpy(np.ascontiguousarray(array))
    return state


def joined(stage: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a stage from those with query, key and value apart."""
    return {name: torch.cat([state[part] for part in released_apart(name)]) for name in stage.state_dict()}


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or gradients) of ours with query, key and value apart."""
    parts = {name: released_apart(name) for name in state}
    return {
        part: state[name] if len(names) == 1 else state[name].chunk(len(names))[number]
        for name, names in parts.items()
        for number, part in enumerate(names)
    }


def knover_stage(stage_class: type, weights: str, **arguments: Any) -> Any:
    """A stage with the weights of a fixture file, in evaluation mode."""
    stage = stage_class(CONFIG, **arguments)
    state = from_knover(load(weights))
    stage.load_state_dict(joined(stage, state))
    return stage.eval()
