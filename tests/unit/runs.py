"""Run folders as train.py writes them, with untrained models, for the tests of everything that reads them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from plato2.config import ModelConfig
from plato2.data.samples import encode_context, encode_response
from plato2.data.shards import ShardIndex, ShardWriter, SplitIndex, write_index
from plato2.data.tokenizer import Tokenizer
from plato2.runs.folder import RunFolder
from plato2.stages import Stage, known_stages

STAGES = known_stages()

KNOVER = Path(__file__).parents[1] / "fixtures" / "knover"
MODEL: dict[str, Any] = {"n_layer": 1, "n_head": 2, "hidden_size": 16, "n_latent": 5, "dropout": 0.1}


def make_stage(name: str, head: str | None = None, **model: Any) -> Any:
    """A stage whose weights are large enough that candidates differ, and that sometimes ends a reply."""
    arguments: dict[str, Any] = {"head": head} if head else {}
    stage: Stage = STAGES[name](ModelConfig(**(MODEL | model)), **arguments)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
        stage.backbone.lm_bias[2] = 4.0
    return stage.eval()


def checkpoint_of(stage: Stage, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint holds, as far as talking goes."""
    return {
        "stage": stage.name,
        "use": asdict(stage.use),
        "state_dict": stage.state_dict(),
        "hyper_parameters": dict(stage.hparams),
        "tokenizer_sha256": tokenizer.sha256,
        "global_step": 7,
    }


def make_run(folder: Path, name: str, tokenizer_folder: Path = KNOVER, **model: Any) -> Path:
    """A run folder of that stage."""
    run = RunFolder(folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    run.checkpoints.mkdir(parents=True)
    run.tokenizer.mkdir()
    for file in ("spm.model", "vocab.txt"):
        shutil.copy(tokenizer_folder / file, run.tokenizer / file)
    stage = make_stage(name, vocab_size=tokenizer.vocab_size, **model)
    torch.save(checkpoint_of(stage, tokenizer), run.last)
    use, monitor = asdict(stage.use), list(stage.monitor)
    run.write_lineage(
        stage=name, use=use, monitor=monitor, model="tiny", run_id=folder.name, status="finished"
    )
    return folder


def write_metrics(run: Path, rows: list[tuple[int, str, float]]) -> None:
    """A run's metrics.csv."""
    with (run / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "metric", "value"), *rows])


def make_corpus(folder: Path, pairs: list[tuple[list[str], str]], shard_samples: int = 4) -> Path:
    """A prepared corpus with these (turns, response) as its validation split."""
    tokenizer = Tokenizer.load(KNOVER)
    writer = ShardWriter(folder, "valid", tokenizer.vocab_size, shard_samples)
    for turns, response in pairs:
        context = encode_context([tokenizer.encode(turn) for turn in turns])
        assert context is not None
        writer.write([context + encode_response(tokenizer.encode(response))], [len(context)])
    splits = {"valid": SplitIndex(tuple(writer.close()))}
    unigram = {"nll": 6.2, "ppl": 492.7}
    index = ShardIndex(tokenizer.sha256, tokenizer.vocab_size, 128, 128, splits, unigram)
    write_index(folder, index)
    tokenizer.save(folder / "tokenizer")
    return folder


def small_tokenizer_texts() -> Iterator[str]:
    """Texts for another tokenizer than Knover's."""
    yield from (f"hello number {number} , how are you today ?" for number in range(200))
