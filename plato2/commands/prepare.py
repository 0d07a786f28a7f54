"""`plato2 prepare`: a corpus to shards, index, tokenizer and data card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from plato2.commands.options import pair, takes
from plato2.config import UserError, did_you_mean
from plato2.prepare.clean import CleanRules
from plato2.prepare.corpora import corpus_names
from plato2.prepare.options import PrepareOptions

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

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


def rule_help(rules: type[CleanRules]) -> str:
    """The help of --rule."""
    names = ", ".join(rule.name for rule in dataclasses.fields(rules))
    return f"RULE=VALUE or RULE=off; may be repeated. Rules: {names}."


NoClean = Annotated[bool, typer.Option("--no-clean", help="Turn all cleaning rules off.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command(help=HELP)
@takes(
    PrepareOptions,
    leave_out=["clean"],
    arguments=["corpus", "files"],
    flags={"lower_case": "--lower-case/--keep-case"},
)
def prepare(
    options: PrepareOptions,
    rule: Annotated[list[str] | None, typer.Option(help=rule_help(CleanRules))] = None,
    no_clean: NoClean = False,
    as_json: AsJson = False,
) -> None:
    """Run the verb."""
    from plato2.prepare.dialogues import prepare as run  # after the arguments are known to be valid

    options.clean = parse_rules(rule or [], CleanRules.off() if no_clean else CleanRules())
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
            "removed": facts.get("removed", []),
            "repeated": facts.get("repeated", {}),
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
