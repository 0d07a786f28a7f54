"""Records to a unit: where rows, types, positions, segments, roles and targets are laid out.

Training, validation, ranking, scoring and decoding build here what they compute. All is gathered from one
flat array of ids; there is no Python loop over records or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from plato2.batch import Unit
from plato2.data.packing import UnitLayout, best_fit_rows, ranges
from plato2.data.tokenizer import EOS_ID

Positions = Literal["continuous", "relative", "restart"]
ROW_LENGTH = 512
"""Slots of the rows that `pack` fills."""
Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""What is read first and what follows it, such as a context and a response, as ids."""


@dataclass(frozen=True)
class Records:
    """n records of two parts, each part a span of one array of ids."""

    token_ids: np.ndarray
    first: np.ndarray
    """(n, 2) where each part begins."""
    length: np.ndarray
    """(n, 2) its ids."""

    @classmethod
    def of(cls, pairs: Pairs) -> Records:
        """Records of lists of ids."""
        length = np.array([(len(first), len(second)) for first, second in pairs], dtype=np.int64)
        ids = np.array([token for pair in pairs for part in pair for token in part], dtype=np.int64)
        return cls(ids, (length.cumsum() - length.ravel()).reshape(-1, 2), length)

    def tokens(self, drop_last: bool = False) -> Tokens:
        """All ids, record by record; `drop_last` leaves out the last of each, which predicts nothing."""
        length = self.length - [0, int(drop_last)]
        total = length.sum(axis=1)
        record = np.repeat(np.arange(len(total)), total)
        before = np.cumsum(total) - total
        place = np.arange(len(record)) - np.repeat(before, total)
        ids = self.token_ids[ranges(self.first.ravel(), length.ravel())].astype(np.int64)
        return Tokens(ids, place >= length[:, 0][record], record, place)


@dataclass(frozen=True)
class Tokens:
    """The ids of n records one after the other: flat arrays (S,)."""

    ids: np.ndarray
    is_second: np.ndarray
    """Of the record's second part."""
    record: np.ndarray
    """Which of the n records."""
    place: np.ndarray
    """0, 1, ... in the record."""

    def positions(self, style: Positions, max_response: int) -> np.ndarray:
        """Position of each token (S,).

        `continuous` (PLATO-2): 0, 1, ... over both parts. `relative` (PLATO-XL): the context counts down to
        the response, max_response + its length - 1 - place, and the response counts from 0. `restart` (a
        dual head): both count from 0.
        """
        if style == "continuous":
            return self.place
        n_first = np.bincount(self.record[~self.is_second], minlength=self._n)[self.record]
        of_first = self.place if style == "restart" else max_response + n_first - 1 - self.place
        return np.where(self.is_second, self.place - n_first, of_first)

    def roles(self) -> np.ndarray:
        """Role of each token (S,): context turn i of n has (n - i) % 2, [CLS] and the response 0."""
        ends = (self.ids == EOS_ID) & ~self.is_second
        n_before = np.cumsum(ends) - ends  # turn ends before this token, over all records
        n_upto_record = np.cumsum(np.bincount(self.record[ends], minlength=self._n))
        in_turn = ~self.is_second & (self.place > 0)
        return np.where(in_turn, (n_upto_record[self.record] - n_before) % 2, 0)

    @property
    def _n(self) -> int:
        return int(self.record[-1]) + 1 if len(self.record) else 0


@dataclass(frozen=True)
class Masked:
    """Words that are hidden, and what stands in their place."""

    chosen: np.ndarray
    """(S,) whether the token is to be predicted."""
    ids: np.ndarray
    """(S,) what is read."""


def build_unit(
    records: Records,
    layout: UnitLayout,
    *,
    drop_last: bool = True,
    latent_slot: int | None = None,
    positions: Positions = "continuous",
    max_response: int = 0,
    roles: bool = False,
    masked: Masked | None = None,
    context_of: np.ndarray | None = None,
) -> Unit:
    """The tensors of a unit, without those that only training needs.

    Args:
        records: in the order of the layout.
        layout: where each of them stands.
        drop_last: leave out the last id of each record: it is predicted, and predicts nothing.
        latent_slot: the id ([MASK]) that holds the place of z before each record, at type and position 0.
        positions: see `Tokens.positions`.
        max_response: ids of the longest response, for relative positions.
        roles: with `role_ids`.
        masked: of `records.tokens()`, to predict these words in place of the second part.
        context_of: (n,) the record that each one shares its context with: itself, or one shortly before it
            and then its own first part is empty. The unit has `branch_ids`.
    """
    tokens, front = records.tokens(drop_last), int(latent_slot is not None)
    sample_index = layout.rows * layout.row_length + layout.columns
    slot = (sample_index + front)[tokens.record] + tokens.place
    own = np.arange(len(layout.rows))
    in_row = own - np.searchsorted(layout.rows, layout.rows)
    head = own if context_of is None else context_of
    shared = np.where(head == own, 0, records.length[head, 0])  # (n,) slots before its own
    values = {
        "token_ids": tokens.ids if masked is None else masked.ids,
        "type_ids": tokens.is_second,
        "pos_ids": tokens.positions(positions, max_response) + shared[tokens.record],
        "segment_ids": (in_row + 1)[head][tokens.record],
        **({"role_ids": tokens.roles()} if roles else {}),
        **({} if context_of is None else {"branch_ids": tokens.is_second * (own - head + 1)[tokens.record]}),
    }
    rows = np.zeros((len(values), layout.n_rows * layout.row_length), dtype=np.int64)
    for row, value in zip(rows, values.values(), strict=True):
        row[slot] = value
    filled = dict(zip(values, rows, strict=True))
    if latent_slot is not None:
        filled["token_ids"][sample_index] = latent_slot
        filled["segment_ids"][sample_index] = in_row + 1
    if masked is None:
        targets = _second_part(records, sample_index + front)
    else:
        targets = slot[masked.chosen], tokens.ids[masked.chosen], tokens.record[masked.chosen]
    shape = layout.n_rows, layout.row_length
    unit: Unit = {name: torch.from_numpy(row.reshape(shape)) for name, row in filled.items()}  # type: ignore[assignment]
    unit["sample_index"] = torch.from_numpy(sample_index)
    unit["target_index"], unit["target_ids"], unit["target_sample"] = map(torch.from_numpy, targets)
    return unit


def _second_part(records: Records, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, id and record of each target: place p predicts the id at p + 1, from the second [CLS] on."""
    n_target = np.maximum(records.length[:, 1] - 1, 0)
    index = ranges(start + records.length[:, 0], n_target)
    ids = records.token_ids[ranges(records.first[:, 1] + 1, n_target)].astype(np.int64)
    return index, ids, np.repeat(np.arange(len(n_target)), n_target)


def pack(
    pairs: Pairs, *, drop_last: bool = False, latent_slot: int | None = None, roles: bool = False
) -> tuple[Unit, torch.Tensor]:
    """Pairs in as few rows as best fit finds; for the arguments see `build_unit`.

    Returns:
        The unit, and the number (N,) of the pair that each of its records is.
    """
    records = Records.of(pairs)
    layout = in_rows(records.length.sum(axis=1) + int(latent_slot is not None) - int(drop_last))
    order = layout.items
    ordered = Records(records.token_ids, records.first[order], records.length[order])
    unit = build_unit(ordered, layout, drop_last=drop_last, latent_slot=latent_slot, roles=roles)
    return unit, torch.from_numpy(order)


def pack_branches(
    branches: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], *, roles: bool = False
) -> tuple[Unit, torch.Tensor]:
    """Contexts, each with several responses that follow it, in as few rows as best fit finds.

    Args:
        branches: n contexts, and the responses to each, at least one.
        roles: see `build_unit`.

    Returns:
        The unit, and the number (N,) of the response that each of its records is.
    """
    n_responses = np.array([len(responses) for _, responses in branches])
    pairs: list[tuple[Sequence[int], Sequence[int]]] = [
        ((), response) if number else (context, response)
        for context, responses in branches
        for number, response in enumerate(responses)
    ]
    records = Records.of(pairs)
    length = records.length.sum(axis=1) - 1  # of each record
    first = n_responses.cumsum() - n_responses
    layout = in_rows(np.add.reduceat(length, first))
    order = ranges(first[layout.items], n_responses[layout.items])
    ordered = Records(records.token_ids, records.first[order], records.length[order])
    spread, context_of = spread_branches(layout, n_responses[layout.items], length[order])
    unit = build_unit(ordered, spread, roles=roles, context_of=context_of)
    return unit, torch.from_numpy(order)


def spread_branches(
    layout: UnitLayout, n_branches: np.ndarray, length: np.ndarray
) -> tuple[UnitLayout, np.ndarray]:
    """Where the responses to a context stand, one after the other in the place of the whole.

    Args:
        layout: of n contexts with their responses.
        n_branches: (n,) responses of each.
        length: (N,) slots of each response, of the first one the context's included.

    Returns:
        The layout of the N records, and `context_of` of `build_unit`.
    """
    head = n_branches.cumsum() - n_branches  # (n,) the first record of each
    context_of = np.repeat(head, n_branches)
    before = length.cumsum() - length
    columns = np.repeat(layout.columns, n_branches) + before - before[context_of]
    rows = np.repeat(layout.rows, n_branches)
    return UnitLayout(np.arange(len(length)), rows, columns, layout.n_rows, layout.row_length), context_of


def in_rows(lengths: np.ndarray, row_length: int = ROW_LENGTH) -> UnitLayout:
    """Items of these lengths in rows of `row_length`, or of the longest, which are cut to what is filled."""
    row_length = max(row_length, int(lengths.max()))
    row = best_fit_rows(lengths, row_length)
    items = np.argsort(row, kind="stable")
    row, ends = row[items], np.cumsum(lengths[items])
    columns = ends - lengths[items]
    columns -= columns[np.searchsorted(row, row)]
    return UnitLayout(items, row, columns, int(row[-1]) + 1, int((columns + lengths[items]).max()))


def one_a_row(lengths: np.ndarray) -> UnitLayout:
    """Each record in a row of its own."""
    rows = np.arange(len(lengths))
    return UnitLayout(rows, rows, np.zeros_like(rows), len(rows), int(lengths.max()))
