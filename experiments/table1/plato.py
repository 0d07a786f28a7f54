"""PLATO, the paper's baseline: one network that writes and ranks, trained in one stage from random weights.

It gets as much CPU time as the curriculum took, or less where that is said. A linear schedule needs its
number of steps beforehand, so the pace is measured on a short run first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from variants import training_cpu_s

from plato2.config import UserError
from plato2.runs.saved import read_metrics
from plato2.weights.folder import read_saved

ROOT = Path(__file__).parents[2]
CURRICULUM = ("coarse", "fine", "dual")
"""The runs whose CPU time it gets: a curriculum has one ranker."""
PROBE_STEPS, UNCOUNTED_STEPS = 60, 10
"""Of the run that the pace is measured on, and how many of its first ones do not count: they warm up."""
WARM_UP = 0.05
SAME = ("n_layer", "n_head", "hidden_size", "max_position")
"""Its geometry is that of stage 1."""


def trained(
    runs: Mapping[str, Path],
    data: Path,
    minutes: float,
    seed: int,
    out: Path,
    more: tuple[str, ...] = (),
    probe_steps: int = PROBE_STEPS,
) -> Path:
    """A run of stage plato; one that is finished is left alone, another one goes on.

    Args:
        runs: of the curriculum.
        data: the corpus.
        minutes: CPU minutes of its steps; 0: as many as the curriculum took.
        seed: of its weights and of the order of samples.
        out: folder of runs.
        more: further overrides of train.py.
        probe_steps: steps that the pace is measured on.

    Raises:
        UserError: it is not known what the curriculum took.
    """
    wanted = 60 * minutes or curriculum_cpu_s(runs)
    model = read_saved(runs["coarse"]).arguments["model"]
    common = [
        "stage=plato", "model=tiny", "data=shards", "strategy=cpu", f"data.path={data.absolute()}",
        f"seed={seed}", "optim.schedule=linear", "checkpoint_steps=200", "report=false", "human_rank=0",
        "sample_replies=0", "latent_contexts=0", f"output_dir={out.absolute()}", "name=runs",
        *(f"model.{key}={model[key]}" for key in SAME), *more,
    ]  # fmt: skip
    probe = train(out / "runs" / "plato-probe", common, probe_steps)
    steps = max(1, round(wanted / pace(probe)))
    return train(out / "runs" / "plato", common, steps)


def curriculum_cpu_s(runs: Mapping[str, Path]) -> float:
    """CPU seconds of the training steps of stages 1, 2.1 and 2.2."""
    spent = {name: training_cpu_s(runs[name]) if name in runs else None for name in CURRICULUM}
    missing = [name for name, found in spent.items() if found is None]
    if missing:
        raise UserError(
            f"--train-plato 0: not known what {', '.join(missing)} took; give runs with a metrics.csv, or "
            "minutes"
        )
    return sum(found for found in spent.values() if found is not None)


def train(run: Path, common: list[str], steps: int) -> Path:
    """Trains to the last step, and validates there."""
    lineage = run / "lineage.json"
    if lineage.exists() and json.loads(lineage.read_text(encoding="utf-8"))["status"] == "finished":
        return run
    command = [
        sys.executable, "train.py", *common, f"run_id={run.name}", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}", f"optim.warmup_steps={round(WARM_UP * steps)}",
        f"trainer.log_every_n_steps={UNCOUNTED_STEPS}",
    ]  # fmt: skip
    print("+", " ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run


def pace(run: Path) -> float:
    """CPU seconds of a step, without the first ones."""
    spent = {step: value for step, name, value in read_metrics(run / "metrics.csv") if name == "perf/cpu_s"}
    first, last = min(spent), max(spent)
    return (spent[last] - spent[first]) / (last - first)
