"""`plato2 evaluate human report|power|export|import`: what is made of ratings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.config import UserError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="Write the result file, for plato2 report.")]
Drawing = Annotated[Path | None, typer.Option(help="Draw into this image (.png, .svg, .pdf).")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]

REPORT = """Scores, comparisons and agreement of ratings.

A unit (a turn, a dialogue, a pair) has the level that most of its raters gave; of a split such as 0/1/2 the
median, of a pair a tie. Scores are means over units, with 95 % intervals that draw start utterances again.
Raters who fail an attention check are left out, with a count.

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
        to_json,
        write_picture,
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
    result = human_result(checked, inputs(tasks, *ratings), failed_checks, seed)
    if out is not None:
        write_result(out, result)
    if picture is not None:
        write_picture(picture, result, drawing=human_picture(result))
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
