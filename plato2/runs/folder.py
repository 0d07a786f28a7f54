"""The run folder: where it is, what it descends from, whether it is finished.

    outputs/<model>-<stage>/<run_id>/
        config.yaml       the resolved configuration
        lineage.json      stage, status, parent run and checkpoint, data, tokenizer, git state, versions
        tokenizer/        a copy, so that the run can be talked to without its data
        checkpoints/      last.ckpt, best.ckpt, and the hash of each
        metrics.csv       step, metric, value
        ranks/            of several: what each did last (traces.py)
        lock              while a process trains here

`init_from` takes weights from another run (start.py); `resume` continues this one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from plato2.bounded import read_file
from plato2.config import Use, UserError, dotted
from plato2.files import file_sha256, locked, replace_text
from plato2.formats import JSON_BYTES, Count, Open, Sha256, parse
from plato2.runs.console import STOP_SIGNALS, is_first_process, say
from plato2.runs.saved import best_value, checkpoint_step, last_metrics

if TYPE_CHECKING:  # reading a run needs no torch
    from plato2.stages import Stage

FORMAT = "plato2-run/1"
PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "sentencepiece", "numpy", "pyarrow")
LONGEST_NAME = 255
"""Bytes of a folder's name that file systems take."""
PLAN = ("plan", "plan_mfu", "plan_gb_per_s", "plan_gpu_hour_price")
NOT_PART_OF_A_RUN = (
    "run_id",
    "resume",
    *PLAN,
    "output_dir",
    "tags",
    "sweep_metric",
    "report",
    "startup_timeout_s",
    "step_timeout_s",
    "study",
    "trial",
)
"""Top-level keys that may differ between a run and its continuation."""
FREE = ("data.path", "data.prepare", "data.n_workers", "data.cache_dir", "model.checkpoint_activations")
"""Other keys that change no number; the data itself is compared by its hash when its position is restored."""
DECODER = "model.path"
"""Changes no number where the weights there are compared by their hash."""


class _Parent(Open):
    checkpoint: str


class _Config(Open):
    """Of the configuration only what is looked at again."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)


class Lineage(Open):
    """`lineage.json`; whatever is not given here is kept, not read."""

    format: str | None = None
    stage: str | None = None
    use: Use | None = None
    monitor: tuple[str, Literal["min", "max"]] | None = None
    status: str | None = None
    created: str | None = None
    step: Count | None = None
    parent: _Parent | None = None
    curriculum: str | None = None
    tokenizer_sha256: Sha256 | None = None
    fingerprint: str | None = None
    overrides: list[str] = Field(default_factory=list)
    resumed: list[Any] = Field(default_factory=list)
    config: _Config = Field(default_factory=_Config)


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
        return self.kept[-1] if self.kept else self.last

    def best_found(self) -> Path:
        """The best checkpoint; says so where there was one and only the newest is left."""
        if self.best == self.last and self.last.exists() and best_value(self.last) is not None:
            say(f"warning: {self.checkpoints / 'best.ckpt'} is missing; using last.ckpt")
        return self.best

    @property
    def kept(self) -> list[Path]:
        """The checkpoints there are, newest first; a kill can leave a sharded one as `.old` only."""
        names = ("last.ckpt", "last.old", "best.old", "best.ckpt")
        return [path for path in (self.checkpoints / name for name in names) if path.exists()]

    def newest_whole(self) -> tuple[Path | None, str]:
        """The newest checkpoint that is intact; None if none was ever saved.

        Returns:
            The checkpoint, and a sentence on newer ones that are lost, or nothing.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        lost = [] if self.last.exists() else [f"{self.last} is missing"]
        for path in self.kept:
            try:
                step = checkpoint_step(path)
            except UserError as error:
                lost.append(str(error))
                continue
            return path, f"warning: {lost[0]}; resuming from step {step:,} with {path.name}\n" if lost else ""
        if self.kept:
            raise UserError(
                f"{lost[-1]}: no checkpoint in {self.checkpoints} is intact; restore one, or start another "
                "run with run_id=NAME"
            )
        return None, ""

    @property
    def tokenizer(self) -> Path:
        """Folder of spm.model and vocab.txt."""
        return self.path / "tokenizer"

    def lineage(self) -> dict[str, Any]:
        """What `lineage.json` says; empty when the folder is not a run."""
        file, cure = self.path / "lineage.json", "repair it, or move its folder away"
        try:
            data = read_file(file, JSON_BYTES, cure)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if parse(Lineage, data, f"{file}: cannot be read", cure).format != FORMAT:
            return {}
        content: dict[str, Any] = json.loads(data)
        return content

    def write_lineage(self, **entries: Any) -> None:
        """Merges entries into `lineage.json`, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **self.lineage(), **entries}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        replace_text(self.path / "lineage.json", text)

    def record_resume(self, step: int, config: dict[str, Any]) -> None:
        """Notes that the run resumes from a step."""
        resumed = [*self.lineage().get("resumed", []), {"step": step, "at": now().isoformat()}]
        self.write_lineage(status="running", config=config, resumed=resumed)

    def value(self, checkpoint: Path, metric: str | None) -> float | None:
        """What a run that has nothing left to train reached: its best value, or the last of a metric.

        A run that was killed between its last checkpoint and its record is recorded as finished here.
        """
        metrics = last_metrics(self.path / "metrics.csv")
        if not self.finished:
            self.write_lineage(status="finished", step=checkpoint_step(checkpoint), metrics=metrics)
        return metrics.get(metric) if metric else best_value(checkpoint)

    @property
    def parent(self) -> Path | None:
        """The checkpoint or model folder it started from."""
        parent = self.lineage().get("parent")
        return Path(parent["checkpoint"]) if parent else None

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return self.lineage().get("status") == "finished"


def runs(output_dir: Path, names: str) -> list[RunFolder]:
    """All runs whose `<model>-<stage>/<run_id>` fits a pattern, newest first.

    A run whose record is damaged is skipped with a warning: a command does not depend on its neighbours.
    """
    found = []
    for path in output_dir.glob(f"{names}/lineage.json"):
        run = RunFolder(path.parent)
        try:
            found.append((str(run.lineage().get("created", "")), run))
        except UserError as error:
            say(f"warning: {run.path.name} is skipped: {error}")
    return [run for _, run in sorted(found, key=lambda dated: dated[0], reverse=True)]


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration without run-keeping keys, dotted; a decoder is told by its hash alone."""
    free = tuple(key for key in FREE if key != "data.path") + (DECODER,) * _has_hash(config)
    return {
        key: leaf
        for section, value in config.items()
        if section not in (*NOT_PART_OF_A_RUN, "logger")
        for key, leaf in dotted({section: value}).items()
        if not key.startswith(free)
    }


def _has_hash(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has the hash of the decoder's weights: its folder may then be anywhere."""
    return bool((config.get("model") or {}).get("base_sha256"))


def fingerprint(config: Mapping[str, Any]) -> str:
    """What makes two commands the same run: a hash of what is decisive in their configuration."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()[:16]


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def choose_run(
    output_dir: Path, name: str, config: Mapping[str, Any], run_id: str | None, resume: str
) -> tuple[RunFolder, bool]:
    """Decides which folder a command writes to.

    The name is `run_id`, else RUN_ID, else the Slurm job's (a requeued job finds its folder; a further
    command of the job, with another configuration, gets `<job>-2`), else the time.

    Args:
        output_dir: the folder of all runs.
        name: `<model>-<stage>`.
        config: the resolved configuration of this command.
        run_id: a name given by the user, or None.
        resume: `auto`, `never` or a run folder.

    Returns:
        The run, and whether it may get another name, should this one be taken by the time it is made.

    Raises:
        UserError: the name is invalid or taken, or several processes have no common name.
    """
    if resume not in ("auto", "never"):
        run = RunFolder(Path(resume))
        if not run.lineage():
            raise UserError(
                f"resume={resume}: not a run folder (no lineage.json); use resume=auto or a run's path"
            )
        return run, False
    named = run_id or os.environ.get("RUN_ID")
    folder, job, several = output_dir / name, slurm_job(), several_processes()
    if several and not named and (not job or resume == "never"):
        raise UserError(
            f"run_id: {several} processes need one name for their common folder; set run_id=NAME or the "
            "environment variable RUN_ID"
        )
    if not is_first_process():
        resume = "auto"  # the first process may just have begun this run
    if named:
        _check_name(named)
        run = RunFolder(folder / named)
        if resume == "never" and _has_begun(run):
            raise UserError(
                f"run_id={named}: {run.path} exists; choose another run_id or leave out resume=never"
            )
        return run, False
    if job:
        for number in count(1):
            run = RunFolder(folder / _numbered(job, number))
            if not _has_begun(run):
                return run, not several
            if resume == "auto" and not _conflict(run, config):
                return run, False
    if resume == "auto" and (unfinished := _newest_unfinished(runs(output_dir, f"{name}/*"), config)):
        return unfinished, False
    return RunFolder(folder / now().strftime("%Y%m%d-%H%M%S")), True


def run_of_point(sweep: str, point: int, seed: int) -> str:
    """The name of the run with a seed of a point that Optuna has drawn in a sweep."""
    return f"{sweep}-{point}-seed{seed}"


def _check_name(run_id: str) -> None:
    is_utf8 = run_id.encode("utf-8", "replace").decode() == run_id
    if Path(run_id).name != run_id or run_id == ".." or not is_utf8:
        raise UserError(
            f"run_id={ascii(run_id)[1:-1]}: must be the name of one folder, in UTF-8; use no slashes, "
            "and not just dots"
        )
    if len(os.fsencode(run_id)) > LONGEST_NAME:
        raise UserError(
            f"run_id={run_id[:20]}...: {len(os.fsencode(run_id))} bytes long; a folder's name has at most "
            f"{LONGEST_NAME}"
        )


def _newest_unfinished(newest_first: list[RunFolder], config: Mapping[str, Any]) -> RunFolder | None:
    """The run of the same configuration that was stopped, or is being trained."""
    mark = fingerprint(config)
    for run in newest_first:
        lineage = run.lineage()
        going_on = run.kept or (run.path / "lock").exists()
        if lineage.get("status") != "finished" and lineage.get("fingerprint") == mark and going_on:
            return run
    return None


def go_on(run: RunFolder, config: Mapping[str, Any]) -> tuple[Path | None, str]:
    """Where a run resumes.

    Returns:
        The checkpoint to resume from (None = start at step 0), and a sentence that says so.

    Raises:
        UserError: it was started with other values, or its record or its checkpoints are lost.
    """
    if not run.lineage():
        if _has_begun(run):
            raise UserError(
                f"{run.path / 'lineage.json'}: missing, or not of this version of plato2, but there are "
                "checkpoints beside it; restore it, or start another run with run_id=NAME"
            )
        return None, f"new run {run.path}"
    if conflict := _conflict(run, config):
        raise UserError(conflict)
    checkpoint, lost = run.newest_whole()
    if checkpoint is None and run.finished:
        raise UserError(
            f"{run.checkpoints}: the run is finished, but its checkpoints are gone; restore one, or start "
            "another run with run_id=NAME"
        )
    if checkpoint is None:
        return None, f"run {run.path} has no checkpoint yet: starting it from the beginning"
    sentence = f"{lost}resuming {run.path} from step {checkpoint_step(checkpoint):,}"
    steps, then = (c.get("trainer", {}).get("max_steps") for c in (config, _configuration(run)))
    if steps != then and config.get("optim", {}).get("schedule") == "linear":
        sentence += f"; optim.schedule=linear, which was to end at step {then}, now ends at step {steps}"
    return checkpoint, sentence


@contextmanager
def held(run: RunFolder, may_rename: bool) -> Iterator[RunFolder]:
    """The run's folder, for this process alone while the block runs.

    A folder in which no run began is removed at the end.

    Args:
        run: the run.
        may_rename: another name is taken where the folder is there already.

    Raises:
        UserError: another process trains there, the folder cannot be made, or it is removed in the block.
    """
    own = () if may_rename else (run.path,)
    there = [folder for folder in (*own, *run.path.parents) if folder.exists()]
    try:
        run = _make(run, may_rename)
        with locked(run.path / "lock", run.path, "wait for it, or start another run with run_id=NAME"):
            before = {*run.path.iterdir()}
            try:
                yield run
            finally:
                if run.path.exists() and not (run.path / "lineage.json").exists():
                    for path in {*run.path.iterdir()} - before:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except (OSError, RuntimeError) as error:  # torch's, of a file that cannot be opened, is a RuntimeError
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            place = error.filename or run.path
            raise UserError(f"{place}: {error.strerror}; a run must be able to write there") from None
        if not run.path.exists():
            raise UserError(
                f"{run.path}: the folder was removed or renamed while the run was at work; put it back and "
                "start the same command again, which without it begins anew"
            ) from error
        raise
    finally:
        if not (run.path / "lineage.json").exists():
            with suppress(OSError):  # not empty
                for folder in (run.path, *run.path.parents):
                    if folder not in there:
                        folder.rmdir()


def _make(run: RunFolder, may_rename: bool) -> RunFolder:
    for number in count(1):
        path = run.path.with_name(_numbered(run.path.name, number))
        try:
            path.mkdir(parents=True, exist_ok=not may_rename)
            return RunFolder(path)
        except OSError as error:
            if isinstance(error, FileExistsError) and may_rename:
                continue
            raise UserError(
                f"output_dir: {path} cannot be made ({error.strerror}); choose another output_dir"
            ) from None
    raise AssertionError("count has no end")


def several_processes() -> int:
    """How many processes torchrun or srun started together, if they did."""
    sizes = (("LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    size = max(int(os.environ.get(size) or 1) if rank in os.environ else 1 for rank, size in sizes)
    return size if size > 1 else 0


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _has_begun(run: RunFolder) -> bool:
    return bool(run.lineage() or run.kept)


def _configuration(run: RunFolder) -> Mapping[str, Any]:
    config = run.lineage().get("config")
    return config if isinstance(config, dict) else {}


def _conflict(run: RunFolder, config: Mapping[str, Any]) -> str:
    """What keeps a configuration from resuming a run; nothing if it can."""
    before = _configuration(run)
    # of a run that is older than the hash, the decoder is told by its folder
    free = (*FREE, DECODER if _has_hash(before) and _has_hash(config) else "model.base_sha256")
    for section in ("seed", "model", "stage", "data", "optim"):
        then, here = dotted({section: before.get(section)}), dotted({section: config.get(section)})
        for key in sorted(then.keys() | here.keys()):
            if then.get(key) != here.get(key) and not key.startswith(free):
                if key == "model.base_sha256" and then.get(key):
                    return (
                        f"model.path={here.get('model.path')}: the weights there (sha256 {here[key]:.12}) "
                        f"are not those that {run.path} was started with ({then[key]:.12}); put those "
                        "back to resume it, or give another run_id to start a new run"
                    )
                return (
                    f"{key}={here.get(key)!s:.80}: {run.path} was started with {key}={then.get(key)!s:.80}; "
                    "give the old value to resume it, or another run_id to start a new run"
                )
    return ""


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
    stage: Stage,
    model: str,
    config: dict[str, Any],
    data: dict[str, Any],
    parent: Path | None,
    family: str,
    overrides: Sequence[str] = (),
) -> None:
    """Writes the lineage of a new run.

    Args:
        run: its folder.
        stage: what is trained.
        model: name of the geometry.
        config: the resolved configuration.
        data: path and hash of the training shards, hash of their tokenizer.
        parent: the checkpoint or model folder it starts from, if any.
        family: name of the curriculum.
        overrides: what a job of a sweep differs in, but for the stage.
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
        stage=stage.name,
        use=asdict(stage.use),
        monitor=list(stage.monitor),
        model=model,
        status="running",
        parent=ancestor,
        curriculum=family,
        overrides=sorted(overrides),
        tokenizer_sha256=data["tokenizer_sha256"],
        data=data,
        fingerprint=fingerprint(config),
        config=config,
    )


@contextmanager
def failure_recorded(run: RunFolder) -> Iterator[None]:
    """Records a run as failed where an error ends the block; the same command still resumes it.

    What was killed or told to stop stays `running`, and what reached its last step stays `finished`.
    """
    try:
        yield
    except Exception:
        with suppress(OSError, UserError):  # a full disk, a damaged record: the error itself says more
            if is_first_process() and run.lineage().get("status") == "running":
                run.write_lineage(status="failed")
        raise


def slurm_job() -> str | None:
    """The Slurm job that this process is part of, as Slurm's commands name it; None outside Slurm.

    Of an array it is ARRAY_TASK: the last of its tasks has the SLURM_JOB_ID of the array, and to requeue that
    would requeue all of them.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Puts this Slurm job back into the queue, as the last thing that it does; nothing outside Slurm.

    All its processes call this and end; the job finds its folder by its name or by its id. Neither Lightning
    nor submitit requeues it as well: Lightning would resume from a checkpoint of its own, and submitit gives
    up after a number of time limits.

    Raises:
        SystemExit: with 0, in all but the first process. One that fails may make Slurm kill the others
            (KillOnBadExit), among them the first one, before it has asked for the requeue.
    """
    job = slurm_job()
    if not job:
        return
    for number in STOP_SIGNALS:  # Slurm's answer is SIGTERM to all processes, which have nothing left to stop
        signal.signal(number, signal.SIG_IGN)
    if not is_first_process():
        raise SystemExit(0)
    say(back_in_the_queue(job))


def back_in_the_queue(job: str) -> str:
    """Asks Slurm to put a job back into the queue; what came of it, in words."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem and "Job is pending" not in problem:  # another rank, or a person, has asked before
        return (
            f"warning: job {job} is not back in the queue: scontrol requeue {job} failed ({problem}); submit "
            "it again, with sbatch --requeue"
        )
    return f"job {job} is back in the queue"


def provenance() -> dict[str, Any]:
    """Git state of the working tree, versions of what computes, the machine and its processor."""
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
        "cpu": cpu_name(),
        "created": now().isoformat(),
    }


def cpu_info() -> list[str]:
    """What Linux says of the CPUs; empty on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def cpu_name() -> str:
    """The CPU's model, as Linux has it; empty on other systems."""
    names = (line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name"))
    return next(names, "")


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout, e.g. an installed package
