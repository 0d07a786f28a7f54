"""The options of the verbs that talk: which models, how they decode, what ranks, what must not be said.

A verb names the options it has, but for those of decoding, which `decodes` gives it; `load_bot` and
`load_safety` take what was given.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from plato2.commands.options import takes
from plato2.config import DecodeConfig, RankConfig, UserError

if TYPE_CHECKING:
    from plato2.talk.bot import PlatoBot
    from plato2.talk.safety import Safety

DEFAULT = DecodeConfig()
MODELS, DECODING, RANKING, SAFETY = "Models", "Decoding", "Ranking", "Safety"
"""Groups of options in `--help`."""
(WEIGHTS,) = (known.metadata for known in fields(RankConfig) if known.name == "weights")
"""What `RankConfig` says of them, for --rank."""

Generation = Annotated[
    Path,
    typer.Option(
        help="Run folder, checkpoint or model folder of stage 2_gen (or 1_coarse, plato).",
        rich_help_panel=MODELS,
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option(
        help="The same for stage 2_eval, to rank by; default: what --generation has, else log-probability.",
        rich_help_panel=MODELS,
    ),
]
Backward = Annotated[
    Path | None, typer.Option(help="The same for stage backward, for --rank.", rich_help_panel=MODELS)
]
Device = Annotated[
    str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=MODELS)
]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16, which is faster.", rich_help_panel=MODELS)
]
Rank = Annotated[
    str | None,
    typer.Option(help=WEIGHTS["help"], show_default=WEIGHTS["default_text"], rich_help_panel=RANKING),
]
SafetyRules = Annotated[
    list[str] | None,
    typer.Option(
        "--safety",
        help="Words that must not be said: a file, or the list en or zh; or a rule of your own, "
        "package.module:rule. May be repeated.",
        rich_help_panel=SAFETY,
    ),
]
SafetyInput = Annotated[
    str, typer.Option(help="What to do with a bad message: off, warn or block.", rich_help_panel=SAFETY)
]
SafetyOutput = Annotated[
    str, typer.Option(help="What to do with a bad candidate: off, warn or block.", rich_help_panel=SAFETY)
]

decodes = takes(DecodeConfig, leave_out=("length_penalty", "n_candidates", "stop"), panel=DECODING)
"""Gives a verb the options of decoding: its argument `decode` gets them as settings, checked."""


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
        UserError: a rule that cannot be read, or an unknown mode.
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
