"""Threads to samples against the paper's rule word for word, on random forests with every kind of damage."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.data.samples import encode_context, encode_response
from plato2.prepare.reddit.nodes import node_schema
from plato2.prepare.reddit.threads import ThreadSamples, TreeOptions, build_threads

MONTH = 2011 * 12
DAY = 86400


class Node(NamedTuple):
    id: int
    parent: int
    ids: list[int]
    time: int = 0
    key: int = 0
    shard: int = 0


def table(nodes: list[Node], vocab_size: int = 8001) -> pa.Table:
    columns = {
        "shard_key": [node.shard for node in nodes],
        "id": [node.id for node in nodes],
        "parent": [node.parent for node in nodes],
        "time": [node.time for node in nodes],
        "month": [MONTH + node.time // (30 * DAY) for node in nodes],
        "community": [7 for _ in nodes],
        "text_key": [node.key for node in nodes],
        "token_ids": [node.ids for node in nodes],
    }
    return pa.table(columns, schema=node_schema(vocab_size))


# (response's node id, time, context, response)
Sample = tuple[int, int, list[int], list[int]]


def samples_of(built: ThreadSamples) -> list[Sample]:
    records = [built.token_ids[a:b].tolist() for a, b in pairwise(built.offsets.tolist())]
    columns = (built.response_ids.tolist(), built.time.tolist(), records, built.context_len.tolist())
    return [(id, time, ids[:n], ids[n:]) for id, time, ids, n in zip(*columns, strict=True)]


# -- the paper's words -----------------------------------------------------------------------------------


def obvious(nodes: list[Node], options: TreeOptions) -> tuple[list[Sample], Counter[str]]:
    """What `build_threads` is to give, slowly: "the message and its sub-tree are removed"."""
    once: dict[int, Node] = {}
    for node in sorted(nodes, key=lambda node: (node.id, node.time, node.parent, node.key, node.ids)):
        once.setdefault(node.id, node)
    fates = Counter({"the same message again": len(nodes) - len(once)})

    def above(node: Node) -> Node | str:
        """Its parent, or what it is without one."""
        if node.id % 2:
            return "first"  # a submission
        if node.parent in once:
            return once[node.parent]
        return "first" if node.parent % 2 or options.orphans == "root" else "orphan"

    def path(node: Node) -> tuple[list[Node], str]:
        """(the nodes from the top down to it, what the top one is)."""
        nodes, seen = [node], {node.id}
        while isinstance(parent := above(nodes[0]), Node):
            if parent.id in seen:
                return nodes, "cycle"
            nodes.insert(0, parent)
            seen.add(parent.id)
        return nodes, parent

    def repeats(parent: Node, node: Node) -> bool:
        if options.max_overlap is None:
            return False
        left, shared = list(parent.ids), 0
        for token in node.ids:
            if token in left:
                left.remove(token)
                shared += 1
        return shared > options.max_overlap * len(node.ids)

    samples = []
    for node in once.values():
        nodes, top = path(node)
        repeating = [repeats(*pair) for pair in pairwise(nodes)]
        if top == "cycle":
            fates["in or below a cycle"] += 1
        elif top == "orphan":
            alone = len(nodes) == 1
            fates["no parent in the dumps, or it was removed" if alone else "below such a message"] += 1
        elif any(repeating):
            fates["rule 6" if repeating[-1] else "below a message removed by rule 6"] += 1
        elif len(nodes) == 1:
            fates["first of its tree: context only"] += 1
        else:
            turns = [turn.ids for turn in nodes[:-1]]
            context = encode_context(turns, options.max_context, cut_turn=options.cut_turn)
            if context is None:
                fates["its parent is too long for a context"] += 1
            else:
                fates["samples"] += 1
                samples.append((node.id, node.time, context, encode_response(node.ids, options.max_response)))
    return samples, fates


@st.composite
def forests(draw: st.DrawFn) -> list[Node]:
    """Few ids, so that every parent is somewhere or nearly: trees, cycles, missing parents, duplicates."""
    ids = st.integers(2, 40).map(lambda number: 2 * number - (number % 9 == 0))
    shape = draw(st.sampled_from(["any", "older", "chain"]))
    nodes = []
    for id in draw(st.lists(ids, max_size=25)):
        if id % 2:
            parent = id
        elif shape == "any":
            parent = draw(ids)
        elif shape == "older":
            parent = draw(ids.filter(lambda other, id=id: other < id or other % 2))
        else:
            parent = max((node.id for node in nodes if node.id < id), default=draw(ids))
        tokens = draw(st.lists(st.integers(3, 7), max_size=6))
        month, key = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        nodes.append(Node(id, parent, tokens, 30 * DAY * month, key))
    return nodes


OPTIONS = st.builds(
    TreeOptions,
    max_overlap=st.sampled_from([None, 0.0, 0.5, 0.8, 1.0]),
    orphans=st.sampled_from(["drop", "root"]),
    max_context=st.sampled_from([3, 4, 5, 8, 13, 128]),
    max_response=st.sampled_from([3, 4, 6, 128]),
    cut_turn=st.booleans(),
)


def positive(counts: Counter[str]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n}


@given(forests(), OPTIONS)
@settings(max_examples=400, deadline=None)
def test_random_forests(nodes: list[Node], options: TreeOptions) -> None:
    built = build_threads(table(nodes), options)
    samples, fates = obvious(nodes, options)
    assert sorted(samples_of(built)) == sorted(samples)
    assert positive(built.n_nodes) == positive(fates)
    assert built.n_nodes.total() == len(nodes)  # each node has one fate
    assert (np.diff(built.keys.astype(object)) > 0).all()
    months = Counter(MONTH + node.time // (30 * DAY) for node in nodes)
    for month, lost in built.lost.items():
        n_samples = sum(MONTH + time // (30 * DAY) == month for _, time, _, _ in samples)
        assert lost.total() + n_samples == months[month]
        assert "samples" not in lost
    reasons = sum(built.lost.values(), Counter())
    assert positive(reasons) == positive(fates - Counter(samples=fates["samples"]))


@given(forests(), OPTIONS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_rows_does_not_matter(nodes: list[Node], options: TreeOptions, random) -> None:
    built = build_threads(table(nodes), options)
    random.shuffle(nodes)
    cut = random.randint(0, len(nodes))  # nor do the pieces in which they come
    shuffled = pa.concat_tables([table(nodes[:cut]), table(nodes[cut:])])
    assert_same(built, build_threads(shuffled, options))
    assert_same(built, build_threads(pa.concat_tables([table(nodes), table(nodes)[:0]]), options))


def assert_same(one: ThreadSamples, other: ThreadSamples) -> None:
    for field in dataclasses.fields(ThreadSamples):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


@given(st.lists(forests(), max_size=5), OPTIONS, st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_shard_by_shard_is_all_at_once(forest: list[list[Node]], options: TreeOptions, n_shards: int) -> None:
    """Threads have ids of their own, and a thread is in one shard."""
    nodes = [
        node._replace(id=node.id + 100 * thread, parent=node.parent + 100 * thread, shard=thread * 7919)
        for thread, tree in enumerate(forest)
        for node in tree
    ]
    whole = build_threads(table(nodes), options)
    parts = [
        build_threads(table([node for node in nodes if node.shard % n_shards == shard]), options)
        for shard in range(n_shards)
    ]
    assert sorted(samples_of(whole)) == sorted(sample for part in parts for sample in samples_of(part))
    assert positive(whole.n_nodes) == positive(sum((part.n_nodes for part in parts), Counter()))
    for part in parts:  # a shard keeps the order of the whole
        assert [key for key in whole.keys if key in set(part.keys)] == part.keys.tolist()


@given(forests(), st.data())
@settings(deadline=None)
def test_take(nodes: list[Node], data: st.DataObject) -> None:
    built = build_threads(table(nodes), TreeOptions(None, "root"))
    rows = data.draw(st.lists(st.integers(0, len(built) - 1), max_size=9) if len(built) else st.just([]))
    samples = samples_of(built)
    assert samples_of(built.take(np.array(rows, dtype=np.int64))) == [samples[row] for row in rows]


# -- by hand ---------------------------------------------------------------------------------------------


def test_a_thread_by_hand() -> None:
    title, one, two, three = Node(7, 7, [10]), Node(2, 7, [11, 12]), Node(4, 2, [13]), Node(6, 4, [14])
    built = build_threads(table([three, two, title, one]), TreeOptions())
    assert {sample[0]: sample[2:] for sample in samples_of(built)} == {
        2: ([1, 10, 2], [1, 11, 12, 2]),
        4: ([1, 10, 2, 11, 12, 2], [1, 13, 2]),
        6: ([1, 10, 2, 11, 12, 2, 13, 2], [1, 14, 2]),
    }
    without = build_threads(table([three, two, one]), TreeOptions())  # the comment on the title is the root
    assert {sample[0]: sample[2] for sample in samples_of(without)} == {
        4: [1, 11, 12, 2],
        6: [1, 11, 12, 2, 13, 2],
    }
    gone = build_threads(table([three, two, title]), TreeOptions())  # a comment was removed: its sub-tree too
    assert len(gone) == 0
    assert positive(gone.n_nodes) == {
        "first of its tree: context only": 1,
        "no parent in the dumps, or it was removed": 1,
        "below such a message": 1,
    }
    rooted = build_threads(table([three, two, title]), TreeOptions(orphans="root"))
    assert [sample[2:] for sample in samples_of(rooted)] == [([1, 13, 2], [1, 14, 2])]


@pytest.mark.parametrize("changed", ["time", "parent", "key", "ids"])
def test_of_two_versions_always_the_same_is_taken(changed: str) -> None:
    """Also when they differ in nothing but the case of a letter, which `text_key` does not see."""
    top, first = Node(2, 1, [9]), Node(4, 2, [10, 11], 5, 5)
    second = first._replace(**{changed: [10, 12] if changed == "ids" else 6})
    nodes = [top, first, second, Node(6, 4, [20])]
    built = build_threads(table(nodes), TreeOptions())
    assert_same(built, build_threads(table([nodes[i] for i in (3, 2, 1, 0)]), TreeOptions()))
    assert built.n_nodes["the same message again"] == 1
    assert samples_of(built)[[sample[0] for sample in samples_of(built)].index(4)][3] == [1, 10, 11, 2]


@pytest.mark.parametrize(("max_overlap", "kept"), [(0.8, True), (0.79, False), (1.0, True), (None, True)])
def test_rule_6_at_its_threshold(max_overlap: float | None, kept: bool) -> None:
    """Four of five tokens stand in the parent."""
    nodes = [Node(2, 1, [10, 11, 12, 13]), Node(4, 2, [10, 11, 12, 13, 14])]
    assert len(build_threads(table(nodes), TreeOptions(max_overlap=max_overlap))) == kept


def test_rule_6_counts_each_token_as_often_as_the_parent_has_it() -> None:
    parent = Node(2, 1, [10, 11, 12])
    for ids, kept in (([10] * 4, True), ([10, 10, 11, 12], True), ([12, 11, 10], False)):
        assert len(build_threads(table([parent, Node(4, 2, ids)]), TreeOptions())) == kept


@pytest.mark.parametrize("vocab_size", [8001, 2**15, 2**15 + 1, 40001])
def test_ids_of_large_vocabularies(vocab_size: int) -> None:
    nodes = [Node(2, 1, [vocab_size - 2]), Node(4, 2, [vocab_size - 3])]
    (sample,) = samples_of(build_threads(table(nodes, vocab_size), TreeOptions()))
    assert sample[2:] == ([1, vocab_size - 2, 2], [1, vocab_size - 3, 2])


def test_nothing_at_all() -> None:
    for options in (TreeOptions(), TreeOptions(None, "root", cut_turn=True)):
        built = build_threads(table([]), options)
        assert (len(built), built.offsets.tolist(), built.n_nodes.total(), built.lost) == (0, [0], 0, {})


# -- large threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["none", "orphan", "cycle", "repeat"])
def test_a_chain_of_5000(damage: str) -> None:
    """0.05 s; a recursion would end at 1,000."""
    n = 5000
    nodes = [Node(2 * i + 2, 2 * i, [3 + i % 900, 1000 + i % 77]) for i in range(n)]
    nodes[0] = nodes[0]._replace(parent={"orphan": 10**9, "cycle": 2 * n}.get(damage, 1))
    if damage == "repeat":
        nodes[1] = nodes[1]._replace(ids=nodes[0].ids)
    built = build_threads(table(nodes[::-1]), TreeOptions(max_context=8))
    expected = {
        "none": {"first of its tree: context only": 1, "samples": n - 1},
        "orphan": {"no parent in the dumps, or it was removed": 1, "below such a message": n - 1},
        "cycle": {"in or below a cycle": n},
        "repeat": {
            "first of its tree: context only": 1,
            "rule 6": 1,
            "below a message removed by rule 6": n - 2,
        },
    }
    assert positive(built.n_nodes) == expected[damage]
    if damage == "none":
        last = next(sample for sample in samples_of(built) if sample[0] == 2 * n)
        turns = [node.ids for node in nodes]
        assert last[2:] == (encode_context(turns[:-1], 8), encode_response(turns[-1]))


def test_a_context_of_700_turns() -> None:
    """0.3 s; each sample holds all turns above it."""
    n = 700
    nodes = [Node(2 * i + 2, 2 * i or 1, [3 + i]) for i in range(n)]
    samples = samples_of(build_threads(table(nodes), TreeOptions(max_context=65535)))
    assert max(len(sample[2]) for sample in samples) == 1 + 2 * (n - 1)
    longest = next(sample for sample in samples if sample[0] == 2 * n)
    assert longest[2] == encode_context([node.ids for node in nodes[:-1]], 65535)


def test_a_thread_of_100000_comments() -> None:
    """2 s. Each comment answers one of those before it; some of the samples against the plain functions."""
    n = 100_000
    rng = np.random.default_rng(0)
    above = np.maximum(np.arange(n) - 1 - (rng.pareto(0.7, n) * 3).clip(0, n).astype(int), -1)
    ids = rng.integers(3, 8000, (n, 6), dtype=np.int16)
    schema = node_schema(8001)
    columns = {
        "shard_key": np.zeros(n, np.int64),
        "id": 2 * np.arange(n) + 2,
        "parent": np.where(above < 0, 1, 2 * above + 2),
        "time": np.arange(n),
        "month": np.full(n, MONTH, np.int32),
        "community": np.zeros(n, np.int64),
        "text_key": np.arange(n),
        "token_ids": pa.ListArray.from_arrays(np.arange(0, 6 * n + 1, 6, dtype=np.int32), ids.ravel()),
    }
    shuffled = pa.table(columns, schema=schema).take(rng.permutation(n))
    built = build_threads(shuffled, TreeOptions(max_context=64))
    n_first = int((above < 0).sum())
    assert positive(built.n_nodes) == {
        "first of its tree: context only": n_first,
        "samples": n - n_first,
    }
    rows = rng.choice(len(built), 200, replace=False)
    for id, time, context, response in samples_of(built.take(rows)):
        row, turns = id // 2 - 1, []
        assert time == row
        while (row := above[row]) >= 0:
            turns.insert(0, ids[row].tolist())
        assert context == encode_context(turns, 64)
        assert response == encode_response(ids[time].tolist())
