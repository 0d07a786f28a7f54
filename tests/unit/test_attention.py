"""Attention sample by sample equals a dense mask and a slow loop; dropout, nll and hits do what they say."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plato2.config import ModelConfig
from plato2.model import losses, masks
from plato2.model.backbone import Backbone, Dropout, initialize, read_slots
from plato2.model.cpu import block_attention, keep_mask, kept_share, sample_blocks

N_HEAD, HEAD_SIZE = 3, 8
HIDDEN = N_HEAD * HEAD_SIZE


def rows(lengths: list[list[int]], width: int, context_share: float = 0.7) -> tuple[Tensor, Tensor]:
    """segment_ids and type_ids (B, T) of rows with samples of these lengths, the rest padding."""
    segment_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    type_ids = torch.zeros_like(segment_ids)
    for row, samples in enumerate(lengths):
        begin = 0
        for number, length in enumerate(samples):
            segment_ids[row, begin : begin + length] = number + 1
            type_ids[row, begin + round(context_share * length) : begin + length] = 1
            begin += length
    return segment_ids, type_ids


def seen(segment_ids: Tensor, type_ids: Tensor | None) -> Tensor:
    """Who may see whom."""
    return masks.same_sample(segment_ids) if type_ids is None else masks.prefix_lm(segment_ids, type_ids)


def dense(qkv: Tensor, segment_ids: Tensor, type_ids: Tensor | None) -> Tensor:
    """The same attention with a dense mask."""
    bias = masks.additive(seen(segment_ids, type_ids), qkv.dtype)
    parts = qkv.unflatten(-1, (3, N_HEAD, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return context.transpose(1, 2).flatten(2)


def grouped(qkv: Tensor, segment_ids: Tensor, type_ids: Tensor | None, dropout: float = 0.0) -> Tensor:
    return block_attention(qkv, sample_blocks(segment_ids, type_ids, seen, N_HEAD, qkv.dtype), dropout)


def random_qkv(segment_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*segment_ids.shape, 3 * HIDDEN, generator=generator).to(dtype)


def gradient(
    attend: Callable[..., Tensor], qkv: Tensor, segment_ids: Tensor, type_ids: Tensor | None
) -> Tensor:
    """d of a random weighting of the real slots' outputs."""
    qkv = qkv.clone().requires_grad_()
    weights = torch.randn(*segment_ids.shape, HIDDEN, generator=torch.Generator().manual_seed(6))
    (attend(qkv, segment_ids, type_ids) * weights * (segment_ids > 0)[..., None]).sum().backward()
    assert qkv.grad is not None
    return qkv.grad


SHAPES = [
    ([[5, 7, 3], [16]], 16),
    ([[64, 65, 1], [130], [20, 20, 20, 20]], 140),
    ([[256, 255], [200, 190, 64, 50]], 512),
    ([[9], []], 12),
]


@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize("is_prefix_lm", [True, False])
def test_outputs_and_gradients_are_those_of_the_dense_mask(
    lengths: list[list[int]], width: int, is_prefix_lm: bool
) -> None:
    segment_ids, types = rows(lengths, width)
    type_ids = types if is_prefix_lm else None
    qkv, real = random_qkv(segment_ids), segment_ids > 0
    ours, theirs = grouped(qkv, segment_ids, type_ids), dense(qkv, segment_ids, type_ids)
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        gradient(grouped, qkv, segment_ids, type_ids),
        gradient(dense, qkv, segment_ids, type_ids),
        atol=1e-5,
        rtol=0,
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), max_size=4), min_size=1, max_size=3), st.integers(0, 5))
def test_any_rows_as_a_slow_loop_over_queries(lengths: list[list[int]], padding: int) -> None:
    width = max(sum(samples) for samples in lengths) + padding
    if width == 0:
        return
    segment_ids, type_ids = rows(lengths, width)
    qkv = random_qkv(segment_ids)
    found = grouped(qkv, segment_ids, type_ids)
    for row, samples in enumerate(lengths):
        begin = 0
        for length in samples:
            part = slice(begin, begin + length)
            is_response = type_ids[row, part] == 1
            for q in {0, length // 2, length - 1}:
                last = q if is_response[q] else -1
                seen = [k for k in range(length) if not is_response[k] or k <= last]
                query, key, value = qkv[row, part].view(length, 3, N_HEAD, HEAD_SIZE).unbind(1)
                scores = torch.einsum("hd,khd->hk", query[q], key[seen]) / HEAD_SIZE**0.5
                expected = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen]).flatten()
                torch.testing.assert_close(found[row, begin + q], expected, atol=1e-5, rtol=0)
            begin += length


def test_padding_gets_zeros_and_gives_no_gradient_even_when_it_is_not_a_number() -> None:
    segment_ids, type_ids = rows([[5, 4], [3]], 12)
    qkv, padding = random_qkv(segment_ids), segment_ids == 0
    clean = grouped(qkv, segment_ids, type_ids)
    qkv[padding] = float("nan")
    qkv.requires_grad_()
    found = grouped(qkv, segment_ids, type_ids)
    assert torch.equal(found, clean)
    assert not found[padding].any()
    found.square().sum().backward()
    assert qkv.grad is not None
    assert torch.isfinite(qkv.grad).all()
    assert not qkv.grad[padding].any()


def test_an_empty_unit_gives_zeros() -> None:
    segment_ids = torch.zeros(2, 16, dtype=torch.int64)
    qkv = random_qkv(segment_ids).requires_grad_()
    found = grouped(qkv, segment_ids, segment_ids, dropout=0.1)
    assert found.shape == (2, 16, HIDDEN)
    assert not found.any()
    found.sum().backward()
    assert qkv.grad is not None
    assert not qkv.grad.any()


def test_bfloat16_is_close_to_float32() -> None:
    segment_ids, type_ids = rows([[100, 90], [70, 60, 50]], 200)
    qkv = random_qkv(segment_ids, torch.bfloat16)
    found = grouped(qkv, segment_ids, type_ids)
    assert found.dtype == torch.bfloat16
    exact = grouped(qkv.float(), segment_ids, type_ids)
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.02)


def model(dropout: float = 0.0, checkpoint_activations: bool = False) -> Backbone:
    config = ModelConfig(
        n_layer=2,
        n_head=N_HEAD,
        hidden_size=HIDDEN,
        vocab_size=50,
        max_position=256,
        dropout=dropout,
        checkpoint_activations=checkpoint_activations,
    )
    backbone = Backbone(config)
    torch.manual_seed(1)
    initialize(backbone)
    return backbone


def parameter_gradients(backbone: Backbone, mask: object, real: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the real outputs."""
    x = torch.randn(*real.shape, HIDDEN, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(*real.shape, HIDDEN, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    h = backbone.encode(x, mask)  # type: ignore[arg-type]
    (h * weights * real[..., None]).sum().backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def test_the_whole_backbone_takes_both_masks_alike() -> None:
    segment_ids, type_ids = rows([[64, 70, 3], [130]], 150)
    real = segment_ids > 0
    seen = masks.additive(masks.prefix_lm(segment_ids, type_ids), torch.float32)
    with_dense = parameter_gradients(model(), seen, real)
    backbone = model()
    with_blocks = parameter_gradients(backbone, backbone.mask(segment_ids, type_ids), real)
    assert with_dense.keys() == with_blocks.keys()
    for name, expected in with_dense.items():
        # the key bias has no gradient in exact arithmetic: compare with the size of the others
        torch.testing.assert_close(
            with_blocks[name], expected, atol=1e-5 + 1e-5 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_seed_same_bits_with_and_without_activation_checkpointing(dropout: float) -> None:
    segment_ids, type_ids = rows([[64, 70, 3], [130]], 150)
    real = segment_ids > 0
    runs = []
    for checkpointing in (False, False, True):
        backbone = model(dropout, checkpointing)
        runs.append(parameter_gradients(backbone, backbone.mask(segment_ids, type_ids), real))
    for name, expected in runs[0].items():
        assert torch.equal(runs[1][name], expected)
        assert torch.equal(runs[2][name], expected)


# ------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Dropout(p)
    x = torch.ones(1_000_003, dtype=dtype).requires_grad_()
    out = layer(x)
    n = x.numel()
    share, mean = float((out != 0).double().mean()), float(out.detach().double().mean())
    assert share == pytest.approx(1 - p, abs=5 * (p * (1 - p) / n) ** 0.5)
    rounding = float(torch.finfo(dtype).eps) / 2  # of the one value that is kept
    assert mean == pytest.approx(1.0, abs=5 * (p / (1 - p) / n) ** 0.5 + rounding)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_dropout_of_neighbours_is_independent() -> None:
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(4_000_000), 0.1)
    centred = kept - kept.mean()
    variance = float((centred * centred).mean())
    assert variance == pytest.approx(0.09, abs=0.001)
    for distance in (1, 2, 3, 4, 5, 8):
        correlation = float((centred[distance:] * centred[:-distance]).mean()) / variance
        assert abs(correlation) < 5 / 2000


def test_dropout_follows_the_seed_and_the_mode() -> None:
    layer, x = Dropout(0.3), torch.randn(7, 11)
    first, second = ((torch.manual_seed(9), layer(x))[1] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(layer(x), layer(x))
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [1e-9, 0.1, 1 - 1e-9])
def test_the_kept_share_is_never_all_or_nothing(p: float) -> None:
    assert 0 < kept_share(p) < 1
    assert kept_share(p) == pytest.approx(1 - p, abs=2**-16)


def test_dropout_of_attention_weights_keeps_the_mean() -> None:
    segment_ids, type_ids = rows([[8, 6]], 16)
    qkv = random_qkv(segment_ids)
    torch.manual_seed(0)
    mean = torch.stack([grouped(qkv, segment_ids, type_ids, dropout=0.2) for _ in range(1500)]).mean(0)
    torch.testing.assert_close(mean, grouped(qkv, segment_ids, type_ids), atol=0.1, rtol=0)


def test_gradient_with_dropout_is_that_of_the_drawn_mask() -> None:
    segment_ids, type_ids = rows([[5, 4], [3]], 10)
    qkv = random_qkv(segment_ids).double().requires_grad_()

    def attend(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return grouped(x, segment_ids, type_ids, dropout=0.3)

    assert torch.autograd.gradcheck(attend, (qkv,), fast_mode=True)


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("n", [0, 1, 31, 32, 100])
def test_nll_row_by_row_is_cross_entropy(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = 5 * torch.randn(n, 301, generator=generator)
    targets = torch.randint(0, 301, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    results = []
    for function in (losses.nll, lambda x, y: F.cross_entropy(x, y, reduction="none")):
        x = logits.clone().requires_grad_()
        values = function(x, targets)
        (values * weights).sum().backward()
        results.append((values.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hits_are_the_argmax_also_with_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (500, 20), generator=generator).to(dtype)
    targets = torch.randint(0, 20, (500,), generator=generator)
    assert torch.equal(losses.hits(logits, targets), (logits.argmax(-1) == targets).float())
    assert losses.hits(logits[:0], targets[:0]).shape == (0,)


# ------------------------------------------------------------------------------------ only what is read


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reading_some_slots_is_reading_them_from_all(checkpointing: bool) -> None:
    segment_ids, type_ids = rows([[64, 70, 3], [130]], 150)
    index = torch.tensor([0, 64, 133, 150, 151, 279])
    weights = torch.randn(len(index), HIDDEN, generator=torch.Generator().manual_seed(3))
    results = []
    for is_read_late in (True, False):
        backbone = model(checkpoint_activations=checkpointing)
        mask = backbone.mask(segment_ids, type_ids)
        x = torch.randn(2, 150, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if is_read_late:
            h = read_slots(backbone.encode(x, mask), index)
        else:
            h = backbone.encode(x, mask, read=index)
        (h * weights).sum().backward()
        gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        results.append((h.detach(), x.grad, gradients))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_reading_nothing_gives_nothing_and_no_error() -> None:
    segment_ids = torch.zeros(2, 16, dtype=torch.int64)
    backbone = model(dropout=0.1)
    x = torch.randn(2, 16, HIDDEN, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    h = backbone.encode(x, backbone.mask(segment_ids), read=nothing)
    assert h.shape == (0, HIDDEN)
    backbone.lm_logits(h).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)
