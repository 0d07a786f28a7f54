"""Reddit's test split: communities that are not trained on, and later months."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import (
    NODES,
    assert_adds_up,
    comment,
    digest,
    facts_of,
    index_of,
    outcome,
    prepare,
    records,
    refused,
)

from benchmarks.reddit_dumps import DumpFacts
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.clean import message_key
from plato2.prepare.reddit.rules import RedditRules
from plato2.prepare.reddit.threads import TreeOptions, build_threads
from plato2.words import split_words

DAYS = {"valid_from": "2011-05-10", "test_from": "2011-06-10"}
SHAPE: dict[str, Any] = {"workers": 1, "shard_nodes": 150, "valid_samples": 10_000}


@pytest.fixture(scope="module")
def made(dumps: DumpFacts, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Prepares the dumps once for each set of options."""
    folder, done = tmp_path_factory.mktemp("splits"), dict[str, Path]()

    def run(**options: Any) -> Path:
        name = "-".join(map(str, options.values()))
        if name not in done:
            given = (
                SHAPE | {"tokenizer": tokenizer, "work": str(folder / "work"), "keep_work": True} | options
            )
            done[name] = prepare(folder / name, dumps.comments, **given)
        return done[name]

    return run


def held_out(folder: Path) -> set[str]:
    with (folder / "subreddits.csv").open(newline="") as file:
        return {row["subreddit"] for row in csv.DictReader(file) if row["split"] == "test"}


def test_communities_are_held_out_and_validation_stays(made: Callable[..., Path]) -> None:
    off = made(valid_from=DAYS["valid_from"])
    on = made(valid_from=DAYS["valid_from"], test_fraction=0.3)
    assert list(index_of(off)["splits"]) == ["train", "valid"]
    assert list(index_of(on)["splits"]) == ["train", "valid", "test"]
    assert index_of(on)["splits"]["valid"] == index_of(off)["splits"]["valid"]
    digest(on)
    assert_adds_up(on)
    facts = facts_of(on)
    names = held_out(on)
    assert len(names) == facts["held_out"] > 0
    kept = {name: forum["kept"] for name, forum in facts["subreddits"].items()}
    assert 0 < sum(kept[name] for name in names) <= 0.3 * sum(kept.values())
    lost = Counter(records(off, "train")) - Counter(records(on, "train"))
    assert sum(lost.values()) == facts["n_held_out"]
    assert not Counter(records(on, "train")) - Counter(records(off, "train"))
    assert not Counter(records(on, "test")) - lost
    train = set(records(on, "train"))
    repeated = {split: sum(record in train for record in records(on, split)) for split in ("valid", "test")}
    assert facts["repeated_in_train"] == repeated
    assert f"- test: {len(names):,} communities" in (on / "card.md").read_text()


def test_no_tree_is_in_two_splits_and_months_are_apart(made: Callable[..., Path]) -> None:
    """Chosen again by looking at each sample of all nodes at once."""
    out = made(**DAYS, test_fraction=0.3)
    work = out.parent / "work"
    nodes = pa.concat_tables([pq.read_table(path) for path in work.glob(NODES)])
    (repeated,) = work.glob("repeated-*/repeated.parquet")
    gone = {*pq.read_table(repeated).column("text_key").to_pylist()}
    nodes = nodes.filter(pa.array([key not in gone for key in nodes.column("text_key").to_pylist()]))
    samples = build_threads(nodes, TreeOptions())
    communities = np.array([message_key(name) for name in held_out(out)], dtype=np.uint64).view(np.int64)
    first, last = (int(np.datetime64(day, "s").astype(int)) for day in DAYS.values())
    splits, trees = [], dict[int, set[str]]()
    for moment, community, tree in zip(samples.time, samples.community, samples.tree, strict=True):
        if moment >= last:
            split = "test"
        elif moment >= first:
            split = "valid"
        else:
            split = "test" if community in communities else "train"
        splits.append(split)
        trees.setdefault(tree, set()).add(split)
    expected: dict[str, list[tuple[int, ...]]] = {"train": [], "valid": [], "test": []}
    for row, split in enumerate(splits):
        if split != "test" or trees[samples.tree[row]] == {"test"}:
            ids = samples.token_ids[samples.offsets[row] : samples.offsets[row + 1]].tolist()
            expected[split].append((int(samples.context_len[row]), *ids))
    assert records(out, "valid") == expected["valid"]
    assert records(out, "test") == expected["test"]
    assert Counter(records(out, "train")) == Counter(expected["train"])
    few = made(**DAYS, test_fraction=0.3, test_samples=7)
    assert records(few, "test") == expected["test"][:7]


@pytest.mark.slow
def test_workers_and_a_resumed_run_change_nothing(
    made: Callable[..., Path], dumps: DumpFacts, tokenizer: str, tmp_path: Path
) -> None:
    given = SHAPE | DAYS | {"tokenizer": tokenizer, "test_fraction": 0.3, "workers": 2}
    assert outcome(prepare(tmp_path / "out", dumps.comments, **given)) == outcome(
        made(**DAYS, test_fraction=0.3)
    )


@pytest.mark.slow
def test_evaluation_sets_are_removed_from_training(
    made: Callable[..., Path], dumps: DumpFacts, tokenizer: str, tmp_path: Path
) -> None:
    """The same by one process and by two; validation stays."""
    plain = made(valid_from=DAYS["valid_from"])
    decode = Tokenizer.load(tokenizer).decode

    def words(record: tuple[int, ...]) -> str:
        return " ".join(split_words(" ".join(map(decode, turns_of(record)))))

    longest = max(records(plain, "train"), key=lambda record: len(split_words(words(record))))
    run_of_words = words(longest).split()[-20:]
    sets = tmp_path / "set.txt"
    sets.write_text(" ".join(run_of_words) + "\n")
    given = {"tokenizer": tokenizer, "valid_from": DAYS["valid_from"], "without": [str(sets)]}
    one, two = (prepare(tmp_path / str(n), dumps.comments, **SHAPE | given | {"workers": n}) for n in (1, 2))
    assert outcome(one) == outcome(two)
    assert_adds_up(one)
    runs = {" ".join(run_of_words[start : start + 13]) for start in range(8)}
    expected = [r for r in records(plain, "train") if not any(run in words(r) for run in runs)]
    assert Counter(records(one, "train")) == Counter(expected)
    assert index_of(one)["splits"]["valid"] == index_of(plain)["splits"]["valid"]
    n_removed = len(records(plain, "train")) - len(expected)
    assert facts_of(one)["n_removed"] == facts_of(one)["removed"][0]["train"] == n_removed > 0
    assert f"| set.txt, n-gram | {n_removed} |" in (one / "card.md").read_text()


def turns_of(record: tuple[int, ...]) -> list[list[int]]:
    turns: list[list[int]] = [[]]
    for token in record[1:]:
        if token > 2:
            turns[-1].append(token)
        else:
            turns.append([])
    return turns


def test_one_community_is_trained_on(small: Callable[..., Path]) -> None:
    """It is more than the share, so nothing is held out."""
    lines = [
        comment(
            n,
            f"t1_c{n - 1:05d}" if n % 9 else "t3_zz1",
            f"number {n} says hello",
            created_utc=1_294_000_000 + 3600 * n,
        )
        for n in range(90)
    ]
    on, off = (
        small(name, lines, rules=RedditRules.off(), valid_from=None, test_fraction=n)
        for name, n in (("on", 0.02), ("off", 0.0))
    )
    assert digest(on) == digest(off)
    assert list(index_of(on)["splits"]) == ["train", "valid"]


def test_impossible_options_are_refused(small: Callable[..., Path], sound: list[bytes]) -> None:
    for options, parts in (
        ({"test_fraction": 1.0}, ["test_fraction=1.0"]),
        ({"test_from": "soon"}, ["test_from='soon'", "2019-08-01"]),
        ({"test_from": "2011-01-20"}, ["test_from='2011-01-20'", "valid_from"]),
        ({"test_from": "2031-01-20"}, ["test_from='2031-01-20'", "no sample"]),
    ):
        refused(*parts, call=lambda options=options: small("no", sound, **options))  # type: ignore[misc]
