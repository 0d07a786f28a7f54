"""The HTML of the rating page: texts are escaped, nothing comes from elsewhere, nothing names a system."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from plato2.evaluate.human.formats import Chat, Item, Question, Said, Shown, Tasks, places
from plato2.evaluate.human.store import Lent, Place, Progress, RaterProgress

INSTRUCTIONS = {
    "utterance": "Read the dialogue. Rate each marked reply by what was said before it, then answer what is "
    "asked at the end.",
    "dialogue": "Read the dialogue, then answer what is asked about the marked speaker.",
    "pair": "Read both dialogues. Compare the marked speakers only, not those they talk with.",
    "chat": "Talk with a speaker whom you do not know; you begin. Write nothing private: all is kept.",
    "candidate": "Read the dialogue. Which of the replies below could come next? Several may, or none.",
}
KEYS = "\N{LEFTWARDS ARROW} \N{RIGHTWARDS ARROW}: answer \N{MIDDLE DOT} \N{UPWARDS ARROW} "
KEYS += "\N{DOWNWARDS ARROW}: question \N{MIDDLE DOT} Enter: submit \N{MIDDLE DOT} b: back"
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
{refresh}<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/rate.css">
</head>
<body>
"""
SAID = {
    "yours": "",
    "writing": "The other speaker is writing\N{HORIZONTAL ELLIPSIS}",
    "slow": "The reply takes long. It is still being sought, and shown here when it is there. You may also "
    "close this page and open your link later.",
    "failed": "No reply came. What you said is kept. Try again, or leave this chat and go on with another.",
}
"""What a rater reads of the standing of a chat."""
RATER = ("rater", "rated", "in hand", "checks passed", "median seconds", "last submit (UTC)")
AGREEMENT = (
    "question",
    "n",
    "items",
    "plain",
    "Fleiss\N{RIGHT SINGLE QUOTATION MARK} kappa",
    "Krippendorff\N{RIGHT SINGLE QUOTATION MARK}s alpha",
)
"""Columns of the admin's tables."""
TOO_FEW = "no two raters yet"
NO_AGREEMENT = "Nothing has been rated yet."
AGREES = (
    "n: what two or more raters have rated, of those who passed all attention checks, and in how many items. "
    "Kappa needs equally many raters, so it may rest on fewer."
)
LOOK_S = 3
"""Seconds after which a page without scripts looks for a reply."""
MOST_CHARACTERS = 2000
"""Of what a rater says in one turn."""
FOOT = "</body>\n</html>\n"


def document(title: str, body: str, refresh_s: int | None = None, has_script: bool = False) -> str:
    """A page; with `refresh_s` it is loaded again after so many seconds, unless a script does so."""
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n'
    if refresh and has_script:
        refresh = f"<noscript>{refresh}</noscript>"
    return HEAD.format(title=escape(title), refresh=refresh) + body + FOOT


def message_page(
    title: str, text: str, link: tuple[str, str] | None = None, refresh_s: int | None = None
) -> str:
    """A page that says one thing; `link` is an address and what stands on it."""
    button = f'<p><a class="button" href="{escape(link[0])}">{escape(link[1])}</a></p>' if link else ""
    body = f'<main class="message"><h1>{escape(title)}</h1><p>{escape(text)}</p>{button}</main>\n'
    return document(title, body, refresh_s)


def field(number: int, place: Place) -> str:
    """The name of an answer in the form: of the question with that number, at a place."""
    return f"q{number}" if place is None else f"q{number}.{place}"


# ------------------------------------------------------------------------------------------------- an item


def item_page(
    tasks: Tasks,
    lent: Lent,
    base: str,
    back: str | None,
    onward: str | None,
    progress: tuple[int, float],
    missing: Collection[str] = (),
    given: dict[str, int] | None = None,
) -> str:
    """The page on which an item is rated or corrected.

    Args:
        tasks: the study's.
        lent: the item, and what was answered.
        base: address of the rater's link, without a slash at its end.
        back: id of the item before, where there is one.
        onward: of the one after.
        progress: items that the rater has rated, and the share of the study that is done.
        missing: fields that were sent without an answer.
        given: field -> number of the level, of what was sent; None takes `lent.answers`.
    """
    item, questions = lent.item, tasks.questions
    ticked = _ticked(questions, lent) if given is None else given
    form = _Form(questions, item, ticked, missing)
    notes = ""
    if missing:
        notes += f'<p class="note error" role="alert">{len(missing)} not answered yet: see below.</p>'
    elif lent.revision:
        notes += '<p class="note">You have answered this. What you change here is saved as a correction.</p>'
    digits = "" if questions[0].per == "pair" else f"{_digits(questions)}: answer \N{MIDDLE DOT} "
    target = (f"{base}/{onward}" if onward else base) if lent.revision else None
    body = f"""{_header(base, back, target, progress)}
<main>{notes}
{criteria(questions)}
<form id="rate" method="post" action="{escape(f"{base}/{item.id}")}" autocomplete="off">
<input type="hidden" name="revision" value="{lent.revision}">
<p class="how">{escape(INSTRUCTIONS[questions[0].per])}</p>
{form.html()}
<p class="keys">{digits}{KEYS}</p>
<p id="trouble" class="note error" role="alert" hidden></p>
<p class="send"><button type="submit">{"Save the correction" if lent.revision else "Submit"}</button></p>
</form></main>
<script src="/rate.js"></script>
"""
    return document(f"Item {item.id}", body)


def _header(base: str, back: str | None, onward: str | None, progress: tuple[int, float]) -> str:
    """Ways to the items before and after, and how far the rater and the study are."""
    address = escape(f"{base}/{back}")
    links = f'<a id="back" href="{address}">\N{LEFTWARDS ARROW} back</a>' if back else "<span></span>"
    if onward:
        links += f'<a id="onward" href="{escape(onward)}">go on \N{RIGHTWARDS ARROW}</a>'
    return f"""<header><nav>{links}</nav>
<div><progress max="1" value="{progress[1]:.3f}"></progress>
<span>{progress[0]} rated by you \N{MIDDLE DOT} study {progress[1]:.0%} done</span></div></header>"""


def _digits(questions: Sequence[Question]) -> str:
    return " ".join(map(str, range(max(len(question.levels) for question in questions))))


def _ticked(questions: Sequence[Question], lent: Lent) -> dict[str, int]:
    """Field -> number of the level that was answered."""
    found = {}
    for number, question in enumerate(questions):
        values = [level.value for level in question.levels]
        for place in places(question, lent.item):
            if (question.name, place) in lent.answers:
                found[field(number, place)] = values.index(lent.answers[question.name, place])
    return found


def criteria(questions: Sequence[Question]) -> str:
    """When to give which answer."""
    rows = "".join(
        f"<dt>{escape(question.name)}</dt><dd>{escape(question.text)}<ul>"
        + "".join(
            f"<li><b>{escape(level.label)}</b> {escape(level.criterion)}</li>"
            for level in question.levels
            if level.criterion
        )
        + "</ul></dd>"
        for question in questions
    )
    return f'<details id="criteria" open><summary>What the answers mean</summary><dl>{rows}</dl></details>'


class _Form:
    """The texts of an item and the questions at their places."""

    def __init__(
        self,
        questions: Sequence[Question],
        item: Item,
        ticked: dict[str, int],
        missing: Collection[str],
    ) -> None:
        self.questions, self.item, self.ticked, self.missing = questions, item, ticked, missing

    def html(self) -> str:
        """All of it."""
        if len(self.item.shown) == 2:
            columns = "".join(
                f'<section class="dialogue"><h2>{name}</h2>{self.turns(shown)}</section>'
                for name, shown in zip(("Left", "Right"), self.item.shown, strict=True)
            )
            texts = f'<div class="pair">{columns}</div>'
        else:
            texts = f'<section class="dialogue">{self.turns(self.item.shown[0])}</section>'
        candidates = "".join(
            f'<li><p class="text">{text_html(text)}</p>{self.asked("candidate", place)}</li>'
            for place, text in enumerate(self.item.shown[0].candidates)
        )
        texts += f'<ol class="candidates">{candidates}</ol>' if candidates else ""
        return f'{texts}<section class="whole">{self.asked("dialogue")}{self.asked("pair")}</section>'

    def turns(self, shown: Shown) -> str:
        """A dialogue."""
        return "".join(self.turn(place, said) for place, said in enumerate(shown.turns))

    def turn(self, place: int, said: Said) -> str:
        """A turn, and what is asked of it."""
        side = said.side if said.side is not None else int(not said.by_system)
        kind = f"turn side{min(side, 3)}" + (" rated" if said.by_system else "")
        asked = self.asked("utterance", place) if said.by_system and len(self.item.shown) == 1 else ""
        return f'<div class="{kind}"><p class="text">{text_html(said.text)}</p>{asked}</div>'

    def asked(self, per: str, place: Place = None) -> str:
        """The questions of one kind at one place."""
        return "".join(
            self.question(number, question, place)
            for number, question in enumerate(self.questions)
            if question.per == per
        )

    def question(self, number: int, question: Question, place: Place) -> str:
        """A question with its answers."""
        name = field(number, place)
        kind = "question missing" if name in self.missing else "question"
        whole = question.per in ("dialogue", "pair")
        said = f'<span class="ask">{escape(question.text)}</span>' if whole else ""
        answers = "".join(
            f'<label title="{escape(level.criterion)}"><input type="radio" name="{name}" value="{value}"'
            f"{' checked' if self.ticked.get(name) == value else ''} required><span>{escape(level.label)}"
            "</span></label>"
            for value, level in enumerate(question.levels)
        )
        return (
            f'<fieldset class="{kind}"><legend>{escape(question.name)}</legend>{said}'
            f'<div class="answers">{answers}</div></fieldset>'
        )


def text_html(text: str) -> str:
    """What was said, as text."""
    return escape(text) if text.strip() else '<i class="nothing">(says nothing)</i>'


# -------------------------------------------------------------------------------------------------- a chat


def chat_page(
    chat: Chat,
    item: Item,
    base: str,
    back: str | None,
    progress: tuple[int, float],
    standing: str,
    note: str = "",
    text: str = "",
) -> str:
    """The page on which a rater talks.

    Args:
        chat: how long.
        item: with what was said until now.
        base: address of the rater's link, without a slash at its end.
        back: id of the item before, where there is one.
        progress: as for `item_page`.
        standing: a key of `SAID`.
        note: what was wrong with what was sent.
        text: what was sent.
    """
    address, turns = escape(f"{base}/{item.id}"), item.shown[0].turns
    rounds = len(turns) // 2
    notes = f'<p class="note error" role="alert">{escape(note)}</p>' if note else ""
    said = f'<p class="{"error " * (standing == "failed")}standing" role="status">{SAID[standing]}</p>'
    ways = ""
    if standing == "yours":
        said = f"""<form id="say" class="say" method="post" action="{address}/say" autocomplete="off">
<input type="hidden" name="place" value="{len(turns)}">
<textarea name="text" rows="2" maxlength="{MOST_CHARACTERS}" aria-label="What you say" required
autofocus>{escape(text)}</textarea><button type="submit">Send</button></form>"""
    elif standing != "writing":
        ways = _way(address, "retry", "Try again") + _way(address, "leave", "Leave this chat")
    if standing != "writing" and rounds >= chat.least:
        ways += _way(address, "end", "End the chat and rate it")
    when = f"rating opens after {chat.least}" if rounds < chat.least else "you may end it and rate"
    body = f"""{_header(base, back, None, progress)}
<main class="chat">{notes}
<p class="how">{escape(INSTRUCTIONS["chat"])}</p>
<p class="topic">Talk about: <b>{text_html(item.start)}</b></p>
<section class="dialogue">{_Form((), item, {}, ()).turns(item.shown[0])}</section>
{said}
<p id="trouble" class="note error" role="alert" hidden></p>
<p class="how rounds">{rounds} of {chat.least} to {chat.most} rounds \N{MIDDLE DOT} {when}</p>
<div class="ways">{ways}</div>
<span id="standing" data-url="{address}/standing" data-standing="{len(turns)} {standing}"></span>
</main>
<script src="/chat.js"></script>
"""
    waits = standing in ("writing", "slow")
    return document(f"Chat {item.id}", body, LOOK_S if waits else None, has_script=True)


def _way(address: str, deed: str, label: str) -> str:
    return f'<form method="post" action="{address}/{deed}"><button class="quiet">{label}</button></form>'


# ------------------------------------------------------------------------------------------------- the admin


def admin_page(
    tasks: Tasks,
    progress: Progress,
    base: str,
    agreement: dict[str, dict[str, Any]],
    trouble: dict[str, str],
) -> str:
    """How far the study is and what each rater did; it loads itself again every half minute.

    Args:
        tasks: the study's.
        progress: how far it is.
        base: address of the admin's link.
        agreement: of `agreement_by_question`.
        trouble: system -> what went wrong with it last, of the preset `chat`.
    """
    n, per_item = progress.n_items, progress.raters_per_item
    done = sum(items for count, items in progress.by_count.items() if count >= per_item)
    counts = "".join(
        f"<tr><td>{count}</td><td>{items}</td><td>{items / n:.0%}</td></tr>"
        for count, items in progress.by_count.items()
    )
    raters = "".join(map(_rater_row, progress.raters))
    met = "".join(
        f"<tr><td>{escape(name)}</td><td>{begun}</td><td>{rated}</td>"
        f"<td>{escape(trouble.get(name, ''))}</td></tr>"
        for name, (begun, rated) in progress.met.items()
    )
    systems = _table("Systems", ("system", "chats", "rated", "last trouble"), met) if met else ""
    n_checks = sum(item.expected is not None for item in tasks.items)
    body = f"""<main class="admin"><h1>Progress</h1>
<p><progress max="1" value="{progress.share:.3f}"></progress> {progress.n_ratings} of
{n * per_item} ratings \N{MIDDLE DOT} {done} of {n} items have {per_item} raters \N{MIDDLE DOT}
preset {escape(tasks.preset)} \N{MIDDLE DOT} {n_checks} attention checks</p>
{_table("Items", ("ratings", "items", "share"), counts)}
{_table("Agreement", AGREEMENT, "".join(_agreement_row(*one) for one in agreement.items()))}
<p class="how">{escape(NO_AGREEMENT if not agreement else AGREES)}</p>
{_table("Raters", RATER, raters)}
{systems}
<p><a class="button" href="{escape(base)}/ratings.jsonl">ratings.jsonl</a></p></main>
"""
    return document("Progress", body, refresh_s=30)


def _table(title: str, columns: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    return (
        f'<h2>{title}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _agreement_row(name: str, found: dict[str, Any]) -> str:
    """A question; where too few have been rated by two, that is said."""
    n, of = found["units_of_several"], found["items_of_several"]
    if n == 0:
        return f'<tr><td>{escape(name)}</td><td>0</td><td>0</td><td colspan="3">{TOO_FEW}</td></tr>'
    plain, kappa, alpha = (f"{found[key]:.3f}" for key in ("plain", "fleiss_kappa", "krippendorff_alpha"))
    if found["all_equal"]:
        kappa += ", all are equal"
    elif found["fleiss_kappa_units"] < n:
        kappa += f", of {found['fleiss_kappa_units']}"
    cells = "".join(f"<td>{text}</td>" for text in (n, of, plain, kappa, alpha))
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _rater_row(one: RaterProgress) -> str:
    passed, answered = one.checks
    checks = f"{passed} of {answered}" if answered else ""
    median = "" if one.median_s is None else f"{one.median_s:.0f}"
    last = "" if one.last_at is None else f"{datetime.fromtimestamp(one.last_at, UTC):%Y-%m-%d %H:%M}"
    return (
        f"<tr><td>{escape(one.name)}</td><td>{one.n_rated}</td><td>{one.n_open}</td><td>{checks}</td>"
        f"<td>{median}</td><td>{last}</td></tr>"
    )
