"""Who speaks to the person at the terminal, and what Lightning says that does not help here."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""How Slurm says that time is nearly up (`--signal=USR1@180`; submitit takes USR2): the job is to go on."""
VERBS = "plato2" if (Path(__file__).parents[1] / "conf").is_dir() else "python -m plato2"
"""What a verb is called by: only an installed plato2, which has conf/ inside it, has a command for sure."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *WARNINGS)
"""What stops a run."""


class Stopped(SystemExit):
    """A signal came before training took the signals over, or after it gave them back.

    Args:
        number: the signal's.
        told: what that means, for the person at the terminal.
    """

    def __init__(
        self,
        number: int,
        told: str = "nothing was being trained; the same command starts again, or resumes",
    ) -> None:
        super().__init__(128 + number)
        self.number, self.told = number, told


@contextmanager
def signals_stop_at_once() -> Iterator[None]:
    """While the block runs a signal ends it: nothing is half done between two steps of a run's preparation.

    Raises:
        Stopped: there was one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_any_text() -> None:
    """Lets stdout and stderr take every text, whatever their encoding: what it lacks is written as JSON does.

    So `数据` is `\\u6570\\u636e` on a Latin-1 terminal, and JSON that is printed there is read back the same.
    """
    codecs.register_error("plato2", _as_in_json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plato2")


def _as_in_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def is_first_process() -> bool:
    """Whether this process writes the run folder and speaks; before Lightning knows the ranks."""
    variables = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((os.environ[name] for name in variables if os.environ.get(name)), "0") == "0"


def say(sentence: str) -> None:
    """A line for the person at the terminal, from the first process only.

    It is written at once: lines of jobs side by side would run into each other where `print` writes the end
    of a line apart.
    """
    if is_first_process():
        _write(sentence)


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def leave_report(sentence: str) -> bool:
    """Leaves why this process ends for the report that torchrun ends with; whether torchrun started it."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        about = {"message": f"error: {sentence}", "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):  # a full disk
            Path(report).write_text(json.dumps({"message": about}), encoding="utf-8")
    return bool(report)


def fail(sentence: str, on_all_ranks: bool = False) -> NoReturn:
    """Ends with one line for the person at the terminal.

    Under torchrun only the first process prints it, unless it is about ranks; all leave theirs for the report
    that torchrun ends with.
    """
    by_torchrun = leave_report(sentence)
    if is_first_process() or not by_torchrun or on_all_ranks:
        _write(f"error: {sentence}")
    raise SystemExit(2)


def number(value: float) -> str:
    """Four significant digits, `0.1234`; of large numbers all before the point, `10,482`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def quiet_torchao() -> None:
    """Leaves out what torchao says of kernels for GPUs, where it is installed: transformers imports it."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def quiet_lightning() -> None:
    """Leaves out what Lightning says that does not help here; its warnings stay, one line each like ours."""
    warnings.formatwarning = _one_line
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics reduces over ranks
    if "SLURM_JOB_ID" not in os.environ:  # on a login node, or a machine that just has Slurm's commands
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for the person at the terminal: without the place in the code and the line that gave it."""
    return f"warning: {' '.join(str(message).split())}\n"
