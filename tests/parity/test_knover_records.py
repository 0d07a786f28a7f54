"""Turns -> record equals Knover's under each of its options (docs/spec.md, Records, records.json)."""

import json
from pathlib import Path

import pytest

from plato2.data import samples
from plato2.data.tokenizer import Tokenizer
from plato2.data.units import Records

KNOVER = Path(__file__).parents[1] / "fixtures" / "knover"
RECORDS = json.loads((KNOVER / "records.json").read_text())
TOKENIZER = Tokenizer.load(KNOVER)

OPTIONS = {
    "default": {},
    "truncate_first_turn": {"truncate_first_turn": True},
    "max_src_40_max_tgt_12": {"max_context": 40, "max_response": 12},
    "use_role": {},
    "relative_position": {"style": "relative"},
    "infer_no_tgt": {"response": "none"},
    "infer_with_tgt_prefix": {"response": "prefix"},
}


def build(
    sample, max_context=128, max_response=128, truncate_first_turn=False, style="continuous", response="whole"
):
    turns = [TOKENIZER.encode(turn) for turn in sample["src"].split("[SEP]")]
    context = samples.encode_context(turns, max_context, truncate_first_turn=truncate_first_turn)
    if context is None:
        return None
    reply = TOKENIZER.encode(sample["tgt"])
    if response == "whole":
        reply = samples.encode_response(reply, max_response)
    else:
        reply = samples.encode_prefix(reply if response == "prefix" else [], max_response)
    tokens = Records.of([(context, reply)]).tokens()
    return {
        "token_ids": context + reply,
        "type_ids": tokens.is_second.astype(int).tolist(),
        "pos_ids": tokens.positions(style, max_response).tolist(),
        "role_ids": tokens.roles().tolist(),
        "tgt_start_idx": len(context),
    }


def check(expected, built):
    if "error" in expected:
        assert built is None
        return
    for key in set(expected) - {"data_id"}:
        assert built[key] == expected[key], key


CASES = [(name, i) for name in OPTIONS for i in range(len(RECORDS[name]))]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_record(name, i):
    expected = RECORDS[name][i]
    check(expected, build(RECORDS["samples"][expected["data_id"]], **OPTIONS[name]))


EXTRA = [
    (name, i) for name in ("default", "truncate_first_turn") for i in range(len(RECORDS["extra"]["samples"]))
]


@pytest.mark.parametrize(("name", "i"), EXTRA)
def test_corner_case(name, i):
    check(RECORDS["extra"][name][i], build(RECORDS["extra"]["samples"][i], **OPTIONS[name]))


def test_the_fixtures_hold_what_this_file_claims():
    assert set(RECORDS) == {*OPTIONS, "samples", "extra"}
    assert all("role_ids" in record for record in RECORDS["use_role"])
    assert any("error" in record for record in RECORDS["extra"]["default"])
