"""The PMI head: how much more probable a context makes a response, log p(r|c) - log p(r)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrained import MOSTLY_SLOW, folder, read  # noqa: F401  (folder is a fixture)
from torch import Tensor
from units import MODEL, STAGES, Packed, make_stage, make_window, pack

from plato2.config import UserError
from plato2.data.collate import CoherenceBatch, InformationBatch
from plato2.data.packing import UnitLayout
from plato2.data.units import pack as pack_pairs
from plato2.data.units import pack_branches
from plato2.model import masks
from plato2.model.pretrained import build_backbone
from plato2.talk import rank
from plato2.talk.rank import coherence, coherence_of_records, log_probs
from plato2.weights.folder import load_evaluation, load_stage, read_saved

Ids = list[int]


def pmi(**arguments: Any) -> Any:
    return make_stage("2_eval", head="pmi", **arguments)


def set_head(stage: Any) -> tuple[float, float]:
    """What i is multiplied by, and what is added."""
    with torch.no_grad():
        stage.coherence.log_scale.fill_(-0.004)
        stage.coherence.bias.fill_(0.003)
    return math.exp(-0.4), 0.3


def packed_items(n: int = 7, **options: Any) -> Packed:
    return pack(InformationBatch(**options), make_window(n))


def four_of(packed: Packed, sample: int) -> list[tuple[Ids, Ids]]:
    """(c, r), (c, r'), ([CLS], r), ([CLS], r') of an item, straight from the window."""
    context, own = packed.record(sample)
    assert packed.items.others is not None
    samples, other = packed.window.samples, packed.items.others[packed.layout.items[sample]]
    start = samples.offsets[other] + samples.context_len[other]
    random = samples.token_ids[start : samples.offsets[other + 1]].tolist()
    return [(context, own), (context, random), ([1], own), ([1], random)]


def slow_nll(stage: Any, pair: tuple[Ids, Ids]) -> np.ndarray:
    """-log p of each of a response's ids after [CLS], by a pass over this pair alone."""
    unit, _ = pack_pairs([pair], drop_last=True, roles=stage.backbone.role is not None)
    with torch.no_grad():
        mask = masks.additive(masks.prefix_lm(unit["segment_ids"], unit["type_ids"]), torch.float32)
        h = stage.backbone.encode(stage.backbone.embed_unit(unit), mask, read=unit["target_index"])
        logits = stage.backbone.lm_logits(h).double().log_softmax(-1)
    found: np.ndarray = -logits.gather(1, unit["target_ids"][:, None])[:, 0].numpy()
    return found


def slow_log_prob(stage: Any, pair: tuple[Ids, Ids]) -> float:
    return -float(slow_nll(stage, pair).sum())


# ------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("roles", [False, True])
def test_the_losses_are_a_slow_loop_over_pairs_read_alone(roles: bool) -> None:
    model = replace(MODEL, n_role=4) if roles else MODEL
    stage, packed = pmi(std=0.1, model=model), packed_items(roles=roles)
    scale, b = set_head(stage)
    found = {name: value.detach().double() for name, value in stage.losses(packed.unit).items()}
    rce, correct, own, alone = [], [], [], []
    for sample in range(len(packed)):
        nlls = [slow_nll(stage, pair) for pair in four_of(packed, sample)]
        logits = [scale * (nlls[k + 2].sum() - nlls[k].sum()) + b for k in (0, 1)]
        rce.append((np.logaddexp(0, -logits[0]) + np.logaddexp(0, logits[1])) / 2)  # equation 7
        correct.append((float(logits[0] > 0) + float(logits[1] <= 0)) / 2)
        own.append(nlls[0])
        alone.append(nlls[2])
    assert np.ptp(rce) > 0.01
    assert found["rce"].tolist() == pytest.approx(rce, abs=1e-4)
    assert found["coherence_acc"].tolist() == pytest.approx(correct)
    assert found["nll"].tolist() == pytest.approx(np.concatenate(own).tolist(), abs=1e-4)
    assert found["nll_alone"].tolist() == pytest.approx(np.concatenate(alone).tolist(), abs=1e-4)


def test_at_the_start_it_is_bayes_rule() -> None:
    """p(l=1|c,r) = p(r|c) / (p(r|c) + p(r)), before anything is learned."""
    stage: Any = STAGES["2_eval"](MODEL, head="pmi")  # type: ignore[call-arg]
    stage.eval()
    packed = packed_items()
    pair, alone = four_of(packed, 0)[0], four_of(packed, 0)[2]
    p_after, p_alone = (math.exp(slow_log_prob(stage, each)) for each in (pair, alone))
    (found,) = coherence_of_records(stage, [pair])
    assert found == pytest.approx(p_after / (p_after + p_alone), rel=1e-5)


def test_targets_that_losses_are_means_of_are_the_own_words() -> None:
    packed = packed_items()
    unit, batch = packed.unit, packed.batch
    n_own = sum(len(packed.record(sample)[1]) - 1 for sample in range(len(packed)))
    assert batch.count_targets(packed.window, packed.items, packed.layout.items) == n_own
    assert len(unit["own_targets"]) == len(unit["alone_targets"]) == n_own == int(unit["step_targets"])
    assert len(unit["target_ids"]) == sum(
        len(response) - 1 for sample in range(len(packed)) for _, response in four_of(packed, sample)
    )
    for name in ("own_targets", "alone_targets"):
        ids = unit["target_ids"][unit[name]].tolist()
        assert ids == [t for sample in range(len(packed)) for t in packed.record(sample)[1][1:]]


def test_an_item_takes_the_slots_it_says_and_no_more_than_the_longest() -> None:
    packed = packed_items()
    filled = np.bincount(packed.layout.rows, packed.items.slots[packed.layout.items])
    assert (packed.unit["segment_ids"] > 0).sum(1).tolist() == filled.tolist()
    index = type("Index", (), {"max_context": 28, "max_response": 11})  # of make_window's dialogues
    assert packed.items.slots.max() <= InformationBatch().longest(index)  # type: ignore[arg-type]


def test_a_unit_without_samples_has_no_terms_and_a_gradient_of_0() -> None:
    """What a rank gets that has none left."""
    nothing = np.zeros(0, dtype=np.int64)
    packed = packed_items()
    empty = UnitLayout(nothing, nothing, nothing, 1, 64)
    stage = pmi()
    terms = stage.losses(packed.batch.unit(packed.window, packed.items, empty))
    assert {name: len(value) for name, value in terms.items()} == dict.fromkeys(terms, 0)
    torch.stack([value.sum() for value in terms.values()]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in stage.coherence.parameters())


def test_no_response_sees_another() -> None:
    """Random responses are changed: what is said of the own ones stays bit for bit."""
    stage, packed = pmi(std=0.1), packed_items()
    set_head(stage)
    unit = packed.unit
    before = stage.losses(unit)
    others = unit["branch_ids"] == 2
    assert others.any()
    changed = torch.where(others, (unit["token_ids"] + 7) % 50, unit["token_ids"])
    after = stage.losses({**unit, "token_ids": changed})
    for name in ("nll", "nll_alone"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["rce"], after["rce"])


@pytest.mark.parametrize("family", MOSTLY_SLOW)
@pytest.mark.parametrize("context_mask", ["prefix", "causal"])
def test_a_decoder_reads_branches_as_it_reads_pairs(
    folder: Callable[[str], Path],  # noqa: F811
    family: str,
    context_mask: str,
) -> None:
    backbone = build_backbone(read(folder(family), context_mask=context_mask)).eval()
    contexts = [[1, 9, 30, 41, 2], [1, 9, 2, 77, 2], [1]]
    responses = [[1, 5, 6, 2], [1, 70, 2], [1, 12, 13, 14, 15, 2]]
    pairs = [(context, response) for context in contexts for response in responses]
    together = log_probs(backbone, pairs)
    alone = torch.cat([log_probs(backbone, [pair]) for pair in pairs])
    unit, order = pack_pairs(pairs, drop_last=True)
    with torch.no_grad():
        mask = backbone.mask(unit["segment_ids"], unit["type_ids"])
        x = backbone.embed_unit(unit)
        h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
        log_p = backbone.lm_logits(h).double().log_softmax(-1).gather(1, unit["target_ids"][:, None])[:, 0]
    packed = log_p.new_zeros(len(pairs)).index_add(0, order[unit["target_sample"]], log_p)
    torch.testing.assert_close(alone, packed, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(together, packed, atol=1e-4, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- branches

texts = st.lists(st.integers(3, 50), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=5)), min_size=1, max_size=6))
def test_branches_are_records_that_share_a_context(branches: list[tuple[Ids, list[Ids]]]) -> None:
    asked = [([1, *context, 2], [[1, *words, 2] for words in responses]) for context, responses in branches]
    unit, order = pack_branches(asked)
    flat = {name: unit[name].flatten().tolist() for name in ("token_ids", "pos_ids", "type_ids")}
    segments = (unit["segment_ids"] + 1000 * torch.arange(len(unit["segment_ids"]))[:, None]).flatten()
    branch = unit["branch_ids"].flatten()
    pairs = [(number, response) for number, (_, responses) in enumerate(asked) for response in responses]
    assert sorted(order.tolist()) == list(range(len(pairs)))
    seen = set()
    for record, pair in enumerate(order.tolist()):
        number, response = pairs[pair]
        start = int(unit["sample_index"][record])
        segment = segments[start]
        place = int(branch[start]) or 1  # the first record of a context begins with it
        of_context = ((segments == segment) & (branch == 0)).nonzero()[:, 0].tolist()
        of_response = ((segments == segment) & (branch == place)).nonzero()[:, 0].tolist()
        assert [flat["token_ids"][slot] for slot in of_context] == asked[number][0]
        assert [flat["token_ids"][slot] for slot in of_response] == response[:-1]
        whole = of_context + of_response
        assert [flat["pos_ids"][slot] for slot in whole] == list(range(len(whole)))
        assert [flat["type_ids"][slot] for slot in whole] == [0] * len(of_context) + [1] * len(of_response)
        seen.add((int(segment), place))
    assert len(seen) == len(pairs)
    targets = [unit["target_ids"][unit["target_sample"] == record].tolist() for record in range(len(pairs))]
    assert targets == [pairs[pair][1][1:] for pair in order.tolist()]


def test_who_sees_whom_among_branches() -> None:
    segments, branches = torch.tensor([[1, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 2, 0]])
    prefix = [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    rest = [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert masks.prefix_lm(segments, branches)[0].int().tolist() == prefix + rest
    causal = [[1, 0, 0, 0, 0, 0], *prefix[1:]]
    assert masks.causal(segments, branches)[0].int().tolist() == causal + rest


# ------------------------------------------------------------------------------------------------ the ranking


def test_ranking_reads_a_context_once_and_scores_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, packed = pmi(std=0.1).eval(), packed_items()
    scale, b = set_head(stage)
    fours = [four_of(packed, sample) for sample in range(len(packed))]
    pairs = [(four[0][0], response) for four in fours for _, response in four[:2]]
    read: list[tuple[int, int]] = []

    def note(branches: Any, **how: Any) -> tuple[Any, Tensor]:
        read.extend((len(context), len(responses)) for context, responses in branches)
        return pack_branches(branches, **how)

    monkeypatch.setattr(rank, "pack_branches", note)
    found = coherence_of_records(stage, pairs)
    for number, (context, response) in enumerate(pairs):
        information = slow_log_prob(stage, (context, response)) - slow_log_prob(stage, ([1], response))
        assert found[number] == pytest.approx(1 / (1 + math.exp(-scale * information - b)), abs=1e-5)
    n_responses = len({tuple(response) for _, response in pairs})
    assert sorted(read) == sorted([(len(four[0][0]), 2) for four in fours] + [(1, n_responses)])
    with torch.no_grad():
        correct = stage.losses(packed.unit)["coherence_acc"]
    right = np.array(found).reshape(-1, 2)
    assert correct.tolist() == pytest.approx(((right[:, 0] > 0.5) / 2 + (right[:, 1] <= 0.5) / 2).tolist())
    assert coherence_of_records(stage, []) == []


def test_what_else_is_ranked_and_how_many_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = pmi(std=0.1).eval()
    set_head(stage)
    contexts: list[Ids] = [[1, 5, 6, 2], [1, 5, 2], [1, 5, 6, 2, 9, 2]]
    pairs = [(context, [7 + n, *range(8, 8 + n)]) for context in contexts for n in range(6)]
    together = coherence(stage, pairs)
    assert together == pytest.approx([coherence(stage, [pair])[0] for pair in pairs], abs=1e-6)
    monkeypatch.setattr(rank, "BRANCHES", 2)
    monkeypatch.setattr(rank, "BRANCHES_AT_ONCE", 1)
    assert coherence(stage, pairs) == pytest.approx(together, abs=1e-6)
    with pytest.raises(ValueError, match="evaluation mode"):
        coherence(stage.train(), pairs)


def test_a_context_that_leaves_no_room_ranks_all_alike() -> None:
    stage = pmi(std=0.1).eval()
    _, b = set_head(stage)
    context = [1, *[5] * (MODEL.max_position - 3), 2]
    found = coherence(stage, [(context, [7, 8]), (context, [9])])
    assert found == pytest.approx([1 / (1 + math.exp(-b))] * 2)


def test_large_information_still_tells_candidates_apart() -> None:
    """In float32 both would be 1."""
    head = pmi().coherence
    with torch.no_grad():
        head.log_scale.zero_()
        head.bias.zero_()
    after = torch.tensor([-10.0, -11.0], dtype=torch.float64)
    p = head(after, torch.tensor([-40.0, -40.0], dtype=torch.float64)).softmax(-1)[:, 1]
    assert 1 > p[0] > p[1]


def test_weights_in_bfloat16_rank_alike() -> None:
    stage = pmi(std=0.1).eval()
    set_head(stage)
    pairs = [packed_items().record(sample) for sample in range(7)]
    whole = np.array(coherence_of_records(stage, pairs))
    half = np.array(coherence_of_records(stage.to(torch.bfloat16), pairs))
    assert np.ptp(whole) > 0
    np.testing.assert_allclose(half, whole, atol=0.05)


def test_the_head_is_kept_in_checkpoint_and_network(tmp_path: Path) -> None:
    from runs import make_run

    run = make_run(tmp_path / "run", "2_eval", head="pmi")
    stage: Any = load_stage(run)
    network = load_evaluation(run)
    assert stage.head == "pmi"
    assert network.coherence.state_dict().keys() == {"log_scale", "bias"}
    assert read_saved(run).use.training_only == ()  # it ranks by its language model
    pairs = [([1, 50, 60, 2], [70, 80]), ([1, 50, 2], [90])]
    assert coherence(network, pairs) == coherence(stage, pairs)


# ---------------------------------------------------------------------------------------------- bad arguments


def test_a_batch_of_another_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"stage.batch.head=dual: .* for pmi alone; use stage=2_eval"):
        InformationBatch(head="dual")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"stage.batch.head=pmi: choose first or dual; .*stage=2_eval_pmi"):
        CoherenceBatch(head="pmi")  # type: ignore[arg-type]
