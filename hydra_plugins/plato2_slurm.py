"""hydra/launcher=slurm: the jobs of a sweep as Slurm jobs, a stage after the one that it starts from.

hydra-submitit-launcher runs a job of a sweep inside Slurm, and brings its result back. It submits all of them
as one array, though, which has no order: stages 2.1 and 2.2 would hold their GPUs while stage 1 is trained.
Here they wait in the queue.

Hydra looks for launchers in packages called hydra_plugins, and imports them at each start: nothing heavy at
the top.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from plato2.config import UserError
from plato2.runs.console import Stopped, say

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job

LOOK_S = 30.0
"""Between two looks at a job in the queue. One that is requeued has left it for a moment only, and a shared
file system may show a result late: so a job has ended without one where it is gone at two looks."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
"""Slurm's states of a job that will not go on."""
NEVER = "DependencyNeverSatisfied"
"""Slurm's reason why a job never begins."""


class StagesInOrder(Launcher):
    """Submits the jobs of a sweep; those that start from another one of it with `--dependency=afterok`.

    Machines, processes and GPUs of a job are those of the group `strategy`.

    Args:
        params: conf/hydra/launcher/slurm.yaml.
    """

    def __init__(self, **params: Any) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives a launcher before `launch`."""
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        self.hydra_context, self.config = hydra_context, config
        self.inside = SlurmLauncher(**self.params)
        self.inside.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submits all jobs, and waits for them, also for those that fail.

        Raises:
            UserError: Slurm does not take a job.
            Stopped: a signal ended the waiting.
        """
        try:
            jobs = self.submit(job_overrides, initial_job_idx)
        except (RuntimeError, ValueError) as error:  # submitit's, also of what sbatch says
            problem = (str(error).strip() or repr(error)).splitlines()[-1]
            raise UserError(
                f"hydra/launcher=slurm: not submitted ({problem}); start this where sbatch works, and with "
                "what your cluster asks for: hydra.launcher.partition=NAME, account, qos, ..."
            ) from error
        numbers = " ".join(job.job_id for job in jobs)
        say(f"waiting for Slurm's jobs {numbers}; they go on without this command, scancel ends them")
        try:
            return [result(job) for job in jobs]
        except Stopped as stop:
            told = (
                f"Slurm's jobs {numbers} go on, scancel ends them; the same command, when they have ended, "
            )
            raise Stopped(stop.number, told + "shows what came of them") from None

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Job[JobReturn]]:
        """Submits an array of jobs that start from none of the others, then one of those that do."""
        executor = self.executor()
        source = str(Path(__file__).parents[1])  # a job imports plato2 from here, whatever its folder is
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        submitted: dict[int, Job[JobReturn]] = {}
        for numbers in in_order([self.stage_and_parent(overrides) for overrides in job_overrides]):
            if submitted:
                executor.update_parameters(
                    slurm_dependency="afterok:" + ":".join(job.job_id for job in submitted.values())
                )
            given = [
                (list(job_overrides[n]), "hydra.sweep.dir", initial_job_idx + n, "", Singleton.get_state())
                for n in numbers
            ]
            jobs = executor.map_array(self, *zip(*given, strict=True))
            submitted |= dict(zip(numbers, jobs, strict=True))
        return [submitted[n] for n in sorted(submitted)]

    def executor(self) -> AutoExecutor:
        """What submits, with the resources of a job.

        Raises:
            UserError: resources that contradict the strategy, or a strategy that does not say them.
        """
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        options: dict[str, Any] = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)  # type: ignore
        del options["_target_"]
        strategy = self.config.strategy
        devices = len(strategy.devices) if OmegaConf.is_list(strategy.devices) else strategy.devices
        if not str(devices).isdecimal():
            raise UserError(
                f"strategy.devices={devices}: hydra/launcher=slurm has to ask Slurm for a number; give "
                "strategy.devices=8, if a machine has 8"
            )
        asked = {
            "nodes": ("num_nodes", int(strategy.get("num_nodes", 1))),
            "tasks_per_node": ("devices", int(devices)),
        }
        for name, (key, value) in asked.items():
            if options[name] not in (1, value):
                raise UserError(
                    f"hydra.launcher.{name}={options[name]}: it follows strategy.{key}={value}; give that"
                )
            options[name] = value
        if strategy.accelerator != "cpu" and not (options["gres"] or options["gpus_per_task"]):
            options["gpus_per_node"] = options["gpus_per_node"] or int(devices)
        folder, timeouts = options.pop("submitit_folder"), options.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        common = {field.name for field in fields(BaseQueueConf)}
        executor.update_parameters(**{k if k in common else f"slurm_{k}": v for k, v in options.items()})
        return executor

    def stage_and_parent(self, overrides: Sequence[str]) -> tuple[str, str | None]:
        """The stage of a job, and the one that `init_from=auto` starts it from."""
        from plato2.runs.build import find
        from plato2.runs.start import parent_stage

        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        stage: Any = find(config.stage._target_, "stage._target_")
        return stage.name, parent_stage(
            stage.name, stage.warm_starts_from
        ) if config.init_from == "auto" else None

    def __call__(self, *arguments: Any) -> JobReturn:
        """The job, inside Slurm.

        Raises:
            RuntimeError: it failed; submitit hands that on, and Slurm starts no job that waits for this one.
        """
        done: JobReturn = self.inside(*arguments)
        if done.status == JobStatus.FAILED and isinstance(done._return_value, UserError):
            raise RuntimeError("the line above that begins with `failed: ` says why")
        _ = done.return_value  # raises what the job raised
        return done

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit starts after a signal that came before plato2 listened: the same."""
        return self.inside.checkpoint(*arguments)


def in_order(stages: Sequence[tuple[str, str | None]]) -> list[list[int]]:
    """Numbers of the jobs, those first whose parent is not among the others.

    Args:
        stages: of each job its stage, and the one that it starts from.
    """
    waiting, groups = list(range(len(stages))), []
    while waiting:
        names = {stages[n][0] for n in waiting}
        ready = [n for n in waiting if stages[n][1] not in names] or waiting
        groups.append(ready)
        waiting = [n for n in waiting if n not in ready]
    return groups


def result(job: Job[JobReturn]) -> JobReturn:
    """What the first process of a job returned, when it is finished; of one that failed its last line.

    submitit asks `sacct`, which knows nothing where a cluster keeps no accounts: it would wait for ever for a
    job that was killed, or that never began because the one before it failed.
    """
    from submitit.core.utils import UncompletedJobError

    # that accounts are missing it says at every look; what they would tell is asked of `scontrol`
    logging.getLogger("submitit").setLevel(logging.ERROR)
    looked, gone = time.monotonic(), False
    while not job.done():
        time.sleep(1)
        if time.monotonic() - looked < LOOK_S:
            continue
        looked, (state, reason) = time.monotonic(), state_of(job.job_id)
        if reason == NEVER:
            return failure(f"Slurm's job {job.job_id} never began: the job that it starts from failed")
        if gone and state in ENDED and not job.done():
            log = job.paths.stderr
            why = f"{state}, {reason}" if reason not in ("", "None") else state
            return failure(f"Slurm's job {job.job_id} ended without a result ({why}); its log: {log}")
        gone = state in ENDED
    try:
        return job.results()[0]
    except UncompletedJobError:
        log = job.paths.stderr
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        said = (
            [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
            or lines
            or ["no log"]
        )
        return failure(f"Slurm's job {job.job_id} failed: {said[-1]}; all of its log: {log}")


def failure(sentence: str) -> JobReturn:
    """What becomes of a job without a result, for the sweeper; said at once, as others may go on for days."""
    say(f"failed: {sentence}")
    return JobReturn(status=JobStatus.FAILED, _return_value=UserError(sentence))


def state_of(job_id: str) -> tuple[str, str]:
    """Slurm's state of a job, and its reason; `UNKNOWN` where Slurm does not answer.

    A job that ended is known for some minutes (`MinJobAge`); then it is `COMPLETED`, whatever became of it.
    """
    try:
        done = subprocess.run(
            ["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return "UNKNOWN", ""
    if done.returncode:
        return ("COMPLETED" if "Invalid job id" in done.stderr else "UNKNOWN"), ""
    known = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return known.get("JobState", "UNKNOWN"), known.get("Reason", "")
