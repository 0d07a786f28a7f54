"""The three models print Knover's numbers: its tiny weights, its batches, its tolerances (spec, end)."""

import numpy as np
import pytest
import torch
from knover import CONFIG, knover_stage, load
from torch import Tensor

from plato2.model import losses, masks
from plato2.model.backbone import read_slots
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration

BATCHES = ("a", "b", "c")


def unit(arrays: dict[str, np.ndarray], batch: str, front_slots: bool = False) -> dict[str, Tensor]:
    """Knover's padded batch as a unit of ours: one sample a row."""
    field = {
        key.removeprefix(f"{batch}/in/"): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith(f"{batch}/in/")
    }
    token_ids, type_ids, pos_ids = (field[k][..., 0] for k in ("token_ids", "type_ids", "pos_ids"))
    # A padded row repeats type 0, position 0: the length of a sample is where its positions stop counting.
    lengths = pos_ids.argmax(dim=1) + 1
    segment_ids = (torch.arange(token_ids.shape[1]) < lengths[:, None]).long()
    if front_slots:  # the latent slot is index 0 of each row; tokens move on by one, as in Knover's tgt_idx
        mask = torch.full((len(token_ids), 1), CONFIG.mask_id)
        zero, one = torch.zeros_like(mask), torch.ones_like(mask)
        token_ids, type_ids = torch.cat([mask, token_ids], 1), torch.cat([zero, type_ids], 1)
        pos_ids, segment_ids = torch.cat([zero, pos_ids], 1), torch.cat([one, segment_ids], 1)
    width = token_ids.shape[1]
    row, column = field["tgt_idx"].T
    return {
        "token_ids": token_ids,
        "type_ids": type_ids,
        "pos_ids": pos_ids,
        "segment_ids": segment_ids,
        "sample_index": torch.arange(len(token_ids)) * width,
        "target_index": row * width + column,
        "target_ids": field["tgt_label"][:, 0],
        "target_sample": row,
        "sample_key": torch.arange(len(token_ids)),
    }


def expected(arrays: dict[str, np.ndarray], key: str) -> Tensor:
    return torch.from_numpy(arrays[key])


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_1(batch: str) -> None:
    arrays = load("stage1.npz")
    stage = knover_stage(CoarseGeneration, "plato_weights.npz")
    given = unit(arrays, batch)
    mask = masks.prefix_lm(given["segment_ids"], given["type_ids"])
    real = given["segment_ids"] > 0
    knovers = expected(arrays, f"{batch}/in/generation_mask").bool()
    assert torch.equal(mask[real], knovers[real])

    with torch.no_grad():
        x = stage.backbone.embed(given["token_ids"], given["type_ids"], given["pos_ids"])
        h = stage.backbone.encode(x, masks.additive(mask, x.dtype))
        nll = stage.losses(given)["nll"]
    torch.testing.assert_close(h[real], expected(arrays, f"{batch}/out/enc_out")[real], atol=5e-5, rtol=0)
    torch.testing.assert_close(nll, expected(arrays, f"{batch}/out/nll")[:, 0], atol=5e-5, rtol=0)
    torch.testing.assert_close(nll.mean(), expected(arrays, f"{batch}/out/loss")[0], atol=5e-5, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_2_1_posterior_and_every_latent(batch: str) -> None:
    arrays = load("stage21.npz")
    stage = knover_stage(FineGeneration, "plato_weights.npz")
    given = unit(arrays, batch, front_slots=True)
    real = given["segment_ids"] > 0
    knovers = expected(arrays, f"{batch}/in/rec_mask").bool()
    assert torch.equal(masks.same_sample(given["segment_ids"])[real], knovers[real])

    with torch.no_grad():
        x = stage.backbone.embed_unit(given)
        logits = stage.posterior(given, x)
        torch.testing.assert_close(
            logits.softmax(-1), expected(arrays, f"{batch}/out/post_probs"), atol=5e-6, rtol=0
        )
        entropy = losses.entropy(logits).mean()
        torch.testing.assert_close(
            -entropy, expected(arrays, f"{batch}/out/entropy_loss")[0], atol=5e-6, rtol=0
        )
        for latent in range(CONFIG.n_latent):
            one_hot = torch.eye(CONFIG.n_latent)[latent].expand(len(logits), -1)
            terms = stage.given_latent(given, x, one_hot)
            for term in ("nll", "bow"):
                knovers = expected(arrays, f"{batch}/out/z{latent}_{term}")[:, 0]
                torch.testing.assert_close(terms[term], knovers, atol=5e-5, rtol=0)
            loss = terms["nll"].mean() + terms["bow"].mean()
            torch.testing.assert_close(
                loss, expected(arrays, f"{batch}/out/z{latent}_loss")[0], atol=5e-5, rtol=0
            )


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_2_1_gumbel_softmax_with_knovers_noise(batch: str) -> None:
    arrays = load("stage21.npz")
    stage = knover_stage(FineGeneration, "plato_weights.npz")
    given = unit(arrays, batch, front_slots=True)
    with torch.no_grad():
        x = stage.backbone.embed_unit(given)
        uniform = expected(arrays, f"{batch}/in/gumbel_u")
        z = losses.gumbel_softmax(stage.posterior(given, x), uniform, stage.tau)
        terms = stage.given_latent(given, x, z)
    for term in ("nll", "bow"):
        knovers = expected(arrays, f"{batch}/out/gumbel_{term}")[:, 0]
        torch.testing.assert_close(terms[term], knovers, atol=5e-5, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_stage_2_2(batch: str) -> None:
    arrays = load("stage22.npz")
    stage = knover_stage(CoherenceEstimation, "nsp_weights.npz")
    given = unit(arrays, batch) | {"coherence_labels": expected(arrays, f"{batch}/in/label")[:, 0]}
    with torch.no_grad():
        h = stage.encode(given)
        masked = stage.coherence(read_slots(h, given["sample_index"])).softmax(-1)
        terms = stage.losses(given)
        clean = stage.coherence_logits(given).softmax(-1)
    torch.testing.assert_close(masked, expected(arrays, f"{batch}/out/nsp_probs_masked"), atol=5e-6, rtol=0)
    torch.testing.assert_close(clean, expected(arrays, f"{batch}/out/nsp_probs_infer"), atol=5e-6, rtol=0)
    torch.testing.assert_close(
        terms["mlm"], expected(arrays, f"{batch}/out/mlm_nll")[:, 0], atol=5e-5, rtol=0
    )
    loss = terms["rce"].mean() + terms["mlm"].mean()
    torch.testing.assert_close(loss, expected(arrays, f"{batch}/out/loss")[0], atol=5e-5, rtol=0)
