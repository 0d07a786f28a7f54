"""PLATO-2 and its rivals at equal CPU time, or equal tokens: trains, lets them reply, measures and records.

    python experiments/rivals/rivals.py --data DIR --budget-minutes 60 --seed 0
    python experiments/rivals/rivals.py --data DIR --budget-tokens 10 --seed 0 --rows e b c
    python experiments/rivals/rivals.py --data DIR --budget-minutes 60 --gpt2-rates 3e-4 1e-3 3e-3
    python experiments/rivals/rivals.py --only-draw

One thread. Finished runs and replies are kept in --out, so the same command continues after a kill. Another
seed, budget or row lands in the same results.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan import FIRST, RATE, ROWS, RUNS, SMOLLM2, TRIED, Budget, Pace, Run, needed, steps_of

from experiments.configs import keep_config
from plato2.config import UserError
from plato2.files import replace_text

HERE = Path(__file__).parent
PROBED = {
    "gpt2": Run("gpt2", 0),
    "1_coarse": Run("1_coarse", 0),
    "2_gen": Run("2_gen", 0, "1_coarse"),
    "2_eval_dual": Run("2_eval_dual", 0, "1_coarse"),
    "plato": Run("plato", 0),
}
"""Short runs that say what a step takes; not charged."""
PROBE_STEPS, UNCOUNTED_STEPS = 60, 10
"""Of a probe, and how many of its first ones do not count: they compile kernels."""
WARM_UP = 0.05
LOGGED_EVERY = 10
ASKED = ("contexts", "starts", "utterances", "gpt2_rates")
"""Options that all seeds of a budget must have in common."""


def overrides(run: Run, steps: int, seed: int, data: Path) -> list[str]:
    """What train.py is given for a run: the evening's values, a schedule that ends at its last step."""
    given = [
        "experiment=evening", "hydra.mode=RUN", "strategy=cpu", f"stage={run.kind}",
        f"data.path={data}", f"seed={seed}",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
        f"trainer.log_every_n_steps={LOGGED_EVERY}",
        f"optim.warmup_steps={round(WARM_UP * steps)}", "optim.schedule=linear",
        "report=false", "selection=200", "human_rank=0", "sample_replies=0", "latent_contexts=0",
    ]  # fmt: skip
    return [*given, "recipe=tiny-plato"] if run.kind == "plato" else given  # the evening has none


def train(
    name: str, run: Run, steps: int, seed: int, data: Path, folder: Path, rate: float = RATE
) -> dict[str, Any]:
    """Trains a run, or goes on with it.

    Args:
        name: of the run.
        run: what it is.
        steps: optimizer steps.
        seed: of weights and order.
        data: the prepared corpus.
        folder: of all runs of this seed.
        rate: the highest learning rate of GPT-2; the other stages have the evening's.

    Returns:
        What is in `trained.json`: steps, cpu_s, samples, and the figures of its last validation.
    """
    done = folder / name / "trained.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    print(f"{name}: {steps} steps", flush=True)
    if run.kind == "gpt2":
        from gpt2 import train as train_gpt2

        from plato2.runs.parallel import best_precision

        return train_gpt2(data, folder / name, steps, seed, rate, bf16="bf16" in best_precision("cpu"))
    import plato2
    from plato2.runs.saved import read_metrics

    where = [f"output_dir={folder.parent}", f"name={folder.name}", f"run_id={name}"]
    start = [f"init_from={folder / run.parent}"] if run.parent else []
    plato2.train(*overrides(run, steps, seed, data), *where, *start)
    rows = read_metrics(folder / name / "metrics.csv")
    last = {metric: value for _, metric, value in rows}
    first = {metric: value for step, metric, value in rows if step == UNCOUNTED_STEPS}
    figures = {metric.removeprefix("val/"): v for metric, v in last.items() if metric.startswith("val/")}
    found = {
        "steps": steps, "cpu_s": last["perf/cpu_s"], "samples": last["perf/samples"],
        "first_cpu_s": first.get("perf/cpu_s"), **figures,
    }  # fmt: skip
    part = done.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(done)
    return found


def measured_paces(data: Path, out: Path, steps: int = PROBE_STEPS) -> dict[str, Pace]:
    """What a step of each kind takes on this machine: measured once, then read from `paces.json`."""
    file = out / "paces.json"
    if not file.exists():
        found = {}
        for kind, run in PROBED.items():
            probe = train(kind, run, steps, 0, data, out / "probes")
            seconds = probe["cpu_s"] - (probe["first_cpu_s"] or 0.0)
            counted = steps - (UNCOUNTED_STEPS if probe["first_cpu_s"] else 0)
            found[kind] = asdict(Pace(seconds / counted, probe["samples"] / steps))
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {kind: Pace(**pace) for kind, pace in json.loads(file.read_text(encoding="utf-8")).items()}


def tried_rates(rates: list[float], steps: int, data: Path, folder: Path) -> dict[str, Any]:
    """Which learning rate GPT-2 gets: the one that reaches the lowest perplexity on the validation split.

    Args:
        rates: to try; one alone is taken as it is.
        steps: of each try.
        data: the prepared corpus.
        folder: of the budget. What was found stays in `rates.json`, and holds for all of its seeds.

    Returns:
        `rate`, and `tried`: rate -> what is in `trained.json`.

    Raises:
        UserError: other rates were tried before.
    """
    file = folder / "rates.json"
    if not file.exists():
        tried = {
            f"{rate:g}": train(f"gpt2_{rate:g}", TRIED, steps, 0, data, folder / "rates", rate)
            for rate in (rates if len(rates) > 1 else ())
        }
        best = min(rates, key=lambda rate: tried[f"{rate:g}"]["ppl"]) if tried else rates[0]
        found = {"asked": rates, "rate": best, "tried": tried}
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(found, indent=1) + "\n")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["asked"] != rates:
        raise UserError(
            f"--gpt2-rates: {file} is of {found['asked']}, not of {rates}; give the same, or another --out"
        )
    return {"rate": found["rate"], "tried": found["tried"]}


def tokens_per_sample(data: Path) -> float:
    """Tokens of text in a training sample, ends included, without the [CLS] of context and response."""
    from plato2.data.shards import read_index

    split = read_index(data).splits["train"]
    return split.tokens / split.samples - 2


def charges(row: str, trained: Mapping[str, Mapping[str, Any]], per_sample: float) -> dict[str, float]:
    """What a row has really used up."""
    runs = [trained[name] for name in ROWS[row].charged]
    return {
        "cpu_minutes": sum(run["cpu_s"] for run in runs) / 60,
        "million_tokens": sum(run["samples"] for run in runs) * per_sample / 1e6,
    }


def make(given: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Trains and measures a seed; what measure.record takes."""
    from measure import check_asked, measure
    from systems import reply, said_file, write_contexts

    from plato2.runs.folder import provenance

    folder = given.out / budget.name / f"seed-{given.seed}"
    given.out.mkdir(parents=True, exist_ok=True)
    contexts = write_contexts(given.data, given.out, given.multiref, given.contexts, given.starts)
    asked = {"sets": sorted(contexts.contexts), **{name: getattr(given, name) for name in ASKED}}
    check_asked(given.results, budget.name, given.seed, asked)
    before = [row for row in FIRST if said_file(folder, "chats", row).exists()]
    rows = [row for row in FIRST if row in given.rows or row in before]
    paces = measured_paces(given.data, given.out, given.probe_steps)
    per_sample = tokens_per_sample(given.data)
    rates: dict[str, Any] = {"rate": RATE, "tried": {}}
    if any(RUNS[name].kind == "gpt2" for name in needed(rows)):
        steps = steps_of(TRIED, budget, paces, per_sample)
        rates = tried_rates(given.gpt2_rates, steps, given.data, given.out / budget.name)
    trained = {}
    for name in needed(rows):
        steps = steps_of(RUNS[name], budget, paces, per_sample)
        trained[name] = train(name, RUNS[name], steps, given.seed, given.data, folder / "runs", rates["rate"])
    for run in sorted((folder / "runs").iterdir()):
        keep_config(run, given.results / "config" / f"{budget.name}-{run.name}.yaml", folder / "runs")
    for row in rows:
        reply(row, folder, contexts, given.data, given.seed, given.utterances)
    if given.smollm2:
        reply(SMOLLM2, folder, contexts, given.data, given.seed, given.utterances, given.smollm2)
    apart = [SMOLLM2] if said_file(folder, "chats", SMOLLM2).exists() else []  # also from before
    found = measure([*rows, *apart], folder, contexts)
    for row in rows:
        found["rows"][row]["charged"] = charges(row, trained, per_sample)
    return found | {
        "paces": {kind: asdict(pace) for kind, pace in paces.items()},
        "tokens_per_sample": per_sample,
        "rates": rates,
        "runs": trained,
        "made_with": provenance(),
        "asked": asked,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="the prepared corpus, with a test split")
    add("--out", type=Path, default=Path("outputs/rivals"), help="where runs and replies are kept")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-minutes", type=float, help="CPU minutes of each row")
    budget.add_argument("--budget-tokens", type=float, help="millions of tokens of each row")
    add("--seed", type=int, default=0, help="of weights, order of samples, and sampling")
    add("--gpt2-rates", type=float, nargs="+", default=[RATE], help="several: the best of them is GPT-2's")
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="only these")
    add("--multiref", type=Path, help="DailyDialog's multireftest.jsonl.gz; without it the test split alone")
    add("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct, for the line apart")
    add("--contexts", type=int, default=300, help="contexts of each set")
    add("--starts", type=int, default=40, help="self-chats")
    add("--utterances", type=int, default=10, help="turns of a self-chat, the start included")
    add("--probe-steps", type=int, default=PROBE_STEPS, help="steps that the pace is measured on")
    add("--results", type=Path, default=HERE, help="folder of results.json, scores/ and figure.png")
    add("--only-draw", action="store_true", help="write the figure of what is recorded")
    return parser.parse_args()


def main() -> None:
    """Makes one seed and records it."""
    given = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from measure import draw, record

    if given.only_draw:
        if not (given.results / "results.json").exists():
            raise UserError(f"--only-draw: nothing is recorded in {given.results} yet; make a seed first")
    else:
        if given.data is None or (given.budget_minutes is None) == (given.budget_tokens is None):
            raise UserError("give --data, and --budget-minutes or --budget-tokens")
        import torch

        torch.set_num_threads(1)
        given.data, given.out = given.data.absolute(), given.out.absolute()
        budget = (
            Budget("cpu", given.budget_minutes)
            if given.budget_minutes is not None
            else Budget("tokens", given.budget_tokens)
        )
        record(given.results, budget.name, given.seed, make(given, budget))
    draw(given.results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
