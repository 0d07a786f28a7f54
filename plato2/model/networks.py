"""What remains of a trained stage that only has to talk: networks without Lightning, losses or optimizer.

Their parameters have the names of the stage's state dict, so one file fits both.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from plato2.config import ModelConfig
from plato2.model.backbone import Backbone
from plato2.model.heads import Coherence, DualCoherence, Head, Latents, coherence_head


class Generator(Protocol):
    """What decoding needs: a `GenerationNetwork`, or a stage 1 or 2.1 that is being trained."""

    model_config: ModelConfig
    backbone: Backbone
    training: bool

    @property
    def recognition(self) -> Latents | None:
        """The latents z, or None of a stage-1 model."""


class Evaluator(Protocol):
    """What ranking needs: an `EvaluationNetwork`, or a stage 2.2 that is being trained."""

    model_config: ModelConfig
    backbone: Backbone
    coherence: Coherence | DualCoherence
    training: bool


class GenerationNetwork(nn.Module):
    """p(r|c) of stage 1, or p(r|c,z) of stage 2.1 without the heads that only training needs."""

    def __init__(self, config: ModelConfig, has_latents: bool) -> None:
        super().__init__()
        self.model_config = config
        self.backbone = Backbone(config)
        self.recognition = Latents(config) if has_latents else None


class EvaluationNetwork(nn.Module):
    """p(l|c,r) of stage 2.2."""

    def __init__(
        self, config: ModelConfig, head: Head = "first", figures: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.model_config = config
        self.figures = dict(figures or {})
        """What its last validation measured, see talk/selection.py; empty if nothing is known."""
        self.backbone = Backbone(config)
        self.coherence = coherence_head(config, head)
