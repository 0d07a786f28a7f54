"""hydra/launcher=side_by_side: each job of a sweep is a process, all at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus


class SideBySide(BasicLauncher):
    """Hydra's own launcher, once in each process."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Starts all jobs and waits for them."""
        numbered = enumerate(job_overrides, initial_job_idx)
        start, launch = multiprocessing.get_context("fork").Process, super().launch
        jobs = [start(target=launch, args=([words], number)) for number, words in numbered]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        if codes := [job.exitcode for job in jobs if job.exitcode]:
            raise SystemExit(codes[0])
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]


target = f"{SideBySide.__module__}.{SideBySide.__name__}"
ConfigStore.instance().store(group="hydra/launcher", name="side_by_side", node={"_target_": target})
