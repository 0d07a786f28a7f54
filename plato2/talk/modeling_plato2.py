"""PLATO-2 for Hugging Face transformers, carried by an exported folder (`plato2 export hf`).

model = AutoModel.from_pretrained("DIR", trust_remote_code=True)
model.reply(["hi , how was your day ?"])  # candidates, the most coherent first
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from plato2.batch import Unit  # noqa: F401  (named here, so that transformers copies the file)
from plato2.config import DecodeConfig, ModelConfig
from plato2.data.packing import best_fit_rows  # noqa: F401
from plato2.data.samples import Context, as_texts, read_context
from plato2.data.tokenizer import MOST_UNREAD, Tokenizer
from plato2.data.units import pack  # noqa: F401
from plato2.model.backbone import initialize_parameter
from plato2.model.cpu import whole_steps  # noqa: F401
from plato2.model.decoder_attention import attention  # noqa: F401
from plato2.model.decoder_folder import weight_files  # noqa: F401
from plato2.model.heads import Latents  # noqa: F401
from plato2.model.int8 import quantise  # noqa: F401
from plato2.model.losses import nll  # noqa: F401
from plato2.model.masks import additive  # noqa: F401
from plato2.model.networks import EvaluationNetwork, Evaluator, GenerationNetwork, own_evaluator
from plato2.model.noise import uniform  # noqa: F401
from plato2.model.pretrained import PretrainedBackbone
from plato2.random import GOLDEN  # noqa: F401
from plato2.talk.configuration_plato2 import Plato2Config
from plato2.talk.decode import decode
from plato2.talk.rank import Candidate, coherence, rank


@dataclass
class Plato2Output(ModelOutput):
    """What `forward` gives."""

    logits: Tensor | None = None
    """(B, T, V) of the next token."""
    last_hidden_state: Tensor | None = None
    """(B, T, H) after the final norm."""


class Plato2Model(PreTrainedModel):
    """A generation model and/or an evaluation model; the word tables are tied to their output layers."""

    config_class = Plato2Config
    folder = ""
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"generation\.recognition\.(transform|classifier|bias)",
        r"generation\.bag_of_words",
    ]
    _keys_to_ignore_on_load_missing = [r"evaluation\.backbone\.lm_"]  # noqa: RUF012

    def __init__(self, config: Plato2Config) -> None:
        super().__init__(config)
        self.generation: GenerationNetwork | None = None
        self.evaluation: EvaluationNetwork | None = None
        if config.generation:
            model = ModelConfig(**config.generation["arguments"]["model"])
            use = config.generation["use"]
            self.generation = GenerationNetwork(model, use["has_latents"], use.get("coherence_head"))
        if config.evaluation:
            arguments = config.evaluation["arguments"]
            self.evaluation = EvaluationNetwork(
                ModelConfig(**arguments["model"]), arguments.get("head", "first")
            )
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """As in transformers; remembers the folder, in which the tokenizer is."""
        loaded = super().from_pretrained(folder, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.folder = str(folder)
        for network in (model.generation, model.evaluation):
            if network is not None and isinstance(network.backbone, PretrainedBackbone):
                network.backbone.renew_buffers()
        return loaded

    def save_pretrained(self, folder: Any, *arguments: Any, **options: Any) -> None:  # type: ignore[override]
        """As in transformers; the tokenizer goes along."""
        super().save_pretrained(folder, *arguments, **options)
        if self.folder:
            self.tokenizer.save(folder / Path("tokenizer"))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values for what the folder lacks because only training needs it."""
        kind = "norm." if isinstance(module, nn.LayerNorm) else ""
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                initialize_parameter(kind + name, parameter)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder."""
        if not hasattr(self, "_tokenizer"):
            if not self.folder:
                raise ValueError("this model was not loaded from a folder: it has no tokenizer")
            folder = Path(self.folder)
            if not folder.is_dir():  # a name on a hub
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(self.folder, allow_patterns="tokenizer/*"))
            self._tokenizer: Any = Tokenizer.load(folder / "tokenizer")
        tokenizer: Tokenizer = self._tokenizer
        return tokenizer

    def get_input_embeddings(self) -> nn.Module:
        """The word table."""
        network = self.generation or self.evaluation
        assert network is not None
        if isinstance(network.backbone, PretrainedBackbone):
            table: nn.Module = network.backbone.decoder.get_input_embeddings()
            return table
        return network.backbone.word

    def get_output_embeddings(self) -> nn.Module | None:
        """What makes logits of `backbone.lm_transform`'s output: the word table and the bias, not copies.

        None of a pretrained decoder, whose words have other ids.
        """
        network = self.generation or self.evaluation
        assert network is not None
        if isinstance(network.backbone, PretrainedBackbone):
            return None
        words = network.backbone.word
        layer = nn.Linear(words.embedding_dim, words.num_embeddings, device="meta")
        layer.weight, layer.bias = words.weight, network.backbone.lm_bias
        return layer

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latent_ids: Tensor | None = None,
        **others: Any,
    ) -> Plato2Output:
        """Logits of the generation model: a context sees all of itself, a response what came before.

        Args:
            input_ids: (B, T) [CLS] (turn [SEP])* [CLS] words.
            token_type_ids: (B, T) 0 = context, 1 = response; all context by default.
            position_ids: (B, T); 0, 1, ... by default.
            attention_mask: (B, T) 0 = padding on the right.
            latent_ids: (B,) the latent z of each row, needed by a stage-2.1 model.
        """
        if self.generation is None:
            raise ValueError("this folder has no generation model")
        backbone = self.generation.backbone
        length = input_ids.shape[1]
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        positions = positions if position_ids is None else position_ids
        x = backbone.embed(input_ids, types, positions)
        if self.generation.recognition is not None:
            if latent_ids is None:
                raise ValueError("a stage-2.1 model needs latent_ids, one latent z for each row")
            z = nn.functional.one_hot(latent_ids, self.generation.model_config.n_latent).to(x.dtype)
            vectors = self.generation.recognition.latent(z)
            if backbone.config.latent_at == "response":  # added to the first slot of type 1
                begins = (types == 1) & (types.cumsum(dim=1) == 1)
                x = x + begins[..., None] * vectors[:, None]
            else:
                x = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
                front = torch.arange(len(x), device=x.device) * x.shape[1]
                x = backbone.put_front(x, front, vectors)
                real = nn.functional.pad(real, (1, 0), value=1)
                types, positions = (nn.functional.pad(each, (1, 0)) for each in (types, positions))
        h = backbone.encode(x, backbone.mask(real, types), pos_ids=positions)[:, -length:]
        return Plato2Output(
            logits=backbone.lm_logits(h.flatten(0, 1)).unflatten(0, h.shape[:2]), last_hidden_state=h
        )

    def encode_context(self, turns: Sequence[str]) -> list[int]:
        """Ids of a conversation, oldest turn first, cut to what the model can read.

        Raises:
            UserError: no turns, nothing in the last one, or not texts.
        """
        return self._read(turns).ids

    def _read(self, turns: Sequence[str]) -> Context:
        network = self.generation or self.evaluation
        assert network is not None
        return read_context(turns, self.tokenizer, network.model_config.max_position // 2)

    @property
    def _evaluator(self) -> Evaluator | None:
        """What ranks: the evaluation model, else a generation model that ranks its own candidates."""
        if self.evaluation is not None or self.generation is None:
            return self.evaluation
        return own_evaluator(self.generation)

    def reply(self, turns: Sequence[str], **options: Any) -> list[Candidate]:
        """One candidate for each latent z, most coherent first (without evaluation model: most probable).

        Args:
            turns: the conversation, oldest turn first; one text is one turn.
            options: of `DecodeConfig`: top_k, max_tokens, temperature, stop, seed, ...

        Raises:
            UserError: no turns, nothing in the last one, not texts, or a setting that decoding cannot use.
        """
        if self.generation is None:
            raise ValueError("this folder has no generation model")
        context = self._read(turns)
        if context.unread > MOST_UNREAD:
            warnings.warn(f"the model cannot read {context.unread:.0%} of this message", stacklevel=2)
        config = DecodeConfig(**options)
        found = decode(self.generation, [context.ids], config)[0]
        found = [hypothesis.stopped(config.stop, self.tokenizer) for hypothesis in found]
        return rank(self.tokenizer, [context.ids], [found], self._evaluator, [context.turns])[0]

    def coherence(self, turns: Sequence[str], responses: Sequence[str]) -> list[float]:
        """p(l=1|c,r) of each response."""
        evaluator = self._evaluator
        if evaluator is None:
            raise ValueError("this folder has no evaluation model")
        context = self.encode_context(turns)
        return coherence(
            evaluator,
            [(context, words) for words in self.tokenizer.encode_batch(as_texts(responses))],
        )
