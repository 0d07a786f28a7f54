"""Train a stage of PLATO-2's curriculum: compose -> build -> fit -> return the swept metric.

The only module that knows Hydra. `python train.py --help` explains the groups and keys; below this file
there are only plain typed arguments.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import time
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
    import torch

    from plato2.training.checkpoint import warm_start
    from plato2.training.run import choose_run, warm_start_path

    keys: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    batch = build(keys.stage.pop("batch"), "stage.batch")
    stage = build(keys.stage, "stage", model=keys.model, optim=keys.optim, seed=keys.seed, meta=keys.plan)
    data = build(
        keys.data,
        "data",
        batch=batch,
        batch_tokens=keys.optim.batch_tokens,
        max_steps=keys.trainer["max_steps"],
        seed=keys.seed,
    )
    if keys.plan:
        print_plan(keys, stage, data)
        return None
    _prepare_once(data)
    _check_fit(keys.model, data)
    run, checkpoint, sentence = choose_run(
        Path(keys.output_dir), keys.name, resolved, _run_id(keys.run_id), keys.resume
    )
    if checkpoint and _already_finished(run, checkpoint, keys):
        return None
    say(sentence)
    parent = None
    if checkpoint is None:
        parent = warm_start_path(
            keys.init_from,
            stage.name,
            stage.warm_starts_from,
            Path(keys.output_dir),
            keys.model_name,
            data.tokenizer_sha256,
        )
        if parent:
            say(warm_start(stage, parent, stage.name, stage.warm_starts_from, data.tokenizer_sha256))
    trainer = build_trainer(keys, stage, data, run, checkpoint, resolved)
    _record(run, keys, stage, data, resolved, parent, checkpoint)
    torch.set_float32_matmul_precision("high")
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
    from rich.console import Console

    from plato2.stages.base import NonFiniteLoss
    from plato2.training.callbacks import metrics_table
    from plato2.training.checkpoint import Checkpoints

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
    best = next(c.best_value for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if trainer.is_global_zero:
        if trainer.global_step >= trainer.max_steps:
            run.write_lineage(status="finished", step=trainer.global_step, metrics=metrics)
        Console().print(
            metrics_table(metrics, f"{stage.name} after {trainer.global_step:,} steps: {run.path}")
        )
    if sweep_metric is None:
        return best
    if sweep_metric not in metrics:
        raise UserError(f"sweep_metric={sweep_metric}: not logged; choose one of {', '.join(metrics)}")
    return metrics[sweep_metric]


def build(node: dict[str, Any], key: str, meta: bool = False, **arguments: Any) -> Any:
    """Calls what a node's `_target_` names with the node's keys and further arguments.

    Raises:
        UserError: a key the target does not take; names it and the nearest one that it does.
    """
    import torch

    node = {
        k: build(v, f"{key}.{k}") if isinstance(v, dict) and "_target_" in v else v for k, v in node.items()
    }
    module, _, name = str(node.pop("_target_")).rpartition(".")
    target = getattr(importlib.import_module(module), name)
    known = list(inspect.signature(target).parameters)
    for given in node:
        if given not in known:
            near = difflib.get_close_matches(given, known, n=1)
            cure = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{key}.{given}: {name} has no such option; {cure}")
    with torch.device("meta" if meta else "cpu"):
        return target(**node, **arguments)


def build_trainer(
    keys: TrainConfig,
    stage: Stage,
    data: DialogueDataModule,
    run: RunFolder,
    checkpoint: Path | None,
    resolved: dict[str, Any],
) -> pl.Trainer:
    """The Lightning Trainer with the callbacks and loggers of the run."""
    from plato2.training.callbacks import LatentHistogram, RunProgress, SampleReplies, Throughput
    from plato2.training.checkpoint import Checkpoints

    strategy = dict(keys.strategy)
    _refuse_launching_in_sweep(strategy)
    _quiet_lightning()
    if strategy.get("precision") == "auto":
        strategy["precision"] = _precision(str(strategy["accelerator"]))
    callbacks: list[Any] = [
        Checkpoints(
            run.checkpoints, keys.checkpoint_steps, stage.monitor, {"tokenizer_sha256": data.tokenizer_sha256}
        ),
        Throughput(keys.model, stage.passes),
        RunProgress(f"{keys.model_name} {stage.name}"),
        LatentHistogram(),
    ]
    if (
        keys.sample_replies
        and stage.name != "2_eval"
        and "ModelParallel" not in str(strategy.get("strategy"))
    ):
        from plato2.talk.replies import ValidationReplies

        callbacks.append(
            SampleReplies(run.path / "replies.jsonl", ValidationReplies(data, keys.sample_replies))
        )
    return build(
        {
            "_target_": "pytorch_lightning.Trainer",
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **strategy,
            **keys.trainer,
        },
        "trainer",
        callbacks=callbacks,
        logger=_loggers(keys, stage, run, checkpoint, resolved) or False,
        default_root_dir=run.path,
        max_epochs=1,
    )


def _loggers(
    keys: TrainConfig, stage: Stage, run: RunFolder, checkpoint: Path | None, resolved: dict[str, Any]
) -> list[Any]:
    """One logger for each entry of the logger group; each gets what it needs of the run."""
    loggers = []
    for name, node in keys.logger.items():
        arguments: dict[str, Any] = {"save_dir": run.path}
        if name == "csv":
            arguments = {"folder": run.path, "resumed_step": _step(checkpoint) if checkpoint else None}
        if name == "wandb":
            run.path.mkdir(parents=True, exist_ok=True)
            arguments |= {
                "name": f"{keys.name}/{run.path.name}",
                "id": f"{keys.name}-{run.path.name}".replace(".", "_"),
                "resume": "allow",
                "group": os.environ.get("RUN_ID", run.path.name),
                "job_type": stage.name,
                "tags": keys.tags,
                "config": resolved,
            }
        loggers.append(build(node, f"logger.{name}", **arguments))
    return loggers


def _quiet_lightning() -> None:
    """Leaves out what Lightning says that does not help here; its warnings stay."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _precision(accelerator: str) -> str:
    """bf16-mixed where the hardware multiplies bf16 matrices, else 32-true."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def _prepare_once(data: DialogueDataModule) -> None:
    """The first process prepares the corpus; others started beside it (torchrun, srun) wait for it."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        data.prepare_data()
    while data.prepare_options is not None and not data.exists:
        time.sleep(1.0)


def _check_fit(model: ModelConfig, data: DialogueDataModule) -> None:
    if data.vocab_size != model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: the tokenizer of {data.path} has {data.vocab_size} ids; use "
            f"model.vocab_size={data.vocab_size} or data prepared with the model's tokenizer"
        )
    longest = data.index.max_context + data.index.max_response
    if longest > model.max_position:
        raise UserError(
            f"model.max_position={model.max_position}: samples of {data.path} have up to {longest} tokens; prepare "
            f"the data with shorter limits or use model.max_position={longest}"
        )


def _run_id(given: str | None) -> str | None:
    """In a sweep each job has a name of its own: the sweep's and the job's number."""
    hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra_config is None or hydra_config.mode != RunMode.MULTIRUN:
        return given
    return f"{given or os.environ['RUN_ID']}-{hydra_config.job.num}"


def _refuse_launching_in_sweep(strategy: dict[str, Any]) -> None:
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if in_sweep and strategy.get("devices") != 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"strategy.devices={strategy.get('devices')} in a sweep: the processes of one job would each start the "
            "sweep again; start it with torchrun or srun, use a Hydra launcher (hydra/launcher=...), or devices=1"
        )


def _step(checkpoint: Path) -> int:
    from plato2.training.checkpoint import checkpoint_step

    return checkpoint_step(checkpoint)


def _already_finished(run: RunFolder, checkpoint: Path, keys: TrainConfig) -> bool:
    """A finished job of a sweep is skipped; asking for a finished run by name is an error."""
    step, max_steps = _step(checkpoint), keys.trainer["max_steps"]
    if step < max_steps:
        return False
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        say(f"{run.path} is finished: skipped")
        return True
    raise UserError(
        f"{run.path} has already trained {step} steps, trainer.max_steps={max_steps}; raise trainer.max_steps to go "
        "on with it, or choose another run_id"
    )


def _record(
    run: RunFolder,
    keys: TrainConfig,
    stage: Stage,
    data: DialogueDataModule,
    resolved: dict[str, Any],
    parent: Path | None,
    checkpoint: Path | None,
) -> None:
    """Writes config.yaml, lineage.json and the tokenizer into the run folder (first process only)."""
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))) != 0:
        return
    from plato2.training.checkpoint import file_sha256
    from plato2.training.run import fingerprint, now, provenance

    if checkpoint:
        resumed = [*run.lineage().get("resumed", []), {"step": _step(checkpoint), "at": now().isoformat()}]
        run.write_lineage(status="running", config=resolved, resumed=resumed)
        return
    ancestor = None
    if parent:
        ancestor = {
            "checkpoint": str(parent),
            "sha256": file_sha256(parent),
            "run": str(parent.parent.parent),
        }
    run.write_lineage(
        **provenance(),
        run_id=run.path.name,
        stage=stage.name,
        model=keys.model_name,
        status="running",
        parent=ancestor,
        tokenizer_sha256=data.tokenizer_sha256,
        data={"path": data.path, "sha256": data.data_sha256},
        fingerprint=fingerprint(resolved),
        tags=keys.tags,
        config=resolved,
    )
    (run.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)), encoding="utf-8")
    data.save_tokenizer(run.tokenizer)


class Sweep(Callback):
    """Gives all jobs of a sweep one name, goes on with an interrupted sweep, and prints the closing report."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Finds the newest unfinished sweep of the same command, else starts a new one."""
        here = Path(config.hydra.sweep.dir)
        command = {
            "overrides": sorted(config.hydra.overrides.task),
            "params": OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({})),
        }
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
        del os.environ["RUN_ID"]
        if config.report and not config.plan:
            from plato2.evaluate.report import report_sweep

            report_sweep(Path(config.output_dir), self.name)

    def _write(self, **entries: Any) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def print_plan(keys: TrainConfig, stage: Stage, data: DialogueDataModule) -> None:
    """Prints what a run will need; nothing is read or trained."""


def say(sentence: str) -> None:
    """A line for the person at the terminal, from the first process only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


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
