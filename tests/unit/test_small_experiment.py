"""experiments/small/unmask.py: where candidates are from, intervals by conversation, what z saves."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

UNMASK = runpy.run_path(str(ROOT / "experiments" / "small" / "unmask.py"))
Sample = UNMASK["Sample"]


def conversation(number: int, n_turns: int) -> list[object]:
    """Each response is a text of its own; the same two people speak in every second conversation."""
    return [
        Sample([1, 9, 2], [1, 100 * number + turn, 2], number, turn, f"{number % 2}-{turn % 2}")
        for turn in range(1, n_turns)
    ]


def test_groups_have_candidates_from_where_they_say() -> None:
    samples = [one for number in range(6) for one in conversation(number, 20)]
    kinds = UNMASK["groups_of"](samples)
    others, person, own = (kinds[name] for name in UNMASK["KINDS"])
    assert len(others) == len(person) == len(own) == len(samples)
    for group in (*others, *person, *own):
        assert len({tuple(samples[row].response) for row in group}) == 10
    for first, *rest in others:
        assert samples[first].dialogue not in {samples[row].dialogue for row in rest}
    for first, *rest in person:
        assert {samples[row].speaker for row in rest} == {samples[first].speaker}
        assert samples[first].dialogue not in {samples[row].dialogue for row in rest}
    for first, *rest in own:
        assert {samples[row].dialogue for row in rest} == {samples[first].dialogue}
        assert min(abs(samples[row].turn - samples[first].turn) for row in rest) >= UNMASK["APART"]


def test_an_interval_by_conversation_knows_that_contexts_are_alike() -> None:
    """Where all of a conversation have one value, it is as wide as that of the conversations alone."""
    rng = np.random.default_rng(0)
    of_each = rng.integers(0, 2, 40).astype(float)
    values, dialogues = np.repeat(of_each, 25), np.repeat(np.arange(40), 25)
    value, low, high = UNMASK["by_dialogue"](values, dialogues)
    assert value == pytest.approx(of_each.mean(), abs=1e-4)
    half = 1.96 * math.sqrt(of_each.var() / 40)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_how_a_text_is_typed_does_not_depend_on_its_words() -> None:
    style = UNMASK["style"]
    assert (style("I like red cars.") == style("I need two beds.")).all()
    assert (style("I like red cars.") != style("i like red cars")).any()


def test_z_saves_nats_only_where_writing_heeds_it(tmp_path: Path) -> None:
    def used(nll: list[float]) -> dict[str, float]:
        path = tmp_path / "scores.jsonl"
        line = {"nll_by_latent": nll, "posterior": [1.0, 0.0], "n_tokens": 2}
        path.write_text(json.dumps(line) + "\n" + json.dumps({"error": "too long"}) + "\n")
        return UNMASK["used"](path)

    assert used([3.0, 3.0])["nats saved"] == 0.0  # recognition is sure of z, writing does not care
    # Under the other z the response is impossible: z is worth ln 2, and no more than that.
    assert used([3.0, 80.0])["nats saved"] == pytest.approx(math.log(2), abs=1e-4)
    assert used([3.0, 1.0])["nats saved"] < 0.0


def test_people_are_counted_once() -> None:
    held_out, trained = [["a", "b", "a"], ["c", "d"]], [["b", "a"], ["a", "x"]]
    found = UNMASK["people"](held_out, trained)
    assert (found["people"], found["known_people"], found["conversations_of_a_known_pair"]) == (4, 2, 1)
    assert found["turns_of_known_people"] == 0.6
