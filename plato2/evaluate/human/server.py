"""The web page on which raters rate: secret links, no cookies, nothing from elsewhere.

app = make_app(Store(path, tasks))
run(make_server(app, None), listen("127.0.0.1", 8000))

/r/TOKEN is a rater's next item, /r/TOKEN/ITEM one in hand or answered before, and a POST there submits;
/admin/TOKEN shows the progress. Of a chat /r/TOKEN/ITEM/say takes a turn, /retry, /end and /leave do what
their names say, and /standing tells how far it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from sqlalchemy.exc import OperationalError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plato2.config import UserError
from plato2.evaluate.human.formats import Tasks
from plato2.evaluate.human.page import (
    MOST_CHARACTERS,
    admin_page,
    chat_page,
    field,
    item_page,
    message_page,
)
from plato2.evaluate.human.store import Answers, Lent, Step, Store, wanted
from plato2.serve.chat_api import ApiError
from plato2.serve.door import check_origin
from plato2.serve.guard import Access, Gate

if TYPE_CHECKING:
    from plato2.evaluate.human.chat import Partners

FOLDER = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # not no-referrer, with which a form's Origin would be null
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",  # a page from the cache would be an old one, after Back
}
_IN_ADDRESS = re.compile(r"[\w-][\w.-]*")
"""What the id of an item can be."""
MAX_BODY = 64 * 1024
MAX_FIELDS = 2000
WAIT_S = 20
"""Seconds after which the page of a waiting rater looks again."""

LATE = (
    "This item has gone to others",
    "You gave it up, or had it for so long that it was given to other raters, who have answered it. Your "
    "answers to it are not needed; all others of yours are kept.",
)
FOREIGN = (
    "This item was not given to you",
    "Perhaps the address is incomplete, or it comes from another rater's link.",
)
CONFLICT = (
    "You have answered this item in another window",
    "Those answers are kept, and the ones that you have just sent are not. You can look at the item again "
    "and change them.",
)
MOVED = (
    "This chat has gone on in another window",
    "What was said there is kept, and what you have just sent is not.",
)
WAIT = (
    "All that is left is with other raters now",
    "Some of it may come back. This page looks again by itself; you may also close it and open your link "
    "later.",
)
DONE = (
    "Thank you, that was all",
    "There is nothing left for you to rate. Your answers are saved; you may go back and correct them.",
)
STALE = (
    "This link does not work",
    "It is incomplete, or it belongs to a study that is over. Ask whoever sent it to you for a new one.",
)
BUSY = (
    "This could not be saved",
    "The server is busy, or its disk is full. Nothing that was saved before is lost. Go back and submit "
    "again in a moment; answering twice counts once.",
)


def make_app(
    store: Store,
    hosts: Collection[str] = (),
    receive_s: float = 20.0,
    log_requests: bool = False,
    partners: Partners | None = None,
) -> FastAPI:
    """The application of a study.

    Args:
        store: the study.
        partners: whom raters talk with, of the preset `chat`.
        hosts: host names of the server, besides those of loopback; see `Access`.
        receive_s: seconds in which a body has to arrive.
        log_requests: whether to print a line for each request; the secrets of links are in it.
    """
    app = FastAPI(
        title="plato2 evaluate human",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    _add_files(app)
    if partners is not None:
        _add_chat(app, store, partners)
    _add_rating(app, store, partners)
    _add_admin(app, store, partners)
    _add_errors(app)
    app.add_middleware(
        Gate,
        metrics=None,
        max_body=MAX_BODY,
        receive_s=receive_s,
        access=Access(hosts=hosts),
        log_requests=log_requests,
    )
    app.add_middleware(_WithHeaders)
    return app


def check_addresses(tasks: Tasks, name: str) -> None:
    """Whether each item can have an address, of which its id is a part.

    Raises:
        UserError: names the first that cannot.
    """
    for item in tasks.items:
        if not _IN_ADDRESS.fullmatch(item.id):
            raise UserError(
                f"{name}: items.id={item.id!r}: it is a part of an address; use letters, digits, - and _"
            )


class _WithHeaders:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_more)


def _add_files(app: FastAPI) -> None:
    """What pages load, and what says that the server is there."""

    @app.get("/healthz")
    async def healthz() -> Response:
        return PlainTextResponse("ready")

    @app.get("/")
    async def front() -> Response:
        return HTMLResponse(message_page("plato2", "Open the link that was sent to you."))

    names = ("rate.css", "send.js", "rate.js", "chat.js")
    look, send, *scripts = ((FOLDER / name).read_text(encoding="utf-8") for name in names)
    rate, talk = (send + script for script in scripts)

    @app.get("/rate.css")
    async def style() -> Response:
        return Response(look, media_type="text/css")

    @app.get("/rate.js")
    async def rate_script() -> Response:
        return Response(rate, media_type="text/javascript")

    @app.get("/chat.js")
    async def chat_script() -> Response:
        return Response(talk, media_type="text/javascript")


def _add_rating(app: FastAPI, store: Store, partners: Partners | None) -> None:
    """What raters ask for."""

    @app.get("/r/{token}")
    def next_item(token: str) -> Response:
        """The item in hand, or a new one."""
        rater = _rater(store, token)
        found = store.next_item(rater)
        if isinstance(found, Lent):
            return _shown(store, partners, rater, token, found)
        last = store.neighbours(rater, "")[0]
        link = (f"/r/{token}/{last}", "Back to the last item") if last else None
        if found == "wait":
            return HTMLResponse(message_page(*WAIT, link, refresh_s=WAIT_S))
        return HTMLResponse(message_page(*DONE, link))

    @app.get("/r/{token}/{item}")
    def one_item(token: str, item: str) -> Response:
        """An item to go on with, or to correct."""
        rater = _rater(store, token)
        found = store.lent(rater, item)
        if isinstance(found, Lent):
            return _shown(store, partners, rater, token, found)
        return _gone(found, token)

    @app.post("/r/{token}/{item}")
    async def submit(token: str, item: str, request: Request) -> Response:
        """The answers to an item."""
        check_origin(request.headers)  # a form of another site would also need the link's secret
        body = await request.body()
        return await run_in_threadpool(_submit, store, token, item, body)


def _submit(store: Store, token: str, item: str, body: bytes) -> Response:
    rater = _rater(store, token)
    found = store.lent(rater, item)
    if not isinstance(found, Lent):
        return _gone(found, token)
    if not found.ended:
        return RedirectResponse(f"/r/{token}/{item}", 303)
    sent = _sent(body)
    answers: Answers = {}
    given: dict[str, int] = {}
    missing = []
    number_of = {question.name: number for number, question in enumerate(store.tasks.questions)}
    for question, place in wanted(store.tasks.questions, found.item):
        name = field(number_of[question.name], place)
        level = sent.get(name, "")
        if level.isdecimal() and len(level) < 4 and int(level) < len(question.levels):
            given[name] = int(level)
            answers[question.name, place] = question.levels[int(level)].value
        else:
            missing.append(name)
    if missing:
        return _item(store, rater, token, found, missing, given)
    revision = sent.get("revision", "")
    if not (revision.isdecimal() and len(revision) < 10):
        raise HTTPException(400)
    outcome = store.submit(rater, item, answers, int(revision))
    if outcome == "late":
        return _gone(outcome, token)
    if outcome == "conflict":
        again = (f"/r/{token}/{item}", "Look at it again")
        return HTMLResponse(message_page(*CONFLICT, again), 409)
    return RedirectResponse(f"/r/{token}", 303)


def _add_chat(app: FastAPI, store: Store, partners: Partners) -> None:
    """What raters ask for while they talk."""

    @app.get("/r/{token}/{item}/standing")
    def standing(token: str, item: str) -> Response:
        """How many turns there are and whose turn it is: what is on the page, or something else."""
        rater = _rater(store, token)
        found = store.lent(rater, item)
        if not isinstance(found, Lent) or found.ended:
            return PlainTextResponse("over")
        n_said = len(found.item.shown[0].turns)
        return PlainTextResponse(f"{n_said} {partners.standing(rater, found.item)}")

    @app.post("/r/{token}/{item}/{deed}")
    async def do(token: str, item: str, deed: str, request: Request) -> Response:
        """What is said, and the buttons."""
        check_origin(request.headers)
        body = await request.body()
        return await run_in_threadpool(_do, store, partners, token, item, deed, body)


def _do(store: Store, partners: Partners, token: str, item: str, deed: str, body: bytes) -> Response:
    rater = _rater(store, token)
    found = store.lent(rater, item)
    if not isinstance(found, Lent):
        return _gone(found, token)
    outcome: Step = "done"
    if deed == "say":
        sent = _sent(body)
        place, text = sent.get("place", ""), " ".join(sent.get("text", "").split())
        if not (place.isdecimal() and len(place) < 4):
            raise HTTPException(400)
        if not text or len(text) > MOST_CHARACTERS:
            short = f"This is too long: say it in {MOST_CHARACTERS:,} characters or fewer."
            return _chat(store, partners, rater, token, found, short if text else "Say something.", text)
        outcome = store.say(rater, item, int(place), text)
    elif deed == "end":
        outcome = store.end(rater, item)
    elif deed == "retry":
        partners.retry(rater, found.item)
    elif deed == "leave":
        store.give_up(rater, item)
        return RedirectResponse(f"/r/{token}", 303)
    else:
        raise HTTPException(404)
    if outcome in ("late", "foreign"):
        return _gone(outcome, token)
    if outcome == "conflict":
        return HTMLResponse(message_page(*MOVED, (f"/r/{token}/{item}", "Go on with it")), 409)
    return RedirectResponse(f"/r/{token}/{item}", 303)


def _add_admin(app: FastAPI, store: Store, partners: Partners | None) -> None:
    """What whoever runs the study asks for."""

    @app.get("/admin/{token}")
    def admin(token: str) -> Response:
        """The progress."""
        _check_admin(store, token)
        trouble = partners.trouble if partners is not None else {}
        return HTMLResponse(
            admin_page(store.tasks, store.progress(), f"/admin/{token}", _agreement(store), trouble)
        )

    @app.get("/admin/{token}/ratings.jsonl")
    def ratings(token: str) -> Response:
        """All ratings until now."""
        _check_admin(store, token)
        lines = "".join(f"{rating.model_dump_json()}\n" for rating in store.ratings())
        return Response(lines, media_type="application/jsonl")


def _agreement(store: Store) -> dict[str, dict[str, Any]]:
    """How much raters agree until now, by question."""
    from plato2.evaluate.human.ratings import check_ratings
    from plato2.evaluate.human.report import agreement_by_question

    if not (ratings := store.ratings()):
        return {}
    tasks = store.tasks if store.tasks.chat is None else store.rated_chats()
    return agreement_by_question(check_ratings(tasks, ratings))


def _add_errors(app: FastAPI) -> None:
    """Every error as a page for people."""

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return HTMLResponse(message_page(*STALE), 404)
        text = "This address does not take such a request. Open the link that was sent to you."
        return HTMLResponse(message_page("Something is wrong with this request", text), error.status_code)

    @app.exception_handler(404)
    async def on_no_address(request: Request, error: Exception) -> Response:
        return HTMLResponse(message_page(*STALE), 404)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return HTMLResponse(message_page("This request is refused", str(error)), error.status)

    @app.exception_handler(OperationalError)
    async def on_busy(request: Request, error: OperationalError) -> Response:
        return HTMLResponse(message_page(*BUSY), 503, {"Retry-After": "2"})

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return HTMLResponse(message_page("Something went wrong", "The server's log says what."), 500)


def _rater(store: Store, token: str) -> str:
    """Whose link it is; a 404 where it is nobody's."""
    rater = store.rater_of(token)
    if rater is None:
        raise HTTPException(404)
    return rater


def _check_admin(store: Store, token: str) -> None:
    """A 404 for any other link than the admin's."""
    if not store.is_admin(token):
        raise HTTPException(404)


def _gone(found: str, token: str) -> Response:
    """The page for who asks for an item that is not theirs, or no longer."""
    title, text = LATE if found == "late" else FOREIGN
    return HTMLResponse(message_page(title, text, _next(token)), 410 if found == "late" else 404)


def _next(token: str) -> tuple[str, str]:
    return f"/r/{token}", "Go on with the next item"


def _shown(store: Store, partners: Partners | None, rater: str, token: str, lent: Lent) -> Response:
    """The page of an item: a chat that goes on, or what is rated."""
    if partners is None or lent.ended:
        return _item(store, rater, token, lent)
    return _chat(store, partners, rater, token, lent)


def _chat(
    store: Store, partners: Partners, rater: str, token: str, lent: Lent, note: str = "", text: str = ""
) -> Response:
    """The page of a chat; 422 where what was said cannot be taken."""
    chat, back = store.tasks.chat, store.neighbours(rater, lent.item.id)[0]
    assert chat is not None
    standing = partners.standing(rater, lent.item)
    base, progress = f"/r/{token}", store.standing(rater)
    html = chat_page(chat, lent.item, base, back, progress, standing, note, text)
    return HTMLResponse(html, 422 if note else 200)


def _item(
    store: Store,
    rater: str,
    token: str,
    lent: Lent,
    missing: Collection[str] = (),
    given: dict[str, int] | None = None,
) -> Response:
    """The page of an item; 422 where answers are missing."""
    back, onward = store.neighbours(rater, lent.item.id)
    html = item_page(store.tasks, lent, f"/r/{token}", back, onward, store.standing(rater), missing, given)
    return HTMLResponse(html, 422 if missing else 200)


def _sent(body: bytes) -> dict[str, str]:
    """The fields of a form."""
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise HTTPException(400) from None
    return dict(pairs)
