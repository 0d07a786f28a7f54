"""Which candidate is said: the one the evaluation model finds most coherent, p(l=1|c,r) (section 2.2).

Without an evaluation model it is the one with the highest length-averaged log-probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plato2.data.samples import encode_response, role_ids
from plato2.data.tokenizer import PAD_ID, Tokenizer
from plato2.model.networks import Evaluator
from plato2.talk.decode import Hypothesis


@dataclass(frozen=True)
class Candidate:
    """One possible reply and its scores."""

    text: str
    token_ids: tuple[int, ...]
    """Without [CLS] and [SEP]."""
    latent: int | None
    """z, or None from a stage-1 model."""
    log_prob: float
    """Mean log-probability of a token, the end included."""
    coherence: float | None
    """p(l=1|c,r), or None without an evaluation model."""

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        return self.log_prob if self.coherence is None else self.coherence


def rank(
    tokenizer: Tokenizer,
    contexts: Sequence[Sequence[int]],
    hypotheses: Sequence[Sequence[Hypothesis]],
    evaluation: Evaluator | None = None,
) -> list[list[Candidate]]:
    """The candidates of each context, best first.

    Args:
        tokenizer: turns ids into text.
        contexts: B lists of ids, [CLS] (turn [SEP])*.
        hypotheses: what `decode` found for each of them.
        evaluation: an evaluation network or a `2_eval` stage in evaluation mode; None: by log-probability.
    """
    scores: list[list[float | None]] = [[None] * len(found) for found in hypotheses]
    if evaluation is not None:
        pairs = [
            (context, hypothesis.words)
            for context, found in zip(contexts, hypotheses, strict=True)
            for hypothesis in found
        ]
        flat = iter(coherence(evaluation, pairs))
        scores = [[next(flat) for _ in found] for found in hypotheses]
    ranked = []
    for found, values in zip(hypotheses, scores, strict=True):
        candidates = [
            Candidate(_text(tokenizer, h.words), h.words, h.latent, h.log_prob, value)
            for h, value in zip(found, values, strict=True)
        ]
        ranked.append(sorted(candidates, key=lambda candidate: candidate.score, reverse=True))
    return ranked


@torch.no_grad()
def coherence(evaluation: Evaluator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """p(l=1|c,r) of every (context, response) in one batch, nothing masked (equation 8).

    Args:
        evaluation: an evaluation network, or a `2_eval` stage, in evaluation mode.
        pairs: context ids [CLS] (turn [SEP])*, and response ids without [CLS] and [SEP]. A response that does
            not fit into the model's positions is cut on the right.
    """
    if evaluation.training:
        raise ValueError("coherence needs the evaluator in evaluation mode: evaluation.eval()")
    if not pairs:
        return []
    device = evaluation.backbone.word.weight.device
    unit = {key: value.to(device) for key, value in _unit(evaluation, pairs).items()}
    with torch.autocast(device.type, enabled=False):
        backbone = evaluation.backbone
        x = backbone.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"], unit.get("role_ids"))
        h = backbone.encode(x, backbone.mask(unit["segment_ids"]), read=unit["sample_index"])  # (N, H)
        logits = evaluation.coherence(h)  # (N, 2)
    return logits.float().softmax(dim=-1)[:, 1].tolist()


def _unit(evaluation: Evaluator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """One record a row, padded on the right: what the evaluation model reads."""
    limit = evaluation.model_config.max_position
    context_len = torch.tensor([len(context) for context, _ in pairs])
    records = [
        [*context, *encode_response(response, max(limit - len(context), 1))] for context, response in pairs
    ]
    lengths = torch.tensor([len(record) for record in records])
    width = int(lengths.max())
    slot = torch.arange(width)
    real = slot < lengths[:, None]
    unit = {
        "token_ids": torch.tensor([record + [PAD_ID] * (width - len(record)) for record in records]),
        "type_ids": ((slot >= context_len[:, None]) & real).long(),
        "pos_ids": slot * real,
        "segment_ids": real.long(),
        "sample_index": torch.arange(len(pairs)) * width,
    }
    if evaluation.backbone.role is not None:
        found = [torch.from_numpy(role_ids(context, width)) for context, _ in pairs]
        unit["role_ids"] = torch.stack(found) * real
    return unit


def _text(tokenizer: Tokenizer, words: Sequence[int]) -> str:
    """Text of a response; special ids have none."""
    return tokenizer.decode([word for word in words if word > tokenizer.eos_id])
