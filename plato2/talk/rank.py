"""Which candidate is said: the one the evaluation model finds most coherent, p(l=1|c,r) (section 2.2).

The other scores are the candidate's own log-probability, forward log p(r|c,z), and how well it tells what was
said before, backward log p(c|r) of a `backward` model (maximum mutual information); a weighted sum of them
may rank too. Knover's penalties put candidates that do not end, or that repeat three words, after all others
(docs/spec.md, Decoding). The candidates of a batch are scored in one pass over packed rows.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plato2.batch import Unit, on_device, record_numbers
from plato2.config import Criterion, RankConfig, UserError
from plato2.data.samples import encode_response
from plato2.data.tokenizer import BOS_ID, EOS_ID, Tokenizer
from plato2.data.units import Pairs, pack, pack_branches
from plato2.model import losses
from plato2.model.backbone import Backbone
from plato2.model.heads import DualCoherence, InformationCoherence, MaskCoherence
from plato2.model.networks import Evaluator, Generator
from plato2.talk.decode import ROWS_AT_ONCE, Hypothesis

PENALTY = 1000.0
"""Taken off the score: more than any two scores differ by."""
BRANCHES = 32
"""Responses that stand after one context in a row; more follow the context once again."""
BRANCHES_AT_ONCE = 4
"""Contexts with their responses in a batch; bounds its memory."""
N_GRAM = 3
"""This many words in a row must not come twice."""


@dataclass(frozen=True)
class Candidate:
    """One possible reply and its scores."""

    text: str
    token_ids: tuple[int, ...]
    """Without [CLS] and [SEP]."""
    latent: int | None
    """z, or None from a stage-1 model."""
    log_prob: float
    """Mean log-probability per token, the end included, or as `DecodeConfig.length_penalty` says."""
    coherence: float | None
    """p(l=1|c,r), or None without an evaluation model."""
    backward: float | None = None
    """log p(c|r), the mean per token, or None where it does not rank."""
    penalty: float = 0.0
    """What it loses by having no end or by repeating words."""
    score: float = 0.0
    """What candidates are ranked by."""
    has_end: bool = True
    """Whether it ended before `max_tokens` cut it."""
    flag: str | None = None
    """The rule of the safety filter it breaks."""

    def to_dict(
        self, *, ranking: bool = False, held: bool = False, digits: int | None = None
    ) -> dict[str, Any]:
        """Plain values for JSON: text, latent, log_prob, coherence; backward and flag if there are any.

        Args:
            ranking: also the score it was ranked by, and whether it has an end.
            held: without its text, which the safety filter holds back.
            digits: decimals of its numbers; all by default.
        """
        found: dict[str, Any] = {
            "text": None if held else self.text,
            "latent": self.latent,
            "log_prob": self.log_prob,
            "coherence": self.coherence,
        }
        found |= {} if self.backward is None else {"backward": self.backward}
        found |= {} if self.flag is None else {"flag": self.flag}
        found |= {"score": self.score, "has_end": self.has_end} if ranking else {}
        if digits is None:
            return found
        return {name: round(x, digits) if isinstance(x, float) else x for name, x in found.items()}


def rank(
    tokenizer: Tokenizer,
    contexts: Sequence[Sequence[int]],
    hypotheses: Sequence[Sequence[Hypothesis]],
    evaluation: Evaluator | None = None,
    turns: Sequence[Sequence[str]] | None = None,
    config: RankConfig | None = None,
    backward: Generator | None = None,
) -> list[list[Candidate]]:
    """The candidates of each context, best first.

    Args:
        tokenizer: turns ids into text.
        contexts: B lists of ids, [CLS] (turn [SEP])*.
        hypotheses: what `decode` found for each of them.
        evaluation: an evaluation network, or a stage that ranks, in evaluation mode.
        turns: the texts of each context, of which candidates should not repeat three words; also those turns
            that are no more in `contexts`. By default the text of `contexts`.
        config: what to rank by.
        backward: a network of stage `backward` in evaluation mode.

    Raises:
        UserError: a score needs a model that was not given.
    """
    config = config or RankConfig()
    weights = score_weights(config, evaluation, backward)
    penalties = evaluation is not None if config.penalties is None else config.penalties
    if turns is None:
        turns = [_turns(tokenizer, context) for context in contexts]
    pairs = [
        (context, hypothesis.words)
        for context, found in zip(contexts, hypotheses, strict=True)
        for hypothesis in found
    ]
    unknown: list[None] = [None] * len(pairs)
    coherences = unknown if evaluation is None else _in_parts(coherence, evaluation, pairs)
    reads = backward is not None and weights.get("backward")
    backwards = _in_parts(backward_log_probs, backward, pairs) if reads else unknown
    values = zip(coherences, backwards, strict=True)
    ranked = []
    for said, found in zip(turns, hypotheses, strict=True):
        candidates = []
        for hypothesis in found:
            text = _text(tokenizer, hypothesis.words)
            loss = penalty(hypothesis, text, said) if penalties else 0.0
            candidates.append(_candidate(hypothesis, text, *next(values), loss, weights))
        ranked.append(sorted(candidates, key=lambda candidate: candidate.score, reverse=True))
    return ranked


def _candidate(
    hypothesis: Hypothesis,
    text: str,
    coherence: float | None,
    backward: float | None,
    penalty: float,
    weights: Mapping[Criterion, float],
) -> Candidate:
    """A hypothesis with its text and scores."""
    scores = {"coherence": coherence, "forward": hypothesis.log_prob, "backward": backward}
    weighted = sum(weight * (scores[name] or 0.0) for name, weight in weights.items() if weight)
    return Candidate(
        text,
        hypothesis.words,
        hypothesis.latent,
        hypothesis.log_prob,
        coherence,
        backward,
        penalty,
        weighted - penalty,
        hypothesis.has_end,
    )


def _in_parts(score: Callable[[Any, Pairs], list[float]], model: object, pairs: Pairs) -> list[float]:
    """The scores of all pairs, as many at once as are decoded at once: they take as much memory."""
    parts = (pairs[first : first + ROWS_AT_ONCE] for first in range(0, len(pairs), ROWS_AT_ONCE))
    return [found for part in parts for found in score(model, part)]


def score_weights(
    config: RankConfig, evaluation: Evaluator | None, backward: Generator | None
) -> dict[Criterion, float]:
    """The weight of each score.

    Raises:
        UserError: a score needs a model that was not given.
    """
    if config.weights is None:
        return {"forward": 1.0} if evaluation is None else {"coherence": 1.0}
    if config.weights.get("coherence") and evaluation is None:
        raise UserError("rank=coherence: needs an evaluation model; give --evaluation, or rank by forward")
    if config.weights.get("backward") and backward is None:
        raise UserError("rank=backward: needs a model of stage=backward; give --backward, or rank without it")
    return dict(config.weights)


def doubt(figures: Mapping[str, float]) -> str | None:
    """Why ranking by an evaluation model is not to be trusted; None if nothing speaks against it.

    Args:
        figures: of its last validation (talk/selection.py): `pair_acc`, `p1`, those of shared words.
    """
    for name, told in (
        ("pair_acc", "tells true responses from others in"),
        ("p1", "finds the true one of ten in"),
    ):
        own, words = figures.get(name), figures.get(f"overlap_{name}")
        if own is not None and words is not None and own <= words:
            return (
                f"the ranking is not to be trusted yet: the evaluation model {told} {own:.0%} of the cases, "
                f"counting shared words in {words:.0%}"
            )
    return None


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


def coherence(evaluation: Evaluator, pairs: Pairs) -> list[float]:
    """p(l=1|c,r) of every (context, response), nothing masked (equation 7).

    Args:
        evaluation: an evaluation network, or a stage that ranks, in evaluation mode.
        pairs: context ids [CLS] (turn [SEP])*, and response ids without [CLS] and [SEP]. A response that does
            not fit into the model's positions is cut on the right.
    """
    limit = evaluation.model_config.max_position
    return coherence_of_records(
        evaluation, [(c, encode_response(r, max(limit - len(c), 1))) for c, r in pairs]
    )


@torch.no_grad()
def coherence_of_records(evaluation: Evaluator, pairs: Pairs) -> list[float]:
    """`coherence` where the responses are those of records: [CLS] words, and [SEP] unless it was cut off."""
    if evaluation.training:
        raise ValueError("coherence needs the evaluator in evaluation mode: evaluation.eval()")
    if not pairs:
        return []
    backbone, head = evaluation.backbone, evaluation.coherence
    with backbone.own_precision():
        if isinstance(head, DualCoherence):
            probabilities: list[float] = _read_apart(backbone, head, pairs).tolist()
            return probabilities
        if isinstance(head, InformationCoherence):
            return _read_as_written(backbone, head, pairs)
        is_masked = isinstance(head, MaskCoherence)
        unit, order = _pack(backbone, pairs, drop_last=is_masked, latent_slot=is_masked)  # as trained
        x, first = backbone.embed_unit(unit), unit["sample_index"]
        if is_masked:
            h = backbone.encode_masked(unit, x, first)  # (N, H)
        else:
            mask = backbone.mask(unit["segment_ids"])
            read = backbone.summary_slots(unit["segment_ids"], first)
            h = backbone.encode(x, mask, read=read, pos_ids=unit["pos_ids"])  # (N, H)
        found = head(h).float().softmax(dim=-1)[:, 1]  # (N,)
    probabilities = torch.empty_like(found).index_copy(0, order, found).tolist()
    return probabilities


def _read_apart(backbone: Backbone, head: DualCoherence, pairs: Pairs) -> Tensor:
    """p(l=1|c,r) of every pair by a dual head: (N,). A context or response that comes again is read once."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    responses = list(dict.fromkeys(tuple(response) for _, response in pairs))
    parts: list[tuple[Sequence[int], Sequence[int]]] = [(context, ()) for context in contexts]
    parts += [((), response) for response in responses]
    unit, order = _pack(backbone, parts)
    x, mask = backbone.embed_unit(unit), backbone.mask(unit["segment_ids"])
    h = backbone.encode(x, mask, pos_ids=unit["pos_ids"])  # (B, T, H)
    found = head.texts(h, backbone.words(unit["token_ids"]), record_numbers(unit), len(parts))  # (n, 2 H)
    texts = torch.empty_like(found).index_copy(0, order, found)
    c, r = head.vectors(*texts.split([len(contexts), len(responses)]))
    context_of = {context: number for number, context in enumerate(contexts)}
    response_of = {response: number for number, response in enumerate(responses)}
    i = torch.tensor([context_of[tuple(context)] for context, _ in pairs], device=c.device)
    j = torch.tensor([response_of[tuple(response)] for _, response in pairs], device=c.device)
    return head.probability(head.score((c[i] * r[j]).sum(dim=-1)))


def _read_as_written(backbone: Backbone, head: InformationCoherence, pairs: Pairs) -> list[float]:
    """p(l=1|c,r) of every pair by a PMI head, in double precision: PMI may be large, and p next to 1."""
    responses = dict.fromkeys(tuple(response) for _, response in pairs)
    place = {response: number for number, response in enumerate(responses, len(pairs))}
    found = log_probs(backbone, [*pairs, *(((BOS_ID,), response) for response in responses)])
    after_context, alone = found[: len(pairs)], found[[place[tuple(response)] for _, response in pairs]]
    probabilities: list[float] = head(after_context, alone).softmax(dim=-1)[:, 1].tolist()
    return probabilities


@torch.no_grad()
def log_probs(backbone: Backbone, pairs: Pairs) -> Tensor:
    """log p(r|c) of every (context, response), records' ids: (n,) float64, in nats, summed over r's tokens.

    A context is read once for up to `BRANCHES` of its responses, which stand after it in one row and do not
    see each other.
    """
    of_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        of_context.setdefault(tuple(context), []).append(number)
    branches = [
        (context, numbers[first : first + BRANCHES])
        for context, numbers in of_context.items()
        for first in range(0, len(numbers), BRANCHES)
    ]
    found = torch.zeros(len(pairs), dtype=torch.float64, device=backbone.device)
    for first in range(0, len(branches), BRANCHES_AT_ONCE):
        several = branches[first : first + BRANCHES_AT_ONCE]
        texts = [(context, [pairs[number][1] for number in numbers]) for context, numbers in several]
        unit, order = pack_branches(texts, roles=backbone.role is not None)
        unit = on_device(unit, backbone.device)
        mask = backbone.mask(unit["segment_ids"], unit["branch_ids"])
        x = backbone.embed_unit(unit)
        h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        nll = losses.nll(backbone.lm_logits(h), unit["target_ids"]).double()  # (M,)
        summed = nll.new_zeros(len(order)).index_add(0, unit["target_sample"], nll)
        numbers = torch.tensor([number for _, numbers in several for number in numbers])[order]
        found[numbers.to(found.device)] = -summed
    return found


@torch.no_grad()
def backward_log_probs(backward: Generator, pairs: Pairs) -> list[float]:
    """log p(c|r) of every (context, response), the mean per token, [SEP]s included.

    Args:
        backward: a network of stage `backward` in evaluation mode: it reads [CLS] words [SEP] and predicts
            the context after its [CLS].
        pairs: as of `coherence`.
    """
    if backward.training:
        raise ValueError("backward_log_probs needs the network in evaluation mode: backward.eval()")
    if not pairs:
        return []
    backbone, limit = backward.backbone, backward.model_config.max_position
    records = [(encode_response(r, max(limit - len(c), 1)), c) for c, r in pairs]
    with backbone.own_precision():
        unit, order = _pack(backbone, records, drop_last=True)
        mask = backbone.mask(unit["segment_ids"], unit["type_ids"])
        x = backbone.embed_unit(unit)
        h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        nll = losses.nll(backbone.lm_logits(h), unit["target_ids"]).double()  # (M,)
    sums = nll.new_zeros(len(pairs)).index_add(0, order[unit["target_sample"]], nll).tolist()
    return [-total / (len(context) - 1) for total, (context, _) in zip(sums, pairs, strict=True)]


def _pack(
    backbone: Backbone, pairs: Pairs, drop_last: bool = False, latent_slot: bool = False
) -> tuple[Unit, Tensor]:
    """Pairs in packed rows on the backbone's device, and the number (N,) of the pair that each record is."""
    slot = backbone.config.mask_id if latent_slot else None
    unit, order = pack(pairs, drop_last=drop_last, latent_slot=slot, roles=backbone.role is not None)
    return on_device(unit, backbone.device), order.to(backbone.device)


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
