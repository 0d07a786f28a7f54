"""Small random models in the classes of the rivals, saved as their folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the rivals need pip install '.[eval]'")
tokenizers = pytest.importorskip("tokenizers")

END = "<|endoftext|>"
TEXTS = ["hello there , how are you today ?", "i like music and old films .", "what do you do for a living ?"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER_FIRST = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"


def byte_level(specials: list[str], add_prefix_space: bool = False) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet
    )
    found.train_from_iterator(TEXTS * 3, trainer)
    return found


def save(model: Any, tokenizer: Any, folder: Path, seed: int = 0) -> Path:
    """Weights large enough that replies differ, and that sometimes end."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2(folder: Path, seed: int = 0, n_positions: int = 64) -> Path:
    core = byte_level([END])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=n_positions, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return save(transformers.GPT2LMHeadModel(config), tokenizer, folder, seed)


def llama(folder: Path, template: str = TEMPLATE, n_positions: int = 96) -> Path:
    specials = [END, "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(specials), eos_token="<|im_end|>"
    )
    if template:
        tokenizer.chat_template = template
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=n_positions,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save(transformers.LlamaForCausalLM(config), tokenizer, folder)


SIZES: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "max_position_embeddings": 48,
}  # fmt: skip


def blenderbot(folder: Path) -> Path:
    core = byte_level(["<pad>", "<s>", "</s>", "<unk>"], add_prefix_space=True)
    vocabulary = json.loads(core.to_str())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in vocabulary["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    tokenizer = transformers.BlenderbotTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), add_prefix_space=True
    )
    config = transformers.BlenderbotConfig(
        vocab_size=len(vocabulary["vocab"]), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **SIZES,
    )  # fmt: skip
    return save(transformers.BlenderbotForConditionalGeneration(config), tokenizer, folder)


def blenderbot_small(folder: Path) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz,.?'"
    newline = [("_", "_"), ("__", "n"), ("__n", "e"), ("__ne", "w"), ("__new", "l"), ("__newl", "n")]
    newline += [("__newln", "_"), ("__newln_", "_</w>")]
    words = [
        "__null__",
        "__start__",
        "__end__",
        "__unk__",
        "__newln__",
        *letters,
        *(f"{c}@@" for c in letters),
    ]
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8"
    )
    merges = ["#version: 0.2", *(" ".join(pair) for pair in newline)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = transformers.BlenderbotSmallTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    config = transformers.BlenderbotSmallConfig(
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **SIZES,
    )
    return save(transformers.BlenderbotSmallForConditionalGeneration(config), tokenizer, folder)
