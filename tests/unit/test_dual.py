"""The dual head: contexts and responses read apart, learned by contrast, its score made a probability."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from units import Packed, make_stage, make_window, pack_for

from plato2.config import UserError
from plato2.data.collate import CoherenceBatch
from plato2.model import losses
from plato2.model.backbone import mean_slots
from plato2.model.networks import EvaluationNetwork
from plato2.talk import rank
from plato2.talk.rank import coherence, coherence_of_records
from plato2.weights.folder import load_evaluation, load_stage


def dual(**arguments: Any) -> Any:
    return make_stage("2_eval", head="dual", **arguments)


def packed_pairs(n: int = 7, mask_prob: float = 0.0) -> Packed:
    return pack_for("2_eval", make_window(n), mask_prob=mask_prob, head="dual")


def read_alone(stage: Any, ids: list[int], is_response: bool) -> np.ndarray:
    """The outputs of a text's slots (T, H), by a pass over it alone."""
    row = torch.tensor([ids])
    types, segments = torch.full_like(row, int(is_response)), torch.ones_like(row)
    with torch.no_grad():
        x = stage.backbone.embed(row, types, torch.arange(len(ids))[None])
        h = stage.backbone.encode(x, stage.backbone.mask(segments))
    outputs: np.ndarray = h[0].double().numpy()
    return outputs


def slow_scores(stage: Any, packed: Packed) -> np.ndarray:
    """s(c_i, r_j) of all contexts and responses of a unit, text by text."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in stage.coherence.named_parameters()}

    table = stage.backbone.word.weight.detach().double().numpy()

    def turned(x: np.ndarray, side: str) -> np.ndarray:
        v: np.ndarray = x + weights[f"{side}.weight"] @ x + weights[f"{side}.bias"]
        return v / np.linalg.norm(v)

    def vector(ids: list[int], side: str) -> np.ndarray:
        h, e = read_alone(stage, ids, side == "response"), table[ids]
        e = (e - e.mean(axis=1, keepdims=True)) / np.sqrt(e.var(axis=1, keepdims=True) + 1e-5)
        shares = 1 / (1 + np.exp(-(e @ weights["word_weight.weight"][0] + weights["word_weight.bias"])))
        v = turned(h.mean(axis=0), side)
        v = v + turned((shares[:, None] * e).sum(axis=0) / shares.sum(), "words")
        return v / np.linalg.norm(v)

    records = [packed.record(i) for i in range(len(packed))]
    c = [vector(context, "context") for context, _ in records]
    r = [vector(response, "response") for _, response in records]
    scale = 20 * math.exp(weights["log_scale"].item())
    return np.array([[scale * float(ci @ rj) for rj in r] for ci in c])


def slow_contrast(scores: np.ndarray, texts: list[int]) -> list[float]:
    found = []
    for i in range(len(scores)):
        others = [j for j in range(len(scores)) if j == i or texts[j] != texts[i]]
        of_context = math.log(sum(math.exp(scores[i, j]) for j in others)) - scores[i, i]
        of_response = math.log(sum(math.exp(scores[j, i]) for j in others)) - scores[i, i]
        found.append((of_context + of_response) / 2)
    return found


# ------------------------------------------------------------------------------------------------- the losses


def test_contrast_is_the_slow_loop_over_texts_read_alone() -> None:
    stage, packed = dual(std=0.1), packed_pairs()
    scores = slow_scores(stage, packed)
    assert np.ptp(scores) > 0.5
    values = stage.losses(packed.unit)["contrast"]
    expected = slow_contrast(scores, list(range(len(packed))))
    torch.testing.assert_close(values.detach().double(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_contrast_leaves_out_responses_of_the_same_text() -> None:
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    texts = [4, 9, 4, 4, 7]
    expected = slow_contrast(scores.numpy(), texts)
    found = losses.contrast(scores, torch.tensor(texts))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert losses.contrast(torch.tensor([[3.0]]), torch.tensor([1])).tolist() == [0.0]
    assert losses.contrast(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)).tolist() == []
    equal = losses.contrast(torch.zeros(8, 8), torch.arange(8))
    assert equal.tolist() == pytest.approx([math.log(8)] * 8)


def test_masked_words_are_those_of_their_own_text() -> None:
    """A masked word is predicted from its own part alone: nothing of the other part changes it."""
    stage, packed = dual(std=0.1), packed_pairs(mask_prob=0.4)
    unit = packed.unit
    before = stage.losses(unit)["mlm"]
    of_response = unit["type_ids"].flatten()[unit["target_index"]] == 1
    assert 0 < of_response.sum() < len(of_response)
    changed = torch.where(unit["type_ids"] == 1, (unit["token_ids"] + 7) % 50, unit["token_ids"])
    after = stage.losses(unit | {"token_ids": changed})["mlm"]
    assert torch.equal(before[~of_response], after[~of_response])
    assert not torch.equal(before[of_response], after[of_response])


def test_nothing_of_a_context_reaches_its_response() -> None:
    """Not its words, and not its length: positions start again."""
    packed = packed_pairs()
    unit = packed.unit
    assert set(unit["pos_ids"].flatten()[unit["sample_index"]].tolist()) == {0}
    response_starts = (unit["type_ids"] == 1) & (unit["type_ids"].roll(1, dims=1) == 0)
    assert response_starts.sum() == len(packed)
    assert set(unit["pos_ids"][response_starts].tolist()) == {0}


def test_the_means_of_slots_are_a_slow_loop() -> None:
    x = torch.randn(2, 5, 3)
    parts = torch.tensor([[1, 1, 3, 0, 0], [2, 2, 2, 4, 0]])
    weights = torch.rand(2, 5) + 0.1
    found = mean_slots(x, weights, parts, 5)
    for part in range(1, 6):
        slots = [(b, t) for b in range(2) for t in range(5) if parts[b, t] == part]
        total = sum(weights[slot] for slot in slots)
        expected = sum(weights[slot] * x[slot] for slot in slots) / total if slots else torch.zeros(3)
        torch.testing.assert_close(found[part - 1], expected)


# ----------------------------------------------------------------------------------------- the batch of pairs


def test_a_unit_of_pairs_has_true_responses_only() -> None:
    packed = packed_pairs()
    unit = packed.unit
    assert unit["coherence_labels"].tolist() == [1] * 7
    assert (packed.items.contexts == packed.items.responses).all()
    assert len(set(unit["response_texts"].tolist())) == 7


def test_equal_responses_have_equal_numbers() -> None:
    window = make_window(6)
    samples = window.samples
    records = np.split(samples.token_ids, samples.offsets[1:-1])
    records[4] = np.concatenate([records[4][: samples.context_len[4]], records[1][samples.context_len[1] :]])
    samples = replace(
        samples,
        token_ids=np.concatenate(records),
        offsets=np.concatenate([[0], np.cumsum([len(record) for record in records])]),
    )
    packed = pack_for("2_eval", replace(window, samples=samples), mask_prob=0.0, head="dual")
    texts = dict(zip(packed.layout.items.tolist(), packed.unit["response_texts"].tolist(), strict=True))
    assert texts[4] == texts[1]
    assert len(set(texts.values())) == 5


# ------------------------------------------------------------------------------------------------ the ranking


def records_of(packed: Packed) -> list[tuple[list[int], list[int]]]:
    return [packed.record(i) for i in range(len(packed))]


def test_ranking_reads_each_context_once_and_scores_as_training_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, packed = dual(std=0.1).eval(), packed_pairs()
    stage.coherence.calibration.copy_(torch.tensor([0.7, -0.2]))
    records = records_of(packed)
    pairs = [(context, response) for context, _ in records for _, response in records]
    read: list[int] = []
    pack = rank.pack
    monkeypatch.setattr(rank, "pack", lambda parts, **how: (read.append(len(parts)), pack(parts, **how))[1])
    found = coherence_of_records(stage, pairs)
    expected = 1 / (1 + np.exp(-(0.7 * slow_scores(stage, packed) - 0.2)))
    assert found == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    assert read == [2 * len(packed)]  # 7 contexts and 7 responses for 49 pairs
    assert coherence_of_records(stage, []) == []


def test_what_else_is_ranked_does_not_matter() -> None:
    stage = dual(std=0.1).eval()
    pairs = [([1, 5, 6, 2], [7, 8]), ([1, 5, 2], [9]), ([1, 5, 6, 2], [])]
    together = coherence(stage, pairs)
    assert together == pytest.approx([coherence(stage, [pair])[0] for pair in pairs], abs=1e-6)
    with pytest.raises(ValueError, match="evaluation mode"):
        coherence(stage.train(), pairs)


@pytest.mark.parametrize("head", ["first", "dual"])
def test_weights_in_bfloat16_rank_with_every_head(head: str) -> None:
    """bfloat16 keeps 8 bits: a text's vector is off by some 2^-8, hence 20 cos(v(c), v(r)) by some 0.2."""
    stage = make_stage("2_eval", head=head).eval()
    pairs = pack_for("2_eval", make_window(7), head=head)
    records = [pairs.record(i) for i in range(len(pairs))]
    whole = np.array(coherence_of_records(stage, records))
    half = np.array(coherence_of_records(stage.to(torch.bfloat16), records))
    assert np.ptp(whole) > 0
    np.testing.assert_allclose(half, whole, atol=0.25 * 0.2)  # the sigmoid's slope is at most 0.25


def test_the_head_is_kept_in_checkpoint_and_network(tmp_path: Path) -> None:
    from runs import make_run

    run = make_run(tmp_path / "run", "2_eval", head="dual")
    stage: Any = load_stage(run)
    network = load_evaluation(run)
    assert isinstance(network, EvaluationNetwork)
    assert stage.head == "dual"
    assert network.coherence.state_dict().keys() == stage.coherence.state_dict().keys()
    assert "calibration" in network.coherence.state_dict()
    pairs = [([1, 50, 60, 2], [70, 80]), ([1, 50, 2], [90])]
    assert coherence(network, pairs) == coherence(stage, pairs)


# ---------------------------------------------------------------------------------------------- bad arguments


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"stage.head=second: choose first, dual or pmi"):
        make_stage("2_eval", head="second")
    with pytest.raises(UserError, match=r"stage.batch.head=second: choose first or dual"):
        CoherenceBatch(head="second")  # type: ignore[arg-type]


def test_validation_of_a_unit_compares_true_and_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, packed = dual(std=0.1).eval(), packed_pairs()
    given: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(stage.fitted, "update", lambda scores, labels: given.append((scores, labels)))
    with torch.no_grad():
        stage.losses(packed.unit)
    ((scores, labels),) = given
    s = slow_scores(stage, packed)
    expected = [value for i in range(7) for value in (s[i, i], s[i, (i + 1) % 7])]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert labels.tolist() == [1.0, 0.0] * 7
