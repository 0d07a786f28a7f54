"""The queue in front of a bot: who is answered with whom, in which order, exactly once, and when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from runs import KNOVER, make_stage

from plato2.config import DecodeConfig, UserError
from plato2.data.samples import Context
from plato2.data.tokenizer import Tokenizer
from plato2.serve.batching import Batcher, Job, QueueFull, Stopped
from plato2.talk.bot import CONTEXTS_AT_ONCE, PlatoBot, Reply

DECODE = DecodeConfig(max_tokens=10)
SOON = 20.0
"""Seconds after which a test gives up waiting."""


class GatedBot(PlatoBot):
    """Notes its batches and answers each only when the gate is open."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        self.error: BaseException | None = None

    def reply_to(
        self,
        contexts: Sequence[Context],
        decode: DecodeConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        self.batches.append([context.turns[-1] for context in contexts])
        self.begun.set()
        assert self.gate.wait(SOON)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().reply_to(contexts, decode, seeds)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Tokenizer, Any]:
    return make_stage("2_gen"), Tokenizer.load(KNOVER), make_stage("2_eval")


@pytest.fixture(scope="module")
def bot(models: tuple[Any, Tokenizer, Any]) -> PlatoBot:
    return PlatoBot(*models, DECODE)


@pytest.fixture
def gated(models: tuple[Any, Tokenizer, Any]) -> Iterator[GatedBot]:
    bot = GatedBot(*models, DECODE)
    yield bot
    bot.gate.set()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def busy(bot: GatedBot, batcher: Batcher) -> Job:
    """A job that is being answered until the gate opens; what comes after it waits."""
    job = batcher.submit(["the first one"])
    assert bot.begun.wait(SOON)
    return job


def result(job: Job) -> Reply:
    return job.future.result(SOON)


def texts(reply: Reply) -> list[tuple[int | None, str]]:
    """What is said; of the scores the last digits depend on the size of the batch."""
    return [(candidate.latent, candidate.text) for candidate in reply.candidates]


def test_a_reply_is_what_the_bot_says(bot: PlatoBot) -> None:
    batcher = Batcher(bot)
    context = ["hello !", "how was your day ?"]
    job = batcher.submit(context, replace(DECODE, seed=5))
    assert result(job) == bot.reply(context, replace(DECODE, seed=5))
    assert job.context.ids == bot.encode(context)
    assert result(batcher.submit(context)) == bot.reply(context)  # the bot's own settings
    assert batcher.close()


def test_what_is_decoded_alike_is_decoded_together_and_says_what_it_would_alone(
    gated: GatedBot, bot: PlatoBot
) -> None:
    batcher = Batcher(gated)
    busy(gated, batcher)
    long = replace(DECODE, max_tokens=1000)  # more than the model has positions for: the most it can
    longer = replace(DECODE, max_tokens=2000)
    jobs = [batcher.submit([f"number {n}"], replace(DECODE, seed=n)) for n in range(12)]
    jobs.insert(3, batcher.submit(["greedy"], replace(DECODE, top_k=1)))
    others = [batcher.submit(["long"], long), batcher.submit(["longer"], longer)]
    gated.gate.set()
    for number, job in enumerate(jobs[:3] + jobs[4:]):
        alone = bot.reply([f"number {number}"], replace(DECODE, seed=number))
        assert texts(result(job)) == texts(alone)
    assert result(jobs[3]) == bot.reply(["greedy"], replace(DECODE, top_k=1))
    for job in others:
        result(job)
    numbers = [f"number {n}" for n in range(12)]
    assert gated.batches == [["the first one"], numbers, ["greedy"], ["long", "longer"]]
    batcher.close()


def test_the_oldest_goes_first_and_takes_those_like_it_along(gated: GatedBot) -> None:
    batcher = Batcher(gated, max_batch=2)
    busy(gated, batcher)
    short = replace(DECODE, max_tokens=3)
    jobs = [batcher.submit([name], short if name.isupper() else DECODE) for name in ("A", "b", "C", "d", "E")]
    gated.gate.set()
    for job in jobs:
        result(job)
    assert gated.batches[1:] == [["A", "C"], ["b", "d"], ["E"]]
    batcher.close()


def test_samples_and_beams_make_a_batch_smaller(gated: GatedBot) -> None:
    batcher = Batcher(gated, max_batch=4)
    busy(gated, batcher)
    settings = {
        "samples": replace(DECODE, n_samples=2, max_tokens=3),
        "beams": DecodeConfig(strategy="beam", beam_size=5, max_tokens=3),
    }
    jobs = [batcher.submit([name], settings[name]) for name in settings for _ in range(3)]
    gated.gate.set()
    for job in jobs:
        result(job)
    assert gated.batches[1:] == [["samples"] * 2, ["samples"], ["beams"], ["beams"], ["beams"]]
    batcher.close()


def test_an_idle_bot_waits_a_moment_for_others(gated: GatedBot) -> None:
    gated.gate.set()
    batcher = Batcher(gated, max_batch=3, wait_s=SOON)
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda n: result(batcher.submit([f"number {n}"])), range(3)))
    assert len(replies) == 3
    assert sorted(gated.batches[0]) == ["number 0", "number 1", "number 2"]  # full: it did not wait longer
    job = batcher.submit(["alone"])
    assert not job.future.done()
    batcher.close()  # ends the waiting, too
    assert job.future.done()


def test_a_queue_has_an_end(gated: GatedBot) -> None:
    batcher = Batcher(gated, max_queue=2)
    first = busy(gated, batcher)
    jobs = [batcher.submit(["one"]), batcher.submit(["two"])]
    assert batcher.queue_length == 2
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        batcher.submit(["three"])
    gated.gate.set()
    for job in [first, *jobs]:
        result(job)
    assert batcher.queue_length == 0
    result(batcher.submit(["three"]))
    batcher.close()


def test_what_is_cancelled_leaves_the_queue(gated: GatedBot) -> None:
    batcher = Batcher(gated, max_queue=2)
    first = busy(gated, batcher)
    jobs = [batcher.submit(["one"]), batcher.submit(["two"])]
    batcher.cancel(jobs[0])
    batcher.cancel(jobs[0])
    batcher.cancel(first)  # has begun: too late
    assert batcher.queue_length == 1
    jobs.append(batcher.submit(["three"]))
    jobs[1].future.cancel()  # by the future alone: it is passed over
    gated.gate.set()
    assert result(first).candidates
    assert result(jobs[2]).candidates
    for job in jobs[:2]:
        with pytest.raises(CancelledError):
            result(job)
    assert gated.batches == [["the first one"], ["three"]]
    batcher.close()


def test_all_may_be_cancelled_while_an_idle_bot_waits(gated: GatedBot) -> None:
    gated.gate.set()
    batcher = Batcher(gated, wait_s=0.05)
    batcher.cancel(batcher.submit(["gone"]))
    time.sleep(0.1)
    assert gated.batches == []
    assert result(batcher.submit(["here"])).candidates
    batcher.close()


def test_an_exception_is_the_matter_of_its_batch_only(
    gated: GatedBot, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = Batcher(gated)
    first = busy(gated, batcher)
    gated.error = RuntimeError("out of memory")
    others = [batcher.submit(["one"]), batcher.submit(["two"])]
    gated.gate.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        result(first)
    for job in others:
        assert result(job).candidates
    assert batcher.is_ready
    assert "a batch of 1 failed" in caplog.text
    assert "the first one" not in caplog.text  # what people say is nothing for a log
    batcher.close()


def test_what_cannot_be_encoded_never_gets_into_a_batch(gated: GatedBot) -> None:
    batcher = Batcher(gated)
    busy(gated, batcher)
    good = batcher.submit(["good"])
    for turns in ([], [""], ["hello", " \n "]):
        with pytest.raises(UserError, match="the message is empty"):
            batcher.submit(turns)
    assert batcher.queue_length == 1
    gated.gate.set()
    assert result(good).candidates
    batcher.close()


def test_closing_answers_what_waits_and_takes_nothing_more(gated: GatedBot) -> None:
    batcher = Batcher(gated, max_batch=2)
    assert batcher.is_ready
    jobs = [busy(gated, batcher)] + [batcher.submit([f"number {n}"]) for n in range(5)]
    closing = ThreadPoolExecutor(1).submit(batcher.close, SOON)
    eventually(lambda: not batcher.is_ready)
    with pytest.raises(Stopped):
        batcher.submit(["too late"])
    gated.gate.set()
    assert closing.result(SOON) is True
    assert all(result(job).candidates for job in jobs)
    assert not batcher.is_working
    assert batcher.close()  # again


def test_closing_ends_in_time(gated: GatedBot) -> None:
    batcher = Batcher(gated)
    running, waiting = busy(gated, batcher), batcher.submit(["waits"])
    cancelled = batcher.submit(["cancelled"])
    batcher.cancel(cancelled)
    assert batcher.close(0.05) is False
    for job in (running, waiting):
        with pytest.raises(Stopped):
            result(job)
    gated.gate.set()  # the late reply is for nobody
    eventually(lambda: not batcher.is_working)
    with pytest.raises(Stopped):
        result(running)
    assert gated.batches == [["the first one"]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_thread_leaves_nobody_waiting(gated: GatedBot) -> None:
    batcher = Batcher(gated)
    running, waiting = busy(gated, batcher), batcher.submit(["waits"])
    gated.error = SystemExit(3)
    gated.gate.set()
    for job in (running, waiting):
        with pytest.raises(Stopped):
            result(job)
    eventually(lambda: not batcher.is_working)
    assert not batcher.is_ready
    with pytest.raises(Stopped):
        batcher.submit(["too late"])


def test_batches_are_told_before_those_who_wait(bot: PlatoBot) -> None:
    told: list[list[Reply]] = []
    batcher = Batcher(bot, on_batch=told.append)
    reply = result(batcher.submit(["hi"]))
    assert told == [[reply]]
    batcher.close()


def test_many_threads_get_their_own_reply_exactly_once(bot: PlatoBot) -> None:
    told: list[list[Reply]] = []
    batcher = Batcher(bot, max_queue=1000, on_batch=told.append)
    answers: dict[int, list[Future[Reply]]] = {n: [] for n in range(120)}

    def ask(n: int) -> Reply:
        job = batcher.submit([f"number {n % 10}"], replace(DECODE, seed=n % 3, max_tokens=4 + n % 2))
        job.future.add_done_callback(answers[n].append)
        return result(job)

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(120)))
    assert batcher.close()
    assert all(len(found) == 1 for found in answers.values())
    assert sum(map(len, told)) == 120
    assert max(map(len, told)) <= CONTEXTS_AT_ONCE
    for n in range(0, 120, 7):
        decode = replace(DECODE, seed=n % 3, max_tokens=4 + n % 2)
        assert texts(replies[n]) == texts(bot.reply([f"number {n % 10}"], decode))
