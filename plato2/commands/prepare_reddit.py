"""`plato2 prepare reddit`: dumps of Reddit to shards, index, tokenizer and data card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.prepare import AsJson, NoClean, parse_rules, rule_help
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.rules import RedditRules

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Turn dumps of Reddit into shards to train on: the paper's data (appendix A).

Every comment that answers another one is a response; the comments above it are its context. A comment that
breaks a rule is removed with everything below it. Parts in progress are kept beside --out: after a kill, a
full disk or Ctrl-C, run the same command again to resume.

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
@takes(RedditOptions, leave_out=["rules"], flags={"spark_master": "--master", "spark_conf": "--conf"})
def prepare_reddit(
    options: RedditOptions,
    rule: Annotated[list[str] | None, typer.Option(help=rule_help(RedditRules))] = None,
    no_clean: NoClean = False,
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    options.rules = parse_rules(rule or [], default_rules(options.language, no_clean))
    with needs("reddit", "prepare reddit", ("duckdb", "zstandard", "orjson")):
        from plato2.prepare.reddit.pipeline import prepare_reddit as run
    _print_summary(run(options), None if options.tokenizer else options.pieces, as_json)


def default_rules(language: str, no_clean: bool = False) -> RedditRules:
    """The paper's rules with the language's word list, or none."""
    return RedditRules.off() if no_clean else RedditRules(offensive_words=language)


def _print_summary(folder: Path, pieces: int | None, as_json: bool) -> None:
    """What came of it: one JSON object, or a few lines; `pieces` were asked of a new tokenizer."""
    from plato2.data.shards import read_index
    from plato2.data.tokenizer import fewer_pieces
    from plato2.prepare.card import removals

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
        f"{folder}: {samples['train']:,} samples to train on, {samples['valid']:,} for validation and "
        f"{samples.get('test', 0):,} for test from {counts['read']:,} messages; unigram perplexity "
        f"{index.unigram['ppl']:.1f}",
        *filter(None, [fewer_pieces(index.vocab_size, pieces) if pieces else None]),
        f"the data card: {folder / 'card.md'}",
    ]
    if facts["removed"]:
        lines.append(f"removed from training for the evaluation sets: {removals(facts['removed'])}")
    for split, n in facts["repeated_in_train"].items():
        if n:
            lines.append(
                f"{n:,} of the {samples[split]:,} {split} samples are word for word in train as well"
            )
    if "test" not in samples and index.prepare["test_fraction"]:
        lines.append("no community is held out for test: all are too large; --test-from takes later months")
    if facts["n_broken"]:
        lines.insert(
            1, f"{facts['n_broken']:,} lines could not be read; the first: {facts['broken_examples'][0]}"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
