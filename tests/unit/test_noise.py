"""Noise is a pure function of its key: known values, uniform, the same for a sample in any batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import uniform as slow_uniform
from units import MODEL, make_window, pack_for

from plato2.model.noise import uniform
from plato2.random import Draw, draw_key

GOLDEN = [
    [0.566562, 0.745782, 0.971003],
    [0.893943, 0.912597, 0.219482],
    [0.165647, 0.945496, 0.922204],
    [0.281719, 0.767329, 0.381447],
]
INT64 = st.integers(-(2**63), 2**63 - 1)


def test_noise_is_splitmix64() -> None:
    """The published first outputs for seed 0, their upper 24 bits: runs that are resumed hang on them."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform(torch.tensor([0]), 3)[0].tolist() == [(word >> 40) / 2**24 for word in expected]


def test_golden_values() -> None:
    keys = torch.tensor([1, -1, 2**63 - 1, -(2**63)])
    rounded = [[round(value, 6) for value in row] for row in uniform(keys, 3).tolist()]
    assert rounded == GOLDEN


@settings(max_examples=50, deadline=None)
@given(st.lists(INT64, min_size=1, max_size=5), st.integers(1, 25))
def test_noise_equals_pythons_integers(keys: list[int], n: int) -> None:
    assert uniform(torch.tensor(keys), n).tolist() == [slow_uniform(key, n) for key in keys]


def test_noise_is_uniform_and_independent() -> None:
    keys = torch.arange(20_000)
    u = uniform(keys, 20).double().numpy()
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, 100, (0, 1))[0]
    expected = u.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 170  # chi-square, 99 degrees of freedom: p = 1e-5
    assert np.abs(np.corrcoef(u.T) - np.eye(20)).max() < 0.04  # the latents of a sample
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01  # neighbouring keys


def test_gumbel_noise_of_real_keys_picks_every_latent_equally_often() -> None:
    """argmax of logits + Gumbel noise follows softmax(logits): here all K equal."""
    window = make_window(3000, longest=3)
    unit = pack_for("2_gen", window).unit
    noise = -torch.log(-torch.log(uniform(unit["sample_key"], 20) + 1e-10) + 1e-10)
    counts = torch.bincount(noise.argmax(dim=1), minlength=20).double()
    assert float(((counts - 150.0) ** 2 / 150.0).sum()) < 52  # 19 degrees of freedom: p = 1e-4


def test_noise_of_a_sample_is_the_same_in_any_batch() -> None:
    packed = pack_for("2_gen", make_window(9))
    whole = uniform(packed.unit["sample_key"], MODEL.n_latent)
    assert len({tuple(row) for row in whole.tolist()}) == len(packed)
    for sample in range(len(packed)):
        alone = uniform(packed.alone(sample)["sample_key"], MODEL.n_latent)
        assert torch.equal(alone, whole[[sample]])
    assert torch.equal(uniform(packed.unit["sample_key"], 3), whole[:, :3])


def test_noise_masks_and_epochs_have_their_own_keys() -> None:
    keys = {draw_key(what, 11, epoch) for what in (Draw.NOISE, Draw.MASKS) for epoch in range(3)}
    assert len(keys) == 6
