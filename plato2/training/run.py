"""The run folder: where it is, what it descends from, whether it is finished.

    outputs/<model>-<stage>/<run_id>/
        config.yaml       the resolved configuration
        lineage.json      stage, status, parent run and checkpoint, data, tokenizer, git state, versions
        tokenizer/        a copy, so that the run can be talked to without its data
        checkpoints/      last.ckpt, best.ckpt
        metrics.csv       step, metric, value

`init_from` takes weights from another run (start.py); `resume` goes on with this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from plato2.config import UserError
from plato2.training.console import say
from plato2.training.saved import best_value, file_sha256, last_metrics

FORMAT = "plato2-run/1"
PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "sentencepiece", "numpy", "pyarrow")
NOT_PART_OF_A_RUN = ("run_id", "resume", "plan", "output_dir", "tags", "sweep_metric", "report")
"""Top-level keys that may differ between a run and its continuation."""
FREE = ("data.path", "data.prepare", "data.n_workers", "data.cache_dir", "model.checkpoint_activations")
"""Other keys that change no number; the data itself is compared by its hash when its position is restored."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of `last.ckpt` and `best.ckpt`."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation; the newest when there was none."""
        best = self.checkpoints / "best.ckpt"
        return best if best.exists() else self.last

    @property
    def tokenizer(self) -> Path:
        """Folder of spm.model and vocab.txt."""
        return self.path / "tokenizer"

    def make(self) -> None:
        """Makes the folder.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir: {self.path} cannot be made ({error.strerror}); choose another output_dir"
            ) from None

    def lineage(self) -> dict[str, Any]:
        """What `lineage.json` says; empty when the folder is not a run."""
        try:
            content = json.loads((self.path / "lineage.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"{self.path / 'lineage.json'}: cannot be read ({error}); mend it, or move its folder away"
            ) from error
        return content if isinstance(content, dict) and content.get("format") == FORMAT else {}

    def write_lineage(self, **entries: Any) -> None:
        """Merges entries into `lineage.json`, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **self.lineage(), **entries}
        temporary = self.path / "lineage.json.tmp"
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / "lineage.json")

    def record_resume(self, step: int, config: dict[str, Any]) -> None:
        """Notes that the run goes on from a step."""
        resumed = [*self.lineage().get("resumed", []), {"step": step, "at": now().isoformat()}]
        self.write_lineage(status="running", config=config, resumed=resumed)

    def value(self, step: int, metric: str | None) -> float | None:
        """What a run that has nothing left to train reached: its best value, or the last of a metric.

        A run that was killed between its last checkpoint and its record is recorded as finished here.
        """
        metrics = last_metrics(self.path / "metrics.csv")
        if not self.finished:
            self.write_lineage(status="finished", step=step, metrics=metrics)
        return metrics.get(metric) if metric else best_value(self.last)

    @property
    def parent(self) -> Path | None:
        """The checkpoint or model folder it started from."""
        parent = self.lineage().get("parent")
        return Path(parent["checkpoint"]) if parent else None

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return self.lineage().get("status") == "finished"


def runs(output_dir: Path, name: str) -> list[RunFolder]:
    """All runs of one model and stage (`<model>-<stage>`), newest first.

    One whose record is damaged is passed over with a warning: a command does not hang on its neighbours.
    """
    found = []
    for path in (output_dir / name).glob("*/lineage.json"):
        run = RunFolder(path.parent)
        try:
            found.append((str(run.lineage().get("created", "")), run))
        except UserError as error:
            say(f"warning: {run.path.name} is passed over: {error}")
    return [run for _, run in sorted(found, key=lambda dated: dated[0], reverse=True)]


def fingerprint(config: Mapping[str, Any]) -> str:
    """What makes two commands the same run: a hash of the resolved configuration without run-keeping keys."""
    kept = {
        key: leaf
        for section, value in config.items()
        if section not in (*NOT_PART_OF_A_RUN, "logger")
        for key, leaf in _flat(section, value).items()
        if key == "data.path" or not key.startswith(FREE)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def new_run_id() -> str:
    """RUN_ID, else SLURM_JOB_ID (a requeued job finds its folder), else the time.

    Raises:
        UserError: several processes started from outside (torchrun) without a common name.
    """
    named = os.environ.get("RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if named:
        return named
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        raise UserError(
            f"run_id: {os.environ['WORLD_SIZE']} processes need one name for their common folder; set "
            "run_id=NAME or the environment variable RUN_ID"
        )
    return now().strftime("%Y%m%d-%H%M%S")


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def choose_run(
    output_dir: Path, name: str, config: Mapping[str, Any], run_id: str | None, resume: str
) -> tuple[RunFolder, Path | None, str]:
    """Decides which folder a command writes to and which checkpoint it goes on from.

    Args:
        output_dir: the folder of all runs.
        name: `<model>-<stage>`.
        config: the resolved configuration of this command.
        run_id: a name given by the user or the scheduler, or None.
        resume: `auto`, `never` or a run folder.

    Returns:
        The run, the checkpoint to resume from (None = start at step 0), and a sentence that says so.
    """
    if resume not in ("auto", "never"):
        run = RunFolder(Path(resume))
        if not run.lineage():
            raise UserError(
                f"resume={resume}: not a run folder (no lineage.json); use resume=auto or a run's path"
            )
        return _continued(run, config)
    named = run_id or os.environ.get("RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if named:
        if Path(named).name != named:
            raise UserError(f"run_id={named}: is the name of one folder; leave out slashes and dots alone")
        run = RunFolder(output_dir / name / named)
        if not run.lineage():
            return run, None, f"new run {run.path}"
        if resume == "never":
            raise UserError(
                f"run_id={named}: {run.path} exists; choose another run_id or leave out resume=never"
            )
        return _continued(run, config)
    if resume == "auto":
        mark = fingerprint(config)
        for run in runs(output_dir, name):
            lineage = run.lineage()
            if (
                lineage.get("status") != "finished"
                and lineage.get("fingerprint") == mark
                and run.last.exists()
            ):
                return _continued(run, config)
    run = RunFolder(output_dir / name / new_run_id())
    return run, None, f"new run {run.path}"


def _continued(run: RunFolder, config: Mapping[str, Any]) -> tuple[RunFolder, Path | None, str]:
    before = run.lineage().get("config", {})
    for section in ("seed", "model", "stage", "data", "optim"):
        then, here = _flat(section, before.get(section)), _flat(section, config.get(section))
        for key in sorted(then.keys() | here.keys()):
            if then.get(key) != here.get(key) and not key.startswith(FREE):
                raise UserError(
                    f"{key}={here.get(key)}: {run.path} was started with {key}={then.get(key)}; give the old "
                    "value to go on with it, or another run_id (or resume=never) to start anew"
                )
    if not run.last.exists():
        return run, None, f"run {run.path} has no checkpoint yet: starting it again"
    sentence = f"resuming {run.path}"
    steps, then = (c.get("trainer", {}).get("max_steps") for c in (config, before))
    if steps != then and config.get("optim", {}).get("schedule") == "linear":
        sentence += f"; optim.schedule=linear, which was to end at step {then}, now ends at step {steps}"
    return run, run.last, sentence


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            name: leaf
            for key, child in value.items()
            for name, leaf in _flat(f"{prefix}.{key}", child).items()
        }
    return {prefix: value}


def curriculum(run: RunFolder, parent: Path | None) -> str:
    """A name that the runs of one curriculum share.

    RUN_ID (a sweep sets it), else that of the run it starts from, else the run's own name; a run keeps it.
    """
    known = run.lineage().get("curriculum") or os.environ.get("RUN_ID")
    if not known and parent:
        known = RunFolder(parent.parent.parent).lineage().get("curriculum")
    return str(known or run.path.name)


def record_start(
    run: RunFolder,
    stage: str,
    model: str,
    config: dict[str, Any],
    data: dict[str, Any],
    parent: Path | None,
    family: str,
) -> None:
    """Writes the lineage of a new run.

    Args:
        run: its folder.
        stage: the stage's name.
        model: name of the geometry.
        config: the resolved configuration.
        data: path and hash of the training shards, hash of their tokenizer.
        parent: the checkpoint or model folder it starts from, if any.
        family: name of the curriculum.
    """
    ancestor = None
    if parent:
        ancestor = {
            "checkpoint": str(parent),
            "sha256": file_sha256(parent),
            "run": None if parent.is_dir() and (parent / "config.json").exists() else str(parent.parents[1]),
        }
    run.write_lineage(
        **provenance(),
        run_id=run.path.name,
        stage=stage,
        model=model,
        status="running",
        parent=ancestor,
        curriculum=family,
        tokenizer_sha256=data["tokenizer_sha256"],
        data=data,
        fingerprint=fingerprint(config),
        config=config,
    )


def requeue() -> None:
    """Puts this Slurm job back into the queue; it finds its folder by its job id. Nothing outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        subprocess.run(["scontrol", "requeue", job], check=True)


def provenance() -> dict[str, Any]:
    """Git state of the working tree, versions of what computes, and the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git": _git_state(),
        "packages": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "created": now().isoformat(),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout, e.g. an installed package
