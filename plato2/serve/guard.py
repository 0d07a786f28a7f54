"""What every request passes first: checks of key, host name and body size."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plato2.serve.chat_api import ApiError

if TYPE_CHECKING:
    from plato2.serve.metrics import Metrics

CLIENT_GONE = 499
"""Status under which requests are counted whose client closed the connection; nobody sees it."""
STREAM_STATUS = "plato2.status"
"""Key of a request's scope: the status it is counted under where its 200 was sent before."""
NO_KEY = ("/healthz", "/metrics")
"""What needs no key, for programs that watch the server."""
LINGER_S = 1.0
"""Seconds for which the rest of a body that is too large is read and thrown away. Closing at once would reset
the connection, and the client would not see why."""


@dataclass(frozen=True)
class Access:
    """Who may ask what."""

    api_key: str | None = None
    """What /v1 and /openapi.json ask for; None lets everyone in."""
    page_key: bool = False
    """Whether the page asks for it, too, and so everything but `NO_KEY`."""
    hosts: Collection[str] = ()
    """Host names of the server, besides those of loopback and the address that was called; `*`
    = any. A website whose name leads to this machine must not be answered (DNS rebinding)."""

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
        metrics: counts; None: nobody does.
        max_body: bytes.
        receive_s: seconds in which a body has to arrive.
        access: who may pass.
        log_requests: whether to print a line for each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics | None,
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
            if self.metrics is not None:
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
            text = f"the body did not arrive within {self.receive_s:g} s"
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
            text = f"Host: {headers['host'][:80]}: not a name of this server; "
            text += f"allow it with --allow-host {name}"
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
