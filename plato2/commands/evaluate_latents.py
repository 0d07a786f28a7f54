"""`plato2 evaluate latents`: what the latents of a model say."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, deliver, watch
from plato2.commands.talking import (
    DEFAULT,
    MODELS,
    Backward,
    Device,
    Evaluation,
    Generation,
    Rank,
    decodes,
    fetches_models,
    load_bot,
    small,
)
from plato2.config import DecodeConfig, UserError, expand_path

if TYPE_CHECKING:
    from plato2.data.examples import Example
    from plato2.evaluate.latents import Heard
    from plato2.model.networks import GenerationNetwork
    from plato2.talk.bot import PlatoBot

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Measure what the latents z of a 2_gen model say, on contexts of a corpus that are not trained on.

How often the candidate of each z is the one that is said; what the posterior knows of a response; how
candidates of different z differ, compared with as many samples of one z and of stage 1; each z's typical
words, questions and length. Where z changes nothing, it says "collapse".

[bold]Examples[/]

plato2 evaluate latents --generation outputs/tiny-2_gen/RUN --data data/chitchat

plato2 evaluate latents --generation outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN
--coarse outputs/tiny-1_coarse/RUN --data data/chitchat --picture latents.png --out latents.json
"""


@app.command(help=HELP)
@decodes
@takes(ResultOptions)
@fetches_models
def latents(
    *,
    data: Annotated[str, typer.Option(help="The prepared corpus of the model, local or remote.")],
    generation: Generation = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    coarse: Annotated[
        Path | None,
        typer.Option(
            help="Run, checkpoint or model folder of stage 1_coarse, to compare with.", rich_help_panel=MODELS
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test or valid: where the contexts are from; default: test where the corpus has it."
        ),
    ] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts to answer.")] = 100,
    decode: DecodeConfig = DEFAULT,
    rank: Rank = None,
    device: Device = "auto",
    scores: Annotated[
        Path | None,
        typer.Option(help="File to keep what is found of each context in; the same command continues there."),
    ] = None,
    to: ResultOptions,
) -> None:
    """Run the verb."""
    # After the options are checked: importing torch takes seconds.
    from plato2.data.examples import split_to_measure
    from plato2.data.shards import read_index
    from plato2.evaluate.latents import audit, latents_picture, print_latents
    from plato2.evaluate.results import inputs
    from plato2.talk.bot import pick_device
    from plato2.weights.folder import has_recognition, load_generation, saved_tokenizer

    data = expand_path(data, "--data")
    read_index(data, "--data ")  # says that there is none before a model is loaded
    split = split_to_measure(data, split)
    generation = generation or small()
    bot = load_bot(generation, evaluation, decode, device, backward=backward, rank=rank)
    if bot.generation.recognition is None:
        raise UserError(
            f"--generation {generation}: a stage-1 model, which has no latents; give one of 2_gen"
        )
    if coarse is not None and saved_tokenizer(coarse).sha256 != bot.tokenizer.sha256:
        raise UserError(
            f"--coarse {coarse}: trained with another tokenizer than --generation {generation}; give runs of "
            "one curriculum"
        )
    examples = contexts_of(data, bot, contexts, split)
    where = pick_device(device)
    base = cast("GenerationNetwork", bot.generation)
    stage_1 = None if coarse is None else load_generation(coarse, "--coarse", beside=base).to(where)
    full = None
    if has_recognition(generation):
        full = load_generation(generation, "--generation", True, base).to(where)
    heard = all_heard(bot, examples, stage_1, full, scores)
    result = audit(str(generation), heard, decode.seed)
    result.inputs = inputs(*(path for path in (generation, evaluation, backward, coarse, data) if path))
    result.settings = {
        "split": split,
        "contexts": len(examples),
        "rank": rank,
        "decode": asdict(bot.decode_config),
    }
    deliver(result, to, latents_picture, partial(print_latents, console=Console(highlight=False)))


def contexts_of(data: str, bot: PlatoBot, n: int, split: str) -> list[Example]:
    """The first contexts of a split that the model has room for.

    Raises:
        UserError: there are none.
    """
    from plato2.data.examples import read_examples

    examples = read_examples(data, bot.tokenizer, n, split, max_context=bot.max_context)
    if not examples:
        raise UserError(
            f"--data {data}: no {split} context has at most {bot.max_context} tokens, half of the model's "
            "positions; give another corpus"
        )
    return examples


def all_heard(
    bot: PlatoBot,
    examples: list[Example],
    coarse: GenerationNetwork | None,
    recognition: GenerationNetwork | None,
    path: Path | None,
) -> list[Heard]:
    """What the latents do with all contexts, those decoded that are not in the file yet; with a bar."""
    from plato2.evaluate.kept import continued
    from plato2.evaluate.latents import Heard, hear
    from plato2.talk.speaker import PlatoSpeaker, weights_hash

    models = PlatoSpeaker("", bot, bot.decode_config).describe()
    models |= {name: weights_hash(one) for name, one in (("coarse", coarse), ("full", recognition)) if one}
    about = {
        "models": models,
        "contexts": sha256(repr(examples).encode("utf-8", "surrogatepass")).hexdigest(),
        "decode": asdict(bot.decode_config),
        "rank": asdict(bot.rank_config),
    }
    heard = continued(path, about, Heard, lambda first: hear(bot, examples, coarse, recognition, first))
    return list(watch(heard, "contexts", len(examples)))
