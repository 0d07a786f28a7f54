"""experiments/decoder_latents: its trainings fit conf/, its analysis of variance is one, and its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import write_decoder

from experiments.decoder_latents import tables
from experiments.decoder_latents.decoder_latents import COMMON, VARIANTS
from experiments.decoder_latents.slots import LENGTHS, _variance, heeded, readings
from plato2.commands.train import composed, refuse_unknown
from plato2.config import ModelConfig
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.model.backbone import Backbone
from plato2.model.decoder_folder import from_folder
from plato2.model.pretrained import build_backbone

PAIRS = [([1, 10, 11, 2], [1, 12, 2]), ([1, 13, 2], [1, 14, 15, 16, 2]), ([1, 17, 18, 19, 2], [1, 20, 2])]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    base = write_decoder(tmp_path_factory.mktemp("decoder"), max_position_embeddings=256)
    config = ModelConfig(path=str(base), max_position=64, dropout=0.0, context_mask="causal")
    return build_backbone(from_folder(config, DecoderTokenizer.from_model))


def test_every_training_fits_the_configuration(tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", max_position_embeddings=256)
    for name, options in VARIANTS.items():
        config = composed(*COMMON, *options, f"model.path={base}", "data.path=data")
        refuse_unknown(config)
        learned = name in ("learned", "as_ours")
        assert config.stage.recognition_bias == ("learned" if learned else "balanced")
        assert config.model.latent_at == ("front" if name in ("front", "as_ours") else "response")
        assert config.model.latent_scale == (1.0 if name in ("short", "as_ours") else None)
    assert VARIANTS.keys() == tables.VARIANTS.keys()


def test_shares_are_those_of_an_analysis_of_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    context, response = (
        torch.randn(40, 1, 30, generator=generator),
        torch.randn(1, 50, 30, generator=generator),
    )
    found = _variance(10.0 + 3 * context + response)
    assert found["of_context"] == pytest.approx(0.9, abs=0.02)
    assert found["of_response"] == pytest.approx(0.1, abs=0.02)
    assert found["of_both"] == pytest.approx(0.0, abs=1e-4)
    assert found["spread"] == pytest.approx((10 / (100 + 10)) ** 0.5, abs=0.02)


def test_the_last_slot_sees_all_and_the_first_one_too(decoder: Backbone) -> None:
    for mask in ("causal", "prefix"):
        for shares in readings(decoder, PAIRS, mask).values():
            assert shares["spread"] > 0
            assert shares["of_context"] > 0.01
            assert shares["of_response"] > 0.01


def test_a_longer_vector_is_heeded_more_and_none_not_at_all(decoder: Backbone) -> None:
    found = heeded(decoder, PAIRS)
    assert found.keys() == {"front", "response"}
    for kls in found.values():
        assert len(kls) == len(LENGTHS)
        assert kls == sorted(kls)
        assert kls[-1] > 0


def test_tables() -> None:
    slots = {"spread": 0.5, "of_context": 0.25, "of_response": 0.5, "of_both": 0.25}
    look = {"read": {"causal": {"first": slots, "last": slots}}, "heeded": {"front": [0.25, 0.5, 1.0]}}
    point = dict.fromkeys(tables.FIGURES, 1.5)
    results = {
        "slots": {"decoders": {"as_it_is": look}, "lengths": list(LENGTHS)},
        "runs": {"recipe": {"curve": [{"nll": 9.0}, point]}},
    }
    assert "| SmolLM2 as it is | causal | last | 0.500 | 0.250 | 0.500 | 0.250 | 0.1250 |" in tables.read(
        results
    )
    assert "| SmolLM2 as it is | front | 0.2500 | 0.5000 | 1.0000 |" in tables.heeded(results)
    assert tables.trained(results).splitlines()[-1].count("1.500") == 5
    assert tables.trained({}) == "The trainings are still to be run."
