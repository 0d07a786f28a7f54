"""Jobs of a sweep in processes of joblib's: a signal lets all save, and then ends the sweep.

joblib kills all workers when one of them ends, and when its own process does: those that were still saving
would lose their steps. So no worker ends by a signal. A job that is stopped returns, its worker refuses
others, and the process that started them waits for all.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from plato2.config import UserError
from plato2.runs.console import STOP_SIGNALS, Stopped

GOES_ON = "the same command goes on with the sweep"

noted: list[int] | None = None
"""In a worker: the signals that it got. None in all other processes."""


def note_signals() -> None:
    """What a worker begins with: between two jobs it takes a note of signals."""
    global noted
    noted = []
    for number in STOP_SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: object) -> None:
    assert noted is not None
    noted.append(number)


def is_worker() -> bool:
    """Whether this is a process of joblib's that has jobs of a sweep to run."""
    return noted is not None


def refuse_after_a_signal(number: int | None = None) -> None:
    """Refuses a job in a worker that was told to stop; elsewhere nothing.

    Args:
        number: the signal that has just stopped one.

    Raises:
        UserError: it was told to.
    """
    if noted is None:
        return
    if number is not None:
        noted.append(number)
    if noted:
        raise UserError("stopped by a signal; the same command goes on")


@contextmanager
def workers_stop_first(launcher: Any) -> Iterator[None]:
    """While a launcher's workers run, a signal ends them, saved, and then this process; a second one at once.

    Args:
        launcher: of Hydra; nothing is done for others than joblib's.

    Raises:
        Stopped: there was one.
    """
    options = getattr(launcher, "joblib", None)
    if options is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    options["initializer"] = note_signals
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        if heard:
            raise Stopped(number)
        heard.append(number)
        if number != signal.SIGINT:  # Ctrl-C goes to all processes of a terminal
            for worker in _workers():
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGTERM)

    before = {number: signal.signal(number, hear) for number in STOP_SIGNALS}
    try:
        yield
    except Exception:
        if not heard:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise Stopped(heard[0], GOES_ON)


def _workers() -> list[int]:
    """joblib's processes; it has no public name for them."""
    from joblib.externals.loky import get_reusable_executor

    return list(getattr(get_reusable_executor(reuse=True), "_processes", None) or {})
