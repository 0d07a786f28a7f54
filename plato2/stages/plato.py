"""PLATO, the baseline of the PLATO-2 paper: one network learns to write and to rank in one stage.

Bao et al., 2020, "PLATO: Pre-trained Dialogue Generation Model with Discrete Latent Variable" (ACL 2020,
arXiv:1910.07931). Equation numbers here are those of that paper; section 2 has them all. Two passes through
the one network: a bidirectional one, in which [MASK] sees context and response, recognises z and judges the
response; and one that writes the response given z.

The original starts from BERT, this stage from random weights (docs/train.md has what else differs).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.batch import Unit
from plato2.config import Use
from plato2.stages.fine import FineGeneration


class Plato(FineGeneration):
    """L = L_NLL + L_BOW + L_RS (equation 8), the last one logged as `rce`, as in stage 2.2.

    L_NLL = -E_z sum_t log p(r_t | c, z, r_<t)           (2), z ~ p(z|c,r) = softmax(W1 h_[M] + b1)   (3)
    L_BOW = -E_z sum_t log f_(r_t)                       (4), f = softmax(W2 h_z + b2)                (5)
    L_RS  = -log p(l=1|c,r) - log p(l=0|c,r-)            (6), p(l=1|c,r) = sigmoid(W3 h_[M] + b3)     (7)

    r is the response to c, r- a random one of the corpus. Candidates are written for all K latents, and the
    one of highest p(l=1|c,r) is said: no other model is needed.
    """

    name = "plato"
    use = Use(
        "generation",
        has_latents=True,
        training_only=(*FineGeneration.use.training_only, "recognition.classifier."),
        coherence_head="mask",
    )
    loss_terms: ClassVar[dict[str, str]] = {"nll": "targets", "bow": "targets", "rce": "samples"}
    metric_terms: ClassVar[dict[str, str]] = {"coherence_acc": "samples"}
    validation_terms = ("z_entropy", "nll_uniform")
    warm_starts_from = ("plato",)
    monitor = ("val/loss", "min")

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """nll and bow of each target (M,); rce and accuracy of each true and random response (N + R,).

        In validation also what stage 2.1 has: posterior entropy (N,), nll of each target given any latent.
        """
        x = self.backbone.embed_unit(unit)  # (B, T, H), for both passes
        true, random = unit["sample_index"], unit["random_index"]  # (N,), (R,) front slots
        h = self.backbone.encode_masked(unit, x, torch.cat([true, random]))  # (N + R, H)
        terms = self.given_posterior(unit, x, self.recognition(h[: len(true)]))  # of the true responses alone
        if self.training:
            del terms["z_entropy"]  # a mean over N, while the samples of a step are N + R
        assert self.coherence is not None
        logits = self.coherence(h).float()  # (N + R, 2)
        labels = torch.arange(len(h), device=h.device).lt(len(true)).long()  # 1 = true
        return terms | {
            "rce": F.cross_entropy(logits, labels, reduction="none"),  # a true one's and a random one's term
            "coherence_acc": (logits.detach().argmax(dim=-1) == labels).float(),
        }
