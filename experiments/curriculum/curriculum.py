"""Is the curriculum worth stage 1? Stages 2.1 and 2.2 from points of stage 1 and from random weights.

    python experiments/curriculum/curriculum.py --data DIR
    python experiments/curriculum/curriculum.py --data DIR --stages 2_gen            # stage 2.1 alone
    python experiments/curriculum/curriculum.py --data DIR --points 200 400 800 1600 3200   # goes on
    python experiments/curriculum/curriculum.py --data DIR --seed 1                  # adds a seed
    python experiments/curriculum/curriculum.py --only-draw

One thread. Runs and what was measured of them are kept in --out: the same command continues after a kill, and
finished parts are skipped. No schedule depends on a run's length, so that a longer stage 1 (`--points`) takes
up the runs that are there. Words after the options are further overrides of train.py, for all runs:

    python experiments/curriculum/curriculum.py --data DIR strategy=gpu
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configs import keep_config

HERE = Path(__file__).parent
POINTS = (200, 400, 800, 1600)
"""Steps of stage 1, after which the second stages start."""
OWN, HIGH = "own", "stage 1's"
"""Rates of a second stage: that of its recipe, and that of stage 1's."""
FIRST = "1_coarse"
LOGGED_EVERY = 1
"""Each step, since spikes are looked for."""
VALID_UNITS, CHOICES = 20, 300
"""Of a validation: units of 4,096 tokens, and contexts that stage 2.2 chooses a response for."""
TEST_CHOICES = 1000
WINDOW, SPIKE, SMOOTHED = 50, 5.0, 20
"""Steps that a spike is compared with, robust standard deviations that it is above them; steps of a mean."""
MARGIN = 1.02
"""More than the pace asks for, so that a run from random weights ends after the others and not before."""


@dataclass(frozen=True)
class Second:
    """How long a second stage is trained from each point of stage 1."""

    steps: int
    every: int = 100
    """Steps between validations, from a point of stage 1."""
    scratch_every: int = 250
    """The same from random weights."""


SECOND = {"2_gen": Second(500), "2_eval_dual": Second(400), "2_eval": Second(500)}


@dataclass(frozen=True)
class Run:
    """A training of a second stage."""

    stage: str
    start: int
    """The steps of stage 1 before it; 0 = random weights."""
    rate: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.stage}-{self.start or 'scratch'}{'-high' * (self.rate == HIGH)}"


def planned(stage: str, points: Sequence[int]) -> list[Run]:
    """The runs of a second stage: from each point at its own rate; from the last one and from random weights
    at both. Those from random weights come last, because they get the time of the others."""
    last = max(points)
    starts = [Run(stage, start, OWN) for start in sorted(points)]
    return [*starts, Run(stage, last, HIGH), Run(stage, 0, OWN), Run(stage, 0, HIGH)]


# -------------------------------------------------------------------------------------------- training


def overrides(stage: str, steps: int, every: int, given: argparse.Namespace) -> list[str]:
    """What train.py is given: the evening's values, with a schedule that does not end."""
    return [
        "experiment=evening", "hydra.mode=RUN", "strategy=cpu", f"stage={stage}",
        f"data.path={given.data}", f"seed={given.seed}", "optim.schedule=inverse_sqrt",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}",
        f"trainer.log_every_n_steps={LOGGED_EVERY}", f"data.valid_units={VALID_UNITS}",
        f"selection={CHOICES}", "human_rank=0", "sample_replies=0", "latent_contexts=0", "report=false",
    ]  # fmt: skip


def train(name: str, words: Sequence[str], given: argparse.Namespace) -> None:
    """Trains a run, or goes on with it. One that diverges is not trained further."""
    import plato2
    from plato2.config import UserError
    from plato2.stages.base import NonFiniteLoss

    where = [f"output_dir={given.out}", f"name=seed-{given.seed}", f"run_id={name}"]
    last = {word.partition("=")[0].lstrip("+"): word for word in (*words, *where, *given.overrides)}
    try:
        plato2.train(*last.values())
    except UserError as error:
        if not isinstance(error.__cause__, NonFiniteLoss):
            raise
        (folder(name, given) / "diverged.txt").write_text(f"{error.__cause__}\n", encoding="utf-8")


def folder(name: str, given: argparse.Namespace) -> Path:
    """Of a run."""
    return Path(given.out) / f"seed-{given.seed}" / name


def steps_done(run: Path) -> int:
    """Steps of a run that has reached its last one; 0 of one that has not."""
    from plato2.runs.folder import RunFolder

    return RunFolder(run).lineage().get("step") or 0 if RunFolder(run).finished else 0


def logged(run: Path) -> dict[int, dict[str, float]]:
    """metrics.csv by step; nothing of a run that has not begun."""
    from plato2.runs.saved import read_metrics

    steps: dict[int, dict[str, float]] = {}
    if (run / "metrics.csv").exists():
        for step, metric, value in read_metrics(run / "metrics.csv"):
            steps.setdefault(step, {})[metric] = value
    return steps


def spent(run: Path, until: int | None = None) -> float:
    """CPU seconds of a run's steps, all of them or those until a step."""
    rows = sorted(logged(run).items())
    found = [row["perf/cpu_s"] for step, row in rows if "perf/cpu_s" in row and until in (None, step)]
    return found[-1] if found else 0.0


def train_first(points: Sequence[int], given: argparse.Namespace) -> None:
    """Stage 1, whose checkpoint is kept at each point; from one point it goes on to the next."""
    from plato2.runs.saved import checkpoint_step

    run = folder(FIRST, given)
    for point in sorted(points):
        kept, last = kept_point(point, given), run / "checkpoints" / "last.ckpt"
        if kept.exists():
            continue
        if steps_done(run) < point:
            train(FIRST, overrides(FIRST, point, 100, given), given)
        if checkpoint_step(last) != point:
            raise SystemExit(f"{run} is at step {checkpoint_step(last)}: --points {point} comes too late")
        part = kept.with_suffix(".part")
        shutil.copyfile(last, part)
        part.replace(kept)


def kept_point(point: int, given: argparse.Namespace) -> Path:
    """The checkpoint of stage 1 after so many steps."""
    return folder(FIRST, given) / "checkpoints" / f"{point}.ckpt"


def train_second(run: Run, points: Sequence[int], given: argparse.Namespace) -> None:
    """From a point of stage 1 so many steps; from random weights for as long as the longest start in all."""
    own, here = SECOND[run.stage], folder(run.name, given)
    if (here / "diverged.txt").exists():
        return
    rate = ["optim.lr=1.5e-3", "optim.warmup_steps=300"] if run.rate == HIGH else []
    if run.start:
        if steps_done(here) < own.steps:
            start = [f"init_from={kept_point(run.start, given)}", *rate]
            train(run.name, [*overrides(run.stage, own.steps, own.every, given), *start], given)
        return
    longest = folder(Run(run.stage, max(points), OWN).name, given)
    budget = spent(folder(FIRST, given), max(points)) + spent(longest)
    while (left := budget - (spent(here) if steps_done(here) else 0.0)) > 0:
        paced = here if steps_done(here) else longest
        pace = spent(paced) / max(logged(paced))
        steps = steps_done(here) + math.ceil(MARGIN * left / pace)
        words = overrides(run.stage, steps, own.scratch_every, given)
        train(run.name, [*words, "init_from=scratch", *rate], given)
        if (here / "diverged.txt").exists():
            return


# -------------------------------------------------------------------------------- what a run has shown


def curve(run: Path) -> list[dict[str, float]]:
    """What each validation measured, with the CPU seconds of all steps until then."""
    points = []
    for step, row in sorted(logged(run).items()):
        if "val/loss" in row:
            found = {k.removeprefix("val/"): round(v, 4) for k, v in row.items() if k.startswith("val/")}
            found = {name: value for name, value in found.items() if not name.startswith("z_usage_")}
            points.append({"step": step, "cpu_s": round(row["perf/cpu_s"], 2), **found})
    return points


def spikes(values: np.ndarray) -> int:
    """Steps whose value is far above those before it.

    Args:
        values: (n,), one for each step.

    Returns:
        How many are more than SPIKE robust standard deviations (1.4826 median absolute deviations) above the
        median of the WINDOW steps before them.
    """
    if len(values) <= WINDOW:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(values, WINDOW)[:-1]  # (n - WINDOW, WINDOW)
    middle = np.median(before, axis=1)
    deviation = 1.4826 * np.median(np.abs(before - middle[:, None]), axis=1)
    return int((values[WINDOW:] > middle + SPIKE * deviation).sum())


def setback(values: np.ndarray) -> float:
    """By how much the mean of SMOOTHED steps was ever above its lowest value before: damage that lasts."""
    if len(values) < SMOOTHED:
        return 0.0
    means = np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
    return float((means - np.minimum.accumulate(means)).max())


def stability(run: Path, clip_norm: float) -> dict[str, float]:
    """Gradient norms before clipping, and spikes of the loss, over all steps."""
    rows = [row for _, row in sorted(logged(run).items()) if "train/loss" in row]
    loss, norm = (np.array([row[f"train/{name}"] for row in rows]) for name in ("loss", "grad_norm"))
    found = {
        "grad_norm_median": float(np.median(norm)),
        "grad_norm_99": float(np.quantile(norm, 0.99)),
        "grad_norm_max": float(norm.max()),
        "clipped": float((norm > clip_norm).mean()),
        "loss_spikes": spikes(loss),
        "grad_norm_spikes": spikes(norm),
        "setback": setback(loss),
    }
    return {name: round(value, 4) for name, value in found.items()}


# ------------------------------------------------------------------------------------ the test split


def measured(checkpoint: Path, data: Path, contexts: int) -> dict[str, np.ndarray]:
    """What a checkpoint reaches on the test split.

    Args:
        checkpoint: of any of the stages here.
        data: the prepared corpus.
        contexts: that a model of stage 2.2 chooses a response for.

    Returns:
        Of stages 1 and 2.1 `tokens`, `nll` and `nll_uniform`, (n,) sums over the response of each sample, and
        what z says, (); of stage 2.2 its figures, ().
    """
    import torch

    from plato2.data.collate import CoherenceBatch, GenerationBatch
    from plato2.data.module import DialogueDataModule
    from plato2.data.selection import read_selection
    from plato2.stages import CoherenceEstimation, FineGeneration
    from plato2.talk.selection import selection_figures
    from plato2.weights.folder import load_stage

    stage = load_stage(checkpoint)
    batch: Any = GenerationBatch(latent_slot=isinstance(stage, FineGeneration))
    if isinstance(stage, CoherenceEstimation):
        batch = CoherenceBatch(mask_prob=0.0, head=stage.head)
    module = DialogueDataModule(str(data), batch, batch_tokens=4096, unit_tokens=4096)
    splits = module.index.splits
    module.index = replace(module.index, splits={**splits, "valid": splits["test"]})  # validates on it
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for step in module.val_dataloader():
            for unit in step["units"]:
                terms, n = stage.losses(unit), len(unit["sample_index"])
                if isinstance(stage, CoherenceEstimation):
                    if "coherence_acc" in terms:  # of head first; the other one's has to be fitted
                        found.setdefault("right", []).append(terms["coherence_acc"])
                    continue
                terms["tokens"] = torch.ones_like(terms["nll"])
                for name in ("tokens", "nll", "nll_uniform"):
                    if name in terms:
                        sums = torch.zeros(n).index_add(0, unit["target_sample"], terms[name].float())
                        found.setdefault(name, []).append(sums)
    arrays = {name: torch.cat(parts).double().numpy() for name, parts in found.items()}
    if isinstance(stage, CoherenceEstimation):
        right = arrays["right"].mean() if "right" in arrays else float(stage.fitted.compute()[1])
        chosen = read_selection(data, contexts, "test")
        figures = selection_figures(stage, chosen) | {"coherence_acc": float(right)}
        return {name: np.array(value) for name, value in figures.items()} | {
            "contexts": np.array(len(chosen.contexts))
        }
    if isinstance(stage, FineGeneration):
        usage = stage.latent_usage.compute()
        arrays |= {
            "z_mutual_information": usage.mutual_information.numpy(),
            "z_effective": usage.effective.numpy(),
        }
    return arrays


def kept_measures(name: str, checkpoint: Path, given: argparse.Namespace) -> dict[str, np.ndarray]:
    """`measured`, once for each step of a run."""
    from plato2.runs.saved import checkpoint_step

    step = checkpoint_step(checkpoint)
    file = folder("test", given) / f"{name}-{step}-{given.contexts}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.savez(out, **measured(checkpoint, given.data, given.contexts))
        part.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def figures(found: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Value, low and high of each measure; 95 % intervals over samples or contexts, where there are some."""
    from plato2.metrics import bootstrap, wilson

    told: dict[str, list[float | None]] = {}
    for name, nll in ((name, found[name]) for name in ("nll", "nll_uniform") if name in found):

        def perplexity(draw: np.ndarray, nll: np.ndarray = nll) -> float:
            return math.exp(nll[draw].sum() / found["tokens"][draw].sum())

        n = len(nll)
        told[name.replace("nll", "ppl")] = [perplexity(np.arange(n)), *bootstrap(perplexity, n)]
    for name in ("z_mutual_information", "z_effective", "coherence_acc", "pair_acc", "p1", "p1_matched"):
        if name in found:
            value = float(found[name])
            of_contexts = name in ("p1", "p1_matched")
            told[name] = [value, *(wilson(value, int(found["contexts"])) if of_contexts else (None, None))]
    return {name: [None if x is None else round(x, 4) for x in values] for name, values in told.items()}


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray], name: str) -> list[float]:
    """By how many nats a token of the test split `other` is worse than `one`, with its 95 % interval; both
    are drawn with the same samples."""
    from plato2.metrics import bootstrap

    gap, tokens = other[name] - one[name], one["tokens"]

    def mean(draw: np.ndarray) -> float:
        return float(gap[draw].sum() / tokens[draw].sum())

    return [round(x, 4) for x in (mean(np.arange(len(gap))), *bootstrap(mean, len(gap)))]


# --------------------------------------------------------------------------------------------- results


def record_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What is recorded of each run, whatever its stage."""
    from plato2.runs.folder import RunFolder

    run = folder(name, given)
    lineage, rows = RunFolder(run).lineage(), logged(run)
    optim, diverged = lineage["config"]["optim"], run / "diverged.txt"
    steps = max(step for step, row in rows.items() if "train/loss" in row)
    return {
        "git": lineage["git"], "lr": optim["lr"], "warmup_steps": optim["warmup_steps"], "steps": steps,
        "samples": round(rows[steps]["perf/samples"]), "cpu_s": round(rows[steps]["perf/cpu_s"], 2),
        "diverged": diverged.read_text(encoding="utf-8").strip() if diverged.exists() else None,
        "curve": curve(run), "stability": stability(run, optim["clip_norm"]),
    }  # fmt: skip


def first_record(points: Sequence[int], given: argparse.Namespace) -> dict[str, Any]:
    """Stage 1, with its points."""
    at = {
        str(point): {
            "cpu_s": round(spent(folder(FIRST, given), point), 2),
            "test": figures(kept_measures(FIRST, kept_point(point, given), given)),
        }
        for point in sorted(points)
    }
    return record_of(FIRST, given) | {"points": at}


def second_record(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """A run of a second stage; what it is worth is measured of its last step."""
    last = folder(run.name, given) / "checkpoints" / "last.ckpt"
    before = spent(folder(FIRST, given), run.start) if run.start else 0.0
    facts = {"stage": run.stage, "start": run.start, "rate": run.rate, "start_cpu_s": round(before, 2)}
    tested = figures(kept_measures(run.name, last, given)) if last.exists() else {}
    return {**facts, **record_of(run.name, given), "test": tested}


def differences(points: Sequence[int], given: argparse.Namespace) -> dict[str, Any]:
    """Random weights less the longest start, after the same time in all: nats a token, test split."""
    runs = [run for run in planned("2_gen", points) if run.start in (0, max(points))]
    found = {
        run: kept_measures(run.name, folder(run.name, given) / "checkpoints" / "last.ckpt", given)
        for run in runs
        if not (folder(run.name, given) / "diverged.txt").exists()
    }
    return {
        f"{other.name} - {one.name}": {
            name: difference(found[one], found[other], name) for name in ("nll", "nll_uniform")
        }
        for other in found
        for one in found
        if other.start == 0 and one.start > 0
    }


def baselines(data: Path, contexts: int) -> dict[str, Any]:
    """What needs no training: words by their frequency, shared words on validation and test contexts."""
    from plato2.data.selection import read_selection
    from plato2.data.shards import read_index
    from plato2.talk.selection import overlap_figures

    index = read_index(data)
    if "test" not in index.splits:
        raise SystemExit(f"{data}: has no test split; prepare it again, `plato2 prepare` makes one")
    shared = {
        split: {name: round(x, 4) for name, x in overlap_figures(read_selection(data, n, split)).items()}
        for split, n in (("valid", CHOICES), ("test", contexts))
    }
    return {"unigram_ppl": index.unigram.get("ppl"), "shared words": shared}


def made_with() -> dict[str, Any]:
    """Versions, git commit, machine, and what the call took until now, validations included."""
    import torch

    from plato2.runs.folder import provenance
    from plato2.runs.parallel import best_precision

    return {
        **provenance(), "threads": torch.get_num_threads(),
        "precision": best_precision("cpu"), "cpu_s_of_this_call": round(time.process_time(), 1),
    }  # fmt: skip


def record(made: dict[str, Any], known: dict[str, Any], given: argparse.Namespace) -> None:
    """Puts a seed and the baselines into results.json, beside the seeds that are there."""
    from plato2.files import replace_text

    file, asked = given.results / "results.json", {"contexts": given.contexts, "overrides": given.overrides}
    results: dict[str, Any] = {"asked": asked, "baselines": known, "seeds": {}}
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["asked"] != asked and set(before["seeds"]) - {str(given.seed)}:
            raise SystemExit(f"{file}: its seeds were asked {before['asked']}, not {asked}")
        results["seeds"] = before["seeds"]
    there = results["seeds"].get(str(given.seed), {"runs": {}, "differences": {}})
    made = made | {"runs": there["runs"] | made["runs"]}  # of other stages or points
    made["differences"] = made["differences"] or there["differences"]
    results["seeds"][str(given.seed)] = made
    results["seeds"] = dict(sorted(results["seeds"].items(), key=lambda seed: int(seed[0])))
    given.results.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(results, indent=1) + "\n")


def make(given: argparse.Namespace) -> None:
    """Trains and measures stage after stage, and records each when it is done."""
    known = baselines(given.data, given.contexts)  # what is missing is said before anything is trained
    train_first(given.points, given)
    made: dict[str, Any] = {"first": first_record(given.points, given), "runs": {}, "differences": {}}
    for stage in SECOND:
        if stage in given.stages:
            for run in planned(stage, given.points):
                train_second(run, given.points, given)
                made["runs"][run.name] = second_record(run, given)
            if stage == "2_gen":
                made["differences"] = differences(given.points, given)
            record({"made_with": made_with(), **made}, known, given)
            for run in sorted(folder("", given).iterdir()):
                file = given.results / "config" / f"seed-{given.seed}" / f"{run.name}.yaml"
                keep_config(run, file, folder("", given))


# --------------------------------------------------------------------------------------------- pictures


def draw(results: Path) -> None:
    """A picture of each second stage: its measures over its own CPU time, and over all of it."""
    import runpy

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = json.loads((results / "results.json").read_text(encoding="utf-8"))
    measures = runpy.run_path(str(HERE / "tables.py"))["MEASURES"]
    for stage, shown in measures.items():
        runs = [
            (seed, run) for seed in found["seeds"].values() for run in seed["runs"].values()
            if run["stage"] == stage
        ]  # fmt: skip
        if not runs:
            continue
        starts = sorted({run["start"] for _, run in runs})
        figure, axes = plt.subplots(2, len(shown), figsize=(4.2 * len(shown), 8), layout="constrained")
        for column, (name, (label, _)) in enumerate(shown.items()):
            for row, with_first in enumerate((False, True)):
                axis = axes[row, column]
                for _, run in runs:
                    before = run["start_cpu_s"] if with_first else 0.0
                    axis.plot(
                        [(before + point["cpu_s"]) / 60 for point in run["curve"]],
                        [point.get(name) for point in run["curve"]],
                        "-" if run["rate"] == OWN else "--",
                        color="black" if not run["start"] else f"C{starts.index(run['start'])}",
                        marker=".",
                        label=f"{run['start'] or 'random weights'}, {run['rate']} rate",
                    )
                if with_first and name == "ppl_uniform":
                    for seed in found["seeds"].values():
                        points = seed["first"]["curve"]
                        x, y = [p["cpu_s"] / 60 for p in points], [p["ppl"] for p in points]
                        axis.plot(x, y, ":", color="grey", label="stage 1 itself")
                for value in baseline_lines(name, found["baselines"]):
                    axis.axhline(value, color="grey", linewidth=0.8, linestyle=":")
                if name.startswith("ppl"):
                    axis.set_yscale("log")
                axis.set_title(label, fontsize=10)
                axis.set_xlabel("CPU minutes in all" if with_first else "CPU minutes of this stage")
        entries = dict(zip(*reversed(axes[1, 0].get_legend_handles_labels()), strict=True))  # each once
        axes[1, 0].legend(entries.values(), entries, fontsize=7)
        figure.suptitle(
            f"{stage} from so many steps of stage 1; grey dots: chance, shared words", fontsize=10
        )
        figure.savefig(results / f"{stage}.png", dpi=100)
        plt.close(figure)


def baseline_lines(name: str, known: dict[str, Any]) -> list[float]:
    """Chance and shared words on the validation contexts, for what they are baselines of."""
    chance = {"coherence_acc": 0.5, "pair_acc": 0.5, "p1": 0.1}
    if name not in chance:
        return []
    shared = known["shared words"]["valid"]
    return [chance[name], *([shared[name]] if name in shared else [])]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="the prepared corpus, with a test split")
    add("--out", type=Path, default=Path("outputs/curriculum"), help="where runs are kept")
    add("--seed", type=int, default=0, help="of weights and order of samples")
    add("--points", type=int, nargs="+", default=list(POINTS), help="steps of stage 1 before a second stage")
    add("--stages", nargs="+", default=list(SECOND), choices=list(SECOND), help="only these second stages")
    add("--contexts", type=int, default=TEST_CHOICES, help="of the test split, to choose a response for")
    add("--results", type=Path, default=HERE, help="folder of results.json, config/ and the pictures")
    add("--only-draw", action="store_true", help="train nothing, draw what results.json has")
    add("overrides", nargs="*", help="further ones of train.py, for all runs")
    return parser.parse_args()


def main() -> None:
    """Makes one seed, records and draws it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = arguments()
    if not given.only_draw:
        if given.data is None:
            raise SystemExit("give --data")
        import torch

        torch.set_num_threads(1)
        given.data, given.out = given.data.absolute(), given.out.absolute()
        make(given)
    draw(given.results)


if __name__ == "__main__":
    main()
