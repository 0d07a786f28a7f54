"""The web page of `plato2 serve --ui`: a conversation, and beside it the other candidates for the last reply.

    app = mount_page(FastAPI(), bot, batcher, "tiny")

Everything comes from this machine: fonts, scripts and pictures, and nothing is reported to anybody. What
people and models write is shown as text, never as HTML or Markdown. A conversation lives in the memory of its
browser session only; the page reads and writes no file.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from typing import Any, cast, get_args

from plato2.config import DecodeConfig, Strategy, UserError, explained, install
from plato2.serve.batching import Batcher, QueueFull, Stopped
from plato2.serve.page_html import candidate_panel, chat_messages, status_line
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.conversation import Conversation, now

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.routing import Mount, Route

    from plato2.serve.door import ROUTES, Door
except ModuleNotFoundError:
    raise UserError(f"the web page needs gradio: {install('ui')}") from None

Answer = Callable[[list[str], DecodeConfig], Reply]
"""The turns so far, oldest first, and the settings -> the reply; may be called from several threads."""

AT_ONCE = 32
"""Answers that the page waits for at the same time; each has a thread."""

MOST = {"beam_size": 20, "n_samples": 20, "n_candidates": 100}
"""What one visitor may ask of the machine at most, or the bot's own setting where that is more."""
OPTIONS = {option.name: option for option in fields(DecodeConfig)}
SETTINGS = {
    name: (name.replace("_", " "), explained(OPTIONS[name], MOST.get(name)))
    for name in (
        *("top_k", "top_p", "beam_size", "temperature", "min_tokens", "max_tokens", "no_repeat_ngram"),
        *("n_samples", "n_candidates", "seed"),
    )
}
"""Fields of `DecodeConfig` on the page, in the order of what `chat` takes: label and hint."""


# ---------------------------------------------------------------------------------------------- application


def mount_page(app: FastAPI, bot: PlatoBot, batcher: Batcher, name: str, timeout_s: float = 60.0) -> FastAPI:
    """The application with the page at /; routes that it has already stay.

    Args:
        app: where to.
        bot: whose settings are the page's defaults.
        batcher: answers, together with the requests of the application.
        name: the model's name, for the title.
        timeout_s: seconds that a message may wait for its reply.
    """

    def answer(turns: list[str], decode: DecodeConfig) -> Reply:
        try:
            job = batcher.submit(turns, decode)
        except QueueFull:
            raise UserError("too many messages are waiting; try again in a moment") from None
        except Stopped:
            raise UserError("the server is shutting down") from None
        try:
            return job.future.result(timeout_s)
        except TimeoutError:
            batcher.cancel(job)
            raise UserError(f"no reply within {timeout_s:g} seconds; try again later") from None
        except Stopped:
            raise UserError("the server stopped before there was a reply") from None

    gradio_app = add_page(app, build_page(bot, answer, name))
    lifespan = app.router.lifespan_context

    async def let_go() -> None:
        """Ends the connection that every open page keeps, as soon as there is nothing more to say."""
        while batcher.is_ready:
            await asyncio.sleep(0.5)
        gradio_app.stop_event.set()

    @asynccontextmanager
    async def lifespan_and_end(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            watch = asyncio.create_task(let_go())
            yield state
            watch.cancel()

    app.router.lifespan_context = lifespan_and_end  # a server that stops would wait for these connections
    return app


def add_page(app: FastAPI, page: gr.Blocks) -> gr.routes.App:
    """Gives an application the routes of a page.

    Returns:
        Gradio's own application, which is reached through these routes only.
    """
    # All of it is said here, since environment variables would change what is not.
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
        allowed_paths=[],
        theme=_theme(),
        css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
    )
    # At / it would take every address that the application does not know, and every other method.
    gradio_app = cast(Mount, app.router.routes.pop()).app
    door = Door(gradio_app)
    for path, methods in ROUTES.items():
        app.router.routes.append(Route(path, door, methods=methods))
    return cast(gr.routes.App, gradio_app)


# -------------------------------------------------------------------------------------------------- layout


def build_page(bot: PlatoBot, answer: Answer, name: str) -> gr.Blocks:
    """The page.

    Args:
        bot: whose settings are the defaults.
        answer: finds replies; a `UserError` of it is shown and the message kept.
        name: the model's name, for the title.
    """
    actions = Actions(bot, answer)
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as page:
        conversation = gr.State(Conversation())
        gr.HTML(f"<h1>{escape(name)}</h1>", elem_id="title", apply_default_css=False)
        with gr.Row(elem_id="page"):
            with gr.Column(scale=9, min_width=340):
                chatbot, box, send = _chat_window()
                with gr.Row(elem_id="actions"):
                    undo, reset, export = (
                        gr.Button(label, size="sm", min_width=60, interactive=False)
                        for label in ("Undo", "New conversation", "Export")
                    )
                line = gr.HTML(status_line(Conversation()), elem_id="line", apply_default_css=False)
            with gr.Column(scale=11, min_width=340):
                nothing = candidate_panel(None, bot.holds_back)
                panel = gr.HTML(nothing, elem_id="panel", apply_default_css=False, js_on_load=CLICKS)
                settings = _setting_fields(bot.decode_config, actions.samples)
        # What clients of the API choose by, who cannot click; and what a download is made of.
        rank = gr.Number(precision=0, visible=False)
        exported = gr.Textbox(visible=False)

        shown = [conversation, chatbot, box, panel, line, undo, reset, export]  # see Actions.show
        quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        gr.on(
            [send.click, box.submit],
            actions.chat,
            [box, conversation, *settings],
            shown,
            api_name="chat",
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
        )
        panel.select(actions.click, [conversation], shown, api_visibility="private", **quick)
        rank.submit(actions.choose, [rank, conversation], shown, api_name="choose", **quick)
        undo.click(actions.undo, [conversation], shown, api_name="undo", **quick)
        reset.click(actions.reset, None, shown, api_name="reset", **quick)
        export.click(actions.export, [conversation], exported, api_name="export", **quick).then(
            None, [exported], None, js=DOWNLOAD, api_visibility="private"
        )
    return page


def _chat_window() -> tuple[gr.Chatbot, gr.Textbox, gr.Button]:
    """The window with what was said, and below it the box for a message and its button."""
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height=None,
        placeholder="Say something.",
        buttons=[],
        feedback_options=None,
        render_markdown=False,  # but HTML is rendered: see chat_messages
        latex_delimiters=[],
        allow_file_downloads=False,
        group_consecutive_messages=False,
    )
    with gr.Row(elem_id="message"):
        box = gr.Textbox(
            placeholder="Type a message",
            show_label=False,
            container=False,
            max_lines=5,
            autofocus=True,
            scale=5,
            min_width=100,
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=70)
    return chatbot, box, send


def _setting_fields(defaults: DecodeConfig, samples: str) -> list[gr.components.Component]:
    """The settings, in the order of what `Actions.chat` takes; `samples` is the field of that name there."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        strategy = gr.Radio(get_args(Strategy), value=defaults.strategy, label="strategy")
        with gr.Row():
            numbers = [
                gr.Number(
                    getattr(defaults, field),
                    label=label,
                    info=hint,
                    precision=None if field in ("top_p", "temperature") else 0,
                    step=0.05 if field in ("top_p", "temperature") else 1,
                    min_width=150,
                )
                for field, (label, hint) in SETTINGS.items()
                if field not in {"n_samples", "n_candidates"} - {samples}
            ]
    return [strategy, *numbers]


# ------------------------------------------------------------------------------------------------- actions


class Actions:
    """What can be done on the page. Each gives new values for what is shown, in the order of `show`.

    Args:
        bot: whose settings are the defaults.
        answer: finds replies.
    """

    def __init__(self, bot: PlatoBot, answer: Answer) -> None:
        self.bot, self.answer = bot, answer
        self.samples = "n_candidates" if bot.generation.recognition is None else "n_samples"

    def show(self, conversation: Conversation, box: Any, waiting: str | None = None) -> tuple[Any, ...]:
        """All that changes: conversation, chat window, box, candidates, line, three buttons.

        Args:
            conversation: what was said.
            box: the text of the box.
            waiting: a message that is being answered.
        """
        is_waiting = waiting is not None
        turns = conversation.turns + ([] if waiting is None else [waiting])
        panel = candidate_panel(conversation.last, self.bot.holds_back, is_waiting)
        button = gr.update(interactive=conversation.last is not None and not is_waiting)
        line = status_line(conversation, is_waiting)
        return conversation, chat_messages(turns), box, panel, line, button, button, button

    def chat(
        self,
        message: str,
        conversation: Conversation,
        strategy: str,
        top_k: int | None,
        top_p: float | None,
        beam_size: int | None,
        temperature: float | None,
        min_tokens: int | None,
        max_tokens: int | None,
        no_repeat_ngram: int | None,
        samples: int | None,
        seed: int | None,
    ) -> Iterator[Any]:
        """Answers a message with these settings; clients of the API call them by these names."""
        values = {
            "top_k": top_k,
            "top_p": top_p,
            "beam_size": beam_size,
            "temperature": temperature,
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "no_repeat_ngram": no_repeat_ngram,
            self.samples: samples,
            "seed": seed,
        }
        asked_at = now()
        message = message.encode("utf-8", "ignore").decode()  # half a surrogate pair is no text
        try:
            if not message.strip():
                raise UserError("the message is empty: type something first")
            decode = _settings(self.bot.decode_config, strategy, values)
            yield self.show(conversation, "", message)
            reply = self.answer([*conversation.turns, message], decode)
        except UserError as error:
            gr.Warning(escape(str(error)))
            yield self.show(conversation, message)
        except Exception:  # whatever it was, the page goes on
            logging.getLogger(__name__).exception("the page's answer failed")
            gr.Warning("Something went wrong; the server's log says what.")
            yield self.show(conversation, message)
        else:
            decode = self.bot.fitting(decode)
            yield self.show(conversation.answered(message, reply, decode, asked_at), gr.skip())

    def choose(self, rank: float | None, conversation: Conversation) -> tuple[Any, ...]:
        """Goes on from the candidate of that rank, 1 = best, in place of what was said last."""
        candidates = conversation.last.reply.candidates if conversation.last else []
        if rank is None or not 1 <= rank <= len(candidates):
            gr.Warning("there is no such candidate")
        elif self.bot.holds_back(candidates[int(rank) - 1]):
            gr.Warning("the safety filter holds this candidate back")
        else:
            conversation = conversation.choose(int(rank))
        return self.show(conversation, gr.skip())

    def click(self, event: gr.EventData, conversation: Conversation) -> tuple[Any, ...]:
        """Goes on from the candidate that was clicked on."""
        return self.choose(event.rank, conversation)

    def undo(self, conversation: Conversation) -> tuple[Any, ...]:
        """Takes the last message and its reply back; the message is in the box again."""
        box = conversation.last.message if conversation.last else gr.skip()
        return self.show(conversation.undo(), box)

    def reset(self) -> tuple[Any, ...]:
        """Begins a new conversation."""
        return self.show(Conversation(), gr.skip())

    def export(self, conversation: Conversation) -> str:
        """The conversation as JSON Lines."""
        return conversation.export(self.bot.holds_back)


def _settings(defaults: DecodeConfig, strategy: str, values: dict[str, float | None]) -> DecodeConfig:
    """The settings of the page, which check themselves.

    Raises:
        UserError: a field is empty, or a value that decoding cannot use.
    """
    for field, value in values.items():
        if value is None:
            raise UserError(f"{field}: give a number")
        most = max(MOST.get(field, math.inf), getattr(defaults, field))
        if value > most:
            raise UserError(f"{field}={value}: at most {most} here")
    if strategy == "beam" and "n_samples" in values:
        values = values | {"n_samples": 1}  # a beam search always finds the same
    return replace(defaults, strategy=strategy, **values)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- looks


def _theme() -> gr.themes.Base:
    """Colours and shapes; the fonts are the visitor's own."""
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="*neutral_50",
        block_background_fill="white",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


CLICKS = """
const choose = (event) => {
    const row = event.target.closest("[data-rank]");
    if (row && !row.closest(".waiting")) trigger("select", {rank: Number(row.dataset.rank)});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); }
});
"""
"""A click on a row or bar, or Enter on it, chooses that candidate."""

DOWNLOAD = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
    link.download = "conversation.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
}"""
"""The browser makes the file, so there is none on the server."""
