"""What stages add to the backbone: latent and recognition, bag of words, coherence."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plato2.config import Head, ModelConfig
from plato2.model import cpu
from plato2.model.backbone import Backbone, TokenTransform, mean_slots

FOLLOWS = 0.1
"""How much of the way to the mean logits of a step their running mean goes."""
FASTER = 100.0
"""Than weights learn the two numbers of a PMI head, which have farther to go."""
SCALE = 20.0
"""Of a cosine before the softmax of a dual head, at the start: a temperature of 0.05."""


class Latents(nn.Module):
    """The K latent vectors z, the table Z (H, K) times `latent_scale`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.latent_scale or 1.0
        self.latent_embedding = nn.Parameter(torch.empty(config.hidden_size, config.n_latent))

    def latent(self, weights: Tensor) -> Tensor:
        """The vectors for the front slots, y Z^T: weights (N, K), soft or one-hot -> (N, H)."""
        return self._scaled(weights.to(self.latent_embedding.dtype) @ self.latent_embedding.t())

    def _scaled(self, x: Tensor) -> Tensor:
        """What was computed with the table, any shape, times `latent_scale`."""
        return x if self.scale == 1.0 else self.scale * x


class Recognition(Latents):
    """The latents and their recognition p(z|c,r) from the [MASK] slot (equation 3).

    `head="tied"` is Knover: logits = tanh(h W + b) Z + b_z, where the classifier Z is the latent table itself
    (docs/spec.md, Stage 2.1). `head="linear"` is the paper's text: logits = W1 h + b1, with a latent table of
    its own.

    `bias="learned"` is both's. Where h is much alike for all samples, as a pretrained decoder's is, what is
    the same in all logits is learned faster than what differs, and few latents take all samples
    (experiments/rates). `bias="balanced"` takes it out: in training each latent's logits have the mean 0 over
    the samples of a unit, so nothing that is the same for all has a gradient; `centre` follows that mean, for
    when there is one sample.
    """

    centre: Tensor

    def __init__(
        self,
        config: ModelConfig,
        head: Literal["tied", "linear"] = "tied",
        bias: Literal["learned", "balanced"] = "learned",
    ) -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size) if head == "tied" else None
        self.classifier = (
            nn.Linear(config.hidden_size, config.n_latent, bias=False) if head == "linear" else None
        )
        self.bias = nn.Parameter(torch.empty(config.n_latent))
        self.is_balanced = bias == "balanced"
        if self.is_balanced:
            self.register_buffer("centre", torch.zeros(config.n_latent, device="cpu"))  # values, also on meta
        self.seen: list[Tensor] = []
        """(K + 1,) of each unit since `follow`: sums of logits, and the number of samples."""

    def forward(self, h: Tensor) -> Tensor:
        """Posterior logits: (N, H) -> (N, K)."""
        if self.transform is not None:
            known = self._scaled(torch.tanh(self.transform(h)))
            logits = F.linear(known, self.latent_embedding.t(), self.bias)
        else:
            assert self.classifier is not None
            logits = self.classifier(h) + self.bias
        if not self.is_balanced:
            return logits
        logits = logits.float()
        if not self.training:
            return logits - self.centre.to(logits.device)
        total = logits.sum(0)  # (K,)
        self.seen.append(torch.cat([total.detach(), total.new_tensor([len(h)])]))
        return logits - total / max(len(h), 1)

    def follow(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Moves `centre` to the mean logits of a step by a tenth of the way.

        Args:
            over_ranks: sums a tensor over all ranks.
        """
        *sums, n = over_ranks(torch.stack(self.seen).sum(0))
        self.seen.clear()
        if n > 0:
            self.centre.lerp_((torch.stack(sums) / n).to(self.centre), FOLLOWS)


class BagOfWords(nn.Module):
    """Predicts every word of the response from the latent's slot alone (equations 4, 5): one row per sample.

    `head="tied"` is Knover: a transform, the word table and a bias; `head="linear"` is the paper's text,
    f = W2 h_z + b2.
    """

    def __init__(self, config: ModelConfig, head: Literal["tied", "linear"] = "tied") -> None:
        super().__init__()
        self.transform = TokenTransform(config.hidden_size) if head == "tied" else None
        self.classifier = (
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) if head == "linear" else None
        )
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, h: Tensor, backbone: Backbone) -> Tensor:
        """(N, H) and the backbone, whose word table it shares -> logits (N, V)."""
        if self.transform is not None:
            return backbone.word_logits(self.transform(cpu.whole_steps(h)), self.bias)[: len(h)]
        assert self.classifier is not None
        return self.classifier(h) + self.bias


class Coherence(nn.Module):
    """p(l|c,r) from the first slot (equation 7): tanh pooling, then two classes; class 1 = coherent."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pool = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, h: Tensor) -> Tensor:
        """(N, H) -> logits (N, 2)."""
        return self.classifier(torch.tanh(self.pool(h)))


class DualCoherence(nn.Module):
    """p(l|c,r) of a context and a response that were encoded apart.

    A text is the sum of two vectors of length 1: the mean of its slots' outputs h, and a weighted mean of its
    words' embeddings e. With the words, texts that share rare ones are near each other from the start, as in
    counting shared words, and what the words mean is learned on top.

        v(c) = norm((I + W_c) mean_t h_t) + norm((I + W) sum_t a_t e_t / sum_t a_t), a_t = sigmoid(w e_t)
        s(c,r) = 20 e^g cos(v(c), v(r)), v(r) with W_r in place of W_c

    s is trained by contrast (Henderson et al., 2020, arXiv:1911.03688, section 2.2; a bi-encoder in the words
    of Humeau et al., 2020, arXiv:1905.01969, who compare it with reading both together). p(l=1|c,r) =
    sigmoid(a s + b); a and b are not trained but fitted on validation.
    """

    calibration: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context = nn.Linear(config.hidden_size, config.hidden_size)
        self.response = nn.Linear(config.hidden_size, config.hidden_size)
        self.words = nn.Linear(config.hidden_size, config.hidden_size)
        self.word_weight = nn.Linear(config.hidden_size, 1)
        self.log_scale = nn.Parameter(torch.empty(1))
        """g; starts at 0."""
        self.register_buffer("calibration", torch.tensor([1.0, 0.0], device="cpu"))  # values, also on meta
        """(2,) a and b."""

    def texts(self, h: Tensor, words: Tensor, parts: Tensor, n: int) -> Tensor:
        """The two means of each text.

        Args:
            h: (B, T, H) outputs of the slots.
            words: (B, T, H) word embeddings of the slots' tokens.
            parts: (B, T) 1..n, the text that a slot belongs to; 0 = none.
            n: how many texts there are.

        Returns:
            (n, 2 H), float32.
        """
        e = F.layer_norm(words, words.shape[-1:])
        a = torch.sigmoid(self.word_weight(e))[..., 0]  # (B, T)
        return torch.cat([mean_slots(h, torch.ones_like(a), parts, n), mean_slots(e, a, parts, n)], dim=-1)

    def vectors(self, contexts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """v of texts (N, 2 H), (M, 2 H): vectors of length 1, (N, H), (M, H), float32."""
        return self._vector(contexts, self.context), self._vector(responses, self.response)

    def _vector(self, texts: Tensor, side: nn.Linear) -> Tensor:
        h, e = texts.chunk(2, dim=-1)

        def turned(x: Tensor, matrix: nn.Linear) -> Tensor:  # the means are float32 whatever the weights are
            return F.normalize((x + matrix(x.to(matrix.weight.dtype))).float(), dim=-1)

        return F.normalize(turned(h, side) + turned(e, self.words), dim=-1)

    def score(self, cosine: Tensor) -> Tensor:
        """s of cosines, any shape."""
        return SCALE * self.log_scale.exp() * cosine

    def probability(self, score: Tensor) -> Tensor:
        """p(l=1|c,r) of scores s, any shape."""
        scale, bias = self.calibration.to(score.dtype)
        return torch.sigmoid(scale * score + bias)


class InformationCoherence(nn.Module):
    """p(l|c,r) of a model that writes: how much more probable r is after c than after nothing.

        p(l=1|c,r) = sigmoid(e^(100 g) i(c,r) + 100 b),  i(c,r) = log p(r|c) - log p(r)

    i is the pointwise mutual information of context and response. Where r is as often the context's own
    response, drawn from p(r|c), as a random one, drawn from p(r), Bayes' rule says p(l=1|c,r) =
    sigmoid(i(c,r)). So g and b start at 0, and learn what the model's probabilities lack. p(r) is what the
    model says of r after [CLS] alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1))
        """g."""
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, after_context: Tensor, alone: Tensor) -> Tensor:
        """log p(r|c) and log p(r) in nats, (...) -> logits (..., 2), of which that of l = 0 is 0."""
        score = (FASTER * self.log_scale).exp() * (after_context - alone) + FASTER * self.bias
        return F.pad(score[..., None], (1, 0))


class MaskCoherence(nn.Module):
    """p(l=1|c,r) = sigmoid(W3 h + b3) from the slot of [MASK], which also recognises z (PLATO, equation 7).

    As two logits, of which that of l = 0 is 0: their softmax is the sigmoid.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(N, H) -> logits (N, 2)."""
        return F.pad(self.classifier(h), (1, 0))


AnyCoherence: TypeAlias = Coherence | DualCoherence | InformationCoherence | MaskCoherence


def coherence_head(config: ModelConfig, head: Head) -> AnyCoherence:
    """The head of p(l|c,r): `first` = Knover's, on the first slot; `dual`; `pmi`; `mask` = PLATO's."""
    if head == "pmi":
        return InformationCoherence()
    if head == "mask":
        return MaskCoherence(config)
    return Coherence(config) if head == "first" else DualCoherence(config)
