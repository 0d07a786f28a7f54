"""The transformer all stages share: one network, which masks turn into a prefix language model or an encoder.

Top to bottom: cache, self-attention, block, backbone (embeddings, blocks, final norm, tied LM head). The
exact model is Knover's (docs/spec.md, Backbone): pre-norm blocks, erf GELU, no norm after the embeddings, and
a front slot (latent or [MASK]) that has neither a type nor a position. There are no stage branches here:
stages differ by masks, heads, losses and batch.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plato2.batch import Unit
from plato2.config import ModelConfig
from plato2.model import cpu, masks

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5


def initialize(module: nn.Module) -> None:
    """Knover's initialisation: matrices and tables normal(0, 0.02) cut at 2 sigma, biases 0, norms 1/0."""
    for name, parameter in in_order_of_drawing(module):
        initialize_parameter(name, parameter)


def in_order_of_drawing(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters, adapters last: heads start alike with and without them."""
    return sorted(module.named_parameters(), key=lambda named: ".lora_" in named[0])


def initialize_parameter(name: str, parameter: Tensor) -> None:
    """Fills one parameter by its name and shape.

    Those of a pretrained decoder have been read, and what is added to it starts at 0 (model/pretrained.py):
    of an adapter B A the matrix B, while A is drawn as peft does.
    """
    parts = name.split(".")
    if "lora_A" in parts:
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    elif "added" in parts or "lora_B" in parts:
        nn.init.zeros_(parameter)
    elif "decoder" in parts or "lm_head" in parts:
        return
    elif parameter.ndim >= 2:
        for matrix in parameter.chunk(3 if name.endswith("qkv.weight") else 1):
            nn.init.trunc_normal_(matrix, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    elif name.endswith("norm.weight"):
        nn.init.ones_(parameter)
    else:
        nn.init.zeros_(parameter)


def _table(n_rows: int, width: int) -> nn.Embedding:
    """Embeddings without initial values: torch's own would import its compiler on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(n_rows, width), freeze=False)


def put_front(x: Tensor, sample_index: Tensor, vectors: Tensor) -> Tensor:
    """Puts one vector for each sample into its front slot, in place of word + type + position.

    Args:
        x: (B, T, H) embedded rows.
        sample_index: (N,) flat index b * T + t of each front slot.
        vectors: (N, H).

    Returns:
        (B, T, H), a new tensor.
    """
    return x.flatten(0, 1).index_copy(0, sample_index, vectors.to(x.dtype)).view_as(x)


def last_slots(segment_ids: Tensor, sample_index: Tensor) -> Tensor:
    """Where records end.

    Args:
        segment_ids: (B, T), 0 = padding; the slots of a record are next to each other.
        sample_index: (N,) flat index b * T + t of each record's first slot.

    Returns:
        (N,) flat index of its last slot.
    """
    after = F.pad(segment_ids[:, 1:], (0, 1))  # 0 behind a row's end
    ends = (segment_ids != after) & (segment_ids > 0)
    return _next(ends)[sample_index]


def response_slots(type_ids: Tensor, sample_index: Tensor) -> Tensor:
    """Where the responses of packed rows begin.

    Args:
        type_ids: (B, T), 1 = response.
        sample_index: (N,) flat index b * T + t of each record's first slot, which is of its context.

    Returns:
        (N,) flat index of each response's [CLS].
    """
    response = type_ids == 1
    begins = response & ~F.pad(response[:, :-1], (1, 0))
    return _next(begins)[sample_index]


def _next(marked: Tensor) -> Tensor:
    """The flat index of the first marked slot from each slot on: (B, T) bool -> (B T,), B T behind the last.

    No shape depends on values, so nothing waits for a GPU, and a plan can count it.
    """
    flat = marked.flatten()
    index = torch.where(flat, torch.arange(len(flat), device=flat.device), len(flat))
    return index.flip(0).cummin(0).values.flip(0)


def read_slots(x: Tensor, index: Tensor) -> Tensor:
    """The vectors at flat slots b * T + t: (B, T, H), (M,) -> (M, H)."""
    return x.flatten(0, 1).index_select(0, index)


def mean_slots(x: Tensor, weights: Tensor, parts: Tensor, n: int) -> Tensor:
    """The weighted mean of the slots of each part of packed rows.

    Args:
        x: (B, T, H).
        weights: (B, T), positive.
        parts: (B, T) 1..n, the part that a slot belongs to; 0 = none.
        n: how many parts there are.

    Returns:
        (n, H), float32.
    """
    weighted = torch.cat([x * weights[..., None], weights[..., None]], dim=-1).float()  # (B, T, H + 1)
    sums = weighted.new_zeros(n + 1, weighted.shape[-1]).index_add(0, parts.flatten(), weighted.flatten(0, 1))
    return sums[1:, :-1] / sums[1:, -1:].clamp(min=1e-9)


Mask = Tensor | cpu.SampleBlocks
"""Who may see whom: additive and dense, (B, 1, Q, K), or the samples of packed rows."""


class KeyValueCache:
    """Keys and values of all layers for decoding, allocated once: (L, B, heads, max_length, d)."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        """Slots filled so far; `Backbone.encode` moves it on."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, Q, d) after the filled slots; returns all of the layer's, (B, heads, K, d)."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keeps only some rows of the batch, e.g. those that are not finished: (B',) indices."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Dropout(nn.Module):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        if not self.training or self.p == 0.0:
            return x
        return cpu.dropout(x, self.p) if cpu.serves(x) else F.dropout(x, self.p)


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key, value and output have biases."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, mask: Mask, cache: KeyValueCache | None = None, read: Tensor | None = None
    ) -> Tensor:
        """(B, Q, H) and a dense mask (B, 1, Q, K) or blocks -> (B, Q, H), or (M, H) of the slots `read`."""
        context = self._context(self.qkv(x), mask, cache)
        return self.output(context if read is None else read_slots(context, read))

    def _context(self, qkv: Tensor, mask: Mask, cache: KeyValueCache | None) -> Tensor:
        """softmax(q k^T / sqrt(d) + mask) v of all heads: (B, Q, 3 H) -> (B, Q, H)."""
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, cpu.SampleBlocks):
            return cpu.block_attention(qkv, mask, dropout)
        heads = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, Q, 3, heads, d)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, Q, d) each
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        bias = mask.to(query.dtype)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """x += drop(Attn(LN x)); x += drop(W2 gelu(W1 LN x)). No dropout inside the feed-forward part."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.feed_forward_in = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.feed_forward_out = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Mask, cache: KeyValueCache | None = None, read: Tensor | None = None
    ) -> Tensor:
        """(B, Q, H) and a dense mask (B, 1, Q, K) or blocks -> (B, Q, H), or (M, H) of the slots `read`."""
        attended = self.attention(self.attention_norm(x), mask, cache, read)
        x = (x if read is None else read_slots(x, read)) + self.dropout(attended)
        inner = F.gelu(
            self.feed_forward_in(self.feed_forward_norm(x))
        )  # erf, not tanh (docs/spec.md, Backbone)
        return x + self.dropout(self.feed_forward_out(inner))


class TokenTransform(nn.Module):
    """LN(gelu(W h + b)): what stands before the word table in the LM and bag-of-words heads."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, h: Tensor) -> Tensor:
        """(M, H) -> (M, H)."""
        return self.norm(F.gelu(self.linear(h)))


class Backbone(nn.Module):
    """Embeddings, blocks, final norm and the LM head, which is tied to the word table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word = _table(config.vocab_size, config.hidden_size)
        self.position = _table(config.max_position, config.hidden_size)
        self.token_type = _table(config.n_type, config.hidden_size)
        self.role = _table(config.n_role, config.hidden_size) if config.n_role else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.lm_transform = TokenTransform(config.hidden_size)
        self.lm_bias = nn.Parameter(torch.empty(config.vocab_size))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.word.weight.device

    def base_weights(self) -> Mapping[str, Tensor]:
        """Weights that are read and not drawn: none."""
        return {}

    def words(self, token_ids: Tensor) -> Tensor:
        """Word embeddings alone: (B, T) -> (B, T, H)."""
        return self.word(token_ids)

    def embed(
        self, token_ids: Tensor, type_ids: Tensor, pos_ids: Tensor, role_ids: Tensor | None = None
    ) -> Tensor:
        """word + type + position (+ role): four (B, T) -> (B, T, H)."""
        x = self.word(token_ids) + self.token_type(type_ids) + self.position(pos_ids)
        if self.role is not None and role_ids is not None:
            x = x + self.role(role_ids)
        return x

    def embed_unit(self, unit: Unit) -> Tensor:
        """The rows of a unit, (B, T, H); front slots are still to be filled."""
        return self.embed(unit["token_ids"], unit["type_ids"], unit["pos_ids"], unit.get("role_ids"))

    def put_front(self, x: Tensor, sample_index: Tensor, vectors: Tensor) -> Tensor:
        """Latent or [MASK] vectors (N, H) in the front slots of embedded rows; see `put_front`."""
        return put_front(x, sample_index, vectors)

    def put_latents(self, unit: Unit, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Mask]:
        """What p(r|c,z) is computed from: z where `latent_at` says, and who sees whom.

        With `front` its vector fills the record's front slot. With `response` it is added to the response's
        [CLS] and the front slot is left out, so that a context sees neither z nor [MASK].

        Args:
            unit: the batch.
            x: (B, T, H) its embedded rows.
            vectors: (N, H) a latent's for each record.

        Returns:
            Rows (B, T, H), the flat slot of each record's z (N,), and the mask.
        """
        front, segments, types = unit["sample_index"], unit["segment_ids"], unit["type_ids"]
        if self.config.latent_at == "front":
            return self.put_front(x, front, vectors), front, self.mask(segments, types)
        slots = response_slots(types, front)
        x = x.flatten(0, 1).index_add(0, slots, vectors.to(x.dtype)).view_as(x)
        segments = segments.flatten().index_fill(0, front, 0).view_as(segments)
        return x, slots, self.mask(segments, types)

    def mask(self, segment_ids: Tensor, type_ids: Tensor | None = None) -> Mask:
        """The mask of packed rows in the form that is fastest on this device.

        Args:
            segment_ids: (B, T), 0 = padding; the slots of a sample are next to each other.
            type_ids: (B, T), 1 = response: prefix-LM. None: all of a sample sees all of it.
        """
        dtype = self.attention_dtype
        if cpu.serves(segment_ids):
            return cpu.sample_blocks(segment_ids, type_ids, self.seen, self.config.n_head, dtype)
        return self.dense_mask(segment_ids, type_ids, dtype)

    def own_precision(self) -> torch.autocast:
        """What is computed in where no Trainer decides: the weights' dtype, or that of a base in bfloat16."""
        is_mixed = self.config.base_dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed)

    @property
    def attention_dtype(self) -> torch.dtype:
        """What attention computes in: the weights' dtype, or that of autocast."""
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(self.parameters()).dtype

    def dense_mask(self, segment_ids: Tensor, type_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The same as (B, 1, T, T), additive in that dtype, which a cache needs on any device."""
        return masks.additive(self.seen(segment_ids, type_ids), dtype)

    def seen(self, segment_ids: Tensor, type_ids: Tensor | None) -> Tensor:
        """Who may see whom, as in `mask`: (B, T, T) bool."""
        return masks.same_sample(segment_ids) if type_ids is None else masks.prefix_lm(segment_ids, type_ids)

    def cache(self, batch: int, max_length: int, dtype: torch.dtype) -> KeyValueCache:
        """Room for the keys and values of so many rows of so many slots."""
        n_layer, n_head, hidden = self.config.n_layer, self.config.n_head, self.config.hidden_size
        return KeyValueCache((n_layer, batch, n_head, max_length, hidden // n_head), self.device, dtype)

    def encode(
        self,
        x: Tensor,
        mask: Mask,
        cache: KeyValueCache | None = None,
        read: Tensor | None = None,
        pos_ids: Tensor | None = None,
    ) -> Tensor:
        """All blocks and the final norm.

        Args:
            x: (B, Q, H) embedded rows, front slots filled.
            mask: from `mask` or, dense, (B, 1, Q, K) from `masks.additive`; K = Q, or the cache's length + Q.
            cache: keys and values of the slots before, to continue decoding.
            read: (M,) flat slots b * Q + q whose output is wanted. For the others the last block computes
                only keys and values.
            pos_ids: (B, Q) positions, for a pretrained decoder, whose blocks turn queries and keys by them;
                here they are a part of x.

        Returns:
            (B, Q, H), or (M, H) of the slots `read`.
        """
        x = self.dropout(x)
        n_query, n_read = x.shape[1], None if read is None else len(read)
        if read is not None:
            read = cpu.whole_steps(read)  # slot 0 again and again, left out of the result
        for number, block in enumerate(self.blocks):
            wanted = read if number + 1 == len(self.blocks) else None
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, None, wanted, use_reentrant=False)
            else:
                x = block(x, mask, cache, wanted)
        if cache is not None:
            cache.length += n_query
        return self.final_norm(x[:n_read])

    def encode_masked(self, unit: Unit, x: Tensor, front: Tensor) -> Tensor:
        """What the recognition pass makes of each record, with [MASK] in its front slot (equation 3).

        Args:
            unit: the batch.
            x: (B, T, H) its embedded rows.
            front: (N,) flat index of each front slot.

        Returns:
            (N, H) outputs of the `summary_slots`.
        """
        x = self.put_front(x, front, self.mask_vector.expand(len(front), -1))
        read = self.summary_slots(unit["segment_ids"], front)
        return self.encode(x, self.mask(unit["segment_ids"]), read=read, pos_ids=unit["pos_ids"])

    def summary_slots(self, segment_ids: Tensor, first: Tensor) -> Tensor:
        """The slot of each record that something about all of it is read from: its first.

        Args:
            segment_ids: (B, T), 0 = padding.
            first: (N,) flat index of each record's first slot.

        Returns:
            (N,) flat indices.
        """
        return first

    @property
    def mask_vector(self) -> Tensor:
        """The (H,) vector of [MASK] in a front slot."""
        return self.word.weight[self.config.mask_id]

    def lm_logits(self, h: Tensor) -> Tensor:
        """Word logits of gathered slots only, never of a whole (B, T, V): (M, H) -> (M, V)."""
        return self.word_logits(self.lm_transform(cpu.whole_steps(h)), self.lm_bias)[: len(h)]

    def word_logits(self, h: Tensor, bias: Tensor) -> Tensor:
        """Products with the word table: (M, H), (V,) -> (M, V)."""
        return F.linear(h, self.word.weight, bias)
