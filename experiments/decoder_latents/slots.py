"""What a decoder's slots know of the record they see, and how far a z put somewhere is heeded; untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from plato2.config import ModelConfig
from plato2.data.examples import read_examples
from plato2.data.samples import encode_response
from plato2.data.tokenizer import Tokenizer
from plato2.data.units import pack
from plato2.model import masks
from plato2.model.backbone import Backbone, last_slots
from plato2.model.pretrained import word_length

SIDE = 10
"""As many contexts and as many responses, each with each."""
AT_ONCE = 16
LENGTHS = (0.3, 1.0, 3.0)
"""Of a vector put where z stands, in lengths of a word."""
Pair = tuple[list[int], list[int]]


def read_pairs(data: Path) -> list[Pair]:
    """Contexts and their responses of the validation split."""
    tokenizer = Tokenizer.load(data / "tokenizer")
    examples = read_examples(data, tokenizer, SIDE)
    limit = max(len(example.reference_ids) for example in examples) + 2
    return [(one.context_ids, encode_response(one.reference_ids, limit)) for one in examples]


@torch.no_grad()
def readings(backbone: Backbone, pairs: Sequence[Pair], mask: str) -> dict[str, dict[str, float]]:
    """Slot -> how much its output differs between records, and what share of that is the response's.

    Each context is read with each response. `spread` is the root of the outputs' variance over their mean
    length; `of_context`, `of_response` and `of_both` are the shares of the variance, as in an analysis of
    variance of two factors.

    Args:
        backbone: of a decoder.
        pairs: contexts and responses.
        mask: `causal`, or `prefix` = all of a record sees all of it. The first slot sees all with both.
    """
    crossed = [(c, r) for (c, _), (_, r) in product(pairs, pairs)]
    found: dict[str, list[Tensor]] = {"first": [], "last": []}
    for start in range(0, len(crossed), AT_ONCE):
        part = crossed[start : start + AT_ONCE]
        unit, order = pack(part, drop_last=True, latent_slot=backbone.config.mask_id)
        segments, first = unit["segment_ids"], unit["sample_index"]
        seen = masks.same_sample(segments)
        if mask == "causal":
            seen = masks.causal(segments).flatten(0, 1)
            seen[first] = masks.same_sample(segments).flatten(0, 1)[first]
            seen = seen.view(*segments.shape, -1)
        x = backbone.embed_unit(unit)
        x = backbone.put_front(x, first, backbone.mask_vector.expand(len(first), -1))
        h = backbone.encode(x, masks.additive(seen, x.dtype), pos_ids=unit["pos_ids"]).flatten(0, 1)
        for slot, index in (("first", first), ("last", last_slots(segments, first))):
            found[slot].append(torch.empty(len(part), h.shape[1]).index_copy(0, order, h[index]))
    return {slot: _variance(torch.cat(h).unflatten(0, (len(pairs), -1))) for slot, h in found.items()}


def _variance(h: Tensor) -> dict[str, float]:
    """(contexts, responses, H) -> see `readings`."""
    mean = h.mean((0, 1))
    total = (h - mean).square().sum((0, 1, 2))
    context = (h.mean(1) - mean).square().sum() * h.shape[1] / total
    response = (h.mean(0) - mean).square().sum() * h.shape[0] / total
    spread = (total / (h.shape[0] * h.shape[1])).sqrt() / h.norm(dim=-1).mean()
    shares = {"of_context": context, "of_response": response, "of_both": 1 - context - response}
    return {"spread": round(float(spread), 4)} | {k: round(float(v), 4) for k, v in shares.items()}


@torch.no_grad()
def heeded(backbone: Backbone, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Place of z -> by how much it changes what is said, for each of `LENGTHS`.

    KL(p(r_t|c,a,r_<t) || p(r_t|c,b,r_<t)) in nats, the mean over tokens, of two random directions a and b.

    Args:
        backbone: of a decoder that reads contexts causally.
        pairs: contexts and responses.
    """
    config = backbone.config
    word = word_length(config) * config.hidden_size**0.5
    found: dict[str, list[float]] = {}
    for place in ("front", "response"):
        found[place] = []
        for length in LENGTHS:
            generator, kls = torch.Generator().manual_seed(0), []
            for start in range(0, len(pairs), AT_ONCE):
                part = list(pairs[start : start + AT_ONCE])
                unit, _ = pack(part, drop_last=True, latent_slot=config.mask_id)
                a, b = (
                    _log_p(backbone, unit, place, _directions(len(part), config, generator) * length * word)
                    for _ in "ab"
                )
                kls.append((a.exp() * (a - b)).nan_to_num(nan=0.0).sum(-1))  # an id that is no word: 0 x nan
            found[place].append(round(float(torch.cat(kls).mean()), 5))
    return found


def _directions(n: int, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """(n, H) vectors of length 1."""
    drawn = torch.randn(n, config.hidden_size, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _log_p(backbone: Backbone, unit: dict[str, Tensor], place: str, z: Tensor) -> Tensor:
    """log p of all words at each target, (M, V), with a vector for each record (N, H) in a place."""
    backbone.config = replace(backbone.config, latent_at=place)
    x, _, mask = backbone.put_latents(unit, backbone.embed_unit(unit), z)  # type: ignore[arg-type]
    h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
    return backbone.lm_logits(h).log_softmax(-1)
