"""`plato2 reply`: one answer and the candidates it was chosen from, or a reply to each context of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from plato2.commands.playing import Candidates, check_at_least, check_out, play_missing
from plato2.commands.talking import (
    DEFAULT,
    Backward,
    Device,
    Evaluation,
    Generation,
    OtherSystem,
    Precision,
    Rank,
    SafetyInput,
    SafetyOutput,
    SafetyRules,
    check_is_plato,
    decodes,
    fetches_models,
    load_bot,
    load_safety,
    load_speaker,
    say_if_unranked,
    small,
)
from plato2.config import DecodeConfig, UserError
from plato2.talk.table import candidate_table, printable

if TYPE_CHECKING:
    from plato2.talk.speaker import Speaker

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

CONTEXTS = "Contexts from a file"
HELP = """Answer a message, or a conversation, or each context of a file.

TURNS are what was said so far, oldest first: one argument per turn. A 2_gen model gives one candidate for
each latent z; the evaluation model picks the most coherent one. With --contexts there is one reply for each
context of a file, in the format of self-chat; after an interruption the same command continues.

[bold]Examples[/]

plato2 reply --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN "hi , how are you ?"

plato2 reply --generation RUN --json "do you like music ?" "yes , i play the piano ." "since when ?"

plato2 reply --generation RUN --backward RUN --rank forward=1,backward=0.5 "do you like music ?"

plato2 reply --contexts contexts.tsv --generation RUN --evaluation RUN --out replies.jsonl
"""


@app.command(help=HELP)
@decodes
@fetches_models
def reply(
    turns: Annotated[list[str] | None, typer.Argument(help="The conversation, oldest turn first.")] = None,
    contexts: Annotated[
        Path | None,
        typer.Option(
            help="One context per line: JSON lines (.jsonl) or Knover's .tsv, both with references if there "
            "are any, DailyDialog's multi-reference file, or text. Also .gz.",
            rich_help_panel=CONTEXTS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to append replies to, one JSON object per line.", rich_help_panel=CONTEXTS),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(help="Contexts answered at once; does not change the text.", rich_help_panel=CONTEXTS),
    ] = 16,
    candidates: Candidates = False,
    generation: Generation = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    other: OtherSystem = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    safety: SafetyRules = None,
    safety_input: SafetyInput = "block",
    safety_output: SafetyOutput = "block",
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Run the verb."""
    if bool(turns) == bool(contexts):
        raise UserError("give a message to answer, or --contexts with a file of them")
    if (contexts is None) != (out is None):
        raise UserError("--contexts and --out go together: give both")
    generation = small() if generation is other is None else generation
    if generation is None:
        float32 = precision == "float32"
        check_is_plato(decode, rank=rank, safety=safety, precision=None if float32 else precision)
    checks = load_safety(safety, safety_input, safety_output)
    given = (generation, evaluation, backward, other, "", decode, device, precision, rank, checks)
    if contexts is not None and out is not None:
        check_at_least("--batch", batch, 1)
        check_out(out, contexts, "--contexts")
        of_plato = {"rank": rank, "precision": precision, "candidates": candidates}
        filters = {"safety": [*(safety or []), safety_input, safety_output]} if safety else {}
        reply_to_contexts(
            contexts, out, batch, decode.seed, load_speaker(*given), of_plato | filters, as_json
        )
    elif generation is not None and other is None:
        bot = load_bot(generation, evaluation, decode, device, precision, backward, rank, checks)
        answer = bot.reply(turns or []).to_dict()
        say_if_unranked(bot)
        print_answer(answer, as_json)
    else:
        (said,) = load_speaker(*given).reply_batch([turns or []], [decode.seed])
        if not said.text:
            raise UserError(f"--speaker {other}: found nothing to say")
        print_answer({"reply": said.text, "candidates": list(said.candidates)}, as_json)


def print_answer(answer: dict[str, Any], as_json: bool) -> None:
    """A reply and its candidates; what there is to know about it on stderr."""
    if "warning" in answer:
        typer.echo(f"warning: {answer['warning']}", err=True)
    for flag in answer.get("flags", []):
        typer.echo(f"safety: {flag['side']} {flag['action']}: {flag['rule']}", err=True)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(Text(printable(answer["reply"]), style="bold"), soft_wrap=True)
    if answer["candidates"]:
        console.print(candidate_table(answer["candidates"]))


def reply_to_contexts(
    contexts: Path, out: Path, batch: int, seed: int, speaker: Speaker, given: dict[str, Any], as_json: bool
) -> None:
    """One reply to each context that has none in the file yet."""
    from plato2.talk.self_chat import describe, plan, read_starts, unread_starts

    starts = read_starts(contexts, "--contexts")
    dialogues = plan(starts, [speaker], utterances=None)
    if unread := unread_starts(starts, [speaker]):
        typer.echo(f"warning: {unread}", err=True)
    texts = [[start.turns, start.references] for start in starts]
    about = {
        "settings": {**speaker.settings, "seed": seed},
        **given,
        "contexts": sha256(json.dumps(texts).encode()).hexdigest()[:16],
        **describe([speaker]),
    }
    began = perf_counter()
    n_kept = play_missing(dialogues, [speaker], out, batch, seed, bool(given["candidates"]), about)
    stuck = [dialogue.stuck for dialogue in dialogues[n_kept:]]
    print_summary(out, len(dialogues), stuck, began, as_json)
    if all(stuck) and not n_kept:
        raise UserError(f"--speaker {speaker.name}: found nothing to say to any of {len(stuck)} contexts")


def print_summary(out: Path, n: int, stuck: Sequence[bool], began: float, as_json: bool) -> None:
    """How many contexts were answered, and where the replies are."""
    if any(stuck) and not all(stuck):
        typer.echo(f"warning: nothing was found to say to {sum(stuck)} of {len(stuck)} contexts", err=True)
    if as_json:
        seconds = round(perf_counter() - began, 3)
        summary = {"out": str(out), "contexts": n, "played": len(stuck), "replies": len(stuck) - sum(stuck)}
        typer.echo(json.dumps(summary | {"seconds": seconds}, ensure_ascii=False))
        return
    there = f", {n - len(stuck)} of them from before" if n > len(stuck) else ""
    typer.echo(f"{n} context{'s' * (n > 1)} in {out}{there}")
