"""The test split: whole conversations, never read in training, and nothing else changes with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import KNOVER

from plato2.config import UserError
from plato2.data.examples import read_examples, split_to_measure
from plato2.data.shards import read_index
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.clean import CleanRules
from plato2.prepare.dialogues import prepare, summary
from plato2.prepare.options import PrepareOptions
from plato2.prepare.splits import held_out, n_repeated, sample_keys

TOKENIZER = Tokenizer.load(KNOVER)
SPLITS = ("train", "valid", "test")


def write(path: Path, numbers: list[int]) -> Path:
    """A dialogue for each number, of its number in every turn; equal numbers are equal dialogues."""
    dialogues = [{"turns": [f"number {number} says {word}" for word in "abcd"]} for number in numbers]
    path.write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    return path


def run(path: Path, out: Path, **changes: object) -> Path:
    values = {"corpus": "jsonl", "files": [str(path)], "out": str(out), "tokenizer": str(KNOVER)}
    return prepare(
        PrepareOptions(**values | {"clean": CleanRules.off()} | changes),  # type: ignore[arg-type]
        show_progress=False,
    )


def dialogues_of(folder: Path, split: str) -> set[int]:
    """The numbers of the dialogues in a split."""
    if split not in read_index(folder).splits:
        return set()
    return {int(one.reference.split()[1]) for one in read_examples(folder, TOKENIZER, 10_000, split)}


def hashes(folder: Path, split: str) -> list[str]:
    return [shard.sha256 for shard in read_index(folder).splits[split].shards]


def test_a_conversation_is_in_one_split_and_validation_stays(tmp_path: Path) -> None:
    corpus = write(tmp_path / "talk.jsonl", list(range(100)))
    off = run(corpus, tmp_path / "off", test_fraction=0.0)
    on = run(corpus, tmp_path / "on", test_fraction=0.1)
    assert "test" not in read_index(off).splits
    found = [dialogues_of(on, split) for split in SPLITS]
    assert sorted(number for split in found for number in split) == list(range(100))  # each once
    assert len(found[2]) == 10
    assert hashes(on, "valid") == hashes(off, "valid")
    assert found[0] == dialogues_of(off, "train") - found[2]
    seeded = run(corpus, tmp_path / "seeded", test_fraction=0.1, seed=5)
    assert dialogues_of(seeded, "test") == found[2]
    assert "for validation and 30 for test" in summary(on)[0]
    card = (on / "card.md").read_text()
    assert "| for test | 30 |" in card
    assert "- test: random ones of the other dialogues" in card
    assert "\n| test | 30 | 1 |" in card


def test_a_tokenizer_that_is_trained_does_not_depend_on_the_test_split(tmp_path: Path) -> None:
    corpus = write(tmp_path / "talk.jsonl", list(range(60)))
    given = {"tokenizer": None, "vocab_pieces": 60}
    off, on = (run(corpus, tmp_path / str(n), test_fraction=n, **given) for n in (0.0, 0.2))
    assert read_index(on).tokenizer_sha256 == read_index(off).tokenizer_sha256
    assert hashes(on, "valid") == hashes(off, "valid")


def test_equal_dialogues_stay_together_and_what_is_repeated_is_reported(tmp_path: Path) -> None:
    numbers = [*range(50), *range(50), *range(40, 50)]  # the last ten, for validation, are there before
    folder = run(
        write(tmp_path / "talk.jsonl", numbers), tmp_path / "out", valid_dialogues=10, test_dialogues=6
    )
    train, valid, test = (dialogues_of(folder, split) for split in SPLITS)
    assert len(test) == 3
    assert not test & (train | valid)
    facts = read_index(folder).extra["facts"]
    assert facts["repeated"] == {"valid": 30, "test": 0}
    assert facts["counts"]["test_samples"] == 18
    assert "30 of the 30 valid samples are word for word in train as well" in summary(folder)


def test_a_small_corpus_goes_without(tmp_path: Path) -> None:
    corpus = write(tmp_path / "talk.jsonl", list(range(10)))
    folder = run(corpus, tmp_path / "out")
    assert list(read_index(folder).splits) == ["train", "valid"]
    assert any("no dialogue is held out for test" in line for line in summary(folder))
    assert split_to_measure(folder, None) == "valid"
    with pytest.raises(UserError, match=r"--split test: .* has valid to measure on"):
        split_to_measure(folder, "test")
    one = run(corpus, tmp_path / "one", test_dialogues=1)
    assert split_to_measure(one, None) == "test"
    assert split_to_measure(one, "valid") == "valid"
    with pytest.raises(UserError, match=r"valid_fraction=0\.02, test_dialogues=9: .* left to train on"):
        run(corpus, tmp_path / "all", test_dialogues=9)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=60),
    st.integers(0, 80),
    st.randoms(),
)
def test_held_out_is_a_function_of_the_keys(items, most, random):
    """Never more than asked for, equal keys together, in any order of the items."""
    keys = np.array([key for key, _ in items], dtype=np.uint64)
    sizes = np.array([size for _, size in items], dtype=np.int64)
    chosen = held_out(keys, sizes, most)
    assert sizes[chosen].sum() <= most
    assert not set(keys[chosen].tolist()) & set(keys[~chosen].tolist())
    order = list(range(len(items)))
    random.shuffle(order)
    assert held_out(keys[order], sizes[order], most).tolist() == chosen[order].tolist()


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=4), st.booleans()), max_size=20))
def test_samples_have_one_key_when_they_are_equal(samples):
    """Ids and the length of the context both count."""
    records = [tuple(ids) for ids, _ in samples]
    context_len = [1 if short else len(ids) - 1 for ids, short in samples]
    offsets = np.cumsum([0, *map(len, records)])
    flat = np.array([token for record in records for token in record], dtype=np.int64)
    keys = sample_keys(flat, offsets, np.array(context_len, dtype=np.int64)).tolist()
    pairs = list(zip(records, context_len, strict=True))
    assert [keys.index(key) for key in keys] == [pairs.index(pair) for pair in pairs]
    half = np.array(keys[: len(keys) // 2], dtype=np.uint64)
    rest = np.array(keys[len(keys) // 2 :], dtype=np.uint64)
    assert n_repeated(rest, half) == sum(pair in pairs[: len(half)] for pair in pairs[len(half) :])
