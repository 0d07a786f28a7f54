"""`plato2 evaluate human report|power|convert|import`: what is made of ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, check_outputs, deliver
from plato2.config import UserError

if TYPE_CHECKING:
    from plato2.evaluate.human.power import Variances
    from plato2.evaluate.results import Result

Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]

REPORT = """Scores, comparisons and agreement of ratings.

A unit (a turn, a dialogue, a pair) has the level that most of its raters gave; of a split such as 0/1/2 the
median, of a pair a tie. Scores are means over units, with 95 % intervals that draw start utterances again.
Raters who fail an attention check are left out, with a count. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate human report tasks.json ratings.jsonl

plato2 evaluate human report tasks.json ratings.jsonl --out human.json --picture human.png
"""


@takes(ResultOptions)
def report(
    *,
    tasks: Annotated[Path, typer.Argument(help="What was rated, of plato2 evaluate human make.")],
    ratings: Annotated[list[Path], typer.Argument(help="Ratings, JSON lines; all files count.")],
    failed_checks: Annotated[int, typer.Option(help="Attention checks that a rater may fail.")] = 0,
    seed: Seed = 0,
    to: ResultOptions,
) -> None:
    """Run `report`."""
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import check_ratings, read_ratings, told
    from plato2.evaluate.human.report import human_picture, human_result
    from plato2.evaluate.results import inputs

    for option, value in (("--failed-checks", failed_checks), ("--seed", seed)):
        if value < 0:
            raise UserError(f"{option} {value}: must be at least 0")
    check_outputs({"--out": to.out, "--picture": to.picture}, [tasks, *ratings])
    checked = check_ratings(read_tasks(tasks), read_ratings(ratings), failed_checks)
    if not checked.rated:
        raise UserError(
            f"{', '.join(map(str, ratings))}: no rating counts ({'; '.join(told(checked.counts))}); "
            "see --failed-checks"
        )
    with needs("eval", "evaluate human"):
        result = human_result(checked, inputs(tasks, *ratings), failed_checks, seed)
    deliver(result, to, human_picture, partial(_show_ratings, counts=checked.counts))


def _show_ratings(result: Result, counts: dict[str, int]) -> None:
    """Scores, agreement, comparisons, and how many ratings count."""
    from plato2.evaluate.human.ratings import told
    from plato2.evaluate.human.report import agreement_table, comparison_table
    from plato2.evaluate.results import print_table, result_table

    console = Console(highlight=False)
    if result.measures:
        print_table(result_table(result, "human ratings (majority of raters, 95 % interval)"), console)
    print_table(agreement_table(result), console)
    if result.details["comparisons"]:
        print_table(comparison_table(result), console)
    console.print(f"{counts['used']} ratings of {counts['raters'] - counts['raters_excluded']} raters count")
    for line in told(counts):
        console.print(line)


POWER = """How many items and raters show which difference.

Of presets with scores (plato, ssa, candidates, chat): how many cases of each system show a difference of
their mean scores in a t-test; a case is a start utterance with all that follows. Of pairs (topic, acute): how
many pairs show, in a sign test, that raters prefer one system. Variances of scores are those of FED's raters,
or of --tasks and --ratings of your own.

[bold]Examples[/]

plato2 evaluate human power --items 200

plato2 evaluate human power --preset acute --difference 0.55 --difference 0.6 --rater 3
"""
DIFFERENCES = (0.05, 0.1, 0.15, 0.2, 0.3)
SHARES = (0.55, 0.6, 0.65, 0.7, 0.8)
RATERS = (1, 2, 3, 5)


@dataclass(frozen=True)
class PowerOptions:
    """What is to be found, by how many; checks itself.

    Raises:
        UserError: an unknown preset, an impossible value, or one of two files that belong together.
    """

    preset: Annotated[str, typer.Option(help="Of plato2 evaluate human make.")] = "plato"
    difference: Annotated[
        list[float] | None,
        typer.Option(
            help="Of mean scores; of pairs how often a rater prefers the better system. May be repeated.",
            show_default="0.05 to 0.3; 0.55 to 0.8 of pairs",
        ),
    ] = None
    rater: Annotated[
        list[int] | None,
        typer.Option(help="Raters of each item. May be repeated.", show_default="1, 2, 3, 5"),
    ] = None
    items: Annotated[
        int | None, typer.Option(help="Say which difference so many cases of each system, or pairs, show.")
    ] = None
    power: Annotated[float, typer.Option(help="How often the difference is to be found.")] = 0.8
    alpha: Annotated[float, typer.Option(help="Level of the test, two-sided.")] = 0.05
    agreement: Annotated[
        float, typer.Option(help="Of pairs: correlation of two raters; default: the paper's kappa.")
    ] = 0.466
    ties: Annotated[float, typer.Option(help="Of pairs: share that ends as a tie.")] = 0.0
    tasks: Annotated[Path | None, typer.Option(help="Tasks that were rated before.")] = None
    ratings: Annotated[Path | None, typer.Option(help="Their ratings, which give the variances.")] = None
    question: Annotated[str | None, typer.Option(help="Whose variances; default: the first.")] = None

    def __post_init__(self) -> None:
        """Checks the values."""
        from plato2.evaluate.human.power import PAIRS, TOP_SCORE

        if self.preset not in (*TOP_SCORE, *PAIRS):
            raise UserError(f"--preset {self.preset}: there are {', '.join([*TOP_SCORE, *PAIRS])}")
        least, most = (0.5, 1.0) if self.is_pairs else (0.0, float(TOP_SCORE[self.preset]))
        for option, value, low, high in (
            *(("--difference", value, least, most) for value in self.differences()),
            *(("--rater", value, 0, 101) for value in self.rater or RATERS),
            ("--items", 2 if self.items is None else self.items, 1, 1e9),
            ("--power", self.power, self.alpha, 1),
            ("--alpha", self.alpha, 0, 1),
            ("--agreement", self.agreement, -1e-9, 1),
            ("--ties", self.ties, -1e-9, 1),
        ):
            if not low < value < high:
                raise UserError(f"{option} {value}: must be between {max(low, 0):g} and {high:g}")
        if (self.tasks is None) != (self.ratings is None):
            raise UserError("--tasks and --ratings: give both, or none")

    @property
    def is_pairs(self) -> bool:
        """Whether raters choose one of two."""
        from plato2.evaluate.human.power import PAIRS

        return self.preset in PAIRS

    def differences(self) -> Sequence[float]:
        """Those given, else the preset's."""
        return self.difference or (SHARES if self.is_pairs else DIFFERENCES)

    def variances(self) -> tuple[str, Variances]:
        """Of scores, and where they are from: FED's raters, scaled to the preset's scores, or its ratings.

        Raises:
            UserError: ratings that cannot be read, or too few of them.
        """
        from plato2.evaluate.human.formats import read_tasks
        from plato2.evaluate.human.power import TOP_SCORE, Variances, measured
        from plato2.evaluate.human.ratings import check_ratings, read_ratings

        if self.tasks is None or self.ratings is None or self.is_pairs:
            scale = (TOP_SCORE.get(self.preset, 2) / 2) ** 2
            return "as FED's raters", Variances(Variances().case * scale, Variances().rater * scale)
        checked = check_ratings(read_tasks(self.tasks), read_ratings([self.ratings]))
        question, variances = measured(checked, self.question)
        return f"measured, {question}", variances


@takes(PowerOptions)
@takes(ResultOptions)
def power(*, options: PowerOptions, to: ResultOptions) -> None:
    """Run `power`."""
    from plato2.evaluate.human.power import power_result
    from plato2.evaluate.results import inputs, picture, print_table, result_table

    source, variances = options.variances()
    with needs("eval", "evaluate human"):
        result = power_result(
            options.preset,
            options.differences(),
            options.rater or RATERS,
            variances,
            options.items,
            options.power,
            options.alpha,
            options.agreement,
            options.ties,
        )
    result.inputs.extend(inputs(*(path for path in (options.tasks, options.ratings) if path is not None)))

    def show(result: Result) -> None:
        console = Console(highlight=False)
        what = "pairs" if options.is_pairs else "cases of each system"
        settings = f"power {options.power:g}, alpha {options.alpha:g}"
        print_table(result_table(result, f"{options.preset}: {what} needed ({settings})"), console)
        if options.is_pairs:
            ties = f"{100 * options.ties:g} % of the pairs are ties"
            console.print(f"two raters of a pair correlate by {options.agreement:g}; {ties}")
        else:
            of = f"{variances.case:.3f} of cases, {variances.rater:.3f} of a rater"
            console.print(f"variance {of} ({source})")

    deliver(result, to, picture, show)


CONVERT = """Tasks and ratings in the format of another tool.

csv: a table of ratings. acute: of tasks with pairs, pairings.jsonl of ACUTE-Eval (ParlAI); with RATINGS the
table of its analysis instead. potato: a folder with a project for Potato for each kind of question, and the
answers of RATINGS in it.

[bold]Examples[/]

plato2 evaluate human convert tasks.json ratings.jsonl --to csv --out ratings.csv

plato2 evaluate human convert tasks.json --to potato --out potato
"""


def convert(
    tasks: Annotated[Path, typer.Argument(help="Tasks, of plato2 evaluate human make.")],
    ratings: Annotated[list[Path] | None, typer.Argument(help="Their ratings.")] = None,
    *,
    to: Annotated[str, typer.Option(help="csv, acute or potato.")],
    out: Annotated[Path, typer.Option(help="File to write; of potato a folder.")],
) -> None:
    """Run `convert`."""
    from plato2.evaluate.human.exchange import (
        to_acute,
        to_acute_table,
        to_csv,
        to_potato,
        to_potato_answers,
    )
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import read_ratings
    from plato2.evaluate.results import write_text

    known = read_tasks(tasks)
    if to not in ("csv", "acute", "potato"):
        raise UserError(f"--to {to}: there are csv, acute, potato")
    if to != "potato":
        check_outputs({"--out": out}, [tasks, *(ratings or [])])
    if to == "csv" and not ratings:
        raise UserError("--to csv: give RATINGS, too")
    given = read_ratings(ratings) if ratings else []
    if to == "potato":
        to_potato_answers(known, given, out)
        for path in to_potato(known, out):
            typer.echo(f"potato start {path}")
        return
    if to == "csv":
        table = to_csv(known, given)
    else:
        table = to_acute_table(known, given) if given else to_acute(known)
    write_text(out, table)
    typer.echo(f"written: {out}")


IMPORT = """Tasks and ratings from the format of another tool.

acute: a pairings.jsonl becomes tasks; a table (.csv) with the columns of ACUTE-Eval's analysis, worker,
winner and pairing_id, becomes ratings. potato: the folder of its answers. csv: a table with the columns item,
question, rater, value, and place where turns are rated. Ratings are held against --tasks.

[bold]Examples[/]

plato2 evaluate human import pairings.jsonl --from acute --out tasks.json

plato2 evaluate human import annotation_output --from potato --tasks tasks.json --out ratings.jsonl
"""


def import_(
    file: Annotated[Path, typer.Argument(help="What the other tool wrote; of potato a folder.")],
    source: Annotated[str, typer.Option("--from", help="csv, acute or potato.")],
    out: Annotated[Path, typer.Option(help="File to write: tasks (.json) or ratings (.jsonl).")],
    tasks: Annotated[Path | None, typer.Option(help="The tasks that were rated.")] = None,
    question: Annotated[str | None, typer.Option(help="What raters of an ACUTE-Eval were asked.")] = None,
) -> None:
    """Run `import`."""
    from plato2.evaluate.human.exchange import (
        ACUTE_QUESTION,
        acute_tasks,
        from_acute,
        from_csv,
        from_potato,
    )
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import check_ratings, told
    from plato2.evaluate.results import write_text

    if source not in ("csv", "acute", "potato"):
        raise UserError(f"--from {source}: there are csv, acute, potato")
    check_outputs({"--out": out}, [file, tasks])
    if source == "acute" and file.suffix != ".csv":
        made = acute_tasks(file, question or ACUTE_QUESTION)
        write_text(out, made.model_dump_json(indent=1) + "\n")
        typer.echo(f"written: {out}, {len(made.items)} pairs")
        return
    if tasks is None:
        raise UserError(f"--from {source}: give --tasks, what was rated")
    known = read_tasks(tasks)
    readers = {"csv": lambda: from_csv(file), "potato": lambda: from_potato(file, known)}
    ratings = readers.get(source, lambda: from_acute(file, known))()
    if not ratings:
        raise UserError(f"{file}: no rating in it; give the file that {source} wrote after rating")
    checked = check_ratings(known, ratings)
    write_text(out, "".join(rating.model_dump_json() + "\n" for rating in ratings))
    typer.echo(f"written: {out}, {len(ratings)} ratings of {checked.counts['raters']} raters")
    for line in told(checked.counts):
        typer.echo(line)
