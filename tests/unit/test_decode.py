"""Decoding: the cache, padding and the other rows of a batch change nothing; latents and seeds do."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.samples import encode_response
from plato2.data.tokenizer import EOS_ID, UNK_ID
from plato2.model import masks
from plato2.model.backbone import put_front, read_slots
from plato2.stages import CoarseGeneration, FineGeneration, Stage
from plato2.talk.decode import Hypothesis, choose, decode

MODEL = {"n_layer": 2, "n_head": 2, "hidden_size": 16, "vocab_size": 61, "max_position": 64, "n_latent": 4}
CONTEXTS = [[1, 7, 9, 2, 11, 2], [1, 33, 2], [1, *range(10, 30), 2, *range(20, 40), 2]]
DECODE = DecodeConfig(max_tokens=12, top_k=5, n_candidates=4)


def made(stage_class: type[Stage], **model: Any) -> Any:
    """A stage with random weights large enough that tokens, latents and contexts matter."""
    stage = stage_class(ModelConfig(**(MODEL | {"dropout": 0.1} | model)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
        stage.backbone.lm_bias[EOS_ID] = 2.0  # so that some candidates end
    return stage.eval()


def response_unit(stage: Stage, context: list[int], response: list[int], front: bool) -> dict[str, Tensor]:
    """One sample as the stages train on it; `response` without [CLS], its last token only a target."""
    record = [*context, *encode_response(response[:-1], 64)[:-1]]
    extra = int(front)
    length = extra + len(record)
    first = extra + len(context)
    return {
        "token_ids": torch.tensor([[stage.model_config.mask_id] * extra + record]),
        "type_ids": (torch.arange(length) >= first).long()[None],
        "pos_ids": torch.tensor([[0] * extra + list(range(len(record)))]),
        "segment_ids": torch.ones(1, length, dtype=torch.long),
        "sample_index": torch.tensor([0]),
        "target_index": torch.arange(first, length),
        "target_ids": torch.tensor(response),
        "target_sample": torch.zeros(len(response), dtype=torch.long),
        "sample_key": torch.tensor([0]),
    }


def logits_without_cache(stage: Any, context: list[int], response: list[int], latent: int | None) -> Tensor:
    """Logits of the token after `response`, everything computed anew."""
    unit = response_unit(stage, context, [*response, 0], front=latent is not None)
    x = stage.backbone.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"])
    if latent is not None:
        z = torch.eye(stage.model_config.n_latent)[latent : latent + 1]
        x = put_front(x, unit["sample_index"], stage.recognition.latent(z))
    bias = masks.additive(masks.prefix_lm(unit["segment_ids"], unit["type_ids"]), x.dtype)
    h = stage.backbone.encode(x, bias)
    return stage.backbone.lm_logits(read_slots(h, unit["target_index"][-1:]))[0]


@torch.no_grad()
def decode_slowly(
    stage: Any, context: list[int], latent: int | None, config: DecodeConfig, uniforms: list[float]
) -> tuple[list[int], float]:
    """Spec section 9 for one row, with numpy and without a cache."""
    response: list[int] = []
    log_probs: list[float] = []
    for step in range(config.max_tokens):
        logits = logits_without_cache(stage, context, response, latent).double().numpy() / config.temperature
        logits[[UNK_ID, stage.model_config.mask_id]] = -np.inf
        if step < config.min_tokens:
            logits[EOS_ID] = -np.inf
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        best = np.sort(probs)[::-1][: config.top_k]
        kept = np.where(probs >= best[-1], probs, 0.0)
        cumulative = kept.cumsum() / kept.sum()
        token = int(np.searchsorted(cumulative, uniforms[step], side="right"))
        response.append(token)
        log_probs.append(math.log(probs[token]))
        if token == EOS_ID:
            break
    return response, float(np.mean(log_probs))


@pytest.mark.parametrize("stage_class", [CoarseGeneration, FineGeneration])
@pytest.mark.parametrize(
    "config",
    [
        DECODE,
        DecodeConfig(max_tokens=12, top_k=1, n_candidates=4),
        DecodeConfig(max_tokens=12, top_k=1000, n_candidates=4, temperature=1.7, min_tokens=4),
    ],
    ids=["top_5", "greedy", "all_hot_min_4"],
)
def test_the_cache_changes_nothing(stage_class: type[Stage], config: DecodeConfig) -> None:
    stage = made(stage_class)
    uniforms = torch.rand(4 * len(CONTEXTS), config.max_tokens, generator=torch.Generator().manual_seed(2))
    found = decode(stage, CONTEXTS, config, uniforms)
    lengths = set()
    for b, context in enumerate(CONTEXTS):
        assert len(found[b]) == 4
        for number, hypothesis in enumerate(found[b]):
            latent = number if stage_class is FineGeneration else None
            row = uniforms[number * len(CONTEXTS) + b].tolist()
            ids, log_prob = decode_slowly(stage, context, latent, config, row)
            assert list(hypothesis.token_ids) == ids
            assert hypothesis.log_prob == pytest.approx(log_prob, abs=1e-5)
            assert hypothesis.latent == latent
            lengths.add(len(ids))
    assert len(lengths) > 2  # rows left the batch at several steps


def test_a_long_batch_in_which_rows_leave_one_by_one() -> None:
    stage = made(CoarseGeneration)
    config = DecodeConfig(max_tokens=30, top_k=60, n_candidates=40)
    uniforms = torch.rand(40, 30, generator=torch.Generator().manual_seed(3))
    for number, hypothesis in enumerate(decode(stage, CONTEXTS[:1], config, uniforms)[0]):
        ids, log_prob = decode_slowly(stage, CONTEXTS[0], None, config, uniforms[number].tolist())
        assert list(hypothesis.token_ids) == ids
        assert hypothesis.log_prob == pytest.approx(log_prob, abs=1e-5)


@pytest.mark.parametrize("stage_class", [CoarseGeneration, FineGeneration])
def test_the_rest_of_the_batch_changes_nothing(stage_class: type[Stage]) -> None:
    stage = made(stage_class)
    together = decode(stage, CONTEXTS, DECODE)
    alone = [decode(stage, [context], DECODE)[0] for context in CONTEXTS]
    backwards = decode(stage, CONTEXTS[::-1], DECODE)[::-1]
    for others in (alone, backwards):
        for mine, theirs in zip(together, others, strict=True):
            assert [h.token_ids for h in mine] == [h.token_ids for h in theirs]
            assert [h.log_prob for h in mine] == pytest.approx([h.log_prob for h in theirs], abs=1e-5)


def test_log_prob_is_minus_the_training_loss() -> None:
    """Teacher-forced NLL of the same tokens; the forbidden tokens are made impossible for both."""
    config = DecodeConfig(max_tokens=12, top_k=5, min_tokens=0, n_candidates=4)
    for stage_class in (CoarseGeneration, FineGeneration):
        stage = made(stage_class)
        with torch.no_grad():
            stage.backbone.lm_bias[[UNK_ID, stage.model_config.mask_id]] = -1e9
        for context, hypotheses in zip(CONTEXTS, decode(stage, CONTEXTS, config), strict=True):
            for hypothesis in hypotheses:
                unit = response_unit(
                    stage, context, list(hypothesis.token_ids), hypothesis.latent is not None
                )
                with torch.no_grad():
                    if hypothesis.latent is None:
                        nll = stage.losses(unit)["nll"]
                    else:
                        z = torch.eye(4)[hypothesis.latent][None]
                        nll = stage.given_latent(unit, stage.embed(unit), z)["nll"]
                assert hypothesis.log_prob == pytest.approx(-float(nll.mean()), abs=1e-5)


def test_latents_and_seeds_matter_and_the_same_seed_repeats() -> None:
    stage = made(FineGeneration)
    greedy = decode(stage, CONTEXTS, DecodeConfig(max_tokens=12, top_k=1))
    assert any(len({h.token_ids for h in hypotheses}) > 1 for hypotheses in greedy)
    first, again = decode(stage, CONTEXTS, DECODE), decode(stage, CONTEXTS, DECODE)
    assert first == again
    assert first != decode(stage, CONTEXTS, DecodeConfig(max_tokens=12, top_k=5, seed=12))


def test_samples_of_one_context_differ() -> None:
    stage = made(CoarseGeneration)
    (samples,) = decode(stage, CONTEXTS[:1], DecodeConfig(max_tokens=12, top_k=5, n_candidates=8))
    assert len({h.token_ids for h in samples}) > 4
    assert {h.latent for h in samples} == {None}


def test_greedy_takes_the_most_probable_token_whatever_the_seed() -> None:
    stage = made(FineGeneration)
    greedy = [decode(stage, CONTEXTS, DecodeConfig(max_tokens=12, top_k=1, seed=seed)) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_roles_reach_the_model() -> None:
    """With role embeddings the context turns have roles; taking their table away changes the candidates."""
    stage = made(CoarseGeneration, n_role=2)
    config = DecodeConfig(max_tokens=12, top_k=1, n_candidates=1)
    with_roles = decode(stage, CONTEXTS, config)
    with torch.no_grad():
        stage.backbone.role.weight[1] = stage.backbone.role.weight[0]
    assert decode(stage, CONTEXTS, config) != with_roles


def test_forbidden_tokens_and_lengths() -> None:
    stage = made(FineGeneration)
    with torch.no_grad():  # a model that wants nothing else
        stage.backbone.lm_bias[[UNK_ID, EOS_ID, stage.model_config.mask_id]] = 50.0
    for hypotheses in decode(stage, CONTEXTS, DecodeConfig(max_tokens=12, top_k=5, min_tokens=3)):
        for hypothesis in hypotheses:
            assert len(hypothesis.token_ids) == 4
            assert hypothesis.token_ids[-1] == EOS_ID
            assert not {UNK_ID, stage.model_config.mask_id} & set(hypothesis.token_ids)
    with torch.no_grad():
        stage.backbone.lm_bias[EOS_ID] = -50.0
    (hypotheses, *_) = decode(stage, CONTEXTS, DECODE)
    assert {len(h.token_ids) for h in hypotheses} == {12}
    assert all(h.words == h.token_ids for h in hypotheses)


def test_an_autocast_around_it_changes_nothing() -> None:
    stage = made(FineGeneration)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decode(stage, CONTEXTS, DECODE)
    assert inside == decode(stage, CONTEXTS, DECODE)


def test_what_cannot_be_decoded_is_refused() -> None:
    stage = made(FineGeneration)
    with pytest.raises(UserError, match=r"max_tokens=30: with a context of 43 tokens .* at most 21"):
        decode(stage, CONTEXTS, DecodeConfig(max_tokens=30))
    assert decode(stage, [], DECODE) == []
    stage.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        decode(stage, CONTEXTS, DECODE)


def test_words_are_without_the_end() -> None:
    assert Hypothesis((5, 6, EOS_ID), 0, -1.0).words == (5, 6)
    assert Hypothesis((EOS_ID,), 0, -1.0).words == ()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-6, 0), min_size=3, max_size=12),
    st.integers(2, 15),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_choose_keeps_ties_and_never_leaves_the_best_k(scores: list[int], k: int, point: float) -> None:
    log_probs = torch.tensor([scores], dtype=torch.float32).log_softmax(-1)
    token = int(choose(log_probs, k, torch.tensor([point])))
    assert scores[token] >= sorted(scores, reverse=True)[: min(k, len(scores))][-1]


def test_choose_draws_each_token_as_often_as_its_share() -> None:
    probs = torch.tensor([0.4, 0.05, 0.2, 0.2, 0.15])
    points = (torch.arange(1000) + 0.5) / 1000
    tokens = choose(probs.log().expand(1000, -1), 2, points)  # 0 and, tied for the second place, 2 and 3
    assert torch.bincount(tokens, minlength=5).tolist() == [500, 0, 250, 250, 0]
