"""The models' sizes, initial weights and options, and that recomputing activations changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from units import BATCHES, MODEL, make_stage, make_window, pack_for

from plato2.config import ModelConfig, UserError
from plato2.model.backbone import Dropout
from plato2.model.cpu import ROWS_STEP
from plato2.prepare.reddit.rules import LANGUAGES
from plato2.stages import known_stages

STAGES = known_stages()

CONF = Path(__file__).parents[2] / "conf" / "model"
# Spec section 10: stage 1, stage 2.1 with its heads, stage 2.2; then LM head, BOW head, recognition + latent.
COUNTS = {
    "93m": (91_999_041, 93_205_142, 92_591_171, 600_129, 600_129, 605_972),
    "314m": (311_828_289, 313_958_038, 312_879_939, 1_059_649, 1_059_649, 1_070_100),
    "1.6b": (1_632_591_681, 1_641_037_462, 1_636_792_131, 4_208_449, 4_208_449, 4_237_332),
}


def geometry(size: str) -> ModelConfig:
    """What `model=<size>` means on the command line."""
    keys = yaml.safe_load((CONF / f"{size}.yaml").read_text(encoding="utf-8"))
    return ModelConfig(**{key: value for key, value in keys.items() if key != "defaults"})


def on_meta(name: str, model: ModelConfig, **arguments: Any) -> Any:
    with torch.device("meta"):
        return STAGES[name](model, **arguments)


def count(*modules: nn.Module | nn.Parameter) -> int:
    parts = [m.parameters() if isinstance(m, nn.Module) else [m] for m in modules]
    return sum(parameter.numel() for part in parts for parameter in part)


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_the_specs(size: str) -> None:
    model = geometry(size)
    coarse, fine, evaluation = (on_meta(name, model) for name in ("1_coarse", "2_gen", "2_eval"))
    heads = (
        count(coarse.backbone.lm_transform, coarse.backbone.lm_bias),
        count(fine.bag_of_words),
        count(fine.recognition),
    )
    assert (count(coarse), count(fine), count(evaluation), *heads) == COUNTS[size]


def test_the_chinese_model_has_its_larger_vocabulary() -> None:
    """30K words instead of 8K: the paper's +22.5M is 22,000 x 1,024, plus the biases."""
    model, n_words = geometry("336m_zh"), 30_000 - 8_000
    assert model.vocab_size == LANGUAGES["zh"] + 1  # [MASK], as in the tokenizers that plato2 prepare makes
    assert geometry("314m").vocab_size == LANGUAGES["en"] + 1
    for i, name in enumerate(("1_coarse", "2_gen", "2_eval")):
        n_biases = 2 if name == "2_gen" else 1  # LM head and bag of words
        assert count(on_meta(name, model)) == COUNTS["314m"][i] + n_words * (1024 + n_biases)


def test_only_the_heads_a_stage_trains_are_built() -> None:
    heads = {"recognition", "bag_of_words", "coherence"}
    built = {name: {child for child, _ in on_meta(name, MODEL).named_children()} & heads for name in STAGES}
    assert built == {
        "1_coarse": set(),
        "2_gen": {"recognition", "bag_of_words"},
        "2_eval": {"coherence"},
        "backward": set(),
        "plato": {"recognition", "bag_of_words", "coherence"},
    }


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """Data parallelism and resuming under FSDP2 need it."""
    stage = make_stage(name)
    terms = stage.losses(pack_for(name).unit)
    torch.stack([terms[term].mean() for term in stage.loss_terms]).sum().backward()
    unused = [key for key, parameter in stage.named_parameters() if parameter.grad is None]
    assert unused == []


# -------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_are_knovers() -> None:
    """Normal(0, 0.02) cut at two sigma (so std 0.0176); biases 0; norms 1 and 0 (docs/spec.md, Backbone)."""
    model = replace(MODEL, hidden_size=64, vocab_size=2001, n_role=2)
    for name in STAGES:
        for key, tensor in STAGES[name](model).named_parameters():
            parameter = tensor.detach()
            if parameter.ndim >= 2:
                assert float(parameter.abs().max()) <= 0.04, key
                if parameter.numel() > 3000:
                    assert float(parameter.std()) == pytest.approx(0.02 * 0.8796, rel=0.05), key
                    assert abs(float(parameter.mean())) < 0.0015, key
            elif key.endswith("norm.weight"):
                assert torch.all(parameter == 1.0), key
            else:
                assert torch.all(parameter == 0.0), key


def test_initial_weights_hang_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = STAGES["2_gen"](MODEL, seed=5).state_dict()
    torch.manual_seed(2)
    other, third = STAGES["2_gen"](MODEL, seed=5).state_dict(), STAGES["2_gen"](MODEL, seed=6).state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert not torch.equal(one["backbone.word.weight"], third["backbone.word.weight"])


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", STAGES)
def test_checkpointed_activations_give_the_same_losses_and_gradients(name: str, dropout: float) -> None:
    unit = pack_for(name).unit
    seen = []
    for checkpoint_activations in (False, True):
        model = replace(MODEL, dropout=dropout, checkpoint_activations=checkpoint_activations)
        stage = make_stage(name, model)
        torch.manual_seed(4)
        terms = stage.losses(unit)
        torch.stack([terms[term].mean() for term in stage.loss_terms]).sum().backward()
        seen.append((terms, {key: parameter.grad for key, parameter in stage.named_parameters()}))
    (terms, gradients), (other_terms, other_gradients) = seen
    assert all(torch.equal(terms[term], other_terms[term]) for term in terms)
    assert all(torch.equal(grad, other_gradients[key]) for key, grad in gradients.items())


@pytest.mark.parametrize("name", STAGES)
def test_dropout_hangs_on_the_generator_and_is_off_in_validation(name: str) -> None:
    stage, unit = make_stage(name, replace(MODEL, dropout=0.1)), pack_for(name).unit
    term = next(iter(stage.loss_terms))

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return stage.losses(unit)[term]

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    stage.eval()
    assert torch.equal(loss(1), loss(2))
    with torch.no_grad():
        assert torch.equal(loss(1), make_stage(name).eval().losses(unit)[term])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 501, requires_grad=True)
    dropped = Dropout(p).train()(x)
    y = dropped.detach()
    kept = y > 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.005)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.unique(y).tolist() == pytest.approx([0.0, 1 / (1 - p)], abs=1e-4)
    dropped.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y)  # the same mask backwards
    assert float(kept.float().mean(0).std()) < 0.06  # no columns or rows that always or never stay
    assert float(kept.float().mean(1).std()) < 0.06


def test_attention_weights_are_dropped_in_training() -> None:
    """With the other dropouts taken out, two draws differ and their mean is near the undropped value."""
    stage, unit = make_stage("1_coarse", replace(MODEL, dropout=0.2), std=0.1), pack_for("1_coarse").unit
    for module in stage.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    with torch.no_grad():
        draws = torch.stack([stage.losses(unit)["nll"] for _ in range(200)])
        still = make_stage("1_coarse", std=0.1).losses(unit)["nll"]
    spread = draws.std(0)
    assert spread.min() > 0
    assert ((draws.mean(0) - still).abs() / spread).mean() < 0.5


def test_role_embeddings_are_an_option() -> None:
    window, plain, with_roles = make_window(), make_stage("1_coarse"), replace(MODEL, n_role=2)
    assert plain.backbone.role is None
    stage = make_stage("1_coarse", with_roles)
    stage.load_state_dict(plain.state_dict(), strict=False)
    unit, with_ids = pack_for("1_coarse", window).unit, pack_for("1_coarse", window, roles=True).unit
    assert "role_ids" not in unit
    with torch.no_grad():
        assert torch.equal(plain.losses(unit)["nll"], plain.losses(with_ids)["nll"])
        assert torch.equal(stage.losses(unit)["nll"], plain.losses(unit)["nll"])
        assert not torch.allclose(stage.losses(with_ids)["nll"], plain.losses(unit)["nll"])


def test_logits_are_computed_only_where_there_is_a_target() -> None:
    for name in BATCHES:
        stage, unit = make_stage(name), pack_for(name).unit
        rows: list[int] = []
        stage.backbone.lm_transform.register_forward_hook(
            lambda _module, _given, h, rows=rows: rows.append(len(h))
        )
        with torch.no_grad():
            stage.losses(unit)
        stage.losses(unit)
        n_target = len(unit["target_ids"])
        assert rows == [n_target, n_target + -n_target % ROWS_STEP]


@pytest.mark.parametrize("name", STAGES)
def test_rows_up_to_a_whole_step_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, seen = pack_for(name).unit, []
    for step in (1, 64):
        monkeypatch.setattr("plato2.model.cpu.ROWS_STEP", step)
        stage = make_stage(name)
        terms = stage.losses(unit)
        torch.stack([terms[term].mean() for term in stage.loss_terms]).sum().backward()
        seen.append(terms | {key: parameter.grad for key, parameter in stage.named_parameters()})
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        torch.testing.assert_close(seen[1][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100}, r"model\.hidden_size=100 is not a multiple of model\.n_head=12"),
        ({"n_layer": 0}, r"model\.n_layer=0"),
        ({"n_role": -1}, r"model\.n_role=-1"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0"),
    ],
)
def test_impossible_geometries_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)
