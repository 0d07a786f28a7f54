"""The HTTP side of `plato2 serve`: OpenAI's chat completions, answered by a `Batcher` (docs/serve.md).

    metrics = Metrics()
    batcher = Batcher(bot, on_batch=metrics.count_batch)
    app = make_app(bot, batcher, metrics, "tiny")

A request goes through `Gate` (size, key, counting), becomes a `ChatRequest`, which checks itself, then turns
and a `DecodeConfig`, waits for its reply in the batcher's queue, and goes back as one object or as a stream.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import ipaddress
import json
import math
import os
import re
import secrets
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, TextIO
from urllib.parse import quote, urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from plato2 import __version__
from plato2.config import DecodeConfig, UserError
from plato2.data.tokenizer import EOS_ID
from plato2.talk.batching import Batcher, Job, QueueFull, Stopped
from plato2.talk.bot import PlatoBot, Reply, as_dict
from plato2.talk.chat_api import ApiError, ChatRequest, System, of_validation, wrong
from plato2.talk.decode import n_candidates
from plato2.talk.rank import Candidate
from plato2.talk.safety import Safety

BACKLOG = 2048
"""Connections that the system holds until they are taken."""
TAKEN_AT_ONCE = 16
"""Connections that are taken in one turn of the event loop."""
OWN_FILES = 128 + 8 * TAKEN_AT_ONCE
"""Files for which the process keeps room beside its connections: its own, and those taken before a connection
that was given up is closed, some turns later."""
CLIENT_GONE = 499
"""Status under which requests are counted whose client closed the connection; nobody sees it."""
STREAM_STATUS = "plato2.status"
"""Key of a request's scope: the status it is counted under where its 200 was sent before."""
KEEP_ALIVE_S = 5.0
"""Seconds between the comments of a stream that waits for its reply."""
WARNING_HEADER = "X-Plato2-Warning"
"""Of an answer to a request of which something was left out."""
NO_KEY = ("/healthz", "/metrics")
"""What needs no key, for programs that watch the server."""
LOG_CHARACTERS, LOG_SECONDS = 100_000, 60.0
"""What is written to stderr at most, in so many seconds."""
LINGER_S = 1.0
"""Seconds for which the rest of a body that is too large is read and thrown away. Closing at once would reset
the connection, and the client would not see why."""


# -------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Choice:
    """One of the replies that were asked for."""

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    n_tokens: int
    """Tokens generated for it, its end included."""


def is_truncated(bot: PlatoBot, job: Job) -> bool:
    """Whether the model reads less than all that was said."""
    if job.context.count(EOS_ID) < len(job.turns):  # an end for each turn that is there
        return True
    room = bot.max_context - 2
    return len(job.context) == bot.max_context and len(bot.tokenizer.encode(job.turns[-1])) > room


def is_held(candidate: Candidate, safety: Safety | None) -> bool:
    """Whether the safety filter holds a candidate back."""
    return safety is not None and safety.output == "block" and candidate.flag is not None


def choices_of(reply: Reply, n: int, safety: Safety | None) -> list[Choice]:
    """The n best candidates; refusals in place of those that the safety filter holds back."""
    said = [candidate for candidate in reply.candidates if not is_held(candidate, safety)]
    found = [
        Choice(c.text, "stop" if c.has_end else "length", len(c.token_ids) + c.has_end) for c in said[:n]
    ]
    if safety is None:
        return found
    return found + [Choice(safety.refusal, "content_filter", 0)] * (n - len(found))


def candidate_dict(candidate: Candidate, safety: Safety | None) -> dict[str, Any]:
    """All of a candidate; one that is held back has no text."""
    found = as_dict(candidate) | {"score": candidate.score, "has_end": candidate.has_end}
    return found | ({"text": None} if is_held(candidate, safety) else {})


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
        system: what becomes of system messages.
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
            ApiError: there is none.
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
        job, truncated = await asyncio.to_thread(self._submit, chat, turns, decode)
        waiting = asyncio.create_task(self._wait(job, request))
        waiting.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be there
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        warning = {WARNING_HEADER: left_out} if left_out else {}
        if chat.stream:
            events = self._events(chat, job, truncated, waiting, head, request.scope)
            quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect it
            return StreamingResponse(events, media_type="text/event-stream", headers=quiet | warning)
        answer = self._answer(chat, job, truncated, await waiting)
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

    def _submit(self, chat: ChatRequest, turns: list[str], decode: DecodeConfig) -> tuple[Job, bool]:
        """Into the queue; also whether the model reads less than all turns."""
        try:
            self.bot.encode([chat.messages[-1].text])  # what comes before in its turn does not make up for it
            job = self.batcher.submit(turns, decode)
        except UserError as error:
            raise wrong(f"messages[{len(chat.messages) - 1}].content", str(error)) from None
        except QueueFull as error:
            text = f"the server is busy, {error}; try again in a moment"
            raise ApiError(429, "queue_full", text, headers={"Retry-After": "1"}) from None
        except Stopped as error:
            raise stopped(error) from None
        return job, is_truncated(self.bot, job)

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

    def _answer(self, chat: ChatRequest, job: Job, truncated: bool, reply: Reply) -> Answer:
        choices = choices_of(reply, chat.n or 1, self.bot.safety)
        n_in, n_out = len(job.context), sum(choice.n_tokens for choice in choices)
        self.metrics.count_answer(n_in, n_out, reply.is_refusal)
        plato2: dict[str, Any] = {
            "seed": job.decode.seed,
            "context_tokens": n_in,
            "context_truncated": truncated,
            "timing": asdict(reply.timing),
            "flags": [asdict(flag) for flag in reply.flags],
        }
        if reply.warning:
            plato2["warning"] = reply.warning
        if chat.plato2 and chat.plato2.candidates:
            plato2["candidates"] = [candidate_dict(c, self.bot.safety) for c in reply.candidates]
        usage = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
        return Answer(choices, usage, plato2)

    async def _events(
        self,
        chat: ChatRequest,
        job: Job,
        truncated: bool,
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
                answer = self._answer(chat, job, truncated, waiting.result())
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
    """Another model than the one that is here."""
    return ApiError(404, "model_not_found", f"there is no model {asked!r} here, only {name!r}", "model")


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -------------------------------------------------------------------------------------------------- counting


class Metrics:
    """What Prometheus reads at /metrics."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "plato2_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "plato2_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            registry=registry,
        )
        self.queue_length = Gauge("plato2_queue_length", "Requests that have not begun.", registry=registry)
        self.batch_contexts = Histogram(
            "plato2_batch_contexts",
            "Contexts answered in one batch.",
            registry=registry,
            buckets=(1, 2, 4, 6, 8, 10, 12, 14, 16, math.inf),
        )
        self.decode_seconds = Histogram(
            "plato2_decode_seconds", "Decoding the candidates of a batch.", registry=registry
        )
        self.rank_seconds = Histogram(
            "plato2_rank_seconds", "Ranking the candidates of a batch.", registry=registry
        )
        self.tokens = Counter(
            "plato2_tokens", "Tokens of contexts (in) and of replies (out).", ["direction"], registry=registry
        )
        self.refusals = Counter("plato2_refusals", "Replies the safety filter refused.", registry=registry)
        ProcessCollector(registry=registry)

    def count_batch(self, replies: list[Reply]) -> None:
        """For `Batcher.on_batch`."""
        self.batch_contexts.observe(len(replies))
        timing = max((reply.timing for reply in replies), key=lambda timing: timing.contexts)
        if timing.contexts:  # none where the safety filter stopped all messages
            self.decode_seconds.observe(timing.decode_s)
            self.rank_seconds.observe(timing.rank_s)

    def count_answer(self, n_in: int, n_out: int, is_refusal: bool) -> None:
        """A reply that goes back, in tokens."""
        self.tokens.labels("in").inc(n_in)
        self.tokens.labels("out").inc(n_out)
        self.refusals.inc(is_refusal)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """A request that was answered; paths that are not ours count as one."""
        known = ("/v1/models", "/v1/chat/completions", "/healthz", "/metrics", "/openapi.json", "/")
        endpoint = path if path in known else "other"
        if path.startswith("/v1/models/"):
            endpoint = "/v1/models/{id}"
        self.requests.labels(endpoint, str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)


# -------------------------------------------------------------------------------------------- application


@dataclass(frozen=True)
class Access:
    """Who may ask what."""

    api_key: str | None = None
    """What /v1 and /openapi.json ask for; None lets everybody in."""
    page_key: bool = False
    """Whether the page asks for it, too, and so everything but `NO_KEY`."""
    hosts: Collection[str] = ()
    """Names by which the server may be called, beside those of loopback and the address that was called; `*`
    = any. A web site whose name leads to this machine must not be answered (DNS rebinding)."""

    def has_key(self, path: str, headers: Headers) -> bool:
        """Whether a request for that path may pass."""
        if not self.api_key or path in NO_KEY:
            return True
        if not (self.page_key or path.startswith("/v1/") or path == "/openapi.json"):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":  # what browsers send: the key is the password, of any user
            try:
                given = base64.b64decode(given).decode().partition(":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        return secrets.compare_digest(given.strip().encode(), self.api_key.encode())

    def has_host(self, scope: Scope, headers: Headers) -> bool:
        """Whether the server is called by a name of its own. Browsers always say by which."""
        said = headers.get("host")
        if said is None or "*" in self.hosts:
            return True
        host = host_name(said)
        return is_loopback(host) or host in self.hosts or host == (scope.get("server") or [None])[0]


def host_name(netloc: str) -> str:
    """The name in `name:port` or `[address]:port`, in small letters; nothing if there is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """What every request passes first: its key and host are looked at, its body is read, and it is counted.

    Args:
        app: the application behind it.
        metrics: counts.
        max_body: bytes.
        receive_s: seconds in which a body has to come.
        access: who may pass.
        log_requests: whether to print a line for each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body: int,
        receive_s: float,
        access: Access,
        log_requests: bool,
    ) -> None:
        self.app, self.metrics, self.max_body, self.receive_s = app, metrics, max_body, receive_s
        self.access, self.log_requests = access, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":  # a GET whose body Uvicorn does not send
            scope = {**scope, "method": "GET"}
        began, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, send_and_note)
        finally:
            seconds, status = time.perf_counter() - began, scope.get(STREAM_STATUS, status)
            self.metrics.count_request(scope["path"], status, seconds)
            if self.log_requests:  # quoted: a path may have line ends in it; what comes after ? is not shown
                client = (scope.get("client") or ["-"])[0]
                with contextlib.suppress(OSError):  # nobody reads it any more
                    print(client, scope["method"], quote(scope["path"]), status, flush=True)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            length = headers.get("content-length", "")
            declared = int(length) if length.isdecimal() else 0
            body, more = bytearray(), True
            async with asyncio.timeout(self.receive_s):
                while more and max(len(body), declared) <= self.max_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        scope[STREAM_STATUS] = CLIENT_GONE
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            text = f"the body did not come within {self.receive_s:g} s"
            error = ApiError(408, "body_too_slow", text, headers={"Connection": "close"})
            return await error.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if max(len(body), declared) > self.max_body:
            return await self._refuse_body(receive, send, more)
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises `ApiError` for a request that may not pass."""
        if not self.access.has_host(scope, headers):
            name = host_name(headers["host"])[:80] or "NAME"
            text = f"Host: {headers['host'][:80]}: no name of this server; --allow-host {name} makes it one"
            raise ApiError(400, "foreign_host", text)
        if not self.access.has_key(scope["path"], headers):
            is_api = scope["path"].startswith("/v1/") or not self.access.page_key
            text = "a valid API key is needed: send Authorization: Bearer KEY"
            challenge = "Bearer" if is_api else 'Basic realm="plato2: the API key is the password"'
            raise ApiError(401, "invalid_api_key", text, headers={"WWW-Authenticate": challenge})

    async def _refuse_body(self, receive: Receive, send: Send, more: bool) -> None:
        """The error at once; what is on its way is thrown away for a moment, then the connection closes."""
        text = f"the body is larger than {self.max_body // 1024} KB; send fewer or shorter messages"
        response = ApiError(413, "body_too_large", text, headers={"Connection": "close"}).response()
        await send({"type": "http.response.start", "status": 413, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while more:
                    more = (await receive()).get("more_body", False)  # none of a disconnect
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
        api_key: what /v1 and /openapi.json ask for; None lets everybody in.
        page_key: whether all but `NO_KEY` asks for it, the page too.
        hosts: names by which the server may be called, beside those of loopback; see `Access`.
        cors_origins: pages in whose scripts browsers may read answers, such as `https://example.org`.
        max_body: bytes of a request.
        receive_s: seconds in which a body has to come.
        timeout_s: seconds that a request may wait for its reply.
        seed: of requests that have none; None takes a new one each time.
        system: what becomes of system messages.
        log_requests: whether to print a line for each request.
    """
    chat_of = Chat(bot, batcher, metrics, name, timeout_s, seed, system)
    metrics.queue_length.set_function(lambda: batcher.queue_length)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "plato2"}
    app = FastAPI(
        title="plato2",
        version=__version__,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is here."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        """The model of that name."""
        if id != name:
            raise no_model(id, name)
        return model

    error = {"description": '{"error": {"message", "type", "param", "code"}}'}

    @app.post("/v1/chat/completions", responses={"4XX": error, "5XX": error})
    async def chat_completions(chat: ChatRequest, request: Request) -> Response:
        """The reply to a conversation."""
        return await chat_of.respond(chat, request)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while requests are answered, 503 before the end."""
        ready = batcher.is_ready
        return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

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
            code, text = "method_not_allowed", f"{place}: not with this method"
        else:
            code, text = "invalid_json", f"the body cannot be read: {error.detail}"
        return ApiError(error.status_code, code, text, headers=headers).response()

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return ApiError(500, "server_error", "something went wrong; the server's log says what").response()

    app.add_middleware(
        Gate,
        metrics=metrics,
        max_body=max_body,
        receive_s=receive_s,
        access=Access(api_key, page_key, hosts),
        log_requests=log_requests,
    )
    if cors_origins:  # outside of the gate: its errors need the headers too, and a preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[WARNING_HEADER],
        )
    return app


# ------------------------------------------------------------------------------------------------- server


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address, before a model is loaded in vain; it does not take connections yet.

    Raises:
        UserError: there is no such address here, or the port cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        # Else the port of a server that has just ended stays taken for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; use 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        raise no_port(host, port, error) from None
    return listener


def no_port(host: str, port: int, error: OSError) -> UserError:
    """Why the port cannot be had."""
    return UserError(f"--port {port}: {host}:{port} cannot be used ({error.strerror}); use another --port")


def url_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def room_for(connections: int) -> int:
    """So many connections, or as many as the system lets the process have, whose limit is raised for that.

    Raises:
        UserError: there is room for none.
    """
    try:
        import resource
    except ImportError:  # Windows
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        connections = soft - OWN_FILES
    if connections < 1:
        raise UserError(f"the system allows {soft} open files; allow more: ulimit -n 1024")
    return connections


class Connection(H11Protocol):
    """A client's connection. It is cut where nothing moves on it, so that connections cannot run out.

    Where there are as many as there may be, a new one takes the place of the one that has waited longest
    without a request.

    Args:
        receive_s: seconds in which a request has to begin, and its client to take some of the answer.
        most: connections at the same time.
        arguments: Uvicorn's.
    """

    def __init__(self, *, receive_s: float, most: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.receive_s, self.most = receive_s, most
        self.waits_since = self.loop.time()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether there is no request that was not answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._cut_later()
        if len(self.connections) <= self.most:
            return
        waiting = [one for one in self.connections if isinstance(one, Connection) and one.is_waiting]
        longest = min(waiting, key=lambda one: one.waits_since)
        if longest is not self:
            self.connections.discard(longest)  # else it would be found again before the loop's next turn
            longest.transport.abort()
        else:
            text = "all connections are in use; try again in a moment"
            body = ApiError(503, "too_many_connections", text).response().body
            head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 1"
            transport.write(
                f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\nConnection: close\r\n\r\n".encode() + body
            )
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Something of a request; until its head is whole, the time goes on."""
        super().data_received(data)
        if not self.is_waiting:
            self._go_on()

    def on_response_complete(self) -> None:
        """An answer is written, and perhaps the next request has begun."""
        super().on_response_complete()
        if self.is_waiting:
            self.waits_since = self.loop.time()
            self._cut_later()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._cut_later()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        if not self.is_waiting:
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._go_on()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Never: HTTP/1.1 is all there is. Uvicorn would advise to install something."""
        return False

    def _cut_later(self) -> None:
        self._go_on()
        self.timer = self.loop.call_later(self.receive_s, self.transport.abort)

    def _go_on(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class LimitedLog(io.TextIOBase):
    """A stream of which so much is written in a while and no more: whoever asks often cannot fill the disk.

    It stands for stderr, since not all that libraries have to say goes through `logging`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.began, self.written = stream, time.monotonic(), 0

    def write(self, text: str) -> int:
        """Writes a text, or leaves it out."""
        now = time.monotonic()
        if now - self.began > LOG_SECONDS:
            self.began, self.written = now, 0
        if self.written <= LOG_CHARACTERS:
            self.stream.write(text[:LOG_CHARACTERS])
            self.written += len(text)
            if self.written > LOG_CHARACTERS:
                self.stream.write(
                    f"\n... more than {LOG_CHARACTERS:,} characters: the rest of this minute is left out\n"
                )
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


class Server(uvicorn.Server):
    """Uvicorn, which at the first signal lets the batcher finish and at the second quits at once.

    Until the batcher has finished, new requests are answered with 503, and so is /healthz.

    Args:
        config: Uvicorn's.
        batcher: what has to finish.
        shutdown_s: seconds it has for that, and the answers for being sent.
        on_ready: called when connections are taken.
    """

    def __init__(
        self, config: uvicorn.Config, batcher: Batcher, shutdown_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.batcher, self.shutdown_s, self.on_ready = batcher, shutdown_s, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes connections."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio has made it as short as what it takes at once
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def main_loop(self) -> None:
        """Serves until a signal, and then until what was begun is done."""
        await super().main_loop()
        began = time.monotonic()
        await asyncio.to_thread(self.batcher.close, self.shutdown_s)
        left = self.shutdown_s - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left))  # for answers that are being sent


def make_server(
    app: FastAPI,
    batcher: Batcher,
    *,
    receive_s: float = 20.0,
    max_connections: int = 1000,
    shutdown_s: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> Server:
    """The server of an application.

    Args:
        app: the application.
        batcher: the application's.
        receive_s: seconds in which a connection has to move on; see `Connection`.
        max_connections: at the same time; fewer where the system allows fewer.
        shutdown_s: seconds for what was begun when a signal comes.
        on_ready: called when connections are taken.
    """
    protocol = functools.partial(Connection, receive_s=receive_s, most=room_for(max_connections))
    config = uvicorn.Config(
        app,
        # Said, or what else is installed would decide: httptools loses the body of a request to upgrade.
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        log_level="warning",
        log_config=None,  # else its handler would keep the stderr of now: see `run`
        access_log=False,
        backlog=TAKEN_AT_ONCE,
    )
    return Server(config, batcher, shutdown_s, on_ready)


def run(server: Server, listener: socket.socket) -> None:
    """Serves until a signal comes.

    Args:
        server: from `make_server`.
        listener: from `listen`.

    Raises:
        UserError: another process has begun to listen at the same port.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise no_port(host, port, error) from None
    with contextlib.redirect_stderr(LimitedLog(sys.stderr)):
        server.run([listener])
