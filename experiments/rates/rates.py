"""Learning rates for low-rank training: trains the first steps of each stage, records and draws the curves.

    python -m experiments.rates.rates --base FOLDER --data DIR [--coarse RUN]
    python -m experiments.rates.rates ... --keep    # trains only what results.json lacks

The same command continues after a kill. Stages 2.1 and 2.2 start from --coarse, a stage 1 of
experiments/pretrained; without it they are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from experiments.configs import keep_config
from plato2.runs.saved import checkpoint_step, read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RATES = {
    "1_coarse": ("2e-4", "5e-4", "1.25e-3", "3e-3"),
    "2_gen": ("2e-4", "5e-4", "1.25e-3"),
    "2_eval_dual": ("5e-4", "1.25e-3"),
}
NOTHING = "1e-9"
"""A rate that changes nothing: the decoder as it is."""
AS_OURS = ("stage.recognition_bias=learned", "model.latent_at=front", "model.latent_scale=1")
"""Latents as in our own models, not as the recipe now has them."""
STEPS = {"1_coarse": 60, "2_gen": 36, "2_eval_dual": 60}
COMMON = [
    *("model=pretrained_lora", "model.max_position=192", "model.adapter_rank=8", "model.adapter_alpha=16"),
    *("data=shards", "data.unit_tokens=1024", "data.row_length=256", "data.valid_units=24"),
    *("optim.batch_tokens=2048", "optim.schedule=linear", "seed=0", "strategy=cpu", "checkpoint_steps=10"),
    *("selection=300", "human_rank=0", "sample_replies=0", "latent_contexts=0", "report=false"),
]
SHOWN = (
    *("nll", "nll_uniform", "bow", "z_mutual_information", "z_effective", "rce"),
    *("pair_acc", "p1", "overlap_pair_acc", "overlap_p1"),
)
"""What is kept of a validation; docs/train.md explains each figure."""
MADE_WITH = ("git", "packages", "python", "machine", "cpu", "created")
DRAWN = {"1_coarse": "nll", "2_gen": "nll_uniform", "2_eval": "pair_acc"}


def beginning(stage: str, rate: str, steps: int, *overrides: str) -> list[str]:
    """The options of so many steps, validated at every third, with a warm-up of a sixth of them."""
    schedule = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // 3}"]
    return [
        *COMMON,
        *(f"stage={stage}", f"optim.lr={rate}", f"optim.warmup_steps={steps // 6}"),
        *(*schedule, *overrides),
    ]


def plan(coarse: Path | None) -> dict[str, list[str]]:
    """Run -> its options, in the order in which they are trained."""
    runs = {}
    for mask in ("prefix", "causal"):
        of = f"model.context_mask={mask}"
        runs[f"as_it_is_{mask}-{NOTHING}"] = beginning("1_coarse", NOTHING, 3, of)
        name = "1_coarse" if mask == "prefix" else "1_coarse_causal"
        rates = RATES["1_coarse"]
        runs |= {f"{name}-{rate}": beginning("1_coarse", rate, STEPS["1_coarse"], of) for rate in rates}
    if coarse is not None:
        for stage in ("2_gen", "2_eval_dual"):
            of = (f"init_from={coarse}", "model.context_mask=causal", *(AS_OURS if stage == "2_gen" else ()))
            runs |= {f"{stage}-{rate}": beginning(stage, rate, STEPS[stage], *of) for rate in RATES[stage]}
    return runs


def finished(run: Path) -> bool:
    """Whether a run has reached its last step."""
    lineage = run / "lineage.json"
    return lineage.exists() and json.loads(lineage.read_text(encoding="utf-8"))["status"] == "finished"


def recorded(run: Path) -> dict[str, Any]:
    """What a run was, and its figures by step."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    lineage = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
    parent, rows = lineage.get("parent"), read_metrics(run / "metrics.csv")
    curve: dict[int, dict[str, float]] = {}
    for step, name, value in rows:
        if name.startswith("val/") and (figure := name.removeprefix("val/")) in SHOWN:
            curve.setdefault(step, {})[figure] = round(value, 4)
    return {
        "stage": lineage["stage"],
        "starts_from_step": checkpoint_step(Path(parent["checkpoint"])) if parent else None,
        "rate": config["optim"]["lr"],
        "context_mask": config["model"]["context_mask"],
        "cpu_s": round(max(value for _, name, value in rows if name == "perf/cpu_s"), 1),
        "curve": [{"step": step, **found} for step, found in sorted(curve.items())],
        "made_with": {key: lineage[key] for key in MADE_WITH},
    }


def draw(runs: dict[str, Any], path: Path) -> None:
    """The figure by which each stage's rate is chosen, over its steps."""
    stages = [stage for stage in DRAWN if any(run["stage"] == stage for run in runs.values())]
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        for run in runs.values():
            if run["stage"] == stage and run["rate"] > float(NOTHING):
                steps, values = zip(*((p["step"], p[DRAWN[stage]]) for p in run["curve"]), strict=True)
                causal = run["context_mask"] == "causal"
                label = f"{run['rate']:g}{', causal context' * causal}"
                axis.plot(steps, values, "--" if causal else "-", marker=".", label=label)
        axis.set(title=stage, xlabel="steps", ylabel=DRAWN[stage])
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains what is not finished, then records everything that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="the decoder's folder")
    parser.add_argument("--data", required=True, help="the prepared corpus")
    parser.add_argument("--coarse", type=Path, help="a finished stage 1, for stages 2.1 and 2.2")
    parser.add_argument("--out", type=Path, default=Path("outputs/rates"), help="where runs are kept")
    parser.add_argument("--keep", action="store_true", help="do not train again what results.json has")
    given = parser.parse_args()
    results = HERE / "results.json"
    kept = json.loads(results.read_text(encoding="utf-8"))["runs"] if given.keep else {}
    out = given.out.absolute()
    places = [f"model.path={given.base}", f"data.path={given.data}"]
    places += [f"output_dir={out.parent}", f"name={out.name}"]
    runs = {}
    for name, options in plan(given.coarse).items():
        run = out / name
        if name in kept:
            runs[name] = kept[name]
            continue
        if not finished(run):
            command = [sys.executable, "train.py", *options, *places, f"run_id={name}"]
            print("+", *command[1:], flush=True)
            subprocess.run(command, cwd=ROOT, check=True)
        runs[name] = recorded(run)
        keep_config(run, HERE / "config" / f"{name}.yaml")
    results.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    draw(runs, HERE / "curves.png")


if __name__ == "__main__":
    main()
