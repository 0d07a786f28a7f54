"""Training one stage: a typed configuration in, a finished run folder out.

`train` is what `python train.py`, `plato2 train` and `plato2.train` call once the configuration is composed.
Hydra stays outside: what a job of a sweep has to know of it is a `Job`.
"""

from __future__ import annotations

import os
import shlex
import signal
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from plato2.config import TrainConfig, UserError
from plato2.runs.console import WARNINGS, Stopped, is_first_process, say
from plato2.runs.job import Job
from plato2.runs.parts import build_parts, build_stage, check_words, is_sharded, run_length
from plato2.runs.planning import print_plan
from plato2.runs.trainer import build_trainer

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    import pytorch_lightning as pl

    from plato2.data.module import DialogueDataModule
    from plato2.runs.checkpoint import Checkpoints
    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.folder import RunFolder
    from plato2.runs.ranks import RankWatch
    from plato2.stages import Stage


OF_PRETRAINED = ("path", "context_mask", "architecture", "base_sha256")
"""Keys of the model that only one made of a pretrained decoder has."""
OF_ADAPTER = ("adapter", "adapter_rank", "adapter_alpha", "base_dtype", "base")
"""Keys of the model that only one with an adapter has."""


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    run: Path
    """Its folder."""
    checkpoint: Path
    """The best one, by the stage's monitor."""
    value: float | None
    """The best value of the monitor, or the last one of `sweep_metric`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each."""


def train(keys: TrainConfig, resolved: dict[str, Any], job: Job) -> Trained | None:
    """Trains one stage as configured.

    Args:
        keys: the configuration.
        resolved: the same as plain values; what is recorded and compared when a run resumes.
        job: what the command knows beside it.

    Returns:
        Its result; None for `plan=true`.

    Raises:
        UserError: anything a user can fix.
    """
    from plato2.runs.folder import choose_run, held

    stage, corpus, data = build_parts(keys)
    if keys.model.is_pretrained:  # with what was read from its folder
        resolved["model"] = asdict(keys.model)
    absent = () if keys.model.is_pretrained else OF_PRETRAINED  # as it was before there were such models
    absent = absent if keys.model.has_adapter else (*absent, *OF_ADAPTER)
    absent = (*absent, "base_dtype") if keys.model.base_dtype == "float32" else absent
    absent = (*absent, "latent_at") if keys.model.latent_at == "front" else absent
    absent = (*absent, "latent_scale") if keys.model.latent_scale == 1.0 else absent
    resolved["model"] = {k: v for k, v in resolved["model"].items() if k not in absent}
    if resolved["stage"].get("recognition_bias") == "learned":
        del resolved["stage"]["recognition_bias"]
    if keys.plan:
        print_plan(keys, stage, data, job.other_stages())
        return None
    run, may_rename = choose_run(Path(keys.output_dir), keys.name, resolved, run_id(keys, job), keys.resume)
    with held(run, may_rename) if is_first_process() else nullcontext(run) as run:
        return train_run(keys, resolved, stage, corpus, data, run, job)


def train_run(
    keys: TrainConfig,
    resolved: dict[str, Any],
    stage: Stage,
    corpus: CorpusOfRun,
    data: DialogueDataModule,
    run: RunFolder,
    job: Job,
) -> Trained:
    """Trains in a folder that is this process's alone; resumes where it stopped."""
    from plato2.runs.callbacks import AtStart
    from plato2.runs.folder import curriculum, decisive, failure_recorded, go_on, record_start
    from plato2.runs.loggers import build_loggers
    from plato2.runs.ranks import facts, watch_ranks
    from plato2.runs.saved import checkpoint_step, was_pruned
    from plato2.runs.start import warm_start, with_base_of
    from plato2.weights.base import fill_base

    checkpoint, sentence = go_on(run, resolved)
    if checkpoint:
        early = run.finished and run.lineage().get("stopped_early") and "early_stopping" in keys.callbacks
        if early or checkpoint_step(checkpoint) >= keys.trainer["max_steps"]:
            return nothing_left(keys, run, checkpoint, job)
        if keys.study and was_pruned(checkpoint):
            return pruned(run, checkpoint_step(checkpoint), checkpoint)
    start, told = make_ready(keys, stage, corpus, data, job, is_new=checkpoint is None)
    accepted = stage.warm_starts_from
    if keys.model.has_adapter and (goes_on := checkpoint or start):
        keys.model = with_base_of(keys.model, goes_on)
    stage = build_stage(keys, "meta" if is_sharded(keys) else "cpu")  # sharded: each rank fills its share
    if keys.model.base:
        fill_base(stage.backbone, keys.model, later=is_sharded(keys))
    if start:
        sentence += f"{told}\n{warm_start(stage, start, accepted, data.tokenizer_sha256)}"
    family = curriculum(run, start)
    about: dict[str, Any] = {
        "name": keys.name,
        "stage": stage.name,
        "size": keys.model_name,
        "seed": keys.seed,
        "family": family,
        "parent": start or run.parent,
        "tags": keys.tags,
        "config": resolved,
    }
    loggers = build_loggers(keys.logger, run, checkpoint, **about)
    trainer = build_trainer(keys, stage, data, run, loggers, about["parent"], job)
    say(sentence)

    def record() -> None:
        if not (checkpoint and run.tokenizer.exists()):
            data.save_tokenizer(run.tokenizer)
        if checkpoint:
            run.record_resume(checkpoint_step(checkpoint), resolved)
            return
        (run.path / "config.yaml").write_text(as_yaml(resolved), encoding="utf-8")
        record_start(run, stage, keys.model_name, resolved, data.identity, start, family, job.overrides)

    trainer.callbacks.insert(0, AtStart(record))  # type: ignore[attr-defined]
    done = checkpoint_step(checkpoint) if checkpoint else 0
    alike = partial(facts, decisive(resolved), data, start, done)
    watch = watch_ranks(trainer, run.path, keys.startup_timeout_s, keys.step_timeout_s, alike)
    with failure_recorded(run):
        if is_first_process():
            length = run_length(keys, data, done)
            say("\n".join(filter(None, (length.sentence(), length.warning()))))
        if trainer.num_devices > 1:
            os.environ["RUN_ID"] = run.path.name  # for the processes that Lightning starts beside this one
        return fit(trainer, stage, data, run, checkpoint, keys, watch)


def make_ready(
    keys: TrainConfig, stage: Stage, corpus: CorpusOfRun, data: DialogueDataModule, job: Job, is_new: bool
) -> tuple[Path | None, str]:
    """Finds what a new run starts from, and makes the corpus where there is none; see `find_start`.

    Raises:
        UserError: there is nothing to start from, nobody starts the other processes, or the corpus cannot be
            made or does not fit the model.
    """
    from plato2.runs.parallel import check_launch

    start: Path | None = None
    told, unprepared = "", corpus.will_be_made
    if is_new:  # what is missing is said now, not after an hour of preparing
        start, told = find_start(keys, stage, None if unprepared else data.tokenizer_sha256, job)
    check_launch(
        keys.strategy["devices"],
        keys.strategy.get("num_nodes", 1),
        keys.strategy.get("accelerator", "auto"),
    )
    corpus.make_or_wait()
    data.check_model(keys.model.vocab_size, keys.model.max_position)
    data.check_tokenizer()
    check_words(keys, data)
    if start and unprepared:
        start, told = find_start(keys, stage, data.tokenizer_sha256, job)
    return start, told


def find_start(keys: TrainConfig, stage: Stage, tokenizer: str | None, job: Job) -> tuple[Path | None, str]:
    """What `init_from` means: a checkpoint or a model folder, and a further line on what `auto` took.

    Args:
        keys: the configuration.
        stage: the stage to be trained.
        tokenizer: hash of the data's tokenizer; None = the data are not prepared yet.
        job: of the command.

    Returns:
        None where the stage starts from random weights.

    Raises:
        UserError: nothing to start from; names what to run first.
    """
    from plato2.runs.start import OwnSweep, described, named_start, newest_parent, parent_stage

    parent = parent_stage(stage.name, stage.warm_starts_from)
    if keys.init_from not in ("auto", "scratch"):
        return named_start(keys.init_from, stage.name, stage.warm_starts_from), ""
    if keys.init_from == "scratch" or parent is None:
        return None, ""
    family, model = os.environ.get("RUN_ID") or keys.run_id, asdict(keys.model)
    sweep = OwnSweep(frozenset(job.overrides), job.side_by_side) if parent in job.sweep_stages else None
    output_dir, first = Path(keys.output_dir), f"{job.command} stage={parent}"
    run = newest_parent(output_dir, parent, keys.model_name, model, tokenizer, family, first, sweep)
    return run.best, f"\ninit_from=auto: {described(run)}"


def nothing_left(keys: TrainConfig, run: RunFolder, checkpoint: Path, job: Job) -> Trained:
    """What came of a run that has reached `max_steps`: its job of a sweep, or of a Slurm script, is skipped.

    Raises:
        UserError: the run was known to be finished, and was named.
    """
    from plato2.runs.folder import slurm_job
    from plato2.runs.saved import checkpoint_step, last_metrics

    by_job = slurm_job() and not (keys.run_id or os.environ.get("RUN_ID"))
    if run.finished and not job.in_sweep and not by_job:
        key = f"trainer.max_steps={keys.trainer['max_steps']}"
        cure = "raise trainer.max_steps to continue it, or choose another run_id"
        if run.lineage().get("stopped_early"):
            cure = "it no longer improved; leave out callbacks=early_stopping to continue it"
        raise UserError(f"{key}: {run.path} has already trained {checkpoint_step(checkpoint)} steps; {cure}")
    say(f"{run.path} is finished: skipped")
    value = run.value(checkpoint, keys.sweep_metric)
    return Trained(run.path, run.best, value, last_metrics(run.path / "metrics.csv"))


def pruned(run: RunFolder, step: int, checkpoint: Path) -> Trained:
    """Records that a run of a study is over before its last step, and what it had reached."""
    from plato2.runs.saved import best_value, last_metrics

    metrics = last_metrics(run.path / "metrics.csv")
    if is_first_process():
        run.write_lineage(status="pruned", step=step, metrics=metrics)
    say(f"pruned after {step:,} steps, the study has better ones: {run.path} (resume=PATH trains it on)")
    return Trained(run.path, run.best, best_value(checkpoint), metrics)


def fit(
    trainer: pl.Trainer,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    checkpoint: Path | None,
    keys: TrainConfig,
    watch: RankWatch | None,
) -> Trained:
    """Runs the Trainer to `max_steps` and closes the run.

    Raises:
        UserError: a loss that is not finite, hardware that is not there, a checkpoint that does not fit.
        SystemExit: it was told to stop.
    """
    import torch
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from plato2.runs.checkpoint import Checkpoints
    from plato2.runs.folder import requeue
    from plato2.runs.ranks import not_together, watched
    from plato2.stages.base import NonFiniteLoss

    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
        with watched(watch):
            trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except NonFiniteLoss as error:
        kept = f"last good checkpoint: {run.last}" if run.last.exists() else "there is no checkpoint yet"
        raise UserError(
            f"{error}. The weights before it are untouched; {kept}. A lower optim.lr, a longer "
            "optim.warmup_steps or precision 32-true usually cures it; look at those samples too"
        ) from error
    except Stopped:
        raise
    except SystemExit:  # how Lightning ends after a signal or Ctrl-C
        number = checkpoints.stop_signal or signal.SIGINT
        saved = f"step {checkpoints.saved_step} is saved" if run.last.exists() else "nothing is saved yet"
        say(f"stopped: {saved}; {same_command(keys, run)} resumes {run.path}")
        if number in WARNINGS:
            requeue()
        raise SystemExit(128 + number) from None
    except MisconfigurationException as error:
        raise UserError(f"trainer and strategy: {str(error).splitlines()[0]}") from error
    except torch.distributed.DistError as error:
        if checkpoints.has_started:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(not_together(trainer.world_size, keys.startup_timeout_s, reason)) from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if checkpoint is None or checkpoints.has_started or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"{checkpoint}: cannot be resumed from ({reason}); restore it, or start another run "
            "with run_id=NAME"
        ) from error
    return close(trainer, stage, run, checkpoints, keys)


def close(
    trainer: pl.Trainer, stage: Stage, run: RunFolder, checkpoints: Checkpoints, keys: TrainConfig
) -> Trained:
    """Closes the logs of a run that the Trainer has left, records that it is finished and prints its metrics.

    Raises:
        UserError: `sweep_metric` is not logged.
    """
    from rich.console import Console

    from plato2.runs.callbacks import metrics_table
    from plato2.runs.loggers import close_loggers
    from plato2.runs.stopping import StopEarly

    if any(getattr(callback, "pruned", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        close_loggers(trainer, run)
        return pruned(run, trainer.global_step, run.last)
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    early = any(isinstance(c, StopEarly) and c.has_stopped for c in trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.global_step < trainer.max_steps and not early:  # max_time and its like
        done = f"{trainer.global_step} of {trainer.max_steps}"
        say(f"stopped at step {done}; {same_command(keys, run)} resumes it: {run.path}")
    elif trainer.is_global_zero:
        run.write_lineage(status="finished", step=trainer.global_step, metrics=metrics, stopped_early=early)
    close_loggers(trainer, run)
    if trainer.is_global_zero:
        console = Console()
        console.print(f"{stage.name} after {trainer.global_step:,} steps: {run.path}", soft_wrap=True)
        console.print(metrics_table(metrics))
    sweep_metric = keys.sweep_metric
    if sweep_metric is not None and sweep_metric not in metrics:
        raise UserError(f"sweep_metric={sweep_metric}: not logged; choose one of {', '.join(metrics)}")
    value = checkpoints.best_value if sweep_metric is None else metrics[sweep_metric]
    return Trained(run.path, run.best, value, metrics)


def same_command(keys: TrainConfig, run: RunFolder) -> str:
    """The command that resumes a run that was stopped."""
    if keys.resume != "never":
        return "the same command"
    name = keys.run_id or os.environ.get("RUN_ID") or run.path.name  # a sweep's own, not its job's
    return f"the same command with resume=auto {shlex.quote(f'run_id={name}')}"


def run_id(keys: TrainConfig, job: Job) -> str | None:
    """In a sweep each job has a name of its own: the sweep's and the job's number."""
    from plato2.runs.folder import run_of_point

    if not job.in_sweep:
        return keys.run_id
    sweep = keys.run_id or os.environ["RUN_ID"]
    return f"{sweep}-{job.number}" if keys.trial is None else run_of_point(sweep, keys.trial, keys.seed)


class _Dumper(yaml.SafeDumper):
    """Texts that OmegaConf would read as numbers, such as the name 12e4567, get quotes."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        float(text.replace("_", ""))
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text)


def as_yaml(values: dict[str, Any]) -> str:
    """Plain values as they could stand in conf/."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
