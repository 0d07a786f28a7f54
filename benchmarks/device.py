"""The parts of benchmarks/device.sh: each measures one thing on one GPU and writes its entry of device.json.

    python -m benchmarks.device --out OUT --work FOLDER --deadline T [--dry-run] PART

    machine          GPU, driver, versions, the rate of a matrix product, and the attention kernels that take
                     our masks
    tests            the tests marked `gpu`
    train MODEL      stages 1, 2.1 and 2.2 for some seconds each: tokens/s, MFU, memory, losses
    decode MODEL     20 candidates and their ranking, random weights, 1, 8 and 32 contexts at once
    evening [MODEL]  experiment=evening for the time that is left, then replies to 20 validation contexts

A part stops by itself at T (seconds since 1970). Whatever it found until then is in the file. Configurations
are composed from conf/, as train.py does; --dry-run puts a CPU, two layers and seconds in their place.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import report
from benchmarks.device_results import Results
from benchmarks.networks import random_networks
from benchmarks.report import in_turns
from plato2.commands.train import train_composed
from plato2.config import DecodeConfig, ModelConfig, TrainConfig
from plato2.data.examples import Example, read_examples
from plato2.data.tokenizer import Tokenizer
from plato2.runs.console import quiet_lightning
from plato2.runs.parallel import best_precision
from plato2.runs.parts import build_parts, build_stage
from plato2.runs.plan import peak_flops, step_flops
from plato2.runs.saved import last_metrics, read_metrics
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.decode import decode
from plato2.talk.rank import coherence

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DEVICE_DATA", ROOT / "benchmarks" / "data"))
GIB = 1024**3

STAGES = ("1_coarse", "2_gen", "2_eval")
WARM_STEPS = 3
"""Steps that are not timed: memory is allocated, kernels are chosen."""
MOST_STEPS = 60
UNITS = {"93m": (32768, 65536), "314m": (16384, 65536), "1.6b": (8192, 32768)}
"""Tokens of a unit and of a step: large enough to fill a GPU, small enough for 80 GB in stage 2.1."""
OTHER_UNITS = (8192, 32768)
"""Of any other model."""

CONTEXTS = (1, 8, 32)
NEW_TOKENS = 24
"""Of every candidate: what a response of chitchat has on average. Random weights do not know where to end."""

EVENING = {"1_coarse": 0.5, "2_gen": 0.2, "2_eval_dual": 0.15, "2_eval": 0.15}
"""The stages' shares of the time for steps."""
OVERHEAD_S = 12.0
"""Seconds of a stage that are not steps: building, validating, saving. A guess until one has shown them."""
TALK_S = 15.0
"""Seconds for the replies at the end."""
EVENING_TOKENS = 32768
"""Of a unit and of a step; the recipes have 4,096, which would leave a GPU idle."""
RECIPE_HIDDEN = 256
"""Width of the model that the recipes' learning rates are for; wider ones take proportionally less."""
EPOCHS = 2.0
"""A model is trained for the evening if its stage 1 reads the corpus so often in its share of the time."""
N_DIALOGUES, N_SHOWN = 20, 5

TINY = ("model.n_layer=2", "model.n_head=2", "model.hidden_size=64")
"""What a dry run puts in the place of every size."""


@dataclass(frozen=True)
class Part:
    """What every part is given."""

    name: str
    out: Path
    work: Path
    deadline: float
    dry_run: bool

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def strategy(self) -> str:
        """The strategy of train.py."""
        return "cpu" if self.dry_run else "gpu"

    @property
    def tiny(self) -> tuple[str, ...]:
        """Overrides of a dry run."""
        return TINY if self.dry_run else ()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def write(self, **values: Any) -> None:
        """Puts values into the part's entry of device.json."""
        Results(self.out).write(self.name, **values)


def compose(model: str, stage: str, *overrides: str) -> DictConfig:
    """The configuration of `python train.py model=MODEL stage=STAGE OVERRIDES`."""
    given = [f"model={model}", f"stage={stage}", f"name={model}-{stage}", f"model_name={model}", *overrides]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=given)


def free_memory() -> None:
    """Gives back what the last model held, and starts to count anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    """Waits for the device; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------- machine


def machine(part: Part) -> None:
    """What is measured on."""
    part.write(
        device=torch.cuda.get_device_name(part.device) if not part.dry_run else "cpu",
        memory_gib=round(torch.cuda.get_device_properties(part.device).total_memory / GIB, 1)
        if not part.dry_run
        else None,
        driver=first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        commit=first_line("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        python=platform.python_version(),
        **report.machine(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        packages={name: metadata.version(name) for name in ("pytorch-lightning", "hydra-core", "numpy")},
        precision=best_precision(part.strategy),
        dry_run=part.dry_run,
    )
    part.write(product_tflops=round(product_flops(part) / 1e12, 4))
    part.write(attention=attention_kernels(part))


def first_line(*command: str) -> str | None:
    """What a command says, or None where it is not there or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip() if done.stdout else None
    return None


def product_flops(part: Part) -> float:
    """FLOP/s of a square bf16 matrix product."""
    size = 256 if part.dry_run else 8192
    a, b = (torch.randn(size, size, device=part.device).bfloat16() for _ in range(2))
    return 2 * size**3 / median_seconds(part, lambda: a @ b)


def median_seconds(part: Part, call: Callable[[], object], rounds: int = 10) -> float:
    """Of a call, after three that do not count."""

    def whole_call() -> None:
        call()
        synchronize(part.device)

    synchronize(part.device)
    return statistics.median(in_turns({"call": whole_call}, rounds, warm=3)["call"])


def attention_kernels(part: Part) -> dict[str, Any]:
    """Milliseconds, forward and backward, of each kernel on packed rows of 93m; or why it does not take them.

    `chosen` is what PyTorch takes by itself. The mask is a dense one, as training has it.
    """
    rows, heads, length = (1, 2, 64) if part.dry_run else (64, 12, 512)
    shape = (rows, heads, length, 64)
    query, key, value = (
        torch.randn(shape, device=part.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    blocks = torch.arange(length, device=part.device) // (length // 4)
    mask = torch.zeros(rows, 1, length, length, device=part.device, dtype=torch.bfloat16)
    mask.masked_fill_(blocks[:, None] != blocks[None, :], float("-inf"))
    kernels: dict[str, list[SDPBackend] | None] = {
        "chosen": None,
        "efficient": [SDPBackend.EFFICIENT_ATTENTION],
        "cudnn": [SDPBackend.CUDNN_ATTENTION],
        "flash": [SDPBackend.FLASH_ATTENTION],
        "math": [SDPBackend.MATH],
    }
    found: dict[str, Any] = {}
    for name, kernel in kernels.items():
        for dropout in (0.0, 0.1):

            def call(dropout: float = dropout) -> None:
                context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
                context.sum().backward()

            with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
                try:
                    found[f"{name}_dropout_{dropout}"] = round(1000 * median_seconds(part, call, 5), 3)
                except RuntimeError as error:
                    found[f"{name}_dropout_{dropout}"] = str(error).splitlines()[0]
    return found


# --------------------------------------------------------------------------------------------------- tests


def tests(part: Part) -> None:
    """The tests marked `gpu`; in a dry run the same on the CPU.

    Raises:
        SystemExit: one failed, or there was none.
    """
    results = part.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=--strict-markers"]
    command += ["-p", "no:cacheprovider", f"--junit-xml={results}", str(ROOT / "tests" / "test_gpu.py")]
    variables = {"PLATO2_TEST_DEVICE": part.device.type}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if not results.exists():
        part.write(error=done.stdout[-4000:])
        raise SystemExit(done.returncode or 1)
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    bad = [
        f"{case.attrib['name']}: {(case.find(kind).attrib.get('message') or '')[:500]}"  # type: ignore[union-attr]
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        if case.find(kind) is not None
    ]
    passed = total - failures - errors - skipped
    part.write(passed=passed, failures=failures + errors, skipped=skipped, failed_tests=bad)
    if done.returncode or not passed:
        raise SystemExit(done.returncode or 1)


# ------------------------------------------------------------------------------------------------ training


class Watch(pl.Callback):
    """Times whole steps, the loading of their units included, counts what they trained on, and ends in time.

    Args:
        config: the geometry.
        passes: passes through the backbone in a step.
        until: on `time.monotonic`; the run ends before the step that would end later.
    """

    def __init__(self, config: ModelConfig, passes: int, until: float) -> None:
        self.config, self.passes, self.until = config, passes, until
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens = self.samples = 0
        self.flops = self.loading_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step's units are there."""
        if batch_idx >= WARM_STEPS:
            self.loading_s += time.perf_counter() - self.began

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step unless it is one of the first."""
        synchronize(pl_module.device)
        seconds = time.perf_counter() - self.began
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if batch_idx >= WARM_STEPS:
            self.seconds.append(seconds)
            for unit in batch["units"]:
                tokens, samples = int((unit["segment_ids"] > 0).sum()), len(unit["sample_index"])
                targets = len(unit["target_index"])
                self.tokens, self.samples = self.tokens + tokens, self.samples + samples
                self.flops += step_flops(self.config, tokens, samples, targets, self.passes)
        if self.seconds and time.monotonic() + seconds > self.until:
            trainer.should_stop = True
        self.began = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of weights and optimizer: Lightning would carry them to the CPU, for seconds at 1.6b."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for parameter in pl_module.parameters():
            parameter.data, parameter.grad = parameter.data.new_empty(0), None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The same, when there was no room for them."""
        self.on_train_end(trainer, pl_module)


def measure(config: DictConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Trains a stage from random weights for this many seconds, with nothing but its steps.

    Args:
        config: what train.py would be given.
        device: the model is built there, since drawing 1.6 billion numbers takes a CPU a while.
        seconds: for everything, building the model included; one step is timed in any case.

    Returns:
        Tokens and samples a second (real ones, no padding), median seconds of a step, MFU, memory, losses.
    """
    until = time.monotonic() + seconds
    quiet_lightning()
    free_memory()
    keys: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    stage, _, data = build_parts(keys)
    stage = build_stage(keys, str(device))
    strategy = dict(keys.strategy)
    if strategy["precision"] == "auto":
        strategy["precision"] = best_precision(str(strategy["accelerator"]))
    parameters = sum(parameter.numel() for parameter in stage.parameters())
    watch = Watch(keys.model, stage.passes, until)
    trainer = pl.Trainer(
        **strategy,
        max_steps=keys.trainer["max_steps"],
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(stage, data)
    total_s, cuda = sum(watch.seconds), device.type == "cuda"
    return {
        "tokens_per_s": watch.tokens / total_s,
        "samples_per_s": watch.samples / total_s,
        "step_s": statistics.median(watch.seconds),
        "loading_share": watch.loading_s / total_s,
        "mfu": watch.flops / total_s / peak_flops(device, str(strategy["precision"])),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "reserved_memory_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "loss_first": watch.losses[0],
        "loss_last": watch.losses[-1],
        "losses": watch.losses,
        "timed_steps": len(watch.seconds),
        "tokens_per_step": watch.tokens / len(watch.seconds),
        "unit_tokens": data.batching.unit_tokens,
        "units_per_step": data.units_per_step,
        "parameters": parameters,
        "checkpoint_activations": keys.model.checkpoint_activations,
        "precision": strategy["precision"],
    }


def train_model(part: Part, model: str) -> None:
    """Speed and memory of the three stages at one size.

    Without activation checkpointing where that fits, and else with it.

    Raises:
        SystemExit: a stage failed; the others were measured.
    """
    unit_tokens, batch_tokens = (2048, 4096) if part.dry_run else UNITS.get(model, OTHER_UNITS)
    common = (
        *("recipe=none", f"data.path={DATA / 'chitchat'}", "data.prepare=null", f"strategy={part.strategy}"),
        *("optim.lr=3e-4", "optim.warmup_steps=10", "optim.clip_norm=1.0"),
        *(f"optim.batch_tokens={batch_tokens}", f"data.unit_tokens={unit_tokens}"),
        *(f"trainer.max_steps={WARM_STEPS + 2 if part.dry_run else MOST_STEPS}", *part.tiny),
    )
    stages: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(STAGES):
        for checkpointing in ("false", "true"):
            config = compose(model, stage, *common, f"model.checkpoint_activations={checkpointing}")
            try:
                stages[stage] = measure(config, part.device, part.left / (len(STAGES) - number))
            except torch.OutOfMemoryError as error:
                stages[stage] = {"error": str(error).splitlines()[0]}
            except Exception as error:  # recorded; the other stages may fare better
                stages[stage] = {"error": f"{type(error).__name__}: {error}"}
                break
            if "error" not in stages[stage]:
                break
        part.write(stages=stages)
        print(stage, stages[stage], flush=True)
    if any("error" in found for found in stages.values()):
        raise SystemExit(1)


# ------------------------------------------------------------------------------------------------ decoding


def decode_model(part: Part, model: str) -> None:
    """Finding 20 candidates and ranking them, random weights, contexts of the validation split."""
    keys: TrainConfig = OmegaConf.to_object(compose(model, "2_gen", *part.tiny))  # type: ignore[assignment]
    dtype = torch.float32 if part.dry_run else torch.bfloat16
    with torch.device(part.device):
        generation, (first, dual) = random_networks(keys.model, "first", "dual")
    for network in (generation, first, dual):
        network.to(dtype)
    new_tokens = 4 if part.dry_run else NEW_TOKENS
    settings = DecodeConfig(top_k=10, max_tokens=new_tokens, min_tokens=new_tokens)
    folder = DATA / "chitchat"
    examples = read_examples(folder, Tokenizer.load(folder / "tokenizer"), max(CONTEXTS))
    contexts = [example.context_ids for example in examples]
    part.write(
        weights="random",
        precision=str(dtype).removeprefix("torch."),
        candidates=keys.model.n_latent,
        new_tokens=new_tokens,
        context_tokens=statistics.mean(map(len, contexts)),
        parameters=sum(parameter.numel() for parameter in generation.parameters()),
    )

    def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(part.device)
        began = time.perf_counter()
        found = call()
        synchronize(part.device)
        return time.perf_counter() - began, found

    batches: dict[str, dict[str, Any]] = {}
    for number, n in enumerate(CONTEXTS):
        some, until = contexts[:n], time.time() + part.left / (len(CONTEXTS) - number)
        rounds: list[tuple[float, float, float]] = []
        while len(rounds) < 2 or (time.time() < until and len(rounds) < 20):
            decode_s, found = seconds(lambda some=some: decode(generation, some, settings))  # type: ignore[misc]
            pairs = [(c, h.words) for c, hypotheses in zip(some, found, strict=True) for h in hypotheses]
            rank_s, _ = seconds(lambda pairs=pairs: coherence(first, pairs))  # type: ignore[misc]
            dual_s, _ = seconds(lambda pairs=pairs: coherence(dual, pairs))  # type: ignore[misc]
            rounds.append((decode_s, rank_s, dual_s))
            if number == 0 and len(rounds) == 1:  # kernels are loaded and chosen
                part.write(first_reply_s=round(decode_s + rank_s, 3))
        decode_s, rank_s, dual_s = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        batches[str(n)] = {
            "replies_per_s": n / (decode_s + rank_s),
            "tokens_per_s": n * keys.model.n_latent * new_tokens / decode_s,
            "decode_s": decode_s,
            "rank_s": rank_s,
            "rank_dual_s": dual_s,
            "rounds": len(rounds) - 1,
        }
        part.write(batches=batches)
        print(n, batches[str(n)], flush=True)
    if part.device.type == "cuda":
        part.write(peak_memory_gib=torch.cuda.max_memory_allocated() / GIB)


# ------------------------------------------------------------------------------------------------- evening


def evening(part: Part, model: str | None) -> None:
    """The curriculum of experiment=evening in the time that is left, and what the models say then."""
    model = model or largest_model(part)
    part.write(model=model)
    runs: dict[str, Path] = {}
    stages: dict[str, dict[str, Any]] = {}
    left, overhead_s = dict(EVENING), OVERHEAD_S
    for stage, share in EVENING.items():
        began = time.time()
        seconds = (part.left - TALK_S - overhead_s * len(left)) * share / sum(left.values())
        del left[stage]
        overrides = evening_overrides(part, model, stage)
        probe = compose(model, stage, *overrides, "trainer.max_steps=12")
        step_s = measure(probe, part.device, seconds / 5)["step_s"]
        probe_s = time.time() - began
        steps = 4 if part.dry_run else max(20, int((seconds - probe_s) / step_s))
        free_memory()
        config = compose(
            model,
            stage,
            *overrides,
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps}",
            f"optim.warmup_steps={max(1, steps // 10)}",
            f"init_from={runs['1_coarse'] if runs else 'scratch'}",
            f"output_dir={part.work / 'outputs'}",
            "run_id=evening",
        )
        train_composed(config)
        runs[stage] = part.work / "outputs" / f"{model}-{stage}" / "evening"
        add_metrics(part.out / "curriculum.csv", stage, runs[stage] / "metrics.csv")
        metrics = last_metrics(runs[stage] / "metrics.csv")
        stages[stage] = {
            "steps": steps,
            "tokens": steps * config.optim.batch_tokens,
            "lr": config.optim.lr,
            "wall_s": round(time.time() - began, 1),
            "metrics": {name: value for name, value in metrics.items() if "z_usage" not in name},
        }
        part.write(stages=stages)
        print(stage, stages[stage], flush=True)
        overhead_s = max(OVERHEAD_S, time.time() - began - probe_s - steps * step_s)
    free_memory()
    scores = {stage: stages[stage]["metrics"].get("val/p1", 0.0) for stage in ("2_eval", "2_eval_dual")}
    judge = max(scores, key=lambda stage: scores[stage])
    precision = "float32" if part.dry_run else "bfloat16"
    bot = PlatoBot.load(runs["2_gen"], runs[judge], str(part.device), precision=precision)
    n_dialogues = 3 if part.dry_run else N_DIALOGUES
    examples = read_examples(DATA / "chitchat_64", bot.tokenizer, n_dialogues, max_context=bot.max_context)
    replies = bot.reply_to_ids(
        [example.context_ids for example in examples], [example.turns for example in examples]
    )
    text = f"{model}, ranked by {judge}; coherence, log-probability and latent before each candidate\n\n"
    (part.out / "dialogues.txt").write_text(text + shown(examples, replies), encoding="utf-8")
    part.write(ranked_by=judge, doubt=bot.doubt, dialogues=len(replies))


def evening_overrides(part: Part, model: str, stage: str) -> tuple[str, ...]:
    """The command line of a stage of experiment=evening at another size, without its length."""
    recipe = compose(model, stage, "experiment=evening", *part.tiny)
    rate = recipe.optim.lr * min(1.0, RECIPE_HIDDEN / recipe.model.hidden_size)
    tokens, n_selection, n_human, n_latent = (
        (2048, 10, 2, 2) if part.dry_run else (EVENING_TOKENS, 300, 16, 8)
    )
    return (
        *("experiment=evening", f"data.path={DATA / 'chitchat_64'}", "data.prepare=null", "report=false"),
        *(f"strategy={part.strategy}", f"optim.lr={rate:.3g}", f"optim.batch_tokens={tokens}"),
        *(f"data.unit_tokens={tokens}", "data.valid_units=8", "checkpoint_steps=1000000"),
        *(f"selection={n_selection}", f"human_rank={n_human}", f"latent_contexts={n_latent}", *part.tiny),
    )


def largest_model(part: Part) -> str:
    """The largest size whose stage 1 reads the corpus often enough, at the speed `train MODEL` measured."""
    keys: TrainConfig = OmegaConf.to_object(  # type: ignore[assignment]
        compose("93m", "1_coarse", *evening_overrides(part, "93m", "1_coarse"))
    )
    _, _, data = build_parts(keys)
    seconds = (part.left - TALK_S - OVERHEAD_S * len(EVENING)) * EVENING["1_coarse"]
    for model in ("1.6b", "314m"):
        stages = Results(part.out).part(f"train {model}").get("stages", {})
        speed = stages.get("1_coarse", {}).get("tokens_per_s", 0.0)
        if not part.dry_run and speed * seconds >= EPOCHS * data.epoch_tokens:
            return model
    return "93m"


def add_metrics(path: Path, stage: str, metrics: Path) -> None:
    """Appends a stage's metrics to one file for all stages."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(("stage", "step", "metric", "value"))
        writer.writerows((stage, *row) for row in read_metrics(metrics))


def shown(examples: Sequence[Example], replies: Sequence[Reply]) -> str:
    """Contexts, what a human said, and the best candidates."""
    lines = []
    for number, (example, reply) in enumerate(zip(examples, replies, strict=True), start=1):
        lines.append(f"--- {number}")
        lines += [f"    {turn}" for turn in example.turns]
        lines.append(f"human: {example.reference}")
        lines += [
            f"{candidate.coherence or 0.0:.3f} {candidate.log_prob:6.2f} z{candidate.latent or 0:02d}  "
            f"{candidate.text}"
            for candidate in reply.candidates[:N_SHOWN]
        ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ the parts


def main() -> None:
    """Runs one part; a failure is in device.json as well as on the screen."""
    parser = argparse.ArgumentParser(description="One part of benchmarks/device.sh.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("part", choices=("machine", "tests", "train", "decode", "evening"))
    parser.add_argument("model", nargs="?")
    given = parser.parse_args()
    name = " ".join(filter(None, (given.part, given.model if given.part in ("train", "decode") else None)))
    part = Part(name, given.out, given.work, given.deadline, given.dry_run)
    try:
        match given.part:
            case "machine":
                machine(part)
            case "tests":
                tests(part)
            case "train":
                train_model(part, given.model)
            case "decode":
                decode_model(part, given.model)
            case "evening":
                evening(part, given.model)
    except Exception as error:
        part.write(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
