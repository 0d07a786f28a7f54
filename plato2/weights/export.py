"""Trained or imported models for other programs: Knover's files, a folder for Hugging Face transformers."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from plato2 import __version__
from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.weights.folder import Saved, has_evaluation, read_saved, saved_tokenizer
from plato2.weights.knover import export_knover
from plato2.weights.model_folder import DTYPES, Lazy, Part, write_model_folder

REMOTE_CODE = (
    "plato2.batch",
    "plato2.config",
    "plato2.bounded",
    "plato2.random",
    "plato2.data.decoder_tokenizer",
    "plato2.data.packing",
    "plato2.data.samples",
    "plato2.data.tokenizer",
    "plato2.data.units",
    "plato2.model.backbone",
    "plato2.model.cpu",
    "plato2.model.heads",
    "plato2.model.losses",
    "plato2.model.masks",
    "plato2.model.networks",
    "plato2.model.noise",
    "plato2.model.pretrained",
    "plato2.talk.decode",
    "plato2.talk.rank",
    "plato2.talk.configuration_plato2",
    "plato2.talk.modeling_plato2",
)
"""The modules an exported folder carries, so that it needs no plato2: the very files that run here."""


def export_to_knover(
    out: Path, generation: Path | None, evaluation: Path | None, dtype: str | None = None
) -> dict[str, int]:
    """Writes `OUT/Plato` and/or `OUT/NSP`; returns the number of parameters in each.

    Raises:
        UserError: no model, or one with heads that Knover does not have.
    """
    parts = {}
    read = _read(generation, evaluation)
    _refuse_pretrained(read)
    for name, saved in read.items():
        if saved.use.coherence_head is not None:
            raise UserError(
                f"--{name} {saved.file}: a {saved.stage} model writes and ranks; Knover has none that does "
                "both: use plato2 export hf"
            )
        if (latent_at := saved.model_config.latent_at) != "front":
            raise UserError(
                f"--{name} {saved.file}: has model.latent_at={latent_at}, and Knover's latent is in front; "
                "use plato2 export hf"
            )
        tensors = {
            key: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for key, tensor in saved.weights.items()
        }
        parts[name] = {key: tensor.numpy() for key, tensor in tensors.items()}
    return export_knover(out, parts, dtype)


def export_to_huggingface(
    out: Path, generation: Path | None, evaluation: Path | None, dtype: str | None = None
) -> list[str]:
    """Writes a model folder with the code that transformers needs; returns the names of its parts.

    Raises:
        UserError: no model.
    """
    read, tokenizer, parts = _parts(generation, evaluation, dtype)
    _refuse_pretrained(read)
    stored = {parameter.dtype for part in parts.values() for parameter in part.parameters.values()}
    extra = {
        "model_type": "plato2",
        "architectures": ["Plato2Model"],
        "auto_map": {
            "AutoConfig": "configuration_plato2.Plato2Config",
            "AutoModel": "modeling_plato2.Plato2Model",
        },
        "dtype": str(torch.float32 if torch.float32 in stored else stored.pop()).removeprefix("torch."),
        "tie_word_embeddings": True,
    }
    code = {f"{name.rpartition('.')[2]}.py": remote_source(name) for name in REMOTE_CODE}
    write_model_folder(out, parts, tokenizer, _card(read), extra, files=code)
    return list(parts)


def export_folder(
    out: Path, generation: Path | None, evaluation: Path | None, card: str, dtype: str | None = None
) -> None:
    """Writes a model folder of plato2's own, without code; `card` is its README.md.

    Raises:
        UserError: no model, or there is something at `out`.
    """
    _, tokenizer, parts = _parts(generation, evaluation, dtype)
    write_model_folder(out, parts, tokenizer, card)


def remote_source(module: str) -> str:
    """The source of a module with its plato2 imports made relative: the export is one folder.

    The module is read, not imported: two of them import transformers, which is not needed to write a folder.
    """
    package, _, name = module.partition(".")
    source = files(package).joinpath(f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    source = re.sub(r"^from plato2\.model import (\w+(?:, \w+)*)$", r"from . import \1", source, flags=re.M)
    return re.sub(r"^( *)from plato2\.(?:\w+\.)*(\w+) import ", r"\1from .\2 import ", source, flags=re.M)


def _parts(
    generation: Path | None, evaluation: Path | None, dtype: str | None
) -> tuple[dict[str, Saved], Tokenizer, dict[str, Part]]:
    """The models as they were found, their tokenizer, and what of them a model folder gets."""
    read = _read(generation, evaluation)
    tokenizer = _one_tokenizer([path for path in (generation, evaluation) if path])
    parts = {}
    for name, saved in read.items():
        parameters = {
            key: Lazy(
                tuple(tensor.shape),
                DTYPES[dtype] if dtype else tensor.dtype,
                lambda tensor=tensor: tensor,  # type: ignore[misc]
            )
            for key, tensor in saved.weights.items()
        }
        parts[name] = Part(saved.stage, saved.use, saved.arguments, parameters, saved.absent, saved.figures)
    return read, tokenizer, parts


def _read(generation: Path | None, evaluation: Path | None) -> dict[str, Saved]:
    if generation is None and evaluation is None:
        raise UserError("give --generation, --evaluation or both: there is nothing to export")
    if evaluation is None and generation is not None and has_evaluation(generation):
        evaluation = generation
    read = {}
    if generation is not None:
        read["generation"] = read_saved(generation, option="--generation", role="generation")
    if evaluation is not None:
        read["evaluation"] = read_saved(evaluation, option="--evaluation", role="evaluation")
    return read


def _refuse_pretrained(read: dict[str, Saved]) -> None:
    for name, saved in read.items():
        if saved.model_config.is_pretrained:
            raise UserError(
                f"--{name} {saved.file}: is made of a pretrained decoder, which cannot be exported yet; "
                "plato2 itself reads the run"
            )


def _one_tokenizer(paths: list[Path]) -> Tokenizer:
    tokenizers = [saved_tokenizer(path) for path in paths]
    if len({tokenizer.sha256 for tokenizer in tokenizers}) > 1:
        raise UserError(
            f"{paths[0]} and {paths[1]} were trained with different tokenizers; give models of one curriculum"
        )
    return tokenizers[0]


def _card(read: dict[str, Saved]) -> str:
    rows = [f"| {name} | `{s.stage}` | {_size(s.arguments['model'])} |" for name, s in read.items()]
    return f"""---
library_name: transformers
tags: [dialogue, plato-2]
---
# PLATO-2

| part | stage | size |
| --- | --- | --- |
{chr(10).join(rows)}

Exported by `plato2 export hf` of plato2 {__version__}, without optimizer state. The licence is that of the
weights it was made from.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("DIR", trust_remote_code=True)
for candidate in model.reply(["hi , how was your day ?"]):
    print(candidate.coherence, candidate.latent, candidate.text)
```

The code in this folder is that of plato2; it needs torch, sentencepiece and transformers. With plato2
installed: `plato2 chat --generation DIR`.
"""


def _size(model: dict[str, Any]) -> str:
    return f"{model['n_layer']} layers, {model['n_head']} heads, hidden {model['hidden_size']}"
