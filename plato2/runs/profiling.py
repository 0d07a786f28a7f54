"""Where time and memory go: by phase, as a trace of some steps, and when a GPU's memory is full."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from plato2.config import UserError
from plato2.runs.console import say


class Phases(Callback):
    """Logs the seconds of a step by phase, and of each validation, and on a GPU the peak of memory in each.

    `perf/data_s` waiting for the batch, with logging, saving and whatever else lies between two steps;
    `perf/forward_s`, `perf/backward_s`, `perf/optimizer_s` of all units of a step; `perf/validation_s` and
    `perf/validation_tokens_per_s` of a validation. On a GPU `perf/<phase>_gib` beside them. Each phase waits
    for the GPU, so that its seconds are its own.
    """

    def __init__(self) -> None:
        self.seconds, self.memory = defaultdict[str, float](float), defaultdict[str, float](float)
        self.steps, self.tokens, self.since = 0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.device = pl_module.device
        self._ends("")

    def _ends(self, phase: str) -> None:
        """A phase is over: what passed since the one before is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.memory[phase] = max(self.memory[phase], peak)
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.since
        self.since = now

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here."""
        self._ends("data")

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """A unit's losses are computed."""
        self._ends("forward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A unit's gradients are."""
        self._ends("backward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is over; logs at every logging interval."""
        self._ends("optimizer")
        self.steps += 1
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval and trainer.global_step != trainer.max_steps:
            return
        phases = ("data", "forward", "backward", "optimizer")
        found = {f"perf/{phase}_s": self.seconds.pop(phase, 0.0) / self.steps for phase in phases}
        found |= {f"perf/{phase}_gib": self.memory.pop(phase) for phase in phases if phase in self.memory}
        pl_module.log_dict({**found, "step": float(trainer.global_step)}, batch_size=1)
        self.steps = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What came before was between two steps."""
        if trainer.state.fn == "fit" and hasattr(self, "device"):
            self._ends("data")
            self.tokens = 0
            self.seconds.pop("validation", None)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the tokens of a batch."""
        self.tokens += sum(int((unit["segment_ids"] > 0).sum()) for unit in batch["units"])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the validation; figures and replies come after it, and are between two steps."""
        if not hasattr(self, "device"):
            return
        self._ends("validation")
        seconds = self.seconds.pop("validation")
        found = {
            "perf/validation_s": seconds,
            "perf/validation_tokens_per_s": trainer.world_size * self.tokens / seconds,
        }
        if "validation" in self.memory:
            found["perf/validation_gib"] = self.memory.pop("validation")
        pl_module.log_dict({**found, "step": float(trainer.global_step)}, batch_size=1)


class Profile(Callback):
    """Writes a trace of some steps, which chrome://tracing and Perfetto show, to `<run>/profile`.

    Args:
        first_step: the first optimizer step that is traced.
        last_step: the last optimizer step that is traced.

    Raises:
        UserError: an impossible value.
    """

    def __init__(self, first_step: int = 10, last_step: int = 12) -> None:
        if not 1 <= first_step <= last_step:
            raise UserError(
                f"callbacks.profile.first_step={first_step}, last_step={last_step}: the first must be at "
                "least 1 and not after the last"
            )
        self.first_step, self.last_step = first_step, last_step
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins before the first step."""
        if trainer.global_step + 1 == self.first_step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes after the last step, or the run's."""
        if self.profiler is None or trainer.global_step < min(self.last_step, trainer.max_steps):
            return
        self.profiler.stop()
        folder = Path(trainer.default_root_dir) / "profile"
        folder.mkdir(exist_ok=True)
        steps = f"{self.first_step}-{trainer.global_step}"
        file = folder / f"steps-{steps}-rank{trainer.global_rank}.json.gz"
        self.profiler.export_chrome_trace(str(file))
        self.profiler = None
        say(f"trace of steps {steps}: {file}")


class MemorySnapshot(Callback):
    """When a GPU runs out of memory, writes what had been allocated, and where, for pytorch.org/memory_viz.

    Args:
        max_entries: allocations that are remembered.
    """

    def __init__(self, max_entries: int = 100_000) -> None:
        self.max_entries = max_entries

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to remember; before the run is recorded.

        Raises:
            UserError: there is no GPU.
        """
        if pl_module.device.type != "cuda":
            raise UserError(
                f"callbacks.memory_snapshot: only a GPU's allocations can be recorded, and this run is on "
                f"{pl_module.device.type}; leave it out"
            )
        torch.cuda.memory._record_memory_history(max_entries=self.max_entries)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Writes it."""
        if isinstance(exception, torch.OutOfMemoryError):
            file = Path(trainer.default_root_dir) / f"memory-rank{trainer.global_rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            say(f"out of memory: what was allocated is in {file} (https://pytorch.org/memory_viz shows it)")
