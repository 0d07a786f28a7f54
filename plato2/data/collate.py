"""Batch makers: what the items of a window are, and one unit of them as the tensors a stage reads.

A stage's configuration names its batch maker: `GenerationBatch` for stages 1 and 2.1, `CoherenceBatch` for
stage 2.2, `InformationBatch` for its PMI head, `JointBatch` for a stage that learns to write and to rank at
once, `BackwardBatch` for the extra stage p(c|r), whose records begin with the response (docs/spec.md,
Inputs). What a unit holds: plato2/batch.py; how it is laid out: units.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from plato2.batch import Unit
from plato2.config import UserError
from plato2.data.packing import UnitLayout, ranges
from plato2.data.shards import Samples, ShardIndex
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.data.units import Masked, Positions, Records, Tokens, build_unit, spread_branches
from plato2.random import Draw, draw, draw_key, permutation


@dataclass(frozen=True)
class Window:
    """The samples in memory and what their random numbers depend on."""

    samples: Samples
    seed: int
    epoch: int
    number: int
    mask_id: int
    max_response: int

    @property
    def response_len(self) -> np.ndarray:
        """(n,) ids of each response, [CLS] included."""
        return np.diff(self.samples.offsets) - self.samples.context_len


@dataclass(frozen=True)
class Items:
    """What a window is made of: a context and a response, each given by its row in the window."""

    contexts: np.ndarray
    responses: np.ndarray
    labels: np.ndarray
    """1 where the response is the context's own."""
    slots: np.ndarray
    """Slots each item takes in a row."""
    others: np.ndarray | None = None
    """Rows of further responses, random ones, of a batch whose items have two."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.contexts)


@dataclass(frozen=True)
class GenerationBatch:
    """p(r|c) and p(r|c,z): the inputs lack the record's last id; the targets are the response after [CLS]."""

    latent_slot: bool = False
    """A front slot before each sample ([MASK] as placeholder, type 0, position 0) for the latent z."""
    keep_eos: bool = False
    """Keep the record's last id as an input (docs/spec.md, Stage 2.1); it predicts nothing."""
    roles: bool = False
    positions: Positions = "continuous"

    def longest(self, index: ShardIndex) -> int:
        """Slots of the longest item the corpus may hold."""
        return index.max_context + index.max_response + self.latent_slot - (not self.keep_eos)

    def items(self, window: Window) -> Items:
        """One item for each sample."""
        rows = np.arange(len(window.samples))
        slots = np.diff(window.samples.offsets) + int(self.latent_slot) - int(not self.keep_eos)
        return Items(rows, rows, np.ones_like(rows), slots)

    def count_targets(self, window: Window, items: Items, chosen: np.ndarray) -> int:
        """Targets of the chosen items: every response id but [CLS]."""
        return int((window.response_len[items.responses[chosen]] - 1).sum())

    def unit(self, window: Window, items: Items, layout: UnitLayout) -> Unit:
        """The tensors of one unit."""
        unit = build_unit(
            _records(window, items, layout.items),
            layout,
            drop_last=not self.keep_eos,
            latent_slot=window.mask_id if self.latent_slot else None,
            positions=self.positions,
            max_response=window.max_response,
            roles=self.roles,
        )
        return _named(unit, window, items, layout.items)


@dataclass(frozen=True)
class JointBatch:
    """p(r|c,z) and p(l|c,r) together: each context with its own response and with a random one.

    Both records have a front slot and lack their last id, as in `GenerationBatch`. Those with the context's
    own response are the N records of the unit, and only they have targets; `random_index` has the others'
    front slots. Negatives are those of `CoherenceBatch`.
    """

    roles: bool = False
    positions: Positions = "continuous"
    reject_identical: bool = True

    def longest(self, index: ShardIndex) -> int:
        """Slots of the longest item the corpus may hold."""
        return index.max_context + index.max_response

    def items(self, window: Window) -> Items:
        """Two items for each sample, as in `CoherenceBatch`.

        Raises:
            UserError: all responses of the window are equal, so there is no negative.
        """
        return _with_negatives(window, self.reject_identical)

    def count_targets(self, window: Window, items: Items, chosen: np.ndarray) -> int:
        """Targets of the chosen items: every id but [CLS] of the responses that are the contexts' own."""
        own = chosen[items.labels[chosen] == 1]
        return int((window.response_len[items.responses[own]] - 1).sum())

    def unit(self, window: Window, items: Items, layout: UnitLayout) -> Unit:
        """The tensors of one unit."""
        unit = build_unit(
            _records(window, items, layout.items),
            layout,
            latent_slot=window.mask_id,
            positions=self.positions,
            max_response=window.max_response,
            roles=self.roles,
        )
        own = torch.from_numpy(items.labels[layout.items] == 1)
        unit["random_index"] = unit["sample_index"][~own]
        unit["sample_index"] = unit["sample_index"][own]
        kept = own[unit["target_sample"]]  # (targets of all records,)
        unit["target_index"], unit["target_ids"] = unit["target_index"][kept], unit["target_ids"][kept]
        unit["target_sample"] = (own.cumsum(0) - 1)[unit["target_sample"][kept]]
        return _named(unit, window, items, layout.items[own.numpy()])


@dataclass(frozen=True)
class BackwardBatch:
    """p(c|r): a record is response + context, without its last id; the targets are the context after [CLS].

    Types are 0 for the response and 1 for the context, positions count on over both. There are no roles: they
    count turns back from the last one, and which that is the model has to find out.
    """

    def longest(self, index: ShardIndex) -> int:
        """Slots of the longest item the corpus may hold."""
        return index.max_response + index.max_context - 1

    def items(self, window: Window) -> Items:
        """One item for each sample."""
        rows = np.arange(len(window.samples))
        return Items(rows, rows, np.ones_like(rows), np.diff(window.samples.offsets) - 1)

    def count_targets(self, window: Window, items: Items, chosen: np.ndarray) -> int:
        """Targets of the chosen items: every context id but [CLS]."""
        return int((window.samples.context_len[items.contexts[chosen]] - 1).sum())

    def unit(self, window: Window, items: Items, layout: UnitLayout) -> Unit:
        """The tensors of one unit."""
        forward = _records(window, items, layout.items)
        backward = Records(forward.token_ids, forward.first[:, ::-1], forward.length[:, ::-1])
        return _named(build_unit(backward, layout), window, items, layout.items)


@dataclass(frozen=True)
class CoherenceBatch:
    """RCE + MLM: each context with its own response and with another one, both masked.

    With `head=dual` each context with its own response only, and positions that start again with it: to a
    model that reads them apart, a response whose positions continued would give its context's length away.

    The negative of a context is the response of the next sample in a permutation of the window whose text
    differs from the true one. A token that is not [CLS] or [SEP] is chosen with `mask_prob`; of the chosen
    80 % become [MASK], 10 % a random id, 10 % stay. Masks depend on (seed, epoch, sample, label, place) only.

    Raises:
        UserError: mask_prob is not a probability.
    """

    mask_prob: float = 0.15
    """Share of the words that are masked and predicted."""
    roles: bool = False
    positions: Positions = "continuous"
    reject_identical: bool = True
    """False: Knover's negatives, which may be the true response again."""
    head: Literal["first", "dual"] = "first"

    def __post_init__(self) -> None:
        """Refuse what is not a probability, or not a head."""
        if not 0.0 <= self.mask_prob <= 1.0:
            raise UserError(f"stage.batch.mask_prob={self.mask_prob}: must be between 0 and 1")
        if self.head not in ("first", "dual"):
            raise UserError(f"stage.batch.head={self.head}: choose first or dual; pmi is stage=2_eval_pmi")

    def longest(self, index: ShardIndex) -> int:
        """Slots of the longest item the corpus may hold."""
        return index.max_context + index.max_response

    def items(self, window: Window) -> Items:
        """Two items for each sample, its own response and another: any part of them has as many of each.

        Raises:
            UserError: all responses of the window are equal, so there is no negative.
        """
        rows = np.arange(len(window.samples))
        if self.head == "dual":
            return Items(rows, rows, np.ones_like(rows), np.diff(window.samples.offsets))
        return _with_negatives(window, self.reject_identical)

    def count_targets(self, window: Window, items: Items, chosen: np.ndarray) -> int:
        """Masked tokens of the chosen items."""
        tokens = _records(window, items, chosen).tokens()
        return int(self._mask(window, items, chosen, tokens).chosen.sum())

    def unit(self, window: Window, items: Items, layout: UnitLayout) -> Unit:
        """The tensors of one unit; the record keeps its last id."""
        records = _records(window, items, layout.items)
        unit = build_unit(
            records,
            layout,
            drop_last=False,
            positions="restart" if self.head == "dual" else self.positions,
            max_response=window.max_response,
            roles=self.roles,
            masked=self._mask(window, items, layout.items, records.tokens()),
        )
        unit["coherence_labels"] = torch.from_numpy(items.labels[layout.items])
        if self.head == "dual":
            texts = _response_hash(window, items.responses[layout.items])
            unit["response_texts"] = torch.from_numpy(texts.view(np.int64))
        return _named(unit, window, items, layout.items)

    def _mask(self, window: Window, items: Items, chosen: np.ndarray, tokens: Tokens) -> Masked:
        """Which words are hidden, and by what: 32 random bits choose what happens, 32 more a random id."""
        keys = draw(draw_key(Draw.MASKS, window.seed, window.epoch), _item_counters(window, items, chosen))
        bits = draw(keys[tokens.record], tokens.place)
        choice, low = bits >> np.uint64(32), bits & np.uint64(2**32 - 1)
        special = (tokens.ids == BOS_ID) | (tokens.ids == EOS_ID)
        masked = (choice < self._threshold(1.0)) & ~special
        random_ids = 3 + (low * np.uint64(window.mask_id - 3) >> np.uint64(32)).astype(np.int64)
        ids = np.where(masked & (choice < self._threshold(0.9)), random_ids, tokens.ids)
        ids[masked & (choice < self._threshold(0.8))] = window.mask_id
        return Masked(masked, ids)

    def _threshold(self, share: float) -> int:
        """The share of the chosen tokens, on a scale of 32 random bits."""
        return round(share * self.mask_prob * 2**32)


@dataclass(frozen=True)
class InformationBatch:
    """p(r|c) and p(r) of each context's own response and of a random one, of which PMI is made.

    An item is two contexts, the sample's and [CLS] alone, each followed by both responses, which do not see
    each other: four records c + r, r', [CLS] + r, r', all without their last ids. The targets are the
    responses after [CLS]; negatives are those of `CoherenceBatch`.

    Raises:
        UserError: it is given a head that it is not for.
    """

    roles: bool = False
    reject_identical: bool = True
    head: Literal["pmi"] = "pmi"

    def __post_init__(self) -> None:
        """Refuse another head."""
        if self.head != "pmi":
            raise UserError(f"stage.batch.head={self.head}: this batch is for pmi alone; use stage=2_eval")

    def longest(self, index: ShardIndex) -> int:
        """Slots of the longest item the corpus may hold."""
        return index.max_context + 1 + 4 * (index.max_response - 1)

    def items(self, window: Window) -> Items:
        """One item for each sample.

        Raises:
            UserError: all responses of the window are equal, so there is no negative.
        """
        rows = np.arange(len(window.samples))
        others = _negatives(window, self.reject_identical)
        both = window.response_len + window.response_len[others]
        slots = window.samples.context_len + 1 + 2 * (both - 2)
        return Items(rows, rows, np.ones_like(rows), slots, others)

    def count_targets(self, window: Window, items: Items, chosen: np.ndarray) -> int:
        """Words of the chosen items' own responses, [SEP]s included, of which nll is the mean."""
        return int((window.response_len[items.responses[chosen]] - 1).sum())

    def unit(self, window: Window, items: Items, layout: UnitLayout) -> Unit:
        """The tensors of one unit."""
        records = self._records(window, items, layout.items)
        n_records = len(records.length)
        length = records.length.sum(axis=1) - 1
        in_pairs = UnitLayout(  # of contexts with both responses, two an item
            np.arange(n_records // 2),
            np.repeat(layout.rows, 2),
            np.stack([layout.columns, layout.columns + length[0::4] + length[1::4]], axis=1).ravel(),
            layout.n_rows,
            layout.row_length,
        )
        spread, context_of = spread_branches(in_pairs, np.full(n_records // 2, 2), length)
        unit = build_unit(records, spread, roles=self.roles, context_of=context_of)
        kind = unit["target_sample"] % 4
        unit["own_targets"], unit["alone_targets"] = ((kind == k).nonzero()[:, 0] for k in (0, 2))
        return _named(unit, window, items, layout.items)

    def _records(self, window: Window, items: Items, chosen: np.ndarray) -> Records:
        """Four of each of the chosen items: c + r, r', [CLS] + r, r'."""
        assert items.others is not None
        others = Items(items.contexts, items.others, items.labels, items.slots)
        own, other = _records(window, items, chosen), _records(window, others, chosen)
        first = np.stack([own.first, other.first, own.first, other.first], axis=1)  # (n, 4, 2)
        length = np.stack([own.length, other.length, own.length, other.length], axis=1)
        length[:, 2, 0] = 1
        length[:, [1, 3], 0] = 0
        return Records(own.token_ids, first.reshape(-1, 2), length.reshape(-1, 2))


# ------------------------------------------------------------------------------------------- shared parts


def _records(window: Window, items: Items, chosen: np.ndarray) -> Records:
    """Context and response of the chosen items."""
    samples, contexts, responses = window.samples, items.contexts[chosen], items.responses[chosen]
    first, length = np.empty((2, len(chosen), 2), dtype=np.int64)
    first[:, 0], length[:, 0] = samples.offsets[contexts], samples.context_len[contexts]
    first[:, 1] = samples.offsets[responses] + samples.context_len[responses]
    length[:, 1] = samples.offsets[responses + 1] - first[:, 1]
    return Records(samples.token_ids, first, length)


def _with_negatives(window: Window, reject_identical: bool) -> Items:
    """Two items for each sample, its own response and another: any part of them has as many of each."""
    rows = np.arange(len(window.samples))
    contexts = np.repeat(rows, 2)
    responses = np.stack([rows, _negatives(window, reject_identical)], axis=1).ravel()
    slots = window.samples.context_len[contexts] + window.response_len[responses]
    return Items(contexts, responses, np.tile([1, 0], len(rows)), slots)


def _negatives(window: Window, reject_identical: bool) -> np.ndarray:
    """For each sample the row (n,) of another one's response."""
    n = len(window.samples)
    order = permutation(n, draw_key(Draw.NEGATIVES, window.seed, window.epoch, window.number))
    if reject_identical:
        text = _response_hash(window, order)
        changes = np.flatnonzero(text != np.roll(text, 1))  # where a run of equal responses begins
        if len(changes) == 0:
            raise UserError(
                f"all {n} responses of window {window.number} are equal: none is a negative; use a larger or "
                "cleaner corpus, or a larger data.window_samples"
            )
        after = np.searchsorted(changes, np.arange(n), side="right") % len(changes)
        following = order[changes[after]]
    else:
        following = np.roll(order, -1)
    negatives = np.empty(n, dtype=np.int64)
    negatives[order] = following
    return negatives


def _named(unit: Unit, window: Window, items: Items, chosen: np.ndarray) -> Unit:
    """Adds the global id and the noise key of each of the chosen samples (N,)."""
    key = draw_key(Draw.NOISE, window.seed, window.epoch)
    noise = draw(key, _item_counters(window, items, chosen))
    unit["sample_ids"] = torch.from_numpy(window.samples.sample_ids[items.contexts[chosen]])
    unit["sample_key"] = torch.from_numpy(noise.view(np.int64))
    return unit


def _item_counters(window: Window, items: Items, chosen: np.ndarray) -> np.ndarray:
    """One integer (n,) for each (sample, label) of the corpus."""
    return window.samples.sample_ids[items.contexts[chosen]] * 2 + items.labels[chosen]


def _response_hash(window: Window, rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash (n,) of the ids of each row's response: equal texts have equal hashes."""
    samples, length = window.samples, window.response_len[rows]
    if not len(rows):
        return np.zeros(0, dtype=np.uint64)
    place = ranges(np.zeros_like(length), length)
    first = samples.offsets[rows] + samples.context_len[rows]
    ids = samples.token_ids[ranges(first, length)].astype(np.int64)
    starts = np.cumsum(length) - length
    return np.add.reduceat(draw(0, ids * 2**20 + place + 1), starts)
