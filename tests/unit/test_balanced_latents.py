"""Stage 2.1 for pretrained decoders: latents that are balanced by construction, and as long as words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoders import written_once
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from units import MODEL, make_stage

from plato2.commands.train import composed
from plato2.config import ModelConfig, UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.model.decoder_folder import from_folder
from plato2.model.heads import Latents, Recognition
from plato2.model.pretrained import build_backbone, word_length

HEADS = ("tied", "linear")


def drawn(head: str, bias: str = "balanced", model: ModelConfig = MODEL) -> Recognition:
    """With weights large enough to matter, the same for both kinds of bias."""
    recognition = Recognition(model, head, bias)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in recognition.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return recognition


def outputs(n: int, seed: int = 0) -> Tensor:
    """(n, H) much alike, as those of a decoder are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(MODEL.hidden_size, generator=generator)
    return 2 * common + torch.randn(n, MODEL.hidden_size, generator=generator)


@given(n=st.integers(1, 12), seed=st.integers(0, 100), head=st.sampled_from(HEADS))
def test_logits_are_the_learned_ones_less_their_mean_over_the_unit(n: int, seed: int, head: str) -> None:
    h = outputs(n, seed)
    balanced, learned = drawn(head)(h), drawn(head, "learned")(h)
    torch.testing.assert_close(balanced, learned - learned.mean(0), atol=1e-5, rtol=1e-5)
    assert balanced.mean(0).abs().max() < 1e-5
    if n == 1:  # nothing to differ from: p(z|c,r) is uniform
        assert torch.equal(balanced, torch.zeros_like(balanced))


@pytest.mark.parametrize("head", HEADS)
def test_what_is_the_same_for_all_samples_has_no_gradient(head: str) -> None:
    """The logits' own bias; with a linear layer also what its weights make of the outputs' mean."""
    preferred = torch.arange(MODEL.n_latent).float()  # a loss that wants one latent, whatever the sample
    for bias, moves in (("learned", True), ("balanced", False)):
        recognition, h = drawn(head, bias), outputs(9)
        (recognition(h) @ preferred).sum().backward()
        assert (recognition.bias.grad.abs().max() > 1e-4) == moves
        if recognition.classifier is not None:
            assert (recognition.classifier.weight.grad.abs().max() > 1e-4) == moves


@given(units=st.lists(st.integers(0, 6), min_size=1, max_size=4), steps=st.integers(1, 3))
def test_the_centre_goes_a_tenth_of_the_way_to_the_mean_of_a_step_over_units_and_ranks(
    units: list[int], steps: int
) -> None:
    one, ranks = drawn("tied"), [drawn("tied"), drawn("tied")]
    expected = torch.zeros(MODEL.n_latent)
    for step in range(steps):
        parts = [outputs(n, seed=10 * step + number) for number, n in enumerate(units)]
        for number, part in enumerate(parts):
            one(part)
            ranks[number % 2](part)
        if len(units) == 1:
            ranks[1](outputs(0))  # a rank that has nothing gets empty units
        mine = [torch.stack(rank.seen).sum(0) for rank in ranks]
        one.follow(lambda sums: sums)
        for rank in ranks:
            rank.follow(lambda sums, mine=mine: sum(mine))  # type: ignore[misc]
        if sum(units):
            expected = 0.9 * expected + 0.1 * drawn("tied", "learned")(torch.cat(parts)).detach().mean(0)
    for recognition in (one, *ranks):
        torch.testing.assert_close(recognition.centre, expected, atol=1e-5, rtol=1e-5)
        assert not recognition.seen
        h = outputs(3, seed=99)  # for one sample, the centre stands for the unit's mean
        logits = recognition.eval()(h[:1])
        torch.testing.assert_close(logits, drawn("tied", "learned")(h[:1]) - expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_has_the_centre_and_one_with_learned_bias_has_what_it_always_had() -> None:
    learned, balanced = make_stage("2_gen"), make_stage("2_gen", recognition_bias="balanced")
    assert set(balanced.state_dict()) - set(learned.state_dict()) == {"recognition.centre"}
    assert set(learned.state_dict()) <= set(balanced.state_dict())
    assert "recognition_bias" not in learned.hparams
    assert balanced.hparams["recognition_bias"] == "balanced"


@pytest.mark.parametrize("latent_at", ["front", "response"])
@pytest.mark.parametrize("head", HEADS)
def test_a_scale_is_as_if_the_latents_were_so_much_longer(latent_at: str, head: str) -> None:
    model = replace(MODEL, latent_at=latent_at)
    short, long = drawn(head, "learned", replace(model, latent_scale=3.0)), drawn(head, "learned", model)
    with torch.no_grad():
        long.latent_embedding *= 3.0
    h, weights = outputs(7), torch.rand(7, MODEL.n_latent)
    torch.testing.assert_close(short(h), long(h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short.latent(weights), long.latent(weights), atol=1e-5, rtol=1e-5)


def test_impossible_scales_are_refused() -> None:
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"model\.latent_scale=.*: must be a number above 0, or null"):
            ModelConfig(latent_scale=scale)
    with pytest.raises(UserError, match=r"model\.latent_scale=null: is for a pretrained decoder"):
        ModelConfig(latent_scale=None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_length_of_words_is_that_of_what_the_decoder_computes_with(tmp_path: Path, family: str) -> None:
    decoder_folder = ModelConfig(path=str(written_once(tmp_path)(family)), max_position=64)
    config = from_folder(decoder_folder, DecoderTokenizer.from_model)
    decoder = build_backbone(config).decoder  # type: ignore[attr-defined]
    table = decoder.get_input_embeddings()
    embedded = table(torch.arange(len(table.weight)))
    assert word_length(config) == pytest.approx(embedded.square().mean().sqrt().item(), rel=1e-5)
    begun = Latents(replace(config, latent_scale=word_length(config) / 0.02))
    torch.nn.init.normal_(begun.latent_embedding, std=0.02)
    length = begun.latent(torch.eye(config.n_latent)).detach().square().mean().sqrt()
    assert float(length) == pytest.approx(word_length(config), rel=0.2)


@pytest.mark.parametrize("stage", ["2_gen", "plato"])
@pytest.mark.parametrize("model", ["pretrained", "pretrained_lora"])
def test_the_recipes_of_decoders_have_what_their_latents_need(tmp_path: Path, model: str, stage: str) -> None:
    base = written_once(tmp_path)("llama")
    config = composed(f"model={model}", f"model.path={base}", f"stage={stage}")
    assert (config.model.latent_at, config.model.latent_scale) == ("response", None)
    assert config.stage.recognition_bias == "balanced"
    own = composed(f"stage={stage}")
    assert (own.model.latent_at, own.model.latent_scale) == ("front", 1.0)
    assert own.stage.recognition_bias == "learned"
