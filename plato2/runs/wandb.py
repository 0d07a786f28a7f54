"""A run in Weights & Biases in which every step stands once, however often the run is killed and resumed.

W&B's own step is ours. A row is sent when its step is over, whole, and before a checkpoint of its step is
written. A run that goes on reads how far W&B has come: what it lacks of the steps up to the checkpoint is
sent from `metrics.csv`, and what it has already is not sent again (a resumed run repeats exactly what was
killed). So it is online, where the server says which step was last, and offline, where a resumed run starts
a new fragment and the fragments before it say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from plato2.config import UserError
from plato2.files import read_sha256
from plato2.runs.console import say
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

INIT_TIMEOUT_S = 60.0
"""How long W&B's server may take to answer when a run begins; WANDB_INIT_TIMEOUT overrides it, as in W&B."""
NAME_CHARACTERS = 100
"""Of a name that W&B gets: it takes 128, and makes longer ones of a run's id."""


def shortened(name: str) -> str:
    """A name that is short enough for W&B: of a long one the beginning, and a hash of the whole."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 13]}-{digest}"


def run_key(name: str, run: Path) -> str:
    """What W&B knows a run by, and its model: `<model>-<stage>-<run_id>` in the characters that it takes."""
    return shortened(re.sub(r"[^\w-]", "_", f"{name}-{run.name}"))


class WandbRun(WandbLogger):
    """Lightning's logger, with whole rows, each step once.

    Args:
        project: name of the W&B project.
        entity: the user or team it belongs to; W&B's default when not given.
        offline: no network is used; `wandb sync` sends it later.
        log_model: whether the best checkpoint itself is sent, too; else its artifact only names it.
        settings: the rest of what `wandb.init` takes.
    """

    def __init__(
        self,
        project: str = "plato2",
        entity: str | None = None,
        offline: bool = False,
        log_model: bool = False,
        **settings: Any,
    ) -> None:
        import wandb

        patience = wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)))
        super().__init__(project=project, entity=entity, offline=offline, settings=patience, **settings)
        self.sends_model = log_model
        self.sent = -1
        """The last step that W&B has."""
        self.row_step, self.row = -1, dict[str, Any]()

    @rank_zero_only
    def begin(self, run: RunFolder, resumed_step: int | None) -> None:
        """Begins the W&B run or goes on with it.

        Args:
            run: the run folder.
            resumed_step: of the checkpoint that the run resumes from; None = from the beginning.

        Raises:
            UserError: W&B has steps of another run of this name.
        """
        self.sent = max(self.experiment.starting_step - 1, *map(last_step, self._fragments()), -1)
        if self.sent >= 0 and not run.lineage():
            raise UserError(
                f"logger=wandb: W&B has {self.sent:,} steps of a run {self.experiment.id}, which is not that "
                f"of {run.path}; delete it there, or choose another run_id"
            )
        missing: dict[int, dict[str, float]] = {}
        if resumed_step is not None and (run.path / "metrics.csv").exists():
            for step, name, value in read_metrics(run.path / "metrics.csv"):
                if self.sent < step <= resumed_step:
                    missing.setdefault(step, {})[name] = value
        for step, row in missing.items():
            self.add(row, step)

    def _fragments(self) -> list[Path]:
        """The records of earlier parts of an offline run."""
        own = Path(self.experiment.settings.sync_dir)
        return [
            file
            for folder in own.parent.glob(f"offline-run-*-{self.experiment.id}")
            for file in folder.glob("run-*.wandb")
            if folder != own
        ]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of a step."""
        assert step is not None, "Stage.log_metrics and all callbacks give it"
        self.add(metrics, step)

    @rank_zero_only
    def add(self, values: Mapping[str, Any], step: int) -> None:
        """Adds anything that W&B logs to the row of a step; nothing where W&B has that step already."""
        if step != self.row_step:
            self.flush()
        if step > self.sent:
            self.row_step = step
            self.row.update(values)

    @rank_zero_only
    def flush(self) -> None:
        """Sends the row at hand; its step is over."""
        if self.row:
            row = {**self.row, "trainer/global_step": self.row_step}
            self.experiment.log(row, step=self.row_step, commit=True)
            self.sent, self.row = self.row_step, {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sends the last row."""
        if self._experiment is not None:
            self.flush()

    @rank_zero_only
    def use_parent(self, parent: Path) -> None:
        """Says in W&B that the run starts from a checkpoint of another one; offline only `lineage.json` does.

        Args:
            parent: a checkpoint in a run folder.
        """
        if self.experiment.offline or not (known := read_sha256(parent)):
            return
        name = f"{artifact_name(parent.parents[1])}:{known[-1][:12]}"
        try:
            self.experiment.use_artifact(name, type="model")
        except Exception as error:  # of W&B's, HTTP's and GraphQL's kinds: the parent may be in no project
            say(f"warning: W&B has no artifact {name} ({_first_line(error)}); lineage.json names the parent")

    @rank_zero_only
    def log_best(self, run: RunFolder, about: Mapping[str, Any]) -> None:
        """Logs the best checkpoint of a finished run as an artifact, which the next stage can name.

        Its records are sent, the weights only with `log_model`; without it they are named by path and hash.

        Args:
            run: the run folder.
            about: plain values to show beside it.
        """
        import wandb

        try:
            sha256 = (read_sha256(run.best) or [""])[-1]
            metadata = {**about, "checkpoint": str(run.best), "sha256": sha256}
            artifact = wandb.Artifact(artifact_name(run.path), type="model", metadata=metadata)
            for file in ("lineage.json", "config.yaml"):
                artifact.add_file(str(run.path / file))
            if not self.sends_model:
                artifact.add_reference(run.best.resolve().as_uri(), name=run.best.name, checksum=False)
            elif run.best.is_dir():
                artifact.add_dir(str(run.best), name=run.best.name)
            else:
                artifact.add_file(str(run.best), name=run.best.name)
            self.experiment.log_artifact(artifact, aliases=[sha256[:12], "best"] if sha256 else ["best"])
        except Exception as error:  # as above: what is trained is not lost because W&B has no room for it
            say(f"warning: W&B did not take the artifact of {run.path} ({_first_line(error)})")


class WholeRows(Callback):
    """Sends W&B the row of a step before a checkpoint of the step is written.

    Args:
        logger: of the run.
    """

    def __init__(self, logger: WandbRun) -> None:
        self.logger = logger

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sends it."""
        self.logger.flush()


def artifact_name(run: Path) -> str:
    """The name of a run's model in W&B, by its folder."""
    return run_key(run.parent.name, run)


def last_step(file: Path) -> int:
    """The last step in the record of an offline run; -1 if there is none.

    A record that was cut off by a kill is read as far as it goes.
    """
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    last = -1
    with subprocess.Popen(reader, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b'"history"' in line:
                item = json.loads(line).get("history", {}).get("item", {})
                last = max(last, int(item.get("_step", -1)))
    return last


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
