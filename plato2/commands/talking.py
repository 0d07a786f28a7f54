"""The options of the verbs that talk: which models, how they decode, what ranks, what must not be said.

A verb names the options it has, but for those of decoding, which `decodes` gives it; `load_bot`,
`load_safety` and `load_speaker` take what was given. `fetches_models` lets a verb take the
authors' models by name.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from plato2.commands.options import takes
from plato2.config import SMALL, DecodeConfig, RankConfig, UserError

if TYPE_CHECKING:
    from plato2.talk.bot import PlatoBot
    from plato2.talk.safety import Safety
    from plato2.talk.speaker import Speaker

DEFAULT = DecodeConfig()
TOLD = (
    f"no model given: this is {SMALL}, which comes with plato2, 9 million parameters that have read 4,000 "
    "conversations. It shows how PLATO-2 works, not how well it can talk"
)
"""What is said where `small` is taken."""
MODELS, DECODING, RANKING, SAFETY = "Models", "Decoding", "Ranking", "Safety"
"""Groups of options in `--help`."""
(WEIGHTS,) = (known.metadata for known in fields(RankConfig) if known.name == "weights")
"""What `RankConfig` says of them, for --rank."""

Generation = Annotated[
    Path | None,
    typer.Option(
        help="Run folder, checkpoint or model folder of stage 2_gen (or 1_coarse, plato); or 24L or 32L, the "
        "authors' models; or small, which comes with plato2, the default.",
        rich_help_panel=MODELS,
    ),
]
Model = Annotated[Path | None, typer.Argument(metavar="GENERATION", help="The same as --generation.")]
"""For verbs that are about one model."""
OtherSystem = Annotated[
    str | None,
    typer.Option(
        "--speaker",
        help="Another system instead: dialogpt:FOLDER, blender:FOLDER, hf:FOLDER, openai:URL#MODEL or "
        "log:FILE (docs/speakers.md).",
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
    str,
    typer.Option(
        help="float32; bfloat16, which is faster; int8, which takes less memory on a CPU.",
        rich_help_panel=MODELS,
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(help=WEIGHTS["help"], show_default=WEIGHTS["default_text"], rich_help_panel=RANKING),
]
Yes = Annotated[
    bool,
    typer.Option(
        "--yes",
        help="Fetch 24L or 32L, the authors' models (docs/knover.md), without asking.",
        rich_help_panel=MODELS,
    ),
]
FETCHED = ("model", "generation", "evaluation", "backward", "coarse")
"""Arguments that take models; for the second of two with a 2 at the end."""
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


def fetches_models(verb: Callable[..., None]) -> Callable[..., None]:
    """Lets a verb take 24L or 32L, fetched if need be, wherever it takes a model; gives it `--yes`."""
    own = inspect.signature(verb, eval_str=True).parameters
    models = [name for name in own if name.removesuffix("2") in FETCHED]

    @functools.wraps(verb)
    def with_models(*, yes: bool, **given: Any) -> None:
        for name in models:
            path = given[name]
            several = isinstance(path, list)
            given[name] = [fetched(one, yes) for one in path] if several else fetched(path, yes)
        verb(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in own.values()]
    parameters.append(inspect.Parameter("yes", keyword, default=False, annotation=Yes))
    with_models.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_models.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del with_models.__wrapped__  # or its signature would be taken
    return with_models


def fetched(path: Path | None, yes: bool) -> Path | None:
    """A model's path: for 24L and 32L that of the model folder, which is fetched if it is not there.

    Raises:
        UserError: as `fetch_model`, or it must not be fetched.
    """
    from plato2.weights import released

    if path is None or not released.is_released(path):
        return path
    name = str(path)
    if released.is_fetched(name):
        return released.released_folder(name)
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{name}: not here yet; to fetch it from {released.archive_address(name)} give --yes")
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    from rich.text import Text

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(name)

    def agree(question: str) -> None:
        if not yes and not typer.confirm(question, err=True):
            raise UserError(f"{name}: not fetched; say yes, or give the folder of another model")
        bar.start()

    def progress(done: int, size: int) -> None:
        bar.update(task, completed=done, total=size)

    def say(line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    try:
        return released.fetch_model(name, released.Person(say, agree, progress))
    finally:
        bar.stop()


def one_model(model: Path | None, generation: Path | None, verb: str, purpose: str) -> Path:
    """What was given as argument or as --generation, else `small`.

    Raises:
        UserError: both.
    """
    if model and generation:
        raise UserError(f"give one model to {purpose}: plato2 {verb} DIR, or plato2 {verb} --generation DIR")
    return model or generation or small()


def small() -> Path:
    """The model that comes with plato2, for where none is given; says so on stderr."""
    typer.echo(TOLD, err=True)
    return Path(SMALL)


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


def load_speaker(
    generation: Path | None,
    evaluation: Path | None,
    backward: Path | None,
    other: str | None,
    number: str,
    decode: DecodeConfig,
    device: str = "auto",
    precision: str = "float32",
    rank: str | None = None,
    safety: Safety | None = None,
) -> Speaker:
    """The system of `--generation` and what goes with it, or of `--speaker`.

    Args:
        generation: where its network is.
        evaluation: and the one that ranks.
        backward: and another that ranks.
        other: KIND:WHERE of a system that is not plato2's.
        number: what the names of these options end with, for messages.
        decode: how plato2 finds candidates; the seed is not used.
        device: for both.
        precision: of plato2.
        rank: what plato2 ranks by.
        safety: a filter, for plato2.

    Raises:
        UserError: both, neither, or an option that is for the other one.
    """
    if (generation is None) == (other is None):
        raise UserError(f"give --generation{number} or --speaker{number}, one of the two")
    if other is not None:
        for name, given in (("evaluation", evaluation), ("backward", backward)):
            if given is not None:
                raise UserError(f"--{name}{number} {given}: goes with --generation{number}; leave it out")
        from plato2.evaluate.speakers import read_speaker

        return read_speaker(other, f"--speaker{number}", device)
    assert generation is not None
    bot = load_bot(generation, evaluation, decode, device, precision, backward, rank, safety)
    say_if_unranked(bot)
    from plato2.talk.speaker import PlatoSpeaker

    return PlatoSpeaker(str(generation), bot, decode)


def check_is_plato(decode: DecodeConfig, **others: object) -> None:
    """Refuses what only PLATO-2 has, where it does not take part.

    Args:
        decode: options of decoding; another system takes the seed alone.
        others: further options and their values; None or False = not given.

    Raises:
        UserError: the first that was given.
    """
    given = {field.name: getattr(decode, field.name) for field in fields(decode) if field.name != "seed"}
    changed = {name: value for name, value in given.items() if value != getattr(DEFAULT, name)}
    for name, value in {**changed, **others}.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {value}: holds for --generation; a speaker has its own settings, as in "
                "dialogpt:FOLDER,top_k=5 (docs/speakers.md)"
            )
