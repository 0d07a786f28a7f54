"""The folder of a causal decoder of Hugging Face's: what is in it, whether it can be trained, its weights.

Nothing in it is executed: code that comes with a model is never loaded, nor are pickled weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from plato2.bounded import read_file
from plato2.config import ModelConfig, UserError, install
from plato2.model import decoder_attention

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2", "gpt_neox")
"""Of decoders, by the model_type of config.json."""
SPECIAL = 3
"""plato2's ids before the words': unknown, [CLS], [SEP]."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
"""Keys of dropout in the families' configurations."""
SPARE = 0.05
"""Share of a word table's rows that may have no word: tables are padded to round numbers."""
CONFIG_BYTES, INDEX_BYTES = 1 << 20, 1 << 24
CURE = "give the folder of a causal decoder, as save_pretrained writes it"


class Words(Protocol):
    """What is asked of the decoder's tokenizer, a `DecoderTokenizer`."""

    n_words: int

    @property
    def special(self) -> Any:
        """The words `begin`, `end` and `unknown`."""


def from_folder(
    config: ModelConfig, read_words: Callable[[str], Words], to_train: bool = True
) -> ModelConfig:
    """The configuration with the geometry of the decoder in `config.path`, which is not loaded yet.

    Args:
        config: with `path`.
        read_words: reads the tokenizer of such a folder, `DecoderTokenizer.from_model`.
        to_train: whether there must be weights; a plan needs none.

    Raises:
        UserError: nothing there, no decoder of these families, a tokenizer of another vocabulary, pickled or
            quantised weights, fewer positions than `max_position`, or another geometry than was given.
    """
    folder = Path(config.path)
    given = f"model.path={config.path}"
    raw = _read_config(folder, given)
    _check_kind(folder, raw, given)
    if to_train and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{given}: has no *.safetensors (pickled weights are never read); save the model again with "
            "save_pretrained, whose files are safetensors"
        )
    transformers = import_transformers(config)
    try:
        found = transformers.AutoConfig.for_model(raw["model_type"], **_without(raw, "model_type"))
    except Exception as error:  # whatever a configuration of somebody else's makes its class do
        raise UserError(
            f"{given}: config.json does not fit {raw['model_type']} ({_line(error)}); {CURE}"
        ) from None
    words = read_words(config.path)
    if not found.vocab_size * (1 - SPARE) <= words.n_words <= found.vocab_size:
        raise UserError(
            f"{given}: its tokenizer has {words.n_words:,} words and its model {found.vocab_size:,}; put the "
            "tokenizer there that the model was trained with"
        )
    positions = found.max_position_embeddings
    window = getattr(found, "sliding_window", None) or positions
    if config.max_position > min(positions, window):
        has = f"{positions:,} positions" if positions <= window else f"a sliding window of {window:,}"
        raise UserError(
            f"model.max_position={config.max_position}: the decoder in {config.path} has {has}; use at most "
            f"{min(positions, window)}"
        )
    geometry = {
        "n_layer": found.num_hidden_layers,
        "n_head": found.num_attention_heads,
        "hidden_size": found.hidden_size,
        "vocab_size": words.n_words + SPECIAL + 1,
    }
    default = {known.name: known.default for known in fields(ModelConfig)}
    for key, value in geometry.items():
        if (own := getattr(config, key)) not in (default[key], value):
            raise UserError(f"model.{key}={own}: the decoder in {config.path} has {value}; leave it out")
    kept = {**_without(found.to_diff_dict(), "transformers_version", "_name_or_path", "dtype")}
    kept["model_type"] = raw["model_type"]
    special = {name: getattr(words.special, name) for name in ("begin", "end", "unknown")}
    architecture = json.dumps({**special, "config": kept}, sort_keys=True)
    return replace(config, **geometry, architecture=architecture)


def with_layers(config: ModelConfig, n_layer: int) -> ModelConfig:
    """The same geometry with fewer layers, to plan with: of a pretrained decoder without its weights."""
    if not config.is_pretrained:
        return replace(config, n_layer=n_layer)
    stored = stored_architecture(config)
    geometry = {**_without(stored["config"], "n_layer"), "num_hidden_layers": n_layer}
    if "layer_types" in geometry:
        geometry["layer_types"] = geometry["layer_types"][:n_layer]
    return replace(config, n_layer=n_layer, architecture=json.dumps({**stored, "config": geometry}))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a decoder's folder that transformers reads, by name.

    Raises:
        UserError: one is missing, or their index cannot be read.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {whole.name}
    if not whole.is_file() and index.is_file():
        try:
            names = {
                Path(name).name
                for name in json.loads(read_file(index, INDEX_BYTES, CURE))["weight_map"].values()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: cannot be read ({_line(error)}); get the folder again") from None
    files = [folder / name for name in sorted(names)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: missing; get the folder again from its source")
    return files


class FolderWeights(Mapping[str, Tensor]):
    """Weights in a decoder's folder, by their names in a backbone; one at a time is in memory.

    Raises:
        UserError: some are missing, or cannot be read.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], prefix: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder, self.places = folder, dict[str, tuple[Any, str]]()
        stored: dict[str, Any] = {}
        try:
            for file in weight_files(folder):
                opened = safe_open(file, framework="pt")
                stored |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.path={folder}: cannot be read ({_line(error)}); {CURE}") from None
        for name, plain in names.items():
            of_decoder = plain.partition("decoder.")[2]
            # an output table is `lm_head`, or `embed_out` of GPT-NeoX; a file of a bare decoder has no prefix
            known = [f"{prefix}.{of_decoder}", of_decoder] if of_decoder else [plain, "embed_out.weight"]
            found = next((key for key in known if key in stored), None)
            if found is None:
                raise UserError(f"model.path={folder}: lacks {known[0]}; get the folder again")
            self.places[name] = (stored[found], found)

    def __getitem__(self, name: str) -> Tensor:
        """As it is stored."""
        file, key = self.places[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.places)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.places)


def stored_architecture(config: ModelConfig) -> dict[str, Any]:
    """What `config.architecture` says.

    Raises:
        UserError: nothing, or what `from_folder` does not write.
    """
    if not config.architecture:
        raise UserError(
            f"model.path={config.path}: not read yet; plato2.model.decoder_folder.from_folder reads it"
        )
    try:
        stored = json.loads(config.architecture)
        n_words = config.vocab_size - SPECIAL - 1
        words = [stored[name] for name in ("begin", "end", "unknown")]
        in_table = all(isinstance(word, int) and 0 <= word < n_words for word in words if word is not None)
        if in_table and None not in words[:2] and stored["config"]["model_type"] in FAMILIES:
            return dict(stored)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(
        "model.architecture: not what plato2 reads from model.path; leave it out, or take another checkpoint"
    )


def build_decoder(config: ModelConfig, stored: dict[str, Any]) -> tuple[Any, Any]:
    """The causal decoder and its configuration.

    Raises:
        UserError: it cannot be read.
    """
    transformers = import_transformers(config)
    of, attention = f"model.path={config.path}", decoder_attention.register(transformers)
    try:
        geometry = transformers.AutoConfig.for_model(stored["model_type"], **_without(stored, "model_type"))
        for key in DROPOUTS:
            if hasattr(geometry, key):
                setattr(geometry, key, config.dropout)
        own = (geometry.num_hidden_layers, geometry.num_attention_heads, geometry.hidden_size)
        if own != (config.n_layer, config.n_head, config.hidden_size):
            raise ValueError(f"model.architecture has the geometry {own}")
        if torch.get_default_device().type == "meta" or not config.path:  # an exported one, filled later
            model = transformers.AutoModelForCausalLM.from_config(geometry, attn_implementation=attention)
            return model, geometry
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            config.path,
            config=geometry,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # many kinds: of transformers, safetensors and torch
        raise UserError(f"{of}: cannot be read ({_line(error)}); {CURE}") from None
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{of}: lacks {missing[0]} and {len(missing) - 1} more weights; get the folder again")
    return model.train(), geometry  # read, it is in evaluation mode, and Lightning leaves modes as they are


def import_transformers(config: ModelConfig) -> Any:
    """transformers, quiet.

    Args:
        config: of the model that needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        cure = install("lora") if config.has_adapter else install("huggingface")
        raise UserError(f"model.path: needs transformers; {cure}") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _read_config(folder: Path, given: str) -> dict[str, Any]:
    """config.json."""
    if folder.suffix == ".gguf" or (folder.is_dir() and not (folder / "config.json").is_file()):
        if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
            raise UserError(
                f"{given}: GGUF is quantised and cannot be trained; make a folder of it as "
                "experiments/rivals/smollm2.py does"
            )
        raise UserError(f"{given}: has no config.json; {CURE}")
    if not folder.is_dir():
        here = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"{given}: no such folder{here}; {CURE} (a name on a hub is not downloaded)")
    try:
        found = json.loads(read_file(folder / "config.json", CONFIG_BYTES, CURE))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{given}: config.json cannot be read ({_line(error)}); {CURE}") from None
    if not isinstance(found, dict):
        raise UserError(f"{given}: config.json holds no configuration; {CURE}")
    return found


def _check_kind(folder: Path, raw: dict[str, Any], given: str) -> None:
    """Refuses what is no causal decoder that can be trained here, before anything of it is loaded."""
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    classes = [str(name) for name in classes] if isinstance(classes, list) else [str(classes)]
    known = f"plato2 takes decoders of {', '.join(FAMILIES)}"
    if kind not in FAMILIES:
        if raw.get("is_encoder_decoder") or any("ConditionalGeneration" in name for name in classes):
            raise UserError(f"{given}: {kind} is an encoder-decoder or reads images; {known}")
        if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in classes):
            raise UserError(f"{given}: {kind} is an encoder; {known}")
        if raw.get("auto_map"):
            raise UserError(f"{given}: {kind} is a model of its own code, and none is ever run; {known}")
        raise UserError(f"{given}: its model_type is {kind}; {known}")
    if classes and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise UserError(f"{given}: holds {', '.join(classes)}, which predicts no next word; {CURE}")
    if raw.get("quantization_config"):
        raise UserError(
            f"{given}: its weights are quantised and cannot be trained; take the model they come from"
        )


def _without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
