"""The application of `plato2 serve`: OpenAI's chat completions, answered by a `Batcher` (docs/serve.md).

    metrics = Metrics()
    batcher = Batcher(bot, on_batch=metrics.count_batch)
    app = make_app(bot, batcher, metrics, "tiny")

A request goes through `Gate` (size, key, counting), becomes a `ChatRequest`, which checks itself, then turns
and a `DecodeConfig`, waits for its reply in the batcher's queue, and goes back as one object or as a stream.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Scope

from plato2 import __version__
from plato2.config import DecodeConfig, UserError
from plato2.serve.batching import Batcher, Job, QueueFull, Stopped
from plato2.serve.chat_api import ApiError, ChatRequest, System, of_validation, wrong
from plato2.serve.guard import CLIENT_GONE, STREAM_STATUS, Access, Gate
from plato2.serve.metrics import Metrics
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.decode import n_candidates

KEEP_ALIVE_S = 5.0
"""Seconds between the comments of a stream that waits for its reply."""
WARNING_HEADER = "X-Plato2-Warning"
"""Of an answer to a request of which something was left out."""


# -------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Choice:
    """One of the replies that were asked for."""

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    n_tokens: int
    """Tokens generated for it, its end included."""


def choices_of(reply: Reply, n: int, bot: PlatoBot) -> list[Choice]:
    """The n best candidates; refusals in place of those that the safety filter holds back."""
    said = [candidate for candidate in reply.candidates if not bot.holds_back(candidate)]
    found = [
        Choice(c.text, "stop" if c.has_end else "length", len(c.token_ids) + c.has_end) for c in said[:n]
    ]
    if bot.safety is None:
        return found
    return found + [Choice(bot.safety.refusal, "content_filter", 0)] * (n - len(found))


@dataclass(frozen=True)
class Answer:
    """What goes back, as an object or as a stream."""

    choices: list[Choice]
    usage: dict[str, int]
    plato2: dict[str, Any]


class Chat:
    """Answers chat requests.

    Args:
        bot: the batcher's, for its settings and its tokenizer.
        batcher: answers.
        metrics: counts.
        name: of the model.
        timeout_s: seconds that a request may wait for its reply.
        seed: of requests that have none; None takes a new one each time.
        system: what to do with system messages.
    """

    def __init__(
        self,
        bot: PlatoBot,
        batcher: Batcher,
        metrics: Metrics,
        name: str,
        timeout_s: float,
        seed: int | None,
        system: System,
    ) -> None:
        self.bot, self.batcher, self.metrics, self.name = bot, batcher, metrics, name
        self.timeout_s, self.seed, self.system = timeout_s, seed, system

    async def respond(self, chat: ChatRequest, request: Request) -> Response:
        """The response to a request.

        Raises:
            ApiError: no reply.
        """
        if chat.model != self.name:
            raise no_model(chat.model, self.name)
        seed = secrets.randbits(63) if self.seed is None else self.seed
        decode = chat.decode_config(self.bot.decode_config, seed)
        most = n_candidates(self.bot.generation, decode)
        if (chat.n or 1) > most:
            raise wrong("n", f"these settings give {most} candidates; use at most that many")
        if chat.stream_options and not chat.stream:
            raise wrong("stream_options", "only with stream: true")
        turns, left_out = chat.turns(self.system)
        # In a thread: cutting a very long text into tokens takes a while.
        job = await asyncio.to_thread(self._submit, chat, turns, decode)
        waiting = asyncio.create_task(self._wait(job, request))
        waiting.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # the client may have gone
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        warning = {WARNING_HEADER: left_out} if left_out else {}
        if chat.stream:
            events = self._events(chat, job, waiting, head, request.scope)
            quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect it
            return StreamingResponse(events, media_type="text/event-stream", headers=quiet | warning)
        answer = self._answer(chat, job, await waiting)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(answer.choices)
        ]
        body = head | {"object": "chat.completion", "choices": choices, "usage": answer.usage}
        return JSONResponse(body | {"plato2": answer.plato2}, headers=warning)

    def _submit(self, chat: ChatRequest, turns: list[str], decode: DecodeConfig) -> Job:
        """Into the queue.

        Raises:
            ApiError: the last message is empty, or there is no room in the queue.
        """
        try:
            if self.bot.tokenizer.is_empty(chat.messages[chat.last].text):
                turns = []  # what comes before in its turn does not make up for it
            return self.batcher.submit(turns, decode)
        except UserError as error:
            raise wrong(f"messages[{chat.last}].content", str(error)) from None
        except QueueFull as error:
            text = f"the server is busy, {error}; try again in a moment"
            raise ApiError(429, "queue_full", text, headers={"Retry-After": "1"}) from None
        except Stopped as error:
            raise stopped(error) from None

    async def _wait(self, job: Job, request: Request) -> Reply:
        """The reply; a request that is given up leaves the queue.

        Raises:
            ApiError: time is up, the client has gone, the batch failed, or the server stops.
        """
        reply = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(until_gone(request))
        either: set[asyncio.Future[Any]] = {reply, gone}
        try:
            await asyncio.wait(either, timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                return reply.result()
            if gone.done():
                raise ApiError(CLIENT_GONE, "client_gone", "the client has closed the connection")
            text = f"no reply within {self.timeout_s:g} s; try again, or ask for fewer candidates"
            raise ApiError(504, "timeout", text)
        except Stopped as error:
            raise stopped(error) from None
        except ApiError:
            raise
        except Exception:  # the batcher has logged it
            raise ApiError(500, "reply_failed", "the reply failed; the server's log says why") from None
        finally:
            gone.cancel()
            reply.cancel()
            self.batcher.cancel(job)

    def _answer(self, chat: ChatRequest, job: Job, reply: Reply) -> Answer:
        choices = choices_of(reply, chat.n or 1, self.bot)
        n_in, n_out = len(job.context.ids), sum(choice.n_tokens for choice in choices)
        self.metrics.count_answer(n_in, n_out, reply.is_refusal)
        plato2: dict[str, Any] = {
            "seed": job.decode.seed,
            "context_tokens": n_in,
            "context_truncated": job.context.is_cut,
            "timing": asdict(reply.timing),
            "flags": [asdict(flag) for flag in reply.flags],
        }
        if reply.warning:
            plato2["warning"] = reply.warning
        if chat.plato2 and chat.plato2.candidates:
            plato2["candidates"] = [
                c.to_dict(ranking=True, held=self.bot.holds_back(c)) for c in reply.candidates
            ]
        usage = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
        return Answer(choices, usage, plato2)

    async def _events(
        self,
        chat: ChatRequest,
        job: Job,
        waiting: asyncio.Task[Reply],
        head: dict[str, Any],
        scope: Scope,
    ) -> AsyncIterator[str]:
        """Server-sent events: the role at once, then comments, and all words when the reply is there."""
        with_usage = chat.stream_options is not None and bool(chat.stream_options.include_usage)
        rest: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(index: int, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return event(head | {"object": "chat.completion.chunk", "choices": [choice]} | rest | more)

        try:
            for index in range(chat.n or 1):
                yield chunk(index, {"role": "assistant", "content": ""})
            while not (await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S))[0]:
                yield ": waiting\n\n"
            try:
                answer = self._answer(chat, job, waiting.result())
            except ApiError as error:
                scope[STREAM_STATUS] = error.status
                yield "event: error\n" + event(error.to_dict())
                return
            for index, choice in enumerate(answer.choices):
                for word in re.findall(r"\s*\S+|\s+$", choice.text):
                    yield chunk(index, {"content": word})
                last = index == len(answer.choices) - 1
                yield chunk(index, {}, choice.finish_reason, **({"plato2": answer.plato2} if last else {}))
            if with_usage:
                usage = {"object": "chat.completion.chunk", "choices": [], "usage": answer.usage}
                yield event(head | usage)
            yield "data: [DONE]\n\n"
        finally:  # also when the client has gone
            if not waiting.done():
                scope[STREAM_STATUS] = CLIENT_GONE
                waiting.cancel()


def event(data: dict[str, Any]) -> str:
    """A server-sent event; its JSON is ASCII, so that nothing in it can end a line."""
    return f"data: {json.dumps(data)}\n\n"


def stopped(error: Stopped) -> ApiError:
    """The server is about to end."""
    return ApiError(503, "stopping", str(error), headers={"Retry-After": "5", "Connection": "close"})


def no_model(asked: str, name: str) -> ApiError:
    """A request for another model than this one."""
    return ApiError(404, "model_not_found", f"there is no model {asked!r} here, only {name!r}", "model")


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -------------------------------------------------------------------------------------------- application


def make_app(
    bot: PlatoBot,
    batcher: Batcher,
    metrics: Metrics,
    name: str,
    *,
    api_key: str | None = None,
    page_key: bool = False,
    hosts: Collection[str] = (),
    cors_origins: Sequence[str] = (),
    max_body: int = 2**20,
    receive_s: float = 20.0,
    timeout_s: float = 60.0,
    seed: int | None = None,
    system: System = "ignore",
    log_requests: bool = False,
) -> FastAPI:
    """The application.

    Args:
        bot: the batcher's.
        batcher: answers.
        metrics: what /metrics shows.
        name: of the model.
        api_key: what /v1 and /openapi.json ask for; None lets everyone in.
        page_key: whether all but `NO_KEY` asks for it, the page too.
        hosts: host names of the server, besides those of loopback; see `Access`.
        cors_origins: pages in whose scripts browsers may read answers, such as `https://example.org`.
        max_body: bytes of a request.
        receive_s: seconds in which a body has to arrive.
        timeout_s: seconds that a request may wait for its reply.
        seed: of requests that have none; None takes a new one each time.
        system: what to do with system messages.
        log_requests: whether to print a line for each request.
    """
    app = FastAPI(
        title="plato2",
        version=__version__,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    _add_api(app, Chat(bot, batcher, metrics, name, timeout_s, seed, system))
    _add_state(app, batcher, metrics)
    _add_errors(app)
    app.add_middleware(
        Gate,
        metrics=metrics,
        max_body=max_body,
        receive_s=receive_s,
        access=Access(api_key, page_key, hosts),
        log_requests=log_requests,
    )
    if cors_origins:  # outside of the gate: its errors need the headers too, and a preflight has no key
        _add_cors(app, cors_origins)
    return app


def _add_api(app: FastAPI, answers: Chat) -> None:
    """OpenAI's addresses, below /v1."""
    model = {"id": answers.name, "object": "model", "created": int(time.time()), "owned_by": "plato2"}
    error = {"description": '{"error": {"message", "type", "param", "code"}}'}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        """The model of that name."""
        if id != answers.name:
            raise no_model(id, answers.name)
        return model

    @app.post("/v1/chat/completions", responses={"4XX": error, "5XX": error})
    async def chat_completions(chat: ChatRequest, request: Request) -> Response:
        """The reply to a conversation."""
        return await answers.respond(chat, request)


def _add_state(app: FastAPI, batcher: Batcher, metrics: Metrics) -> None:
    """What says how the server is."""
    metrics.queue_length.set_function(lambda: batcher.queue_length)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while requests are answered, 503 before the end."""
        ready = batcher.is_ready
        return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every error as JSON in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_wrong_body(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        place, headers = f"{request.method} {request.url.path}", dict(error.headers or {})
        if error.status_code == 404:
            code, text = "not_found", f"{place}: there is no such address"
        elif error.status_code == 405:
            code, text = "method_not_allowed", f"{place}: this method is not allowed"
        else:
            code, text = "invalid_json", f"the body cannot be read: {error.detail}"
        return ApiError(error.status_code, code, text, headers=headers).response()

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return ApiError(500, "server_error", "something went wrong; the server's log says what").response()


def _add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets the scripts of these pages ask and read answers."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[WARNING_HEADER],
    )
