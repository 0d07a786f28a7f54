"""Stage 2.2, response coherence estimation: is r an answer to c? (section 2.1, equations 7-9).

With `head=first`, the paper's and Knover's, the model reads context and response together and the first slot
says whether they belong together. With `head=dual`, which is neither's, it reads them apart and compares two
vectors: it learns from fewer samples, since all responses of a unit are negatives of each context, and ranks
faster, since a context is read once for all its candidates. With `head=pmi`, neither's either, it goes on
writing, and asks how much more probable the context makes the response: what stage 1 has learned ranks from
the first step on, which pays where stage 1 writes well, as a pretrained decoder does.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.batch import Unit, record_numbers
from plato2.config import Head, ModelConfig, OptimConfig, Use, UserError
from plato2.model import losses
from plato2.model.backbone import read_slots
from plato2.model.heads import AnyCoherence, DualCoherence, InformationCoherence, coherence_head
from plato2.stages.base import Stage
from plato2.stages.metrics import Calibration

TERMS: dict[str, tuple[str, ...]] = {
    "first": ("rce", "mlm"),
    "dual": ("contrast", "mlm"),
    "pmi": ("rce", "nll", "nll_alone"),
}
"""The loss of each head."""


class CoherenceEstimation(Stage):
    """L = L_RCE + L_MLM (equation 9), on true responses and random ones of the corpus alike.

    Args:
        head: `first`: L_RCE from the first slot (equation 7). `dual`: a contrastive loss in its place, on
            true responses alone; p(l=1|c,r) is fitted to its score at each validation. `pmi`: L_RCE from
            log p(r|c) - log p(r), and in place of L_MLM what keeps both probabilities true: L_NLL of the own
            responses after their contexts (equation 1) and after none.
    """

    name = "2_eval"
    use = Use("evaluation", training_only=("backbone.lm_",))
    loss_terms: ClassVar[dict[str, str]] = {
        "rce": "samples",
        "contrast": "samples",
        "mlm": "targets",
        "nll": "targets",
        "nll_alone": "targets",
    }
    metric_terms: ClassVar[dict[str, str]] = {"coherence_acc": "samples"}
    warm_starts_from = ("1_coarse", "2_eval")
    monitor = ("val/coherence_acc", "max")
    coherence: AnyCoherence

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
        head: Head = "first",
    ) -> None:
        super().__init__(model, optim, seed)
        if head not in TERMS:
            raise UserError(f"stage.head={head}: choose first, dual or pmi")
        self.head = head
        self.loss_terms = {term: self.loss_terms[term] for term in TERMS[head]}  # type: ignore[misc]
        if head == "pmi":  # it ranks by what it writes
            self.use = Use("evaluation")  # type: ignore[misc]
        self.coherence = coherence_head(self.model_config, head)
        self.fitted = Calibration()
        self.finish_init(head=head)

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """rce and accuracy, or contrast, of each sample (N,), mlm or nll of each target (M,)."""
        if self.head == "pmi":
            return self.read_as_written(unit)
        return self.read_together(unit) if self.head == "first" else self.read_apart(unit)

    def read_together(self, unit: Unit) -> dict[str, Tensor]:
        """`head=first`: rce and accuracy (N,), mlm (M,)."""
        summary, masked = self.summary_slots(unit), unit["target_index"]
        h = self.encode(unit, read=torch.cat([summary, masked]))
        h_summary, h_masked = h.split([len(summary), len(masked)])  # (N, H), (M, H)
        coherence = self.coherence(h_summary)  # (N, 2)
        terms = {
            "rce": F.cross_entropy(
                coherence.float(), unit["coherence_labels"], reduction="none"
            ),  # equation 7
            "mlm": self.masked_words(unit, h_masked),  # equation 8
        }
        if not self.training:  # what ranking does: no masks
            coherence = self.coherence_logits(unit)
        correct = coherence.detach().argmax(dim=-1) == unit["coherence_labels"]
        return terms | {"coherence_acc": correct.float()}

    def read_apart(self, unit: Unit) -> dict[str, Tensor]:
        """`head=dual`: contrast (N,) among the true pairs of the unit, mlm (M,)."""
        parts = _parts(unit)
        h = self.encode(unit, parts=parts)  # (B, T, H)
        scores = self.scores(unit, h)  # (N, N)
        if not self.training:
            clean = scores
            if len(unit["target_ids"]):  # what ranking does: no masks
                whole = unmasked(unit)
                clean = self.scores(whole, self.encode(whole, parts=parts))
            self.fitted.update(*_true_and_other(clean, unit["response_texts"]))
        return {
            "contrast": losses.contrast(scores, unit["response_texts"]),
            "mlm": self.masked_words(unit, read_slots(h, unit["target_index"])),
        }

    def read_as_written(self, unit: Unit) -> dict[str, Tensor]:
        """`head=pmi`: rce and accuracy (N,), means over both responses; nll, nll_alone (K,) of own words."""
        assert isinstance(self.coherence, InformationCoherence)
        mask = self.backbone.mask(unit["segment_ids"], unit["branch_ids"])
        x = self.backbone.embed_unit(unit)  # (B, T, H)
        h = self.backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        nll = losses.nll(self.backbone.lm_logits(h), unit["target_ids"])  # (M,)
        n_records = len(unit["sample_index"])  # 4 N
        sums = nll.new_zeros(n_records).index_add(0, unit["target_sample"], nll)
        log_p = -sums.view(n_records // 4, 2, 2)  # (N, after the context | alone, own response | random one)
        after_context, alone = log_p.unbind(dim=1)  # (N, 2) each
        coherence = self.coherence(after_context, alone)  # (N, 2, 2)
        labels = torch.tensor([1, 0], device=coherence.device).expand(coherence.shape[:2])
        rce = F.cross_entropy(coherence.flatten(0, 1), labels.flatten(), reduction="none")  # equation 7
        correct = coherence.detach().argmax(dim=-1) == labels
        return {
            "rce": rce.view_as(labels).mean(dim=1),
            "nll": nll.index_select(0, unit["own_targets"]),  # equation 1
            "nll_alone": nll.index_select(0, unit["alone_targets"]),
            "coherence_acc": correct.float().mean(dim=1),
        }

    def encode(self, unit: Unit, read: Tensor | None = None, parts: Tensor | None = None) -> Tensor:
        """Each sample, or each of its `parts`, sees itself: (B, T, H), or (M, H) of the slots `read`."""
        mask = self.backbone.mask(unit["segment_ids"] if parts is None else parts)
        x = self.backbone.embed_unit(unit)
        return self.backbone.encode(x, mask, read=read, pos_ids=unit["pos_ids"])

    def masked_words(self, unit: Unit, h: Tensor) -> Tensor:
        """-log p of each masked word from its slot: (M, H) -> (M,)."""
        return losses.nll(self.backbone.lm_logits(h), unit["target_ids"])

    def coherence_logits(self, unit: Unit) -> Tensor:
        """`head=first`: logits of p(l|c,r) on the unmasked tokens, (N, 2), class 1 = coherent."""
        return self.coherence(self.encode(unmasked(unit), read=self.summary_slots(unit)))

    def summary_slots(self, unit: Unit) -> Tensor:
        """The slots that `head=first` reads, (N,): the first ones, of a pretrained decoder the last."""
        return self.backbone.summary_slots(unit["segment_ids"], unit["sample_index"])

    def scores(self, unit: Unit, h: Tensor) -> Tensor:
        """`head=dual`: s(c_i, r_j) of all contexts and responses of a unit: (B, T, H) -> (N, N)."""
        assert isinstance(self.coherence, DualCoherence)
        words, n = self.backbone.words(unit["token_ids"]), len(unit["sample_index"])
        texts = self.coherence.texts(h, words, _parts(unit), 2 * n)  # (2 N, 2 H)
        c, r = self.coherence.vectors(texts[0::2], texts[1::2])
        return self.coherence.score(c @ r.t())

    def on_validation_epoch_end(self) -> None:
        """With `head=dual` fits p(l=1|c,r) to the scores, and measures it on scores it was not fitted to."""
        super().on_validation_epoch_end()
        if isinstance(self.coherence, DualCoherence):
            calibration, accuracy, rce = self.fitted.compute()
            self.fitted.reset()
            self.coherence.calibration.copy_(calibration)
            self.log_metrics({"val/coherence_acc": accuracy, "val/rce": rce})


def unmasked(unit: Unit) -> Unit:
    """The unit as it was before words were masked."""
    tokens = unit["token_ids"]
    whole = tokens.flatten().index_copy(0, unit["target_index"], unit["target_ids"]).view_as(tokens)
    return {**unit, "token_ids": whole}


def _parts(unit: Unit) -> Tensor:
    """(B, T): 1, 3, ... the slots of each context, 2, 4, ... those of each response, 0 padding."""
    return (2 * record_numbers(unit) - 1 + unit["type_ids"]) * (unit["segment_ids"] > 0)


def _true_and_other(scores: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each context's own response and of the next sample's, where that is another text; labels."""
    other = torch.arange(len(texts), device=texts.device).roll(-1)
    differs = texts != texts[other]
    true, false = scores.diagonal(), scores.gather(1, other[:, None])[:, 0]
    scores = torch.stack([true[differs], false[differs]], dim=1).flatten()  # true and other alternate
    return scores.detach().float(), torch.tensor([1.0, 0.0], device=scores.device).repeat(len(scores) // 2)
