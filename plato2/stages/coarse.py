"""Stage 1, coarse-grained generation: one response for one context, p(r|c) (section 2.1, equation 1)."""

from typing import Any, ClassVar

from torch import Tensor

from plato2.batch import Unit
from plato2.config import ModelConfig, OptimConfig, Use
from plato2.model import losses
from plato2.stages.base import Stage


class CoarseGeneration(Stage):
    """L_NLL = -sum_t log p(r_t | c, r_<t), the mean over all target tokens of a step (equation 1)."""

    name = "1_coarse"
    use = Use("generation")
    loss_terms: ClassVar[dict[str, str]] = {"nll": "targets"}
    metric_terms: ClassVar[dict[str, str]] = {"acc": "targets"}
    warm_starts_from: ClassVar[tuple[str, ...]] = ("1_coarse",)
    recognition = None
    """No latent (see model/networks.py, `Generator`)."""

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
    ) -> None:
        super().__init__(model, optim, seed)
        self.finish_init()

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """nll and top-1 accuracy of each target: (M,)."""
        x = self.backbone.embed_unit(unit)  # (B, T, H)
        mask = self.backbone.mask(unit["segment_ids"], unit["type_ids"])
        h = self.backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        logits = self.backbone.lm_logits(h)  # (M, V)
        return {
            "nll": losses.nll(logits, unit["target_ids"]),
            "acc": losses.hits(logits, unit["target_ids"]),
        }
