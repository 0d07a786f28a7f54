"""Stage 3: the nodes of whole threads to samples (rule 6 included), without recursion.

All threads of a shard are built at once over arrays: a node is a row, rows are sorted by id, `parent` is a
row. A node is alive when the way up from it ends at a root: at a submission (or at a comment on one, when
titles are no turns). The way ends elsewhere when a message was removed in an earlier stage, is missing from
the dumps, or answers itself through a cycle. The paper: "the message and its sub-tree are removed".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from plato2.data.packing import ranges
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.prepare.clean import overlaps
from plato2.random import hashed

Orphans = Literal["drop", "root"]
ORPHANS = "no parent in the dumps, or it was removed"
"""Why a message without one is left out."""


@dataclass(frozen=True)
class TreeOptions:
    """What stage 3 has to know."""

    max_overlap: float | None = 0.8
    """Rule 6; None: off."""
    orphans: Orphans = "drop"
    """A comment whose parent is not there: removed with all below it, or the root of a tree of its own."""
    max_context: int = 128
    """Ids of a context, special ids included."""
    max_response: int = 128
    """Ids of a response, special ids included."""
    cut_turn: bool = False
    """Keep the end of a parent that alone is too long, instead of losing the sample."""


@dataclass(frozen=True)
class ThreadSamples:
    """Samples in the order of their keys: sample i is `token_ids[offsets[i]:offsets[i + 1]]`."""

    token_ids: np.ndarray
    """Whole records, context and response, one after the other."""
    offsets: np.ndarray
    """(n + 1,) int64."""
    context_len: np.ndarray
    """(n,) int64."""
    time: np.ndarray
    """(n,) int64 seconds since 1970 of the responses."""
    keys: np.ndarray
    """(n,) uint64 hash of the response's id; rising."""
    response_ids: np.ndarray
    """(n,) int64 node ids of the responses."""
    tree: np.ndarray
    """(n,) int64 node ids of the roots above them: samples of one tree share turns."""
    community: np.ndarray
    """(n,) int64 the `community` of the roots."""
    n_nodes: Counter[str]
    """What became of the nodes, by reason."""
    lost: dict[int, Counter[str]]
    """The same by month (counted from year 0), without the samples."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.context_len)

    def take(self, rows: np.ndarray) -> ThreadSamples:
        """Some of the samples, in the order of `rows`."""
        lengths = np.diff(self.offsets)[rows]
        ids = self.token_ids[ranges(self.offsets[:-1][rows], lengths)]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns = ("context_len", "time", "keys", "response_ids", "tree", "community")
        taken = {name: getattr(self, name)[rows] for name in columns}
        return replace(self, token_ids=ids, offsets=offsets, **taken)


def build_threads(nodes: pa.Table, options: TreeOptions) -> ThreadSamples:
    """The samples of the threads in `nodes`, a table of `node_schema` in any order.

    A sample is every node with a parent: the nodes above it, as many whole turns as fit (the newest first),
    and the node itself as the response.
    """
    table, again = _sorted_once(nodes)
    ids = table.column("id").to_numpy()
    months = table.column("month").to_numpy()
    tokens = _Tokens.of(table)
    parent, is_orphan = _parents(ids, table.column("parent").to_numpy(), options.orphans)

    n = len(ids)
    dead = n  # a row beyond the last one: where the way up of an orphan ends
    up = np.where(is_orphan, dead, np.where(parent < 0, np.arange(n), parent))
    is_root = (parent < 0) & ~is_orphan
    top = _tops(up)
    alive = np.append(is_root, False)[top]
    in_cycle = ~alive & (top != dead)
    below_orphan = ~alive & ~in_cycle & ~is_orphan

    repeats_parent = np.zeros(n, dtype=bool)
    if options.max_overlap is not None:
        rows = np.flatnonzero(alive & (parent >= 0))
        repeats_parent[rows] = tokens.overlaps(rows, parent[rows], options.max_overlap)
        up[repeats_parent] = dead
    root = _tops(up)
    still = np.append(is_root, False)[root]
    below_repeat = alive & ~still & ~repeats_parent

    responses = np.flatnonzero(still & (parent >= 0))
    keys = hashed(ids[responses])
    responses, keys = responses[order := np.argsort(keys)], keys[order]
    fits = tokens.lengths[parent[responses]] + 2 <= options.max_context
    if not options.cut_turn:
        too_long, responses, keys = responses[~fits], responses[fits], keys[fits]
    else:
        too_long = responses[:0]
    reasons = {
        ORPHANS: is_orphan,
        "below such a message": below_orphan,
        "in or below a cycle": in_cycle,
        "rule 6": repeats_parent,
        "below a message removed by rule 6": below_repeat,
        "first of its tree: context only": still & (parent < 0),
        "its parent is too long for a context": np.isin(np.arange(n), too_long),
    }
    token_ids, offsets, context_len = tokens.samples(responses, parent, options)
    months_lost = {"the same message again": again.column("month").to_numpy()}
    months_lost |= {reason: months[mask] for reason, mask in reasons.items()}
    lost: dict[int, Counter[str]] = {}
    for reason, of_reason in months_lost.items():
        for month, count in zip(*np.unique(of_reason, return_counts=True), strict=True):
            lost.setdefault(int(month), Counter())[reason] = int(count)
    n_nodes = Counter({reason: len(of_reason) for reason, of_reason in months_lost.items()})
    n_nodes["samples"] = len(responses)
    time = table.column("time").to_numpy()[responses]
    community = table.column("community").to_numpy()[root[responses]]
    arrays = (context_len, time, keys, ids[responses], ids[root[responses]], community)
    return ThreadSamples(token_ids, offsets, *arrays, n_nodes, lost)


def _sorted_once(nodes: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(the nodes by id, each once; those left out); of different versions always the same one is taken."""
    columns = [nodes.column(name).to_numpy() for name in ("text_key", "parent", "time", "id")]
    order = np.lexsort([_ranks_of_same_ids(nodes), *columns])
    ids = columns[-1][order]
    is_first = np.append(True, ids[1:] != ids[:-1])[: len(ids)]
    return nodes.take(order[is_first]), nodes.take(order[~is_first])


def _ranks_of_same_ids(nodes: pa.Table) -> np.ndarray:
    """(n,) the order of nodes with the same id by their tokens: `text_key` is blind to case."""
    _, of_id, count = np.unique(nodes.column("id").to_numpy(), return_inverse=True, return_counts=True)
    ranks = np.zeros(len(nodes), dtype=np.int64)
    rows = np.flatnonzero(count[of_id] > 1)
    texts = nodes.column("token_ids").take(rows).to_pylist()
    ranks[rows[sorted(range(len(rows)), key=texts.__getitem__)]] = np.arange(len(rows))
    return ranks


def _parents(ids: np.ndarray, parent_ids: np.ndarray, orphans: str) -> tuple[np.ndarray, np.ndarray]:
    """(row of the parent or -1, whether a needed parent is missing), both (n,)."""
    rows = np.searchsorted(ids, parent_ids)
    rows[rows == len(ids)] = 0
    found = (ids[rows] == parent_ids) if len(ids) else np.zeros(0, dtype=bool)
    is_submission = ids % 2 == 1
    answers_submission = parent_ids % 2 == 1
    parent = np.where(found & ~is_submission, rows, -1)
    missing = ~found & ~answers_submission & ~is_submission
    return parent, missing if orphans == "drop" else np.zeros(len(ids), dtype=bool)


def _tops(up: np.ndarray) -> np.ndarray:
    """Where the way up from each row ends: (n,) rows; for rows of a cycle any row of it.

    Every step doubles the distance: a chain of 5,000 takes 13.
    """
    up = np.append(up, len(up))
    for _ in range(len(up).bit_length()):
        further = up[up]
        if np.array_equal(further, up):
            break
        up = further
    return up[:-1]


@dataclass(frozen=True)
class _Tokens:
    """The ids of all rows in one array, each row's followed by [SEP]; a [CLS] stands at the very end."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    """Without [SEP]."""

    @classmethod
    def of(cls, table: pa.Table) -> _Tokens:
        column = table.column("token_ids").combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        offsets = column.offsets.to_numpy().astype(np.int64)
        lengths = np.diff(offsets)
        starts = np.concatenate([[0], np.cumsum(lengths + 1)])
        ids = np.full(starts[-1] + 1, EOS_ID, dtype=np.int64)
        ids[ranges(starts[:-1], lengths)] = column.values.to_numpy()[offsets[0] : offsets[-1]]
        ids[-1] = BOS_ID
        return cls(ids, starts[:-1], lengths)

    def overlaps(self, rows: np.ndarray, parents: np.ndarray, max_overlap: float) -> np.ndarray:
        """Rule 6 for each of `rows` and the row it answers."""
        texts = self.ids.tolist()
        starts, ends = self.starts.tolist(), (self.starts + self.lengths).tolist()
        return np.fromiter(
            (
                overlaps(texts[starts[row] : ends[row]], texts[starts[above] : ends[above]], max_overlap)
                for row, above in zip(rows.tolist(), parents.tolist(), strict=True)
            ),
            dtype=bool,
            count=len(rows),
        )

    def samples(
        self, responses: np.ndarray, parent: np.ndarray, options: TreeOptions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token ids, offsets, context lengths) of the samples whose responses are these rows.

        A record is a row of segments of `ids`: [CLS], each turn with its [SEP], [CLS], the response.
        """
        n = len(responses)
        order, starts, lengths = [], [], []

        def segment(samples: np.ndarray, place: int, start: np.ndarray, length: np.ndarray) -> None:
            order.append(samples * _PLACES + place)
            starts.append(start)
            lengths.append(length)

        everyone = np.arange(n)
        bos, one = np.full(n, len(self.ids) - 1), np.ones(n, dtype=np.int64)
        segment(everyone, 0, bos, one)
        samples, turns = everyone, parent[responses]
        context_len = np.ones(n, dtype=np.int64)
        place = _PLACES - 3
        while len(samples):
            turn_len = self.lengths[turns] + 1
            start = self.starts[turns]
            if options.cut_turn and place == _PLACES - 3:  # the newest turn alone may be too long
                over = np.maximum(0, turn_len + 1 - options.max_context)
                start, turn_len = start + over, turn_len - over
            fits = context_len[samples] + turn_len <= options.max_context
            samples, turns, start, turn_len = samples[fits], turns[fits], start[fits], turn_len[fits]
            context_len[samples] += turn_len
            segment(samples, place, start, turn_len)
            place -= 1
            turns = parent[turns]
            samples, turns = samples[turns >= 0], turns[turns >= 0]
        segment(everyone, _PLACES - 2, bos, one)
        response_len = np.minimum(self.lengths[responses] + 1, options.max_response - 1)
        segment(everyone, _PLACES - 1, self.starts[responses], response_len)

        sequence = np.argsort(np.concatenate(order), kind="stable")
        token_ids = self.ids[ranges(np.concatenate(starts)[sequence], np.concatenate(lengths)[sequence])]
        offsets = np.concatenate([[0], np.cumsum(context_len + 1 + response_len)])
        return token_ids, offsets, context_len


_PLACES = 1 << 16
"""More than a record has segments: no context holds 65,535 turns."""
