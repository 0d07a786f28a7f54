"""What exists only for speed on a CPU. Each trick gives the result of PyTorch's own form, which GPUs use.

- **Attention by sample.** A dense mask over rows of 512 computes about four times the scores that samples
  of 120 tokens need. So the samples of a unit are sorted into groups of about equal length; queries, keys and
  values of a group are gathered into (samples, heads, length, d), which costs no more than transposing to
  heads does anyway, and attended to with two batched products. The plan (`SampleBlocks`) is made once a pass
  and shared by all layers.
- **Cheap dropout.** `F.dropout` draws a random number for each element, which takes longer than the matrix
  products of a small model. Here a 64-bit word of the same generator decides for four elements, so the result
  is still a function of `torch.manual_seed` alone.
- **Cross entropy by rows**, a few at a time, several times faster than passes over all of (M, V).
- **Whole steps.** Gathered rows are padded to a multiple of 64: in bf16 the matrix library compiles a kernel
  for every new shape, which for the word table takes several times as long as the product itself.

What they gain is measured in docs/benchmarks.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.model import masks


def serves(x: Tensor) -> bool:
    """Whether the forms of this file compute on a tensor; where not, PyTorch's own do."""
    return x.device.type == "cpu"


# ---------------------------------------------------------------------------------------- attention by sample

GROUP_STEP = 32
"""Samples are padded to a multiple of this many slots. Smaller steps pad less, but make more groups,
and in bf16 the matrix library compiles a kernel for every new shape."""


@dataclass(frozen=True)
class Group:
    """Samples of about one length, each padded to `length` slots."""

    n: int
    length: int
    bias: Tensor
    """(n, length, length): 0 = may look, -inf = may not."""


@dataclass(frozen=True)
class SampleBlocks:
    """Who may see whom in packed rows, sample by sample.

    What is moved is one head of one slot: the rows have B * T * heads of them in the order (slot, head), or
    B * T * 3 * heads as (slot, query|key|value, head); the groups, which follow each other, have S * heads in
    the order (sample, head, place), queries, keys and values one after the other.
    """

    n_head: int
    dtype: torch.dtype
    """That attention computes in."""
    groups: list[Group]
    take: Tensor
    """(S * heads,) from the rows to the groups; padding of a group repeats its sample's first slot."""
    take_qkv: Tensor
    """(3 * S * heads,) the same for queries, keys and values."""
    put: Tensor
    """(B * T * heads,) from the groups to the rows; padding of a row is one after the groups' last."""
    put_qkv: Tensor
    """(B * T * 3 * heads,) the same for queries, keys and values."""
    padding: Tensor
    """Which of the groups' S * heads are padding."""

    def parts(self) -> list[tuple[Group, slice]]:
        """Each group and its part of the groups' S * heads."""
        ends = accumulate(group.n * group.length * self.n_head for group in self.groups)
        return [
            (group, slice(end - group.n * group.length * self.n_head, end))
            for group, end in zip(self.groups, ends, strict=True)
        ]


def sample_blocks(
    segment_ids: Tensor,
    type_ids: Tensor | None,
    seen: Callable[[Tensor, Tensor | None], Tensor],
    n_head: int,
    dtype: torch.dtype,
) -> SampleBlocks:
    """The plan of one unit.

    Args:
        segment_ids: (B, T), 0 = padding; the slots of a sample are next to each other.
        type_ids: (B, T), 1 = response; None = nothing is told apart.
        seen: makes of both, for samples a row each, who may see whom: (B, T), (B, T) -> (B, T, T) bool.
        n_head: heads of the model.
        dtype: that attention computes in.
    """
    first, length = _samples(segment_ids)
    width = (length + GROUP_STEP - 1) // GROUP_STEP * GROUP_STEP
    head = torch.arange(n_head)
    groups: list[Group] = []
    take, padding = [head.new_empty(0)], [head.new_empty(0)]
    put = torch.full((segment_ids.numel(), n_head), -1)
    base = 0
    for padded in width.unique().tolist():
        members = width == padded
        n, place = int(members.sum()), torch.arange(padded)
        real = place < length[members, None]  # (n, L)
        slot = torch.where(real, first[members, None] + place, first[members, None])
        mask = seen(real.long(), None if type_ids is None else type_ids.flatten()[slot])
        groups.append(Group(n, padded, masks.additive(mask, dtype)[:, 0]))
        target = base + torch.arange(n * n_head * padded).view(n, n_head, padded)
        take.append((slot[:, None, :] * n_head + head[:, None]).flatten())  # (n, heads, L)
        put[slot[real]] = target.transpose(1, 2)[real]
        padding.append(target[(~real)[:, None, :].expand(-1, n_head, -1)])
        base += target.numel()
    rows, kind = torch.cat(take), torch.arange(3)[:, None]
    slot_of, head_of = rows // n_head, rows % n_head
    put_qkv = torch.where(put[:, None] < 0, 3 * base, put[:, None] + kind * base)
    return SampleBlocks(
        n_head=n_head,
        dtype=dtype,
        groups=groups,
        take=rows,
        take_qkv=((slot_of * 3 + kind) * n_head + head_of).flatten(),
        put=torch.where(put < 0, base, put).flatten(),
        put_qkv=put_qkv.flatten(),
        padding=torch.cat(padding),
    )


def _samples(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Flat first slot and length of each sample, (N,) and (N,), in the order of the rows."""
    change = torch.ones_like(segment_ids, dtype=torch.bool)
    change[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = change.flatten().nonzero()[:, 0]  # of samples and stretches of padding
    length = torch.diff(start, append=start.new_tensor([segment_ids.numel()]))
    real = segment_ids.flatten()[start] > 0
    return start[real], length[real]


def block_attention(qkv: Tensor, blocks: SampleBlocks, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v of every sample; padding slots give 0.

    Args:
        qkv: (B, T, 3 * H) queries, keys and values.
        blocks: the plan of the rows.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, H).
    """
    out: Tensor = _BlockAttention.apply(qkv, blocks, dropout)
    return out


class _BlockAttention(torch.autograd.Function):
    """By hand, because autograd would copy every group's part of queries, keys, values and gradients."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, blocks: SampleBlocks, dropout: float) -> Tensor:
        head_size = qkv.shape[-1] // 3 // blocks.n_head
        taken = qkv.reshape(-1, head_size).index_select(0, blocks.take_qkv).view(3, -1, head_size)
        context = taken.new_empty(taken.shape[1] + 1, head_size)
        context[-1] = 0.0  # what padding gets
        saved: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for group, part in blocks.parts():
                query, key, value = _of_group(taken, group, part)
                scores = query.new_empty(len(query), group.length, group.length)
                _scaled_product(query, key.transpose(1, 2), out=scores, head_size=head_size)
                scores.view(group.n, -1, group.length, group.length).add_(group.bias[:, None])
                weights = torch.softmax(scores, dim=-1)
                saved.append(weights)
                if dropout:
                    saved.append(keep_mask(weights, dropout))
                    weights = weights * saved[-1]
                torch.bmm(weights, value, out=context[part].view(-1, group.length, head_size))
        ctx.blocks, ctx.kept = blocks, kept_share(dropout) if dropout else None
        if ctx.kept:
            context.div_(ctx.kept)
        ctx.save_for_backward(taken, *saved)
        return context.index_select(0, blocks.put).view(*qkv.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        blocks: SampleBlocks = ctx.blocks
        taken, *rest = ctx.saved_tensors
        saved, head_size = iter(rest), taken.shape[-1]
        d_context = grads[0].reshape(-1, head_size).index_select(0, blocks.take)
        d_context.index_fill_(0, blocks.padding, 0.0)
        if ctx.kept:
            d_context.div_(ctx.kept)
        result = taken.new_empty(3 * taken.shape[1] + 1, head_size)
        result[-1] = 0.0  # what padding gets
        for group, part in blocks.parts():
            query, key, value = _of_group(taken, group, part)
            d_query, d_key, d_value = _of_group(result[:-1].view_as(taken), group, part)
            d_out = d_context[part].view_as(query)
            weights = dropped = next(saved)
            d_weights = torch.bmm(d_out, value.transpose(1, 2))
            if ctx.kept:
                mask = next(saved)
                dropped = weights * mask
                d_weights.mul_(mask)
            torch.bmm(dropped.transpose(1, 2), d_out, out=d_value)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _scaled_product(d_scores, key, out=d_query, head_size=head_size)
            _scaled_product(d_scores.transpose(1, 2), query, out=d_key, head_size=head_size)
        return result.index_select(0, blocks.put_qkv).view(*grads[0].shape[:2], -1), None, None


def _of_group(qkv: Tensor, group: Group, part: slice) -> Iterator[Tensor]:
    """A group's queries, keys and values, (n * heads, L, d) each, as views of (3, S * heads, d)."""
    return (each[part].view(-1, group.length, qkv.shape[-1]) for each in qkv)


def _scaled_product(a: Tensor, b: Tensor, *, out: Tensor, head_size: int) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=1.0 / math.sqrt(head_size), out=out)


# ---------------------------------------------------------------------------------------------- cheap dropout

LEVELS = 1 << 16
"""A probability is rounded to 1/65536; what is kept is divided by the rounded one: exact in expectation."""


def _n_kept(p: float) -> int:
    """How many of the 65,536 values of a random 16-bit number keep an element."""
    return min(max(round((1.0 - p) * LEVELS), 1), LEVELS - 1)


def kept_share(p: float) -> float:
    """The probability with which `keep_mask` keeps an element: 1 - p, rounded."""
    return _n_kept(p) / LEVELS


def keep_mask(like: Tensor, p: float) -> Tensor:
    """1 with probability 1 - p, else 0, in the shape and dtype of `like` (multiplying by bools is slower)."""
    n = like.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:n].view(like.shape)
    return torch.lt(bits, _n_kept(p) - LEVELS // 2, out=torch.empty_like(like))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.kept = kept_share(p)
        return (x * mask).div_(ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).div_(ctx.kept), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes elements with probability p and scales the others by 1 / (1 - p)."""
    dropped: Tensor = _Dropout.apply(x.contiguous(), p)
    return dropped


# ------------------------------------------------------------------------------------- cross entropy by rows

ROWS_AT_ONCE = 32
"""Rows of logits taken to float32 at a time: with 8,001 words, this many fit into a core's cache."""


class _RowwiseNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_ids: Tensor) -> Tensor:
        log_total = torch.cat([rows.float().logsumexp(dim=-1) for rows in logits.split(ROWS_AT_ONCE)])
        ctx.save_for_backward(logits, target_ids)
        return log_total - logits.gather(1, target_ids[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, target_ids = ctx.saved_tensors
        result = torch.empty_like(logits)
        columns = (target_ids[:, None], grads[0][:, None])
        parts = zip(*(x.split(ROWS_AT_ONCE) for x in (result, logits, *columns)), strict=True)
        for out, rows, target, grad in parts:
            # d nll / d logits = softmax - one-hot of the target; exp(rows - log_total) would be less exact,
            # since a float32 near 60 is known to 4e-6, and take 1.4 times as long.
            slope = rows.softmax(dim=-1, dtype=torch.float32).mul_(grad)
            out.copy_(slope.scatter_add_(1, target, -grad))
        return result, None


def nll(logits: Tensor, target_ids: Tensor) -> Tensor:
    """-log p(token) of each target: (M, V), (M,) -> (M,)."""
    values: Tensor = _RowwiseNll.apply(logits, target_ids)
    return values


# ------------------------------------------------------------------------------------------------ whole steps

ROWS_STEP = 64


def whole_steps(rows: Tensor) -> Tensor:
    """Rows of zeros after (M, ...) up to a multiple of `ROWS_STEP`, in training on a CPU."""
    if not serves(rows) or not torch.is_grad_enabled():
        return rows
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, -len(rows) % ROWS_STEP))
