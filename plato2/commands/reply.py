"""`plato2 reply`: one answer, and the candidates it was chosen from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.text import Text

from plato2.config import DecodeConfig, Strategy

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
DEFAULT = DecodeConfig()

Generation = Annotated[
    Path, typer.Option(help="Run folder, checkpoint or model folder of stage 2_gen (or 1_coarse).")
]
Evaluation = Annotated[
    Path | None, typer.Option(help="The same of stage 2_eval, which ranks; else log-probability does.")
]
Decoding = Annotated[str, typer.Option(help="top_k or top_p (sampling), or beam (search).")]
TopK = Annotated[int, typer.Option(help="Sample among the k most probable tokens; 1 = greedy.")]
TopP = Annotated[
    float, typer.Option(help="For top_p: sample among the likeliest tokens that together reach it.")
]
Temperature = Annotated[float, typer.Option(help="Below 1 more probable tokens, above 1 more variety.")]
BeamSize = Annotated[int, typer.Option(help="For beam: hypotheses of each latent; all become candidates.")]
MinTokens = Annotated[int, typer.Option(help="No end before this many tokens.")]
NoRepeat = Annotated[int, typer.Option(help="Repeat no n tokens of the context or the reply; 0 = off.")]
Samples = Annotated[int, typer.Option(help="Candidates for each latent.")]
MaxTokens = Annotated[int, typer.Option(help="Longest candidate, the end token included.")]
Seed = Annotated[int, typer.Option(help="Another seed, other candidates; the same one, the same.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")]

HELP = """Answer a message, or a conversation.

TURNS are what was said so far, oldest first: one argument a turn. A 2_gen model gives one candidate for each
latent z; the evaluation model picks the most coherent one.

[bold]Examples[/]

plato2 reply --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN "hi , how are you ?"

plato2 reply --generation RUN --json "do you like music ?" "yes , i play the piano ." "since when ?"
"""


@app.command(help=HELP)
def reply(
    turns: Annotated[list[str], typer.Argument(help="The conversation, oldest turn first.")],
    generation: Generation,
    evaluation: Evaluation = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strategy: Decoding = DEFAULT.strategy,
    top_k: TopK = DEFAULT.top_k,
    top_p: TopP = DEFAULT.top_p,
    temperature: Temperature = DEFAULT.temperature,
    beam_size: BeamSize = DEFAULT.beam_size,
    min_tokens: MinTokens = DEFAULT.min_tokens,
    max_tokens: MaxTokens = DEFAULT.max_tokens,
    no_repeat_ngram: NoRepeat = DEFAULT.no_repeat_ngram,
    n_samples: Samples = DEFAULT.n_samples,
    seed: Seed = DEFAULT.seed,
    device: Device = "auto",
) -> None:
    """Run the verb."""
    from plato2.talk.bot import PlatoBot  # after the options are checked: importing torch takes seconds
    from plato2.talk.table import candidate_table

    decode = DecodeConfig(
        strategy=cast(Strategy, strategy),  # which checks itself
        top_k=top_k,
        top_p=top_p,
        beam_size=beam_size,
        temperature=temperature,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        no_repeat_ngram=no_repeat_ngram,
        n_samples=n_samples,
        seed=seed,
    )
    bot = PlatoBot.load(generation, evaluation, device, decode)
    answer = bot.reply(turns).to_dict()
    if bot.evaluation is None:
        say_unranked()
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(Text(answer["reply"], style="bold"), soft_wrap=True)
    console.print(candidate_table(answer["candidates"]))


def say_unranked() -> None:
    """What it means that there is no evaluation model; on stderr, beside the answer."""
    typer.echo("no --evaluation: candidates are ranked by log-probability, not by coherence", err=True)
