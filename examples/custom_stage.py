"""A stage of one's own: stage 1 with label smoothing. It needs no change of plato2.

    python train.py --config-dir examples/conf stage=smoothed init_from=scratch

trains it (examples/conf/stage/smoothed.yaml names this class), and the run is used like any other:

    plato2 reply --generation outputs/tiny-smoothed/RUN "hi , how was your day ?"
"""

from typing import Any, ClassVar

from torch import Tensor

from plato2.batch import Unit
from plato2.config import ModelConfig, OptimConfig, Use, UserError
from plato2.model import losses
from plato2.stages import Stage


class SmoothedGeneration(Stage):
    """L = (1 - e) L_NLL + e / V sum_w -log p(w): a share e of each target goes to all words alike.

    (Szegedy et al., 2016, arXiv:1512.00567, section 7.)

    Args:
        smoothing: e, from 0 to below 1.
    """

    name = "smoothed"  # of its runs and checkpoints
    use = Use("generation")  # it writes candidates, without latents
    loss_terms: ClassVar[dict[str, str]] = {
        "smoothed": "targets"
    }  # what is summed into the loss, a value each
    metric_terms: ClassVar[dict[str, str]] = {"nll": "targets"}  # what is reported: val/nll and val/ppl
    warm_starts_from = ("1_coarse", "smoothed")
    monitor = ("val/nll", "min")  # what picks best.ckpt
    recognition = None  # no latents (see model/networks.py, `Generator`)

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__(model, optim, seed)
        if not 0.0 <= smoothing < 1.0:
            raise UserError(f"stage.smoothing={smoothing}: must be at least 0 and below 1")
        self.smoothing = smoothing
        self.finish_init(smoothing=smoothing)  # initial weights; what a checkpoint keeps of the arguments

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """smoothed and nll of each target: (M,)."""
        x = self.backbone.embed_unit(unit)  # (B, T, H)
        mask = self.backbone.mask(unit["segment_ids"], unit["type_ids"])
        h = self.backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        logits = self.backbone.lm_logits(h)  # (M, V)
        nll = losses.nll(logits, unit["target_ids"])
        anything = -logits.float().log_softmax(dim=-1).mean(dim=-1)
        smoothed = (1 - self.smoothing) * nll + self.smoothing * anything
        return {"smoothed": smoothed, "nll": nll.detach()}
