"""Every loss of the paper, from real packed units, against slow loops in float64 (slow.py); gradients too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from slow import SlowPlato, entropy, gumbel_softmax, log_softmax, uniform
from torch import Tensor
from units import MODEL, Packed, make_stage, make_window, pack_for

from plato2.model import losses
from plato2.model.noise import uniform as rng_uniform

GEOMETRIES = {
    "small": {},
    "one layer, one head, K=2": {"n_layer": 1, "n_head": 1, "hidden_size": 8, "n_latent": 2},
    "wide, K=20": {"n_layer": 1, "n_head": 4, "hidden_size": 24, "n_latent": 20, "vocab_size": 131},
}


def slow_model(stage: Any, shift: dict[str, np.ndarray] | None = None) -> SlowPlato:
    weights = {name: tensor.detach().double().numpy() for name, tensor in stage.named_parameters()}
    weights = {name: weight + (shift or {}).get(name, 0.0) for name, weight in weights.items()}
    return SlowPlato(weights, stage.model_config.n_layer, stage.model_config.n_head)


def slow_terms(stage: Any, packed: Packed, slow: SlowPlato, noisy: bool = True) -> dict[str, list[float]]:
    """What `stage.losses` should give for the unit, sample by sample."""
    unit, terms = packed.unit, {}
    for i in range(len(packed)):
        context, response = packed.record(i)
        if stage.name == "1_coarse":
            values = {"nll": slow.coarse(context, response)}
        elif stage.name == "2_gen":
            u = uniform(int(unit["sample_key"][i]), stage.model_config.n_latent) if noisy else None
            made = slow.fine(context, response, u, stage.tau, packed.batch.keep_eos)  # type: ignore[union-attr]
            values = {"nll": made["nll"], "bow": made["bow"], "z_entropy": [made["entropy"]]}
        elif stage.name == "plato":
            return slow_plato_terms(stage, packed, slow, noisy)
        else:
            made = slow.evaluation(context, response, *masked(unit, i))
            values = {"rce": [made["rce"]], "mlm": made["mlm"]}
        for term, value in values.items():
            terms.setdefault(term, []).extend(value)
    return terms


def slow_plato_terms(stage: Any, packed: Packed, slow: SlowPlato, noisy: bool) -> dict[str, list[float]]:
    """PLATO's equations 2 to 7: true responses are written and judged, random ones judged."""
    labels = packed.items.labels[packed.layout.items]
    keys = iter(packed.unit["sample_key"].tolist())
    terms: dict[str, list[float]] = {"nll": [], "bow": [], "z_entropy": []}
    true, random = [], []
    for i, label in enumerate(labels):
        context, response = packed.record(i)
        p = slow.selection(context, response)
        if label == 0:
            random.append(-math.log(1 - p))  # -log p(l=0|c,r-)
            continue
        true.append(-math.log(p))  # -log p(l=1|c,r)
        u = uniform(next(keys), stage.model_config.n_latent) if noisy else None
        made = slow.fine(context, response, u, stage.tau, sees_eos=False)
        for term, values in (("nll", made["nll"]), ("bow", made["bow"]), ("z_entropy", [made["entropy"]])):
            terms[term] += values
    return terms | {"rce": true + random}


def masked(unit: dict[str, Tensor], sample: int) -> tuple[int, dict[int, int]]:
    """A sample's label, and what stands at each place that is to be predicted."""
    slots = unit["target_index"][unit["target_sample"] == sample]
    places = (slots - unit["sample_index"][sample]).tolist()
    read = unit["token_ids"].flatten()[slots].tolist()
    return int(unit["coherence_labels"][sample]), dict(zip(places, read, strict=True))


def assert_equal(values: Tensor, slow: list[float]) -> None:
    torch.testing.assert_close(values.detach().double(), torch.tensor(slow).double(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the stages


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nll_of_stage_1_is_equation_1(geometry: str) -> None:
    model = replace(MODEL, **GEOMETRIES[geometry])
    stage, packed = make_stage("1_coarse", model), pack_for("1_coarse", make_window(8, model.vocab_size))
    terms = stage.losses(packed.unit)
    assert_equal(terms["nll"], slow_terms(stage, packed, slow_model(stage))["nll"])
    assert set(terms["acc"].tolist()) <= {0.0, 1.0}


def test_nll_with_role_embeddings() -> None:
    stage = make_stage("1_coarse", replace(MODEL, n_role=2))
    packed = pack_for("1_coarse", roles=True)
    expected = []
    for i in range(len(packed)):
        context, response = packed.record(i)
        roles, n_turns, turn = [0], context.count(2), 0
        for token in context[1:]:
            roles.append((n_turns - turn) % 2)
            turn += token == 2
        expected += slow_model(stage).coarse(context, response, roles + [0] * len(response))
    assert_equal(stage.losses(packed.unit)["nll"], expected)


@pytest.mark.parametrize("keep_eos", [False, True])
@pytest.mark.parametrize("bow_head", ["tied", "linear"])
@pytest.mark.parametrize("recognition_head", ["tied", "linear"])
def test_terms_of_stage_2_1_are_equations_2_to_5(
    recognition_head: str, bow_head: str, keep_eos: bool
) -> None:
    stage = make_stage("2_gen", recognition_head=recognition_head, bow_head=bow_head)
    packed = pack_for("2_gen", make_window(6), keep_eos=keep_eos)
    terms = stage.losses(packed.unit)
    for term, expected in slow_terms(stage, packed, slow_model(stage)).items():
        assert_equal(terms[term], expected)


@pytest.mark.parametrize("geometry", list(GEOMETRIES)[1:])
def test_terms_of_stage_2_1_for_other_sizes(geometry: str) -> None:
    model = replace(MODEL, **GEOMETRIES[geometry])
    stage = make_stage("2_gen", model, tau=1.3)
    packed = pack_for("2_gen", make_window(6, model.vocab_size))
    terms = stage.losses(packed.unit)
    for term, expected in slow_terms(stage, packed, slow_model(stage)).items():
        assert_equal(terms[term], expected)


def test_validation_of_stage_2_1_has_the_same_noise_each_time_or_none() -> None:
    packed = pack_for("2_gen", make_window(6))
    for validation_noise in ("fixed", "none"):
        stage = make_stage("2_gen", validation_noise=validation_noise).eval()
        first, second = stage.losses(packed.unit), stage.losses(packed.unit)
        expected = slow_terms(stage, packed, slow_model(stage), noisy=validation_noise == "fixed")
        for term, values in expected.items():
            assert torch.equal(first[term], second[term])
            assert_equal(first[term], values)


def test_validation_also_gives_the_nll_of_any_latent() -> None:
    """One uniform latent a sample, one-hot, the same each time, and no number of the Gumbel noise again."""
    packed, n_latent = pack_for("2_gen", make_window(40)), MODEL.n_latent
    stage, unit = make_stage("2_gen").eval(), packed.unit
    first, again = stage.losses(unit)["nll_uniform"], stage.losses(unit)["nll_uniform"]
    assert torch.equal(first, again)
    drawn = [uniform(int(key), n_latent + 1) for key in unit["sample_key"]]
    assert all(numbers[-1] not in numbers[:-1] for numbers in drawn)
    latents = torch.tensor([math.floor(numbers[-1] * n_latent) for numbers in drawn])
    assert set(latents.tolist()) == set(range(n_latent))
    one_hot = torch.eye(n_latent)[latents]
    assert torch.equal(stage.any_latent(unit), one_hot)
    assert torch.equal(first, stage.given_latent(unit, stage.backbone.embed_unit(unit), one_hot)["nll"])
    for i in range(len(packed)):
        own = packed.alone(i, padding=3)
        assert torch.equal(stage.any_latent(own), one_hot[i : i + 1])
    assert "nll_uniform" not in stage.train().losses(unit)


def test_any_latent_is_uniform_and_independent_of_the_posteriors_noise() -> None:
    n_latent = 20
    stage = make_stage("2_gen", replace(MODEL, n_latent=n_latent))
    keys = torch.randint(-(2**62), 2**62, (40_000,), generator=torch.Generator().manual_seed(0))
    latents = stage.any_latent({"sample_key": keys}).argmax(dim=-1)
    share = torch.bincount(latents, minlength=n_latent) / len(keys)
    assert float((share - 1 / n_latent).abs().max()) < 0.006  # five standard deviations
    favoured = losses.gumbel_softmax(torch.zeros(len(keys), n_latent), rng_uniform(keys, n_latent), 0.67)
    same = (favoured.argmax(dim=-1) == latents).float().mean()
    assert float(same) == pytest.approx(1 / n_latent, abs=0.006)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_terms_of_stage_2_2_are_equations_8_and_9(geometry: str) -> None:
    model = replace(MODEL, **GEOMETRIES[geometry])
    stage, packed = make_stage("2_eval", model), pack_for("2_eval", make_window(6, model.vocab_size))
    assert sorted(set(packed.unit["coherence_labels"].tolist())) == [0, 1]
    terms = stage.losses(packed.unit)
    for term, expected in slow_terms(stage, packed, slow_model(stage)).items():
        assert_equal(terms[term], expected)


def test_coherence_is_that_of_the_unmasked_tokens() -> None:
    """In training the accuracy is that of the masked input; validation and ranking read what was said."""
    stage, packed = make_stage("2_eval", std=0.4), pack_for("2_eval")
    unit, slow = packed.unit, slow_model(stage)
    given, clean = [], []
    for i in range(len(packed)):
        label, read = masked(unit, i)
        given.append(slow.evaluation(*packed.record(i), label, read)["p"])
        clean.append(slow.evaluation(*packed.record(i), label, {})["p"])
    with torch.no_grad():
        assert_equal(stage.coherence_logits(unit).softmax(-1)[:, 1], [p[1] for p in clean])
        labels = unit["coherence_labels"].numpy()
        for training, p in ((True, given), (False, clean)):
            accuracy = stage.train(training).losses(unit)["coherence_acc"].numpy()
            assert accuracy.tolist() == (np.argmax(p, axis=1) == labels).tolist()


# ---------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("heads", ["tied", "linear"])
def test_terms_of_plato_are_its_equations_2_to_7(heads: str, geometry: str) -> None:
    model = replace(MODEL, **GEOMETRIES[geometry])
    stage = make_stage("plato", model, recognition_head=heads, bow_head=heads)
    packed = pack_for("plato", make_window(5, model.vocab_size))
    for training in (True, False):
        terms = stage.train(training).losses(packed.unit)
        expected = slow_terms(stage, packed, slow_model(stage))
        assert set(terms) - set(expected) == {"coherence_acc", *(() if training else ("nll_uniform",))}
        assert set(expected) - set(terms) == ({"z_entropy"} if training else set())
        for term in set(terms) & set(expected):
            assert_equal(terms[term], expected[term])
        right = [value < math.log(2) for value in expected["rce"]]  # the right label has p > 0.5
        assert terms["coherence_acc"].tolist() == right
        assert len(right) == 2 * 5


@pytest.mark.parametrize("name", ["1_coarse", "2_gen", "2_eval", "plato"])
def test_gradients_are_the_slopes_of_the_slow_losses(name: str) -> None:
    """The slope of the stage's loss (equations 1, 6 and 7) along a random direction in weight space."""
    stage, packed = make_stage(name), pack_for(name, make_window(5))
    terms = stage.losses(packed.unit)
    sum(terms[term].mean() for term in stage.loss_terms).backward()
    rng = np.random.default_rng(1)
    for own in (None, "recognition", "bag_of_words", "coherence", "backbone.blocks.0.attention.qkv"):
        chosen = {name: p for name, p in stage.named_parameters() if own is None or name.startswith(own)}
        if not chosen:
            continue
        direction = {name: rng.standard_normal(p.shape) for name, p in chosen.items()}
        slope = sum(float((p.grad.numpy() * direction[name]).sum()) for name, p in chosen.items())

        def loss(size: float, direction: dict[str, np.ndarray] = direction) -> float:
            model = slow_model(stage, {name: size * part for name, part in direction.items()})
            slow = slow_terms(stage, packed, model)
            return sum(float(np.mean(slow[term])) for term in stage.loss_terms)

        expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert slope == pytest.approx(expected, rel=2e-5, abs=2e-6), own


# ----------------------------------------------------------------------------------------- the single losses

LOGITS = st.integers(1, 40).flatmap(
    lambda n: arrays(np.float32, (n, 33), elements=st.floats(-60, 60, width=32))
)


@settings(max_examples=30, deadline=None)
@given(LOGITS, st.integers(0, 2**31))
def test_nll_and_its_gradient_for_any_logits(logits: np.ndarray, seed: int) -> None:
    targets = torch.from_numpy(np.random.default_rng(seed).integers(0, 33, len(logits)))
    weight = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed))
    given = torch.tensor(logits, requires_grad=True)
    values = losses.nll(given, targets)
    assert_equal(values, [-log_softmax(row.astype(float))[t] for row, t in zip(logits, targets, strict=True)])
    (values * weight).sum().backward()
    slopes = [np.exp(log_softmax(row.astype(float))) for row in logits]
    for row, target in zip(slopes, targets, strict=True):
        row[target] -= 1.0
    expected = torch.tensor(np.array(slopes)) * weight[:, None]
    assert given.grad is not None
    torch.testing.assert_close(given.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(50)
    expected = [-log_softmax(row.double().numpy())[t] for t, row in enumerate(logits)]
    assert losses.nll(logits, targets).dtype == torch.float32
    assert_equal(losses.nll(logits, targets), expected)
    assert_equal(losses.bag_of_words(logits, targets, torch.arange(50)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_leaves_the_logits_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 61, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, given = logits.clone(), logits.requires_grad_()
    loss = losses.nll(given, torch.arange(40)).sum()
    first, second = (torch.autograd.grad(loss, given, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(given.detach(), before)


def test_hits_are_the_first_of_the_most_probable_words() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [3.0, 3.0, 1.0], [0.0, 2.0, 1.0]])
    assert losses.hits(logits, torch.tensor([1, 0, 1, 2])).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_bag_of_words_takes_each_word_from_its_samples_row() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    words, sample = torch.tensor([4, 4, 0, 10]), torch.tensor([0, 2, 2, 1])
    expected = [
        -log_softmax(logits[s].double().numpy())[w]
        for w, s in zip(words.tolist(), sample.tolist(), strict=True)
    ]
    assert_equal(losses.bag_of_words(logits, words, sample), expected)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, 7, elements=st.floats(-500, 500, width=32)))
def test_entropy_is_finite_where_probabilities_underflow(logits: np.ndarray) -> None:
    """Knover's is NaN there (docs/spec.md, Stage 2.1, issue #104)."""
    value = float(losses.entropy(torch.tensor(logits)[None]))
    assert value == pytest.approx(entropy(logits), abs=1e-5)
    assert -1e-6 <= value <= math.log(7) + 1e-6


def test_entropy_of_the_even_and_of_the_certain() -> None:
    given = torch.tensor([[0.3] * 20, [1e4, *[0.0] * 19]], requires_grad=True)
    assert losses.entropy(given).tolist() == pytest.approx([math.log(20), 0.0], abs=1e-6)
    losses.entropy(given).sum().backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, 6, elements=st.floats(-20, 20, width=32)),
    st.lists(st.sampled_from([0.0, 1e-7, 0.3, 0.5, 0.999, 1 - 2**-24]), min_size=6, max_size=6),
    st.sampled_from([0.3, 0.67, 2.0]),
)
def test_gumbel_softmax_also_at_the_ends_of_the_noise(logits: np.ndarray, u: list[float], tau: float) -> None:
    given, noise = torch.tensor(logits)[None], torch.tensor([u])
    z = losses.gumbel_softmax(given, noise, tau)
    assert z.isfinite().all()
    assert float(z.sum()) == pytest.approx(1.0, abs=1e-5)
    # Towards 1 float32 rounds log(u) itself; the stages above compare with ordinary noise to 1e-5.
    expected = torch.tensor(gumbel_softmax(logits, u, tau))
    torch.testing.assert_close(z[0].double(), expected, rtol=0, atol=5e-3)
    without = torch.tensor(gumbel_softmax(logits, None, tau))
    torch.testing.assert_close(
        losses.gumbel_softmax(given, None, tau)[0].double(), without, rtol=1e-4, atol=1e-6
    )
