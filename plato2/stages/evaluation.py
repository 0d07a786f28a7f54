"""Stage 2.2, response coherence estimation: is r an answer to c? (section 2.1, equations 7-9)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.config import ModelConfig, OptimConfig
from plato2.model import losses
from plato2.model.heads import Coherence
from plato2.stages.base import Stage, Unit


class CoherenceEstimation(Stage):
    """L = L_RCE + L_MLM (equation 9), on true responses and random ones of the corpus alike."""

    name = "2_eval"
    loss_terms: ClassVar[dict[str, str]] = {"rce": "samples", "mlm": "targets"}
    metric_terms: ClassVar[dict[str, str]] = {"coherence_acc": "samples"}
    warm_starts_from = ("1_coarse", "2_eval")
    monitor = ("val/coherence_acc", "max")

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
    ) -> None:
        super().__init__(model, optim, seed)
        self.coherence = Coherence(self.model_config)
        self.finish_init()

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """rce and accuracy of each (context, response) (N,), mlm of each masked token (M,)."""
        first, masked = unit["sample_index"], unit["target_index"]
        h = self.encode(unit, unit["token_ids"], read=torch.cat([first, masked]))
        h_first, h_masked = h.split([len(first), len(masked)])  # (N, H), (M, H)
        coherence = self.coherence(h_first)  # (N, 2)
        words = self.backbone.lm_logits(h_masked)  # (M, V)
        terms = {
            "rce": F.cross_entropy(
                coherence.float(), unit["coherence_labels"], reduction="none"
            ),  # equation 7
            "mlm": losses.nll(words, unit["target_ids"]),  # equation 8
        }
        if not self.training:  # what ranking does: no masks
            coherence = self.coherence_logits(unit)
        correct = coherence.detach().argmax(dim=-1) == unit["coherence_labels"]
        return terms | {"coherence_acc": correct.float()}

    def encode(self, unit: Unit, token_ids: Tensor, read: Tensor | None = None) -> Tensor:
        """The whole of each sample sees itself: (B, T) -> (B, T, H), or (M, H) of the slots `read`."""
        x = self.backbone.embed(token_ids, unit["type_ids"], unit["pos_ids"], unit.get("role_ids"))
        return self.backbone.encode(x, self.backbone.mask(unit["segment_ids"]), read=read)

    def coherence_logits(self, unit: Unit) -> Tensor:
        """Logits of p(l|c,r) on the unmasked tokens: (N, 2), class 1 = coherent."""
        tokens = unit["token_ids"]
        clean = tokens.flatten().index_copy(0, unit["target_index"], unit["target_ids"]).view_as(tokens)
        return self.coherence(self.encode(unit, clean, read=unit["sample_index"]))
