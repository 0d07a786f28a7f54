"""What a run shows while it trains: progress, speed, and replies of the model at each validation."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from plato2.config import ModelConfig, UserError, did_you_mean
from plato2.files import replaced
from plato2.runs.console import number
from plato2.runs.plan import decoder_products, peak_flops, step_flops
from plato2.runs.wandb import WandbRun
from plato2.stages import Stage
from plato2.stages.sharding import gathered

SILENT_S = 30.0
"""How long a validation, or what is measured beside it, may say nothing in a log file."""


class AtStart(Callback):
    """Records a run when all is restored and its first step is next; what fails before leaves no trace in it.

    Args:
        record: called once, on the first process.
    """

    def __init__(self, record: Callable[[], None]) -> None:
        self.record = record

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records it."""
        self.record()


class RunProgress(ProgressBar):
    """One bar for a whole run: steps, loss, perplexity, tokens a second, time left.

    Where the output is not a terminal (a log file), a line at every tenth of the run instead, and of a
    validation, or of what is measured beside it, that takes long.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        super().__init__()
        self.title = title
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None

    def disable(self) -> None:
        """Ranks other than the first show nothing."""
        self.progress = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the bar at the step the run resumes from."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.title, total=trainer.max_steps, completed=trainer.global_step, metrics=""
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar on."""
        step = trainer.global_step
        if self.progress is not None:
            self.progress.update(self.task, completed=step, metrics=self._metrics(trainer))
        elif trainer.is_global_zero and step % max(1, trainer.max_steps // 10) == 0:
            self.console.print(
                f"{self.title} step {step}/{trainer.max_steps} {self._metrics(trainer)}", highlight=False
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says that validation is under way."""
        self.spoke = time.perf_counter()
        if self.progress is not None:
            self.progress.update(self.task, metrics="validating ...")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Says how far a long validation is."""
        done, (n_batches,) = batch_idx + 1, trainer.num_val_batches
        if self.progress is not None:
            self.progress.update(self.task, metrics=f"validating {done}/{n_batches}")
        elif trainer.is_global_zero and done % max(1, int(n_batches) // 10) == 0:
            now = time.perf_counter()
            if now - self.spoke >= SILENT_S:
                self.spoke = now
                told = f"{self.title} step {trainer.global_step}: validating {done}/{n_batches} batches"
                self.console.print(told, highlight=False)

    @contextmanager
    def busy(self, trainer: pl.Trainer, what: str) -> Iterator[None]:
        """While the block runs, says what it does: in the bar, and in a log file once that has taken half
        a minute, and whenever it has taken twice as long."""
        if self.progress is not None:
            self.progress.update(self.task, metrics=f"{what} ...")
        if self.progress is not None or not trainer.is_global_zero:
            yield
            return
        done, began = threading.Event(), time.perf_counter()

        def tell() -> None:
            wait_s = SILENT_S
            while not done.wait(wait_s):
                wait_s = taken = time.perf_counter() - began
                told = f"{self.title} step {trainer.global_step}: {what}, {taken:.0f} s so far"
                self.console.print(told, highlight=False, soft_wrap=True)

        teller = threading.Thread(target=tell, name="busy", daemon=True)
        teller.start()
        try:
            yield
        finally:
            done.set()
            teller.join()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the validation's numbers above the bar."""
        if trainer.is_global_zero and trainer.state.fn == "fit":
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            shown = "  ".join(f"{k} {number(v)}" for k, v in values.items() if "usage" not in k)
            self.console.print(
                f"{self.title} step {trainer.global_step}: {shown}", highlight=False, soft_wrap=True
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the bar as it stands, also after an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _metrics(self, trainer: pl.Trainer) -> str:
        metrics = trainer.callback_metrics
        shown = [
            f"{key} {float(metrics[f'train/{key}']):.3f}" for key in ("loss",) if f"train/{key}" in metrics
        ]
        if "perf/tokens_per_s" in metrics:
            shown.append(f"{float(metrics['perf/tokens_per_s']):,.0f} tokens/s")
        return "  ".join(shown)


class Throughput(Callback):
    """Logs `perf/tokens_per_s` (real tokens, no padding), `perf/step_s` and `perf/mfu` over all ranks.

    And what the run has taken so far: `perf/samples` over all ranks, `perf/cpu_s` of the first rank's steps.

    Validation and checkpoints do not count. MFU is the share of the device's peak (known for NVIDIA
    data-centre GPUs; a measured matrix product elsewhere) that the model's own arithmetic reaches,
    recomputation excluded. Memory is the first rank's: on a GPU the most that was allocated since the last
    line, on a CPU the most that the process ever had.
    """

    def __init__(self, config: ModelConfig, passes: int, every_steps: int) -> None:
        self.config, self.passes, self.every_steps = config, passes, every_steps
        self.seconds, self.tokens, self.flops, self.steps = 0.0, 0, 0.0, 0
        self.samples, self.cpu_seconds = 0, 0.0
        """Since the run began, also before a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the peak of the device."""
        assert isinstance(pl_module, Stage)
        self.decoder = decoder_products(pl_module.backbone)
        self.peak = peak_flops(pl_module.device, str(trainer.precision)) * trainer.world_size

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clocks."""
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step; logs and starts over at every logging interval."""
        self.seconds += time.perf_counter() - self.started
        self.cpu_seconds += time.process_time() - self.cpu_started
        self.steps += 1
        for unit in batch["units"]:
            tokens, samples, targets = (
                int((unit["segment_ids"] > 0).sum()),
                len(unit["sample_ids"]),
                len(unit["target_index"]),
            )
            self.tokens += tokens
            self.samples += samples
            self.flops += step_flops(self.config, tokens, samples, targets, self.passes, self.decoder)
        if trainer.global_step % self.every_steps and trainer.global_step != trainer.max_steps:
            return
        world = trainer.world_size  # every rank computes the same number of units
        pl_module.log_dict(
            {
                "perf/tokens_per_s": world * self.tokens / self.seconds,
                "perf/step_s": self.seconds / self.steps,
                "perf/mfu": world * self.flops / self.seconds / self.peak,
                "perf/samples": float(world * self.samples),
                "perf/cpu_s": self.cpu_seconds,
                "perf/memory_gib": peak_memory_gib(pl_module.device),
                "step": float(trainer.global_step),
            }
        )
        self.seconds, self.tokens, self.flops, self.steps = 0.0, 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The counts of the run, kept across a resume."""
        return {"samples": self.samples, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.samples, self.cpu_seconds = state_dict["samples"], state_dict["cpu_seconds"]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use: of a GPU since the last call, of a CPU's process since it began; GiB."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def busy(trainer: pl.Trainer, what: str) -> AbstractContextManager[None]:
    """`RunProgress.busy`, where the run shows progress."""
    shown = trainer.progress_bar_callback
    return shown.busy(trainer, what) if isinstance(shown, RunProgress) else nullcontext()


class SampleReplies(Callback):
    """Lets the model answer a few validation contexts at each validation.

    Appends them to `replies.jsonl` in the run folder and sends a table to W&B or TensorBoard.

    Args:
        path: the file to append to.
        answer: gives one dict for each context, with `context`, `reference` and `candidates`.
        what: what that is, for the person at the terminal, where it takes long.
    """

    def __init__(
        self, path: Path, answer: Callable[[pl.LightningModule], list[dict[str, Any]]], what: str
    ) -> None:
        self.path, self.answer, self.what = path, answer, what

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops what was recorded after the checkpoint that the run resumes from: it will be recorded
        again."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= trainer.global_step]
        with replaced(self.path) as new:
            new.write_bytes(b"".join(kept))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decodes and records on the first process; the others help to gather its weights."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with gathered(pl_module), busy(trainer, self.what):
            if trainer.is_global_zero:
                self._record(trainer, self.answer(pl_module))

    def _record(self, trainer: pl.Trainer, replies: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for reply in replies:
                file.write(json.dumps({"step": trainer.global_step, **reply}, ensure_ascii=False) + "\n")
        rows = [
            [" / ".join(reply["context"]), reply["reference"], candidate["text"]]
            for reply in replies
            for candidate in reply["candidates"]
        ]
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                import wandb

                table = wandb.Table(columns=["context", "human", "candidate"], data=rows)
                logger.add({"replies": table}, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"    {' | '.join(row)}" for row in rows)  # indented = shown as it is
                logger.experiment.add_text("replies", text, trainer.global_step)


def _step(line: bytes) -> float:
    """The step of a line of replies; that of one which was not written to its end is past all others."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return inf


class Figures(Callback):
    """Logs further figures of each validation as `val/<name>`, and keeps them in the checkpoints.

    Every rank computes all of them: they are few, and there is nothing to wait for. Of a sharded run it is
    the first one alone: what they are compared with is in memory once.

    Args:
        measure: gives the figures of the stage, which is in evaluation mode.
        what: what that is, for the person at the terminal, where it takes long.
    """

    def __init__(self, measure: Callable[[pl.LightningModule], dict[str, float]], what: str) -> None:
        self.measure, self.what = measure, what
        self.found: dict[str, float] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures and logs."""
        if not trainer.sanity_checking:
            with gathered(pl_module), busy(trainer, self.what):
                alone = isinstance(trainer.strategy, ModelParallelStrategy)
                found = self.measure(pl_module) if trainer.is_global_zero or not alone else {}
                self.found = trainer.strategy.broadcast(found) if alone else found
            values = {f"val/{name}": value for name, value in self.found.items()}
            pl_module.log_dict({**values, "step": float(trainer.global_step)}, batch_size=1)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the last validation's into the checkpoint: whoever uses the model can say what it is worth."""
        checkpoint["figures"] = checkpoint.get("figures", {}) | self.found  # there may be several measures

    @property
    def state_key(self) -> str:
        """What the state is stored under: a stage that writes and ranks is measured in two ways."""
        return f"Figures of {type(self.measure).__name__}"

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, kept across a resume."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.found = state_dict["found"]


class SweepMetric(Callback):
    """Refuses a metric to compare a sweep's runs by that the first validation does not bring.

    What is logged every few steps (`perf/`) may still come; `runs.train.close` looks again.

    Args:
        metric: the key `sweep_metric`.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compares it with all that has been logged, when the first validation is over and saved.

        Raises:
            UserError: it is not among that; the same run goes on under another one.
        """
        known = sorted(map(str, trainer.callback_metrics))
        validated = any(name.startswith("val/") for name in known)
        if validated and self.metric not in known and not self.metric.startswith("perf/"):
            raise UserError(f"sweep_metric={self.metric}: not logged; {did_you_mean(self.metric, known)}")


class LatentHistogram(Callback):
    """Sends how much each latent is used to W&B or TensorBoard as a histogram (the CSV has the numbers)."""

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads `val/z_usage_*` of the validation that just ended."""
        usage = [
            float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val/z_usage_")
        ]
        if not usage or trainer.sanity_checking:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                import wandb

                bins = (np.array(usage), np.arange(len(usage) + 1))
                logger.add({"latent_usage": wandb.Histogram(np_histogram=bins)}, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                drawn = torch.repeat_interleave(
                    torch.arange(len(usage)), (torch.tensor(usage) * 1000).round().long()
                )
                logger.experiment.add_histogram("latent_usage", drawn, trainer.global_step)


def metrics_table(metrics: dict[str, float]) -> Table:
    """A run's closing numbers."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if "usage" not in name and name != "step":
            table.add_row(name, number(value))
    return table
