"""`python -m benchmarks.pretrained FOLDER`: where the latent stands, what weights are kept in, who sees whom.

Finding K = 20 candidates with the latent in front of the context and after it, at three lengths of the
context, and in each precision; how much memory the weights take then, and how far scores change. With
`--data`, training on packed rows of that corpus, with attention by sample and with a dense mask. FOLDER is a
causal decoder of Hugging Face's, with random latents, or a generation model of ours, such as small. All sides
of a comparison take turns in one process; a ratio is the median over rounds of CPU seconds.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.report import Command, Say, machine, median_ratio, progress, report, show, table
from plato2.commands import main
from plato2.config import DecodeConfig, ModelConfig, UserError, expand_path
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.model import losses
from plato2.model.backbone import INIT_STD
from plato2.model.int8 import quantise
from plato2.model.networks import GenerationNetwork
from plato2.runs.parallel import best_precision
from plato2.talk.decode import decode
from plato2.talk.score import Record, score

CONTEXTS = (32, 64, 128)
"""Tokens of the context."""
NEW_TOKENS = 16
UNIT_TOKENS, ROWS = 1024, (256, 1024)
"""What is trained on: slots of a unit, and of its rows."""
SCORED = 8
"""Contexts whose candidates are scored in each precision."""


def network_of(folder: Path, **changed: Any) -> GenerationNetwork:
    """The decoder in a folder, with latents and fields of its `ModelConfig` changed, or a model of ours.

    Raises:
        UserError: neither.
    """
    from plato2.data.decoder_tokenizer import DecoderTokenizer
    from plato2.model.decoder_folder import from_folder
    from plato2.weights.folder import load_generation

    if not (folder / "tokenizer.json").is_file():
        return load_generation(folder)
    config = ModelConfig(path=str(folder), max_position=256, dropout=0.0, context_mask="causal", **changed)
    network = GenerationNetwork(from_folder(config, DecoderTokenizer.from_model), has_latents=True)
    assert network.recognition is not None
    nn.init.normal_(network.recognition.latent_embedding, std=INIT_STD)
    return network.eval()


def at(network: GenerationNetwork, latent_at: str) -> GenerationNetwork:
    """The same weights with the latent elsewhere."""
    moved = copy.copy(network)
    moved._modules = dict(network._modules)
    moved.backbone = copy.copy(network.backbone)
    moved.backbone.config = moved.model_config = replace(network.model_config, latent_at=latent_at)
    return moved


def context_of(network: GenerationNetwork, length: int, seed: int = 0) -> list[int]:
    """Random words in turns of eight."""
    words = random.Random(seed).choices(range(100, network.model_config.vocab_size - 1), k=length - 1)
    return [BOS_ID, *(EOS_ID if place % 8 == 7 else word for place, word in enumerate(words[:-1])), EOS_ID]


def cpu_in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each side by round, after a warm-up round: another process does not change them much."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + rounds):
        for name, side in sides.items():
            begin = time.process_time()
            side()
            if number:
                seconds[name].append(time.process_time() - begin)
    return seconds


def weight_bytes(network: nn.Module) -> int:
    """What the weights take."""
    total = 0
    for weight in network.parameters():
        parts = [getattr(weight, name, None) for name in ("qdata", "scale")]  # of torchao's tensors
        held = [part for part in parts if isinstance(part, torch.Tensor)] or [weight]
        total += sum(part.numel() * part.element_size() for part in held)
    return total


def bench_pretrained(
    folder: Path,
    rounds: int,
    new_tokens: int,
    lengths: Sequence[int] = CONTEXTS,
    data: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """All ratios, the seconds and sizes behind them, and the machine.

    Raises:
        UserError: there is no model in the folder, or torchao is not installed.
    """
    begin = time.monotonic()
    ratios: dict[str, float | None] = {}
    seconds: dict[str, float] = {}
    if data is not None:
        for row_length in ROWS:
            say(f"training on rows of {row_length} tokens")
            found = cpu_in_turns(training_sides(folder, data, row_length), rounds)
            of = f"training, rows of {row_length}"
            seconds |= {f"{of}, {side}": round(statistics.median(s), 3) for side, s in found.items()}
            ratios[f"{of}: dense mask over by sample"] = median_ratio(found["dense mask"], found["by sample"])
    networks = {"float32": network_of(folder)}
    networks["bfloat16"] = copy.deepcopy(networks["float32"]).to(torch.bfloat16)
    networks["int8"] = copy.deepcopy(networks["bfloat16"])
    quantise(networks["int8"].backbone)
    fixed = DecodeConfig(max_tokens=new_tokens, min_tokens=new_tokens)
    longest = networks["float32"].model_config.max_position // 2
    for length in sorted({min(length, longest) for length in lengths}):
        say(f"a context of {length} tokens")
        contexts = [context_of(networks["float32"], length)]
        sides = {
            f"{precision}, {latent_at}": partial(decode, at(network, latent_at), contexts, fixed)
            for precision, network in networks.items()
            for latent_at in ("front", "response")
        }
        found = cpu_in_turns(sides, rounds)
        seconds |= {f"{length} tokens, {side}": round(statistics.median(s), 3) for side, s in found.items()}
        for precision in networks:
            ratio = median_ratio(found[f"{precision}, front"], found[f"{precision}, response"])
            ratios[f"{precision}: front over response, {length} tokens"] = ratio
        for precision in ("bfloat16", "int8"):
            ratio = median_ratio(found["float32, response"], found[f"{precision}, response"])
            ratios[f"{precision}: times as fast as float32, response, {length} tokens"] = ratio
    say("scores")
    return {
        **report(ratios, {}),
        "seconds": seconds,
        "megabytes": {name: round(weight_bytes(network) / 1e6, 1) for name, network in networks.items()},
        "scores": scores(networks, fixed, longest),
        "machine": machine(),
        "settings": {"folder": str(folder), "data": data, "new_tokens": new_tokens, "rounds": rounds},
        "wall_s": round(time.monotonic() - begin, 1),
    }


def training_sides(folder: Path, data: str, row_length: int) -> dict[str, Callable[[], object]]:
    """Stage 1's pass over the first unit of a corpus and back, in the precision of training on this CPU.

    A decoder is trained low-rank, as on CPUs it mostly is, a model of ours whole.

    Raises:
        UserError: there is no such corpus, or its tokenizer is another one.
    """
    network = network_of(folder, adapter="lora", adapter_rank=8, adapter_alpha=16)
    backbone, bf16 = network.backbone, best_precision("cpu") == "bf16-mixed"
    module = DialogueDataModule(
        expand_path(data, "--data"),
        GenerationBatch(),
        UNIT_TOKENS,
        unit_tokens=UNIT_TOKENS,
        row_length=row_length,
    )
    module.setup()
    if module.vocab_size != network.model_config.vocab_size:
        raise UserError(f"--data {data}: was prepared with another tokenizer than that of {folder}")
    unit = next(iter(module.train_dataloader()))["units"][0]

    def train(is_dense: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            seen = unit["segment_ids"], unit["type_ids"]
            mask = backbone.dense_mask(*seen, backbone.attention_dtype) if is_dense else backbone.mask(*seen)
            x = backbone.embed_unit(unit)
            h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
            nll = losses.nll(backbone.lm_logits(h), unit["target_ids"])
        nll.mean().backward()
        network.zero_grad()

    return {"by sample": partial(train, False), "dense mask": partial(train, True)}


def scores(networks: dict[str, GenerationNetwork], fixed: DecodeConfig, longest: int) -> dict[str, Any]:
    """How log p(r|c) of what float32 says changes: of a token, and of which candidate is the best."""
    own = networks["float32"]
    contexts = [context_of(own, min(32, longest), seed) for seed in range(SCORED)]
    found = {}
    records = [
        Record(context, [BOS_ID, *hypothesis.token_ids])
        for context, hypotheses in zip(contexts, decode(own, contexts, fixed), strict=True)
        for hypothesis in hypotheses
    ]
    for name, network in networks.items():
        plain = copy.copy(network)
        plain._modules = {
            **network._modules,
            "recognition": None,
        }  # with each latent it would take 20 times as long
        scored = score(plain, records)
        found[name] = torch.tensor([each["nll"] / each["n_tokens"] for each in scored]).view(SCORED, -1)
    told = {}
    for name, nll in found.items():
        pairs = (nll[:, :, None] < nll[:, None]) == (found["float32"][:, :, None] < found["float32"][:, None])
        n = nll.shape[1]
        told[name] = {
            "perplexity": round(math.exp(nll.mean()), 3),
            "change_nats_a_token": round(float((nll - found["float32"]).abs().mean()), 4),
            "same_best": float((nll.argmin(1) == found["float32"].argmin(1)).float().mean()),
            "same_order_of_two": round(float((pairs.float().sum((1, 2)) - n).mean() / (n * n - n)), 4),
        }
    return told


HELP = """The latent in front of the context and after it; float32, bfloat16 and int8; attention by sample.

FOLDER is that of a causal decoder, as save_pretrained writes it, or a generation model of ours. It takes
some minutes, and needs torchao.

[bold]Examples[/]

python -m benchmarks.pretrained models/SmolLM2-135M

python -m benchmarks.pretrained models/SmolLM2-135M --data data/mine

python -m benchmarks.pretrained small --json
"""
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command, help=HELP)
def run(
    folder: Annotated[Path, typer.Argument(help="A decoder, or a generation model of ours.")],
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 5,
    context: Annotated[list[int], typer.Option(help="Tokens of the context; may be repeated.")] = [*CONTEXTS],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens of each candidate.")] = NEW_TOKENS,
    data: Annotated[
        str | None,
        typer.Option(help="A corpus prepared with its tokenizer, to train on; without it no training."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """`python -m benchmarks.pretrained`."""
    with progress() as say:
        found = bench_pretrained(folder, rounds, new_tokens, context, data, say)
    times = table(
        "CPU seconds for 20 candidates of one context, and for training on 1,024 slots", ("side",), ("s",)
    )
    for side, value in found["seconds"].items():
        times.add_row(side, f"{value:g}")
    told = table(
        "What the weights are kept in", ("precision",), ("MB", "perplexity", "change", "best", "order")
    )
    for name, one in found["scores"].items():
        told.add_row(name, f"{found['megabytes'][name]:g}", *(f"{value:g}" for value in one.values()))
    show(found, as_json, "Ratios (medians of alternating rounds, CPU seconds)", (times, told))


if __name__ == "__main__":
    main(app, "python -m benchmarks.pretrained")
