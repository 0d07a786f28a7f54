"""Train a stage of PLATO-2's curriculum: compose -> build -> fit -> return the swept metric.

The only module that knows Hydra. `python train.py --help` explains the groups and keys; below this file
there are only plain typed arguments.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from plato2.config import ModelConfig, OptimConfig, RunConfig, UserError

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    import pytorch_lightning as pl

    from plato2.data.module import DialogueDataModule
    from plato2.stages import Stage
    from plato2.training.run import RunFolder


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
ConfigStore.instance().store(group="model", name="schema", node=ModelConfig)
ConfigStore.instance().store(group="optim", name="schema", node=OptimConfig)


def train(config: DictConfig) -> float | None:
    """Trains one stage as configured.

    Returns:
        The best value of the stage's monitor, or the last value of `sweep_metric`; None for `plan=true`.

    Raises:
        UserError: anything a user can mend.
    """
    from plato2.training.checkpoint import checkpoint_step, warm_start
    from plato2.training.run import choose_run, record_start, warm_start_path

    keys: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    max_steps = keys.trainer["max_steps"]
    batch = build(keys.stage.pop("batch"), "stage.batch")
    stage = build(keys.stage, "stage", model=keys.model, optim=keys.optim, seed=keys.seed, meta=keys.plan)
    data = build(
        keys.data,
        "data",
        batch=batch,
        batch_tokens=keys.optim.batch_tokens,
        max_steps=max_steps,
        seed=keys.seed,
    )
    if keys.plan:
        print_plan(keys, stage, data)
        return None

    data.prepare_or_wait()
    data.check_model(keys.model.vocab_size, keys.model.max_position)
    output_dir = Path(keys.output_dir)
    run, checkpoint, sentence = choose_run(output_dir, keys.name, resolved, run_id(keys), keys.resume)
    if checkpoint and checkpoint_step(checkpoint) >= max_steps:
        if in_sweep():
            say(f"{run.path} is finished: skipped")
            return None
        raise UserError(
            f"trainer.max_steps={max_steps}: {run.path} has already trained {checkpoint_step(checkpoint)} "
            "steps; raise trainer.max_steps to go on with it, or choose another run_id"
        )
    say(sentence)
    parent = None
    if checkpoint is None:
        accepted, tokenizer = stage.warm_starts_from, data.tokenizer_sha256
        parent = warm_start_path(keys.init_from, stage.name, accepted, output_dir, keys.model_name, tokenizer)
        if parent:
            say(warm_start(stage, parent, stage.name, accepted, tokenizer))
    trainer = build_trainer(keys, stage, data, run, checkpoint, resolved)
    if is_first_process():
        if checkpoint:
            run.record_resume(checkpoint_step(checkpoint), resolved)
        else:
            corpus = {"path": data.path, "sha256": data.data_sha256}
            record_start(run, stage.name, keys.model_name, resolved, corpus, data.tokenizer_sha256, parent)
            (run.path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
            data.save_tokenizer(run.tokenizer)
    return fit(trainer, stage, data, run, checkpoint, keys.sweep_metric)


def fit(
    trainer: pl.Trainer,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    checkpoint: Path | None,
    sweep_metric: str | None,
) -> float | None:
    """Runs the Trainer to `max_steps` and closes the run."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException
    from rich.console import Console

    from plato2.stages.base import NonFiniteLoss
    from plato2.training.callbacks import metrics_table
    from plato2.training.checkpoint import Checkpoints

    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    try:
        trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except NonFiniteLoss as error:
        kept = (
            f"the last good checkpoint is {run.last}" if run.last.exists() else "there is no checkpoint yet"
        )
        raise UserError(
            f"{error}. The weights before it are untouched; {kept}. A lower optim.lr, a longer "
            "optim.warmup_steps or precision 32-true usually cures it; look at those samples too"
        ) from error
    except SystemExit as stop:  # Lightning's way of ending after SIGTERM and Ctrl-C
        saved = f"step {checkpoints.saved_step} is saved" if run.last.exists() else "nothing is saved yet"
        say(f"stopped: {saved}; the same command goes on with {run.path}")
        raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if trainer.is_global_zero:
        run.write_lineage(status="finished", step=trainer.global_step, metrics=metrics)
        title = f"{stage.name} after {trainer.global_step:,} steps: {run.path}"
        Console().print(metrics_table(metrics, title))
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
    checkpoint: Path | None,
    resolved: dict[str, Any],
) -> pl.Trainer:
    """The Lightning Trainer with the callbacks and loggers of the run."""
    from plato2.talk.replies import ValidationReplies
    from plato2.training.callbacks import LatentHistogram, RunProgress, SampleReplies, Throughput
    from plato2.training.checkpoint import Checkpoints
    from plato2.training.parallel import best_precision, n_ranks

    strategy = dict(keys.strategy)
    if in_sweep() and strategy.get("devices") != 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"strategy.devices={strategy.get('devices')} in a sweep: each process of a job would start the "
            "sweep again; start it with torchrun or srun, use a Hydra launcher (hydra/launcher=...), or "
            "devices=1"
        )
    if strategy.get("precision") == "auto":
        strategy["precision"] = best_precision(str(strategy["accelerator"]))
    extra = {"tokenizer_sha256": data.tokenizer_sha256}
    callbacks: list[Any] = [
        Checkpoints(run.checkpoints, keys.checkpoint_steps, stage.monitor, extra),
        Throughput(keys.model, stage.passes, keys.trainer["log_every_n_steps"]),
        RunProgress(f"{keys.model_name} {stage.name}"),
        LatentHistogram(),
    ]
    sharded = isinstance(strategy.get("strategy"), dict)
    if sharded:  # Lightning's own "auto" is the number of machines
        ranks = n_ranks(strategy["devices"], strategy.get("num_nodes", 1))
        strategy["strategy"] = {**strategy["strategy"], "data_parallel_size": ranks}
    if keys.sample_replies and stage.name != "2_eval" and not sharded:
        replies = ValidationReplies(data, keys.sample_replies)
        callbacks.append(SampleReplies(run.path / "replies.jsonl", replies))
    quiet_lightning()
    fixed = {
        "_target_": "pytorch_lightning.Trainer",
        "max_epochs": 1,  # a run is one epoch of max_steps; the data's epochs are the stream's
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    loggers = build_loggers(keys, stage, run, checkpoint, resolved)
    return build(
        {**fixed, **strategy, **keys.trainer},
        "trainer",
        callbacks=callbacks,
        logger=loggers or False,
        default_root_dir=run.path,
    )


def build_loggers(
    keys: TrainConfig, stage: Stage, run: RunFolder, checkpoint: Path | None, resolved: dict[str, Any]
) -> list[Any]:
    """One logger for each entry of the logger group, with what it needs of the run."""
    from plato2.training.checkpoint import checkpoint_step

    run.path.mkdir(parents=True, exist_ok=True)
    of_the_run: dict[str, dict[str, Any]] = {
        "csv": {"folder": run.path, "resumed_step": checkpoint_step(checkpoint) if checkpoint else None},
        "tensorboard": {"save_dir": run.path},
        "wandb": {
            "save_dir": run.path,
            "name": f"{keys.name}/{run.path.name}",
            "id": f"{keys.name}-{run.path.name}".replace(".", "_"),
            "resume": "allow",
            "group": os.environ.get("RUN_ID", run.path.name),  # one sweep or curriculum
            "job_type": stage.name,
            "tags": keys.tags,
            "config": resolved,
        },
    }
    return [build(node, f"logger.{name}", **of_the_run.get(name, {})) for name, node in keys.logger.items()]


class Sweep(Callback):
    """Gives the jobs of a sweep one name, goes on with an interrupted sweep, prints the closing report."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Finds the newest unfinished sweep of the same command, else starts a new one."""
        here = Path(config.hydra.sweep.dir)
        params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
        command = {"overrides": sorted(config.hydra.overrides.task), "params": params}
        self.record, self.name = here / "sweep.json", os.environ.get("RUN_ID") or here.name
        for record in sorted(here.parent.glob("*/sweep.json"), reverse=True):
            earlier = json.loads(record.read_text(encoding="utf-8"))
            same = earlier.get("command") == command and not earlier.get("finished")
            if same and "RUN_ID" not in os.environ and config.resume == "auto":
                self.record, self.name = record, earlier["name"]
                say(f"going on with the unfinished sweep {self.name}")
                break
        os.environ["RUN_ID"] = self.name
        self._write(command=command, name=self.name, finished=False)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Closes the sweep's record; `report=true` prints the curriculum's table."""
        self._write(**json.loads(self.record.read_text(encoding="utf-8")) | {"finished": True})
        os.environ.pop("RUN_ID", None)
        if config.report and not config.plan:
            from plato2.evaluate.report import report_sweep

            report_sweep(Path(config.output_dir), self.name)

    def _write(self, **entries: Any) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def print_plan(keys: TrainConfig, stage: Stage, data: DialogueDataModule) -> None:
    """Prints what a run will need; nothing is read or trained."""
    from rich.console import Console
    from rich.table import Table

    from plato2.training.parallel import n_ranks
    from plato2.training.plan import plan

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
    corpus = data.index.splits["train"].tokens if data.exists else None
    for name, text in made.rows(corpus):
        table.add_row(name, text)
    Console().print(table)


def in_sweep() -> bool:
    """Whether this is a job of `-m` or of a sweep file."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_id(keys: TrainConfig) -> str | None:
    """In a sweep each job has a name of its own: the sweep's and the job's number."""
    if not in_sweep():
        return keys.run_id
    return f"{keys.run_id or os.environ['RUN_ID']}-{HydraConfig.get().job.num}"


def is_first_process() -> bool:
    """Whether this process writes the run folder and speaks; before Lightning knows the ranks."""
    variables = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((os.environ[name] for name in variables if os.environ.get(name)), "0") == "0"


def say(sentence: str) -> None:
    """A line for the person at the terminal, from the first process only."""
    if is_first_process():
        print(sentence, file=sys.stderr, flush=True)


def quiet_lightning() -> None:
    """Leaves out what Lightning says that does not help here; its warnings stay."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics reduces over ranks


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Runs one job; a user's mistake is one line and exit code 2."""
    try:
        return train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
