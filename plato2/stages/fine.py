"""Stage 2.1, fine-grained generation: p(r|c,z), z a discrete latent speech act (section 2.1, equations 2-6).

Two passes through one backbone over the same rows. Recognition reads context and response with [MASK] in the
front slot and estimates p(z|c,r); generation has the sampled latent in the front slot.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from plato2.batch import Unit
from plato2.config import ModelConfig, OptimConfig, Use, UserError
from plato2.model import losses
from plato2.model.heads import BagOfWords, Recognition
from plato2.model.noise import uniform
from plato2.stages.base import Stage
from plato2.stages.metrics import LatentUsage

COLLAPSED_BELOW = 1.5
"""Effective latents; fewer over a validation, and all samples have the same z."""
SILENT_BELOW = 0.1
"""Nats of mutual information of z with context and response; below it z says nothing about them."""


class FineGeneration(Stage):
    """L = L_NLL + L_BOW (equation 6).

    Args:
        tau: Gumbel-softmax temperature, fixed (docs/spec.md, Stage 2.1).
        validation_noise: `fixed` = the same Gumbel noise for a sample in every validation; `none` = no noise.
            Knover draws new noise each time, so that its validation losses are stochastic.
        recognition_head: `tied` = Knover's, the classifier is the latent table; `linear` = the paper's text.
        bow_head: `tied` = Knover's, through the word table; `linear` = the paper's text.
        recognition_bias: `learned` = both's; `balanced` = all latents are as likely as each other on the mean
            over a unit's samples, for pretrained decoders (see `Recognition`).
    """

    name = "2_gen"
    use = Use(
        "generation",
        True,
        ("recognition.transform.", "recognition.bias", "recognition.centre", "bag_of_words."),
    )
    loss_terms: ClassVar[dict[str, str]] = {"nll": "targets", "bow": "targets"}
    metric_terms: ClassVar[dict[str, str]] = {"z_entropy": "samples"}
    validation_terms: ClassVar[tuple[str, ...]] = ("nll_uniform",)
    warm_starts_from: ClassVar[tuple[str, ...]] = ("1_coarse", "2_gen")
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
        recognition_bias: Literal["learned", "balanced"] = "learned",
    ) -> None:
        super().__init__(model, optim, seed)
        if tau <= 0:
            raise UserError(f"stage.tau={tau}: must be positive")
        self.tau, self.validation_noise = tau, validation_noise
        self.recognition = Recognition(self.model_config, recognition_head, recognition_bias)
        self.bag_of_words = BagOfWords(self.model_config, bow_head)
        self.latent_usage = LatentUsage(self.model_config.n_latent)
        arguments = {"recognition_bias": recognition_bias} if recognition_bias != "learned" else {}
        self.finish_init(
            tau=tau,
            validation_noise=validation_noise,
            recognition_head=recognition_head,
            bow_head=bow_head,
            **arguments,
        )

    @property
    def between_passes(self) -> Recognition:
        """z is all that the generation pass has from the recognition pass."""
        return self.recognition

    def training_step(self, step: dict[str, Any], step_number: int) -> None:
        """As of any stage; balanced latents stay so."""
        super().training_step(step, step_number)
        if self.recognition.is_balanced:
            self.recognition.follow(self._over_ranks)

    def losses(self, unit: Unit) -> dict[str, Tensor]:
        """nll and bow of each target (M,), posterior entropy of each sample (N,).

        In validation also the nll of each target given any latent: the posterior's z has seen the response,
        talking has only a uniform one.
        """
        x = self.backbone.embed_unit(unit)  # (B, T, H), for both passes
        return self.given_posterior(unit, x, self.posterior(unit, x))

    def given_posterior(self, unit: Unit, x: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The terms of `losses` from the rows (B, T, H) and the logits (N, K) of p(z|c,r)."""
        noise = None
        if self.training or self.validation_noise == "fixed":
            noise = uniform(unit["sample_key"], self.model_config.n_latent)
        z = losses.gumbel_softmax(logits, noise, self.tau)  # (N, K), z ~ p(z|c,r)
        terms = {**self.given_latent(unit, x, z), "z_entropy": losses.entropy(logits.detach())}
        if not self.training:
            self.latent_usage.update(logits.float().softmax(dim=-1))
            terms["nll_uniform"] = self.given_latent(unit, x, self.any_latent(unit))["nll"]
        return terms

    def posterior(self, unit: Unit, x: Tensor) -> Tensor:
        """Logits (N, K) of p(z|c,r) (equation 3): [MASK] in the front slot, all of the sample visible."""
        return self.recognition(self.backbone.encode_masked(unit, x, unit["sample_index"]))

    def any_latent(self, unit: Unit) -> Tensor:
        """A latent for each sample as talking gives it, uniform and one-hot: (N, K), the same each time."""
        k = self.model_config.n_latent
        u = uniform(unit["sample_key"], k + 1)[:, k].double()  # the first K are the sample's Gumbel noise
        return torch.eye(k, device=u.device)[(u * k).long()]

    def given_latent(self, unit: Unit, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """-log p(r_t | c, z, r_<t) (equation 2) and the bag-of-words loss (equation 4) of each target, (M,).

        Args:
            unit: the batch.
            x: (B, T, H) from `embed`.
            z: (N, K) weights of the latents, a Gumbel-softmax sample or one-hot.
        """
        x, slots, mask = self.backbone.put_latents(unit, x, self.recognition.latent(z))
        read = torch.cat([slots, unit["target_index"]])
        h = self.backbone.encode(x, mask, read=read, pos_ids=unit["pos_ids"])
        h_z, h_r = h.split([len(slots), len(unit["target_index"])])  # (N, H), (M, H)
        logits = self.backbone.lm_logits(h_r)  # (M, V)
        words = self.bag_of_words(h_z, self.backbone)  # (N, V), from h_z alone
        return {
            "nll": losses.nll(logits, unit["target_ids"]),
            "bow": losses.bag_of_words(words, unit["target_ids"], unit["target_sample"]),
        }

    def on_validation_epoch_end(self) -> None:
        """Adds what the latents say, how many are in use (see `LatentUsage`) and the share of each."""
        super().on_validation_epoch_end()
        usage = self.latent_usage.compute()
        self.latent_usage.reset()
        shares = usage.shares.reshape(-1)  # (K,): torchmetrics makes a number of a single one
        self.log_metrics(
            {
                "val/z_mutual_information": usage.mutual_information,
                "val/z_effective": usage.effective,
                "val/z_in_use": usage.in_use,
                **{f"val/z_usage_{latent:02d}": share for latent, share in enumerate(shares)},
            }
        )
        # Both, because each misses the other's case: uniform posteriors have K effective latents that say
        # nothing, and where one latent takes 95 % of the samples 0.3 nats may be left, but no choice.
        useless = usage.effective < COLLAPSED_BELOW or usage.mutual_information < SILENT_BELOW
        if useless and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"step {self.global_step}: z says next to nothing about the response "
                f"({usage.mutual_information:.2f} of at most {math.log(len(shares)):.2f} nats, "
                f"{usage.effective:.1f} of {len(shares)} latents in effect used), so the candidates "
                "for a context differ only by sampling. Early in training that is usual; if it persists, a "
                "lower optim.lr, a longer warmup or a better stage-1 model helps."
            )
