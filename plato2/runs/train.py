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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from plato2.config import TrainConfig, UserError
from plato2.runs.build import build, check_arguments, check_counts
from plato2.runs.console import WARNINGS, Stopped, is_first_process, quiet_lightning, say

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    import pytorch_lightning as pl

    from plato2.data.module import DialogueDataModule
    from plato2.runs.checkpoint import Checkpoints
    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.folder import RunFolder
    from plato2.runs.length import RunLength
    from plato2.stages import Stage


NOT_LIGHTNINGS = (
    ("gradient_clip_val", 0, "optim.clip_norm"),
    ("accumulate_grad_batches", 1, "optim.batch_tokens (tokens of one optimizer step)"),
    ("limit_train_batches", 1.0, "trainer.max_steps"),
)
"""Arguments of the Trainer that it refuses for these stages, the value that is off, and the key for it."""


@dataclass(frozen=True)
class Job:
    """What the command that starts a run knows beside its configuration."""

    number: int | None = None
    """In a sweep; None = not part of one."""
    overrides: tuple[str, ...] = ()
    """How a job of a sweep differs from the others, apart from the stage."""
    sweep_stages: tuple[str, ...] = ()
    """The stages of the sweep, this one's among them, where it says them."""
    side_by_side: bool = False
    """Whether the jobs of the sweep run at the same time."""
    command: str = "python train.py"
    """The command for another stage of the same model, data and strategy, but for `stage=`."""

    @property
    def in_sweep(self) -> bool:
        """Whether it is a job of a sweep."""
        return self.number is not None


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


def train(keys: TrainConfig, resolved: dict[str, Any], job: Job = Job()) -> Trained | None:
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
    if keys.plan:
        print_plan(keys, stage, data)
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
    from plato2.runs.folder import curriculum, failure_recorded, go_on, record_start
    from plato2.runs.loggers import build_loggers
    from plato2.runs.saved import checkpoint_step
    from plato2.runs.start import warm_start

    checkpoint, sentence = go_on(run, resolved)
    if checkpoint:
        early = run.finished and run.lineage().get("stopped_early") and "early_stopping" in keys.callbacks
        if early or checkpoint_step(checkpoint) >= keys.trainer["max_steps"]:
            return nothing_left(keys, run, checkpoint, job)
    start, told = make_ready(keys, stage, corpus, data, job, is_new=checkpoint is None)
    accepted = stage.warm_starts_from
    stage = build_stage(keys, "cpu")
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
    with failure_recorded(run):
        if is_first_process():
            done = checkpoint_step(checkpoint) if checkpoint else 0
            length = run_length(data, keys.trainer["max_steps"], done)
            say("\n".join(filter(None, (length.sentence(), length.warning()))))
        if trainer.num_devices > 1:
            os.environ["RUN_ID"] = run.path.name  # for the processes that Lightning starts beside this one
        return fit(trainer, stage, data, run, checkpoint, keys)


def build_parts(keys: TrainConfig) -> tuple[Stage, CorpusOfRun, DialogueDataModule]:
    """The stage, as yet without memory for its weights; its corpus, perhaps still to be made; its batches.

    Raises:
        UserError: values that the schemas cannot know to be wrong.
    """
    import pytorch_lightning as pl

    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.parallel import check_devices, check_processes

    check_arguments(pl.Trainer, {k: v for k, v in keys.strategy.items() if v != "auto"}, "strategy")
    check_arguments(pl.Trainer, keys.trainer, "trainer")
    check_counts(keys.trainer, ("max_steps", "val_check_interval", "log_every_n_steps"), "trainer")
    for name, off, cure in NOT_LIGHTNINGS:
        if keys.trainer.get(name) not in (None, off):
            raise UserError(
                f"trainer.{name}={keys.trainer[name]}: the stages do this themselves; use {cure}, and leave "
                "it out"
            )
    check_devices(keys.strategy.get("accelerator", "auto"), keys.strategy["devices"])
    if not keys.plan:
        check_processes(keys.strategy["devices"], keys.strategy.get("num_nodes", 1))
    batch_node = keys.stage.pop("batch")
    stage = build_stage(keys, "meta")  # first: what it refuses, such as a head, is not the batch's to name
    head = {"head": keys.stage["head"]} if "head" in keys.stage else {}
    batch = build(head | batch_node, "stage.batch")
    if not hasattr(batch, "roles"):
        if keys.model.n_role:
            raise UserError(
                f"model.n_role={keys.model.n_role}: {type(batch).__name__} has no roles; use model.n_role=0"
            )
    elif batch.roles != (keys.model.n_role > 0):
        cure = "model.n_role=4" if batch.roles else "stage.batch.roles=true"
        raise UserError(
            f"stage.batch.roles={batch.roles}, model.n_role={keys.model.n_role}: roles take both; add {cure}"
        )
    if head and head["head"] != batch.head:
        raise UserError(
            f"stage.batch.head={batch.head}, stage.head={head['head']}: the batch is made for the head; "
            "leave out stage.batch.head"
        )
    prepare = keys.data.pop("prepare", None)
    check_arguments(CorpusOfRun, {"prepare": prepare}, "data")
    data = build(keys.data, "data", batch=batch, seed=keys.seed, batch_tokens=keys.optim.batch_tokens)
    return stage, CorpusOfRun(data.path, prepare), data


def build_stage(keys: TrainConfig, device: str) -> Stage:
    """The stage with its initial weights; on `meta` without them, to check options and to count parameters.

    Raises:
        UserError: values that the stage does not take.
    """
    import torch

    with torch.device(device):
        return build(keys.stage, "stage", model=keys.model, optim=keys.optim, seed=keys.seed)


def make_ready(
    keys: TrainConfig, stage: Stage, corpus: CorpusOfRun, data: DialogueDataModule, job: Job, is_new: bool
) -> tuple[Path | None, str]:
    """Finds what a new run starts from, and makes the corpus where there is none; see `find_start`.

    Raises:
        UserError: there is nothing to start from, or the corpus cannot be made or does not fit the model.
    """
    start: Path | None = None
    told, unprepared = "", corpus.will_be_made
    if is_new:  # what is missing is said now, not after an hour of preparing
        start, told = find_start(keys, stage, None if unprepared else data.tokenizer_sha256, job)
    corpus.make_or_wait()
    data.check_model(keys.model.vocab_size, keys.model.max_position)
    data.check_tokenizer()
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


def run_length(data: DialogueDataModule, max_steps: int, done_steps: int) -> RunLength:
    """The tokens and epochs that a run has before it.

    Raises:
        UserError: the data cannot be read, or do not fit the options.
    """
    from plato2.runs.length import RunLength

    return RunLength(data.path, max_steps, done_steps, data.batch_tokens, data.epoch_tokens)


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


def fit(
    trainer: pl.Trainer,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    checkpoint: Path | None,
    keys: TrainConfig,
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
    from plato2.stages.base import NonFiniteLoss

    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
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
        raise UserError(
            f"strategy: {trainer.world_size} processes were to start together, but some did not "
            f"({str(error).splitlines()[0]}); the first one (rank 0) says why it failed or does not run"
        ) from error
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


def build_trainer(
    keys: TrainConfig,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    loggers: list[Any],
    parent: Path | None,
    job: Job,
) -> pl.Trainer:
    """The Lightning Trainer with the callbacks and loggers of the run.

    Raises:
        UserError: an argument that Lightning does not take, or hardware that is not there.
    """
    from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from plato2.runs.wandb import WandbRun, WholeRows

    strategy = strategy_arguments(keys, job)
    callbacks = build_callbacks(keys, stage, data, run, parent)
    callbacks += [build(node, f"callbacks.{name}") for name, node in keys.callbacks.items()]
    callbacks += [WholeRows(logger) for logger in loggers if isinstance(logger, WandbRun)]
    quiet_lightning()
    fixed: dict[str, Any] = {
        "max_epochs": -1,  # a run is one endless epoch; the data's epochs are the stream's
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        fixed["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # `requeue` does it
    node = {**fixed, **strategy, **keys.trainer, "_target_": "pytorch_lightning.Trainer"}
    try:
        return build(node, "trainer", callbacks=callbacks, logger=loggers or False, default_root_dir=run.path)
    except (MisconfigurationException, ValueError) as error:
        told = str(error).splitlines()[0]
        missing = "is not available" in told or "No supported gpu" in told
        cure = "; give strategy=cpu, or strategy=auto for what this machine has" if missing else ""
        raise UserError(f"trainer and strategy: {told}{cure}") from error


def strategy_arguments(keys: TrainConfig, job: Job) -> dict[str, Any]:
    """The group `strategy` as the Trainer takes it.

    Raises:
        UserError: a sweep that each of several processes would start again.
    """
    from plato2.runs.folder import several_processes
    from plato2.runs.parallel import best_precision, n_ranks

    strategy = dict(keys.strategy)
    started = "LOCAL_RANK" in os.environ or several_processes()
    if job.in_sweep and strategy.get("devices") != 1 and not started:
        raise UserError(
            f"strategy.devices={strategy.get('devices')} in a sweep: every process would start it again; "
            "start it with torchrun or srun, use a Hydra launcher (hydra/launcher=...), or devices=1"
        )
    if strategy.get("precision") == "auto":
        strategy["precision"] = best_precision(str(strategy["accelerator"]))
    if is_sharded(keys):  # Lightning's own "auto" is the number of machines
        ranks = n_ranks(strategy["devices"], strategy.get("num_nodes", 1))
        strategy["strategy"] = {**strategy["strategy"], "data_parallel_size": ranks}
    return strategy


def build_callbacks(
    keys: TrainConfig, stage: Stage, data: DialogueDataModule, run: RunFolder, parent: Path | None
) -> list[pl.Callback]:
    """Checkpoints, progress and speed of a run, and the replies and figures beside its validations.

    Decoding and ranking beside a validation need the whole model on a rank: sharded runs go without them.
    """
    from plato2.runs.callbacks import Figures, LatentHistogram, RunProgress, SampleReplies, Throughput
    from plato2.runs.checkpoint import BetweenSteps, Checkpoints
    from plato2.runs.length import TimeLeft
    from plato2.talk.replies import ValidationReplies, ValidationVariety
    from plato2.talk.selection import ValidationFigures

    extra = {"tokenizer_sha256": data.tokenizer_sha256}
    checkpoints = Checkpoints(
        run.checkpoints, keys.checkpoint_steps, keys.checkpoint_minutes, stage.monitor, extra
    )
    callbacks: list[pl.Callback] = [
        BetweenSteps(checkpoints),
        checkpoints,
        Throughput(keys.model, stage.passes, keys.trainer["log_every_n_steps"]),
        RunProgress(f"{keys.model_name} {stage.name}"),
        TimeLeft(data.batching.unit_tokens, data.units_per_step),
        LatentHistogram(),
    ]
    if is_sharded(keys):
        return callbacks
    if keys.sample_replies and stage.use.role == "generation":
        replies = ValidationReplies(data, keys.sample_replies)
        callbacks.append(SampleReplies(run.path / "replies.jsonl", replies))
    if (keys.selection or keys.human_rank) and stage.use.serves("evaluation"):
        callbacks.append(Figures(ValidationFigures(data, keys.selection, keys.human_rank, parent)))
    if keys.latent_contexts and getattr(stage, "recognition", None) is not None:
        callbacks.append(Figures(ValidationVariety(data, keys.latent_contexts)))
    return callbacks


def is_sharded(keys: TrainConfig) -> bool:
    """Whether ranks share weights and optimizer state out: FSDP2, whose strategy is a node of its own."""
    return isinstance(keys.strategy.get("strategy"), dict)


def print_plan(keys: TrainConfig, stage: Stage, data: DialogueDataModule) -> None:
    """Prints what a run will need; nothing is prepared or trained."""
    from rich.console import Console
    from rich.table import Table

    from plato2.runs.parallel import n_ranks
    from plato2.runs.plan import plan

    strategy = keys.strategy
    ranks = n_ranks(strategy["devices"], strategy.get("num_nodes", 1))
    data.check_ranks(ranks)
    made = plan(
        keys.model,
        parameters=sum(parameter.numel() for parameter in stage.parameters()),
        passes=stage.passes,
        ranks=ranks,
        sharded=is_sharded(keys),
        half=strategy.get("precision") != "32-true" or is_sharded(keys),
        unit_tokens=data.batching.unit_tokens,
        batch_tokens=data.batch_tokens,
        steps=keys.trainer["max_steps"],
    )
    table = Table(title=f"{keys.name}: what the run needs", title_justify="left", show_header=False)
    length = run_length(data, keys.trainer["max_steps"], 0) if data.exists else None
    for name, text in made.rows(length):
        table.add_row(name, text)
    Console().print(table)
    if length and length.warning():
        say(length.warning())


def run_id(keys: TrainConfig, job: Job) -> str | None:
    """In a sweep each job has a name of its own: the sweep's and the job's number."""
    if not job.in_sweep:
        return keys.run_id
    return f"{keys.run_id or os.environ['RUN_ID']}-{job.number}"


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
