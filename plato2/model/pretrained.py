"""A backbone made of a pretrained causal decoder: a folder of Hugging Face's, with weights as safetensors.

Stages, losses, batches and decoding do not know it from `Backbone`. It keeps transformers' own code for the
blocks and adds what dialogues need: who sees whom is a mask, positions restart in each record, and token
types, roles, [MASK] and latents are vectors that are added to word embeddings. The first three start at 0, so
at step 0, with `context_mask=causal`, p(r|c) is what the decoder itself says.

**Ids.** plato2's ids are the same whatever the model: 0 unknown, 1 [CLS], 2 [SEP], 3 + i the decoder's word
i, and the last one [MASK]. [CLS] is read as the decoder's begin token (its end token if it has none), [SEP]
as its end token. Each word has one logit: special ones have theirs at 0, 1 and 2, and none at 3 + i.

**Adapters.** With `adapter=lora` the decoder's own weights are the frozen base: what is trained, and all that
a state dict holds, are low-rank additions to the linear layers of the blocks, and the vectors. Several
backbones may share one base in memory, each with an adapter of its own name (`build_backbone(config, base,
name)`).

Nothing in the folder is executed: code that comes with a model is never loaded, nor are pickled weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plato2.config import ModelConfig, UserError, install
from plato2.model import cpu, masks
from plato2.model.backbone import Backbone, KeyValueCache, Mask, last_slots, put_front, read_slots
from plato2.model.decoder_folder import (
    CURE,
    SPECIAL,
    FolderWeights,
    build_decoder,
    import_transformers,
    stored_architecture,
)

ADAPTER = "default"
"""Name of the adapter in a checkpoint, as in peft: `...q_proj.lora_A.default.weight`."""


def build_backbone(
    config: ModelConfig, base: PretrainedBackbone | None = None, adapter: str = ADAPTER
) -> Backbone:
    """The backbone of a configuration: ours, or one made of a pretrained decoder.

    Args:
        config: the configuration.
        base: shares its decoder with this backbone; both have adapters.
        adapter: name of this one's adapter, which the base has not yet.

    Raises:
        UserError: the decoder cannot be read.
    """
    return PretrainedBackbone(config, base, adapter) if config.is_pretrained else Backbone(config)


class PretrainedBackbone(Backbone):
    """The interface of `Backbone` over a causal decoder of transformers.

    On the meta device only shapes are made, from `config.architecture`; elsewhere the weights in
    `config.path` are read, in float32, or the matrices in `config.base_dtype`.

    With an adapter the weights read are frozen, and neither in its state dict nor missed in one that is
    loaded.

    Args:
        config: from `from_folder`.
        base: see `build_backbone`.
        adapter: see `build_backbone`.

    Raises:
        UserError: they cannot be, or `config` does not come from `from_folder`.
        ValueError: the base is another one.
    """

    def __init__(
        self, config: ModelConfig, base: PretrainedBackbone | None = None, adapter: str = ADAPTER
    ) -> None:
        nn.Module.__init__(self)  # none of the modules of `Backbone`
        self.config, self.adapter = config, adapter
        self.base: Mapping[str, Tensor] | None = None
        """Own weights that are not those in `config.path`, by their names in a backbone without adapter."""
        stored = stored_architecture(config)
        if base is None:
            with torch.device("meta") if config.base_dtype == "bfloat16" else nullcontext():
                model, geometry = build_decoder(config, stored["config"])
            self.decoder = model.base_model
            self.lm_head = None if geometry.tie_word_embeddings else model.get_output_embeddings()
            self.at_work: list[str] = []
            """The adapter that the decoder computes with: of all backbones that share it."""
        else:
            _check_shared(config, base.config)
            geometry, self.decoder, self.lm_head = base.decoder.config, base.decoder, base.lm_head
            self.at_work = base.at_work
        self.softcap: float | None = getattr(geometry, "final_logit_softcapping", None)
        self.n_words = config.vocab_size - SPECIAL - 1
        begin, end, unknown = (stored[name] for name in ("begin", "end", "unknown"))
        self.specials = (unknown, None if begin == end else begin, end)
        """The words at ids 0, 1 and 2, where they are words of their own."""
        self.read_as = (end if unknown is None else unknown, begin, end)
        """The words as which ids 0, 1 and 2 are read."""
        heads = getattr(geometry, "num_key_value_heads", None) or geometry.num_attention_heads
        head_size = (
            getattr(geometry, "head_dim", None) or geometry.hidden_size // geometry.num_attention_heads
        )
        self.cache_heads = (int(heads), int(head_size))
        added = {"token_type": (config.n_type, config.hidden_size), "mask": (config.hidden_size,)}
        added |= {"role": (config.n_role, config.hidden_size)} if config.n_role else {}
        self.added = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in added.items()}
        )
        self.register_load_state_dict_post_hook(lambda module, _: module.renew_buffers())
        if config.base_dtype == "bfloat16" and base is None:
            self._keep_in_half()
        if config.has_adapter:
            self._add_adapter()
        if config.checkpoint_activations:
            self.decoder.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder's blocks."""
        return self.decoder.h if hasattr(self.decoder, "h") else self.decoder.layers

    @property
    def role(self) -> Tensor | None:  # type: ignore[override]
        """(n_role, H), if it has roles."""
        return self.added["role"] if self.config.n_role else None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.added["mask"].device

    @property
    def mask_vector(self) -> Tensor:
        """(H,) what [MASK] adds to the begin token."""
        return self.added["mask"]

    def words(self, token_ids: Tensor) -> Tensor:
        """Word embeddings alone: any shape (...) -> (..., H)."""
        is_mask = token_ids == self.config.mask_id
        words = token_ids - SPECIAL
        for special, word in enumerate(self.read_as):
            words = torch.where(token_ids == special, word, words)
        words = torch.where(is_mask, self.read_as[1], words)
        return self._read(words) + is_mask[..., None] * self.mask_vector

    def embed(
        self, token_ids: Tensor, type_ids: Tensor, pos_ids: Tensor, role_ids: Tensor | None = None
    ) -> Tensor:
        """word + type (+ role): four (B, T) -> (B, T, H); the decoder itself adds positions."""
        x = self.words(token_ids) + F.embedding(type_ids, self.added["token_type"])
        if self.role is not None and role_ids is not None:
            x = x + F.embedding(role_ids, self.role)
        return x

    def put_front(self, x: Tensor, sample_index: Tensor, vectors: Tensor) -> Tensor:
        """Latent or [MASK] vectors (N, H), added to the begin token, in the front slots of embedded rows."""
        begin = torch.full((1,), self.read_as[1], device=x.device)
        return put_front(x, sample_index, self._read(begin) + vectors)

    def seen(self, segment_ids: Tensor, type_ids: Tensor | None) -> Tensor:
        """See `Backbone.seen`; with `context_mask=causal` a slot sees what comes before it."""
        if self.config.context_mask == "causal":
            return masks.causal(segment_ids, type_ids)
        return super().seen(segment_ids, type_ids)

    def summary_slots(self, segment_ids: Tensor, first: Tensor) -> Tensor:
        """See `Backbone.summary_slots`: here it is the last.

        A decoder's first slot says next to nothing of what it sees: other slots look at it when they have
        nothing to look at (Xiao et al., 2024, arXiv:2309.17453), so its output is nearly the same for all
        records, and a response makes a hundred times as much of the last slot's variance
        (experiments/decoder_latents).
        """
        return last_slots(segment_ids, first)

    def cache(self, batch: int, max_length: int, dtype: torch.dtype) -> KeyValueCache:
        """See `Backbone.cache`."""
        heads, head_size = self.cache_heads
        return KeyValueCache((self.config.n_layer, batch, heads, max_length, head_size), self.device, dtype)

    def encode(
        self,
        x: Tensor,
        mask: Mask,
        cache: KeyValueCache | None = None,
        read: Tensor | None = None,
        pos_ids: Tensor | None = None,
    ) -> Tensor:
        """See `Backbone.encode`; `pos_ids` (B, Q) must be given.

        Raises:
            ValueError: they are not.
        """
        if pos_ids is None:
            raise ValueError("a pretrained decoder needs positions: encode(..., pos_ids=unit['pos_ids'])")
        self._put_to_work()
        by_sample = isinstance(mask, cpu.SampleBlocks)
        h: Tensor = self.decoder(
            inputs_embeds=x,
            attention_mask=None if by_sample else mask,
            sample_blocks=mask if by_sample else None,
            position_ids=pos_ids,
            cache=None if cache is None else _Layers(cache),
            use_cache=cache is not None,
        ).last_hidden_state
        if cache is not None:
            cache.length += x.shape[1]
        return h if read is None else read_slots(h, read)

    def lm_logits(self, h: Tensor) -> Tensor:
        """Word logits of gathered slots only: (M, H) -> (M, V), -inf where an id is no word of its own."""
        logits = self._products(cpu.whole_steps(h))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return self._by_id(logits)[: len(h)]

    def word_logits(self, h: Tensor, bias: Tensor) -> Tensor:
        """See `Backbone.word_logits`; -inf where an id is no word of its own."""
        return self._by_id(self._products(h)) + bias

    def base_weights(self) -> Mapping[str, Tensor]:
        """The decoder's own weights by their names here, each read when it is asked for.

        Raises:
            UserError: some are missing, or cannot be read.
        """
        own = {name: _plain(name) for name, _ in self.named_parameters() if is_of_base(name)}
        if self.base is None:
            return FolderWeights(Path(self.config.path), own, self.decoder.base_model_prefix)
        return {name: self.base[plain] for name, plain in own.items()}

    def load_base(self) -> None:
        """Takes over the decoder's own weights, also on the meta device.

        Raises:
            UserError: they cannot be read.
        """
        found = self.base_weights()
        # cloned: not the bytes of a file that may change
        own = dict(self.named_parameters())
        base = {name: found[name].to("cpu", own[name].dtype, copy=True) for name in found}
        try:
            self.load_state_dict(base, strict=False, assign=True)
        except RuntimeError as error:  # of another shape
            told = str(error).splitlines()[-1].strip()
            raise UserError(f"model.path={self.config.path}: cannot be read ({told}); {CURE}") from None

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Its weights, and from now on it, with the adapter merged; by the names of a backbone without."""
        for module in self.decoder.modules():
            if hasattr(module, "base_layer"):
                module.merge(adapter_names=[self.adapter])
        return {
            name.replace(".base_layer.", "."): weight.detach()
            for name, weight in self.named_parameters()
            if ".lora_" not in name
        }

    def peft_names(self) -> dict[str, str]:
        """The names of its adapter's matrices, and those that peft has for them in a file."""
        prefix = f"base_model.model.{self.decoder.base_model_prefix}"
        return {
            f"decoder.{name}": f"{prefix}.{name.replace(f'.{self.adapter}.', '.')}"
            for name, _ in self.decoder.named_parameters()
            if ".lora_" in name and f".{self.adapter}." in name
        }

    def lora_config(self) -> Any:
        """What peft calls the shape of the adapter: a `LoraConfig`."""
        conv = import_transformers(self.config).pytorch_utils.Conv1D  # GPT-2's linear layers
        linear = {
            name.removesuffix(".base_layer").rpartition(".")[2]: isinstance(module, conv)
            for name, module in self.blocks.named_modules()
            if isinstance(module, (nn.Linear, conv)) and ".lora_" not in name
        }
        return _peft().LoraConfig(
            r=self.config.adapter_rank,
            lora_alpha=self.config.adapter_alpha,
            lora_dropout=self.config.dropout,
            target_modules=sorted(linear),
            fan_in_fan_out=any(linear.values()),
        )

    def _keep_in_half(self) -> None:
        """Makes the decoder's matrices bfloat16, and reads all of it, unless it stays on the meta device.

        Vectors stay float32: norms compute with them in that. One tensor at a time is in memory twice.
        """
        for name, weight in self.named_parameters():
            if is_of_base(name) and weight.ndim == 2:
                weight.data = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
        if torch.get_default_device().type != "meta":
            self.load_base()

    def _add_adapter(self) -> None:
        """Freezes the base, and adds low-rank matrices to the linear layers of its blocks."""
        peft = _peft()
        for part in (self.decoder, self.lm_head):
            if part is not None:
                part.requires_grad_(False)
        # Their values come from `initialize`; peft warns of a second adapter, which is meant.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            peft.functional.inject_adapter_in_model(
                self.lora_config(),
                self.decoder,
                self.adapter,
            )
        for name, weight in self.decoder.named_parameters():
            if ".lora_" in name:  # peft makes them as what they are added to
                weight.data = weight.data.float()
        self.at_work[:] = [self.adapter]
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_post_hook(_base_is_not_missing)

    def _put_to_work(self) -> None:
        """Makes the decoder compute with this backbone's adapter, where it shares it with others."""
        if self.at_work and self.at_work != [self.adapter]:
            _peft().functional.set_adapter(self.decoder, self.adapter, inference_mode=not self.training)
            self.at_work[:] = [self.adapter]

    def _read(self, words: Tensor) -> Tensor:
        """The decoder's own word embeddings, in the precision of what is added to them: (...) -> (..., H)."""
        embedded: Tensor = self.decoder.get_input_embeddings()(words)
        return embedded.to(self.mask_vector.dtype)

    def _products(self, h: Tensor) -> Tensor:
        """(M, H) -> (M, W) products with the rows of the output table that have a word."""
        head = self.decoder.get_input_embeddings() if self.lm_head is None else self.lm_head
        return F.linear(h, head.weight[: self.n_words])

    def _by_id(self, logits: Tensor) -> Tensor:
        """Logits of the decoder's words (M, W) in the order of plato2's ids: (M, V)."""
        none = logits.new_full((len(logits), 1), float("-inf"))
        first = [none if word is None else logits[:, word, None] for word in self.specials]
        rest = logits.clone()
        for word in self.specials:
            if word is not None:
                rest[:, word] = float("-inf")
        return torch.cat([*first, rest, none], dim=1)

    def _apply(self, fn: Any, recurse: bool = True) -> PretrainedBackbone:
        """As of any module; but rotations are computed in float32 whatever the weights' dtype becomes."""
        super()._apply(fn, recurse)
        self.renew_buffers()
        return self

    def renew_buffers(self) -> None:
        """Computes what is no weight, such as frequencies: none is stored, or made on the meta device."""
        device = self.device
        for module in self.decoder.modules():
            if device.type == "meta" or not module._non_persistent_buffers_set:
                continue
            with torch.device("cpu"):
                if hasattr(module, "scalar_embed_scale"):  # Gemma's word table
                    renewed = {"embed_scale": torch.tensor(module.scalar_embed_scale)}
                else:
                    renewed = dict(type(module)(module.config).named_buffers())
            for name, value in renewed.items():
                setattr(module, name, value.to(device))


def word_length(config: ModelConfig) -> float:
    """How long a decoder's word embeddings are: the root of their mean square, of one coordinate.

    Raises:
        UserError: there are no such weights in `config.path`.
    """
    with torch.device("meta"):
        backbone = PretrainedBackbone(replace(config, adapter="none", base_dtype="float32"))
    table = backbone.decoder.get_input_embeddings()
    name = next(name for name, weight in backbone.named_parameters() if weight is table.weight)
    words = backbone.base_weights()[name]
    scale = float(getattr(table, "scalar_embed_scale", 1.0))  # Gemma's, which embeds with it
    return scale * float(torch.linalg.vector_norm(words, dtype=torch.float32)) / math.sqrt(words.numel())


def is_of_base(name: str) -> bool:
    """Whether a parameter is one of the decoder itself, by its name in a backbone, a stage or a network."""
    parts = name.split(".")
    of_decoder = "decoder" in parts or "lm_head" in parts
    return of_decoder and not any(part.startswith("lora_") for part in parts)


def _plain(name: str) -> str:
    """The name of a decoder's own parameter where there is no adapter."""
    return name.replace(".base_layer.", ".")


def _without_base(backbone: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Leaves out of a state dict what is frozen, and the adapters of others on the same base."""
    assert isinstance(backbone, PretrainedBackbone)
    for name in [name for name in state if name.startswith(prefix)]:
        is_adapter = ".lora_" in name
        if is_of_base(name) or (is_adapter and backbone.adapter not in name.split(".")):
            del state[name]


def _base_is_not_missing(backbone: nn.Module, keys: Any) -> None:
    """The reverse: a state dict without them is whole."""
    assert isinstance(backbone, PretrainedBackbone)
    for name in list(keys.missing_keys):
        if is_of_base(name) or (".lora_" in name and backbone.adapter not in name.split(".")):
            keys.missing_keys.remove(name)


def _check_shared(config: ModelConfig, base: ModelConfig) -> None:
    """Raises: ValueError: adapters of two bases, or none."""
    same = (config.architecture, config.base_sha256) == (base.architecture, base.base_sha256)
    if not (same and config.has_adapter and base.has_adapter):
        raise ValueError(f"{config.path} and {base.path}: not adapters of one base")


class _Layers:
    """Our cache as the attention of transformers fills it."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, Q, d); returns all of the layer's, (B, heads, K, d)."""
        return self.cache.append(layer, key, value)

    def get_seq_length(self, layer: int = 0) -> int:
        """Slots filled before."""
        return self.cache.length


def _peft() -> Any:
    """peft, of which only what works on any module is used.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft.functional
    except ImportError:
        raise UserError(f"model.adapter=lora: needs peft; {install('lora')}") from None
    return peft
