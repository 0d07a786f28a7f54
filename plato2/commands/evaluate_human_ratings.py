"""`plato2 evaluate human report|power|convert|import`: what is made of ratings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.config import UserError, install

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="Write the result file, for plato2 report.")]
Drawing = Annotated[Path | None, typer.Option(help="Draw into this image (.png, .svg, .pdf).")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]

REPORT = """Scores, comparisons and agreement of ratings.

A unit (a turn, a dialogue, a pair) has the level that most of its raters gave; of a split such as 0/1/2 the
median, of a pair a tie. Scores are means over units, with 95 % intervals that draw start utterances again.
Raters who fail an attention check are left out, with a count. Needs pip install '.\\[eval]'.

[bold]Examples[/]

plato2 evaluate human report tasks.json ratings.jsonl

plato2 evaluate human report tasks.json ratings.jsonl --out human.json --picture human.png
"""


def report(
    tasks: Annotated[Path, typer.Argument(help="What was rated, of plato2 evaluate human make.")],
    ratings: Annotated[list[Path], typer.Argument(help="Ratings, JSON lines; all files count.")],
    failed_checks: Annotated[int, typer.Option(help="Attention checks that a rater may fail.")] = 0,
    seed: Seed = 0,
    out: Out = None,
    picture: Drawing = None,
    as_json: AsJson = False,
) -> None:
    """Run `report`."""
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import check_ratings, read_ratings, told
    from plato2.evaluate.human.report import agreement_table, comparison_table, human_picture, human_result
    from plato2.evaluate.results import (
        check_picture,
        inputs,
        result_table,
        save_picture,
        to_json,
        write_result,
    )

    for option, value in (("--failed-checks", failed_checks), ("--seed", seed)):
        if value < 0:
            raise UserError(f"{option} {value}: must be at least 0")
    check_picture(picture)
    checked = check_ratings(read_tasks(tasks), read_ratings(ratings), failed_checks)
    if not checked.rated:
        raise UserError(
            f"{', '.join(map(str, ratings))}: no rating counts ({'; '.join(told(checked.counts))}); "
            "see --failed-checks"
        )
    with the_extra():
        result = human_result(checked, inputs(tasks, *ratings), failed_checks, seed)
    if out is not None:
        write_result(out, result)
    if picture is not None:
        save_picture(picture, human_picture(result))
    if as_json:
        typer.echo(to_json(result))
        return
    counts = checked.counts
    console = Console(highlight=False)
    if result.measures:
        console.print(result_table(result, "human ratings (majority of raters, 95 % interval)"))
    console.print(agreement_table(result))
    if result.details["comparisons"]:
        console.print(comparison_table(result))
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


def power(
    preset: Annotated[str, typer.Option(help="Of plato2 evaluate human make.")] = "plato",
    difference: Annotated[
        list[float] | None,
        typer.Option(
            help="Of mean scores; of pairs how often a rater prefers the better system. May be repeated.",
            show_default="0.05 to 0.3; 0.55 to 0.8 of pairs",
        ),
    ] = None,
    rater: Annotated[
        list[int] | None,
        typer.Option(help="Raters of each item. May be repeated.", show_default="1, 2, 3, 5"),
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Say which difference so many cases of each system, or pairs, show.")
    ] = None,
    wanted: Annotated[float, typer.Option("--power", help="How often the difference is to be found.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="Level of the test, two-sided.")] = 0.05,
    agreement: Annotated[
        float, typer.Option(help="Of pairs: correlation of two raters; default: the paper's kappa.")
    ] = 0.466,
    ties: Annotated[float, typer.Option(help="Of pairs: share that ends as a tie.")] = 0.0,
    tasks: Annotated[Path | None, typer.Option(help="Tasks that were rated before.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Their ratings, which give the variances.")] = None,
    question: Annotated[str | None, typer.Option(help="Whose variances; default: the first.")] = None,
    out: Out = None,
    picture: Drawing = None,
    as_json: AsJson = False,
) -> None:
    """Run `power`."""
    from plato2.evaluate.human.power import PAIRS, TOP_SCORE, Variances, measured, power_result
    from plato2.evaluate.results import (
        check_picture,
        inputs,
        result_table,
        to_json,
        write_picture,
        write_result,
    )

    is_pairs = preset in PAIRS
    if not is_pairs and preset not in TOP_SCORE:
        raise UserError(f"--preset {preset}: there are {', '.join([*TOP_SCORE, *PAIRS])}")
    differences = difference or (SHARES if is_pairs else DIFFERENCES)
    raters = rater or [1, 2, 3, 5]
    least, most = (0.5, 1.0) if is_pairs else (0.0, float(TOP_SCORE[preset]))
    for option, value, low, high in (
        *(("--difference", value, least, most) for value in differences),
        *(("--rater", value, 0, 101) for value in raters),
        ("--items", 2 if items is None else items, 1, 1e9),
        ("--power", wanted, alpha, 1),
        ("--alpha", alpha, 0, 1),
        ("--agreement", agreement, -1e-9, 1),
        ("--ties", ties, -1e-9, 1),
    ):
        if not low < value < high:
            raise UserError(f"{option} {value}: must be between {max(low, 0):g} and {high:g}")
    if (tasks is None) != (ratings is None):
        raise UserError("--tasks and --ratings: give both, or none")
    check_picture(picture)
    scale = (TOP_SCORE.get(preset, 2) / 2) ** 2
    variances = Variances(Variances().case * scale, Variances().rater * scale)
    if tasks is not None and ratings is not None and not is_pairs:
        from plato2.evaluate.human.formats import read_tasks
        from plato2.evaluate.human.ratings import check_ratings, read_ratings

        question, variances = measured(check_ratings(read_tasks(tasks), read_ratings([ratings])), question)
    with the_extra():
        result = power_result(preset, differences, raters, variances, items, wanted, alpha, agreement, ties)
    result.inputs.extend(inputs(*(path for path in (tasks, ratings) if path is not None)))
    if out is not None:
        write_result(out, result)
    if picture is not None:
        write_picture(picture, result)
    if as_json:
        typer.echo(to_json(result))
        return
    console = Console(highlight=False)
    what = "pairs" if is_pairs else "cases of each system"
    console.print(result_table(result, f"{preset}: {what} needed (power {wanted:g}, alpha {alpha:g})"))
    if is_pairs:
        console.print(
            f"two raters of a pair correlate by {agreement:g}; {100 * ties:g} % of the pairs are ties"
        )
    else:
        of = f"measured, {question}" if tasks else "as FED's raters"
        console.print(f"variance {variances.case:.3f} of cases, {variances.rater:.3f} of a rater ({of})")


CONVERT = """Tasks and ratings in the format of another tool.

csv: a table of ratings. acute: pairings.jsonl of ACUTE-Eval (ParlAI), of tasks with pairs. potato: a folder
with a project for Potato for each kind of question.

[bold]Examples[/]

plato2 evaluate human convert tasks.json ratings.jsonl --to csv --out ratings.csv

plato2 evaluate human convert tasks.json --to potato --out potato
"""


def convert(
    tasks: Annotated[Path, typer.Argument(help="Tasks, of plato2 evaluate human make.")],
    ratings: Annotated[list[Path] | None, typer.Argument(help="Their ratings; for csv.")] = None,
    *,
    to: Annotated[str, typer.Option(help="csv, acute or potato.")],
    out: Annotated[Path, typer.Option(help="File to write; of potato a folder.")],
) -> None:
    """Run `convert`."""
    from plato2.evaluate.human.exchange import to_acute, to_csv, to_potato
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import read_ratings

    known = read_tasks(tasks)
    if to not in ("csv", "acute", "potato"):
        raise UserError(f"--to {to}: there are csv, acute, potato")
    if (to == "csv") != bool(ratings):
        raise UserError(
            f"--to {to}: {'give RATINGS, too' if to == 'csv' else 'takes tasks only, no RATINGS'}"
        )
    if to == "potato":
        for path in to_potato(known, out):
            typer.echo(f"potato start {path}")
        return
    _write(out, to_csv(known, read_ratings(ratings or [])) if to == "csv" else to_acute(known))
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

    if source not in ("csv", "acute", "potato"):
        raise UserError(f"--from {source}: there are csv, acute, potato")
    if source == "acute" and file.suffix != ".csv":
        made = acute_tasks(file, question or ACUTE_QUESTION)
        _write(out, made.model_dump_json(indent=1) + "\n")
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
    _write(out, "".join(rating.model_dump_json() + "\n" for rating in ratings))
    typer.echo(f"written: {out}, {len(ratings)} ratings of {checked.counts['raters']} raters")
    for line in told(checked.counts):
        typer.echo(line)


@contextmanager
def the_extra() -> Iterator[None]:
    """What needs the extra `eval`, and says so where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"plato2 evaluate human needs {error.name}: {install('eval')}") from None


def _write(out: Path, text: str) -> None:
    from plato2.files import replace_text

    try:
        replace_text(out, text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
