"""Probabilities of given responses: p(r|c), p(z|c,r), p(r|c,z), p(l=1|c,r), by the stages' own equations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from plato2.batch import on_device
from plato2.config import UserError
from plato2.data.samples import encode_context, encode_response
from plato2.data.tokenizer import MOST_UNREAD, Tokenizer
from plato2.data.units import pack
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration, Stage
from plato2.talk.rank import coherence_of_records

SEPARATOR = "[SEP]"
LINES_AT_ONCE = 256
"""Lines that are sorted by length before they are cut into batches."""
BATCH = 32


@dataclass(frozen=True)
class Record:
    """A context and a response as ids, [CLS] (turn [SEP])* [CLS] words [SEP]."""

    context: list[int]
    response: list[int]
    is_cut: bool = False
    """The response was longer than the model can read: its end, [SEP] included, is not scored."""
    unread_share: float = 0.0
    """Share of the characters of the worst of its texts that the tokenizer has no piece for."""

    def notes(self) -> dict[str, Any]:
        """What to know about its scores."""
        cut: dict[str, Any] = {"response_cut": True} if self.is_cut else {}
        unread = {"unread_share": round(self.unread_share, 3)} if self.unread_share > MOST_UNREAD else {}
        return cut | unread


def score_lines(
    lines: Iterable[bytes],
    tokenizer: Tokenizer,
    generation: Stage | None = None,
    evaluation: CoherenceEstimation | None = None,
    posterior: bool = True,
) -> Iterator[dict[str, Any]]:
    """Scores `turn [SEP] turn TAB response` lines, in their order.

    Args:
        lines: of a file, with or without line ends.
        tokenizer: of the models.
        generation: a `1_coarse` or `2_gen` stage in evaluation mode.
        evaluation: a `2_eval` stage in evaluation mode.
        posterior: whether stage 2.1 gives it; it means nothing where the recognition head is not trained.

    Yields:
        One dict a line: of stage 1 `nll` (summed, nats) and `n_tokens`; of stage 2.1 `n_tokens`, `posterior`
        (K,) and `nll_by_latent` (K,); of stage 2.2 `coherence`; with
        `response_cut` where the response was too long and `unread_share` where most of a text is unreadable;
        or `error` alone.
    """
    stages = [stage for stage in (generation, evaluation) if stage is not None]
    limit = min(stage.model_config.max_position for stage in stages) // 2
    numbered = enumerate(lines, start=1)
    while chunk := list(islice(numbered, LINES_AT_ONCE)):
        found: list[dict[str, Any]] = []
        records: dict[int, Record] = {}
        for place, (number, line) in enumerate(chunk):
            try:
                records[place] = read_line(line, tokenizer, limit)
                found.append(records[place].notes())
            except UserError as error:
                found.append({"error": f"line {number}: {error}"})
        order = sorted(records, key=lambda place: len(records[place].context) + len(records[place].response))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = [records[place] for place in places]
            for stage in stages:
                for place, scores in zip(places, score(stage, batch, posterior), strict=True):
                    found[place] |= scores
        yield from found


def read_line(line: bytes, tokenizer: Tokenizer, limit: int) -> Record:
    """One line as ids, cut as training data is (spec section 2): turns that do not fit are dropped from the
    oldest on, a response loses its end.

    Raises:
        UserError: not UTF-8, not two columns, or a last turn longer than the model can read.
    """
    try:
        columns = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    if len(columns) != 2:
        tabs = f"{len(columns) - 1} TABs" if len(columns) > 2 else "no TAB"
        raise UserError(f"{tabs}; a line is: turns joined by {SEPARATOR}, TAB, response")
    texts = [*columns[0].split(SEPARATOR), columns[1]]
    ids = tokenizer.encode_batch(texts)
    *turns, words = ids
    context = encode_context(turns, limit)
    if context is None:
        raise UserError(f"the last turn has {len(turns[-1])} tokens; at most {limit - 2} can be read")
    unread = max(map(tokenizer.unread_share, texts, ids))
    return Record(context, encode_response(words, limit), len(words) > limit - 2, unread)


@torch.no_grad()
def score(stage: Stage, records: Sequence[Record], posterior: bool = True) -> list[dict[str, Any]]:
    """The scores of a batch (see `score_lines`)."""
    if stage.training:
        raise ValueError("score needs the stage in evaluation mode: stage.eval()")
    pairs = [(record.context, record.response) for record in records]
    if isinstance(stage, CoherenceEstimation):
        return [{"coherence": value} for value in coherence_of_records(stage, pairs)]
    device = stage.backbone.word.weight.device
    is_fine = isinstance(stage, FineGeneration)
    unit, order = pack(
        pairs,
        drop_last=True,
        latent_slot=stage.model_config.mask_id if is_fine else None,
        roles=stage.backbone.role is not None,
    )
    unit = on_device(unit, device)
    record_of = order.to(device)[unit["target_sample"]]

    def summed(nll: Tensor) -> Tensor:
        """Of each record, in double: (M,) -> (N,)."""
        return nll.new_zeros(len(records), dtype=torch.float64).index_add(0, record_of, nll.double())

    found: list[dict[str, Any]] = [{"n_tokens": len(record.response) - 1} for record in records]
    with torch.autocast(device.type, enabled=False):
        if isinstance(stage, CoarseGeneration):
            nll = summed(stage.losses(unit)["nll"]).tolist()
            return [count | {"nll": value} for count, value in zip(found, nll, strict=True)]
        assert isinstance(stage, FineGeneration)
        x, k = stage.backbone.embed_unit(unit), stage.model_config.n_latent
        if posterior:
            p_z = stage.posterior(unit, x).float().softmax(dim=-1)  # (N, K)
            for number, p in zip(order.tolist(), p_z.tolist(), strict=True):
                found[number]["posterior"] = p
        one_hot = torch.eye(k, device=device, dtype=x.dtype)
        given = [stage.given_latent(unit, x, one_hot[z].expand(len(records), k))["nll"] for z in range(k)]
        by_latent = torch.stack([summed(nll) for nll in given], dim=1).tolist()  # (N, K)
        return [count | {"nll_by_latent": nll} for count, nll in zip(found, by_latent, strict=True)]
