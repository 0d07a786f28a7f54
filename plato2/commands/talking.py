"""The options of the verbs that talk: which models, how they decode, what ranks, what must not be said.

A verb names the options it has, but for those of decoding, which `decodes` gives it; `load_bot` and
`load_safety` take what was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from plato2.config import DecodeConfig, RankConfig, UserError

if TYPE_CHECKING:
    from plato2.talk.bot import PlatoBot
    from plato2.talk.safety import Safety

DEFAULT = DecodeConfig()
MODELS, DECODING, RANKING, SAFETY = "Models", "Decoding", "Ranking", "Safety"
"""Groups of options in `--help`."""

Generation = Annotated[
    Path,
    typer.Option(
        help="Run folder, checkpoint or model folder of stage 2_gen (or 1_coarse).", rich_help_panel=MODELS
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option(
        help="The same of stage 2_eval, which ranks; else log-probability does.", rich_help_panel=MODELS
    ),
]
Backward = Annotated[
    Path | None, typer.Option(help="The same of stage backward, for --rank.", rich_help_panel=MODELS)
]
Device = Annotated[
    str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=MODELS)
]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16, which is faster.", rich_help_panel=MODELS)
]
Decoding = Annotated[
    str, typer.Option(help="top_k or top_p (sampling), or beam (search).", rich_help_panel=DECODING)
]
TopK = Annotated[
    int, typer.Option(help="Sample among the k most probable tokens; 1 = greedy.", rich_help_panel=DECODING)
]
TopP = Annotated[
    float,
    typer.Option(
        help="For top_p: sample among the likeliest tokens that together reach it; 0 = greedy.",
        rich_help_panel=DECODING,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        help="0 to 2: below 1 more probable tokens, above 1 more variety; 0 = greedy.",
        rich_help_panel=DECODING,
    ),
]
BeamSize = Annotated[
    int,
    typer.Option(
        help="For beam: hypotheses of each latent; all become candidates.", rich_help_panel=DECODING
    ),
]
MinTokens = Annotated[int, typer.Option(help="No end before this many tokens.", rich_help_panel=DECODING)]
MaxTokens = Annotated[
    int, typer.Option(help="Longest candidate, the end token included.", rich_help_panel=DECODING)
]
NoRepeat = Annotated[
    int,
    typer.Option(help="Repeat no n tokens of the context or the reply; 0 = off.", rich_help_panel=DECODING),
]
Samples = Annotated[int, typer.Option(help="Candidates for each latent.", rich_help_panel=DECODING)]
Seed = Annotated[
    int,
    typer.Option(help="Another seed, other candidates; the same one, the same.", rich_help_panel=DECODING),
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="coherence, forward, backward, or a weighted sum: coherence=1,backward=0.5.",
        rich_help_panel=RANKING,
    ),
]
SafetyRules = Annotated[
    list[str] | None,
    typer.Option(
        "--safety",
        help="Words that must not be said: a file, or the list en or zh; or a rule of your own, "
        "package.module:rule. May be given several times.",
        rich_help_panel=SAFETY,
    ),
]
SafetyInput = Annotated[
    str, typer.Option(help="What becomes of a bad message: off, warn or block.", rich_help_panel=SAFETY)
]
SafetyOutput = Annotated[
    str, typer.Option(help="What becomes of a bad candidate: off, warn or block.", rich_help_panel=SAFETY)
]


DECODE_OPTIONS: dict[str, Any] = {
    "strategy": Decoding,
    "top_k": TopK,
    "top_p": TopP,
    "temperature": Temperature,
    "beam_size": BeamSize,
    "min_tokens": MinTokens,
    "max_tokens": MaxTokens,
    "no_repeat_ngram": NoRepeat,
    "n_samples": Samples,
    "seed": Seed,
}
"""Fields of `DecodeConfig` that are options; their defaults are its."""


def decodes(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the options of decoding: its argument `decode` gets them as settings, checked.

    An option that the verb has itself, such as a seed of another meaning, stays the verb's.
    """
    own = inspect.signature(verb, eval_str=True).parameters
    added = {name: kind for name, kind in DECODE_OPTIONS.items() if name not in own}

    @functools.wraps(verb)
    def with_options(**given: Any) -> None:
        verb(decode=DecodeConfig(**{name: given.pop(name) for name in added}), **given)

    parameters = []
    for name, parameter in own.items():
        if name != "decode":
            parameters.append(parameter)
            continue
        for option, kind in added.items():  # in its place, for the order of `--help`
            default = getattr(DEFAULT, option)
            parameters.append(inspect.Parameter(option, parameter.kind, default=default, annotation=kind))
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del with_options.__wrapped__  # or its signature would be taken
    return with_options


def load_bot(
    generation: Path,
    evaluation: Path | None,
    decode: DecodeConfig,
    device: str = "auto",
    precision: str = "float32",
    backward: Path | None = None,
    rank: str | None = None,
    safety: Safety | None = None,
) -> PlatoBot:
    """The bot of these options."""
    ranking = RankConfig() if rank is None else RankConfig.parse(rank)
    from plato2.talk.bot import PlatoBot  # after the options are checked: importing torch takes seconds

    return PlatoBot.load(generation, evaluation, device, decode, backward, ranking, safety, precision)


def load_safety(rules: list[str] | None, input: str = "block", output: str = "block") -> Safety | None:
    """The filter of these options; none without a rule.

    Raises:
        UserError: a rule that cannot be read, or a mode that there is not.
    """
    from plato2.talk.safety import Mode, Safety, read_rule

    for option, mode in (("--safety-input", input), ("--safety-output", output)):
        if mode not in get_args(Mode):
            raise UserError(f"{option} {mode}: use {', '.join(get_args(Mode))}")
    if not rules:
        return None
    return Safety([read_rule(rule) for rule in rules], cast(Mode, input), cast(Mode, output))


def say_if_unranked(bot: PlatoBot) -> None:
    """What it means that nothing was given to rank with, or something bad; on stderr, beside the answer."""
    if bot.doubt and (bot.rank_config.weights or {"coherence": 1.0}).get("coherence"):
        typer.echo(bot.doubt, err=True)
    if bot.evaluation is None and bot.rank_config.weights is None:
        typer.echo("no --evaluation: candidates are ranked by log-probability, not by coherence", err=True)
