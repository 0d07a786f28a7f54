"""The baseline that writes and ranks with one network: its batches, what its passes see, ranking by itself.

Its losses are held to its paper's equations in test_losses.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import KNOVER, make_run, make_stage
from synthetic import records, window
from torch import Tensor
from typer.testing import CliRunner
from units import Packed, Unit, make_window, pack_for
from units import make_stage as make_random

from plato2.commands import app
from plato2.config import DecodeConfig, Use, UserError
from plato2.data.collate import CoherenceBatch, JointBatch
from plato2.data.order import Batching, lay_out
from plato2.data.packing import UnitLayout
from plato2.data.shards import ShardIndex
from plato2.data.tokenizer import Tokenizer
from plato2.model.networks import Evaluator
from plato2.stages import Plato
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import coherence, coherence_of_records
from plato2.talk.replies import sample_replies
from plato2.talk.score import Record, score
from plato2.weights.export import export_to_huggingface, export_to_knover
from plato2.weights.folder import load_evaluation, load_generation, load_stage

# ------------------------------------------------------------------------------------------------ the batch


def test_a_unit_written_by_hand() -> None:
    """A sample, and its context with the other sample's response; the other sample's pair is elsewhere."""
    made = [[1, 10, 11, 2, 1, 20, 21, 2], [1, 30, 2, 1, 40, 2]]
    held, batch = window(made, [4, 3]), JointBatch()
    items = batch.items(held)
    assert items.labels.tolist() == [1, 0, 1, 0]
    assert items.responses.tolist() == [0, 1, 1, 0]
    assert items.slots.tolist() == [8, 7, 6, 7]
    layout = UnitLayout(np.array([1, 0, 2]), np.array([0, 0, 1]), np.array([0, 7, 0]), 2, 15)
    unit = batch.unit(held, items, layout)
    mask = held.mask_id
    assert unit["token_ids"].tolist() == [
        [mask, 1, 10, 11, 2, 1, 40, mask, 1, 10, 11, 2, 1, 20, 21],
        [mask, 1, 30, 2, 1, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert unit["type_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]
    assert unit["pos_ids"][0].tolist() == [0, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 6]
    assert unit["segment_ids"][0].tolist() == [1] * 7 + [2] * 8
    assert unit["random_index"].tolist() == [0]
    assert unit["sample_index"].tolist() == [7, 15]
    assert unit["sample_ids"].tolist() == [1000, 1001]
    assert unit["target_index"].tolist() == [12, 13, 14, 19, 20]
    assert unit["target_ids"].tolist() == [20, 21, 2, 40, 2]
    assert unit["target_sample"].tolist() == [0, 0, 0, 1, 1]
    assert len(unit["sample_key"]) == 2
    assert [batch.count_targets(held, items, np.arange(n)) for n in range(5)] == [0, 3, 3, 5, 5]


@given(st.integers(2, 40), st.sampled_from(["packed", "buckets", "padded"]))
@settings(deadline=None)
def test_every_sample_is_there_once_with_its_own_response_and_once_with_another(n: int, mode: Any) -> None:
    held, batch = window(*records(n, seed=n)), JointBatch()
    items, other = batch.items(held), CoherenceBatch().items(held)
    assert items.responses.tolist() == other.responses.tolist()  # the negatives are stage 2.2's
    layout = lay_out(items.slots, Batching(mode, unit_tokens=192, row_length=64, pool_samples=16), 5, True)
    seen, n_random = [], 0
    for number in range(len(layout)):
        chosen = layout.unit(number)
        unit = batch.unit(held, items, chosen)
        assert batch.count_targets(held, items, chosen.items) == len(unit["target_ids"])
        assert all(tensor.dtype == torch.int64 for tensor in unit.values())
        fronts = torch.cat([unit["sample_index"], unit["random_index"]])
        assert bool((unit["token_ids"].flatten()[fronts] == held.mask_id).all())
        assert int((unit["segment_ids"] > 0).sum()) == int(items.slots[chosen.items].sum())
        assert sorted(set(unit["target_sample"].tolist())) == list(range(len(unit["sample_index"])))
        seen += unit["sample_ids"].tolist()
        n_random += len(unit["random_index"])
    assert sorted(seen) == list(range(1000, 1000 + n))
    assert n_random == n


def test_an_empty_unit_is_rows_of_padding() -> None:
    held, nothing = window(*records(4)), np.zeros(0, dtype=np.int64)
    unit = JointBatch().unit(held, JointBatch().items(held), UnitLayout(nothing, nothing, nothing, 2, 8))
    assert unit["token_ids"].shape == (2, 8)
    assert all(not tensor.any() for tensor in unit.values())
    terms = make_random("plato").eval().losses(unit)
    assert all(len(values) == 0 for values in terms.values())


def test_no_record_is_longer_than_the_longest() -> None:
    made = [[1, *[5] * 126, 2, 1, *[6] * 98, 2], [1, 7, 2, 1, 8, 2]]
    held = window(made, [128, 3])
    assert (
        JointBatch().longest(ShardIndex("a" * 64, 61, 128, 100, {})) == JointBatch().items(held).slots.max()
    )


def test_equal_responses_have_no_negative() -> None:
    held = window([[1, 5, 2, 1, 6, 2]] * 3, [3] * 3)
    with pytest.raises(UserError, match="all 3 responses of window 0 are equal: none is a negative"):
        JointBatch().items(held)
    assert len(JointBatch(reject_identical=False).items(held)) == 6


# --------------------------------------------------------------------------------------- what sees what


@pytest.fixture
def case() -> tuple[Plato, Packed]:
    return make_random("plato"), pack_for("plato", make_window(6))


def labels(packed: Packed) -> list[int]:
    found: list[int] = packed.items.labels[packed.layout.items].tolist()
    return found


def parts(unit: Unit, terms: dict[str, Tensor], number: int, label: int) -> dict[str, Tensor]:
    """The values of true or random record `number`."""
    place = number if label else len(unit["sample_index"]) + number
    found = {term: terms[term][place : place + 1] for term in ("rce", "coherence_acc")}
    own = unit["target_sample"] == number
    return found | ({term: terms[term][own] for term in ("nll", "bow")} if label else {})


@pytest.mark.parametrize("padding", [0, 1, 70])
def test_a_packed_record_is_the_record_alone(case: tuple[Plato, Packed], padding: int) -> None:
    """Its losses and their gradients; and the sum of all of them is that of the unit."""
    stage, packed = case
    unit, terms = packed.unit, stage.losses(packed.unit)
    counts, total = [0, 0], {name: torch.zeros_like(p) for name, p in stage.named_parameters()}
    for i, label in enumerate(labels(packed)):
        alone = stage.losses(packed.alone(i, padding))
        for term, values in parts(unit, terms, counts[label], label).items():
            torch.testing.assert_close(values, alone[term], rtol=1e-5, atol=1e-5)
        counts[label] += 1
        for name, gradient in gradients(stage, alone).items():
            total[name] += gradient
    for name, gradient in gradients(stage, terms).items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m)


def gradients(stage: Plato, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    stage.zero_grad()
    sum((terms[term].sum() for term in stage.loss_terms), torch.zeros(())).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.named_parameters()}


def changed(unit: Unit, slot: int) -> Unit:
    tokens = unit["token_ids"].clone()
    tokens.view(-1)[slot] = (tokens.view(-1)[slot] + 11) % 50 + 3
    return unit | {"token_ids": tokens}


def test_nothing_leaks_from_a_random_response(case: tuple[Plato, Packed]) -> None:
    """Another word in it moves the judgement of that record, and no loss of any other record."""
    stage, packed = case
    unit, before = packed.unit, stage.losses(packed.unit)
    types, n = unit["type_ids"].flatten(), len(unit["sample_index"])
    for number, front in enumerate(unit["random_index"].tolist()):
        slot = front + int(types[front:].argmax()) + 1  # the first word after the response's [CLS]
        after = stage.losses(changed(unit, slot))
        moved = (after["rce"] - before["rce"]).abs() > 1e-7
        assert moved.nonzero()[:, 0].tolist() == [n + number]
        for term in ("nll", "bow"):
            torch.testing.assert_close(after[term], before[term], rtol=0, atol=0)


def test_a_response_is_written_without_what_follows_but_judged_and_recognised_as_a_whole(
    case: tuple[Plato, Packed],
) -> None:
    stage, packed = case
    unit, targets = packed.unit, packed.unit["target_index"]
    z = torch.eye(5)[torch.arange(len(unit["sample_index"])) % 5]

    def seen(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
        x = stage.backbone.embed_unit(cast(Any, unit))
        nll = stage.given_latent(cast(Any, unit), x, z)["nll"]
        return nll, stage.posterior(cast(Any, unit), x), stage.losses(cast(Any, unit))["rce"]

    before = seen(unit)
    for slot in targets.tolist():
        nll, posterior, rce = seen(changed(unit, slot))
        sample = int(unit["target_sample"][targets == slot])
        sees = (unit["target_sample"] == sample) & (targets >= slot)
        torch.testing.assert_close(nll[~sees], before[0][~sees], rtol=0, atol=0)
        assert (nll - before[0])[sees].abs().min() > 1e-6
        assert ((posterior - before[1]).abs().amax(dim=1) > 1e-7).nonzero()[:, 0].tolist() == [sample]
        assert ((rce - before[2]).abs() > 1e-7).nonzero()[:, 0].tolist() == [sample]


# ------------------------------------------------------------------------------------ it ranks by itself


def test_ranking_and_scores_are_what_training_computes(case: tuple[Plato, Packed]) -> None:
    stage, packed = case
    stage.eval()
    unit = packed.unit
    with torch.no_grad():
        p = (-stage.losses(unit)["rce"]).exp()  # of the right label
        posterior = stage.posterior(unit, stage.backbone.embed_unit(unit)).softmax(-1)
    own = [i for i, label in enumerate(labels(packed)) if label]
    others = [i for i, label in enumerate(labels(packed)) if not label]
    pairs = [packed.record(i) for i in (*own, *others)]
    expected = torch.cat([p[: len(own)], 1 - p[len(own) :]]).tolist()
    assert coherence_of_records(cast(Evaluator, stage), pairs) == pytest.approx(expected, rel=1e-5)
    found = score(stage, [Record(*pair) for pair in pairs[: len(own)]])
    assert [each["coherence"] for each in found] == pytest.approx(expected[: len(own)], rel=1e-5)
    torch.testing.assert_close(torch.tensor([each["posterior"] for each in found]), posterior)
    assert max(expected) - min(expected) > 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plato", "plato")


PAIRS = [([1, 70, 90, 2, 110, 2], [50, 60]), ([1, 330, 2], []), ([1, 330, 2], [50, 60])]


def test_one_checkpoint_is_both_models(run: Path) -> None:
    stage = make_stage("plato")
    expected = coherence(stage, PAIRS)
    assert len(set(expected)) == 3
    generation = load_generation(run)
    assert coherence(cast(Evaluator, generation), PAIRS) == expected
    assert coherence(load_evaluation(run), PAIRS) == expected
    assert type(load_stage(run)) is Plato
    bot = PlatoBot.load(run, decode=DecodeConfig(max_tokens=8))
    assert bot.evaluation is bot.generation  # one network in memory
    candidates = bot.reply(["hi , how was your day ?"]).candidates
    assert sorted(candidate.latent for candidate in candidates) == list(range(5))  # type: ignore[type-var]
    ranked = [candidate.coherence or 0.0 for candidate in candidates if not candidate.penalty]
    assert ranked == sorted(ranked, reverse=True)
    again = PlatoBot.load(run, run, decode=DecodeConfig(max_tokens=8)).reply(["hi , how was your day ?"])
    assert again.candidates == candidates
    (said,) = sample_replies(stage, bot.tokenizer, [["hi"]], ["hello"], 2, DecodeConfig(max_tokens=8))
    assert all(candidate["coherence"] is not None for candidate in said["candidates"])


def test_another_model_ranks_where_one_is_given(run: Path, tmp_path: Path) -> None:
    judge = make_run(tmp_path / "judge", "2_eval")
    bot = PlatoBot.load(run, judge)
    assert bot.evaluation is not bot.generation
    fine = make_run(tmp_path / "fine", "2_gen")
    assert PlatoBot.load(fine).evaluation is None
    ranked = PlatoBot.load(fine, run)  # and it ranks what another one writes
    assert ranked.evaluation is not None
    assert coherence(ranked.evaluation, PAIRS) == coherence(make_stage("plato"), PAIRS)


@pytest.mark.parametrize("name", ["1_coarse", "2_gen"])
def test_a_model_without_the_head_does_not_rank(tmp_path: Path, name: str) -> None:
    other = make_run(tmp_path / "other", name)
    with pytest.raises(UserError, match=rf"a {name} run; give a run of 2_eval or plato"):
        load_evaluation(other)
    with pytest.raises(UserError, match="a 2_eval run; give a run of 2_gen or 1_coarse or plato"):
        load_generation(make_run(tmp_path / "judge", "2_eval"))


def test_it_is_exported_whole(run: Path, tmp_path: Path) -> None:
    assert export_to_huggingface(tmp_path / "hf", run, None) == ["generation"]
    context = ["hi , how was your day ?"]
    decode = DecodeConfig(max_tokens=8)
    expected = PlatoBot.load(run, decode=decode).reply(context).candidates
    assert PlatoBot.load(tmp_path / "hf", decode=decode).reply(context).candidates == expected
    assert coherence(load_evaluation(tmp_path / "hf"), PAIRS) == coherence(make_stage("plato"), PAIRS)
    stage = load_stage(tmp_path / "hf")
    assert all(
        torch.equal(w, make_stage("plato").state_dict()[name]) for name, w in stage.state_dict().items()
    )
    # beside an evaluation model that is its own, that one ranks
    judge = make_run(tmp_path / "judge", "2_eval")
    assert export_to_huggingface(tmp_path / "two", run, judge) == ["generation", "evaluation"]
    bot = PlatoBot.load(tmp_path / "two")
    assert bot.evaluation is not None
    assert coherence(bot.evaluation, PAIRS) == coherence(make_stage("2_eval"), PAIRS)
    for models in ((run, None), (None, run)):
        with pytest.raises(UserError, match=r"a plato model writes and ranks.*plato2 export hf"):
            export_to_knover(tmp_path / "knover", *models)


def test_transformers_ranks_by_its_head(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from plato2.talk.configuration_plato2 import Plato2Config
    from plato2.talk.modeling_plato2 import Plato2Model

    export_to_huggingface(tmp_path / "hf", run, None)
    config = Plato2Config.from_pretrained(tmp_path / "hf")
    model = Plato2Model.from_pretrained(tmp_path / "hf", config=config).eval()
    expected = PlatoBot.load(run, decode=DecodeConfig(max_tokens=8)).reply(["hi"]).candidates
    found = model.reply(["hi"], max_tokens=8)
    assert [c.text for c in found] == [c.text for c in expected]
    assert [c.coherence for c in found] == pytest.approx([c.coherence for c in expected])
    words = Tokenizer.load(KNOVER).encode("yes")
    assert model.coherence(["hi"], ["yes"]) == pytest.approx(
        coherence(make_stage("plato"), [(model.encode_context(["hi"]), words)])
    )


def test_one_call_scores_all_of_it(run: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("hi there [SEP] how are you ?\ti am fine .\n")
    found = {}
    for option in ("--generation", "--evaluation"):
        done = CliRunner().invoke(app, ["score", str(pairs), option, str(run)])
        assert done.exit_code == 0, done.output
        found[option] = json.loads(done.stdout)
    assert found["--generation"].keys() == {"n_tokens", "coherence", "posterior", "nll_by_latent"}
    assert found["--evaluation"] == {"coherence": found["--generation"]["coherence"]}


def test_the_use_says_what_a_model_serves_for() -> None:
    assert [Plato.use.serves(role) for role in ("generation", "evaluation", "backward")] == [
        True,
        True,
        False,
    ]
    assert not Use("generation", has_latents=True).serves("evaluation")
    assert Use("evaluation").serves("evaluation")
    assert not Use("evaluation", coherence_head="first").serves("generation")
