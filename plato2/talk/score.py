"""Probabilities of given responses: p(r|c), p(z|c,r), p(r|c,z), p(l=1|c,r).

The equations are those of the stages (a test holds them to the losses of training), the models networks
without Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from plato2.batch import on_device
from plato2.config import UserError
from plato2.data.samples import encode_context, encode_response
from plato2.data.tokenizer import MOST_UNREAD, Tokenizer
from plato2.data.units import pack
from plato2.model import losses
from plato2.model.backbone import Mask
from plato2.model.heads import Recognition
from plato2.model.networks import Evaluator, Generator
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
    generation: Generator | None = None,
    evaluation: Evaluator | None = None,
) -> Iterator[dict[str, Any]]:
    """Scores `turn [SEP] turn TAB response` lines, in their order.

    Args:
        lines: of a file, with or without line ends.
        tokenizer: of the models.
        generation: a `1_coarse` or `2_gen` network or stage in evaluation mode.
        evaluation: an evaluation network, or a stage that ranks, in evaluation mode; without it a generation
            model that ranks its own candidates judges.

    Yields:
        One dict per line: of stage 1 `nll` (summed, nats) and `n_tokens`; of stage 2.1 `n_tokens`,
        `posterior` (K,), unless it has no recognition head, and `nll_by_latent` (K,); of a model that ranks
        `coherence`; with `response_cut` where the response was too long and `unread_share` where most of a
        text is unreadable; or `error` alone.
    """
    models = [model for model in (generation, evaluation) if model is not None]
    limit = min(model.model_config.max_position for model in models) // 2
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
            for model in models:
                for place, scores in zip(places, score(model, batch), strict=True):
                    found[place] |= scores
        yield from found


def read_line(line: bytes, tokenizer: Tokenizer, limit: int) -> Record:
    """One line as ids, cut as training data is (docs/spec.md, Records): turns that do not fit are dropped,
    the oldest first, a response loses its end.

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
def score(model: Generator | Evaluator, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The scores of a batch (see `score_lines`)."""
    if model.training:
        raise ValueError("score needs the model in evaluation mode: stage.eval()")
    pairs = [(record.context, record.response) for record in records]
    found: list[dict[str, Any]] = [{} for _ in records]
    if model.coherence is not None:
        found = [{"coherence": value} for value in coherence_of_records(cast(Evaluator, model), pairs)]
    if not hasattr(model, "recognition"):  # it only ranks
        return found
    backbone, latents = model.backbone, cast(Generator, model).recognition
    device, mask_id = backbone.device, model.model_config.mask_id
    slot = None if latents is None else mask_id
    unit, order = pack(pairs, drop_last=True, latent_slot=slot, roles=backbone.role is not None)
    unit, order = on_device(unit, device), order.to(device)
    front, record_of = unit["sample_index"], order[unit["target_sample"]]

    def summed_nll(x: Tensor, mask: Mask) -> list[float]:
        """-log p(r|..) of each record, in double: rows (B, T, H) and who sees whom -> N numbers."""
        h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])  # (M, H)
        nll = losses.nll(backbone.lm_logits(h), unit["target_ids"]).double()  # (M,)
        return nll.new_zeros(len(records)).index_add(0, record_of, nll).tolist()

    found = [{"n_tokens": len(r.response) - 1} | own for r, own in zip(records, found, strict=True)]
    with backbone.own_precision():
        x = backbone.embed_unit(unit)  # (B, T, H)
        if latents is None:
            nlls = summed_nll(x, backbone.mask(unit["segment_ids"], unit["type_ids"]))
            return [count | {"nll": nll} for count, nll in zip(found, nlls, strict=True)]
        if isinstance(latents, Recognition):  # equation 3
            p_z = latents(backbone.encode_masked(unit, x, front)).float().softmax(-1)  # (N, K)
            for number, p in zip(order.tolist(), p_z.tolist(), strict=True):
                found[number]["posterior"] = p
        table = latents.latent(torch.eye(model.model_config.n_latent, device=device))  # (K, H)
        given = []  # equation 2
        for z in table:
            rows, _, mask = backbone.put_latents(unit, x, z.expand(len(front), -1))
            given.append(summed_nll(rows, mask))
        return [count | {"nll_by_latent": list(nll)} for count, *nll in zip(found, *given, strict=True)]
