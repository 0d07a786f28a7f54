"""`plato2 evaluate audit`: what automatic scores have to do with human ratings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, deliver, watch
from plato2.commands.talking import Device, fetches_models
from plato2.config import UserError

if TYPE_CHECKING:
    import numpy as np

    from plato2.evaluate.rated import RatedReply
    from plato2.evaluate.results import Result

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Show which automatic scores of replies have to do with human ratings, and which do not.

A FILE has replies that people have rated: JSON lines of {"context": \\[turns], "reply": text,
"ratings": [3, 4]}, with references if there are some, or with ratings by quality
({"fluent": [1, 2]}); or FED's JSON; or DailyDialog's CSV of ratings. Each score has its Spearman correlation
with the mean rating; a dot marks those whose 95 % interval over contexts holds 0: they say nothing here. The
last line is what one rater has to do with the others. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate audit rated.jsonl

plato2 evaluate audit fed_data.json.gz --generation RUN --evaluation RUN --out audit.json --picture audit.png
"""


@app.command(help=HELP)
@takes(ResultOptions)
@fetches_models
def audit(
    *,
    file: Annotated[list[Path], typer.Argument(help="Rated replies.")],
    quality: Annotated[
        list[str] | None, typer.Option(help="Only this quality; may be repeated. Default: all.")
    ] = None,
    generation: Annotated[
        Path | None,
        typer.Option(help="Run, checkpoint or model folder of 1_coarse or 2_gen, for log p(r|c)."),
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="The same for 2_eval, for coherence.")] = None,
    embedding: Annotated[
        bool, typer.Option("--embedding/--no-embedding", help="Measure similarity by a sentence encoder.")
    ] = True,
    device: Device = "auto",
    keep: Annotated[
        Path | None,
        typer.Option(
            "--scores", help="File to keep the models' scores in; the same command continues from there."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    to: ResultOptions,
) -> None:
    """Run the verb."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must be at least 0")
    from plato2.evaluate.rated import read_rated
    from plato2.evaluate.results import inputs

    names = _names(file)
    read = {name: read_rated(path) for name, path in zip(names, file, strict=True)}
    replies = {name: _only(found, quality or [], names) for name, (found, _) in read.items()}
    if all(not found for found in replies.values()):
        known = sorted({one for found, _ in read.values() for reply in found for one in reply.ratings})
        raise UserError(
            f"--quality {', '.join(quality or [])}: not rated there; there are {', '.join(known)}"
        )
    from plato2.evaluate.audit import audit_picture, audit_result

    with needs("eval", "evaluate audit"):
        scores = _scores(replies, generation, evaluation, embedding, device, keep)
    models = [path for path in (generation, evaluation) if path is not None]
    result = audit_result(
        {name: (found, scores[name]) for name, found in replies.items() if found},
        inputs(*file, *models),
        {
            "embedding": embedding,
            "generation": None if generation is None else str(generation),
            "evaluation": None if evaluation is None else str(evaluation),
        },
        {name: counts for name, (_, counts) in read.items()},
        seed,
        partial(watch, description="correlations"),
    )
    deliver(result, to, audit_picture, _show)


def _show(result: Result) -> None:
    """The tables, and what was counted in each file."""
    from plato2.evaluate.audit import NOTHING, audit_tables

    Console(highlight=False).print(*audit_tables(result), sep="\n")
    if any(figure.note == NOTHING for figures in result.systems.values() for figure in figures.values()):
        typer.echo("\N{MIDDLE DOT} the 95 % interval over contexts holds 0: the score says nothing here")
    for name, counts in result.details["counts"].items():
        left_out = {"unrated": "without a rating", "dialogues": "of whole dialogues"}
        parts = [f"{counts[key]} {what} left out" for key, what in left_out.items() if counts[key]]
        parts += [f"{counts['labels_missing']} labels are no numbers"] * bool(counts["labels_missing"])
        typer.echo("; ".join([f"{name}: {counts['replies']} rated replies", *parts]))


def _names(files: list[Path]) -> list[str]:
    """Names of files without endings, with their folders where two are the same."""
    short = [path.name.split(".")[0] for path in files]
    names = short if len(set(short)) == len(short) else list(map(str, files))
    if len(set(names)) < len(names):
        raise UserError(f"FILE {next(name for name in names if names.count(name) > 1)}: twice; give it once")
    return names


def _only(replies: list[RatedReply], qualities: list[str], names: list[str]) -> list[RatedReply]:
    """The replies with these qualities alone; all qualities where none is named."""
    from dataclasses import replace

    if not qualities:
        return replies
    kept = [
        replace(reply, ratings={name: reply.ratings[name] for name in qualities if name in reply.ratings})
        for reply in replies
    ]
    return [reply for reply in kept if reply.ratings]


def _scores(
    replies: dict[str, list[RatedReply]],
    generation: Path | None,
    evaluation: Path | None,
    embedding: bool,
    device: str,
    path: Path | None,
) -> dict[str, dict[str, np.ndarray]]:
    """All scores that apply, of each file."""
    from plato2.evaluate.audit import embedding_scores, model_scores, reference_scores, text_scores

    found = {
        name: text_scores(rated) | reference_scores(watch(rated, "references", len(rated)))
        for name, rated in replies.items()
    }
    if generation is not None or evaluation is not None:
        scored = _model_lines(
            [one for rated in replies.values() for one in rated], generation, evaluation, device, path
        )
        for name, rated in replies.items():
            found[name] |= model_scores(list(islice(scored, len(rated))))
    if embedding:
        from plato2.evaluate.scores import WIDTH, Encoder, Kept

        encoder, vectors = Encoder(device), Kept(path and path.with_name(f"{path.name}.embeddings"), WIDTH)
        for name, rated in replies.items():

            def encode(texts: Sequence[str]) -> np.ndarray:
                return vectors.of(texts, lambda text: f"{encoder.name} {text}", encoder, "embeddings", watch)

            found[name] |= embedding_scores(rated, encode)
    return found


def _model_lines(
    rated: list[RatedReply],
    generation: Path | None,
    evaluation: Path | None,
    device: str,
    path: Path | None,
) -> Iterator[dict[str, Any]]:
    """What the models say of all replies, those that are not in the file yet scored."""
    from plato2.commands.score import load_models
    from plato2.evaluate.audit import to_line
    from plato2.evaluate.kept import continued
    from plato2.talk.score import score_lines
    from plato2.talk.speaker import weights_hash

    models: Any = load_models(generation, evaluation, device)
    lines = list(map(to_line, rated))
    about = {
        "models": [None if one is None else weights_hash(one) for one in models[1:]],
        "replies": sha256(b"\n".join(lines)).hexdigest(),
    }
    found = continued(path, about, dict[str, Any], lambda first: score_lines(lines[first:], *models))
    return iter(list(watch(found, "models", len(lines))))
