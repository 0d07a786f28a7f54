"""Which candidate is said: the one the evaluation model finds most coherent, p(l=1|c,r) (section 2.2).

Without an evaluation model it is the one with the highest length-averaged log-probability. Knover's penalties
put candidates that do not end, or that repeat three words, behind all others (spec section 9).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plato2.data.samples import encode_response, role_ids
from plato2.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer
from plato2.model.networks import Evaluator
from plato2.talk.decode import Hypothesis

PENALTY = 1000.0
"""Taken off the score: more than any two scores differ by."""
N_GRAM = 3
"""So many words in a row must not come twice."""


@dataclass(frozen=True)
class Candidate:
    """One possible reply and its scores."""

    text: str
    token_ids: tuple[int, ...]
    """Without [CLS] and [SEP]."""
    latent: int | None
    """z, or None from a stage-1 model."""
    log_prob: float
    """Mean log-probability of a token, the end included, or as `DecodeConfig.length_penalty` says."""
    coherence: float | None
    """p(l=1|c,r), or None without an evaluation model."""
    penalty: float = 0.0
    """What it loses by having no end or by repeating words."""

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        return (self.log_prob if self.coherence is None else self.coherence) - self.penalty


def rank(
    tokenizer: Tokenizer,
    contexts: Sequence[Sequence[int]],
    hypotheses: Sequence[Sequence[Hypothesis]],
    evaluation: Evaluator | None = None,
    turns: Sequence[Sequence[str]] | None = None,
    penalties: bool | None = None,
) -> list[list[Candidate]]:
    """The candidates of each context, best first.

    Args:
        tokenizer: turns ids into text.
        contexts: B lists of ids, [CLS] (turn [SEP])*.
        hypotheses: what `decode` found for each of them.
        evaluation: an evaluation network or a `2_eval` stage in evaluation mode; None: by log-probability.
        turns: the texts of each context, of which candidates should not repeat three words; also those turns
            that are no more in `contexts`. By default the text of `contexts`.
        penalties: whether candidates with a `penalty` go behind the others; None: if there is `evaluation`.
    """
    if penalties is None:
        penalties = evaluation is not None
    if turns is None:
        turns = [_turns(tokenizer, context) for context in contexts]
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
    for said, found, values in zip(turns, hypotheses, scores, strict=True):
        candidates = []
        for hypothesis, value in zip(found, values, strict=True):
            text = _text(tokenizer, hypothesis.words)
            loss = penalty(hypothesis, text, said) if penalties else 0.0
            candidates.append(
                Candidate(text, hypothesis.words, hypothesis.latent, hypothesis.log_prob, value, loss)
            )
        ranked.append(sorted(candidates, key=lambda candidate: candidate.score, reverse=True))
    return ranked


def penalty(hypothesis: Hypothesis, text: str, turns: Sequence[str]) -> float:
    """`PENALTY` for a response without end, or with three words in a row that are in a turn or come twice.

    Words are what stands between blanks, whatever their case; inside the response three ids in a row must not
    come twice either.

    Args:
        hypothesis: the response.
        text: its text.
        turns: the texts of its context.
    """
    own = _n_grams(text.lower().split())
    known = {n_gram for turn in turns for n_gram in _n_grams(turn.lower().split())}
    repeats = not known.isdisjoint(own) or _has_twice(own) or _has_twice(_n_grams(hypothesis.words))
    return PENALTY if repeats or not hypothesis.has_end else 0.0


def _n_grams(items: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    """All runs of `N_GRAM` items; none of fewer items, or of nothing."""
    return [tuple(items[start : start + N_GRAM]) for start in range(len(items) - N_GRAM + 1)]


def _has_twice(items: Sequence[Hashable]) -> bool:
    return len(set(items)) < len(items)


def coherence(evaluation: Evaluator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """p(l=1|c,r) of every (context, response) in one batch, nothing masked (equation 8).

    Args:
        evaluation: an evaluation network, or a `2_eval` stage, in evaluation mode.
        pairs: context ids [CLS] (turn [SEP])*, and response ids without [CLS] and [SEP]. A response that does
            not fit into the model's positions is cut on the right.
    """
    limit = evaluation.model_config.max_position
    return coherence_of_records(
        evaluation, [(c, encode_response(r, max(limit - len(c), 1))) for c, r in pairs]
    )


@torch.no_grad()
def coherence_of_records(
    evaluation: Evaluator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """`coherence` where the responses are those of records: [CLS] words, and [SEP] unless it was cut off."""
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
    context_len = torch.tensor([len(context) for context, _ in pairs])
    records = [[*context, *response] for context, response in pairs]
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


def _turns(tokenizer: Tokenizer, context: Sequence[int]) -> list[str]:
    """Texts of the turns of a context, [CLS] (turn [SEP])*."""
    turns: list[list[int]] = [[]]
    for token in context:
        if token == EOS_ID:
            turns.append([])
        elif token != BOS_ID:
            turns[-1].append(token)
    return [_text(tokenizer, turn) for turn in turns[:-1]]


def _text(tokenizer: Tokenizer, words: Sequence[int]) -> str:
    """Text of a response; special ids have none."""
    return tokenizer.decode([word for word in words if word > tokenizer.eos_id])
