"""What stages 2.1 and 2.2 add to the backbone: latent and recognition, bag of words, coherence."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plato2.config import ModelConfig
from plato2.model.backbone import TokenTransform, whole_steps

Head = Literal["first", "dual"]
SCALE = 20.0
"""Of a cosine before the softmax of a dual head, at the start: a temperature of 0.05."""


class Latents(nn.Module):
    """The K latent vectors z."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.latent_embedding = nn.Parameter(torch.empty(config.hidden_size, config.n_latent))

    def latent(self, weights: Tensor) -> Tensor:
        """The vectors for the front slots, y Z^T: weights (N, K), soft or one-hot -> (N, H)."""
        return weights.to(self.latent_embedding.dtype) @ self.latent_embedding.t()


class Recognition(Latents):
    """The latents and their recognition p(z|c,r) from the [MASK] slot (equation 3).

    `head="tied"` is Knover: logits = tanh(h W + b) Z + b_z, where the classifier Z is the latent table itself
    (spec section 5). `head="linear"` is the paper's text: logits = W1 h + b1, with a latent table of its own.
    """

    def __init__(self, config: ModelConfig, head: Literal["tied", "linear"] = "tied") -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size) if head == "tied" else None
        self.classifier = (
            nn.Linear(config.hidden_size, config.n_latent, bias=False) if head == "linear" else None
        )
        self.bias = nn.Parameter(torch.empty(config.n_latent))

    def forward(self, h: Tensor) -> Tensor:
        """Posterior logits: (N, H) -> (N, K)."""
        if self.transform is not None:
            return F.linear(torch.tanh(self.transform(h)), self.latent_embedding.t(), self.bias)
        assert self.classifier is not None
        return self.classifier(h) + self.bias


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

    def forward(self, h: Tensor, word_table: Tensor) -> Tensor:
        """(N, H), (V, H) -> logits (N, V)."""
        if self.transform is not None:
            return F.linear(self.transform(whole_steps(h)), word_table, self.bias)[: len(h)]
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
    """p(l|c,r) of a context and a response that were encoded apart, each by the mean of its slots.

    s(c,r) = e^g 20 cos((I + W_c) c, (I + W_r) r), trained by contrast (Henderson et al., 2020,
    arXiv:1911.03688, section 2.2; a bi-encoder in the words of Humeau et al., 2020, arXiv:1905.01969, who
    compare it with reading both together). The identity puts equal words near each other from the start
    (experiments/choices). p(l=1|c,r) = sigmoid(a s + b); a and b are not trained but fitted on validation.
    """

    calibration: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context = nn.Linear(config.hidden_size, config.hidden_size)
        self.response = nn.Linear(config.hidden_size, config.hidden_size)
        self.log_scale = nn.Parameter(torch.empty(()))
        """g; starts at 0."""
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        """(2,) a and b."""

    def vectors(self, context: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
        """Means of slots (N, H), (M, H) -> vectors of length 1, (N, H), (M, H), float32."""
        c, r = context + self.context(context), response + self.response(response)
        return F.normalize(c.float(), dim=-1), F.normalize(r.float(), dim=-1)

    def score(self, cosine: Tensor) -> Tensor:
        """s of cosines, any shape."""
        return SCALE * self.log_scale.exp() * cosine

    def probability(self, score: Tensor) -> Tensor:
        """p(l=1|c,r) of scores s, any shape."""
        scale, bias = self.calibration.to(score.dtype)
        return torch.sigmoid(scale * score + bias)


def coherence_head(config: ModelConfig, head: Head) -> Coherence | DualCoherence:
    """The head of an evaluation model: `first` = Knover's, on the first slot; `dual`."""
    return Coherence(config) if head == "first" else DualCoherence(config)
