"""`plato2 evaluate judge`: an LLM compares systems, and is put to the test itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.results import ResultOptions, check_outputs, deliver
from plato2.config import UserError, did_you_mean
from plato2.evaluate.endpoint import EndpointConfig

if TYPE_CHECKING:
    from plato2.evaluate.endpoint import Answers
    from plato2.evaluate.human.formats import Rating
    from plato2.evaluate.judge import Match, Outcome
    from plato2.evaluate.judge_controls import Control
    from plato2.evaluate.results import Result

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

HELP = """Let an LLM compare systems side by side, if it can be believed.

FILES hold dialogues (or replies) of two systems or more that began alike. Each pair is asked about in both
orders; two verdicts that contradict each other are a tie. First the judge is put to the test: it must prefer
dialogues between people to shuffled ones and, with --ratings, agree with people as they do with each other.
A judge that fails has no table. All answers are kept in --answers: the same command continues.

[bold]Examples[/]

plato2 evaluate judge a.jsonl b.jsonl --url http://127.0.0.1:8000/v1 --model judge --out judge.json

plato2 evaluate judge a.jsonl b.jsonl --url https://api.openai.com/v1 --model MODEL --question humanness
--tasks tasks.json --ratings ratings.jsonl
"""


@dataclass(frozen=True)
class JudgeOptions:
    """What is compared and with what the judge is put to the test; checks itself."""

    question: Annotated[str, typer.Option(help="engagingness, humanness, coherence or informativeness.")] = (
        "engagingness"
    )
    speaker: Annotated[
        str, typer.Option(help="Judge only this speaker where a system plays both sides; both: judge all.")
    ] = "B"
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of each two systems; default: all.")] = None
    controls: Annotated[int, typer.Option(min=8, help="Dialogues between people in the first control.")] = 24
    human: Annotated[
        Path | None,
        typer.Option(help="Dialogues between people; default: those of the package chitchat-dataset."),
    ] = None
    tasks: Annotated[Path | None, typer.Option(help="Pairs that people voted on, with --ratings.")] = None
    ratings: Annotated[Path | None, typer.Option(help="Their votes.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Of choices and of the order of verdicts.")] = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: an unknown question, or one of two files that belong together.
        """
        from plato2.evaluate.human.questions import SIDE_BY_SIDE

        if self.question not in SIDE_BY_SIDE:
            raise UserError(f"--question {self.question}: {did_you_mean(self.question, SIDE_BY_SIDE)}")
        if (self.tasks is None) != (self.ratings is None):
            raise UserError("--tasks and --ratings belong together: give both, or none")


@app.command(help=HELP)
@takes(EndpointConfig, panel="Judge")
@takes(JudgeOptions)
@takes(ResultOptions)
def judge(
    *,
    files: Annotated[list[Path], typer.Argument(help="Files of dialogues; NAME=FILE renames a system.")],
    endpoint: EndpointConfig,
    options: JudgeOptions,
    answers: Annotated[Path, typer.Option(help="Keeps all answers.")] = Path("judge.answers.jsonl"),
    to: ResultOptions,
) -> None:
    """Run the verb."""
    from plato2.evaluate.endpoint import AGAIN, Endpoint, kept_answers
    from plato2.evaluate.judge_controls import readable_control
    from plato2.evaluate.results import picture

    given = [*map(file_of, files), options.human, options.tasks, options.ratings]
    check_outputs({"--answers": answers, "--out": to.out, "--picture": to.picture}, given)
    with needs("eval", "evaluate judge"):  # before anybody is paid for answers
        import scipy  # noqa: F401
        import statsmodels  # noqa: F401
    contest = read_contest(files, options.speaker, options.pairs, options.seed)
    again = f"give a longer --timeout-s or more --retries; {AGAIN}"
    with kept_answers(answers, Endpoint(endpoint, again=again)) as kept:
        controls = put_to_the_test(options, kept)
        passed = all(control.passed for control in controls)
        outcomes = ask(contest, options, kept, "pairs") if passed else []
    if outcomes:
        controls[0] = readable_control(outcomes)
    settings = {
        name: None if value is None else str(value) if isinstance(value, Path) else value
        for name, value in (asdict(options) | asdict(endpoint)).items()
    }
    result = as_result(outcomes, controls, settings, [path for path in given if path is not None])
    if not result.systems:
        to = replace(to, picture=None)
    deliver(result, to, picture, partial(show, controls=controls))


def put_to_the_test(options: JudgeOptions, answers: Answers) -> list[Control]:
    """All controls, whether the answers have verdicts first. Files are read before anything is asked."""
    from plato2.evaluate.human.formats import read_tasks
    from plato2.evaluate.human.ratings import read_ratings
    from plato2.evaluate.judge_controls import (
        people_control,
        readable_control,
        shuffled_control,
        shuffled_matches,
        voted_matches,
        votes,
    )

    shuffled = shuffled_matches(read_people(options.human), options.controls, options.seed)
    pairs: list[Match] = []
    ratings: list[Rating] = []
    if options.tasks is not None and options.ratings is not None:
        tasks, ratings = read_tasks(options.tasks), read_ratings([options.ratings])
        pairs = voted_matches(tasks, ratings, options.question)
    found = ask(shuffled, options, answers, "control")
    controls = [readable_control(found), shuffled_control(found)]
    if pairs:
        voted = ask(pairs, options, answers, "votes")
        controls.append(people_control(voted, votes(ratings, options.question)))
    return controls


def read_contest(files: Sequence[Path], speaker: str, most: int | None, seed: int) -> list[Match]:
    """The pairs of dialogues that are compared.

    Raises:
        UserError: files that cannot be read, or that have nothing in common.
    """
    from plato2.evaluate.dialogues import read_dialogues, systems
    from plato2.evaluate.judge import Side, matches, side

    played: dict[str, list[tuple[str, Side]]] = {}
    for file in files:
        dialogues = read_dialogues(file_of(file))
        of_file = systems(dialogues)
        renamed = name_of(file)
        if renamed and len(of_file) > 1:
            raise UserError(
                f"{file}: has {len(of_file)} systems, {', '.join(of_file)}; give it without a name"
            )
        for system in of_file:
            name = renamed or system
            for dialogue in dialogues:
                both = {turn.speaker for turn in dialogue.turns if turn.model == system}
                judged = side(dialogue, system, speaker if len(both) > 1 and speaker != "both" else None)
                if judged.words:
                    played.setdefault(name, []).append((dialogue.start, replace(judged, system=name)))
            if name not in played:
                raise UserError(f"{file}: {system} says nothing as speaker {speaker}; give another --speaker")
    return matches(dict(played), most, seed)


def name_of(file: Path) -> str:
    """What stands before `=`."""
    name, sign, _ = str(file).partition("=")
    return name if sign and not file.exists() else ""


def file_of(file: Path) -> Path:
    """What stands behind it."""
    return Path(str(file).partition("=")[2]) if name_of(file) else file


def read_people(human: Path | None) -> list[list[str]]:
    """Dialogues between people."""
    from plato2.evaluate.dialogues import read_dialogues

    if human is not None:
        return [dialogue.texts() for dialogue in read_dialogues(human)]
    from plato2.prepare.corpora import ReadReport
    from plato2.prepare.corpora.chitchat import read

    return [[" ".join(turn.text.split()) for turn in dialogue.turns] for dialogue in read([], ReadReport())]


def ask(matches: Sequence[Match], options: JudgeOptions, answers: Answers, what: str) -> list[Outcome]:
    """The outcomes of all matches; asks what was not asked before."""
    from plato2.evaluate.judge import outcome, questions

    asked = [questions(match, options.question, options.seed) for match in matches]
    every = [messages for both in asked for messages in both]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=len(answers.missing(every)))
        try:
            answers.ask(every, lambda: progress.advance(bar))
        except KeyboardInterrupt:
            typer.echo("stopped; the same command continues from here", err=True)
            raise
    return [
        outcome(match, (answers[both[0]], answers[both[1]]))
        for match, both in zip(matches, asked, strict=True)
    ]


def as_result(
    outcomes: Sequence[Outcome], controls: Sequence[Control], settings: dict[str, Any], given: Sequence[Path]
) -> Result:
    """The result; without systems where a control failed."""
    from plato2.evaluate.judge import JUDGE_MEASURES, MEASURES, judge_figures, plain, standing
    from plato2.evaluate.results import Result, inputs

    failed = [control.text for control in controls if not control.passed]
    shown = bool(outcomes) and not failed
    seed = settings["seed"]
    about_judge = (
        {name: figure.model_dump() for name, figure in judge_figures(outcomes, seed).items()} if shown else {}
    )
    return Result(
        kind="judge",
        inputs=inputs(*given),
        settings=settings,
        measures=MEASURES,
        systems=standing(outcomes, seed) if shown else {},
        details={
            "withheld": failed,
            "controls": [control.to_dict() for control in controls],
            "judge": about_judge,
            "judge_measures": {name: measure.model_dump() for name, measure in JUDGE_MEASURES.items()},
            "outcomes": plain(outcomes) if shown else [],
        },
    )


def show(result: Result, controls: Sequence[Control]) -> None:
    """Controls, then the table, or why there is none."""
    from plato2.evaluate.judge import JUDGE_MEASURES
    from plato2.evaluate.results import Figure, print_table, result_table, text

    console = Console(highlight=False)
    for control in controls:
        console.print(
            f"{'passed' if control.passed else 'failed'}: {control.text}", soft_wrap=True, markup=False
        )
    if result.details["withheld"]:
        console.print("The judge's table is withheld: it failed a control.", style="bold")
        return
    title = f"{result.settings['question']}, judged by {result.settings['model']}"
    print_table(result_table(result, title), console)
    for name, measure in JUDGE_MEASURES.items():
        console.print(
            f"{measure.label}: {text(Figure(**result.details['judge'][name]), measure)}", markup=False
        )
