"""Train a stage of PLATO-2's curriculum: compose -> build -> fit -> return the swept metric.

The only module that knows Hydra. `python train.py --help` explains the groups and keys; below this file
there are only plain typed arguments.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plato2.config import ModelConfig, OptimConfig, RunConfig, UserError, did_you_mean, expand_path
from plato2.files import replace_text
from plato2.runs.build import build, check_arguments, check_counts, check_keys
from plato2.runs.console import (
    Stopped,
    is_first_process,
    print_any_text,
    quiet_lightning,
    say,
    signals_stop_at_once,
)
from plato2.runs.keys import help_text, nearest_key

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    import pytorch_lightning as pl

    from plato2.data.module import DialogueDataModule
    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.folder import RunFolder
    from plato2.runs.length import RunLength
    from plato2.stages import Stage


@dataclass
class TrainConfig(RunConfig):
    """Everything `train.py` takes; the groups without a schema are checked by the constructors they name."""

    model: ModelConfig = MISSING
    optim: OptimConfig = MISSING
    stage: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    strategy: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING


ConfigStore.instance().store(name="schema", node=TrainConfig)
OmegaConf.register_new_resolver("path", lambda path: expand_path(path, "output_dir"), replace=True)
TRAINS_STAGE_1 = "PLATO2_SWEEP_TRAINS_STAGE_1"
"""Environment variable of the jobs of a sweep that has a stage 1 for its other stages."""
TEXT_KEYS = (
    "run_id",
    "init_from",
    "resume",
    "output_dir",
    "sweep_metric",
    "tags",
    "data.path",
    "data.cache_dir",
)
"""Keys whose values are names, paths or words, whatever they look like."""
CONF = Path(__file__).with_name("conf")


def explained_keys() -> str:
    """The keys in `--help`: indented by Hydra's template, with no dollar that it would replace."""
    width = min(shutil.get_terminal_size().columns, 100)
    return help_text(CONF, width).replace("$", "$$")


OmegaConf.register_new_resolver("known_keys", explained_keys, replace=True)


def train(config: DictConfig) -> float | None:
    """Trains one stage as configured.

    Returns:
        The best value of the stage's monitor, or the last value of `sweep_metric`; None for `plan=true`.

    Raises:
        UserError: anything a user can mend.
    """
    from plato2.runs.folder import choose_run, held

    refuse_unknown(config)
    keys: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    stage, corpus, data = build_parts(keys)
    if keys.plan:
        print_plan(keys, stage, data)
        return None
    run, may_rename = choose_run(Path(keys.output_dir), keys.name, resolved, run_id(keys), keys.resume)
    with held(run, may_rename) if is_first_process() else nullcontext(run) as run:
        return train_run(keys, resolved, stage, corpus, data, run)


def train_run(
    keys: TrainConfig,
    resolved: dict[str, Any],
    stage: Stage,
    corpus: CorpusOfRun,
    data: DialogueDataModule,
    run: RunFolder,
) -> float | None:
    """Trains in a folder that is this process's alone; goes on where it stopped."""
    from plato2.runs.folder import curriculum, go_on, record_start
    from plato2.runs.loggers import build_loggers
    from plato2.runs.saved import checkpoint_step
    from plato2.runs.start import warm_start

    checkpoint, sentence = go_on(run, resolved)
    if checkpoint and checkpoint_step(checkpoint) >= data.max_steps:
        return nothing_left(keys, run, checkpoint)
    start: Path | None = None
    told, unprepared = "", corpus.will_be_made
    if checkpoint is None:  # what is missing is said now, not after an hour of preparing
        start, told = find_start(keys, stage, None if unprepared else data.tokenizer_sha256)
    corpus.make_or_wait()
    data.check_model(keys.model.vocab_size, keys.model.max_position)
    data.check_tokenizer()
    tokenizer, accepted = data.tokenizer_sha256, stage.warm_starts_from
    if start and unprepared:
        start, told = find_start(keys, stage, tokenizer)
    stage = build_stage(keys, "cpu")
    if start:
        sentence += f"{told}\n{warm_start(stage, start, accepted, tokenizer)}"
    family = curriculum(run, start)
    about: dict[str, Any] = {
        "name": keys.name,
        "stage": stage.name,
        "family": family,
        "tags": keys.tags,
        "config": resolved,
    }
    loggers = build_loggers(keys.logger, run, checkpoint, **about)
    parent = start or run.parent
    trainer = build_trainer(keys, stage, data, run, loggers, parent)
    say(sentence)
    if is_first_process():
        length = run_length(data, checkpoint_step(checkpoint) if checkpoint else 0)
        say("\n".join(filter(None, (length.sentence(), length.warning()))))
        if checkpoint:
            run.record_resume(checkpoint_step(checkpoint), resolved)
        else:
            record_start(
                run, stage.name, keys.model_name, resolved, data.identity, start, family, job_overrides()
            )
            (run.path / "config.yaml").write_text(OmegaConf.to_yaml(resolved), encoding="utf-8")
            data.save_tokenizer(run.tokenizer)
    if trainer.num_devices > 1:
        os.environ["RUN_ID"] = run.path.name  # for the processes that Lightning starts beside this one
    return fit(trainer, stage, data, run, checkpoint, keys.sweep_metric)


def refuse_unknown(config: DictConfig) -> None:
    """Refuses what Hydra lets pass: `+key=value` where keys are closed, and a recipe that does not exist.

    Raises:
        UserError: names it.
    """
    for section, schema in {"": TrainConfig, "model": ModelConfig, "optim": OptimConfig}.items():
        node, prefix = (config[section], f"{section}.") if section else (config, "")
        check_keys(node, [field.name for field in fields(schema)], prefix, "the configuration")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    recipe, own = choices.get("recipe"), f"{choices.get('model')}-{choices.get('stage')}"
    if recipe not in (None, own) and not (CONF / "recipe" / f"{recipe}.yaml").exists():
        raise UserError(f"recipe={recipe}: no such recipe; choose one of conf/recipe/, none, or leave it out")


def build_parts(keys: TrainConfig) -> tuple[Stage, CorpusOfRun, DialogueDataModule]:
    """The stage, as yet without memory for its weights; its corpus, perhaps still to be made; its batches.

    Raises:
        UserError: values that the schemas cannot know to be wrong.
    """
    import pytorch_lightning as pl

    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.parallel import check_processes

    check_arguments(pl.Trainer, {k: v for k, v in keys.strategy.items() if v != "auto"}, "strategy")
    check_arguments(pl.Trainer, keys.trainer, "trainer")
    if not keys.plan:
        check_processes(keys.strategy["devices"], keys.strategy.get("num_nodes", 1))
    check_counts(keys.trainer, ("max_steps", "val_check_interval", "log_every_n_steps"), "trainer")
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
    steps = {"batch_tokens": keys.optim.batch_tokens, "max_steps": keys.trainer["max_steps"]}
    data = build(keys.data, "data", batch=batch, seed=keys.seed, **steps)
    return stage, CorpusOfRun(data.path, prepare), data


def build_stage(keys: TrainConfig, device: str) -> Stage:
    """The stage with its initial weights; on `meta` without them, to check options and to count parameters.

    Raises:
        UserError: values that the stage does not take.
    """
    import torch

    with torch.device(device):
        return build(keys.stage, "stage", model=keys.model, optim=keys.optim, seed=keys.seed)


def find_start(keys: TrainConfig, stage: Stage, tokenizer: str | None) -> tuple[Path | None, str]:
    """What `init_from` means: a checkpoint or a model folder, and a further line on what `auto` took.

    Args:
        keys: the configuration.
        stage: the stage to be trained.
        tokenizer: hash of the data's tokenizer; None = the data are not prepared yet.

    Returns:
        None where the stage starts from random weights.

    Raises:
        UserError: nothing to start from; names what to run first.
    """
    from plato2.runs.start import OwnSweep, described, named_start, needs_parent, newest_parent

    accepted = stage.warm_starts_from
    if keys.init_from == "scratch" or (keys.init_from == "auto" and not needs_parent(stage.name, accepted)):
        return None, ""
    if keys.init_from == "auto":
        family = os.environ.get("RUN_ID") or keys.run_id
        model, first = asdict(keys.model), first_command(keys)
        side_by_side = in_sweep() and not str(HydraConfig.get().launcher._target_).endswith(".BasicLauncher")
        has_own = in_sweep() and TRAINS_STAGE_1 in os.environ
        sweep = OwnSweep(frozenset(job_overrides()), side_by_side) if has_own else None
        run = newest_parent(Path(keys.output_dir), keys.model_name, model, tokenizer, family, first, sweep)
        return run.best, f"\ninit_from=auto: {described(run)}"
    return named_start(keys.init_from, stage.name, accepted), ""


def job_overrides() -> list[str]:
    """What a job of a sweep differs in from the others, but for the stage."""
    given = HydraConfig.get().overrides.task if in_sweep() else []
    return [word for word in given if not word.startswith("stage=")]


def first_command(keys: TrainConfig) -> str:
    """The command for the stage 1 that this command's stage starts from: same model, data and strategy."""
    groups = ("experiment", "model", "data", "strategy", "output_dir")
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = [word for word in given if re.split("[.=]", word.lstrip("+~"))[0] in groups]
    return shlex.join(["python", "train.py", *(kept or [f"model={keys.model_name}"]), "stage=1_coarse"])


def run_length(data: DialogueDataModule, done_steps: int) -> RunLength:
    """The tokens and epochs that a run has before it.

    Raises:
        UserError: the data cannot be read, or do not fit the options.
    """
    from plato2.runs.length import RunLength

    return RunLength(data.path, data.max_steps, done_steps, data.batch_tokens, data.epoch_tokens)


def nothing_left(keys: TrainConfig, run: RunFolder, checkpoint: Path) -> float | None:
    """The value of a run that has reached `max_steps`: its job of a sweep, or of a Slurm script, is skipped.

    Raises:
        UserError: the run was known to be finished, and was named.
    """
    from plato2.runs.saved import checkpoint_step

    by_job = "SLURM_JOB_ID" in os.environ and not (keys.run_id or os.environ.get("RUN_ID"))
    if run.finished and not in_sweep() and not by_job:
        key = f"trainer.max_steps={keys.trainer['max_steps']}"
        cure = "raise trainer.max_steps to go on with it, or choose another run_id"
        raise UserError(f"{key}: {run.path} has already trained {checkpoint_step(checkpoint)} steps; {cure}")
    say(f"{run.path} is finished: skipped")
    return run.value(checkpoint, keys.sweep_metric)


def fit(
    trainer: pl.Trainer,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    checkpoint: Path | None,
    sweep_metric: str | None,
) -> float | None:
    """Runs the Trainer to `max_steps` and closes the run."""
    import torch
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from rich.console import Console

    from plato2.runs.callbacks import metrics_table
    from plato2.runs.checkpoint import Checkpoints
    from plato2.runs.folder import requeue
    from plato2.runs.loggers import close_loggers
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
        say(f"stopped: {saved}; the same command goes on with {run.path}")
        if number == signal.SIGUSR1 and is_first_process():
            requeue()
        raise SystemExit(128 + number) from None
    except MisconfigurationException as error:
        raise UserError(f"trainer and strategy: {str(error).splitlines()[0]}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if checkpoint is None or checkpoints.has_started or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"{checkpoint}: cannot be gone on with ({reason}); restore it, or start another run "
            "with run_id=NAME"
        ) from error
    close_loggers(trainer)
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if trainer.global_step < data.max_steps:  # max_time and its like
        say(
            f"stopped at step {trainer.global_step} of {data.max_steps}; the same command goes on: {run.path}"
        )
    elif trainer.is_global_zero:
        run.write_lineage(status="finished", step=trainer.global_step, metrics=metrics)
    if trainer.is_global_zero:
        console = Console()
        console.print(f"{stage.name} after {trainer.global_step:,} steps: {run.path}", soft_wrap=True)
        console.print(metrics_table(metrics))
    if sweep_metric is None:
        return checkpoints.best_value
    if sweep_metric not in metrics:
        raise UserError(f"sweep_metric={sweep_metric}: not logged; choose one of {', '.join(metrics)}")
    return metrics[sweep_metric]


def build_trainer(
    keys: TrainConfig,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    loggers: list[Any],
    parent: Path | None,
) -> pl.Trainer:
    """The Lightning Trainer with the callbacks and loggers of the run.

    Raises:
        UserError: an argument that Lightning does not take, or hardware that is not there.
    """
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from plato2.evaluate.selection import ValidationFigures
    from plato2.runs.callbacks import Figures, LatentHistogram, RunProgress, SampleReplies, Throughput
    from plato2.runs.checkpoint import BetweenSteps, Checkpoints
    from plato2.runs.length import TimeLeft
    from plato2.runs.parallel import best_precision, n_ranks
    from plato2.talk.replies import ValidationReplies, ValidationVariety
    from plato2.weights.folder import EVALUATION, GENERATION

    strategy = dict(keys.strategy)
    if in_sweep() and strategy.get("devices") != 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"strategy.devices={strategy.get('devices')} in a sweep: every process would start it again; "
            "start it with torchrun or srun, use a Hydra launcher (hydra/launcher=...), or devices=1"
        )
    if strategy.get("precision") == "auto":
        strategy["precision"] = best_precision(str(strategy["accelerator"]))
    extra = {"tokenizer_sha256": data.tokenizer_sha256}
    checkpoints = Checkpoints(
        run.checkpoints, keys.checkpoint_steps, keys.checkpoint_minutes, stage.monitor, extra
    )
    callbacks: list[Any] = [
        BetweenSteps(checkpoints),
        checkpoints,
        Throughput(keys.model, stage.passes, keys.trainer["log_every_n_steps"]),
        RunProgress(f"{keys.model_name} {stage.name}"),
        TimeLeft(data.batching.unit_tokens, data.units_per_step),
        LatentHistogram(),
    ]
    sharded = isinstance(strategy.get("strategy"), dict)
    if sharded:  # Lightning's own "auto" is the number of machines
        ranks = n_ranks(strategy["devices"], strategy.get("num_nodes", 1))
        strategy["strategy"] = {**strategy["strategy"], "data_parallel_size": ranks}
    if keys.sample_replies and stage.name in GENERATION and not sharded:
        replies = ValidationReplies(data, keys.sample_replies)
        callbacks.append(SampleReplies(run.path / "replies.jsonl", replies))
    if (keys.selection or keys.human_rank) and stage.name in EVALUATION and not sharded:
        callbacks.append(Figures(ValidationFigures(data, keys.selection, keys.human_rank, parent)))
    if keys.latent_contexts and getattr(stage, "recognition", None) is not None and not sharded:
        callbacks.append(Figures(ValidationVariety(data, keys.latent_contexts)))
    quiet_lightning()
    fixed = {
        "max_epochs": 1,  # a run is one epoch of max_steps; the data's epochs are the stream's
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    node = {**fixed, **strategy, **keys.trainer, "_target_": "pytorch_lightning.Trainer"}
    try:
        return build(node, "trainer", callbacks=callbacks, logger=loggers or False, default_root_dir=run.path)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer and strategy: {str(error).splitlines()[0]}") from error


class Sweep(Callback):
    """Gives the jobs of a sweep one name, goes on with an interrupted one, prints what came of it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Finds the newest unfinished sweep of the same command, else starts a new one.

        A finished curriculum (`report=true`) is not trained again: its jobs are skipped, its report is shown.
        """
        here, named = Path(config.hydra.sweep.dir), config.run_id or os.environ.get("RUN_ID")
        params: Any = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
        self.command = command = {"overrides": sorted(config.hydra.overrides.task), "params": params}
        for record in sorted(here.parent.glob("*/sweep.json"), reverse=True):
            try:
                earlier = json.loads(record.read_text(encoding="utf-8"))
                again, name = bool(earlier["finished"]), str(earlier["name"])
                same = earlier["command"] == command and (not again or config.report)
            except (OSError, ValueError, KeyError, TypeError) as error:
                say(f"warning: {record} is passed over: not the record of a sweep ({error})")
                continue
            if same and (name == named if named else config.resume == "auto"):
                self.record, self.name = record, name
                say(
                    f"the sweep {self.name} is finished: its report again (resume=never trains it anew)"
                    if again
                    else f"going on with the unfinished sweep {self.name}"
                )
                break
        else:
            self.record = self._new(here) / "sweep.json"
            self.name = named or self.record.parent.name
        os.environ["RUN_ID"] = self.name
        os.environ.pop(TRAINS_STAGE_1, None)
        swept = [word.partition("=") for word in command["overrides"]]
        stages = [params.get("stage", ""), *(value for key, _, value in swept if key == "stage")]
        if "1_coarse" in (stage.strip() for value in stages for stage in str(value).split(",")):
            os.environ[TRAINS_STAGE_1] = "1"
        self._write(command=command, name=self.name, finished=False)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Closes the sweep's record; prints its runs, the best first, or with `report=true` the report."""
        self._write(command=self.command, name=self.name, finished=True)
        for variable in ("RUN_ID", TRAINS_STAGE_1):
            os.environ.pop(variable, None)
        if config.plan:
            return
        output_dir = Path(expand_path(config.output_dir, "output_dir"))
        try:
            if config.report:
                from plato2.evaluate.report import report_sweep

                numbers = {"n_latent_contexts": config.latent_contexts, "n_human": config.human_rank}
                report_sweep(output_dir, self.name, **numbers)
            else:
                self._compare(output_dir, config.sweep_metric)
        except UserError as error:  # Hydra makes a mere warning of a callback's error
            fail(str(error))

    def _compare(self, output_dir: Path, metric: str | None) -> None:
        from rich.console import Console

        from plato2.evaluate.runs import compare, runs_tables, winners_first

        paths = [path.parent for path in output_dir.glob(f"*/{self.name}-*/lineage.json")]
        runs = winners_first(compare(paths, metric))
        say(f"the sweep {self.name}, the best first:")
        Console(highlight=False).print(*runs_tables(runs), sep="\n")

    def _new(self, folder: Path) -> Path:
        """A folder that no other sweep has: two can begin in one second."""
        for number in count(1):
            new = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                new.mkdir(parents=True)
                return new
            except FileExistsError:
                continue
            except OSError as error:  # Hydra makes a mere warning of a callback's error
                fail(f"output_dir: {new} cannot be made ({error.strerror}); choose another output_dir")
        raise AssertionError("count has no end")

    def _write(self, **entries: Any) -> None:
        replace_text(self.record, json.dumps(entries, indent=2) + "\n")


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
        sharded=isinstance(strategy.get("strategy"), dict),
        half=strategy.get("precision") != "32-true" or isinstance(strategy.get("strategy"), dict),
        unit_tokens=data.batching.unit_tokens,
        batch_tokens=data.batch_tokens,
        steps=data.max_steps,
    )
    table = Table(title=f"{keys.name}: what the run needs", title_justify="left", show_header=False)
    length = run_length(data, 0) if data.exists else None
    for name, text in made.rows(length):
        table.add_row(name, text)
    Console().print(table)
    if length and length.warning():
        say(length.warning())


def in_sweep() -> bool:
    """Whether this is a job of `-m` or of a sweep file."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_id(keys: TrainConfig) -> str | None:
    """In a sweep each job has a name of its own: the sweep's and the job's number."""
    if not in_sweep():
        return keys.run_id
    return f"{keys.run_id or os.environ['RUN_ID']}-{HydraConfig.get().job.num}"


def fail(sentence: str) -> NoReturn:
    """Ends with one line for the person at the terminal."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf found, on one line; without the advice to force an unknown key with `+`."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
    lines = f"{error}\n{cause}".split("Config search path:")[0].splitlines()
    left_out = ("To append to", "reference_type", "object_type")
    told = " ".join(" ".join(line.strip() for line in lines if not line.strip().startswith(left_out)).split())
    where = "(--help lists groups, options and keys, --cfg job prints their values)"
    unknown = re.search(r"Key '[^']*' (?:is )?not in .*full_key: (\S+)", told)
    if unknown:
        return f"{unknown[1]}: no such key; {meant(unknown[1])} {where}"
    option = re.search(r"Could not find '([^/']+)/([^']+)' Available options in '[^']*': (.*)", told)
    if option:
        return (
            f"{option[1]}={option[2]}: no such option; {did_you_mean(option[2], option[3].split())} {where}"
        )
    return f"{told} {where}"


def meant(key: str) -> str:
    """The nearest key to one that is not known."""
    near = nearest_key(key, CONF)
    return f"did you mean {near}?" if near else "there is none like it"


def refuse_unknown_flags(words: list[str]) -> None:
    """Refuses what Hydra would answer with a page of usage; keys are given without dashes.

    Raises:
        UserError: names the flag and what was probably meant.
    """
    parser = get_args_parser()
    for flag in (word for word in parser.parse_known_args(words)[1] if word.startswith("-")):
        name, _, value = flag.lstrip("-").replace("-", "_").partition("=")
        key = nearest_key(name, CONF) or ""
        flags = [option for action in parser._actions for option in action.option_strings]
        is_key = key.rpartition(".")[2] == name
        near = f"did you mean {key}={value or 'VALUE'}?" if is_key else did_you_mean(flag, flags)
        raise UserError(f"{flag}: no such flag; {near}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Runs one job; a user's mistake is one line and exit code 2."""
    try:
        return train(config)
    except UserError as error:
        fail(str(error))
    except OmegaConfBaseException as error:  # a value that is missing, found when it is needed
        fail(explain(error))
    except OSError as error:
        place = error.filename or config.output_dir
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fail(f"{place}: {error.strerror}; make it writable, or choose another output_dir")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(
            f"{place}: {error.strerror}; what was saved is whole: make room and start the same command again"
        )


def in_quotes(override: str) -> str:
    """An override with quotes around each text that Hydra's grammar has no room for: `~/数据`, `a=b`, `it's`.

    Options of Hydra's own stay as they are, but for `~` and variables in the path of `--config-dir`.

    Raises:
        UserError: Hydra cannot read it even so.
    """
    key, sign, value = override.partition("=")
    if key == "--config-dir" and sign:
        return f"{key}={expand_path(value, key)}"
    if not sign or override.startswith("-") or (problem := _unreadable(override)) is None:
        return override
    quoted = re.sub(  # what stands between brackets and commas, after the name in a mapping
        r'([\w ]+: )?([^][{},"]+)',
        lambda text: text[0] if _unreadable(f"{key}={text[2]}") is None else f'{text[1] or ""}"{text[2]}"',
        value,
    )
    if _unreadable(f"{key}={quoted}") is None:
        return f"{key}={quoted}"
    escaped = value.replace('"', '\\"')
    whole = f'{key}="{escaped}"'
    cure = f"if it is one text, write {shlex.quote(whole)}" if _unreadable(whole) is None else "see --help"
    raise UserError(f"{override}: Hydra cannot read this override ({problem}); {cure}")


def _unreadable(override: str) -> str | None:
    """What Hydra has against an override; None = nothing."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return str(error).splitlines()[0]
    return None


def as_text(word: str) -> str:
    """An override of a name or path, with quotes where Hydra would read a number: 12e4567 is no infinity."""
    key, is_override, value = word.partition("=")
    if not is_override or key.lstrip("+") not in TEXT_KEYS:
        return word

    def quoted(part: re.Match[str]) -> str:
        text = part[0].strip()
        try:
            float(text.replace("_", ""))
        except ValueError:
            return f"'{text}'" if text.lower() in ("true", "false") else part[0]
        return f"'{text}'"

    return "=".join([key, re.sub(r"[^,\[\]]+", quoted, value)])


def command_line() -> None:
    """`main`, where what Hydra finds wrong with the command line or conf/ is one line, too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it finds
    print_any_text()
    try:
        refuse_unknown_flags(sys.argv[1:])
        sys.argv[1:] = [in_quotes(as_text(word)) for word in sys.argv[1:]]
        with signals_stop_at_once():
            main()
    except UserError as error:
        fail(str(error))
    except Stopped as stop:
        say("stopped: nothing was being trained; the same command starts again, or goes on")
        if stop.number == signal.SIGUSR1 and is_first_process():
            from plato2.runs.folder import requeue

            requeue()
        raise
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        given = [word for word in sys.argv[1:] if (CONF / word.split("=")[0]).is_dir()]
        fail(f"{' '.join(given)}: the option of a group is never a mere number (--help lists them)")


if __name__ == "__main__":
    command_line()
