"""`python -m benchmarks.decoder_memory`: what training a pretrained decoder takes, by `plan=json`.

The table of docs/pretrained.md. Decoders of known geometry are written as folders with a config.json and a
tokenizer of as many words, without weights, and train.py is asked what a run on one GPU would need.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import Command
from plato2.commands import main

_LLAMA = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192}
_LLAMA |= {"tie_word_embeddings": True}
_QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
DECODERS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "SmolLM2-360M": _LLAMA
    | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
    | {"num_attention_heads": 15, "num_key_value_heads": 5},
    "SmolLM2-1.7B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "Qwen2.5-7B": _QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
"""What is in config.json, by the name of a model that has it."""
WAYS = {
    "whole": ["model=pretrained"],
    "low-rank": ["model=pretrained_lora", "model.base_dtype=bfloat16"],
}
COLUMNS = ["", "", "trained", "GiB", "GiB, ckpt", "24 GB", "24 GB, ckpt", "80 GB", "80 GB, ckpt"]
GPUS = ("L4-24G", "A100-80G")


def write_folder(folder: Path, geometry: dict[str, Any]) -> Path:
    """A decoder's folder without weights; its words have no meaning, but there are as many."""
    folder.mkdir(parents=True)
    words = {f"w{number}": number for number in range(geometry["vocab_size"])}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w1"}}
    (folder / "config.json").write_text(json.dumps(geometry), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w0"}', encoding="utf-8")
    return folder


def planned(folder: Path, *overrides: str) -> dict[str, Any]:
    """What `python train.py ... plan=json` says of a run on one GPU, in the recipe's units."""
    from plato2.commands.train import composed, train_composed

    data = [f"data.path={folder / 'data'}", "data=shards"]  # not there: samples have the usual lengths
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_composed(composed(f"model.path={folder}", *data, "strategy=gpu", "plan=json", *overrides))
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def row(folder: Path, name: str, way: str) -> list[str]:
    """The row of a decoder and a way to train it, stage 1."""
    plan = planned(folder, *WAYS[way])
    totals, limits = plan["total_memory_bytes"], plan["largest_unit_tokens"]
    both = ("without_checkpointing", "with_checkpointing")
    cells = [f"{totals[key] / 2**30:.1f}" for key in both]
    cells += [f"{limits[gpu][key]:,}" if limits[gpu][key] else "none" for gpu in GPUS for key in both]
    return [name, way, f"{plan['trained_parameters'] / 1e6:,.0f} M", *cells]


def as_line(cells: list[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def rows(names: Iterable[str], ways: Iterable[str]) -> list[list[str]]:
    """Rows of decoders, each in all of these ways."""
    with tempfile.TemporaryDirectory() as base:
        folders = {name: write_folder(Path(base) / name, DECODERS[name]) for name in names}
        return [row(folder, name, way) for name, folder in folders.items() for way in ways]


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command, help="The memory table of docs/pretrained.md, by plan=json.")
def run(
    decoder: Annotated[list[str], typer.Option(help="Of the table; may be repeated.")] = [*DECODERS],  # noqa: B006
) -> None:
    """`python -m benchmarks.decoder_memory`."""
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print(as_line(cells))
    for name in decoder:
        for cells in rows([name], WAYS):
            print(as_line(cells), flush=True)


if __name__ == "__main__":
    main(app, "python -m benchmarks.decoder_memory")
