"""Processes that start in no time, and die where they are told: forks of one that has imported everything.

    python forks.py        reads jobs from stdin, a JSON object a line; answers each with a line

A job runs a Python file as `__main__`. Its opens for writing, renames, links and removals below a folder are
counted; at the one with the number that it is given it kills itself, just before it happens (SIGKILL), or in
the middle of the first write after it (SIGXFSZ of the kernel, which cuts the file). What changes nothing, as
making a folder that is there, does not count: a kill before it and one after it leave the same files.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forks:
    """The process that forks, as a test uses it."""

    def __init__(self, **variables: str) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(
        self,
        script: Path,
        *arguments: str,
        folder: Path,
        kill_at: int = 0,
        cut: bool = False,
        **variables: str,
    ) -> int:
        """Starts a job in `folder`, the leader of a group of its own; one at a time. Returns its pid."""
        job = {"script": str(script), "arguments": arguments, "folder": str(folder), "kill_at": kill_at}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job | {"cut": cut, "variables": variables}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> tuple[int, list[list[str]], str]:
        """Waits for the job.

        Returns:
            Its exit code, negative for a signal; the changes it was about to make (event, path); its output.
        """
        assert self.process.stdout is not None
        code, changes, output = json.loads(self.process.stdout.readline())
        return code, changes, output

    def run(self, script: Path, *arguments: str, **given: Any) -> tuple[int, list[list[str]], str]:
        """Begins a job and waits for its end."""
        self.begin(script, *arguments, **given)
        return self.end()

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Imports what takes seconds, then forks for each job."""
    import gc

    import pandas  # noqa: F401  pyarrow does so when it first reads a shard
    import pyarrow.compute  # noqa: F401  the same
    import pytest
    import torch
    from composing import remember
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    import plato2.data.module
    import plato2.runs.callbacks
    import plato2.runs.checkpoint
    import plato2.runs.corpus
    import plato2.runs.loggers
    import plato2.runs.metrics
    import plato2.runs.parallel
    import plato2.runs.sharded
    import plato2.runs.start
    import plato2.stages.sharding
    import plato2.talk.replies
    import plato2.talk.selection  # noqa: F401
    from plato2.commands.train import CONF
    from plato2.runs.plan import peak_flops
    from plato2.stages import known_stages

    remember(pytest.MonkeyPatch())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for stage in known_stages():  # what `small.command` chooses, as Hydra reads it: first for its mode
            groups = ["experiment=smoke", "data=shards", "strategy=cpu", f"stage={stage}"]
            for mode in RunMode:
                GlobalHydra.instance().config_loader().load_configuration("train", groups, mode)
    peak_flops(torch.device("cpu"), "32-true")  # measured once, not by each job
    gc.freeze()  # no job walks through all of this again

    for line in sys.stdin:
        job = json.loads(line)
        said, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(said)
            work(job, told)
        print(child, flush=True)
        os.close(told)
        code, printed = ended(child, said)
        lines = printed.decode(errors="replace").splitlines()
        changes = [json.loads(line[1:]) for line in lines if line.startswith("\0")]
        output = "\n".join(line for line in lines if not line.startswith("\0"))
        print(json.dumps([code, changes, output]), flush=True)


def ended(child: int, said: int) -> tuple[int, bytes]:
    """Exit code of a child and what it has written; its worker processes may live a little longer."""
    printed, status, alive = b"", 0, True
    while alive or select.select([said], [], [], 0)[0]:
        if select.select([said], [], [], 0.01)[0] and (part := os.read(said, 1 << 16)):
            printed += part
        elif alive:
            pid, status = os.waitpid(child, os.WNOHANG)
            alive = pid == 0
        else:
            break
    os.close(said)
    return os.waitstatus_to_exitcode(status), printed


def work(job: dict[str, Any], told: int) -> None:
    """The job, in a process of its own."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(told, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))  # pipes, not files
    os.environ.update(job["variables"])
    os.chdir(job["folder"])
    sys.addaudithook(Watch(**{key: job[key] for key in ("folder", "kill_at", "cut")}))
    sys.argv = [job["script"], *job["arguments"]]
    code = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(repr(error), flush=True)
        code = 99
    sys.stdout.flush()
    os._exit(code)


class Watch:
    """Counts changes below a folder, and ends the process at one of them."""

    def __init__(self, folder: str, kill_at: int, cut: bool) -> None:
        self.folder, self.kill_at, self.cut, self.number = folder, kill_at, cut, 0
        if cut:  # from the start: Lightning puts signals back as they were when it began
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python calls before anything that it audits."""
        if event == "open":
            path, _, flags = arguments
            if not flags & WRITING:
                return
        elif event in CHANGES:
            path = arguments[1 if event in ("os.rename", "os.link") else 0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self.folder):
            return
        if os.path.isdir(path) if event == "os.mkdir" else event == "os.remove" and not os.path.exists(path):
            return
        self.number += 1
        name = os.path.relpath(path, self.folder)
        os.write(1, f"\n\0{json.dumps([event, name])}\n".encode())
        if self.number != self.kill_at:
            return
        if not self.cut:
            os.kill(os.getpid(), signal.SIGKILL)
        size = os.path.getsize(path) if "a" in str(arguments[1]) and os.path.exists(path) else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, size + 9))


if __name__ == "__main__":
    serve()
