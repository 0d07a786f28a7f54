"""Stage 2.1, fine-grained generation: p(r|c,z), z a discrete latent speech act (section 2.1, equations 2-6).

Two passes through one backbone over the same rows. Recognition reads context and response with [MASK] in the
front slot and estimates p(z|c,r); generation has the sampled latent in the front slot.
"""

from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from plato2.config import ModelConfig, OptimConfig, UserError
from plato2.model import losses
from plato2.model.backbone import put_front
from plato2.model.heads import BagOfWords, Recognition
from plato2.model.noise import uniform
from plato2.stages.base import Stage, Unit

COLLAPSED_BELOW = 1.5
"""Fewer effective latents than this over a validation is a collapsed z: the model ignores it."""


class LatentUsage(Metric):
    """How much of the posterior mass each latent gets over a validation: (K,), sums to 1."""

    mass: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.add_state("mass", torch.zeros(n_latent), dist_reduce_fx="sum")

    def update(self, posterior: Tensor) -> None:
        """Adds the posteriors (N, K) of a unit."""
        self.mass += posterior.sum(dim=0)

    def compute(self) -> Tensor:
        """The share of each latent."""
        return self.mass / self.mass.sum().clamp(min=1e-9)


class FineGeneration(Stage):
    """L = L_NLL + L_BOW (equation 6).

    Args:
        tau: Gumbel-softmax temperature, fixed (spec section 5).
        validation_noise: `fixed` = the same Gumbel noise for a sample in every validation; `none` = no noise.
            Knover draws new noise each time, so that its validation losses are stochastic.
        recognition_head: `tied` = Knover's, the classifier is the latent table; `linear` = the paper's text.
        bow_head: `tied` = Knover's, through the word table; `linear` = the paper's text.
    """

    name = "2_gen"
    loss_terms: ClassVar[dict[str, str]] = {"nll": "targets", "bow": "targets"}
    metric_terms: ClassVar[dict[str, str]] = {"z_entropy": "samples"}
    warm_starts_from = ("1_coarse", "2_gen")
    monitor = ("val/nll", "min")
    passes = 2

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any] | None = None,
        seed: int = 11,
        tau: float = 0.67,
        validation_noise: Literal["fixed", "none"] = "fixed",
        recognition_head: Literal["tied", "linear"] = "tied",
        bow_head: Literal["tied", "linear"] = "tied",
    ) -> None:
        super().__init__(model, optim, seed)
        if tau <= 0:
            raise UserError(f"stage.tau={tau}: must be positive")
        self.tau, self.validation_noise = tau, validation_noise
        self.recognition = Recognition(self.model_config, recognition_head)
        self.bag_of_words = BagOfWords(self.model_config, bow_head)
        self.latent_usage = LatentUsage(self.model_config.n_latent)
        self.finish_init(
            tau=tau, validation_noise=validation_noise, recognition_head=recognition_head, bow_head=bow_head
        )

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """nll and bow of each target (M,), posterior entropy of each sample (N,)."""
        x = self.embed(unit)
        logits = self.posterior(unit, x)  # (N, K)
        noise = None
        if self.training or self.validation_noise == "fixed":
            noise = uniform(unit["sample_key"], self.model_config.n_latent)
        z = losses.gumbel_softmax(logits, noise, self.tau)  # (N, K), z ~ p(z|c,r)
        if not self.training:
            self.latent_usage.update(logits.float().softmax(dim=-1))
        return {**self.given_latent(unit, x, z), "z_entropy": losses.entropy(logits.detach())}

    def embed(self, unit: Unit) -> Tensor:
        """Embedded rows (B, T, H) for both passes; the front slots are still to be filled."""
        return self.backbone.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"], unit.get("role_ids"))

    def posterior(self, unit: Unit, x: Tensor) -> Tensor:
        """Logits (N, K) of p(z|c,r) (equation 3): [MASK] in the front slot, all of the sample visible."""
        front = unit["sample_index"]
        mask_vector = self.backbone.word.weight[self.model_config.mask_id].expand(len(front), -1)  # (N, H)
        mask = self.backbone.mask(unit["segment_ids"])
        h = self.backbone.encode(put_front(x, front, mask_vector), mask, read=front)  # (N, H)
        return self.recognition(h)

    def given_latent(self, unit: Unit, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """-log p(r_t | c, z, r_<t) (equation 2) and the bag-of-words loss (equation 4) of each target, (M,).

        Args:
            unit: the batch.
            x: (B, T, H) from `embed`.
            z: (N, K) weights of the latents, a Gumbel-softmax sample or one-hot.
        """
        front = unit["sample_index"]
        mask = self.backbone.mask(unit["segment_ids"], unit["type_ids"])
        read = torch.cat([front, unit["target_index"]])
        h = self.backbone.encode(put_front(x, front, self.recognition.latent(z)), mask, read=read)
        h_z, h_r = h.split([len(front), len(unit["target_index"])])  # (N, H), (M, H)
        logits = self.backbone.lm_logits(h_r)  # (M, V)
        words = self.bag_of_words(h_z, self.backbone.word.weight)  # (N, V), from h_z alone
        return {
            "nll": losses.nll(logits, unit["target_ids"]),
            "bow": losses.bag_of_words(words, unit["target_ids"], unit["target_sample"]),
        }

    def on_validation_epoch_end(self) -> None:
        """Adds the latents' usage: the share of each, and how many are in effect used (exp of entropy)."""
        super().on_validation_epoch_end()
        usage = self.latent_usage.compute()
        self.latent_usage.reset()
        effective = torch.exp(-(usage * usage.clamp(min=1e-9).log()).sum())
        shares = {f"val/z_usage_{latent:02d}": share for latent, share in enumerate(usage)}
        self.log_metrics({"val/z_effective": effective, **shares})
        if effective < COLLAPSED_BELOW and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"z has collapsed at step {self.global_step}: {effective:.2f} of {len(usage)} latents are in "
                "use, so all candidates of a context will be alike. A lower optim.lr, a longer warmup or a "
                "better stage-1 model helps."
            )
