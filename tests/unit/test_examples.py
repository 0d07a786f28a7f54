"""Samples of a prepared corpus read as the text they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import KNOVER, make_corpus, small_tokenizer_texts

from plato2.config import UserError
from plato2.data.examples import read_examples
from plato2.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.load(KNOVER)
PAIRS = [([f"question {n} ?", "", f"well , {n} ?"], f"answer {n} .") for n in range(11)]


def test_text_and_ids_are_those_of_the_corpus(tmp_path: Path) -> None:
    make_corpus(tmp_path, PAIRS)
    examples = read_examples(tmp_path, TOKENIZER, 11)
    assert [(example.turns, example.reference) for example in examples] == PAIRS
    assert [example.sample_id for example in examples] == list(range(11))
    assert examples[3].reference_ids == TOKENIZER.encode("answer 3 .")
    assert examples[3].context_ids[0] == 1


def test_few_are_spread_and_many_are_all(tmp_path: Path) -> None:
    make_corpus(tmp_path, PAIRS)
    assert [example.sample_id for example in read_examples(tmp_path, TOKENIZER, 3)] == [1, 5, 9]
    assert len(read_examples(tmp_path, TOKENIZER, 500)) == 11


def test_long_contexts_give_way_to_the_next(tmp_path: Path) -> None:
    long = [(["word " * 50], "yes .") if n in (1, 5) else pair for n, pair in enumerate(PAIRS)]
    make_corpus(tmp_path, long)
    found = read_examples(tmp_path, TOKENIZER, 3, max_context=40)
    assert [example.sample_id for example in found] == [2, 6, 9]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data", PAIRS)
    other = train_tokenizer(small_tokenizer_texts(), 60)
    with pytest.raises(UserError, match="data: prepared with another tokenizer"):
        read_examples(tmp_path / "data", other, 3)
    with pytest.raises(UserError, match="the train split is empty"):
        read_examples(tmp_path / "data", TOKENIZER, 3, split="train")
    (tmp_path / "data" / "valid-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"valid-00001\.parquet: shard is missing"):
        read_examples(tmp_path / "data", TOKENIZER, 3)
    with pytest.raises(UserError, match="no prepared corpus"):
        read_examples(tmp_path / "nothing", TOKENIZER, 3)
