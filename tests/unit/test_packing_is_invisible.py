"""A sample in a packed row is the sample in a row of its own: losses, posteriors, coherence and gradients.

And nothing leaks: not from the other samples of a row, not from the padding, not from the future.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from units import MODEL, Packed, Unit, make_stage, make_window, pack_for

from plato2.config import ModelConfig
from plato2.model import masks

STAGES = ("1_coarse", "2_gen", "2_eval")


def per_sample(unit: Unit, name: str, term: str, values: Tensor, sample: int) -> Tensor:
    """The values of one sample."""
    of_targets = {"1_coarse": ("nll", "acc"), "2_gen": ("nll", "bow"), "2_eval": ("mlm",)}[name]
    return values[unit["target_sample"] == sample] if term in of_targets else values[sample : sample + 1]


def gradients(stage: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*stage.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def loss_of(stage: Any, unit: Unit, terms: dict[str, Tensor], sample: int) -> Tensor:
    parts = [per_sample(unit, stage.name, term, terms[term], sample).sum() for term in stage.loss_terms]
    return torch.stack(parts).sum()


AFTER_CONTEXT = replace(MODEL, latent_at="response")


@pytest.fixture(params=[*STAGES, "response"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Packed]:
    if request.param == "response":
        return make_stage("2_gen", AFTER_CONTEXT), pack_for("2_gen", make_window(7))
    return make_stage(request.param), pack_for(request.param, make_window(7))


# --------------------------------------------------------------------------------------- packed = by itself


@pytest.mark.parametrize("padding", [0, 1, 70])
def test_losses_and_gradients_of_a_packed_sample_are_its_own(case: tuple[Any, Packed], padding: int) -> None:
    stage, packed = case
    unit = packed.unit
    terms = stage.losses(unit)
    total: dict[str, Tensor] = {}
    for sample in range(len(packed)):
        alone = packed.alone(sample, padding)
        own = stage.losses(alone)
        for term, values in terms.items():
            of_sample = per_sample(unit, stage.name, term, values, sample)
            torch.testing.assert_close(of_sample, own[term], rtol=1e-5, atol=1e-5)
        own_gradients = gradients(stage, loss_of(stage, alone, own, 0))
        for name, grad in own_gradients.items():
            total[name] = total.get(name, torch.zeros_like(grad)) + grad
        if sample < 3:  # also each by itself: errors of two samples cannot cancel out
            assert_same(gradients(stage, loss_of(stage, unit, terms, sample)), own_gradients)
    whole = torch.stack([terms[term].sum() for term in stage.loss_terms]).sum()
    assert_same(gradients(stage, whole), total)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_posterior_and_coherence_of_a_packed_sample_are_its_own() -> None:
    stage, packed = make_stage("2_gen"), pack_for("2_gen")
    logits = stage.posterior(packed.unit, stage.backbone.embed_unit(packed.unit))
    for sample in range(len(packed)):
        alone = packed.alone(sample)
        torch.testing.assert_close(logits[[sample]], stage.posterior(alone, stage.backbone.embed_unit(alone)))
    stage, packed = make_stage("2_eval"), pack_for("2_eval")
    logits = stage.coherence_logits(packed.unit)
    for sample in range(len(packed)):
        torch.testing.assert_close(logits[[sample]], stage.coherence_logits(packed.alone(sample)))


def test_half_precision_packs_as_well() -> None:
    stage, packed = make_stage("1_coarse", std=0.1), pack_for("1_coarse", make_window(7))
    exact = stage.losses(packed.unit)["nll"]
    with torch.autocast("cpu", torch.bfloat16):
        values = stage.losses(packed.unit)["nll"]
        alone = torch.cat([stage.losses(packed.alone(sample))["nll"] for sample in range(len(packed))])
    assert (values - exact).abs().mean() < 0.03
    assert (values - alone).abs().mean() < 0.03


# ------------------------------------------------------------------------------------------------- no leaks


def test_other_samples_of_a_row_do_not_matter(case: tuple[Any, Packed]) -> None:
    stage, packed = case
    unit = packed.unit
    before = stage.losses(unit)
    row_length = unit["token_ids"].shape[1]
    rows = unit["sample_index"] // row_length
    victim = int(torch.bincount(rows).argmax())  # a row with two samples or more
    kept = int((rows == victim).nonzero()[0])
    changed = dict(unit)
    segment = unit["segment_ids"].flatten()[unit["sample_index"][kept]]
    others = torch.ones_like(unit["segment_ids"], dtype=torch.bool)
    others[victim] = unit["segment_ids"][victim] != segment  # padding slots too
    if stage.name == "2_gen":  # but not the placeholders of the latent slots
        others.view(-1)[unit["sample_index"]] = False
    changed["token_ids"] = torch.where(others, (unit["token_ids"] + 7) % 50, unit["token_ids"])
    after = stage.losses(changed)
    for term in stage.loss_terms:
        of_kept = [per_sample(unit, stage.name, term, terms[term], kept) for terms in (before, after)]
        torch.testing.assert_close(*of_kept, rtol=0, atol=0)
        assert not torch.equal(before[term], after[term])


def change_token(unit: Unit, slot: int) -> Unit:
    tokens = unit["token_ids"].clone()
    tokens.view(-1)[slot] = (tokens.view(-1)[slot] + 11) % 50 + 3
    return unit | {"token_ids": tokens}


@pytest.mark.parametrize(("name", "model"), [("1_coarse", MODEL), ("2_gen", MODEL), ("2_gen", AFTER_CONTEXT)])
def test_a_response_slot_does_not_see_the_next_token(name: str, model: ModelConfig) -> None:
    stage, packed = make_stage(name, model), pack_for(name, make_window(3))
    unit = packed.unit
    z = torch.eye(MODEL.n_latent)[torch.arange(len(packed)) % MODEL.n_latent]

    def nll(unit: Unit) -> Tensor:
        if name == "1_coarse":
            return stage.losses(unit)["nll"]
        return stage.given_latent(unit, stage.backbone.embed_unit(unit), z)["nll"]

    before = nll(unit)
    targets = unit["target_index"]
    for changed in targets.tolist():
        after = nll(change_token(unit, changed))
        sample = unit["target_sample"][targets == changed]
        sees = (unit["target_sample"] == sample) & (targets >= changed)
        torch.testing.assert_close(after[~sees], before[~sees], rtol=0, atol=0)
        assert (after[sees] - before[sees]).abs().min() > 1e-6


def hidden(stage: Any, unit: Unit, whole_sample: bool) -> Tensor:
    """(B * T, H) of the recognition (or evaluation) pass, or of the generation pass."""
    backbone = stage.backbone
    x = backbone.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"])
    return backbone.encode(
        x, backbone.mask(unit["segment_ids"], None if whole_sample else unit["type_ids"])
    ).flatten(0, 1)


@pytest.mark.parametrize("name", ["1_coarse", "2_gen"])
def test_context_does_not_see_the_response_but_recognition_does(name: str) -> None:
    stage, packed = make_stage(name), pack_for(name, make_window(3))
    unit = packed.unit
    last = int(unit["target_index"][unit["target_sample"] == 0][-1])
    changed = change_token(unit, last)
    first, types = int(unit["sample_index"][0]), unit["type_ids"].flatten()
    own = torch.arange(len(types))[first : last + 1]
    context = own[types[own] == 0]
    assert len(own) > len(context) > 1
    before, after = hidden(stage, unit, False), hidden(stage, changed, False)
    torch.testing.assert_close(after[context], before[context], rtol=0, atol=0)
    before, after = hidden(stage, unit, True), hidden(stage, changed, True)
    assert (after[own] - before[own]).abs().amax(dim=1).min() > 1e-6
    if name == "2_gen":
        posteriors = [stage.posterior(u, stage.backbone.embed_unit(u)) for u in (unit, changed)]
        assert (posteriors[0][0] - posteriors[1][0]).abs().min() > 1e-6
        torch.testing.assert_close(posteriors[0][1:], posteriors[1][1:], rtol=0, atol=0)


def test_a_latent_after_the_context_is_seen_by_the_response_alone() -> None:
    """The context's slots depend neither on z nor on what stands in the front slot."""
    stage, packed = make_stage("2_gen", AFTER_CONTEXT), pack_for("2_gen", make_window(4))
    unit, backbone = packed.unit, stage.backbone
    x = backbone.embed_unit(unit)
    z = [stage.recognition.latent(torch.eye(MODEL.n_latent)[[i] * len(packed)]) for i in (0, 3)]
    changed = backbone.put_front(x, unit["sample_index"], torch.ones(len(packed), MODEL.hidden_size))
    outputs = []
    for rows, vectors in ((x, z[0]), (x, z[1]), (changed, z[0])):
        given, slots, mask = backbone.put_latents(unit, rows, vectors)
        assert unit["token_ids"].flatten()[slots].eq(1).all()
        assert unit["type_ids"].flatten()[slots].eq(1).all()
        outputs.append(backbone.encode(given, mask, pos_ids=unit["pos_ids"]).flatten(0, 1))
    sample = unit["segment_ids"].flatten() > 0
    sample[unit["sample_index"]] = False
    response = sample & (unit["type_ids"].flatten() == 1)
    moved = (outputs[0] - outputs[1]).abs().amax(1) > 1e-6
    assert torch.equal(moved & sample, response)
    assert torch.equal(outputs[0][sample], outputs[2][sample])


@pytest.mark.parametrize("model", [MODEL, AFTER_CONTEXT])
def test_latent_and_context_see_each_other(model: ModelConfig) -> None:
    """Every slot of a sample depends on its latent, and on no other sample's."""
    stage, packed = make_stage("2_gen", model), pack_for("2_gen", make_window(4))
    unit = packed.unit
    x = stage.backbone.embed_unit(unit)
    z = torch.zeros(len(packed), MODEL.n_latent)
    z[:, 0] = 1.0
    before = stage.given_latent(unit, x, z)
    z[2] = torch.eye(MODEL.n_latent)[3]
    after = stage.given_latent(unit, x, z)
    for term in ("nll", "bow"):
        moved = (before[term] - after[term]).abs()
        assert torch.equal(moved > 1e-6, unit["target_sample"] == 2)


# ------------------------------------------------------------------------------------------------- pictures

# Two samples and padding in one row: Z = latent slot, c = context, r = response, . = padding.
ROW = "ZccrrZcrr."
SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0]])
GENERATION = """
    ZccrrZcrr.
Z   111.......
c   111.......
c   111.......
r   1111......
r   11111.....
Z   .....11...
c   .....11...
r   .....111..
r   .....1111.
.   .........1
"""
WHOLE_SAMPLE = """
    ZccrrZcrr.
Z   11111.....
c   11111.....
c   11111.....
r   11111.....
r   11111.....
Z   .....1111.
c   .....1111.
r   .....1111.
r   .....1111.
.   .........1
"""


def picture(visible: Tensor) -> str:
    lines = [f"    {ROW}"]
    for slot, row in zip(ROW, visible.tolist(), strict=True):
        lines.append(f"{slot}   " + "".join("1" if seen else "." for seen in row))
    return "\n" + "\n".join(lines) + "\n"


def test_masks_as_pictures() -> None:
    assert picture(masks.prefix_lm(SEGMENTS, TYPES)[0]) == GENERATION
    assert picture(masks.same_sample(SEGMENTS)[0]) == WHOLE_SAMPLE
    assert picture(masks.additive(masks.prefix_lm(SEGMENTS, TYPES), torch.float32)[0, 0] == 0) == GENERATION


@pytest.mark.parametrize(("types", "expected"), [(TYPES, GENERATION), (None, WHOLE_SAMPLE)])
@pytest.mark.parametrize("form", ["of this device", "dense"])
def test_attention_looks_where_the_pictures_say(types: Tensor | None, expected: str, form: str) -> None:
    """Who depends on whom after one block, by gradient: what attention does, whatever form the mask has."""
    stage = make_stage("1_coarse", model=type(MODEL)(**{**vars(MODEL), "n_layer": 1}))
    if form == "dense":
        seen = masks.same_sample(SEGMENTS) if types is None else masks.prefix_lm(SEGMENTS, types)
        mask: Any = masks.additive(seen, torch.float32)
    else:
        mask = stage.backbone.mask(SEGMENTS, types)
    x = torch.randn(1, len(ROW), MODEL.hidden_size, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    h = stage.backbone.encode(x, mask)[0]
    depends = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0][0].abs().sum(-1) for out in h]
    assert picture(torch.stack(depends) > 0) == expected


def test_both_forms_of_the_mask_give_the_same_numbers() -> None:
    """Rows long enough for several groups of lengths; the dense form is what GPUs and decoding use."""
    lengths = [3, 70, 128, 65, 1, 200]
    segments = torch.zeros(3, 210, dtype=torch.long)
    types = torch.zeros_like(segments)
    for row, mine in enumerate((lengths[:2], lengths[2:5], lengths[5:])):
        column = 0
        for number, length in enumerate(mine):
            segments[row, column : column + length] = number + 1
            types[row, column + length // 2 : column + length] = 1
            column += length
    stage = make_stage("1_coarse", std=0.15)
    x = torch.randn(3, 210, MODEL.hidden_size, generator=torch.Generator().manual_seed(0))
    for given in (types, None):
        seen = masks.same_sample(segments) if given is None else masks.prefix_lm(segments, types)
        outputs, grads = [], []
        for mask in (stage.backbone.mask(segments, given), masks.additive(seen, torch.float32)):
            h = stage.backbone.encode(x, mask)[segments > 0]
            outputs.append(h)
            grads.append(gradients(stage, (h * x[segments > 0]).sum()))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for name, grad in grads[1].items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-4 * max(scale, 1.0))
