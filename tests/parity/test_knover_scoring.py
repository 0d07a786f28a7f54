"""`plato2 score` gives the probabilities that Knover printed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from knover import KNOVER, knover_stage, load
from test_forward import BATCHES

from plato2.data.tokenizer import Tokenizer
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.talk.score import Record, score, score_lines

RECORDS = json.loads((KNOVER / "records.json").read_text())
SCORES = json.loads((KNOVER / "stage1_scoring.json").read_text())
CUT = 6
"""The sample whose response Knover cuts to 128 ids; we score whole responses or none."""


def record(sample: int) -> Record:
    """A sample as Knover's reader made it."""
    (made,) = (row for row in RECORDS["default"] if row["data_id"] == sample)
    ids, start = made["token_ids"], made["tgt_start_idx"]
    return Record(ids[:start], ids[start:])


def rows(arrays: dict[str, np.ndarray], batch: str, tokens: str) -> list[Record]:
    """The samples of a batch of Knover's, from its padded ids."""
    made = []
    ids, types, positions = (arrays[f"{batch}/in/{name}"][..., 0] for name in (tokens, "type_ids", "pos_ids"))
    for row, n in enumerate(positions.argmax(axis=1) + 1):
        start = int((types[row, :n] == 0).sum())
        made.append(Record(ids[row, :start].tolist(), ids[row, start:n].tolist()))
    return made


def line(sample: int) -> bytes:
    text = RECORDS["samples"][sample]
    return f"{text['src']}\t{text['tgt']}\n".encode()


def assert_is_knovers(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert found["n_tokens"] == expected["tokens_num"]
    assert found["nll"] == pytest.approx(expected["lm_loss"], abs=1e-4)
    assert np.exp(found["nll"] / found["n_tokens"]) == pytest.approx(expected["ppl"], rel=1e-5)


def test_stage_1_from_texts() -> None:
    stage = knover_stage(CoarseGeneration, "plato_weights.npz")
    lines = [line(int(expected["data_id"])) for expected in SCORES]
    found = list(score_lines(lines, Tokenizer.load(KNOVER), stage))
    assert len(found) == len(SCORES)
    for scores, expected in zip(found, SCORES, strict=True):
        assert scores.get("response_cut", False) == (expected["data_id"] == CUT)
        assert_is_knovers(scores, expected)


def test_stage_1_from_ids() -> None:
    stage = knover_stage(CoarseGeneration, "plato_weights.npz")
    found = score(stage, [record(int(expected["data_id"])) for expected in SCORES])
    for scores, expected in zip(found, SCORES, strict=True):
        assert_is_knovers(scores, expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_2_1(batch: str) -> None:
    arrays = load("stage21.npz")
    stage = knover_stage(FineGeneration, "plato_weights.npz")
    records = [record(int(sample)) for sample in arrays[f"{batch}/sample_idx"]]
    for given, made in zip(rows(arrays, batch, "token_ids"), records, strict=True):  # the last id is cut off
        assert (given.context, given.response) == (made.context, made.response[:-1])
    found = score(stage, records)
    sample = arrays[f"{batch}/in/tgt_idx"][:, 0]
    for latent in range(stage.model_config.n_latent):
        nll = np.bincount(sample, arrays[f"{batch}/out/z{latent}_nll"][:, 0].astype(np.float64))
        np.testing.assert_allclose(
            [scores["nll_by_latent"][latent] for scores in found], nll, atol=1e-4, rtol=0
        )
    posterior = [scores["posterior"] for scores in found]
    np.testing.assert_allclose(posterior, arrays[f"{batch}/out/post_probs"], atol=5e-6, rtol=0)
    assert [scores["n_tokens"] for scores in found] == np.bincount(sample).tolist()


def test_stage_2_1_from_texts() -> None:
    arrays = load("stage21.npz")
    stage = knover_stage(FineGeneration, "plato_weights.npz")
    lines = [line(int(sample)) for sample in arrays["a/sample_idx"]]
    posterior = [scores["posterior"] for scores in score_lines(lines, Tokenizer.load(KNOVER), stage)]
    np.testing.assert_allclose(posterior, arrays["a/out/post_probs"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_2_2(batch: str) -> None:
    arrays = load("stage22.npz")
    stage = knover_stage(CoherenceEstimation, "nsp_weights.npz")
    found = score(stage, rows(arrays, batch, "unmasked_token_ids"))
    knovers = arrays[f"{batch}/out/nsp_probs_infer"][:, 1]
    np.testing.assert_allclose([scores["coherence"] for scores in found], knovers, atol=5e-6, rtol=0)
