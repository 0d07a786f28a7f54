"""Work spread over processes, results in order, a bounded number of items on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, TypeVar

from plato2.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_state: Any = None


class Processes:
    """`n` processes that each hold `start(job)`; with n = 1 everything runs in this one.

    Use as a context manager: leaving it ends the processes, at once when something went wrong.
    """

    def __init__(self, n: int, start: Callable[[Any], Any], job: Any) -> None:
        """Start them; `start` and `job` must be importable and picklable."""
        self._n = n
        self._pool: ProcessPoolExecutor | None = None
        if n == 1:
            self._local = start(job)
        else:
            # Not forked: Arrow and DuckDB have threads, which a fork would leave half-way through.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(n, context, _begin, (start, job))

    def __enter__(self) -> Processes:
        """Nothing to do: the processes start with the first item."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes; items that nobody has begun are dropped."""
        if self._pool is None:
            return
        if kind is not None:
            for process in [*(self._pool._processes or {}).values()]:
                process.kill()  # what it writes is whole or not there
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(self, function: Callable[[Any, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(state, item)` for every item, in order.

        Raises:
            UserError: a process died.
        """
        if self._pool is None:
            for item in items:
                yield function(self._local, item)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                with _interrupts_wait():
                    waiting.append(self._pool.submit(_call, function, item))
                if len(waiting) > self._n + 1:  # one more than are at work, so that none waits for the reader
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?): run the command again, it continues from the last "
                "finished part; --workers 1 takes the least memory"
            ) from None


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; in processes that begin here for ever: they inherit that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(start: Callable[[Any], Any], job: Any) -> None:
    """What a new process does first."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = start(job)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_state, item)
