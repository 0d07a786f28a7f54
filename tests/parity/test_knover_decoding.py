"""All of Knover's recorded decoding runs: its tokens, scores, coherence and final order of the candidates."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from knover import KNOVER, knover_stage

from plato2.config import DecodeConfig
from plato2.data.tokenizer import Tokenizer
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.talk.decode import Hypothesis, decode
from plato2.talk.rank import rank

FIXTURE = json.loads((KNOVER / "decoding.json").read_text())
RUNS = FIXTURE["runs"]
TURNS = [context["turns"] for context in FIXTURE["contexts"]]
CONTEXTS = [context["ids"] for context in FIXTURE["contexts"]]
STRATEGIES = {"topk_sampling": "top_k", "topp_sampling": "top_p", "beam_search": "beam"}


def config_of(run: dict[str, Any]) -> DecodeConfig:
    """Knover's options as ours. It decodes in slices with `--mem_efficient`, which changes no result."""
    given = {"--decoding_strategy": "topk_sampling", "--topk": 10, "--topp": 0.9, "--beam_size": 10}
    given |= {"--temperature": 1, "--max_dec_len": 64, "--min_dec_len": 1, "--ngram_blocking": 0}
    given |= {"--num_samples": 1, "--length_average": "true", "--length_penalty": 0}
    given |= {"--mem_efficient": "false", "--batch_size": 0}
    options = given | dict(zip(run["args"][::2], run["args"][1::2], strict=True))
    assert options.keys() == given.keys()
    n = int(options["--num_samples"])
    return DecodeConfig(
        strategy=STRATEGIES[options["--decoding_strategy"]],  # type: ignore[arg-type]
        top_k=int(options["--topk"]),
        top_p=float(options["--topp"]),
        beam_size=int(options["--beam_size"]),
        temperature=float(options["--temperature"]),
        max_tokens=int(options["--max_dec_len"]),
        min_tokens=int(options["--min_dec_len"]),
        no_repeat_ngram=int(options["--ngram_blocking"]),
        length_penalty=None if options["--length_average"] == "true" else float(options["--length_penalty"]),
        n_samples=n if run["model"] == "Plato" else 1,
        n_candidates=n,
    )


def knovers_uniforms(n_rows: int, max_tokens: int) -> torch.Tensor:
    """The numbers numpy's `choice` draws in Knover: one a row and step, in the order of the rows (spec 9)."""
    seed = np.random.RandomState(11).randint(0, 2**32 - 1, dtype=np.int64)
    return torch.from_numpy(np.random.RandomState(seed).random_sample((max_tokens, n_rows)).T.copy())


def decoded(run: dict[str, Any]) -> list[list[Hypothesis]]:
    stage_class = FineGeneration if run["model"] == "Plato" else CoarseGeneration
    config, n_rows = config_of(run), len(run["token_ids"])
    uniforms = knovers_uniforms(n_rows, config.max_tokens)  # a beam search ignores them
    prefixes = [run.get("prefix", [])] * len(CONTEXTS)
    return decode(
        knover_stage(stage_class, "plato_weights.npz"), CONTEXTS, config, uniforms=uniforms, prefixes=prefixes
    )


def by_context(run: dict[str, Any], values: list[Any]) -> list[list[Any]]:
    """What Knover has of each row, in our order: its rows are [latent or sample, context, beam]."""
    config = config_of(run)
    beams = config.beam_size if config.strategy == "beam" else 1
    numbers = np.arange(len(values)).reshape(-1, len(CONTEXTS), beams)
    return [[values[row] for row in numbers[:, context].ravel()] for context in range(len(CONTEXTS))]


@pytest.mark.parametrize("name", RUNS)
def test_tokens_and_scores(name: str) -> None:
    run = RUNS[name]
    expected = by_context(run, [run.get("prefix", []) + ids for ids in run["token_ids"]])
    scores = by_context(run, run["decode_score"])
    found = decoded(run)
    assert [[list(hypothesis.token_ids) for hypothesis in some] for some in found] == expected
    tolerance = 5e-6 if config_of(run).length_penalty is None else 3e-5  # sums of up to 12 log-probabilities
    for some, theirs in zip(found, scores, strict=True):
        assert [hypothesis.log_prob for hypothesis in some] == pytest.approx(theirs, abs=tolerance)
    if run["model"] == "Plato":
        latents = [row * 5 // len(expected[0]) for row in range(len(expected[0]))]
        assert [[hypothesis.latent for hypothesis in some] for some in found] == [latents] * len(CONTEXTS)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "ranked" in run])
def test_coherence_and_ranking_with_penalties(name: str) -> None:
    run = RUNS[name]
    found = decoded(run)
    evaluation = knover_stage(CoherenceEstimation, "nsp_weights.npz")
    ranked = rank(Tokenizer.load(KNOVER), CONTEXTS, found, evaluation, TURNS)
    for candidates, rows in zip(ranked, run["ranked"], strict=True):
        theirs = [run["token_ids"][row] for row in rows]
        assert [list(c.token_ids) for c in candidates] == [
            ids[:-1] if ids[-1] == 2 else ids for ids in theirs
        ]
        scores = [run["score"][row] for row in rows]
        assert [candidate.score for candidate in candidates] == pytest.approx(scores, abs=5e-6)
        coherences = [run["nsp_score"][row] for row in rows]
        assert [candidate.coherence for candidate in candidates] == pytest.approx(coherences, abs=5e-6)


def test_the_runs_have_penalties_of_all_kinds_and_none() -> None:
    scores = [score for run in RUNS.values() for score in run.get("score", [])]
    assert 0 < sum(score < -900 for score in scores) < len(scores)
    assert sum(len(run["token_ids"]) for run in RUNS.values()) == 315
    assert len(RUNS) == 14
