"""What remains of a trained stage that only has to talk: networks without Lightning, losses or optimizer.

Their parameters have the names of the stage's state dict, so one file fits both.
"""

from collections.abc import Mapping
from typing import Protocol, cast

from torch import nn

from plato2.config import Head, ModelConfig
from plato2.model.backbone import Backbone
from plato2.model.heads import AnyCoherence, Latents, coherence_head
from plato2.model.pretrained import build_backbone


class Generator(Protocol):
    """What decoding needs: a `GenerationNetwork`, or a stage of that use which is being trained."""

    model_config: ModelConfig
    backbone: Backbone
    training: bool

    @property
    def recognition(self) -> Latents | None:
        """The latents z, or None of a stage-1 model."""

    @property
    def coherence(self) -> AnyCoherence | None:
        """The head that ranks its own candidates, or None: then an evaluation model does, if any."""


class Evaluator(Protocol):
    """What ranking needs: an `EvaluationNetwork`, a stage that ranks, or a generator that ranks its own."""

    model_config: ModelConfig
    backbone: Backbone
    training: bool

    @property
    def coherence(self) -> AnyCoherence:
        """The head of p(l|c,r)."""


def own_evaluator(generator: Generator) -> Evaluator | None:
    """The generator itself if it ranks its own candidates."""
    return None if generator.coherence is None else cast(Evaluator, generator)


class GenerationNetwork(nn.Module):
    """p(r|c) or p(r|c,z), without the heads that only training needs; with p(l|c,r) if it ranks its own."""

    def __init__(
        self,
        config: ModelConfig,
        has_latents: bool,
        head: Head | None = None,
        figures: Mapping[str, float] | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        self.model_config = config
        self.figures = dict(figures or {})
        """As of an `EvaluationNetwork`."""
        self.backbone = build_backbone(config) if backbone is None else backbone
        self.recognition = Latents(config) if has_latents else None
        self.coherence = None if head is None else coherence_head(config, head)


class EvaluationNetwork(nn.Module):
    """p(l|c,r) alone."""

    def __init__(
        self,
        config: ModelConfig,
        head: Head = "first",
        figures: Mapping[str, float] | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        self.model_config = config
        self.figures = dict(figures or {})
        """What its last validation measured, see talk/selection.py; empty if nothing is known."""
        self.backbone = build_backbone(config) if backbone is None else backbone
        self.coherence = coherence_head(config, head)
