"""`plato2 score`: probabilities of the responses in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from plato2.bounded import read_lines_of
from plato2.commands.results import watch
from plato2.commands.talking import Device, fetches_models, small
from plato2.config import UserError
from plato2.files import lock_file, locked

if TYPE_CHECKING:
    from plato2.data.tokenizer import Tokenizer
    from plato2.model.networks import EvaluationNetwork, GenerationNetwork

LINE = "a line is: turns joined by [SEP], TAB, response"

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Give the probabilities of responses, one JSON object per line.

A line of FILE is the turns of a context joined by [SEP], a TAB, and a response. A 1_coarse model gives nll
(summed, in nats) and n_tokens of p(r|c); a 2_gen model posterior, p(z|c,r) of each latent, and nll_by_latent;
a 2_eval model coherence, p(l=1|c,r); a plato model all three. A line that cannot be read gives
{"error": ...} in its place; where not one can be read, the exit status is 2. An imported 2_gen model
without its recognition head (released ones may lack it) gives no posterior.

[bold]Examples[/]

plato2 score pairs.tsv --generation outputs/tiny-1_coarse/RUN

plato2 score pairs.tsv --generation models/24L --evaluation models/24L --out scores.jsonl
"""


@app.command(help=HELP)
@fetches_models
def score(
    file: Annotated[Path, typer.Argument(help="Lines: turn [SEP] turn TAB response.")],
    generation: Annotated[
        Path | None, typer.Option(help="Run, checkpoint or model folder of 1_coarse, 2_gen or plato.")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="The same for 2_eval.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write to; default: stdout.")] = None,
    device: Device = "auto",
) -> None:
    """Run the verb."""
    check_files(file, out)
    if generation is None and evaluation is None:
        generation = evaluation = small()
    # After the options are checked: importing torch takes seconds.
    from plato2.talk.score import score_lines

    tokenizer, generator, evaluator = load_models(generation, evaluation, device)
    with file.open("rb") as opened:
        n_lines = sum(1 for _ in read_lines_of(opened))
    if not n_lines:
        raise UserError(f"{file}: is empty; {LINE}")
    n_errors = n_unread = 0
    with file.open("rb") as lines, to_write(out) as target:
        bounded = (line or b"" for line in read_lines_of(lines))
        found = score_lines(bounded, tokenizer, generator, evaluator)
        for scores in watch(found, "scoring", n_lines):
            n_errors += "error" in scores
            n_unread += "unread_share" in scores
            typer.echo(json.dumps(scores, ensure_ascii=False), file=target)
    if n_unread:
        typer.echo(
            f"{n_unread} of {n_lines} lines have a text that the tokenizer cannot read (unread_share says "
            "how much): their scores are those of gaps",
            err=True,
        )
    if n_errors == n_lines:
        raise UserError(
            f"{file}: not one of its {n_lines} lines could be scored; the error in its place says why; {LINE}"
        )
    if n_errors:
        typer.echo(
            f"{n_errors} of {n_lines} lines could not be scored; each has an error in its place", err=True
        )


def check_files(file: Path, out: Path | None) -> None:
    """Whether one can be read and the other be written.

    Raises:
        UserError: if not.
    """
    if not file.is_file():
        reason = "not a regular file; write its lines to one" if file.exists() else "no such file"
        raise UserError(f"{file}: {reason}")
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a folder")
    if out and (out.is_dir() or (out.exists() and out.samefile(file))):
        raise UserError(
            f"--out {out}: {'a folder' if out.is_dir() else 'the input file itself'}; give a new file"
        )


def load_models(
    generation: Path | None, evaluation: Path | None, device: str
) -> tuple[Tokenizer, GenerationNetwork | None, EvaluationNetwork | None]:
    """The tokenizer of the models that were given, and each of them.

    Raises:
        UserError: a model or device that does not fit, or two tokenizers.
    """
    from plato2.talk.bot import pick_device
    from plato2.weights.folder import has_recognition, load_evaluation, load_generation, saved_tokenizer

    where = pick_device(device)
    generator = evaluator = None
    if generation:
        with_recognition = has_recognition(generation)
        generator = load_generation(generation, "--generation", with_recognition).to(where)
        if not with_recognition:
            typer.echo(f"--generation {generation}: no recognition head in it, so no posterior", err=True)
    if evaluation:
        evaluator = load_evaluation(evaluation, "--evaluation", generator).to(where)
    tokenizers = [saved_tokenizer(path) for path in (generation, evaluation) if path]
    if len({tokenizer.sha256 for tokenizer in tokenizers}) > 1:
        raise UserError(
            "--generation and --evaluation have different tokenizers; give models of one curriculum"
        )
    return tokenizers[0], generator, evaluator


@contextmanager
def to_write(out: Path | None) -> Iterator[TextIO | None]:
    """The file of the scores, which no other process writes; None stands for stdout.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """
    if out is None:
        yield None
        return
    if out.exists() and not out.is_file():  # a pipe, /dev/stdout
        with out.open("w", encoding="utf-8") as file:
            yield file
        return
    try:
        with locked(lock_file(out), f"--out {out}"), out.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
