"""`plato2 tokenizer train` and `plato2 tokenizer show`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.config import UserError, expand_path
from plato2.data.tokenizer import Tokenizer, fewer_pieces, train_tokenizer
from plato2.files import lock_file, locked
from plato2.prepare.corpora import ReadReport, corpus_names, endings, read_corpus, read_lines

app = typer.Typer(
    help="Train a tokenizer, or see how one splits a text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

TRAIN_HELP = """Train a SentencePiece BPE tokenizer and write its folder (spm.model, vocab.txt).

SOURCES are a corpus (chitchat), a corpus and its files, or files alone: .jsonl and .tsv files hold dialogues,
any other text file one message per line. All messages are held in memory while it trains.

[bold]Examples[/]

plato2 tokenizer train chitchat --pieces 8000 --out data/tokenizer

plato2 tokenizer train 'zh/*.jsonl.gz' --pieces 30000 --out data/tokenizer_zh
"""


@app.command(help=TRAIN_HELP)
def train(
    sources: Annotated[list[str], typer.Argument(help="A corpus and its files, or files.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    pieces: Annotated[int, typer.Option(help="Pieces, three special ones included.")] = 8000,
    character_coverage: Annotated[
        float, typer.Option(help="Share of the characters that get a piece.")
    ] = 0.9995,
    lower_case: Annotated[bool, typer.Option("--lower-case", help="Lower-case all text, always.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the tokenizer at --out.")] = False,
) -> None:
    """Run the verb."""
    sources = [expand_path(source, "SOURCES") for source in sources]
    report = ReadReport()
    with held(out):
        if (out / "spm.model").exists() and not force:
            raise UserError(
                f"out={out} is already a tokenizer: use it, name another folder, or replace it with "
                "force=true"
            )
        tokenizer = train_tokenizer(
            messages(sources, report), pieces, character_coverage=character_coverage, lower_case=lower_case
        )
        with clear_errors(out):
            tokenizer.save(out)
    typer.echo(f"{out}: {tokenizer.n_pieces:,} pieces, vocab_size {tokenizer.vocab_size:,} with [MASK]")
    for line in filter(None, (fewer_pieces(tokenizer.vocab_size, pieces), report.sentence())):
        typer.echo(line)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Locks the folder for this process, from before the first look until it is written."""
    with ExitStack() as stack:
        with clear_errors(out):
            lock_file(out).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock_file(out), f"--out {out}"))
        yield


@contextmanager
def clear_errors(out: Path) -> Iterator[None]:
    """Turns a disk error into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None


@app.command()
def show(
    folder: Annotated[
        Path, typer.Argument(help="A tokenizer's folder, or hf:FOLDER, that of a pretrained decoder.")
    ],
    text: Annotated[str, typer.Argument(help="Any text.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the pieces and ids of a text, and what they read as.

    [bold]Example[/]

    plato2 tokenizer show data/chitchat/tokenizer "hi , how was your day ?"
    """
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    shown = {"pieces": tokenizer.pieces(text), "ids": ids, "text": tokenizer.decode(ids)}
    if as_json:
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for name, value in shown.items():
        line = " ".join(str(item) for item in value) if isinstance(value, list) else value
        console.print(f"{name:7}{line}", markup=False, soft_wrap=True)


def messages(sources: list[str], report: ReadReport) -> Iterator[str]:
    """Every message of a corpus (its name first) or of files, by the ending of their names."""
    if sources[0] in corpus_names():
        groups = [(sources[0], sources[1:])]
    else:
        groups = [(_format(source), [source]) for source in sources]
    for corpus, files in groups:
        if corpus == "text":
            yield from (line for _, _, line in read_lines(files, report))
        else:
            for dialogue in read_corpus(corpus, files, report):
                yield from (turn.text for turn in dialogue.turns)


def _format(source: str) -> str:
    packed = (".gz", ".zst", ".bz2", ".xz", ".lzma", ".zip")
    suffixes = [suffix for suffix in endings(source) if suffix not in packed]
    return {".jsonl": "jsonl", ".tsv": "tsv"}.get(suffixes[-1] if suffixes else "", "text")
