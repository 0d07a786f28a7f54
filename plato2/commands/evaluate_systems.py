"""`plato2 evaluate systems`: several systems reply, talk to themselves and choose; one report of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from plato2.commands import needs
from plato2.commands.evaluate_selection import all_scores
from plato2.commands.options import takes
from plato2.commands.playing import AsJson, Candidates, check_at_least, play_missing
from plato2.commands.results import watch
from plato2.commands.talking import Device, say_if_unranked
from plato2.config import UserError
from plato2.files import lock_file, locked

if TYPE_CHECKING:
    from plato2.evaluate.candidates import Query
    from plato2.evaluate.results import Result
    from plato2.evaluate.scorers import Scorer
    from plato2.evaluate.selection import Scores
    from plato2.talk.self_chat import Start
    from plato2.talk.speaker import Speaker

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

KS = (1, 2, 5)
REPLIES, CHATS, SCORES, REPORT = "replies.jsonl", "chats.jsonl", "scores.jsonl", "report.html"
HELP = """Put several systems through static replies, self-chat and response selection, into one report.

Each system answers --contexts, talks to itself from --starts, and chooses among the candidates of --set; what
is not given is left out, but for self-chat. OUT gets what each said and scored, the results replies.json,
dialogues.json and selection.json, and report.html with all of it beside the paper's tables. After an
interruption the same command continues. It needs neither conf/ nor a run folder.

[bold]Examples[/]

plato2 evaluate systems --speaker gpt2=dialogpt:models/gpt2 --speaker smollm=hf:models/smollm2
--speaker mine=plato2:outputs/tiny-2_gen/RUN,evaluation=outputs/tiny-2_eval/RUN
--contexts contexts.jsonl --set set.jsonl --out results
"""


@dataclass(frozen=True)
class SystemsOptions:
    """Which systems, on what; checks itself."""

    speaker: Annotated[
        list[str],
        typer.Option(
            help="A system, NAME=KIND:WHERE: plato2, dialogpt, blender, hf, openai or log "
            "(docs/speakers.md). May be repeated."
        ),
    ]
    out: Annotated[Path, typer.Option(help="Folder for all that is written.")]
    contexts: Annotated[
        Path | None, typer.Option(help="Contexts to reply to, as of plato2 reply --contexts.")
    ] = None
    starts: Annotated[
        Path | None,
        typer.Option(
            help="What self-chats begin with, as of plato2 self-chat.",
            show_default="200 that ship with plato2",
        ),
    ] = None
    set: Annotated[
        list[Path] | None, typer.Option(help="A selection set. May be repeated.", show_default=False)
    ] = None
    format: Annotated[str, typer.Option(help="Of the sets: jsonl, dailydialog++ or mutual.")] = "jsonl"
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only this many contexts, starts and contexts of each set.")
    ] = None
    utterances: Annotated[int, typer.Option(help="Turns of a self-chat, the start included.")] = 10
    embedding: Annotated[
        bool, typer.Option("--embedding/--no-embedding", help="Measure similarity by a sentence encoder.")
    ] = True
    batch: Annotated[int, typer.Option(help="Dialogues played at once; does not change the text.")] = 16
    seed: Annotated[int, typer.Option(min=0, help="Of what is said, and of intervals and tests.")] = 11

    def __post_init__(self) -> None:
        """Checks values.

        Raises:
            UserError: an impossible value.
        """
        check_at_least("--utterances", self.utterances, 2)
        check_at_least("--batch", self.batch, 1)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: a file; give a folder")


@dataclass(frozen=True)
class Task:
    """What all systems do: read, and so checked, before a model is loaded."""

    contexts: Sequence[Start]
    starts: Sequence[Start]
    queries: list[Query]
    baselines: dict[str, Scorer]


@app.command(help=HELP)
@takes(SystemsOptions, flags={"embedding": "--embedding/--no-embedding"})
def systems(
    *,
    options: SystemsOptions,
    candidates: Candidates = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    from plato2.evaluate.speakers import read_speaker, speaker_names

    began = perf_counter()
    names = speaker_names(options.speaker, "--speaker")
    folders = [options.out / re.sub(r"[^\w.-]+", "_", name) for name in names]
    if len({*folders}) < len(folders):
        raise UserError("--speaker: two would write to one folder; give each a name, NAME=KIND:WHERE")
    with needs("eval", "evaluate systems"):  # before what takes long
        import bm25s  # noqa: F401
        import statsmodels  # noqa: F401
    task = read_task(options)
    for text in options.speaker:  # one after the other, so that the memory need only hold one
        read_speaker(text, "--speaker", device)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock_file(options.out), f"--out {options.out}"):
        scored: list[list[Scores]] = []
        for text, name, folder in zip(options.speaker, names, folders, strict=True):
            typer.echo(f"{name}:", err=True)
            speaker = read_speaker(text, "--speaker", device)
            scored.append(run(speaker, folder, task, options, candidates))
        results = evaluated(folders, scored, task, options, device)
        report = write_report(options.out)
    if as_json:
        seconds = round(perf_counter() - began, 3)
        told = {"out": str(options.out), "report": str(report), "systems": names, "seconds": seconds}
        typer.echo(json.dumps(told | {"results": list(map(str, results))}, ensure_ascii=False))
    else:
        show(results)
        typer.echo(f"written: {', '.join(map(str, [*results, report]))}")


def read_task(options: SystemsOptions) -> Task:
    """The files that were given.

    Raises:
        UserError: one that cannot be read, or has nothing in it.
    """
    from plato2.evaluate.candidates import read_queries
    from plato2.evaluate.scorers import baselines
    from plato2.evaluate.selection import sets_of
    from plato2.talk.self_chat import read_starts

    contexts = read_starts(options.contexts, "--contexts")[: options.limit] if options.contexts else []
    starts = read_starts(options.starts)[: options.limit]
    queries = [
        query
        for file in options.set or []
        for query in islice(read_queries(file, options.format), options.limit)
    ]
    if not queries:
        return Task(contexts, starts, [], {})
    sets_of(queries, KS)
    texts = [text for query in queries for text in query.candidates]
    simple = baselines([query.context for query in queries], texts, None, options.seed)
    return Task(contexts, starts, queries, simple)


def run(
    speaker: Speaker, folder: Path, task: Task, options: SystemsOptions, candidates: bool
) -> list[Scores]:
    """What one system says and scores that is not in its folder yet; gives its scores of each query."""
    from plato2.evaluate.scorers import speaker_hash, speaker_scorers
    from plato2.talk.speaker import Likely, PlatoSpeaker

    if isinstance(speaker, PlatoSpeaker):
        say_if_unranked(speaker.bot)
    if task.contexts:
        say(speaker, task.contexts, None, folder / REPLIES, options, candidates)
    say(speaker, task.starts, options.utterances, folder / CHATS, options, candidates)
    if not task.queries:
        return []
    if not isinstance(speaker, PlatoSpeaker | Likely):
        typer.echo("gives no probabilities, so it is not in the selection", err=True)
        return []
    scorers = speaker_scorers(speaker, "both")
    asked = [[query.context, query.candidates] for query in task.queries]
    about = {"model": speaker_hash(speaker), "scores": list(scorers), "inputs": _hash(asked)}
    return all_scores(task.queries, scorers, folder / SCORES, about)


def say(
    speaker: Speaker,
    starts: Sequence[Start],
    utterances: int | None,
    out: Path,
    options: SystemsOptions,
    candidates: bool,
) -> None:
    """Self-chats, or replies where `utterances` is None."""
    from plato2.talk.self_chat import describe, plan, unread_starts

    dialogues = plan(starts, [speaker], utterances)
    if unread := unread_starts(starts, [speaker]):
        typer.echo(f"warning: {unread}", err=True)
    about = {
        "settings": {**speaker.settings, "seed": options.seed},
        "utterances": utterances,
        "candidates": candidates,
        "starts": _hash([[start.turns, start.references] for start in starts]),
        **describe([speaker]),
    }
    n_kept = play_missing(dialogues, [speaker], out, options.batch, options.seed, candidates, about)
    if stuck := sum(dialogue.stuck for dialogue in dialogues[n_kept:]):
        typer.echo(f"warning: {out.name}: nothing was found to say in {stuck} of {len(dialogues)}", err=True)


def _hash(values: Any) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()[:16]


def evaluated(
    folders: Sequence[Path],
    scored: Sequence[list[Scores]],
    task: Task,
    options: SystemsOptions,
    device: str,
) -> dict[Path, Result]:
    """Finds and writes the results; of a self-chat, as in the paper, the turns of B count."""
    from plato2.evaluate.automatic import evaluate, forget
    from plato2.evaluate.options import AutomaticOptions, Kind
    from plato2.evaluate.results import write_result

    results: dict[Path, Result] = {}
    kinds: list[tuple[Kind, str, str]] = [("replies", REPLIES, "both"), ("dialogues", CHATS, "B")]
    for kind, name, speaker in kinds:
        files = [str(folder / name) for folder in folders if said_something(folder / name)]
        if files:
            out = options.out / f"{kind}.json"
            automatic = AutomaticOptions(
                speaker=speaker, embedding=options.embedding, device=device, seed=options.seed
            )
            results[out] = evaluate(kind, files, automatic, out, watch)
            write_result(out, results[out])
            forget(out)
    if task.queries:
        out = options.out / "selection.json"
        results[out] = selected(scored, task, options)
        write_result(out, results[out])
    return results


def show(results: Mapping[Path, Result]) -> None:
    """Prints them as their verbs do."""
    from plato2.evaluate.results import print_table, result_table
    from plato2.evaluate.selection import print_selection

    console = Console(highlight=False)
    for result in results.values():
        if result.kind == "selection":
            print_selection(result, console)
        else:
            print_table(result_table(result), console)


def said_something(file: Path) -> bool:
    """Whether a system has a turn in a file; else it is left out, with a warning."""
    from plato2.evaluate.dialogues import PEOPLE, read_dialogues
    from plato2.evaluate.dialogues import systems as systems_of

    if not file.exists():
        return False
    if systems_of(read_dialogues(file)) != [PEOPLE]:
        return True
    typer.echo(f"warning: {file}: says nothing at all, and is left out", err=True)
    return False


def selected(scored: Sequence[list[Scores]], task: Task, options: SystemsOptions) -> Result:
    """How well all scores choose, the baselines' among them."""
    from plato2.evaluate.results import inputs
    from plato2.evaluate.selection import evaluate_selection, score_queries

    found = [list(score_queries(task.queries, task.baselines)), *(some for some in scored if some)]
    chosen = [
        {name: s for some in of_query for name, s in some.items()} for of_query in zip(*found, strict=True)
    ]
    result = evaluate_selection(task.queries, chosen, KS, options.seed)
    result.inputs = inputs(*(options.set or []))
    result.settings = {
        "format": options.format, "k": KS, "seed": options.seed, "limit": options.limit,
        "speakers": options.speaker,
    }  # fmt: skip
    return result


def write_report(folder: Path) -> Path:
    """The page of what lies in a folder."""
    from plato2.report.found import find
    from plato2.report.page import write
    from plato2.report.sections import sections

    return write(folder / REPORT, "plato2 evaluate systems", sections(find([folder])))[0]
