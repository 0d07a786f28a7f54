"""Candidates, their scores and their coherence are Knover's: greedy and sampled with its random numbers."""

import json

import numpy as np
import pytest
import torch
from knover import KNOVER, knover_stage

from plato2.config import DecodeConfig
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.talk.decode import decode
from plato2.talk.rank import coherence

FIXTURE = json.loads((KNOVER / "decoding.json").read_text())


def knovers_uniforms(n_rows: int, max_tokens: int) -> torch.Tensor:
    """The numbers numpy's `choice` draws in Knover: one a row and step, in the order of the rows (spec 9)."""
    seed = np.random.RandomState(11).randint(0, 2**32 - 1, dtype=np.int64)
    return torch.from_numpy(np.random.RandomState(seed).random_sample((max_tokens, n_rows)).T.copy())


@pytest.mark.parametrize("name", FIXTURE["runs"])
def test_tokens_scores_and_coherence(name: str) -> None:
    run, contexts = FIXTURE["runs"][name], FIXTURE["contexts"]
    stage_class = FineGeneration if run["model"] == "Plato" else CoarseGeneration
    config = DecodeConfig(top_k=run["top_k"], max_tokens=run["max_tokens"], n_candidates=run["n_candidates"])
    n_rows = len(run["token_ids"])
    found = decode(
        knover_stage(stage_class, "plato_weights.npz"),
        contexts,
        config,
        knovers_uniforms(n_rows, config.max_tokens),
    )
    rows = [found[row % len(contexts)][row // len(contexts)] for row in range(n_rows)]
    assert [list(row.token_ids) for row in rows] == run["token_ids"]
    assert [row.log_prob for row in rows] == pytest.approx(run["decode_score"], abs=5e-6)

    evaluation = knover_stage(CoherenceEstimation, "nsp_weights.npz")
    pairs = [(contexts[number % len(contexts)], row.words) for number, row in enumerate(rows)]
    assert coherence(evaluation, pairs) == pytest.approx(run["nsp_score"], abs=5e-6)
