"""`plato2 evaluate selection`: how well scores choose among labelled candidates (table 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, deliver, watch
from plato2.commands.talking import MODELS, RANKING, Device, fetches_models, small
from plato2.config import UserError, did_you_mean, expand_path

if TYPE_CHECKING:
    from plato2.evaluate.candidates import Query
    from plato2.evaluate.scorers import Scorer
    from plato2.evaluate.selection import Scores

LENGTHS = ("per-token", "summed", "both")
"""How log-probabilities count: their mean per token, as when talking, or their sum."""

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Measure how well scores choose the right ones of a context's candidates: MAP, MRR, P@1, R_n@k.

FILE has a context, candidates and labels per line ({"context": ["hi"], "candidates": ["hello", "no"],
"labels": [1, 0]}), or is DailyDialog++ or MuTual (--format). Scores: coherence p(l=1|c,r), forward
log p(r|c), backward log p(c|r), weighted sums of them (--rank), the same of other systems (--speaker);
beside them random numbers, shared words, BM25 and few words. Each figure has its 95 % bootstrap interval over
contexts; scores are compared by paired permutation tests with Holm's correction.

[bold]Examples[/]

plato2 evaluate selection set.jsonl --evaluation outputs/tiny-2_eval/RUN --out selection.json

plato2 evaluate selection dev.jsonl.gz --format dailydialog++ --generation outputs/tiny-2_gen/RUN
--evaluation outputs/tiny-2_eval/RUN --rank coherence=1,forward=0.1 --scores scores.jsonl

plato2 evaluate selection set.jsonl --generation outputs/tiny-2_gen/RUN --speaker gpt2=dialogpt:models/gpt2

plato2 evaluate selection mutual/dev --format mutual --evaluation models/24L --picture selection.png
"""


@dataclass(frozen=True)
class Given:
    """What chooses, and how it is measured; checks itself."""

    generation: Annotated[
        Path | None,
        typer.Option(
            help="Run folder, checkpoint or model folder of 1_coarse or 2_gen: forward.",
            rich_help_panel=MODELS,
        ),
    ] = None
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="The same for 2_eval: coherence. May be repeated.", rich_help_panel=MODELS),
    ] = None
    backward: Annotated[
        Path | None, typer.Option(help="The same for stage backward.", rich_help_panel=MODELS)
    ] = None
    speaker: Annotated[
        list[str] | None,
        typer.Option(
            help="Another system, NAME=KIND:WHERE: plato2, dialogpt, blender or hf (docs/speakers.md). "
            "May be repeated.",
            rich_help_panel=MODELS,
        ),
    ] = None
    rank: Annotated[
        list[str] | None,
        typer.Option(
            help="A weighted sum: coherence=1,backward=0.5. May be repeated.", rich_help_panel=RANKING
        ),
    ] = None
    length: Annotated[
        str,
        typer.Option(
            help="Log-probabilities per-token, as when talking, summed, or both.", rich_help_panel=RANKING
        ),
    ] = "both"
    baselines: Annotated[
        bool, typer.Option(help="Random numbers, shared words, BM25 and few words beside.")
    ] = True
    data: Annotated[
        str | None,
        typer.Option(help="Prepared corpus that says how rare a word is; default: the contexts of FILE."),
    ] = None
    k: Annotated[str, typer.Option(help="k of R_n@k.")] = "1,2,5"
    seed: Annotated[int, typer.Option(min=0, help="Of random numbers, ties, resamples and tests.")] = 0
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many contexts of each FILE.")] = None

    def __post_init__(self) -> None:
        """Checks values.

        Raises:
            UserError: an impossible value.
        """
        if self.length not in LENGTHS:
            raise UserError(f"--length {self.length}: {did_you_mean(self.length, LENGTHS)}")
        if not all(part.strip().isdecimal() and int(part) for part in self.k.split(",")):
            raise UserError(f"--k {self.k}: give whole numbers from 1 on, with commas between them: 1,2,5")

    def ks(self) -> list[int]:
        """k of R_n@k."""
        return sorted({int(part) for part in self.k.split(",")})


@app.command(help=HELP)
@fetches_models
@takes(Given)
@takes(ResultOptions)
def selection(
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Selection sets.")],
    given: Given,
    format: Annotated[str, typer.Option(help="jsonl, dailydialog++ or mutual.")] = "jsonl",
    scores: Annotated[
        Path | None,
        typer.Option(help="File to keep the models' scores in; the same command continues from there."),
    ] = None,
    device: Device = "auto",
    to: ResultOptions,
) -> None:
    """Run the verb."""
    from plato2.evaluate.candidates import read_queries
    from plato2.evaluate.results import inputs, picture
    from plato2.evaluate.selection import evaluate_selection, print_selection, sets_of

    with needs("eval", "evaluate selection"):  # before what takes long
        import bm25s  # noqa: F401
        import statsmodels  # noqa: F401
    queries = [query for file in files for query in islice(read_queries(file, format), given.limit)]
    sets_of(queries, given.ks())  # says what is wrong with them before a model is loaded
    if not (given.generation or given.evaluation or given.backward or given.speaker):
        given = replace(given, generation=(own := small()), evaluation=[own])
    simple = baselines_of(queries, given)  # before what takes long: --data may be wrong
    # After the options are checked: importing torch takes seconds.
    models, hashes = scorers_of(given, device)
    sources = [file for file in files if file.is_file()]
    about = {
        "models": hashes,
        "scores": list(models),
        "inputs": [one.sha256 for one in inputs(*sources)],
        "contexts": len(queries),
    }
    scored = all_scores(queries, models, scores, about)
    chosen = [
        {**{name: list(scorer(q.context, q.candidates)) for name, scorer in simple.items()}, **found}
        for q, found in zip(queries, scored, strict=True)
    ]
    result = evaluate_selection(queries, chosen, given.ks(), given.seed)
    given_models = (given.generation, *(given.evaluation or []), given.backward)
    result.inputs = inputs(*files, *(path for path in given_models if path))
    result.settings = {
        "format": format,
        "rank": given.rank or [],
        "length": given.length,
        "data": given.data,
        "k": given.ks(),
        "seed": given.seed,
        "limit": given.limit,
        "models": hashes,
    }
    drawn = [key for key in result.measures if not key.endswith("/ties")]
    show = partial(print_selection, console=Console(highlight=False))
    deliver(result, to, partial(picture, only=drawn), show)


def scorers_of(given: Given, device: str) -> tuple[dict[str, Scorer], dict[str, str]]:
    """What the models and speakers score by, and the hashes of both, by name.

    Raises:
        UserError: one that cannot be loaded, or has no log-probabilities; two speakers of one name.
    """
    from plato2.evaluate.scorers import model_scorers, speaker_hash, speaker_scorers
    from plato2.evaluate.speakers import read_speaker, speaker_names
    from plato2.talk.bot import pick_device

    speaker_names(given.speaker or [], "--speaker")
    models, hashes = model_scorers(
        given.generation,
        given.evaluation or [],
        given.backward,
        given.rank or [],
        given.length,
        pick_device(device),
    )
    for text in given.speaker or []:
        system = read_speaker(text, "--speaker", device)
        models |= speaker_scorers(system, given.length)
        hashes[f"speaker {system.name}"] = speaker_hash(system)
    return models, hashes


def all_scores(
    queries: list[Query], models: dict[str, Scorer], path: Path | None, about: dict[str, Any]
) -> list[Scores]:
    """The models' scores of all queries, those that are not in the file yet computed; with a progress bar."""
    from plato2.evaluate.kept import kept
    from plato2.evaluate.selection import Scores, score_queries

    if not models:
        return [{} for _ in queries]
    with kept(path, about, Scores) as (done, append):
        return list(watch(score_queries(queries, models, done, append), "scoring", len(queries)))


def baselines_of(queries: list[Query], given: Given) -> dict[str, Scorer]:
    """The baselines, unless they are not wanted."""
    from plato2.data.shards import read_index
    from plato2.evaluate.scorers import baselines, corpus_texts

    if not given.baselines:
        return {}
    texts = None
    if given.data is not None:
        data = expand_path(given.data, "--data")
        read_index(data, "--data ")
        texts = corpus_texts(data)
    candidates = [text for query in queries for text in query.candidates]
    return baselines([query.context for query in queries], candidates, texts, given.seed)
