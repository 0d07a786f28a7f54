"""The web page of `plato2 serve --ui`: a conversation, and beside it what else could have been said last.

    app = mount_page(FastAPI(), bot, batcher, "tiny")

Everything comes from this machine: fonts, scripts and pictures, and nothing is reported to anybody. What
people and models write is shown as text, never as HTML or Markdown. A conversation lives in the memory of its
browser session only; the page reads and writes no file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any, cast, get_args

from plato2.config import DecodeConfig, Strategy, UserError, explained, install
from plato2.data.tokenizer import EOS_ID
from plato2.serve.batching import Batcher, QueueFull, Stopped
from plato2.talk.bot import PlatoBot, Reply, as_dict
from plato2.talk.rank import Candidate

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
NOTHING = "(nothing)"
"""Shown for a reply without words."""

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


@dataclass(frozen=True)
class Exchange:
    """A message and what was said to it."""

    message: str
    reply: Reply
    settings: DecodeConfig
    seen: int
    """Turns the model saw of those so far, the message included."""
    chosen: int | None
    """Which candidate the conversation goes on from; None where the safety filter refused."""

    @property
    def text(self) -> str:
        """What the bot said."""
        return self.reply.text if self.chosen is None else self.reply.candidates[self.chosen].text


Conversation = list[Exchange]


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


def build_page(bot: PlatoBot, answer: Answer, name: str) -> gr.Blocks:
    """The page.

    Args:
        bot: whose settings are the defaults.
        answer: finds replies; a `UserError` of it is shown and the message kept.
        name: the model's name, for the title.
    """
    defaults = bot.decode_config
    samples_field = "n_candidates" if bot.generation.recognition is None else "n_samples"
    blocked = bot.safety is not None and bot.safety.output == "block"

    def show(turns: Conversation, box: Any, waiting: str | None = None) -> tuple[Any, ...]:
        """Values of everything that changes; `waiting` is a message that is being answered."""
        ready = bool(turns) and waiting is None
        button = gr.update(interactive=ready)
        last = turns[-1] if turns else None
        panel = _panel(last, blocked, waiting is not None)
        line = _line(turns, waiting is not None)
        return turns, _messages(turns, waiting), box, panel, line, button, button, button

    def chat(
        message: str,
        turns: Conversation,
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
        """Answers a message with these settings."""
        values = {
            "top_k": top_k,
            "top_p": top_p,
            "beam_size": beam_size,
            "temperature": temperature,
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "no_repeat_ngram": no_repeat_ngram,
            samples_field: samples,
            "seed": seed,
        }
        message = message.encode("utf-8", "ignore").decode()  # half a surrogate pair is no text
        try:
            if not message.strip():
                raise UserError("the message is empty: type something first")
            decode = _settings(defaults, strategy, values)
            yield show(turns, "", message)
            context = [*_said(turns), message]
            reply = answer(context, decode)
        except UserError as error:
            gr.Warning(escape(str(error)))
            yield show(turns, message)
        except Exception:  # whatever it was, the page goes on
            logging.getLogger(__name__).exception("the page's answer failed")
            gr.Warning("Something went wrong; the server's log says what.")
            yield show(turns, message)
        else:
            seen = bot.encode(context).count(EOS_ID)
            chosen = None if reply.is_refusal else 0
            exchange = Exchange(message, reply, bot.fitting(decode), seen, chosen)
            yield show([*turns, exchange], gr.skip())

    def choose(rank: float | None, turns: Conversation) -> tuple[Any, ...]:
        """Goes on from the candidate of that rank, 1 = best, in place of what was said last."""
        candidates = turns[-1].reply.candidates if turns else []
        if rank is None or not 1 <= rank <= len(candidates):
            gr.Warning("there is no such candidate")
        elif blocked and candidates[int(rank) - 1].flag:
            gr.Warning("the safety filter holds this candidate back")
        else:
            turns = [*turns[:-1], replace(turns[-1], chosen=int(rank) - 1)]
        return show(turns, gr.skip())

    def click(event: gr.EventData, turns: Conversation) -> tuple[Any, ...]:
        """Goes on from the candidate that was clicked on."""
        return choose(event.rank, turns)

    def undo(turns: Conversation) -> tuple[Any, ...]:
        """Takes the last message and its reply back; the message is in the box again."""
        return show(turns[:-1], turns[-1].message if turns else gr.skip())

    def reset() -> tuple[Any, ...]:
        """Begins a new conversation."""
        return show([], gr.skip())

    def export(turns: Conversation) -> str:
        """The conversation as JSON Lines."""
        return _export(turns, blocked)

    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as page:
        turns = gr.State([])
        gr.HTML(f"<h1>{escape(name)}</h1>", elem_id="title", apply_default_css=False)
        with gr.Row(elem_id="page"):
            with gr.Column(scale=9, min_width=340):
                chatbot = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height=None,
                    placeholder="Say something.",
                    buttons=[],
                    feedback_options=None,
                    render_markdown=False,  # but HTML is rendered: see _messages
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
                with gr.Row(elem_id="actions"):
                    undo_button = gr.Button("Undo", size="sm", min_width=60, interactive=False)
                    reset_button = gr.Button("New conversation", size="sm", min_width=60, interactive=False)
                    export_button = gr.Button("Export", size="sm", min_width=60, interactive=False)
                line = gr.HTML(_line([]), elem_id="line", apply_default_css=False)
            with gr.Column(scale=11, min_width=340):
                panel = gr.HTML(
                    _panel(None, blocked), elem_id="panel", apply_default_css=False, js_on_load=CLICKS
                )
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    strategy = gr.Radio(get_args(Strategy), value=defaults.strategy, label="strategy")
                    with gr.Row():
                        numbers = [
                            gr.Number(
                                getattr(defaults, field),
                                label=SETTINGS[field][0],
                                info=SETTINGS[field][1],
                                precision=None if field in ("top_p", "temperature") else 0,
                                step=0.05 if field in ("top_p", "temperature") else 1,
                                min_width=150,
                            )
                            for field in SETTINGS
                            if field not in {"n_samples", "n_candidates"} - {samples_field}
                        ]
        # What clients of the API choose by, who cannot click; and what a download is made of.
        rank = gr.Number(precision=0, visible=False)
        exported = gr.Textbox(visible=False)

        shown = [turns, chatbot, box, panel, line, undo_button, reset_button, export_button]
        quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        gr.on(
            [send.click, box.submit],
            chat,
            [box, turns, strategy, *numbers],
            shown,
            api_name="chat",
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
        )
        panel.select(click, [turns], shown, api_visibility="private", **quick)
        rank.submit(choose, [rank, turns], shown, api_name="choose", **quick)
        undo_button.click(undo, [turns], shown, api_name="undo", **quick)
        reset_button.click(reset, None, shown, api_name="reset", **quick)
        export_button.click(export, [turns], exported, api_name="export", **quick).then(
            None, [exported], None, js=DOWNLOAD, api_visibility="private"
        )
    return page


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


def _said(turns: Conversation) -> list[str]:
    """All turns, oldest first."""
    return [text for exchange in turns for text in (exchange.message, exchange.text)]


def _messages(turns: Conversation, waiting: str | None = None) -> list[dict[str, str]]:
    """The conversation for the chat window, which takes HTML."""
    texts = _said(turns) + ([] if waiting is None else [waiting])
    return [
        {"role": "assistant" if number % 2 else "user", "content": escape(text if text.strip() else NOTHING)}
        for number, text in enumerate(texts)
    ]


def _line(turns: Conversation, waiting: bool = False) -> str:
    """How long the last reply took and how much of the conversation the model saw, as HTML."""
    if waiting:
        return '<p class="busy">looking for a reply …</p>'
    if not turns:
        return "<p>&nbsp;</p>"
    last, timing, total = turns[-1], turns[-1].reply.timing, 2 * len(turns) - 1
    seen = "the model saw 1 turn"
    if total > 1:
        seen = f"the model saw {'all' if last.seen == total else f'the last {last.seen} of'} {total} turns"
    parts = [
        f"{len(last.reply.candidates)} candidates in {timing.decode_s:.2f} s",
        f"ranked in {timing.rank_s:.2f} s",
        seen,
    ]
    return f"<p>{' · '.join(parts if last.reply.candidates else [seen])}</p>"


def _panel(last: Exchange | None, blocked: bool, waiting: bool = False) -> str:
    """The candidates of the last reply as a table and a bar picture, as HTML.

    Args:
        last: the last exchange.
        blocked: whether candidates with a flag are held back.
        waiting: whether the next reply is being found, so that there is nothing to choose.
    """
    if last is None:
        return (
            '<div class="hint"><p>The candidates for the reply appear here, ranked. '
            "Click on one to go on from it.</p></div>"
        )
    notes = [
        f"The safety filter {'stopped' if flag.action == 'block' else 'warns of'} "
        f"{'the message' if flag.side == 'input' else 'a candidate'}: {escape(flag.rule)}."
        for flag in last.reply.flags
    ]
    if last.reply.warning:
        notes.insert(0, escape(f"{last.reply.warning[0].upper()}{last.reply.warning[1:]}."))
    candidates = last.reply.candidates
    if any(candidate.penalty for candidate in candidates):
        notes.append("Grey: repeats words or has no end, so it ranks behind the others.")
    note = f'<p class="note">{" ".join(dict.fromkeys(notes))}</p>' if notes else ""
    if candidates:
        note = _table(candidates, last.chosen, blocked) + note + _bars(candidates, last.chosen, blocked)
    return f'<div class="{"waiting" if waiting else "ready"}">{note}</div>'


def _table(candidates: Sequence[Candidate], chosen: int | None, blocked: bool) -> str:
    """A row for each candidate; without columns that nothing is in."""
    columns: dict[str, list[str]] = {"rank": [str(number + 1) for number in range(len(candidates))]}
    if any(candidate.latent is not None for candidate in candidates):
        columns["z"] = [str(candidate.latent) for candidate in candidates]
    if any(candidate.coherence is not None for candidate in candidates):
        columns["coherence"] = [f"{candidate.coherence:.3f}" for candidate in candidates]
    columns["log p"] = [f"{candidate.log_prob:.2f}" for candidate in candidates]
    columns["reply"] = [_text(candidate, blocked) for candidate in candidates]
    rows = [
        f"<tr {_attributes(candidate, number, chosen, blocked, 'row')}>"
        f"{''.join(f'<td>{column[number]}</td>' for column in columns.values())}</tr>"
        for number, candidate in enumerate(candidates)
    ]
    head = "".join(f"<th>{name}</th>" for name in columns)
    return (
        f'<div class="scroll table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bars(candidates: Sequence[Candidate], chosen: int | None, blocked: bool) -> str:
    """A bar for each candidate: its coherence, or without an evaluation model its log-probability."""
    judged = all(candidate.coherence is not None for candidate in candidates)
    values = [c.coherence if c.coherence is not None else c.log_prob for c in candidates]
    low, high = (0.0, 1.0) if judged else (float(math.floor(min(values)) - 1), 0.0)
    rows = []
    for number, (candidate, value) in enumerate(zip(candidates, values, strict=True)):
        z = "" if candidate.latent is None else f"<b>z {candidate.latent}</b> "
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        rows.append(
            f"<div {_attributes(candidate, number, chosen, blocked, 'bar')}>"
            f'<span class="label">{z}{_text(candidate, blocked)}</span>'
            f'<span class="track"><i style="width: {100 * share:.1f}%"></i></span>'
            f'<span class="value">{value:.{2 if judged else 1}f}</span></div>'
        )
    title = "Coherence, p(l=1|c,r)" if judged else "Log-probability of a token"
    axis = f"<span>{low:g}</span><span>{(low + high) / 2:g}</span><span>{high:g}</span>"
    return (
        f'<figure><figcaption>{title}</figcaption><div class="scroll">{"".join(rows)}</div>'
        f'<div class="bar axis"><span></span><span class="ticks">{axis}</span><span></span></div></figure>'
    )


def _attributes(candidate: Candidate, number: int, chosen: int | None, blocked: bool, kind: str) -> str:
    """Of a row or bar: what it looks like, and its rank where it can be chosen."""
    held = blocked and candidate.flag is not None
    looks = {"chosen": number == chosen, "late": candidate.penalty > 0, "flagged": candidate.flag is not None}
    names = " ".join([kind, *(name for name, applies in looks.items() if applies)])
    return f'class="{names}"' + ("" if held else f' data-rank="{number + 1}" tabindex="0"')


def _text(candidate: Candidate, blocked: bool) -> str:
    """A candidate's text as HTML, with the rule of the safety filter that it breaks."""
    text = escape(candidate.text) if candidate.text.strip() else NOTHING
    if candidate.flag is None:
        return text
    flag = f'<em class="flag">⚑ {escape(candidate.flag)}</em>'
    return flag if blocked else f"{text} {flag}"


def _export(turns: Conversation, blocked: bool) -> str:
    """A line of JSON a turn; see docs/page.md."""
    lines: list[dict[str, Any]] = []
    for exchange in turns:
        candidates = [
            as_dict(candidate)
            | {"score": candidate.score, "has_end": candidate.has_end}
            | ({"text": None} if blocked and candidate.flag else {})
            for candidate in exchange.reply.candidates
        ]
        lines.append({"role": "user", "text": exchange.message})
        lines.append(
            {
                "role": "bot",
                "text": exchange.text,
                "chosen": None if exchange.chosen is None else exchange.chosen + 1,
                "candidates": candidates,
                "flags": [asdict(flag) for flag in exchange.reply.flags],
                "settings": asdict(exchange.settings),
                "seen": exchange.seen,
                "timing": asdict(exchange.reply.timing),
            }
        )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
