"""Folders of small random decoders of each family, as transformers writes them, with one tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small import WORDS

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "phi3": {"num_key_value_heads": 4},
    "gpt2": {"n_inner": 64},
    "gpt_neox": {"rotary_pct": 0.5},
}
"""model_type: what is particular about it here."""


def mostly_slow(*quick: str) -> list[Any]:
    """All families, as parameters of a test; in the default run these alone."""
    return [
        family if family in quick else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
    ]


@cache
def words() -> str:
    """tokenizer.json of a byte-level BPE of some hundred pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<begin>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, **special: str | None) -> Path:
    """The tokenizer as `save_pretrained` writes it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>"} | special
    backend = tokenizers.Tokenizer.from_str(words())
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def write_decoder(folder: Path, family: str = "llama", begin: bool = True, **changed: Any) -> Path:
    """A decoder with random weights that are not small, so that what it reads matters, and its tokenizer."""
    import torch
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    size |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}
    size |= {} if family == "gpt2" else {"intermediate_size": 48}
    config = transformers.AutoConfig.for_model(family, **size | FAMILIES[family] | changed)
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return write_tokenizer(folder, **({} if begin else {"bos_token": None}))


def rounded(folder: Path, to: Path) -> Path:
    """The same decoder with weights that bfloat16 has, as those of most that are given away."""
    import torch
    import transformers

    shutil.copytree(folder, to)
    transformers.AutoModelForCausalLM.from_pretrained(to, dtype=torch.bfloat16).save_pretrained(to)
    return to


def written_once(base: Path) -> Callable[[str], Path]:
    """The folder of a decoder of a family, written when it is first asked for."""
    return cache(lambda family: write_decoder(base / family, family))
