"""Decoding: the cache, padding and the other rows of a batch change nothing; latents and seeds do."""

import math
from dataclasses import replace
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
from plato2.talk.decode import (
    NO_TOKEN,
    Hypothesis,
    _norm,
    choose,
    choose_top_p,
    decode,
    n_candidates,
    repeating,
)

MODEL = {"n_layer": 2, "n_head": 2, "hidden_size": 16, "vocab_size": 61, "max_position": 64, "n_latent": 4}
CONTEXTS = [[1, 7, 9, 2, 11, 2], [1, 33, 2], [1, *range(10, 30), 2, *range(20, 40), 2]]
DECODE = DecodeConfig(max_tokens=12, top_k=5, n_candidates=4)
TOP_P = DecodeConfig(strategy="top_p", top_p=0.7, max_tokens=12, n_candidates=4)
BEAM = DecodeConfig(strategy="beam", beam_size=3, max_tokens=8)


class AfterContext(FineGeneration):
    """Stage 2.1 with the latent at the response's [CLS]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(replace(model, latent_at="response"))


KINDS = [CoarseGeneration, FineGeneration, pytest.param(AfterContext, marks=pytest.mark.slow)]


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
    front = latent is not None and not isinstance(stage, AfterContext)
    unit = response_unit(stage, context, [*response, 0], front=front)
    x = stage.backbone.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"])
    if latent is not None:
        z = torch.eye(stage.model_config.n_latent)[latent : latent + 1]
        if front:
            x = put_front(x, unit["sample_index"], stage.recognition.latent(z))
        else:
            x[0, len(context)] += stage.recognition.latent(z)[0]
    bias = masks.additive(masks.prefix_lm(unit["segment_ids"], unit["type_ids"]), x.dtype)
    h = stage.backbone.encode(x, bias)
    return stage.backbone.lm_logits(read_slots(h, unit["target_index"][-1:]))[0]


def turns_of(context: list[int]) -> list[list[int]]:
    """The ids between the special ones."""
    turns: list[list[int]] = [[]]
    for token in context:
        if token in (1, EOS_ID):
            turns.append([])
        else:
            turns[-1].append(token)
    return turns


def n_grams(items: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


@torch.no_grad()
def probs_slowly(
    stage: Any, context: list[int], response: list[int], latent: int | None, config: DecodeConfig
) -> np.ndarray:
    """Spec section 9: the probabilities of the token after `response`, with numpy and without a cache."""
    logits = logits_without_cache(stage, context, response, latent).double().numpy() / config.temperature
    if n := config.no_repeat_ngram:
        known = {n_gram for part in (*turns_of(context), response) for n_gram in n_grams(part, n)}
        for token in range(len(logits)):
            if len(response) >= n - 1 and (*response[len(response) - n + 1 :], token) in known:
                logits[token] = -1e9
    logits[[UNK_ID, stage.model_config.mask_id]] = -np.inf
    if len(response) < config.min_tokens:
        logits[EOS_ID] = -np.inf
    probs = np.exp(logits - logits.max())
    return probs / probs.sum()


def decode_slowly(
    stage: Any, context: list[int], latent: int | None, config: DecodeConfig, uniforms: list[float]
) -> tuple[list[int], float]:
    """One sampled row."""
    response: list[int] = []
    log_probs: list[float] = []
    for step in range(config.max_tokens):
        probs = probs_slowly(stage, context, response, latent, config)
        order = np.arange(len(probs))
        if config.strategy == "top_p":
            order = np.argsort(-probs, kind="stable")
            n_kept = 1 + int((probs[order].cumsum() < config.top_p).sum())
            kept = np.where(order.argsort() < n_kept, probs, 0.0)
        else:
            kept = np.where(probs >= np.sort(probs)[::-1][: config.top_k][-1], probs, 0.0)
        cumulative = kept[order].cumsum() / kept.sum()
        token = int(order[np.searchsorted(cumulative, uniforms[step], side="right")])
        response.append(token)
        log_probs.append(math.log(probs[token]))
        if token == EOS_ID:
            break
    return response, float(np.mean(log_probs))


def beam_search_slowly(
    stage: Any, context: list[int], latent: int | None, config: DecodeConfig
) -> list[tuple[list[int], float]]:
    """The hypotheses of one row and their scores, best first."""

    def score(found: tuple[list[int], float]) -> float:
        n, a = len(found[0]), config.length_penalty
        return found[1] / (n if a is None else ((5 + n) / 6) ** a)

    beam: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(config.max_tokens):
        candidates = []
        for ids, total in beam:
            if ids[-1:] == [EOS_ID]:
                candidates.append((ids, total))
                continue
            probs = probs_slowly(stage, context, ids, latent, config)
            for token in np.argsort(-probs, kind="stable")[: config.beam_size].tolist():
                candidates.append(([*ids, token], total + math.log(probs[token])))
        beam = sorted(candidates, key=score, reverse=True)[: config.beam_size]
    return [(ids, score((ids, total))) for ids, total in beam]


@pytest.mark.parametrize("stage_class", [CoarseGeneration, FineGeneration, AfterContext])
@pytest.mark.parametrize(
    "config",
    [
        DECODE,
        DecodeConfig(max_tokens=12, top_k=1, n_candidates=4),
        DecodeConfig(max_tokens=12, top_k=1000, n_candidates=4, temperature=1.7, min_tokens=4),
        DecodeConfig(max_tokens=12, top_k=3, n_candidates=4, no_repeat_ngram=2),
        DecodeConfig(max_tokens=12, top_k=5, n_candidates=4, no_repeat_ngram=1),
        TOP_P,
    ],
    ids=["top_5", "greedy", "all_hot_min_4", "top_3_no_repeat", "top_5_no_repeat", "top_p"],
)
def test_the_cache_changes_nothing(stage_class: type[Stage], config: DecodeConfig) -> None:
    stage = made(stage_class)
    uniforms = torch.rand(4 * len(CONTEXTS), config.max_tokens, generator=torch.Generator().manual_seed(2))
    found = decode(stage, CONTEXTS, config, uniforms=uniforms)
    lengths = set()
    for b, context in enumerate(CONTEXTS):
        assert len(found[b]) == 4
        for number, hypothesis in enumerate(found[b]):
            latent = None if stage_class is CoarseGeneration else number
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
    for number, hypothesis in enumerate(decode(stage, CONTEXTS[:1], config, uniforms=uniforms)[0]):
        ids, log_prob = decode_slowly(stage, CONTEXTS[0], None, config, uniforms[number].tolist())
        assert list(hypothesis.token_ids) == ids
        assert hypothesis.log_prob == pytest.approx(log_prob, abs=1e-5)


@pytest.mark.parametrize("stage_class", KINDS)
@pytest.mark.parametrize("length_penalty", [None, 0.0, 0.6])
@pytest.mark.parametrize("no_repeat_ngram", [0, 2])
def test_a_beam_is_that_of_a_search_without_cache(
    stage_class: type[Stage], length_penalty: float | None, no_repeat_ngram: int
) -> None:
    stage = made(stage_class)
    config = replace(BEAM, length_penalty=length_penalty, no_repeat_ngram=no_repeat_ngram)
    for context, hypotheses in zip(CONTEXTS, decode(stage, CONTEXTS, config), strict=True):
        latents: list[int | None] = [None] if stage_class is CoarseGeneration else [0, 1, 2, 3]
        assert [hypothesis.latent for hypothesis in hypotheses] == [z for z in latents for _ in range(3)]
        expected = [
            found for latent in latents for found in beam_search_slowly(stage, context, latent, config)
        ]
        assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == [ids for ids, _ in expected]
        scores = [score for _, score in expected]
        assert [hypothesis.log_prob for hypothesis in hypotheses] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("stage_class", KINDS)
@pytest.mark.parametrize("no_repeat_ngram", [0, 2])
def test_a_beam_of_one_is_greedy(stage_class: type[Stage], no_repeat_ngram: int) -> None:
    stage = made(stage_class)
    greedy = DecodeConfig(top_k=1, max_tokens=12, n_candidates=1, no_repeat_ngram=no_repeat_ngram)
    one = replace(greedy, strategy="beam", beam_size=1)
    for mine, theirs in zip(decode(stage, CONTEXTS, one), decode(stage, CONTEXTS, greedy), strict=True):
        assert [(h.token_ids, h.latent) for h in mine] == [(h.token_ids, h.latent) for h in theirs]
        assert [h.log_prob for h in mine] == pytest.approx([h.log_prob for h in theirs], abs=1e-6)


@pytest.mark.parametrize("stage_class", KINDS)
@pytest.mark.parametrize(
    "config",
    [DECODE, TOP_P, BEAM, replace(DECODE, no_repeat_ngram=2, n_samples=2), replace(BEAM, no_repeat_ngram=1)],
    ids=["top_k", "top_p", "beam", "samples_no_repeat", "beam_no_repeat"],
)
def test_the_rest_of_the_batch_changes_nothing(stage_class: type[Stage], config: DecodeConfig) -> None:
    stage = made(stage_class)
    together = decode(stage, CONTEXTS, config)
    alone = [decode(stage, [context], config)[0] for context in CONTEXTS]
    backwards = decode(stage, CONTEXTS[::-1], config)[::-1]
    for others in (alone, backwards):
        for mine, theirs in zip(together, others, strict=True):
            assert [h.token_ids for h in mine] == [h.token_ids for h in theirs]
            assert [h.log_prob for h in mine] == pytest.approx([h.log_prob for h in theirs], abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(max_tokens=12, top_k=5, min_tokens=0, n_candidates=4),
        DecodeConfig(strategy="beam", beam_size=4, max_tokens=12, min_tokens=0),
        DecodeConfig(strategy="beam", beam_size=4, max_tokens=12, min_tokens=0, length_penalty=0.6),
        DecodeConfig(strategy="top_p", max_tokens=12, min_tokens=0, n_candidates=4, length_penalty=0),
    ],
    ids=["top_k", "beam", "beam_length_penalty", "top_p_sum"],
)
@pytest.mark.parametrize("stage_class", [CoarseGeneration, FineGeneration, AfterContext])
def test_log_prob_is_minus_the_training_loss(stage_class: type[Stage], config: DecodeConfig) -> None:
    """Teacher-forced NLL of the same tokens; the forbidden tokens are made impossible for both."""
    stage = made(stage_class)
    with torch.no_grad():
        stage.backbone.lm_bias[[UNK_ID, stage.model_config.mask_id]] = -1e9
    for context, hypotheses in zip(CONTEXTS, decode(stage, CONTEXTS, config), strict=True):
        for hypothesis in hypotheses:
            unit = response_unit(stage, context, list(hypothesis.token_ids), hypothesis.latent is not None)
            with torch.no_grad():
                if hypothesis.latent is None:
                    nll = stage.losses(unit)["nll"]
                else:
                    z = torch.eye(4)[hypothesis.latent][None]
                    nll = stage.given_latent(unit, stage.backbone.embed_unit(unit), z)["nll"]
            n = float(_norm(torch.tensor(len(hypothesis.token_ids)), config.length_penalty))
            assert hypothesis.log_prob == pytest.approx(-float(nll.sum()) / n, abs=2e-5)


@pytest.mark.parametrize("config", [DECODE, TOP_P, BEAM], ids=["top_k", "top_p", "beam"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_n_gram_comes_twice(config: DecodeConfig, n: int) -> None:
    stage = made(FineGeneration)
    with torch.no_grad():
        stage.backbone.lm_bias[8:13] = 12.0  # a model that repeats itself and the contexts
        stage.backbone.lm_bias[EOS_ID] = 6.0
    contexts = [[1, 8, 9, 10, 11, 2, 12, 8, 8, 2], [1, 9, 9, 2]]
    n_repeats = 0
    for no_repeat_ngram in (0, n):
        found = decode(stage, contexts, replace(config, no_repeat_ngram=no_repeat_ngram))
        for context, hypotheses in zip(contexts, found, strict=True):
            said = [n_gram for turn in turns_of(context) for n_gram in n_grams(turn, n)]
            for hypothesis in hypotheses:
                own = n_grams(list(hypothesis.words), n)
                repeats = len(own) - len(set(own) - set(said))
                if no_repeat_ngram:
                    assert repeats == 0
                n_repeats += repeats
    assert n_repeats > 0  # without blocking


def test_when_everything_would_repeat_something_is_still_said() -> None:
    stage = made(CoarseGeneration)
    context = [[1, *range(3, 33), 2], [1, *range(3, 60), 2]]  # all words there are
    with pytest.raises(UserError, match="positions"):
        decode(stage, context, DecodeConfig(max_tokens=6, min_tokens=6, no_repeat_ngram=1))
    stage = made(CoarseGeneration, max_position=80)
    for strategy in ("top_k", "top_p", "beam"):
        config = DecodeConfig(strategy, max_tokens=6, min_tokens=6, no_repeat_ngram=1, n_candidates=3)  # type: ignore[arg-type]
        for hypotheses in decode(stage, context, config):
            for hypothesis in hypotheses:
                assert len(hypothesis.token_ids) == 6
                assert not {UNK_ID, EOS_ID, stage.model_config.mask_id} & set(hypothesis.token_ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(NO_TOKEN, 4), min_size=5, max_size=5), min_size=1), st.integers(1, 7))
def test_repeating_finds_the_tokens_that_end_a_known_n_gram(history: list[list[int]], n: int) -> None:
    found = repeating(torch.tensor(history), n, 5)
    for row, ids in zip(found.tolist(), history, strict=True):
        known = {n_gram for n_gram in n_grams(ids, n) if NO_TOKEN not in n_gram}
        last = ids[len(ids) - n + 1 :] if n <= 5 else None
        assert row == [last is not None and (*last, token) in known for token in range(5)]


@pytest.mark.parametrize("stage_class", [CoarseGeneration, FineGeneration, AfterContext])
def test_a_prefix_is_as_if_it_had_been_chosen(stage_class: type[Stage]) -> None:
    """Greedy decoding after its own beginning, of a length of its own for each context, goes on the same."""
    stage = made(stage_class, n_latent=1)
    with torch.no_grad():
        stage.backbone.lm_bias[EOS_ID] = -50.0
    greedy = DecodeConfig(max_tokens=12, top_k=1, n_candidates=1, no_repeat_ngram=2)
    whole = [hypotheses[0].token_ids for hypotheses in decode(stage, CONTEXTS, greedy)]
    prefixes = [ids[:n] for ids, n in zip(whole, (3, 0, 1), strict=True)]
    config = replace(greedy, max_tokens=9)
    found = [hypotheses[0] for hypotheses in decode(stage, CONTEXTS, config, prefixes=prefixes)]
    assert [h.token_ids for h in found] == [ids[: n + 9] for ids, n in zip(whole, (3, 0, 1), strict=True)]
    latent = None if stage_class is CoarseGeneration else 0
    rest, log_probs = list(whole[0][3:]), []
    for n in range(9):
        given = [*whole[0][:3], *rest[:n]]
        probs = probs_slowly(stage, CONTEXTS[0], given, latent, config)
        log_probs.append(math.log(probs[rest[n]]))
    assert found[0].log_prob == pytest.approx(np.mean(log_probs), abs=1e-5)  # of what was generated


def test_more_samples_of_a_latent_come_after_the_first() -> None:
    stage = made(FineGeneration)
    one, three = decode(stage, CONTEXTS, DECODE), decode(stage, CONTEXTS, replace(DECODE, n_samples=3))
    for first, hypotheses in zip(one, three, strict=True):
        assert [h.latent for h in hypotheses] == [0, 1, 2, 3] * 3
        assert [h.token_ids for h in hypotheses[:4]] == [h.token_ids for h in first]
        assert len({h.token_ids for h in hypotheses}) > 8


@pytest.mark.parametrize("stage_class", [FineGeneration, AfterContext])
@pytest.mark.parametrize("config", [DECODE, BEAM])
def test_some_of_the_latents_give_what_they_give_among_all(
    config: DecodeConfig, stage_class: type[Stage]
) -> None:
    stage, chosen, n = made(stage_class), [2, 0], len(CONTEXTS)
    uniforms = torch.rand(4 * n, config.max_tokens, generator=torch.Generator().manual_seed(1))
    all_latents = decode(stage, CONTEXTS, config, uniforms=uniforms)
    theirs = torch.cat([uniforms[z * n : (z + 1) * n] for z in chosen])
    some = decode(stage, CONTEXTS, config, uniforms=theirs, latents=chosen)
    for found, among_all in zip(some, all_latents, strict=True):
        expected = [h for z in chosen for h in among_all if h.latent == z]
        assert [h.latent for h in found] == [h.latent for h in expected]
        assert [h.token_ids for h in found] == [h.token_ids for h in expected]
        assert [h.log_prob for h in found] == pytest.approx([h.log_prob for h in expected], abs=1e-5)


@pytest.mark.parametrize("stage_class", KINDS)
@pytest.mark.parametrize(
    "config", [replace(DECODE, n_samples=3, n_candidates=12), BEAM], ids=["top_k", "beam"]
)
@pytest.mark.parametrize("most", [1, 9, 26])
def test_parts_of_the_candidates_change_nothing(
    stage_class: type[Stage], config: DecodeConfig, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(stage_class)
    whole = decode(stage, CONTEXTS, config)
    monkeypatch.setattr("plato2.talk.decode.ROWS_AT_ONCE", most)
    rows: list[int] = []
    stage.backbone.final_norm.register_forward_hook(lambda module, given, h: rows.append(len(h)))
    parts = decode(stage, CONTEXTS, config)
    least = len(CONTEXTS) * (config.beam_size if config.strategy == "beam" else 1)
    assert max(rows) <= max(most, least)
    for some, all_ in zip(parts, whole, strict=True):
        assert [(h.token_ids, h.latent) for h in some] == [(h.token_ids, h.latent) for h in all_]
        assert [h.log_prob for h in some] == pytest.approx([h.log_prob for h in all_], abs=1e-5)


def test_samples_of_one_latent_draw_as_the_candidates_of_all() -> None:
    """Sample i of a latent has the random numbers of candidate i, whatever z: what differs is z's doing."""
    stage, config = made(FineGeneration), replace(DECODE, n_samples=4)
    for z, hypothesis in enumerate(decode(stage, CONTEXTS[:1], DECODE)[0]):
        (alone,) = decode(stage, CONTEXTS[:1], config, latents=[z])
        assert [h.latent for h in alone] == [z] * 4
        assert alone[z].token_ids == hypothesis.token_ids


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
    for config in (DECODE, TOP_P, replace(BEAM, beam_size=1)):
        for hypotheses in decode(stage, CONTEXTS, replace(config, min_tokens=3)):
            for hypothesis in hypotheses:
                assert len(hypothesis.token_ids) == 4
                assert hypothesis.token_ids[-1] == EOS_ID
                assert not {UNK_ID, stage.model_config.mask_id} & set(hypothesis.token_ids)
    for hypotheses in decode(stage, CONTEXTS, replace(BEAM, min_tokens=3)):
        assert all(len(hypothesis.token_ids) >= 4 for hypothesis in hypotheses)
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
    with pytest.raises(UserError, match="beam_size=59: the model has 58 tokens"):
        decode(stage, CONTEXTS, DecodeConfig(strategy="beam", beam_size=59, max_tokens=4))
    assert (
        len(decode(stage, CONTEXTS, DecodeConfig(strategy="beam", beam_size=58, max_tokens=4))[0]) == 4 * 58
    )
    assert decode(stage, [], DECODE) == []
    stage.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        decode(stage, CONTEXTS, DECODE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "beams"}, "strategy=beams: use one of top_k, top_p, beam"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": -0.1}, "top_p=-0.1: must be between 0"),
        ({"top_p": 1.1}, r"top_p=1.1: must be between 0 \(greedy\) and 1"),
        ({"beam_size": 0}, "beam_size=0: must be at least 1"),
        ({"temperature": -1e-9}, r"temperature=-1e-09: must be between 0 \(greedy\) and 2"),
        ({"temperature": 2.1}, r"temperature=2.1: must be between 0 \(greedy\) and 2"),
        ({"temperature": float("inf")}, "temperature=inf: must be between 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be between 0"),
        ({"temperature": 0.0, "strategy": "beam"}, "temperature=0.0: is greedy, and strategy=beam is not"),
        ({"min_tokens": 65}, "min_tokens=65: must be between 0 and max_tokens=64"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1: must be 0"),
        ({"length_penalty": -0.5}, "length_penalty=-0.5: must be 0"),
        ({"n_samples": 0}, "n_samples=0: must be at least 1"),
        ({"n_samples": 1001}, "n_samples=1001: must be at most 1,000"),
        ({"n_candidates": 10**6}, "n_candidates=1000000: must be at most 1,000"),
        ({"beam_size": 101, "strategy": "beam"}, "beam_size=101: must be at most 100"),
        ({"n_samples": 2, "strategy": "beam"}, "n_samples=2: a beam search always finds the same"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        DecodeConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 1e-320},
        {"temperature": 0.0099},
        {"temperature": 0.0, "strategy": "top_p"},
        {"strategy": "top_p", "top_p": 0.0},
        {"strategy": "top_p", "top_p": 1e-320},
    ],
)
def test_near_zero_is_greedy(values: dict[str, Any]) -> None:
    stage = made(FineGeneration)
    greedy = decode(stage, CONTEXTS, replace(DECODE, top_k=1, temperature=1.0))
    assert decode(stage, CONTEXTS, replace(DECODE, **values)) == greedy


@pytest.mark.parametrize("strategy", ["top_k", "top_p", "beam"])
def test_weights_that_give_no_probabilities_are_named(strategy: Any) -> None:
    stage = made(FineGeneration)
    with torch.no_grad():
        stage.backbone.blocks[0].feed_forward_in.bias[3] = float("nan")
    config = DecodeConfig(strategy=strategy, max_tokens=4, beam_size=2)
    with pytest.raises(UserError, match="probabilities are not numbers: its weights are damaged"):
        decode(stage, CONTEXTS, config)


@pytest.mark.parametrize("stage_class", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(max_tokens=2, n_candidates=7),
        DecodeConfig(max_tokens=2, n_samples=3, strategy="top_p"),
        DecodeConfig(max_tokens=2, strategy="beam", beam_size=3),
    ],
)
def test_so_many_candidates_are_found(stage_class: type[Stage], config: DecodeConfig) -> None:
    stage = made(stage_class)
    for found in decode(stage, CONTEXTS, config):
        assert len(found) == n_candidates(stage, config)


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


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-6, 0), min_size=3, max_size=12),
    st.floats(0.01, 1),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_choose_top_p_never_leaves_the_nucleus(scores: list[int], top_p: float, point: float) -> None:
    log_probs = torch.tensor([scores], dtype=torch.float32).log_softmax(-1)
    token = int(choose_top_p(log_probs, top_p, torch.tensor([point])))
    probs = log_probs[0].double().exp()
    assert float(probs[probs > probs[token]].sum()) < top_p


def test_choose_top_p_draws_each_token_as_often_as_its_share() -> None:
    log_probs = torch.tensor([0.05, 0.4, 0.25, 0.1, 0.2]).log().expand(1000, -1)
    points = (torch.arange(1000) + 0.5) / 1000
    drawn = [torch.bincount(choose_top_p(log_probs, p, points), minlength=5).tolist() for p in (0.3, 0.5, 1)]
    assert drawn == [[0, 1000, 0, 0, 0], [0, 615, 385, 0, 0], [50, 400, 250, 100, 200]]


def test_a_top_p_of_1_keeps_the_least_probable_token() -> None:
    log_probs = torch.tensor([[0.0, -17.0, -17.0, -17.5]]).log_softmax(-1)  # float32 sums reach 1 before it
    assert int(choose_top_p(log_probs, 1.0, torch.tensor([1 - 1e-9], dtype=torch.double))) == 3
