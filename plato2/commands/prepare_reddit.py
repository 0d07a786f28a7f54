"""`plato2 prepare reddit`: dumps of Reddit to shards, index, tokenizer and data card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.commands.prepare import pair, parse_rules
from plato2.config import UserError, install
from plato2.prepare.reddit.options import EngineName, OnBroken, RedditOptions
from plato2.prepare.reddit.rules import LANGUAGES, RedditRules
from plato2.prepare.reddit.threads import Orphans

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
DEFAULT = RedditOptions(comments=["?"], out="?")
RULE_NAMES = [rule.name for rule in dataclasses.fields(RedditRules)]

HELP = """Turn dumps of Reddit into shards to train on: the paper's data (appendix A).

Every comment that answers another one is a response; the comments above it are its context. A comment that
breaks a rule is removed with everything below it. Parts in progress are kept beside --out: after a kill, a
full disk or Ctrl-C the same command goes on.

[bold]Examples[/]

plato2 prepare reddit --comments 'dumps/RC_2011-*.zst' --out data/reddit

plato2 prepare reddit --comments 'dumps/RC_*' --submissions 'dumps/RS_*' --out data/reddit \
--valid-from 2019-08-01

plato2 prepare reddit --comments RC_2011-01.bz2 --out data/small --tokenizer data/chitchat/tokenizer \
--rule max_repeats=50 --rule urls=off --on-broken skip --json

plato2 prepare reddit --comments 'dumps/RC_*.zst' --out /shared/reddit --engine spark \
--master spark://head:7077 --conf spark.executor.memory=8g

plato2 prepare explain 'see www.example.com' says what each rule thinks of a message.
"""


@app.command(help=HELP)
def prepare_reddit(
    comments: Annotated[
        list[str], typer.Option(help="Dumps of comments: path or glob, local or remote; may be repeated.")
    ],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    submissions: Annotated[
        list[str] | None,
        typer.Option(help="Dumps of submissions: their titles open the conversations; may be repeated."),
    ] = None,
    language: Annotated[
        str,
        typer.Option(help=f"{' or '.join(LANGUAGES)}: the word list and the size of a trained tokenizer."),
    ] = DEFAULT.language,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of a tokenizer; else one is trained on a sample.")
    ] = None,
    vocab_pieces: Annotated[
        int | None, typer.Option(help="Pieces of a tokenizer to train.", show_default="the language's")
    ] = None,
    character_coverage: Annotated[
        float, typer.Option(help="Share of the characters a trained tokenizer knows.")
    ] = DEFAULT.character_coverage,
    lower_case: Annotated[
        bool, typer.Option("--lower-case", help="A trained tokenizer lower-cases.")
    ] = False,
    tokenizer_messages: Annotated[
        int, typer.Option(help="Messages to train it on, at most.")
    ] = DEFAULT.tokenizer_messages,
    rule: Annotated[
        list[str] | None,
        typer.Option(help=f"RULE=VALUE or RULE=off; may be repeated. Rules: {', '.join(RULE_NAMES)}."),
    ] = None,
    no_clean: Annotated[bool, typer.Option("--no-clean", help="All cleaning rules off.")] = False,
    orphans: Annotated[
        Orphans,
        typer.Option(help="A comment whose parent is not there: removed with all below it, or a root."),
    ] = DEFAULT.orphans,
    max_context: Annotated[int, typer.Option(help="Ids of a context.")] = DEFAULT.max_context,
    max_response: Annotated[int, typer.Option(help="Ids of a response.")] = DEFAULT.max_response,
    cut_turn: Annotated[
        bool, typer.Option("--cut-turn", help="Cut a parent that is too long; else the sample is lost.")
    ] = DEFAULT.cut_turn,
    valid_from: Annotated[
        str | None,
        typer.Option(help="First day (UTC) of the validation responses.", show_default="the last 2 %"),
    ] = None,
    valid_samples: Annotated[
        int, typer.Option(help="Validation samples drawn from all after that day.")
    ] = DEFAULT.valid_samples,
    shard_nodes: Annotated[int, typer.Option(help="Comments that make a shard.")] = DEFAULT.shard_nodes,
    on_broken: Annotated[
        OnBroken, typer.Option(help="At a line or file that cannot be read: stop, or skip and count.")
    ] = DEFAULT.on_broken,
    engine: Annotated[
        EngineName, typer.Option(help="local: processes and DuckDB on this machine; spark: a cluster.")
    ] = DEFAULT.engine,
    workers: Annotated[
        int, typer.Option(help="Processes of the local engine.", show_default="the processors")
    ] = DEFAULT.workers,
    memory: Annotated[
        str, typer.Option(help="What DuckDB may take before it goes to disk.")
    ] = DEFAULT.memory,
    master: Annotated[
        str | None, typer.Option(help="Master URL of Spark.", show_default="Spark's own, else local[workers]")
    ] = None,
    conf: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for Spark, such as spark.executor.memory=8g.")
    ] = None,
    work: Annotated[
        str | None, typer.Option(help="Folder of the parts in progress.", show_default="OUT.work")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep that folder at the end.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared corpus at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Run the verb."""
    options = RedditOptions(
        comments=comments,
        out=out,
        submissions=submissions or [],
        language=language,
        rules=parse_rules(rule or [], default_rules(language, no_clean)),
        tokenizer=tokenizer,
        vocab_pieces=vocab_pieces,
        character_coverage=character_coverage,
        lower_case=lower_case,
        tokenizer_messages=tokenizer_messages,
        orphans=orphans,
        max_context=max_context,
        max_response=max_response,
        cut_turn=cut_turn,
        valid_from=valid_from,
        valid_samples=valid_samples,
        shard_nodes=shard_nodes,
        on_broken=on_broken,
        engine=engine,
        workers=workers,
        memory=memory,
        spark_master=master,
        spark_conf=dict(pair(text, "conf") for text in conf or []),
        work=work,
        keep_work=keep_work,
        force=force,
    )
    try:
        from plato2.prepare.reddit.pipeline import prepare_reddit as run
    except ImportError as error:
        raise UserError(f"{error}: {install('reddit')}") from None
    _print_summary(run(options), None if tokenizer else options.pieces, as_json)


def default_rules(language: str, no_clean: bool = False) -> RedditRules:
    """The paper's rules with the language's word list, or none."""
    return RedditRules.off() if no_clean else RedditRules(offensive_words=language)


def _print_summary(folder: Path, pieces: int | None, as_json: bool) -> None:
    """What came of it: one JSON object, or a few lines; `pieces` were asked of a new tokenizer."""
    from plato2.data.shards import read_index
    from plato2.data.tokenizer import fewer_pieces

    index = read_index(folder)
    facts = index.extra["facts"]
    counts = facts["counts"]
    samples = {name: split.samples for name, split in index.splits.items()}
    if as_json:
        summary = {
            "out": str(folder),
            "samples": samples,
            "digest": index.extra["digest"],
            "counts": counts,
            "broken": facts["n_broken"],
            "unigram": index.unigram,
            "vocab_size": index.vocab_size,
            "tokenizer_sha256": index.tokenizer_sha256,
        }
        typer.echo(json.dumps(summary))
        return
    console = Console(highlight=False)
    lines = [
        f"{folder}: {samples['train']:,} samples to train on and {samples['valid']:,} for validation from "
        f"{counts['read']:,} messages; unigram perplexity {index.unigram['ppl']:.1f}",
        *filter(None, [fewer_pieces(index.vocab_size, pieces) if pieces else None]),
        f"the data card: {folder / 'card.md'}",
    ]
    if facts["n_broken"]:
        lines.insert(
            1, f"{facts['n_broken']:,} lines could not be read; the first: {facts['broken_examples'][0]}"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
