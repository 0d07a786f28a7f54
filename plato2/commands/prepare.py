"""`plato2 prepare`: a corpus to shards, index, tokenizer and data card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from plato2.config import UserError, did_you_mean
from plato2.prepare.clean import CleanRules, Policy
from plato2.prepare.corpora import corpus_names
from plato2.prepare.options import Background, PrepareOptions

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
DEFAULT = PrepareOptions(corpus="", out="")
RULE_NAMES = [rule.name for rule in dataclasses.fields(CleanRules)]

HELP = f"""Turn a corpus of conversations into shards to train on.

CORPUS is a reader ({", ".join(corpus_names())}) or the dotted name of your own module. The folder --out gets
the shards, index.json, the tokenizer, and a data card: card.md and lengths.png.

[bold]Examples[/]

plato2 prepare chitchat --out data/chitchat

plato2 prepare jsonl 'chats/*.jsonl.gz' --out data/chats --policy split --vocab-pieces 8000 --json

plato2 prepare tsv train.tsv --out data/mine --tokenizer data/chitchat/tokenizer --rule max_repeats=off

plato2 prepare hf_datasets DailyDialog/train --reader column=dialog --out data/dailydialog

[bold]Also[/]

plato2 prepare reddit --help: comment trees from dumps of Reddit, on one machine or a Spark cluster

plato2 prepare explain --help: what every cleaning rule says about one message
"""


@app.command(help=HELP)
def prepare(
    corpus: Annotated[str, typer.Argument(help="The reader of the corpus.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    files: Annotated[
        list[str] | None, typer.Argument(help="Paths or globs, local or remote; chitchat needs none.")
    ] = None,
    max_dialogues: Annotated[
        int | None, typer.Option(help="Take only the first so many dialogues, to try something out.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of a tokenizer; else one is trained on this corpus.")
    ] = None,
    vocab_pieces: Annotated[int, typer.Option(help="Pieces of a tokenizer to train.")] = DEFAULT.vocab_pieces,
    character_coverage: Annotated[
        float, typer.Option(help="Share of the characters a trained tokenizer knows.")
    ] = DEFAULT.character_coverage,
    lower_case: Annotated[
        bool | None,
        typer.Option("--lower-case/--keep-case", help="Lower-case all text.", show_default="the tokenizer's"),
    ] = None,
    max_context: Annotated[int, typer.Option(help="Ids of a context.")] = DEFAULT.max_context,
    max_response: Annotated[int, typer.Option(help="Ids of a response.")] = DEFAULT.max_response,
    cut_turn: Annotated[
        bool, typer.Option("--cut-turn", help="Cut a context turn that is too long; else the sample is lost.")
    ] = DEFAULT.cut_turn,
    background: Annotated[
        Background, typer.Option(help="context: persona and knowledge open the context.")
    ] = DEFAULT.background,
    policy: Annotated[
        Policy,
        typer.Option(help="After a turn that fails a rule: a new conversation, nothing, or context only."),
    ] = DEFAULT.policy,
    rule: Annotated[
        list[str] | None,
        typer.Option(help=f"RULE=VALUE or RULE=off; may be repeated. Rules: {', '.join(RULE_NAMES)}."),
    ] = None,
    no_clean: Annotated[bool, typer.Option("--no-clean", help="All cleaning rules off.")] = False,
    reader: Annotated[list[str] | None, typer.Option(help="OPTION=VALUE of the reader.")] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the dialogues, the latest, for validation.")
    ] = DEFAULT.valid_fraction,
    valid_dialogues: Annotated[int | None, typer.Option(help="Their number instead of a share.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the order of the samples.")] = DEFAULT.seed,
    shard_samples: Annotated[int, typer.Option(help="Samples in a shard.")] = DEFAULT.shard_samples,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first broken line; else it is counted.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared corpus at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Run the verb."""
    from plato2.prepare.dialogues import prepare as run  # after the arguments are known to be sound

    options = PrepareOptions(
        corpus=corpus,
        out=out,
        files=files or [],
        reader=dict(pair(text, "reader") for text in reader or []),
        max_dialogues=max_dialogues,
        tokenizer=tokenizer,
        vocab_pieces=vocab_pieces,
        character_coverage=character_coverage,
        lower_case=lower_case,
        max_context=max_context,
        max_response=max_response,
        cut_turn=cut_turn,
        background=background,
        policy=policy,
        clean=parse_rules(rule or [], CleanRules.off() if no_clean else CleanRules()),
        valid_fraction=valid_fraction,
        valid_dialogues=valid_dialogues,
        seed=seed,
        strict=strict,
        force=force,
        shard_samples=shard_samples,
    )
    _print_summary(run(options), as_json)


def _print_summary(folder: Path, as_json: bool) -> None:
    """What came of it: one JSON object, or a few lines."""
    from plato2.data.shards import read_index
    from plato2.prepare.dialogues import summary

    index = read_index(folder)
    facts = index.extra["facts"]
    samples = {name: split.samples for name, split in index.splits.items()}
    if as_json:
        found = {
            "out": str(folder),
            "samples": samples,
            "kept": sum(samples.values()) / facts["counts"]["pairs"],
            "counts": facts["counts"],
            "rules": facts["rules"],
            "skipped": facts["skipped"],
            "notes": facts.get("notes", []),
            "broken_examples": facts["broken_examples"],
            "unread_share": facts["unread_share"],
            "unigram": index.unigram,
            "vocab_size": index.vocab_size,
            "tokenizer_sha256": index.tokenizer_sha256,
        }
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    for line in summary(folder):
        console.print(line, markup=False, soft_wrap=True)


Rules = TypeVar("Rules", bound=CleanRules)


def parse_rules(texts: list[str], rules: Rules) -> Rules:
    """Rules changed by texts such as `max_repeats=50`, `urls=off`, `offensive_words=words.txt`.

    Raises:
        UserError: an unknown rule or a value of the wrong kind.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(rules)}
    values: dict[str, Any] = {}
    for text in texts:
        name, value = pair(text, "rule")
        if name not in kinds:
            raise UserError(f"--rule {text}: there is no rule {name}; {did_you_mean(name, kinds)}")
        kind = kinds[name].split(" ")[0]
        try:
            values[name] = _parse(value, kind)
        except (ValueError, KeyError) as error:
            needed = "on or off" if kind == "bool" else f"{kind} or off"
            raise UserError(f"--rule {text}: the value must be {needed}") from error
    return dataclasses.replace(rules, **values)


def _parse(value: str, kind: str) -> Any:
    if kind == "bool":
        return {"on": True, "true": True, "off": False, "false": False}[value.lower()]
    if value.lower() == "off":
        return None
    return {"int": int, "float": float, "str": str}[kind](value)


def pair(text: str, option: str) -> tuple[str, str]:
    """The two sides of `NAME=VALUE`.

    Raises:
        UserError: the text is not of this form.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"--{option} {text}: must be NAME=VALUE")
    return name, value
