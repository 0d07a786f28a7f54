"""The batch that all stages read. `data/` makes it and `stages/` use it, and neither knows the other."""

from typing import NotRequired, TypedDict

import torch
from torch import Tensor


class Unit(TypedDict):
    """B rows of T slots, which hold N records: what one device computes at once. All tensors are int64.

    A record is a context and the response to it, a sample of the paper (of stage `backward` the other way
    round). Several of them may stand in a row. A flat index is row * T + slot.
    """

    token_ids: Tensor
    """(B, T), padding 0."""
    type_ids: Tensor
    """(B, T): 0 = first part of a record, 1 = second part."""
    pos_ids: Tensor
    """(B, T) positions, which restart in each record."""
    segment_ids: Tensor
    """(B, T): 0 = padding, 1, 2, ... = the records of a row."""
    role_ids: NotRequired[Tensor]
    """(B, T) who speaks, of a model with role embeddings."""
    sample_index: Tensor
    """(N,) flat index of each record's first slot: that of the latent, else [CLS]."""
    target_index: Tensor
    """(M,) flat index of each slot whose output predicts something."""
    target_ids: Tensor
    """(M,) the id it should predict."""
    target_sample: Tensor
    """(M,) which of the N records it belongs to."""

    sample_ids: NotRequired[Tensor]
    """(N,) number of each context's sample in the corpus."""
    sample_key: NotRequired[Tensor]
    """(N,) random key for noise that is drawn on the device."""
    random_index: NotRequired[Tensor]
    """(R,) flat index of the first slot of further records, in which a random response follows a context."""
    coherence_labels: NotRequired[Tensor]
    """(N,) in stage 2.2: 1 = the context's own response, 0 = another."""
    response_texts: NotRequired[Tensor]
    """(N,) with a dual head: numbers that are equal where responses are."""
    branch_ids: NotRequired[Tensor]
    """(B, T) where several responses follow one context: 0 = context, 1, 2, ... = the responses, which do not
    see each other. Each of them is a record, the first one with the context."""
    own_targets: NotRequired[Tensor]
    """(K,) with a PMI head: which of the M targets are of the context's own response."""
    alone_targets: NotRequired[Tensor]
    """(K,) with a PMI head: which of them are of the same response after no context."""
    step_targets: NotRequired[Tensor]
    """() targets of the whole optimizer step, over all units and ranks."""
    step_samples: NotRequired[Tensor]
    """() records of the whole optimizer step."""


def record_numbers(unit: Unit) -> Tensor:
    """(B, T) 1..N, the record that each slot belongs to; 0 = padding."""
    starts = torch.zeros_like(unit["segment_ids"]).flatten().index_fill(0, unit["sample_index"], 1)
    return starts.cumsum(0).view_as(unit["segment_ids"]) * (unit["segment_ids"] > 0)


def n_targets(unit: Unit) -> int:
    """Targets that a mean over targets is of: all, or with a PMI head those of own responses."""
    return len(unit.get("own_targets", unit["target_ids"]))


def on_device(unit: Unit, device: torch.device) -> Unit:
    """The unit with its tensors on a device."""
    return {name: tensor.to(device) for name, tensor in unit.items()}  # type: ignore[return-value, attr-defined]
