"""Ranking: coherence is what the evaluation stage computes for the same record, best first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_stage

from plato2.config import RankConfig
from plato2.data.samples import encode_response
from plato2.data.tokenizer import Tokenizer
from plato2.talk.decode import Hypothesis
from plato2.talk.rank import PENALTY, coherence, penalty, rank

TOKENIZER = Tokenizer.load(KNOVER)
CONTEXTS = [[1, 70, 90, 2, 110, 2], [1, 330, 2]]
RESPONSES = [[50, 60, 70], [], [500] * 30, [7]]
PAIRS = [(context, response) for context in CONTEXTS for response in RESPONSES]


def roles_of(context: list[int], length: int) -> list[int]:
    """Token by token: how many turns end from here to the end of the context, modulo 2."""
    return [context[i:].count(2) % 2 if 0 < i < len(context) else 0 for i in range(length)]


def alone(evaluation: Any, context: list[int], response: list[int]) -> float:
    """p(l=1|c,r) by the stage's own pass over one unpadded record."""
    record = [*context, *encode_response(response)]
    length = len(record)
    unit = {
        "token_ids": torch.tensor([record]),
        "type_ids": (torch.arange(length) >= len(context)).long()[None],
        "pos_ids": torch.arange(length)[None],
        "segment_ids": torch.ones(1, length, dtype=torch.long),
        "sample_index": torch.tensor([0]),
        "target_index": torch.zeros(0, dtype=torch.long),
        "target_ids": torch.zeros(0, dtype=torch.long),
    }
    if evaluation.model_config.n_role:
        unit["role_ids"] = torch.tensor([roles_of(context, length)])
    with torch.no_grad():
        return float(evaluation.coherence_logits(unit).softmax(-1)[0, 1])


@pytest.mark.parametrize("n_role", [0, 2])
def test_coherence_is_the_stages_own_and_padding_changes_nothing(n_role: int) -> None:
    evaluation = make_stage("2_eval", n_role=n_role)
    expected = [alone(evaluation, context, response) for context, response in PAIRS]
    assert coherence(evaluation, PAIRS) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-3
    assert coherence(evaluation, []) == []


def test_a_response_beyond_the_positions_is_cut() -> None:
    evaluation = make_stage("2_eval", max_position=20)
    long = [(CONTEXTS[0], [40] * 99), (CONTEXTS[0], [40] * 13)]  # 6 + [CLS] + 13 fill the 20 positions
    assert coherence(evaluation, long)[0] == pytest.approx(coherence(evaluation, long)[1])


def test_candidates_ranked_in_parts_keep_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, backward = make_stage("2_eval"), make_stage("backward")
    hypotheses = [[Hypothesis((*r, 2), z, -1.0) for z, r in enumerate(RESPONSES)] for _ in CONTEXTS]

    def scores() -> list[list[float]]:
        weights = RankConfig({"coherence": 1.0, "backward": 0.1})
        ranked = rank(TOKENIZER, CONTEXTS, hypotheses, evaluation, None, weights, backward)
        return [[candidate.score for candidate in found] for found in ranked]

    whole, passes = scores(), []
    monkeypatch.setattr("plato2.talk.rank.ROWS_AT_ONCE", 3)
    evaluation.coherence.register_forward_hook(lambda module, given, logits: passes.append(len(logits)))
    assert np.allclose(scores(), whole, atol=1e-6)
    assert passes == [3, 3, 2]


def test_best_first() -> None:
    evaluation = make_stage("2_eval")
    hypotheses = [
        [Hypothesis((*response, 2), z, -z - 1.0) for z, response in enumerate(RESPONSES)] for _ in CONTEXTS
    ]
    ranked = rank(TOKENIZER, CONTEXTS, hypotheses, evaluation, config=RankConfig(penalties=False))
    for context, candidates in zip(CONTEXTS, ranked, strict=True):
        scores = [candidate.coherence for candidate in candidates]
        assert scores == sorted(scores, reverse=True)
        assert {candidate.latent for candidate in candidates} == {0, 1, 2, 3}
        for candidate in candidates:
            assert candidate.latent is not None
            response = RESPONSES[candidate.latent]
            assert candidate.token_ids == tuple(response)
            assert candidate.text == TOKENIZER.decode(response)
            assert candidate.coherence == pytest.approx(alone(evaluation, context, response), abs=1e-6)
    for candidates in rank(TOKENIZER, CONTEXTS, [found[::-1] for found in hypotheses]):
        assert [candidate.log_prob for candidate in candidates] == [-1.0, -2.0, -3.0, -4.0]
        assert [candidate.coherence for candidate in candidates] == [None] * 4


def hypothesis_of(text: str, ended: bool = True) -> Hypothesis:
    return Hypothesis((*TOKENIZER.encode(text), *[2] * ended), 0, -1.0)


@pytest.mark.parametrize(
    ("text", "is_penalized"),
    [
        ("i am fine , thanks .", False),
        ("would you like big cats ?", False),  # two words of a turn in a row
        ("really , you like walking more ?", True),  # three
        ("YOU LIKE Walking", True),  # whatever their case
        ("rowing ? i like cats", False),  # the end of one turn and the beginning of the next
        ("so am i , so am i", True),
        ("so am i , So AM I", True),  # other ids, the same words
        ("ha" * 20, True),  # one word, but ids that come again
        ("no no", False),
        ("no no no no", True),
        ("", False),
    ],
)
def test_three_words_of_a_turn_or_of_its_own_are_penalized(text: str, is_penalized: bool) -> None:
    turns = ["do you  like rowing ?", "i like walking", "You like walking more than rowing ?"]
    assert penalty(hypothesis_of(text), text, turns) == PENALTY * is_penalized
    assert penalty(hypothesis_of(text, ended=False), text, turns) == PENALTY


@pytest.mark.parametrize("words", [(), (TOKENIZER.encode("hi")[0],), (3,), (0, 1)])
def test_a_response_of_no_words_is_no_mistake(words: tuple[int, ...]) -> None:
    """Knover's bug B3."""
    ((candidate,),) = rank(
        TOKENIZER, CONTEXTS[:1], [[Hypothesis((*words, 2), 0, -1.0)]], config=RankConfig(penalties=True)
    )
    assert (candidate.penalty, candidate.score) == (0.0, -1.0)


def test_penalized_candidates_come_last() -> None:
    turns = [["it is late", "shall we walk home now ?"]]
    texts = ["shall we walk home ?", "yes yes yes yes", "it is not far .", "it is"]
    found = [
        Hypothesis((*TOKENIZER.encode(text), *[2] * (text != "it is")), z, -1.0 - z)
        for z, text in enumerate(texts)
    ]
    contexts = [[1, *(token for turn in turns[0] for token in (*TOKENIZER.encode(turn), 2))]]
    by_log_prob = rank(TOKENIZER, contexts, [found])
    assert [candidate.latent for candidate in by_log_prob[0]] == [0, 1, 2, 3]
    assert [candidate.penalty for candidate in by_log_prob[0]] == [0.0] * 4
    (candidates,) = rank(TOKENIZER, contexts, [found], config=RankConfig(penalties=True))
    assert [candidate.latent for candidate in candidates] == [2, 0, 1, 3]
    assert [candidate.score for candidate in candidates] == [-3.0, -1001.0, -1002.0, -1004.0]
    assert candidates == rank(TOKENIZER, contexts, [found], None, turns, config=RankConfig(penalties=True))[0]
    forgotten = [[1, 7, 2]]  # turns that fell out of the context count all the same
    assert (
        candidates == rank(TOKENIZER, forgotten, [found], None, turns, config=RankConfig(penalties=True))[0]
    )
    (without,) = rank(TOKENIZER, forgotten, [found], config=RankConfig(penalties=True))
    assert [candidate.latent for candidate in without] == [0, 2, 1, 3]
    evaluation = make_stage("2_eval")
    (coherent,) = rank(TOKENIZER, contexts, [found], evaluation)
    assert {c.latent: c.penalty for c in coherent} == {0: PENALTY, 1: PENALTY, 2: 0.0, 3: PENALTY}
    assert coherent[0].latent == 2
    for candidate in coherent:
        assert candidate.coherence is not None
        assert candidate.score == candidate.coherence - candidate.penalty


def test_special_tokens_have_no_text() -> None:
    ids = TOKENIZER.encode("hello there")
    ((candidate,),) = rank(TOKENIZER, CONTEXTS[:1], [[Hypothesis((1, *ids, 1, 2), 0, -1.0)]])
    assert candidate.text == "hello there"


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        coherence(make_stage("2_eval").train(), PAIRS)
