"""Training samples that have to do with evaluation sets are removed, whatever the order; others are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import KNOVER
from test_splits import hashes, run

from plato2.config import UserError
from plato2.data.examples import read_examples
from plato2.data.samples import encode_context, encode_response
from plato2.data.shards import read_index
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.dialogues import summary
from plato2.prepare.without import EvaluationTexts, WithoutOptions, read_texts

TOKENIZER = Tokenizer.load(KNOVER)
EVALUATED = [f"word{n} goes {n * 7} times over the {n} hill" for n in range(6)]
FRESH = ["sun", "rain", "tea", "river", "music", "garden", "window", "bread", "letter"]


def record(turns: list[str]) -> list[int]:
    context = encode_context([TOKENIZER.encode(turn) for turn in turns[:-1]], 512)
    assert context is not None
    return context + encode_response(TOKENIZER.encode(turns[-1]), 512)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> EvaluationTexts:
    path = tmp_path_factory.mktemp("sets") / "dialogues.jsonl"
    path.write_text(json.dumps({"turns": EVALUATED}) + "\n" + json.dumps({"turns": ["hi there", "oh hi"]}))
    return EvaluationTexts(WithoutOptions((str(path),)), TOKENIZER)


turn = st.lists(st.sampled_from(FRESH), min_size=1, max_size=8).map(" ".join)


@given(
    before=st.lists(turn, min_size=1, max_size=3),
    after=st.lists(turn, max_size=2),
    start=st.integers(0, 34),
    cut=st.integers(0, 12),
    shout=st.booleans(),
)
def test_a_planted_run_of_words_is_always_found(
    texts: EvaluationTexts, before: list[str], after: list[str], start: int, cut: int, shout: bool
) -> None:
    """Thirteen words in a row, over two turns, in any case and with punctuation; twelve are none."""
    words = " ".join(EVALUATED).split()[start : start + 13]
    planted = [" ".join(words[:cut]), " , ".join(words[cut:]) + " !"]
    turns = [*before, *(one.upper() if shout else one for one in planted if one), *after]
    fewer = [*before, " ".join(words[:-1]), *after]
    found = texts.matches([record(turns), record(fewer), record([*before, "nothing"])])
    assert found[0] is not None
    assert found[0].rule == "n-gram"
    assert found[1:] == [None, None]


@given(order=st.permutations(range(4)))
def test_order_and_company_change_nothing(texts: EvaluationTexts, order: list[int]) -> None:
    records = [record([*EVALUATED[:2], "yes"]), record(["tea", "rain"]), record(["hi there", "oh hi"])]
    records.append(record(["well", "hi there", "oh hi"]))
    alone = [texts.matches([one])[0] for one in records]
    assert [one is None for one in alone] == [False, True, False, True]  # a short text must be all of it
    assert texts.matches([records[i] for i in order]) == [alone[i] for i in order]


def test_near_duplicates(tmp_path: Path) -> None:
    """Each run of 13 words has another word in it, and most runs of three are the same."""
    words = [f"{FRESH[n % 9]}{n}" for n in range(60)]
    (tmp_path / "set.txt").write_text(" ".join(words) + "\n")
    changed = [word if n % 12 else "other" for n, word in enumerate(words)]
    options = WithoutOptions((str(tmp_path / "set.txt"),), similarity=0.5)
    one = record([" ".join(changed[:30]), " ".join(changed[30:])])
    (match,) = EvaluationTexts(options, TOKENIZER).matches([one])
    assert match is not None
    assert match.rule == "near-duplicate"
    strict = WithoutOptions(options.files, similarity=0.9)
    assert EvaluationTexts(strict, TOKENIZER).matches([one]) == [None]
    assert EvaluationTexts(WithoutOptions(options.files, similarity=0.0), TOKENIZER).matches([one]) == [None]


def test_the_formats_that_are_read(tmp_path: Path) -> None:
    lines = [
        {"turns": [{"text": "a", "speaker": "A"}, {"text": "b"}], "references": ["c"]},
        {"turns": ["d", "e"]},
        {"context": ["f", "g"], "candidates": ["h", "i"], "labels": [1, 0]},
        {"context": ["j"], "positive_responses": ["k"], "random_negative_responses": ["l"]},
        {"article": "m : n", "options": ["o"], "answers": "A"},
    ]
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    found = ["a b", "a c", "d e", "f g h", "f g i", "j k", "j l", "m : n o"]
    assert list(read_texts(str(path))) == found
    plain = tmp_path / "plain.txt"
    plain.write_text("one text\n\nanother\n")
    assert list(read_texts(str(plain))) == ["one text", "another"]
    for name, content, said in (
        ("empty.txt", b"\n", "no text in it"),
        ("bad.jsonl", b'{"a": 1}', "line 1 is no dialogue"),
        ("cut.jsonl", b'{"turns": ["a"', "line 1 is no dialogue"),
        ("latin.txt", b"\xff", "byte 1 is not UTF-8"),
        ("no.gz", b"x", "cannot be unpacked"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            list(read_texts(str(tmp_path / name)))
    with pytest.raises(UserError, match=r"missing\.txt"):
        list(read_texts(str(tmp_path / "missing.txt")))


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plato2.prepare.without.FILE_BYTES", 10_000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(100_000)))
    with pytest.raises(UserError, match=r"without=.*bomb\.gz: unpacks to more than 10,000 bytes"):
        list(read_texts(str(tmp_path / "bomb.gz")))


def test_prepare_removes_them_from_training_only(tmp_path: Path) -> None:
    dialogues = [[f"number {n} says {word} " * 3 for word in "abcd"] for n in range(60)]
    corpus = tmp_path / "talk.jsonl"
    corpus.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in dialogues))
    sets = tmp_path / "set.jsonl"
    given = {"valid_dialogues": 5, "test_dialogues": 5}
    plain = run(corpus, tmp_path / "plain", **given)
    in_train = [int(one.reference.split()[1]) for one in read_examples(plain, TOKENIZER, 999, "train")]
    of_sets = [min(in_train), 59]  # the second is for validation
    sets.write_text("".join(json.dumps({"turns": dialogues[n][:2]}) + "\n" for n in of_sets))
    folder = run(corpus, tmp_path / "out", without=[str(sets)], **given)
    left = [int(one.reference.split()[1]) for one in read_examples(folder, TOKENIZER, 999, "train")]
    assert sorted(left) == sorted(n for n in in_train if n != of_sets[0])
    for split in ("valid", "test"):
        assert hashes(folder, split) == hashes(plain, split)
    facts = read_index(folder).extra["facts"]
    assert facts["removed"] == [
        {"file": "set.jsonl", "rule": "n-gram", "train": 3, "valid": 3, "test": 0},
        {"file": "set.jsonl", "rule": "near-duplicate", "train": 0, "valid": 0, "test": 0},
    ]
    assert facts["counts"]["pairs_of_evaluation_sets"] == 3
    assert any("3 of set.jsonl (n-gram)" in line for line in summary(folder))
    card = (folder / "card.md").read_text()
    assert "| set.jsonl, n-gram | 3 | 3 | 0 |" in card
    assert "| - has to do with an evaluation set | 3 |" in card
    assert f"- set.jsonl, n-gram: ... number {of_sets[0]} says" in card
    again = run(corpus, tmp_path / "again", without=[str(sets)], **given)
    assert hashes(again, "train") == hashes(folder, "train")
