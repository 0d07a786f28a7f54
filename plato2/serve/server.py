"""The process of `plato2 serve`: its socket, its connections, its log, and how it ends.

server = make_server(app, batcher)
run(server, listen("127.0.0.1", 8000))
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from plato2.config import UserError
from plato2.serve.chat_api import ApiError

if TYPE_CHECKING:
    from plato2.serve.batching import Batcher

BACKLOG = 2048
"""Connections that the system holds until they are taken."""
TAKEN_AT_ONCE = 16
"""Connections that are taken in one turn of the event loop."""
OWN_FILES = 128 + 8 * TAKEN_AT_ONCE
"""Files for which the process keeps room beside its connections: its own, and those taken before a connection
that was given up is closed, some turns later."""
LOG_CHARACTERS, LOG_SECONDS = 100_000, 60.0
"""What is written to stderr at most, in this many seconds."""


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
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
        reason = error.strerror if isinstance(error, OSError) else "no such name can be"
        raise UserError(f"--host {host}: {reason}; use 127.0.0.1, or 0.0.0.0 for all") from None
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
    """This many connections, or as many as the system lets the process have, whose limit is raised for this.

    Raises:
        UserError: there is no room for any.
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
        batcher: what has to finish; None where nothing waits.
        shutdown_s: seconds it has for that, and the answers for being sent.
        on_ready: called when connections are taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        batcher: Batcher | None,
        shutdown_s: float,
        on_ready: Callable[[], None],
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
        if self.batcher is not None:
            await asyncio.to_thread(self.batcher.close, self.shutdown_s)
        left = self.shutdown_s - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left))  # for answers that are being sent


def make_server(
    app: ASGIApp,
    batcher: Batcher | None,
    *,
    receive_s: float = 20.0,
    max_connections: int = 1000,
    shutdown_s: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> Server:
    """The server of an application.

    Args:
        app: the application.
        batcher: the application's, where it has one.
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
