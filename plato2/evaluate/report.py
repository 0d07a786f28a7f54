"""The curriculum's closing table: what each stage reached, and what the models say to three people.

Numbers are those of each run's best validation (the one `best.ckpt` is from), read from its `metrics.csv`;
the unigram baseline is in the data's index: an add-one-smoothed count of the training responses' tokens,
measured on the validation responses.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plato2.config import UserError
from plato2.data.examples import Example, read_examples
from plato2.data.shards import read_index
from plato2.stages import STAGES
from plato2.talk.bot import PlatoBot, as_dict
from plato2.talk.rank import coherence
from plato2.talk.table import candidate_table
from plato2.training.metrics import read_metrics
from plato2.training.run import RunFolder
from plato2.weights.folder import read_saved

SHOWN = {
    "1_coarse": ("val/nll", "val/ppl"),
    "2_gen": ("val/nll", "val/ppl", "val/bow", "val/z_effective"),
    "2_eval": ("val/coherence_acc", "val/rce", "val/mlm"),
}
"""The metrics of each stage's best validation that go into the report."""
TURNS_SHOWN = 6
"""Turns of a context that are printed, the latest; the candidates answer all of it."""
OPTIONS = {"1_coarse": "--coarse", "2_gen": "--generation", "2_eval": "--evaluation"}


def curriculum_report(
    runs: Mapping[str, str | Path], data: str | Path, n_contexts: int = 3
) -> dict[str, Any]:
    """What the runs of a curriculum reached.

    Args:
        runs: run folders, checkpoint files or model folders by stage, all three or some of `1_coarse`,
            `2_gen`, `2_eval`. Candidates are those of the `2_gen` model, else of the `1_coarse` model.
        data: the prepared corpus they were trained on.
        n_contexts: validation contexts to answer.

    Returns:
        Plain values: `stages` (by stage: run, step, nll, ppl, coherence_acc, ...), `unigram` (nll, ppl),
        `chance` (0.5), `contexts` (turns, human, human_coherence, candidates best first), `next` (commands).

    Raises:
        UserError: no runs, a run of another stage, no metrics, a tokenizer or data that do not fit.
    """
    if not runs:
        raise UserError("give at least one run: --coarse, --generation or --evaluation")
    stages = {stage: {"run": str(runs[stage]), **best_validation(runs[stage], stage)} for stage in runs}
    return {
        "stages": stages,
        "unigram": read_index(data).unigram,
        "chance": 0.5,
        "contexts": _answered(runs, data, n_contexts),
        "next": _next_commands(runs),
    }


def best_validation(run: str | Path, stage: str) -> dict[str, float | int | None]:
    """The step and metrics of a run's best validation, by the metric that picks the stage's best checkpoint.

    A checkpoint file or a model folder has no metrics: its step is None.

    Raises:
        UserError: not of that stage, no `metrics.csv`, or no validation in it.
    """
    found = RunFolder(Path(run)).lineage().get("stage")
    if found is None:
        read_saved(run, (stage,), OPTIONS[stage])  # which says what else may be wrong with it
        return {"step": None}
    if found != stage:
        raise UserError(f"{OPTIONS[stage]} {run}: this is a {found} run; give a {stage} run")
    path = Path(run) / "metrics.csv"
    by_step: dict[int, dict[str, float]] = {}
    try:
        for step, metric, value in read_metrics(path):
            by_step.setdefault(step, {})[metric] = value
    except FileNotFoundError:
        raise UserError(f"{path}: missing; train with logger=csv (the default) to have a report") from None
    except ValueError as error:
        raise UserError(f"{path}: not rows of step,metric,value ({error}); restore the file") from None
    monitor, direction = STAGES[stage].monitor
    scores = {
        step: row[monitor] for step, row in by_step.items() if math.isfinite(row.get(monitor, math.nan))
    }
    if not scores:
        raise UserError(f"{path}: no {monitor} in it yet; wait for the run's first validation")
    best = (min if direction == "min" else max)(scores, key=lambda step: scores[step])
    row = by_step[best]
    return {"step": best, **{name.removeprefix("val/"): row[name] for name in SHOWN[stage] if name in row}}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The report as tables: numbers, then each context with its candidates, then what to type next."""
    console.print(_numbers(report))
    for number, context in enumerate(report["contexts"], start=1):
        console.print(f"\nvalidation context {number}", style="bold")
        turns = context["turns"]
        if len(turns) > TURNS_SHOWN:
            console.print(f"  ({len(turns) - TURNS_SHOWN} earlier turns)", style="dim")
        for turn in turns[-TURNS_SHOWN:]:
            console.print(Text(f"  {turn}"), soft_wrap=True)
        console.print(_candidates(context))
    console.print("\nNext:")
    for command in report["next"]:
        console.print(Text(f"  {command}"), soft_wrap=True)


def report_sweep(output_dir: Path, name: str, console: Console | None = None) -> None:
    """Prints the report of a sweep that trained a curriculum: the newest run of each stage in it.

    Args:
        output_dir: the folder of all runs.
        name: the sweep's; its runs are `<model>-<stage>/<name>-<job>`.
        console: where to print; standard output by default.

    Raises:
        UserError: the sweep has no runs.
    """
    runs: dict[str, Path] = {}
    data = ""
    found = [RunFolder(path.parent) for path in output_dir.glob(f"*/{name}-*/lineage.json")]
    for run in sorted(found, key=lambda run: str(run.lineage().get("created"))):
        lineage = run.lineage()
        if lineage.get("stage") in SHOWN:
            runs[lineage["stage"]], data = run.path, lineage["data"]["path"]
    if not runs:
        raise UserError(f"{output_dir}: no runs of the sweep {name} of {', '.join(SHOWN)}; nothing to report")
    report = curriculum_report({stage: runs[stage] for stage in SHOWN if stage in runs}, data)
    print_report(report, console or Console(highlight=False))


def _answered(runs: Mapping[str, str | Path], data: str | Path, n_contexts: int) -> list[dict[str, Any]]:
    generation = runs.get("2_gen", runs.get("1_coarse"))
    if generation is None or n_contexts == 0:
        return []
    bot = PlatoBot.load(generation, runs.get("2_eval"))
    examples = read_examples(data, bot.tokenizer, n_contexts, max_context=bot.max_context)
    replies = bot.reply_to_ids([example.context_ids for example in examples])
    human = _human_coherence(bot, examples)
    return [
        {
            "turns": example.turns,
            "human": example.reference,
            "human_coherence": score,
            "candidates": [as_dict(candidate) for candidate in reply.candidates],
        }
        for example, reply, score in zip(examples, replies, human, strict=True)
    ]


def _human_coherence(bot: PlatoBot, examples: Sequence[Example]) -> Sequence[float | None]:
    if bot.evaluation is None:
        return [None] * len(examples)
    return coherence(bot.evaluation, [(example.context_ids, example.reference_ids) for example in examples])


def _next_commands(runs: Mapping[str, str | Path]) -> list[str]:
    generation, evaluation = runs.get("2_gen", runs.get("1_coarse")), runs.get("2_eval")
    commands = []
    if generation is not None:
        models = f"--generation {shlex.quote(str(generation))}"
        models += f" --evaluation {shlex.quote(str(evaluation))}" if evaluation is not None else ""
        commands += [
            f"python -m plato2 chat {models}",
            f'python -m plato2 reply {models} "hi , how was your day ?" --json',
        ]
    return [*commands, "python train.py --help"]


def _numbers(report: Mapping[str, Any]) -> Table:
    table = Table(title="The curriculum on its validation data", title_justify="left")
    table.add_column("stage")
    for column in ("loss (nll)", "perplexity", "coherence accuracy", "step"):
        table.add_column(column, justify="right")
    unigram = report["unigram"]
    if unigram:
        table.add_row("unigram baseline", f"{unigram['nll']:.3f}", f"{unigram['ppl']:.1f}", "", "")
    for stage, values in report["stages"].items():
        nll, ppl, accuracy = (values.get(key) for key in ("nll", "ppl", "coherence_acc"))
        table.add_row(
            stage,
            "" if nll is None else f"{nll:.3f}",
            "" if ppl is None else f"{ppl:.1f}",
            "" if accuracy is None else f"{accuracy:.3f} (chance {report['chance']})",
            "" if values["step"] is None else f"{values['step']:,}",
        )
    return table


def _candidates(context: Mapping[str, Any]) -> Table:
    table = candidate_table(context["candidates"])
    score = context["human_coherence"]
    table.rows[-1].end_section = True
    table.add_row(
        "", "human", "" if score is None else f"{score:.3f}", "", Text(context["human"]), style="bold"
    )
    return table
