"""What stands before Gradio: of its routes those that the page needs, and in its requests no file."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plato2.serve.chat_api import ApiError, wrong

GET, POST = ["GET"], ["POST"]
ROUTES: dict[str, list[str]] = {
    "/": GET,
    "/assets/{path:path}": GET,
    "/config": GET,
    "/favicon.ico": GET,
    "/manifest.json": GET,
    "/static/{path:path}": GET,
    "/theme.css": GET,
    "/gradio_api/app_id": GET,
    "/gradio_api/api/{api_name}": POST,
    "/gradio_api/call/v2/{api_name}": POST,
    "/gradio_api/call/v2/{api_name}/{event_id}": GET,
    "/gradio_api/call/{api_name}": POST,
    "/gradio_api/call/{api_name}/{event_id}": GET,
    "/gradio_api/cancel": POST,
    "/gradio_api/heartbeat/{session_hash}": GET,
    "/gradio_api/info": GET,
    "/gradio_api/openapi.json": GET,
    "/gradio_api/queue/data": GET,
    "/gradio_api/queue/join": POST,
    "/gradio_api/queue/status": GET,
    "/gradio_api/reset": POST,
    "/gradio_api/run/{api_name}": POST,
    "/gradio_api/startup-events": GET,
    "/gradio_api/theme.css": GET,
}
"""All of Gradio that can be reached: what a browser and gradio_client need to talk."""

HEADERS = {
    # Gradio's own scripts are inline and use eval; nothing of them may come from, or go to, another machine.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Of every answer of the page."""


class Door:
    """What stands before Gradio: it lets in what this page itself sends, and no file.

    An object in a request can be Gradio's `FileData`. Mounted in another application, Gradio opens whatever
    path is in it: any file, which it copies to a folder that others see, or a device, at which it hangs. The
    page's own requests have texts and numbers only, so objects and lists of objects do not pass. What passes
    is written anew, so that Gradio cannot read something else in it than was checked here.

    Args:
        app: Gradio's application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        request = Request(scope, receive)
        body = b""
        try:
            check_origin(request.headers)
            if request.method == "POST":
                body = json.dumps(flat(await request.body())).encode()
        except ApiError as error:
            return await error.response()(scope, receive, send)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_checked() -> Message:
            return unread.pop() if unread else await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive_checked, send_with_headers)


def check_origin(headers: Headers) -> None:
    """The page is for its own scripts: those of other sites, of other ports of this machine too, are refused.

    Raises:
        ApiError: the request is of another site's script.
    """
    origin = headers.get("origin")
    # Not its scheme: behind a proxy with TLS the browser's is another one.
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise ApiError(403, "foreign_origin", f"Origin: {origin[:80]}: the page answers only its own scripts")


def flat(body: bytes) -> dict[str, Any]:
    """The values of a request: texts and numbers, in `data` a list and in `event_data` an object of them.

    Raises:
        ApiError: a body that is something else.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # ValueError: also what is no UTF-8, and numbers of 5,000 digits
        raise ApiError(400, "invalid_json", "the body is not JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_type", "the body must be a JSON object")
    for name, value in found.items():
        values = [value]
        if name == "data" and isinstance(value, list):
            values = value
        elif name == "event_data" and isinstance(value, dict):
            values = list(value.values())
        if not all(is_plain(one) for one in values):
            raise wrong(name[:80], "the page takes texts and finite numbers, no files")
    return found


def is_plain(value: object) -> bool:
    """Whether a value is a text, a finite number, a truth value or nothing."""
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, str | int | None)
