"""Choosing a response among ten: the fixed set, its baseline, figures of models that do it well or badly."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_run, make_stage
from units import write_answers

from plato2.config import DecodeConfig
from plato2.data.selection import (
    CANDIDATES,
    TooFewResponses,
    inverse_document_frequency,
    overlap,
    read_selection,
)
from plato2.data.tokenizer import Tokenizer
from plato2.talk import selection as figures_module
from plato2.talk.decode import decode
from plato2.talk.rank import coherence, doubt
from plato2.talk.selection import (
    ValidationFigures,
    human_figures,
    overlap_figures,
    selection_figures,
    written_candidates,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_answers(folder, n_train=200, n_valid=75)
    return folder


# ---------------------------------------------------------------------------------------------------- the set


def test_a_selection_is_fixed_and_whole(corpus: Path) -> None:
    one, other = read_selection(corpus, 64), read_selection(corpus, 64)
    assert one.contexts == other.contexts
    assert one.responses == other.responses
    assert len(one.contexts) == len(one.responses) == 70  # a multiple of ten
    assert len({tuple(response) for response in one.responses}) == 70
    for groups in (one.random, one.matched):
        assert groups.shape == (7, CANDIDATES)
        assert sorted(groups.flatten().tolist()) == list(range(70))
    lengths = np.array([len(response) for response in one.responses])
    spread = {
        name: np.ptp(lengths[groups], axis=1).mean()
        for name, groups in vars(one).items()
        if name in ("random", "matched")
    }
    assert spread["matched"] < spread["random"] / 2
    assert len(read_selection(corpus, 9999).contexts) == 70  # of 75 validation samples


def test_too_few_responses_are_said(tmp_path: Path) -> None:
    write_answers(tmp_path, n_train=20, n_valid=8)
    with pytest.raises(
        TooFewResponses, match=r"8 different responses in the valid split, fewer than the 10 .*selection=0"
    ):
        read_selection(tmp_path, 100)


# ----------------------------------------------------------------------------------------------- the baseline


def test_rarity_and_overlap_are_slow_loops() -> None:
    texts = [[1, 5, 6, 2], [1, 5, 5, 7, 2], [1, 5, 8, 2]]
    rarity = inverse_document_frequency(texts, 10)
    expected = {word: math.log(4 / (n + 1)) for word, n in {5: 3, 6: 1, 7: 1, 8: 1, 3: 0, 9: 0}.items()}
    assert {word: rarity[word] for word in expected} == pytest.approx(expected)
    assert rarity[:3].tolist() == [0.0, 0.0, 0.0]
    contexts, responses = [[1, 6, 7, 7, 2], [1, 9, 2]], [[1, 6, 8, 2], [1, 7, 2], [1, 2]]
    found = overlap(contexts, responses, rarity)
    for i, context in enumerate(contexts):
        for j, response in enumerate(responses):
            shared = sum(rarity[word] ** 2 for word in set(context) & set(response))
            norm = math.sqrt(sum(rarity[word] ** 2 for word in set(response)))
            assert found[i, j] == pytest.approx(shared / norm if norm else 0.0, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the figures


def oracle(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    monkeypatch.setattr(
        figures_module, "coherence_of_records", lambda _, pairs: [score(*pair) for pair in pairs]
    )


def test_figures_of_the_perfect_the_blind_and_the_length_matcher(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = read_selection(corpus, 70)
    true = {tuple(c): r for c, r in zip(selection.contexts, selection.responses, strict=True)}
    oracle(monkeypatch, lambda c, r: float(true[tuple(c)] == r))
    assert set(selection_figures(None, selection).values()) == {1.0}  # type: ignore[arg-type]
    oracle(monkeypatch, lambda c, r: 0.5)
    blind = selection_figures(None, selection)  # type: ignore[arg-type]
    assert blind["pair_acc"] == pytest.approx(0.5)
    assert blind["p1"] == pytest.approx(0.1)
    oracle(monkeypatch, lambda c, r: -abs(len(r) - len(true[tuple(c)])))  # knows the true response's length
    found = selection_figures(None, selection)  # type: ignore[arg-type]
    assert found["p1"] > 0.3
    assert found["p1_matched"] < found["p1"] / 1.5  # which lengths matched unmask


def test_the_baselines_figures_are_those_of_its_scores(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = read_selection(corpus, 70)
    place = {tuple(c): i for i, c in enumerate(selection.contexts)}
    of_response = {tuple(r): j for j, r in enumerate(selection.responses)}
    oracle(monkeypatch, lambda c, r: selection.overlap[place[tuple(c)], of_response[tuple(r)]])
    assert selection_figures(None, selection) == pytest.approx(overlap_figures(selection))  # type: ignore[arg-type]


def test_real_heads_give_figures(corpus: Path) -> None:
    from units import make_stage as make_small

    selection = read_selection(corpus, 20)
    for head in ("first", "dual", "pmi"):
        stage = make_small("2_eval", head=head).eval()
        found = selection_figures(stage, selection)
        assert found.keys() == overlap_figures(selection).keys()
        assert all(0 <= value <= 1 for value in found.values())


# ------------------------------------------------------------------------------------ the human reply's place


def test_the_place_of_the_human_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, human = [[1, 5, 2], [1, 6, 2], [1, 7, 2]], [[1, 50, 2], [1, 51, 2], [1, 52, 2]]
    written = [[[1, 40 + k, 2] for k in range(4)] for _ in contexts]
    worth = {(5, 50): 0.9, (6, 51): 0.4, (7, 52): 0.0}
    oracle(
        monkeypatch,
        lambda c, r: worth.get((c[1], r[1]), {40: 0.1, 41: 0.2, 42: 0.5, 43: 0.3}[r[1]] if r[1] < 50 else 0),
    )
    found = human_figures(None, contexts, human, written)  # type: ignore[arg-type]
    assert found["human_first"] == pytest.approx(1 / 3)
    assert found["human_rank"] == pytest.approx((1 + 2 + 5) / 3)
    assert found["human_first_chance"] == pytest.approx(1 / 5)
    assert found["human_first_low"] < 1 / 3 < found["human_first_high"]


def test_candidates_are_what_decoding_writes() -> None:
    generation = make_stage("2_gen", vocab_size=Tokenizer.load(KNOVER).vocab_size)
    contexts = [[1, 50, 60, 2], [1, 70, 2]]
    written = written_candidates(generation, contexts)
    expected = decode(generation, contexts, DecodeConfig())
    assert [[tuple(record[1:]) for record in some] for some in written] == [
        [hypothesis.token_ids for hypothesis in some] for some in expected
    ]
    assert {record[0] for some in written for record in some} == {1}


def test_figures_of_a_stage_in_training(corpus: Path, tmp_path: Path) -> None:
    from units import MODEL
    from units import make_stage as make_small

    stage = make_small("2_eval", head="dual").eval()
    parent = make_run(tmp_path / "run", "1_coarse")
    data = SimpleNamespace(path=str(corpus), cache_dir=None)
    alone = ValidationFigures(data, 20, 5)(stage)
    assert "human_first" not in alone  # nobody to write candidates
    assert {"pair_acc", "p1_matched", "overlap_p1"} <= alone.keys()
    assert ValidationFigures(data, 0, 0, parent)(stage) == {}
    small = make_small("1_coarse", MODEL).eval()
    measured = ValidationFigures(data, 20, 5)
    measured.candidates = written_candidates(small, measured.selection.contexts[:5])
    random = torch.get_rng_state()
    found = measured(stage)
    assert torch.equal(random, torch.get_rng_state())
    assert 0 <= found["human_first"] <= 1
    assert found["human_first_chance"] == pytest.approx(1 / 21)
    assert measured(stage) == found
    with pytest.warns(UserWarning, match=r"human_rank=5: nothing to rank among"):
        assert "human_first" not in ValidationFigures(data, 20, 5, tmp_path / "none")(stage)


# ------------------------------------------------------------------------------------------- what it is worth


def test_a_ranking_that_shared_words_beat_is_doubted() -> None:
    good = {"pair_acc": 0.8, "overlap_pair_acc": 0.75, "p1": 0.5, "overlap_p1": 0.45}
    assert doubt(good) is None
    assert doubt({}) is None
    assert "51% of the cases, counting shared words in 75%" in str(doubt(good | {"pair_acc": 0.51}))
    assert "finds the true one of ten in 30%" in str(doubt(good | {"p1": 0.30}))


def test_the_network_keeps_the_figures_of_its_checkpoint(tmp_path: Path) -> None:
    from plato2.weights.folder import load_evaluation

    run = make_run(tmp_path / "run", "2_eval")
    assert load_evaluation(run).figures == {}
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"figures": {"p1": 0.25, "note": "?"}}, run / "checkpoints" / "last.ckpt")
    assert load_evaluation(run).figures == {"p1": 0.25}
    assert coherence(load_evaluation(run), []) == []
