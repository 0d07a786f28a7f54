"""`plato2 evaluate human`: tasks for raters, the page on which they rate, and what their ratings say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plato2.commands import evaluate_human_ratings as of_ratings
from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.results import check_outputs
from plato2.commands.serve import ListenOptions
from plato2.config import UserError

if TYPE_CHECKING:
    from plato2.evaluate.human.chat import Partners
    from plato2.evaluate.human.formats import Tasks
    from plato2.evaluate.human.store import Rater, Store
    from plato2.evaluate.human.tasks import Selection

app = typer.Typer(
    help="""Let people rate (section 3.3.2): make tasks, serve the page, see what the ratings say.

[bold]Examples[/]

plato2 evaluate human make chats.jsonl --preset plato --out tasks.json

plato2 evaluate human serve tasks.json --raters 6

plato2 evaluate human export tasks.sqlite --out ratings.jsonl

plato2 evaluate human report tasks.json ratings.jsonl --out human.json
""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
MOST_RATERS = 10_000
EXTRAS = {"fastapi", "uvicorn", "starlette", "sqlalchemy"}
"""Modules that the extra `eval` brings for the page."""
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn: items, sides, checks, order.")]

MAKE = """Make tasks for raters of dialogues, static replies or candidates.

FILES hold dialogues as plato2 self-chat and plato2 reply --contexts write them, ParlAI's logs, or
transcripts (docs/human.md). Presets: plato (coherence and informativeness of each reply, engagingness and
humanness of the dialogue, 0 to 2), topic (which of two dialogues goes deeper), ssa (sensible, specific),
acute (two dialogues side by side), candidates (which replies fit). Raters never see which system they rate.
chat takes no FILES: raters talk with the systems of --meet themselves, then rate as in plato.

[bold]Examples[/]

plato2 evaluate human make chats.jsonl --preset plato --limit 50 --out tasks.json

plato2 evaluate human make ours.jsonl theirs.jsonl --preset acute --out pairs.json

plato2 evaluate human make --preset chat --meet ours=plato2:RUN --meet blender:FOLDER --limit 50 --raters 1
--out chat.json
"""
SERVE = """Serve the page on which raters rate, each by a secret link.

All of a study is in one SQLite file, --db: its tasks, links and answers. The same command goes on after it
was stopped or killed, with the same links; more --raters adds links. Ctrl-C stops.

[bold]Examples[/]

plato2 evaluate human serve tasks.json --raters 6 --links links.txt

plato2 evaluate human serve tasks.json --raters 6 --host 0.0.0.0 --allow-host rate.example.org
--address https://rate.example.org
"""
EXPORT = """Write the ratings of a study, one per line, while it goes on or afterwards.

[bold]Examples[/]

plato2 evaluate human export tasks.sqlite --out ratings.jsonl

plato2 evaluate human export candidates.sqlite --out ratings.jsonl --selection selection.jsonl

plato2 evaluate human export chat.sqlite --out ratings.jsonl --chats chats.jsonl --tasks rated.json
"""


CHAT = "Preset chat"


@dataclass(frozen=True)
class ChatOptions:
    """Whom raters talk with, about what and for how long; checks itself."""

    meet: Annotated[
        list[str] | None,
        typer.Option(
            help="A system that raters talk with: KIND:WHERE or NAME=KIND:WHERE (docs/speakers.md). May be "
            "repeated.",
            rich_help_panel=CHAT,
        ),
    ] = None
    topics: Annotated[
        Path | None,
        typer.Option(
            help="What to talk about, one topic per line.",
            show_default="200 that ship with plato2",
            rich_help_panel=CHAT,
        ),
    ] = None
    rounds: Annotated[
        tuple[int, int],
        typer.Option(help="After how many rounds a chat may be rated, and has to be.", rich_help_panel=CHAT),
    ] = (7, 14)

    def __post_init__(self) -> None:
        """Checks values.

        Raises:
            UserError: an impossible one.
        """
        least, most = self.rounds
        if not 1 <= least <= most:
            raise UserError(f"--rounds {least} {most}: must be 1 or more, the smaller number first")

    def tasks(self, selection: Selection) -> Tasks:
        """Each system on each topic.

        Raises:
            UserError: no system, one that is none or has been named before, or a file that cannot be read.
        """
        from plato2.evaluate.human.formats import Chat
        from plato2.evaluate.human.tasks import chat_tasks
        from plato2.evaluate.speakers import split_speaker
        from plato2.talk.self_chat import read_starts

        speakers: dict[str, str] = {}
        for given in self.meet or []:
            *_, name = split_speaker(given, "--meet")
            text = given.removeprefix(f"{name}=")
            if name in speakers or text in speakers.values():
                raise UserError(f"--meet {given}: named before; raters meet each system under one name")
            speakers[name] = text
        if not speakers:
            raise UserError("--preset chat: give --meet, a system that raters talk with, such as plato2:RUN")
        about = [" ".join(start.turns) for start in read_starts(self.topics, "--topics")]
        return chat_tasks(
            about, Chat(speakers=speakers, least=self.rounds[0], most=self.rounds[1]), selection
        )


@app.command(help=MAKE)
@takes(ChatOptions)
def make(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILES...", help="What is rated; of chat none.")
    ] = None,
    *,
    preset: Annotated[str, typer.Option(help="plato, topic, ssa, acute, candidates or chat.")],
    out: Annotated[Path, typer.Option(help="File of tasks to write.")],
    chat: ChatOptions,
    speaker: Annotated[
        str | None,
        typer.Option(
            help="Whose turns are rated where a system plays both sides, as A; else who replies first."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Starts, contexts or topics drawn; default: all.")] = None,
    candidates: Annotated[int, typer.Option(help="candidates: how many are shown.")] = 10,
    checks: Annotated[float, typer.Option(help="Attention checks per item: 0.1 = one for each ten.")] = 0.1,
    raters: Annotated[
        int, typer.Option(help="Raters of each item; chat: chats about each topic with each system.")
    ] = 3,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    from plato2.evaluate.dialogues import read_dialogues
    from plato2.evaluate.human.tasks import Selection, make_tasks

    check_outputs({"--out": out}, [*(files or []), chat.topics])
    selection = Selection(preset, speaker, limit, candidates, checks, raters, seed)
    if preset == "chat" and not files:
        tasks = chat.tasks(selection)
    elif chat.meet or chat.topics:
        raise UserError("--meet and --topics are for --preset chat without FILES; leave them out")
    else:
        tasks = make_tasks([d for file in files or [] for d in read_dialogues(file)], selection)
    made = tasks.model_dump_json(indent=1) + "\n"
    study = out.with_suffix(".sqlite")  # what serve makes of them
    if study.exists() and out.exists() and out.read_text(encoding="utf-8") != made:
        raise UserError(
            f"--out {out}: these are other tasks than those in it, and ratings of those are in {study}; name "
            "another file"
        )
    _write(out, made)
    _print_made(tasks, out, as_json)


def _print_made(tasks: Tasks, out: Path, as_json: bool) -> None:
    """How many items there are of each system, and how many checks."""
    from collections import Counter

    items: Counter[str] = Counter()
    for item in tasks.items:
        items.update(["attention checks"] if item.expected else [one.system for one in item.shown])
    n_answers = tasks.raters_per_item * sum(map(len, _places_of(tasks)))
    if as_json:
        said = {
            "preset": tasks.preset,
            "items": len(tasks.items),
            "systems": dict(items),
            "answers": n_answers,
        }
        typer.echo(json.dumps({**said, "out": str(out)}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from plato2.talk.table import printable

    title = Text(printable(f"{out}: {tasks.preset}"), style="table.title")
    table = Table("system", "items", title=title, title_justify="left")
    for name in sorted(items, key=lambda one: one == "attention checks"):
        table.add_row(Text(printable(name)), str(items[name]))  # a name is not markup
    Console().print(table)
    if tasks.chat is not None:
        typer.echo(f"{len(tasks.items)} chats of {tasks.chat.least} to {tasks.chat.most} rounds")
        return
    typer.echo(f"{len(tasks.items)} items for {tasks.raters_per_item} raters each: {n_answers:,} answers")


def _places_of(tasks: Tasks) -> list[list[Any]]:
    from plato2.evaluate.human.formats import places

    return [
        [place for question in tasks.questions for place in places(question, item)] for item in tasks.items
    ]


@app.command(help=SERVE)
@takes(ListenOptions)
def serve(
    *,
    tasks: Annotated[Path, typer.Argument(metavar="TASKS", help="File that make wrote.")],
    raters: Annotated[int, typer.Option(help="Links to give out; each is one rater's.")],
    db: Annotated[
        Path | None, typer.Option(help="File of the study; default: TASKS with the ending .sqlite.")
    ] = None,
    links: Annotated[Path | None, typer.Option(help="File for the links, instead of printing them.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="What links begin with, where raters reach the server by another address."),
    ] = None,
    lease: Annotated[
        float, typer.Option(help="Minutes for which an item is a rater's; then others may get it.")
    ] = 30.0,
    at: ListenOptions,
) -> None:
    """Run the verb."""
    if not 1 <= raters <= MOST_RATERS:
        raise UserError(f"--raters {raters}: must be at least 1 and at most {MOST_RATERS:,}")
    if not lease > 0:
        raise UserError(f"--lease {lease:g}: must be more than 0 minutes")
    if address is not None and not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: give it with its scheme, such as https://rate.example.org")
    from plato2.evaluate.human.formats import read_tasks

    found = read_tasks(tasks)
    file = db or tasks.with_suffix(".sqlite")
    check_outputs({"--db": file, "--links": links}, [tasks])
    _import_extras()
    from plato2.evaluate.human.server import check_addresses, make_app
    from plato2.evaluate.human.store import Store
    from plato2.serve.server import listen, make_server, run, url_of

    check_addresses(found, str(tasks))
    listener = listen(at.host, at.port)
    with _held(file):
        store = Store(file, found, lease_s=lease * 60)
        known = store.raters(raters)
        partners = _partners(store)
        ready = lambda: _say_ready(store, known, (address or url_of(listener)).rstrip("/"), links)  # noqa: E731
        run(make_server(make_app(store, at.hosts(), partners=partners), None, on_ready=ready), listener)
        store.close()
    if partners is not None and partners.is_working:  # Python would wait for the model, or fall over it
        os._exit(0)


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Keeps other servers from a study.

    Raises:
        UserError: another one has it, or its folder cannot be written.
    """
    from plato2.files import locked

    with ExitStack() as held:
        lock = file.with_name(f"{file.name}.lock")
        try:
            held.enter_context(locked(lock, file, "stop the other server, or name another --db"))
        except OSError as error:
            raise UserError(f"--db {file}: cannot be written ({error.strerror}); name another file") from None
        yield


def _partners(store: Store) -> Partners | None:
    """Whom raters talk with, if they do."""
    if store.tasks.chat is None:
        return None
    from plato2.evaluate.human.chat import Partners

    return Partners(store)


def _import_extras() -> None:
    """Imports what the page needs.

    Raises:
        UserError: it is not installed.
    """
    with needs("eval", "evaluate human", EXTRAS):
        import plato2.evaluate.human.server  # noqa: F401


def _say_ready(store: Store, raters: list[Rater], address: str, links: Path | None) -> None:
    """The links, as soon as the server takes connections."""
    n, per_item = len(raters), store.tasks.raters_per_item
    if n < per_item:
        typer.echo(f"--raters {n}: each item is for {per_item} raters, so none gets all of them", err=True)
    lines = [f"{rater.name} {address}/r/{rater.token}" for rater in raters]
    lines.append(f"admin {address}/admin/{store.admin_token}")
    if links is None:
        typer.echo("\n".join(lines))
    else:
        _write(links, "\n".join(lines) + "\n", mode=0o600)
        typer.echo(f"{links}: the links of {n} raters and of the admin, all secret")
    typer.echo(f"{address} serves {len(store.items)} items; answers go to {store.path}")
    sys.stdout.flush()


@app.command(help=EXPORT)
def export(
    db: Annotated[Path, typer.Argument(metavar="DB", help="File of the study.")],
    out: Annotated[Path, typer.Option(help="File of ratings to write, JSON lines.")],
    selection: Annotated[
        Path | None,
        typer.Option(help="candidates: also a selection set, labelled by the majority of the raters."),
    ] = None,
    chats: Annotated[
        Path | None, typer.Option(help="chat: also the rated chats, as plato2 self-chat writes dialogues.")
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="chat: also the tasks with what was said, for plato2 evaluate human report."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    _import_extras()
    from plato2.evaluate.human.tasks import chat_dialogues, selection_set

    check_outputs({"--out": out, "--selection": selection, "--chats": chats, "--tasks": tasks}, [db])
    with _whole(db) as store:
        ratings, progress = store.ratings(), store.progress()
        rated = store.rated_chats() if chats is not None or tasks is not None else None
    _write(out, "".join(f"{rating.model_dump_json()}\n" for rating in ratings))
    if selection is not None:
        sets = selection_set(store.tasks, ratings)
        _write(selection, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in sets))
    if chats is not None and rated is not None:
        _write(chats, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in chat_dialogues(rated)))
    if tasks is not None and rated is not None:
        _write(tasks, rated.model_dump_json(indent=1) + "\n")
    said = {"ratings": len(ratings), "submits": progress.n_ratings, "done": round(progress.share, 4)}
    if as_json:
        typer.echo(json.dumps({**said, "out": str(out)}))
    else:
        typer.echo(
            f"{out}: {len(ratings):,} ratings of {progress.n_ratings:,} submits ({progress.share:.0%} done)"
        )


@contextmanager
def _whole(db: Path) -> Iterator[Store]:
    """A study to read from.

    Raises:
        UserError: it is none, or only a part of one.
    """
    from sqlalchemy.exc import DatabaseError

    from plato2.evaluate.human.store import Store

    try:
        store = Store(db)
        yield store
        store.close()
    except DatabaseError as error:
        raise UserError(
            f"{db}: damaged ({error.orig}); give the whole file, copied while no server runs"
        ) from None


app.command(help=of_ratings.REPORT)(of_ratings.report)
app.command(help=of_ratings.POWER)(of_ratings.power)
app.command(help=of_ratings.CONVERT)(of_ratings.convert)
app.command("import", help=of_ratings.IMPORT)(of_ratings.import_)


def _write(path: Path, text: str, mode: int | None = None) -> None:
    from plato2.files import replace_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode is not None:
            path.unlink(missing_ok=True)  # else it keeps its mode
            path.touch(mode)
            path.write_text(text, encoding="utf-8")
        else:
            replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None
