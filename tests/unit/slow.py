"""PLATO-2 in plain NumPy and float64: one sample and one token at a time, no masks, no packing.

Written from the paper's equations and Knover's specification (sections 2 to 6), sharing nothing with plato2
but the names of the weights. What the fast code computes has to equal this.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray
CLS, SEP = 1, 2


def gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max()
    return shifted - math.log(np.exp(shifted).sum())


def uniform(key: int, n: int) -> list[float]:
    """splitmix64 with Python's integers: n numbers of a 64-bit key."""
    numbers = []
    for i in range(1, n + 1):
        x = (key + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(((x ^ (x >> 31)) >> 40) / 2**24)
    return numbers


def entropy(logits: Array) -> float:
    """- sum_k p log p with the limit 0 log 0 = 0."""
    total = 0.0
    for p in softmax(np.asarray(logits, dtype=np.float64)):
        if p > 0.0:
            total -= p * math.log(p)
    return total


def gumbel_softmax(logits: Array, u: list[float] | None, tau: float) -> Array:
    """Spec section 5: g = -log(1e-10 - log(u + 1e-10)), y = softmax((logits + g) / tau)."""
    noisy = [float(x) for x in logits]
    for k, each in enumerate(u or []):
        noisy[k] += -math.log(1e-10 - math.log(each + 1e-10))
    return softmax(np.array(noisy) / tau)


class SlowPlato:
    """The three models.

    Args:
        weights: the stage's parameters by name, float64.
        n_layer: blocks.
        n_head: attention heads.
    """

    def __init__(self, weights: dict[str, Array], n_layer: int, n_head: int) -> None:
        self.weights, self.n_layer, self.n_head = weights, n_layer, n_head

    # ---------------------------------------------------------------------------- docs/spec.md, Backbone

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normal = (x - mean) / np.sqrt(variance + 1e-5)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, ids: list[int], n_context: int, roles: list[int] | None = None) -> Array:
        """word + type + position (+ role); positions count over context and response together."""
        vectors = []
        for place, token in enumerate(ids):
            x = self.weights["backbone.word.weight"][token].copy()
            x += self.weights["backbone.token_type.weight"][0 if place < n_context else 1]
            x += self.weights["backbone.position.weight"][place]
            if roles is not None:
                x += self.weights["backbone.role.weight"][roles[place]]
            vectors.append(x)
        return np.array(vectors)

    def attend(self, layer: int, x: Array, n_prefix: int) -> Array:
        """Slots 0..n_prefix-1 see just each other; a later slot sees them and the later ones up to itself."""
        name = f"backbone.blocks.{layer}.attention"
        query, key, value = np.split(self.linear(f"{name}.qkv", x), 3, axis=1)
        size = x.shape[1] // self.n_head
        context = np.zeros_like(x)
        for head in range(self.n_head):
            of_head = slice(head * size, (head + 1) * size)
            for q in range(len(x)):
                n_seen = n_prefix if q < n_prefix else q + 1
                scores = key[:n_seen, of_head] @ query[q, of_head] / math.sqrt(size)
                context[q, of_head] = softmax(scores) @ value[:n_seen, of_head]
        return self.linear(f"{name}.output", context)

    def encode(self, x: Array, n_prefix: int) -> Array:
        for layer in range(self.n_layer):
            name = f"backbone.blocks.{layer}"
            x = x + self.attend(layer, self.norm(f"{name}.attention_norm", x), n_prefix)
            inner = gelu(self.linear(f"{name}.feed_forward_in", self.norm(f"{name}.feed_forward_norm", x)))
            x = x + self.linear(f"{name}.feed_forward_out", inner)
        return self.norm("backbone.final_norm", x)

    def transform(self, name: str, h: Array) -> Array:
        return self.norm(f"{name}.norm", gelu(self.linear(f"{name}.linear", h)))

    def word_nll(self, h: Array, token: int) -> float:
        """-log p(token) of the LM head, tied to the word table."""
        h = self.transform("backbone.lm_transform", h)
        logits = h @ self.weights["backbone.word.weight"].T + self.weights["backbone.lm_bias"]
        return -log_softmax(logits)[token]

    # --------------------------------------------------------------------------------------------- the stages

    def coarse(self, context: list[int], response: list[int], roles: list[int] | None = None) -> list[float]:
        """Equation 1: -log p(r_t | c, r_<t) of each response id after [CLS]."""
        ids = [*context, *response][:-1]
        h = self.encode(self.embed(ids, len(context), roles), n_prefix=len(context))
        return [self.word_nll(h[len(context) + t - 1], response[t]) for t in range(1, len(response))]

    def masked(self, context: list[int], response: list[int], sees_eos: bool) -> Array:
        """The output of [MASK]'s slot, which has neither type nor position and sees all of (c, r)."""
        ids = [*context, *response] if sees_eos else [*context, *response][:-1]
        front = self.weights["backbone.word.weight"][-1]
        x = np.vstack([front, self.embed(ids, len(context))])
        return self.encode(x, n_prefix=len(x))[0]

    def posterior_logits(self, context: list[int], response: list[int], sees_eos: bool) -> Array:
        """Equation 3."""
        h = self.masked(context, response, sees_eos)
        bias = self.weights["recognition.bias"]
        if "recognition.classifier.weight" in self.weights:  # the paper: W1 h + b1
            return self.weights["recognition.classifier.weight"] @ h + bias
        h = np.tanh(self.linear("recognition.transform", h))  # Knover: tanh, then the latent table itself
        return h @ self.weights["recognition.latent_embedding"] + bias

    def fine(
        self, context: list[int], response: list[int], u: list[float] | None, tau: float, sees_eos: bool
    ) -> dict[str, Any]:
        """Equations 2 to 5: nll and bag-of-words loss of each response id after [CLS], posterior entropy."""
        logits = self.posterior_logits(context, response, sees_eos)
        z = gumbel_softmax(logits, u, tau)
        latent = self.weights["recognition.latent_embedding"] @ z
        ids = [*context, *response] if sees_eos else [*context, *response][:-1]
        x = np.vstack([latent, self.embed(ids, len(context))])
        h = self.encode(x, n_prefix=1 + len(context))
        if "bag_of_words.classifier.weight" in self.weights:  # the paper: f = softmax(W2 h_z + b2)
            words = self.weights["bag_of_words.classifier.weight"] @ h[0]
        else:
            words = self.weights["backbone.word.weight"] @ self.transform("bag_of_words.transform", h[0])
        log_f = log_softmax(words + self.weights["bag_of_words.bias"])
        return {
            "nll": [self.word_nll(h[len(context) + t], response[t]) for t in range(1, len(response))],
            "bow": [-log_f[response[t]] for t in range(1, len(response))],
            "entropy": entropy(logits),
            "posterior": softmax(logits),
        }

    def selection(self, context: list[int], response: list[int]) -> float:
        """PLATO's equation 7: p(l=1|c,r)."""
        h = self.masked(context, response, sees_eos=False)
        w, b = (self.weights[f"coherence.classifier.{part}"] for part in ("weight", "bias"))
        return 1.0 / (1.0 + math.exp(-(float(w[0] @ h) + float(b[0]))))

    def evaluation(
        self, context: list[int], response: list[int], label: int, masked: dict[int, int]
    ) -> dict[str, Any]:
        """Equations 8 and 9: -log p(l|c,r) and -log p(x_m | c, r without x_m) of each masked token.

        Args:
            context: ids.
            response: ids, with the last [SEP].
            label: 1 = the true response.
            masked: what the model reads in place of the token, by place.
        """
        clean = [*context, *response]
        ids = [masked.get(place, token) for place, token in enumerate(clean)]
        h = self.encode(self.embed(ids, len(context)), n_prefix=len(ids))
        pooled = np.tanh(self.linear("coherence.pool", h[0]))
        log_p = log_softmax(self.linear("coherence.classifier", pooled))
        return {
            "rce": -log_p[label],
            "mlm": [self.word_nll(h[place], clean[place]) for place in sorted(masked)],
            "p": np.exp(log_p),
        }
