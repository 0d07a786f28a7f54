"""Text -> ids -> text equals Knover's, case by case (docs/spec.md, Ids and text, tokenizer.json)."""

import json
from pathlib import Path

import pytest

from plato2.data.tokenizer import Tokenizer, preprocess

KNOVER = Path(__file__).parents[1] / "fixtures" / "knover"
FIXTURE = json.loads((KNOVER / "tokenizer.json").read_text())
CASES = FIXTURE["cases"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(KNOVER)


def test_special_ids(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert ids == tuple(FIXTURE[name] for name in ("pad", "bos", "eos", "unk", "mask"))
    assert tokenizer.vocab_size == 8001


@pytest.mark.parametrize("case", CASES, ids=[f"{case['text'][:20]!r}" for case in CASES])
def test_case(tokenizer, case):
    assert preprocess(case["text"]) == case["preprocessed"]
    assert tokenizer.pieces(case["text"]) == case["pieces"]
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["detok"]


def test_a_batch_is_the_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch([case["text"] for case in CASES]) == [case["ids"] for case in CASES]
