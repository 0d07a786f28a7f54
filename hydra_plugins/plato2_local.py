"""hydra/launcher=submitit_local: the jobs of a sweep on this machine, all at a time, with a log each.

hydra-submitit-launcher runs a job, and brings its result back. Of one that ends without a result, because it
was killed for example, it raises all of the log, and forgets the others. Its jobs import plato2 only if they
are started beside it, see no GPU unless they are given some, and are killed a second after a Ctrl-C by the
processes that watch over them. So jobs get this command's PYTHONPATH and GPUs, are in groups of their own,
out of a Ctrl-C's reach, and are sent signals from here.

Hydra looks for launchers in packages called hydra_plugins, and imports them at each start: nothing heavy at
the top.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from plato2.config import UserError, install
from plato2.runs.console import Stopped, say
from plato2.runs.side_by_side import GOES_ON

if TYPE_CHECKING:
    from submitit import Job

A_YEAR = 365 * 24 * 60
"""Minutes: without a limit of time, which submitit has to be given."""
ASKED_AGAIN_S = 2.0
"""Between two signals to a job: while it begins it passes over one."""


class OnThisMachine(Launcher):
    """Starts all jobs of a sweep, and waits for them.

    Args:
        submitit_folder: where submitit keeps what it gives jobs, and their logs; `%j` is a job's number.
        timeout_min: minutes after which a job is ended; 30 seconds before that it is told to save.
    """

    def __init__(self, submitit_folder: str, timeout_min: float) -> None:
        self.folder, self.timeout_min = submitit_folder, timeout_min

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives a launcher before `launch`.

        Raises:
            UserError: submitit is not installed.
        """
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher
        except ImportError:
            raise UserError(
                f"hydra/launcher=submitit_local: needs hydra-submitit-launcher; {install('slurm')}"
            ) from None
        self.inside = LocalLauncher()
        self.inside.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs all jobs, also where some fail.

        Raises:
            UserError: the jobs cannot be started.
            Stopped: a signal ended this, and first, saved, the jobs.
        """
        import submitit

        given = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        logging.getLogger("submitit").setLevel(logging.ERROR)
        try:
            with in_groups_of_their_own():
                executor = submitit.AutoExecutor(self.folder, cluster="local")
                executor.update_parameters(timeout_min=self.timeout_min)
                jobs = executor.map_array(self.inside, *zip(*given, strict=True))
                logs = Path(self.folder).parent
                say(f"{len(jobs)} jobs side by side on this machine; their logs: {logs}")
                return [
                    result(job, number, self.timeout_min) for number, job in enumerate(jobs, initial_job_idx)
                ]
        except OSError as error:
            raise UserError(
                f"hydra/launcher=submitit_local: the jobs cannot be started ({error}); free what is lacking, "
                "or start fewer at a time, as hydra.sweeper.max_batch_size=4"
            ) from error


class Name(SearchPathPlugin):
    """Gives `OnThisMachine` its name once hydra-submitit-launcher, which has the same, has been looked at."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """What Hydra calls when it has found all plugins."""
        target = f"{OnThisMachine.__module__}.{OnThisMachine.__qualname__}"
        folder = "${hydra.sweep.dir}/.submitit/%j"
        node = {"_target_": target, "submitit_folder": folder, "timeout_min": A_YEAR}
        ConfigStore.instance().store(group="hydra/launcher", name="submitit_local", node=node)


def result(job: Job[Any], number: int, timeout_min: float) -> JobReturn:
    """What a job has returned, when it is finished; without that a failure, with the cause and the log.

    Args:
        job: of submitit's.
        number: of the job in the sweep.
        timeout_min: minutes that it had.
    """
    job.wait()
    log, there = job.paths.stderr, job.paths.result_pickle.exists()
    if there and job.exception() is None:
        done: JobReturn = job.results()[0]
        if done.status == JobStatus.FAILED:
            say(f"failed: job {number}: {done._return_value} (its log: {log})")
        return done
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no log")
    time_is_up = f", or hydra.launcher.timeout_min={timeout_min:g} minutes were over" * (timeout_min < A_YEAR)
    if there or last.startswith("stopped: "):  # submitit kept what was raised; plato2 heard a signal
        why = f"ended without a result: {last.removeprefix('stopped: ')}"
    else:
        why = f"was killed (perhaps memory ran out{time_is_up})"
    sentence = f"its process {why}; its log: {log}"
    say(f"failed: job {number}: {sentence}")
    return JobReturn(status=JobStatus.FAILED, _return_value=UserError(sentence))


@contextmanager
def in_groups_of_their_own() -> Iterator[None]:
    """Jobs that begin in the block are out of a Ctrl-C's reach; a signal to this process lets all save first.

    Raises:
        Stopped: there was one.
    """
    import submitit.local.local

    local: Any = submitit.local.local
    begun: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        options["env"] = like_this_process(options["env"])
        begun.append(subprocess.Popen(*arguments, process_group=0, **options))
        return begun[-1]

    local.subprocess = SimpleNamespace(Popen=begin)
    try:
        yield
    except Stopped as stop:
        end(begun)
        raise Stopped(stop.number, GOES_ON) from None
    finally:
        local.subprocess = subprocess


def like_this_process(variables: dict[str, str]) -> dict[str, str]:
    """A job's variables, with this process's GPUs, and plato2 where this process imports it from."""
    source, gpus = str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES"
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in variables.items() if name != gpus}
    return kept | {"PYTHONPATH": path} | {name: os.environ[name] for name in (gpus,) if name in os.environ}


def end(groups: list[subprocess.Popen[bytes]]) -> None:
    """Lets the processes of some groups save, and waits for them; a signal meanwhile ends them at once."""
    try:
        while going := [leader for leader in groups if leader.poll() is None]:
            for leader in going:
                os.killpg(leader.pid, signal.SIGTERM)
            asked = time.monotonic()
            while time.monotonic() < asked + ASKED_AGAIN_S and any(leader.poll() is None for leader in going):
                time.sleep(0.05)
    finally:
        for leader in groups:
            with suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
