"""The stage p(c|r): its batches, its loss, and ranking by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import KNOVER, make_run
from runs import make_stage as make_trained
from slow import SlowPlato
from synthetic import records, window
from torch import Tensor
from units import MODEL, Packed, Unit, make_stage, make_window, pack_for

from plato2.config import RankConfig, UserError
from plato2.data.collate import BackwardBatch
from plato2.data.order import Batching, lay_out
from plato2.data.packing import UnitLayout
from plato2.data.shards import ShardIndex
from plato2.data.tokenizer import Tokenizer
from plato2.stages import BackwardGeneration, CoarseGeneration
from plato2.talk import rank as rank_module
from plato2.talk.bot import PlatoBot
from plato2.talk.decode import Hypothesis
from plato2.talk.rank import backward_log_probs, rank
from plato2.weights.export import export_to_huggingface
from plato2.weights.folder import load_backward, load_generation, load_stage

TOKENIZER = Tokenizer.load(KNOVER)


# ------------------------------------------------------------------------------------------------ the batch


def test_a_unit_written_by_hand() -> None:
    """Two samples in the first row; the second row's response was too long and so has no [SEP]."""
    made = [[1, 10, 11, 2, 12, 2, 1, 20, 21, 2], [1, 30, 2, 1, 40, 2], [1, 50, 2, 1, 60, 61, 62]]
    held, batch = window(made, [6, 3, 3]), BackwardBatch()
    items = batch.items(held)
    assert items.slots.tolist() == [9, 5, 6]
    layout = UnitLayout(np.arange(3), np.array([0, 0, 1]), np.array([0, 9, 0]), 2, 15)
    unit = batch.unit(held, items, layout)
    assert unit["token_ids"].tolist() == [
        [1, 20, 21, 2, 1, 10, 11, 2, 12, 1, 40, 2, 1, 30, 0],
        [1, 60, 61, 62, 1, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert unit["type_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert unit["pos_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 0],
        [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert unit["segment_ids"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert unit["sample_index"].tolist() == [0, 9, 15]
    assert unit["target_index"].tolist() == [4, 5, 6, 7, 8, 12, 13, 19, 20]
    assert unit["target_ids"].tolist() == [10, 11, 2, 12, 2, 30, 2, 50, 2]
    assert unit["target_sample"].tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert unit["sample_ids"].tolist() == [1000, 1001, 1002]
    assert [batch.count_targets(held, items, np.arange(n)) for n in range(4)] == [0, 5, 7, 9]
    assert set(unit) == {
        *("token_ids", "type_ids", "pos_ids", "segment_ids", "sample_index", "sample_ids", "sample_key"),
        *("target_index", "target_ids", "target_sample"),
    }


@given(st.integers(1, 40), st.sampled_from(["packed", "buckets", "padded"]))
@settings(deadline=None)
def test_units_are_the_records_with_their_parts_exchanged(n: int, mode: Any) -> None:
    made, context_len = records(n, seed=n)
    held, batch = window(made, context_len), BackwardBatch()
    items = batch.items(held)
    layout = lay_out(items.slots, Batching(mode, unit_tokens=192, row_length=64, pool_samples=16), 5, True)
    seen = []
    for number in range(len(layout)):
        chosen = layout.unit(number)
        unit = batch.unit(held, items, chosen)
        assert batch.count_targets(held, items, chosen.items) == len(unit["target_ids"])
        assert all(tensor.dtype == torch.int64 for tensor in unit.values())
        flat = {name: unit[name].flatten() for name in ("token_ids", "type_ids", "pos_ids")}
        for sample, (item, start) in enumerate(zip(chosen.items, unit["sample_index"].tolist(), strict=True)):
            context, response = made[item][: context_len[item]], made[item][context_len[item] :]
            record, first = response + context, len(response)
            end = start + len(record) - 1
            assert flat["token_ids"][start:end].tolist() == record[:-1]
            assert flat["type_ids"][start:end].tolist() == [int(i >= first) for i in range(len(record) - 1)]
            assert flat["pos_ids"][start:end].tolist() == list(range(len(record) - 1))
            own = unit["target_sample"] == sample
            assert unit["target_index"][own].tolist() == list(range(start + first, end))
            assert unit["target_ids"][own].tolist() == context[1:]
        assert int((unit["segment_ids"] > 0).sum()) == int(items.slots[chosen.items].sum())
        seen += unit["sample_ids"].tolist()
    assert sorted(seen) == list(range(1000, 1000 + n))


def test_an_empty_unit_is_rows_of_padding() -> None:
    held, nothing = window(*records(4)), np.zeros(0, dtype=np.int64)
    unit = BackwardBatch().unit(
        held, BackwardBatch().items(held), UnitLayout(nothing, nothing, nothing, 2, 8)
    )
    assert unit["token_ids"].shape == (2, 8)
    assert all(not tensor.any() for tensor in unit.values())


def test_no_record_is_longer_than_the_longest() -> None:
    index = ShardIndex("a" * 64, 61, 128, 100, {})
    longest = window([[1, *[5] * 126, 2, 1, *[6] * 98, 2]], [128])
    assert BackwardBatch().longest(index) == BackwardBatch().items(longest).slots[0] == 227


# ------------------------------------------------------------------------------------------------- the loss


def slow_nll(stage: Any, context: list[int], response: list[int]) -> list[float]:
    """-log p(c_t | r, c_<t) of each context id after [CLS], one sample, one token at a time, in float64."""
    weights = {name: weight.detach().double().numpy() for name, weight in stage.named_parameters()}
    slow = SlowPlato(weights, stage.model_config.n_layer, stage.model_config.n_head)
    values = []
    for t in range(1, len(context)):
        read = [*response, *context[:t]]
        h = slow.encode(slow.embed(read, len(response)), n_prefix=len(response))
        values.append(slow.word_nll(h[-1], context[t]))
    return values


def of_sample(unit: Unit, values: Tensor, sample: int) -> Tensor:
    return values[unit["target_sample"] == sample]


@pytest.fixture
def case() -> tuple[BackwardGeneration, Packed]:
    return make_stage("backward"), pack_for("backward", make_window(7))


@pytest.mark.parametrize("geometry", [{}, {"n_layer": 1, "n_head": 1, "hidden_size": 8}])
def test_the_loss_is_the_equation(geometry: dict[str, int]) -> None:
    stage, packed = make_stage("backward", replace(MODEL, **geometry)), pack_for("backward", make_window(6))
    terms = stage.losses(packed.unit)
    expected = [value for sample in range(len(packed)) for value in slow_nll(stage, *packed.record(sample))]
    torch.testing.assert_close(terms["nll"].detach().double(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert set(terms["acc"].tolist()) <= {0.0, 1.0}


def test_it_is_the_loss_of_stage_1_on_exchanged_records() -> None:
    """A record r + c read by stage 1 itself; so what is shared is shared."""
    stage, coarse, held = make_stage("backward"), make_stage("1_coarse"), make_window(5)
    packed, samples = pack_for("backward", held), held.samples
    exchanged = []
    for start, middle, end in zip(
        samples.offsets, samples.offsets[:-1] + samples.context_len, samples.offsets[1:], strict=False
    ):
        exchanged.append([*samples.token_ids[middle:end].tolist(), *samples.token_ids[start:middle].tolist()])
    turned = window(exchanged, (np.diff(samples.offsets) - samples.context_len).tolist())
    as_context = pack_for("1_coarse", turned).unit
    assert all(torch.equal(as_context[name], tensor) for name, tensor in packed.unit.items())
    assert torch.equal(stage.losses(packed.unit)["nll"], coarse.losses(as_context)["nll"])


def gradients(stage: BackwardGeneration, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(stage.parameters()), retain_graph=True))


@pytest.mark.parametrize("padding", [0, 1, 70])
def test_a_packed_sample_is_the_sample_alone(case: tuple[BackwardGeneration, Packed], padding: int) -> None:
    stage, packed = case
    unit = packed.unit
    together = stage.losses(unit)
    for sample in range(len(packed)):
        alone = stage.losses(packed.alone(sample, padding))
        for term, values in together.items():
            torch.testing.assert_close(of_sample(unit, values, sample), alone[term], rtol=1e-5, atol=1e-5)
        if sample < 3:
            packed_gradients = gradients(stage, of_sample(unit, together["nll"], sample).sum())
            for found, expected in zip(packed_gradients, gradients(stage, alone["nll"].sum()), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def changed(unit: Unit, slot: int) -> Unit:
    tokens = unit["token_ids"].clone()
    tokens.view(-1)[slot] = (tokens.view(-1)[slot] + 11) % 50 + 3
    return unit | {"token_ids": tokens}


def test_a_context_token_is_predicted_without_itself_and_what_follows(
    case: tuple[BackwardGeneration, Packed],
) -> None:
    """Another token at a place moves the predictions from that place on, of its sample alone."""
    stage, packed = case
    unit = packed.unit
    before, targets = stage.losses(unit)["nll"], unit["target_index"]
    for slot in targets.tolist():
        after = stage.losses(changed(unit, slot))["nll"]
        sample = unit["target_sample"][targets == slot]
        sees = (unit["target_sample"] == sample) & (targets >= slot)
        torch.testing.assert_close(after[~sees], before[~sees], rtol=0, atol=0)
        assert (after[sees] - before[sees]).abs().min() > 1e-6


def test_every_response_token_is_seen_by_all_of_its_sample(case: tuple[BackwardGeneration, Packed]) -> None:
    stage, packed = case
    unit = packed.unit
    before = stage.losses(unit)["nll"]
    for sample in range(len(packed)):
        first = int(unit["sample_index"][sample])
        own = unit["target_sample"] == sample
        for slot in range(first, int(unit["target_index"][own][0])):  # [CLS], words, [SEP]
            after = stage.losses(changed(unit, slot))["nll"]
            assert (after[own] - before[own]).abs().min() > 1e-6
            torch.testing.assert_close(after[~own], before[~own], rtol=0, atol=0)


# -------------------------------------------------------------------------------------------- in a run folder


def test_ranking_computes_what_the_stage_computes(case: tuple[BackwardGeneration, Packed]) -> None:
    """Minus the mean nll of each sample, the [SEP]s included, whatever lies beside it in a row."""
    stage, packed = case
    stage.eval()
    unit = packed.unit
    nll = stage.losses(unit)["nll"].detach()
    means = [float(-of_sample(unit, nll, sample).mean()) for sample in range(len(packed))]
    pairs = []
    for sample in range(len(packed)):
        context, (first, *words, last) = packed.record(sample)
        assert (first, last) == (1, 2)
        pairs.append((context, words))
    assert backward_log_probs(stage, pairs) == pytest.approx(means, rel=1e-5)
    assert backward_log_probs(stage, pairs[:1]) == pytest.approx(means[:1], rel=1e-5)
    assert backward_log_probs(stage, pairs * 20) == pytest.approx(means * 20, rel=1e-5)  # more than one row
    assert backward_log_probs(stage, []) == []
    assert max(means) - min(means) > 0.1
    with pytest.raises(ValueError, match="evaluation mode"):
        backward_log_probs(stage.train(), pairs)


def test_a_response_beyond_the_positions_is_cut() -> None:
    stage = make_stage("backward", replace(MODEL, max_position=20)).eval()
    context = [1, 10, 11, 2, 12, 2]
    long, fitting = (context, [40] * 99), (context, [40] * 13)  # [CLS] + 13 + 6 fill the 20 positions
    (found,) = backward_log_probs(stage, [long])
    assert [found] == pytest.approx(backward_log_probs(stage, [fitting]))
    expected = slow_nll(stage, context, [1, *[40] * 13])
    assert found == pytest.approx(-np.mean(expected), rel=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("1_coarse", "2_gen", "2_eval", "backward")}


def test_a_run_is_loaded_to_rank(runs: dict[str, Path]) -> None:
    network, stage = load_backward(runs["backward"], "--backward"), make_trained("backward")
    assert not network.training
    own = stage.state_dict()
    assert network.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in network.state_dict().items())
    pairs = [([1, 70, 90, 2, 110, 2], [50, 60]), ([1, 330, 2], [])]
    assert backward_log_probs(network, pairs) == backward_log_probs(stage, pairs)
    loaded = load_stage(runs["backward"])
    assert type(loaded) is BackwardGeneration
    assert isinstance(loaded, CoarseGeneration)


def test_it_is_no_model_to_talk_to(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["backward"]
    refused = rf"--generation {run}: this is a backward run; give a run of 2_gen or 1_coarse"
    with pytest.raises(UserError, match=refused):
        load_generation(run, "--generation")
    with pytest.raises(UserError, match=refused):
        PlatoBot.load(run)
    with pytest.raises(UserError, match="this is a backward run; give a run of 2_gen or 1_coarse"):
        export_to_huggingface(tmp_path / "out", run, None)
    with pytest.raises(UserError, match="this is a backward run; give a run of 2_eval"):
        PlatoBot.load(runs["2_gen"], run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["1_coarse", "2_gen", "2_eval"])
def test_no_other_model_is_read_backward(runs: dict[str, Path], name: str) -> None:
    with pytest.raises(UserError, match=rf"--backward .*: this is a {name} run; give a run of backward"):
        load_backward(runs[name], "--backward")


# ----------------------------------------------------------------------------------------------- the ranking

WORDS = ("yes", "no", "maybe", "never")
COHERENCE = (0.9, 0.2, 0.6, 0.5)
FORWARD = (-2.0, -1.0, -4.0, -1.5)
BACKWARD = (-6.0, -3.0, -1.0, -4.0)


def ranked(monkeypatch: pytest.MonkeyPatch, text: str | None) -> dict[str, float]:
    """Score by candidate, best first, where the three models say what stands above."""
    asked = []

    def says(name: str, values: tuple[float, ...]) -> Any:
        return lambda model, pairs: asked.append((name, len(pairs))) or list(values)

    monkeypatch.setattr(rank_module, "coherence", says("coherence", COHERENCE))
    monkeypatch.setattr(rank_module, "backward_log_probs", says("backward", BACKWARD))
    found = [
        Hypothesis((*TOKENIZER.encode(word), 2), z, log_prob)
        for z, (word, log_prob) in enumerate(zip(WORDS, FORWARD, strict=True))
    ]
    config = RankConfig() if text is None else RankConfig.parse(text)
    (candidates,) = rank(
        TOKENIZER, [[1, 70, 2]], [found], make_trained("2_eval"), None, config, make_trained("backward")
    )
    needed = text is not None and "backward" in text
    assert asked == [("coherence", 4), *([("backward", 4)] if needed else [])]
    for candidate in candidates:
        place = WORDS.index(candidate.text)
        assert candidate.log_prob == FORWARD[place]
        assert candidate.coherence == COHERENCE[place]
        assert candidate.backward == (BACKWARD[place] if needed else None)
        assert candidate.penalty == 0.0
    return {candidate.text: candidate.score for candidate in candidates}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {"yes": 0.9, "maybe": 0.6, "never": 0.5, "no": 0.2}),
        ("coherence", {"yes": 0.9, "maybe": 0.6, "never": 0.5, "no": 0.2}),
        ("forward", {"no": -1.0, "never": -1.5, "yes": -2.0, "maybe": -4.0}),
        ("backward", {"maybe": -1.0, "no": -3.0, "never": -4.0, "yes": -6.0}),
        # -1 - 1.5, -1.5 - 2, -4 - 0.5, -2 - 3
        ("forward=1,backward=0.5", {"no": -2.5, "never": -3.5, "maybe": -4.5, "yes": -5.0}),
        # 6 - 1, 9 - 6, 2 - 3, 5 - 4
        ("coherence=10,backward", {"maybe": 5.0, "yes": 3.0, "never": 1.0, "no": -1.0}),
        # 9 - 1 - 3, 6 - 2 - 0.5, 5 - 0.75 - 2, 2 - 0.5 - 1.5
        (
            " coherence=10 , forward = 0.5,backward=0.5 ",
            {"yes": 5.0, "maybe": 3.5, "never": 2.25, "no": 0.0},
        ),
        # a weight may be negative
        ("backward=-1", {"yes": 6.0, "never": 4.0, "no": 3.0, "maybe": 1.0}),
        ("forward,coherence=0", {"no": -1.0, "never": -1.5, "yes": -2.0, "maybe": -4.0}),
    ],
)
def test_candidates_are_ranked_by_the_weighted_sum(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: dict[str, float]
) -> None:
    found = ranked(monkeypatch, text)
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)


def test_the_sum_is_of_what_the_models_say() -> None:
    evaluation, backward = make_trained("2_eval"), make_trained("backward")
    contexts = [[1, 70, 90, 2, 110, 2], [1, 330, 2]]
    words = [[50, 60, 70], [], [500] * 5, [7]]
    found = [[Hypothesis((*each, 2), z, -z - 1.0) for z, each in enumerate(words)] for _ in contexts]
    config = RankConfig({"coherence": 2.0, "forward": 0.1, "backward": 0.5}, penalties=False)
    for context, candidates in zip(
        contexts, rank(TOKENIZER, contexts, found, evaluation, None, config, backward), strict=True
    ):
        scores = [candidate.score for candidate in candidates]
        assert scores == sorted(scores, reverse=True)
        for candidate in candidates:
            pair = [(context, candidate.token_ids)]
            told = backward_log_probs(backward, pair)[0]
            fits = rank_module.coherence(evaluation, pair)[0]
            assert candidate.backward == pytest.approx(told, abs=1e-6)
            expected = 2.0 * fits + 0.1 * candidate.log_prob + 0.5 * told
            assert candidate.score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warmth", "rank=warmth: no such score; there are coherence, forward, backward"),
        ("forward=1,", "rank=: no such score; there are coherence, forward, backward"),
        ("backward=much", "rank=backward=much: the weight is not a number"),
        ("backward=0", "rank=backward=0.0: give a score a weight other than 0"),
        ("forward=0,backward=0.0", "rank=forward=0.0,backward=0.0: give a score a weight other than 0"),
        ("forward=nan", "rank=forward=nan: must be a finite number"),
        ("forward=1,forward=2", "rank=forward=1,forward=2: forward has two weights"),
    ],
)
def test_what_cannot_rank_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankConfig.parse(text)


def test_a_score_needs_its_model(runs: dict[str, Path]) -> None:
    found = [[Hypothesis((7, 2), 0, -1.0)]]
    both = RankConfig.parse("coherence=1,backward=0.5")
    with pytest.raises(UserError, match="coherence: needs an evaluation model; give --evaluation"):
        rank(TOKENIZER, [[1, 7, 2]], found, config=both, backward=make_trained("backward"))
    no_backward = "backward: needs a model of stage=backward; give --backward"
    with pytest.raises(UserError, match=no_backward):
        rank(TOKENIZER, [[1, 7, 2]], found, make_trained("2_eval"), config=both)
    with pytest.raises(UserError, match=no_backward):
        PlatoBot.load(runs["2_gen"], runs["2_eval"], rank=both)
    with pytest.raises(UserError, match="coherence: needs an evaluation model"):
        PlatoBot.load(runs["2_gen"], backward=runs["backward"], rank=both)
    bot = PlatoBot.load(runs["2_gen"], backward=runs["backward"], rank=RankConfig.parse("forward,backward"))
    candidates = bot.reply(["hello !"]).candidates
    assert all(candidate.backward is not None for candidate in candidates)
    assert all(candidate.coherence is None for candidate in candidates)
