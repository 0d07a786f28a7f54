"""The parts of the page that are HTML: what was said, the line under the box, the candidates (page.css)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from plato2.talk.conversation import Conversation, Exchange
from plato2.talk.rank import Candidate

NOTHING = "(nothing)"
"""Shown for a reply without words."""

Held = Callable[[Candidate], bool]
"""Whether the safety filter holds a candidate back: `PlatoBot.holds_back`."""


def chat_messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """All turns for the chat window, which takes HTML; the person's is the first."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": escape(text if text.strip() else NOTHING)}
        for number, text in enumerate(turns)
    ]


def status_line(conversation: Conversation, waiting: bool = False) -> str:
    """How long the last reply took and how much of the conversation the model saw."""
    if waiting:
        return '<p class="busy">looking for a reply …</p>'
    if conversation.last is None:
        return "<p>&nbsp;</p>"
    reply, total = conversation.last.reply, 2 * len(conversation.exchanges) - 1
    seen = "the model saw 1 turn"
    if total > 1:
        seen = f"the model saw {'all' if reply.seen == total else f'the last {reply.seen} of'} {total} turns"
    parts = [
        f"{len(reply.candidates)} candidates in {reply.timing.decode_s:.2f} s",
        f"ranked in {reply.timing.rank_s:.2f} s",
        seen,
    ]
    return f"<p>{' · '.join(parts if reply.candidates else [seen])}</p>"


def candidate_panel(last: Exchange | None, held: Held, waiting: bool = False) -> str:
    """The candidates of the last reply as a table and a bar picture.

    Args:
        last: the last exchange.
        held: whether a candidate is held back.
        waiting: whether the next reply is being found, so that there is nothing to choose.
    """
    if last is None:
        return (
            '<div class="hint"><p>The candidates for the reply appear here, ranked. '
            "Click one to continue from it.</p></div>"
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
        notes.append("Grey: repeats words or has no end, so it ranks below the others.")
    note = f'<p class="note">{" ".join(dict.fromkeys(notes))}</p>' if notes else ""
    if candidates:
        note = _table(candidates, last.chosen, held) + note + _bars(candidates, last.chosen, held)
    return f'<div class="{"waiting" if waiting else "ready"}">{note}</div>'


def _table(candidates: Sequence[Candidate], chosen: int | None, held: Held) -> str:
    """A row for each candidate; without columns that nothing is in."""
    columns: dict[str, list[str]] = {"rank": [str(n) for n in range(1, len(candidates) + 1)]}
    if any(candidate.latent is not None for candidate in candidates):
        columns["z"] = [str(candidate.latent) for candidate in candidates]
    if any(candidate.coherence is not None for candidate in candidates):
        columns["coherence"] = [f"{candidate.coherence:.3f}" for candidate in candidates]
    columns["log p"] = [f"{candidate.log_prob:.2f}" for candidate in candidates]
    columns["reply"] = [_text(candidate, held) for candidate in candidates]
    rows = [
        f"<tr {_attributes(candidate, rank, chosen, held, 'row')}>"
        f"{''.join(f'<td>{column[rank - 1]}</td>' for column in columns.values())}</tr>"
        for rank, candidate in enumerate(candidates, start=1)
    ]
    head = "".join(f"<th>{name}</th>" for name in columns)
    return (
        f'<div class="scroll table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bars(candidates: Sequence[Candidate], chosen: int | None, held: Held) -> str:
    """A bar for each candidate: its coherence, or without an evaluation model its log-probability."""
    judged = all(candidate.coherence is not None for candidate in candidates)
    values = [c.coherence if c.coherence is not None else c.log_prob for c in candidates]
    low, high = (0.0, 1.0) if judged else (float(math.floor(min(values)) - 1), 0.0)
    rows = []
    for rank, (candidate, value) in enumerate(zip(candidates, values, strict=True), start=1):
        z = "" if candidate.latent is None else f"<b>z {candidate.latent}</b> "
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        rows.append(
            f"<div {_attributes(candidate, rank, chosen, held, 'bar')}>"
            f'<span class="label">{z}{_text(candidate, held)}</span>'
            f'<span class="track"><i style="width: {100 * share:.1f}%"></i></span>'
            f'<span class="value">{value:.{2 if judged else 1}f}</span></div>'
        )
    title = "Coherence, p(l=1|c,r)" if judged else "Log-probability per token"
    axis = f"<span>{low:g}</span><span>{(low + high) / 2:g}</span><span>{high:g}</span>"
    return (
        f'<figure><figcaption>{title}</figcaption><div class="scroll">{"".join(rows)}</div>'
        f'<div class="bar axis"><span></span><span class="ticks">{axis}</span><span></span></div></figure>'
    )


def _attributes(candidate: Candidate, rank: int, chosen: int | None, held: Held, kind: str) -> str:
    """Of a row or bar: what it looks like, and its rank where it can be chosen."""
    looks = {"chosen": rank == chosen, "late": candidate.penalty > 0, "flagged": candidate.flag is not None}
    names = " ".join([kind, *(name for name, applies in looks.items() if applies)])
    return f'class="{names}"' + ("" if held(candidate) else f' data-rank="{rank}" tabindex="0"')


def _text(candidate: Candidate, held: Held) -> str:
    """A candidate's text, with the rule of the safety filter that it breaks."""
    text = escape(candidate.text) if candidate.text.strip() else NOTHING
    if candidate.flag is None:
        return text
    flag = f'<em class="flag">⚑ {escape(candidate.flag)}</em>'
    return flag if held(candidate) else f"{text} {flag}"
