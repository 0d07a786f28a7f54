"""The curriculum's closing table: what each stage reached, and what the models say to three people.

The numbers come from each run's best validation (the one `best.ckpt` is from), read from its `metrics.csv`;
the unigram baseline is in the data's index: an add-one-smoothed count of the training responses' tokens,
measured on the validation responses.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plato2.config import UserError
from plato2.data.examples import Example, read_examples
from plato2.data.selection import read_selection
from plato2.data.shards import read_index
from plato2.runs.folder import RunFolder
from plato2.runs.folder import runs as find_runs
from plato2.runs.saved import read_metrics
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import coherence, doubt
from plato2.talk.replies import validation_contexts
from plato2.talk.selection import CHANCE, human_figures, written_candidates
from plato2.talk.table import candidate_table
from plato2.talk.variety import variety
from plato2.weights.folder import read_saved

CHOICE = ("pair_acc", "p1", "mrr", "pair_acc_matched", "p1_matched", "mrr_matched")
"""Figures of choosing a response among ten (talk/selection.py)."""
CHOICE_ROWS = {
    "coherence_acc": "accuracy of p(l|c,r)",
    "pair_acc": "pair accuracy",
    "p1": "P@1 of 10",
    "mrr": "MRR of 10",
    "pair_acc_matched": "pair accuracy, same length",
    "p1_matched": "P@1 of 10, same length",
}
"""The lines of the table of the evaluation model."""
LATENT_ROWS = {
    "z_mutual_information": ("mutual information of z with context and response, nats", ".2f"),
    "z_effective": ("latents in effect used", ".1f"),
    "z_in_use": ("latents with at least 2 %", ".0f"),
    "ppl": ("perplexity, z from the posterior", ".1f"),
    "ppl_uniform": ("perplexity, z uniform", ".1f"),
}
VARIETY_ROWS = {
    "greedy_different": ("greedy: how many of {k} candidates differ", ".1f"),
    "greedy_distinct_2": ("greedy: distinct-2", ".3f"),
    "distinct_2_between_z": ("sampled: distinct-2 of {k} latents", ".3f"),
    "distinct_2_within_z": ("sampled: distinct-2 of {k} samples of one latent", ".3f"),
    "distinct_2_difference": ("sampled: the difference", "+.3f"),
    "distinct_2_stage_1": ("sampled: distinct-2 of {k} samples of stage 1", ".3f"),
}
"""The lines of the table of latents: label and number format."""
TURNS_SHOWN = 6
"""Turns of a context that are printed, the latest; the candidates answer all of it."""
Part = Literal["coarse", "generation", "evaluation"]
"""What a model is in a curriculum, and the option that it is given to."""
PARTS: dict[Part, str] = {
    "coarse": "a generation model without latents",
    "generation": "a generation model with latents",
    "evaluation": "an evaluation model",
}


def curriculum_report(
    runs: Mapping[Part, str | Path],
    data: str | Path,
    n_contexts: int = 3,
    n_latent_contexts: int = 0,
    n_human: int = 0,
    rivals: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """What the runs of a curriculum reached.

    Args:
        runs: run folders, checkpoint files or model folders by part, all three or some. Candidates are those
            of the generation model, else of the coarse one.
        data: the prepared corpus they were trained on.
        n_contexts: validation contexts to answer.
        n_latent_contexts: validation contexts on which to measure how its candidates of different latents
            differ
            (see talk/variety.py); 0 = not.
        n_human: validation contexts whose human reply is ranked among its candidates.
        rivals: further evaluation models to show beside the one that ranks.

    Returns:
        Plain values: `stages` (by stage: run, step, nll, ppl, coherence_acc, ...), `unigram` (nll, ppl),
        `chance` (0.5), `choice` (`chance` and `overlap` by figure; `models`, the evaluation model and its
        rivals with their figures; `doubt` about the first), `latents` (what the run logged of them, and
        `variety`), `contexts` (turns, human, human_coherence, candidates best first), `next` (commands).

    Raises:
        UserError: no runs, a run of another stage, no metrics, a tokenizer or data that do not fit.
    """
    if not runs:
        raise UserError("give at least one run: --coarse, --generation or --evaluation")
    parts = {part: best_validation(run, part) for part, run in runs.items()}
    ranking = [runs["evaluation"], *rivals] if "evaluation" in runs else []
    judges = [best_validation(run, "evaluation") for run in ranking]
    if not judges and "coherence_acc" in parts.get("generation", {}):
        judges = [parts["generation"]]  # it ranks its own candidates
    return {
        "stages": {
            found["stage"]: {key: value for key, value in found.items() if key != "stage"}
            for found in parts.values()
        },
        "unigram": read_index(data).unigram,
        "chance": 0.5,
        "choice": _choice(runs, judges, data, n_human),
        "latents": _latents(runs, parts.get("generation"), data, n_latent_contexts),
        "contexts": _answered(runs, data, n_contexts),
        "next": _next_commands(runs),
    }


def best_validation(run: str | Path, part: Part) -> dict[str, Any]:
    """Run, stage, step and metrics of its best validation, by the metric that picks its best checkpoint.

    A checkpoint file or a model folder has no metrics: its step is None.

    Raises:
        UserError: not a model that can be this part, no `metrics.csv`, or no validation in it.
    """
    lineage = RunFolder(Path(run)).lineage()
    is_run = "use" in lineage
    if is_run:
        stage, use = lineage["stage"], lineage["use"]
    else:
        saved = read_saved(run, option=f"--{part}")  # says what else may be wrong with it
        stage, use = saved.stage, asdict(saved.use)
    if part != part_of(use):
        raise UserError(f"--{part} {run}: this is a {stage} model; give {PARTS[part]}")
    if not is_run:
        return {"run": str(run), "stage": stage, "step": None}
    path = Path(run) / "metrics.csv"
    by_step: dict[int, dict[str, float]] = {}
    try:
        for step, metric, value in read_metrics(path):
            by_step.setdefault(step, {})[metric] = value
    except FileNotFoundError:
        raise UserError(f"{path}: missing; train with logger=csv (the default) to have a report") from None
    monitor, direction = lineage["monitor"]
    scores = {
        step: row[monitor] for step, row in by_step.items() if math.isfinite(row.get(monitor, math.nan))
    }
    if not scores:
        raise UserError(f"{path}: no {monitor} in it yet; wait for the run's first validation")
    best = (min if direction == "min" else max)(scores, key=lambda step: scores[step])
    validated = {name.removeprefix("val/"): v for name, v in by_step[best].items() if name.startswith("val/")}
    return {"run": str(run), "stage": stage, "step": best, **validated}


def part_of(use: Mapping[str, Any]) -> Part | None:
    """The part that a model has by its use; None for a model that is not part of a curriculum."""
    if use["role"] == "generation":
        return "generation" if use["has_latents"] else "coarse"
    return "evaluation" if use["role"] == "evaluation" else None


def place_in_curriculum(lineage: Mapping[str, Any]) -> int:
    """Where the stage of a run stands in the curriculum; a stage that is no part of it comes last."""
    part = part_of(lineage.get("use") or {"role": None})
    return len(PARTS) if part is None else list(PARTS).index(part)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The report as tables: numbers, then each context with its candidates, then what to type next."""
    console.print(_numbers(report))
    if report["choice"]:
        console.print(_choice_table(report["choice"]))
        if report["choice"]["doubt"]:
            console.print(Text(report["choice"]["doubt"], style="bold"), soft_wrap=True)
    if report["latents"]:
        console.print(_latents_table(report["latents"]))
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


def report_sweep(
    output_dir: Path,
    name: str,
    console: Console | None = None,
    n_latent_contexts: int = 0,
    n_human: int = 0,
) -> None:
    """Prints the report of a sweep that trained a curriculum: the newest run of each stage in it.

    Args:
        output_dir: the folder of all runs.
        name: the sweep's; its runs are `<model>-<stage>/<name>-<job>`.
        console: where to print; standard output by default.
        n_latent_contexts: as in `curriculum_report`.
        n_human: the same.

    Raises:
        UserError: the sweep has no runs.
    """
    runs: dict[Part, Path] = {}
    rivals: list[Path] = []
    data = ""
    for run in reversed(find_runs(output_dir, f"*/{name}-*")):
        lineage = run.lineage()
        part = part_of(lineage["use"]) if "use" in lineage else None
        if part == "generation" and part in runs and lineage["use"].get("coherence_head"):
            continue  # the baseline of a curriculum that has a generation model of its own
        if part:
            if part == "evaluation" and part in runs:
                rivals.append(runs[part])
            runs[part], data = run.path, lineage["data"]["path"]
    if not runs:
        raise UserError(f"{output_dir}: the sweep {name} has no runs of a curriculum; nothing to report")
    if rivals:  # the best at choosing ranks
        ranked = sorted([runs["evaluation"], *rivals], key=_first_of_ten, reverse=True)
        runs["evaluation"], *rivals = ranked
    in_order = {part: runs[part] for part in PARTS if part in runs}
    report = curriculum_report(
        in_order, data, n_latent_contexts=n_latent_contexts, n_human=n_human, rivals=rivals
    )
    print_report(report, console or Console(highlight=False))


def _first_of_ten(run: Path) -> float:
    return best_validation(run, "evaluation").get("p1") or 0.0


def _answered(runs: Mapping[Part, str | Path], data: str | Path, n_contexts: int) -> list[dict[str, Any]]:
    generation = runs.get("generation", runs.get("coarse"))
    if generation is None or n_contexts == 0:
        return []
    bot = PlatoBot.load(generation, runs.get("evaluation"))
    examples = read_examples(data, bot.tokenizer, n_contexts, max_context=bot.max_context)
    replies = bot.reply_to_ids([example.context_ids for example in examples])
    human = _human_coherence(bot, examples)
    return [
        {
            "turns": example.turns,
            "human": example.reference,
            "human_coherence": score,
            "candidates": [candidate.to_dict() for candidate in reply.candidates],
        }
        for example, reply, score in zip(examples, replies, human, strict=True)
    ]


def _choice(
    runs: Mapping[Part, str | Path], models: Sequence[Mapping[str, Any]], data: str | Path, n_human: int
) -> dict[str, Any]:
    """What is known about the choices of evaluation models; empty if nothing is."""
    found: list[dict[str, Any]] = []
    written: list[list[list[int]]] = []
    for model in models:
        lineage = RunFolder(Path(model["run"])).lineage()
        figures = {name: model[name] for name in ("coherence_acc", *CHOICE) if name in model}
        if n_human and "generation" in runs:
            bot = PlatoBot.load(runs["generation"], model["run"])
            assert bot.evaluation is not None
            selection = read_selection(data, n_human)
            contexts, replies = selection.contexts[:n_human], selection.responses[:n_human]
            written = written or written_candidates(bot.generation, contexts, bot.decode_config)
            figures |= {"n_human": len(contexts)}
            figures |= human_figures(bot.evaluation, contexts, replies, written)
        own_head = lineage.get("use", {}).get("coherence_head")
        head = own_head or lineage.get("config", {}).get("stage", {}).get("head", "first")
        found.append({**{key: model[key] for key in ("run", "stage", "step")}, "head": head, **figures})
    if not any(figure in model for model in found for figure in (*CHOICE, "human_first")):
        return {}
    overlap = {name: models[0][f"overlap_{name}"] for name in CHOICE if f"overlap_{name}" in models[0]}
    chance = {name: CHANCE[name.removesuffix("_matched")] for name in CHOICE}
    return {"chance": chance, "overlap": overlap, "models": found, "doubt": doubt(models[0])}


def _latents(
    runs: Mapping[Part, str | Path], fine: Mapping[str, Any] | None, data: str | Path, n_contexts: int
) -> dict[str, Any]:
    """What is known about the latents; empty without a model that has them."""
    if fine is None:
        return {}
    logged = {name: fine[name] for name in LATENT_ROWS if name in fine}
    if not n_contexts:
        return logged
    bot, coarse = PlatoBot.load(runs["generation"]), None
    contexts = validation_contexts(data, bot, n_contexts)
    if "coarse" in runs:
        other = PlatoBot.load(runs["coarse"])
        if other.tokenizer.sha256 != bot.tokenizer.sha256:
            raise UserError(
                f"--coarse {runs['coarse']}: trained with another tokenizer than --generation "
                f"{runs['generation']}; give runs of one curriculum"
            )
        coarse = other.generation
    found = variety(bot.generation, contexts, coarse, bot.decode_config)
    return {**logged, "variety": found.to_dict()}


def _human_coherence(bot: PlatoBot, examples: Sequence[Example]) -> Sequence[float | None]:
    if bot.evaluation is None:
        return [None] * len(examples)
    return coherence(bot.evaluation, [(example.context_ids, example.reference_ids) for example in examples])


def _next_commands(runs: Mapping[Part, str | Path]) -> list[str]:
    generation, evaluation = runs.get("generation", runs.get("coarse")), runs.get("evaluation")
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


def _choice_table(choice: Mapping[str, Any]) -> Table:
    models = choice["models"]
    title = f"The evaluation model, {models[0]['stage']}"
    table = Table("choosing a response", title=title, title_justify="left")
    for column in ("chance", "shared words", *(f"head={model['head']}" for model in models)):
        table.add_column(column, justify="right")

    def row(label: str, name: str) -> None:
        sources = (choice["chance"], choice["overlap"], *models)
        values = [source.get(name) for source in sources]
        if any(value is not None for value in values[2:]):
            table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))

    for name, label in CHOICE_ROWS.items():
        row(label, name)
    if n := models[0].get("n_human"):
        shares = [
            f"{m['human_first']:.2f} ({m['human_first_low']:.2f} to {m['human_first_high']:.2f})"
            for m in models
        ]
        table.add_row(
            f"human first of 21 (n={n})",
            f"{models[0]['human_first_chance']:.3f}",
            "",
            *shares,
        )
        ranks = [f"{model['human_rank']:.1f}" for model in models]
        table.add_row(
            "its mean rank of 21", f"{(1 + 1 / models[0]['human_first_chance']) / 2:.1f}", "", *ranks
        )
    if len(models) > 1:
        table.caption, table.caption_justify = f"below, head={models[0]['head']} ranks", "left"
    return table


def _latents_table(latents: Mapping[str, Any]) -> Table:
    found = latents.get("variety", {})
    title = "The latents"
    title += f"; what has an interval is a mean over {found['n_contexts']} contexts" if found else ""
    table = Table("measure", title=title, title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, (label, form) in LATENT_ROWS.items():
        if name in latents:
            table.add_row(label, format(latents[name], form), "")
    for name, (label, form) in VARIETY_ROWS.items():
        if found.get(name):
            mean, low, high = (format(found[name][part], form) for part in ("mean", "low", "high"))
            table.add_row(label.format(k=found["n_candidates"]), mean, f"{low} to {high}")
    return table


def _candidates(context: Mapping[str, Any]) -> Table:
    table = candidate_table(context["candidates"])
    score = context["human_coherence"]
    table.rows[-1].end_section = True
    table.add_row(
        "", "human", "" if score is None else f"{score:.3f}", "", Text(context["human"]), style="bold"
    )
    return table
