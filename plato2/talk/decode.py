"""Contexts to candidates: one reply for each latent z, all in one batch (section 2.2, spec section 9).

1. The prefix of every row, [z] context, is encoded once into a key/value cache. Context attends to the
   latent, so a stage-2.1 model has a prefix for each (context, latent); the samples of a stage-1 model share
   the one of their context.
2. [CLS] and then token after token goes through the cache. Each row samples among its top k tokens with
   random numbers that are a function of (seed, context, candidate) alone, whatever else is in the batch.
3. Rows that have ended leave the batch when they are a quarter of it; all done, or `max_tokens`: stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from plato2.config import DecodeConfig, UserError
from plato2.data.samples import role_ids
from plato2.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from plato2.model import masks
from plato2.model.backbone import KeyValueCache, put_front
from plato2.model.heads import Latents
from plato2.model.networks import Generator
from plato2.model.noise import uniform

LEAVE_AT = 0.25
"""Share of ended rows at which they leave the batch: moving the cache costs about as much as a step."""


@dataclass(frozen=True)
class Hypothesis:
    """One generated response, as ids."""

    token_ids: tuple[int, ...]
    """Tokens after [CLS]; the last one is [SEP] unless `max_tokens` came first."""
    latent: int | None
    """z, or None from a stage-1 model."""
    log_prob: float
    """Mean log-probability of the tokens, [SEP] included (Knover's decode_score)."""

    @property
    def words(self) -> tuple[int, ...]:
        """The tokens without the final [SEP]."""
        return self.token_ids[:-1] if self.token_ids[-1:] == (EOS_ID,) else self.token_ids


@torch.no_grad()
def decode(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    config: DecodeConfig,
    uniforms: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Candidates of each context: K, one for each latent (stage 2.1), or `n_candidates` samples (stage 1).

    The token probabilities are those of spec section 9: softmax of logits / temperature without [UNK] and
    [MASK], and without [SEP] before `min_tokens`; a token is drawn from the `top_k` best (ties kept) and
    scored in the full softmax.

    Args:
        generator: a generation network, or a `1_coarse` or `2_gen` stage, in evaluation mode.
        contexts: B lists of ids, [CLS] (turn [SEP])*.
        config: how to sample.
        uniforms: (candidates * B, max_tokens) numbers in [0, 1) to sample with, row = candidate * B +
            context; by default a function of `config.seed`, the context and the candidate.

    Raises:
        UserError: context and `max_tokens` are longer than the model's positions.
    """
    if generator.training:
        raise ValueError("decode needs the generator in evaluation mode: generator.eval()")
    n = generator.model_config.n_latent if generator.recognition is not None else config.n_candidates
    if not contexts:
        return []
    _check_length(generator, contexts, config)
    device = generator.backbone.word.weight.device
    if uniforms is None:
        uniforms = uniform(_row_keys(contexts, n, config.seed).to(device), config.max_tokens)
    with torch.autocast(device.type, enabled=False):  # the cache has the weights' own precision
        tokens, log_probs = _generate(generator, contexts, n, config, uniforms.to(device))
    latents: list[int | None] = list(range(n)) if generator.recognition is not None else [None] * n
    return _hypotheses(tokens.cpu(), log_probs.cpu(), len(contexts), latents)


def _generate(
    generator: Generator, contexts: Sequence[Sequence[int]], n: int, config: DecodeConfig, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop: tokens and their log-probabilities, (n * B, steps), meaningless after a row's [SEP]."""
    cache, bias, position = _prefill(generator, contexts, n, config.max_tokens)
    backbone = generator.backbone
    n_rows = len(uniforms)
    rows = torch.arange(n_rows, device=uniforms.device)  # which row of the result each row of the batch is
    ended = torch.zeros_like(rows, dtype=torch.bool)
    tokens = torch.full((n_rows, config.max_tokens), PAD_ID, device=rows.device)
    log_probs = torch.zeros(n_rows, config.max_tokens, device=rows.device)
    token = torch.full_like(rows, BOS_ID)
    for step in range(config.max_tokens):
        x = _embed_response(generator, token, position)  # (rows, 1, H)
        h = backbone.encode(x, bias[..., : cache.length + 1], cache)  # (rows, 1, H)
        full = _log_probs(backbone.lm_logits(h[:, 0]), generator, config, step)  # (rows, V)
        token = choose(full, config.top_k, uniforms[rows, step])
        tokens[rows, step] = token
        log_probs[rows, step] = full.gather(1, token[:, None])[:, 0]
        position = position + 1
        ended |= token == EOS_ID
        n_ended = int(ended.sum())
        if n_ended == len(rows):
            break
        if n_ended >= LEAVE_AT * len(rows):
            going = (~ended).nonzero()[:, 0]
            cache.keep(going)
            rows, token, position, bias = rows[going], token[going], position[going], bias[going]
            ended = ended[going]
    return tokens[:, : step + 1], log_probs[:, : step + 1]


def _prefill(
    generator: Generator, contexts: Sequence[Sequence[int]], n: int, max_tokens: int
) -> tuple[KeyValueCache, Tensor, Tensor]:
    """Encodes all prefixes.

    Returns:
        The cache; the additive mask (rows, 1, 1, prefix + max_tokens) over its slots, where the padding
        between a short context and its response is shut; the position (rows,) of [CLS].
    """
    backbone = generator.backbone
    device = backbone.word.weight.device
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    width = int(lengths.max())
    padded = [[*context, *[PAD_ID] * (width - len(context))] for context in contexts]
    token_ids = torch.tensor(padded, device=device)
    slot = torch.arange(width, device=device)
    visible = slot < lengths[:, None]  # (B, width)
    roles = None
    if backbone.role is not None:
        found = [torch.from_numpy(role_ids(context, width)) for context in contexts]
        roles = torch.stack(found).to(device) * visible
    x = backbone.embed(token_ids, torch.zeros_like(token_ids), slot * visible, roles)  # (B, width, H)
    shared = n  # candidates that have the same prefix
    if generator.recognition is not None:
        x, visible, shared = _with_latents(generator.recognition, x, n), _front(visible).repeat(n, 1), 1
    n_prefix, length = x.shape[0], x.shape[1] + max_tokens
    cache = KeyValueCache(generator.model_config, n_prefix, length, device, x.dtype)
    look = visible[:, None, :].expand(-1, x.shape[1], -1)
    backbone.encode(x, masks.additive(look, x.dtype), cache)
    if shared > 1:
        cache.keep(torch.arange(n_prefix, device=device).repeat(shared))
        visible = visible.repeat(shared, 1)
    response = visible.new_ones(len(visible), max_tokens)
    bias = masks.additive(torch.cat([visible, response], dim=1)[:, None, :], x.dtype)
    return cache, bias, lengths.repeat(n)


def _with_latents(recognition: Latents, x: Tensor, n: int) -> Tensor:
    """Every context behind every latent's vector: (B, T, H) -> (K * B, 1 + T, H), row = z * B + b."""
    z = torch.eye(n, device=x.device, dtype=x.dtype)  # one-hot
    vectors = recognition.latent(z).repeat_interleave(len(x), dim=0)  # (K * B, H)
    rows = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1).repeat(n, 1, 1)
    front = torch.arange(len(rows), device=x.device) * rows.shape[1]
    return put_front(rows, front, vectors)


def _front(visible: Tensor) -> Tensor:
    """The front slot is always seen: (B, T) -> (B, 1 + T)."""
    return torch.cat([visible.new_ones(len(visible), 1), visible], dim=1)


def _embed_response(generator: Generator, token: Tensor, position: Tensor) -> Tensor:
    """Response tokens have type 1 and role 0: (rows,), (rows,) -> (rows, 1, H)."""
    token, position = token[:, None], position[:, None]
    zeros = torch.zeros_like(token)
    return generator.backbone.embed(token, zeros + 1, position, zeros)


def _log_probs(logits: Tensor, generator: Generator, config: DecodeConfig, step: int) -> Tensor:
    """log softmax(logits / temperature) without the tokens that are forbidden at this step: (rows, V)."""
    logits = logits.float()
    logits[:, [UNK_ID, generator.model_config.mask_id]] = float("-inf")
    if step < config.min_tokens:
        logits[:, EOS_ID] = float("-inf")
    return (logits / config.temperature).log_softmax(dim=-1)


def choose(log_probs: Tensor, top_k: int, uniforms: Tensor) -> Tensor:
    """Draws one token a row among those at least as probable as the k-th best (ties are kept).

    Args:
        log_probs: (rows, V).
        top_k: k; 1 takes the most probable token.
        uniforms: (rows,) in [0, 1): the point of the cumulative distribution, in the order of the ids.

    Returns:
        (rows,) token ids.
    """
    if top_k == 1:
        return log_probs.argmax(dim=-1)
    least = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1).values[:, -1:]
    kept = torch.where(log_probs >= least, log_probs, float("-inf")).double().exp()
    cumulative = kept.cumsum(dim=-1)  # in double u * total < total, so the token found is one of those kept
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _row_keys(contexts: Sequence[Sequence[int]], n: int, seed: int) -> Tensor:
    """(n * B,) int64 keys, a hash of seed, context and candidate number."""
    texts = [" ".join(map(str, context)) for context in contexts]
    rows = (f"{seed}/{candidate}/{text}".encode() for candidate in range(n) for text in texts)
    keys = [int.from_bytes(blake2b(row, digest_size=8).digest(), "big", signed=True) for row in rows]
    return torch.tensor(keys)


def _check_length(generator: Generator, contexts: Sequence[Sequence[int]], config: DecodeConfig) -> None:
    longest, limit = max(len(context) for context in contexts), generator.model_config.max_position
    if longest + config.max_tokens > limit:
        raise UserError(
            f"max_tokens={config.max_tokens}: with a context of {longest} tokens that is more than the "
            f"model's {limit} positions; use at most {max(limit - longest, 0)} or a shorter context"
        )


def _hypotheses(
    tokens: Tensor, log_probs: Tensor, n_contexts: int, latents: Sequence[int | None]
) -> list[list[Hypothesis]]:
    """Cuts every row after its [SEP]; the candidates of each context in the order of their latents."""
    is_end = tokens == EOS_ID
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, tokens.shape[1])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    means = (log_probs.double() * inside).sum(dim=1) / lengths
    found = [
        Hypothesis(tuple(row[:length]), latents[number // n_contexts], mean)
        for number, (row, length, mean) in enumerate(
            zip(tokens.tolist(), lengths.tolist(), means.tolist(), strict=True)
        )
    ]
    return [found[context::n_contexts] for context in range(n_contexts)]
