"""One queue for all requests: those that are decoded alike are answered in one batch, the oldest first.

    batcher = Batcher(bot)
    job = batcher.submit(["hi , how was your day ?"])
    job.future.result(timeout=60).text
    batcher.close()

One thread owns the bot. In float32 a reply does not depend on what else is in its batch, so others are
noticed only by the clock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from plato2.config import DecodeConfig
from plato2.data.samples import Context
from plato2.talk.bot import PlatoBot, Reply

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full: try again later."""


class Stopped(Exception):
    """The batcher was closed, or its thread has died, before there was a reply."""


@dataclass(eq=False)
class Job:
    """A conversation that waits for its reply, or has it."""

    context: Context
    """What was said, as the model reads it."""
    decode: DecodeConfig
    future: Future[Reply] = field(default_factory=Future)
    """Gets the reply, the exception of its batch, or `Stopped`; cancelled by `Batcher.cancel`."""


class Batcher:
    """Answers conversations from any thread, several at a time.

    Args:
        bot: what answers; nobody else should use it meanwhile.
        max_batch: contexts decoded together, fewer with several samples or beams of each latent.
        max_queue: requests that may wait.
        wait_s: seconds that an idle bot waits for others after the first request has come.
        on_batch: is told the replies of each batch before those who wait for them.
    """

    def __init__(
        self,
        bot: PlatoBot,
        max_batch: int = 16,
        max_queue: int = 256,
        wait_s: float = 0.005,
        on_batch: Callable[[list[Reply]], None] | None = None,
    ) -> None:
        self.bot, self.max_batch, self.max_queue, self.wait_s = bot, max_batch, max_queue, wait_s
        self.on_batch = on_batch
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._is_open = True
        self._changed = threading.Condition()  # guards the three above and the answering of futures
        # A daemon, so that a batch that takes long does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken and answered."""
        return self._is_open and self._thread.is_alive()

    @property
    def is_working(self) -> bool:
        """Whether the thread is still there; after `close` it ends with its last batch."""
        return self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        """Requests that wait and have not begun."""
        return len(self._queue)

    def submit(self, turns: Sequence[str], decode: DecodeConfig | None = None) -> Job:
        """Puts a conversation in the queue.

        Args:
            turns: the turns so far, oldest first; the last one is answered.
            decode: other settings than the bot's own. Requests with the same settings but for the seed are
                decoded together.

        Raises:
            UserError: no turns, or nothing in the last one.
            QueueFull: too many wait already.
            Stopped: closed.
        """
        with self._changed:
            self._check_room()  # before the work of reading
        job = Job(self.bot.read(turns), self.bot.fitting(decode or self.bot.decode_config))
        with self._changed:
            self._check_room()
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Drops a request that has not begun; one that has begun continues, and nobody gets its reply."""
        with self._changed:
            job.future.cancel()
            if job in self._queue:
                self._queue.remove(job)

    def close(self, timeout: float | None = None) -> bool:
        """Accepts no more requests and answers those that wait.

        Args:
            timeout: seconds; what has no reply by then fails with `Stopped`. None waits for all.

        Returns:
            Whether all was answered in time.
        """
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        self._give_up()
        return False

    def _check_room(self) -> None:
        if not self.is_ready:
            raise Stopped("the model no longer answers requests")
        if len(self._queue) >= self.max_queue:
            raise QueueFull(f"{len(self._queue)} requests are waiting")

    def _work(self) -> None:
        try:
            while jobs := self._next_batch():
                self._answer(jobs)
        finally:  # also when something worse than an exception ends the thread
            self._is_open = False
            self._give_up()

    def _next_batch(self) -> list[Job]:
        """Waits for requests; those that are decoded like the oldest one. Nothing when closed and done."""
        with self._changed:
            while True:
                if not self._queue:
                    self._changed.wait_for(lambda: self._queue or not self._is_open)
                    self._changed.wait_for(self._is_full_or_closed, self.wait_s)
                if not self._queue and not self._is_open:
                    return []
                if jobs := self._take():  # not if all were cancelled meanwhile
                    return jobs

    def _is_full_or_closed(self) -> bool:
        return len(self._queue) >= self.max_batch or not self._is_open

    def _take(self) -> list[Job]:
        if not self._queue:
            return []
        settings = replace(self._queue[0].decode, seed=0)
        alike = [job for job in self._queue if replace(job.decode, seed=0) == settings]
        alike = alike[: max(1, self.max_batch // settings.rows_per_latent)]
        self._queue = [job for job in self._queue if job not in alike]
        self._running = [job for job in alike if job.future.set_running_or_notify_cancel()]
        return self._running

    def _answer(self, jobs: list[Job]) -> None:
        """One batch; what goes wrong in it affects only these requests."""
        try:
            replies = self.bot.reply_to(
                [job.context for job in jobs], jobs[0].decode, [job.decode.seed for job in jobs]
            )
            if self.on_batch:
                self.on_batch(replies)
        except Exception as error:
            logger.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                self._settle(job, error)
        else:
            for job, reply in zip(jobs, replies, strict=True):
                self._settle(job, reply)
        self._running = []

    def _settle(self, job: Job, outcome: Reply | Exception) -> None:
        """Answers a request, if `close` has not given it up."""
        with self._changed:
            if job.future.done():
                return
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _give_up(self) -> None:
        """Answers all that wait or run with `Stopped`."""
        with self._changed:
            left, self._queue = self._running + self._queue, []
            for job in left:
                self._settle(job, Stopped("the model stopped before there was a reply"))
