"""The systems of tables 1 and 5: the parts of the curriculum, which writes and which ranks.

Also what both experiments need of the runs: that they are what the options say, what they cost, what their
configuration was; and results.json, where every seed has its place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plato2.config import UserError
from plato2.files import replace_text
from plato2.random import draw_key
from plato2.runs.folder import provenance
from plato2.runs.saved import checkpoint_step, read_metrics
from plato2.talk.speaker import weights_hash
from plato2.weights.folder import checkpoint_file, load_evaluation, load_generation, read_saved


@dataclass(frozen=True)
class System:
    """What replies."""

    label: str
    writer: str
    """The run that writes the candidates."""
    ranker: str | None = None
    """The run that chooses among them; None: nothing does."""
    candidates: int = 20
    """Samples of stage 1. The others write one for each latent."""


SYSTEMS = {
    "coarse": System("stage 1, one sample", "coarse", None, 1),
    "coarse_dual": System("stage 1, 20 samples, ranked by `dual`", "coarse", "dual"),
    "coarse_first": System("stage 1, 20 samples, ranked by `first`", "coarse", "first"),
    "fine": System("stages 1 + 2.1, a random z", "fine"),
    "fine_dual": System("stages 1 + 2.1 + 2.2, all z, ranked by `dual`", "fine", "dual"),
    "fine_first": System("stages 1 + 2.1 + 2.2, all z, ranked by `first`", "fine", "first"),
    "plato": System("PLATO, all z, ranked by itself", "plato", "plato"),
}
RUNS = {
    "coarse": ("1_coarse", "a run of stage 1"),
    "fine": ("2_gen", "a run of stage 2.1"),
    "first": ("2_eval", "a run of stage 2.2 with the paper's head"),
    "dual": ("2_eval", "a run of stage 2.2 with head dual"),
    "plato": ("plato", "a run of stage plato"),
}
"""Option -> its stage, and what it is."""
HEADS = ("dual", "first")
MAX_TOKENS, BATCH = 64, 16
ANOTHER_DRAW = 1 << 20
"""Number of the draw of z, apart from those of the tokens."""
DIGITS = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both experiments: the corpus, the runs, the seed."""
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus with a test split")
    for name, (_, what) in RUNS.items():
        parser.add_argument(f"--{name}", type=Path, help=what)
    parser.add_argument("--limit", type=int, help="only so many start questions or contexts")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; a place of its own in --out")


def given_runs(given: argparse.Namespace) -> dict[str, Path]:
    """The runs that were given, each checked to be of its stage and head.

    Raises:
        UserError: one is not.
    """
    found = {name: path for name in RUNS if (path := getattr(given, name))}
    for name, path in found.items():
        saved = read_saved(path, [RUNS[name][0]], f"--{name}")
        head = saved.arguments.get("head") or "first"
        if name in HEADS and head != name:
            raise UserError(f"--{name} {path}: its head is {head}; give it as --{head}")
    return found


def systems_of(runs: Mapping[str, Path]) -> dict[str, System]:
    """The systems whose runs are there."""
    return {
        name: system
        for name, system in SYSTEMS.items()
        if system.writer in runs and (system.ranker is None or system.ranker in runs)
    }


def random_latent(seed: int, n: int) -> int:
    """One of n latents, by the seed of a reply."""
    return draw_key(seed, ANOTHER_DRAW) % n


def described(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Of each run what it is, and the CPU seconds that its training took."""
    found = {}
    for name, path in runs.items():
        saved = read_saved(path, option=f"--{name}")
        network = (load_evaluation if name in HEADS else load_generation)(path, f"--{name}")
        found[name] = {
            "stage": saved.stage,
            "geometry": saved.arguments["model"],
            "step": checkpoint_step(checkpoint_file(path)),
            "sha256": weights_hash(network),
            "cpu_s": training_cpu_s(path),
        }
    return found


def training_cpu_s(run: Path) -> float | None:
    """CPU seconds of the training steps of a run; None where it has no metrics.csv."""
    if not (run / "metrics.csv").is_file():
        return None
    spent = [value for _, name, value in read_metrics(run / "metrics.csv") if name == "perf/cpu_s"]
    return round(spent[-1], 1) if spent else None


def machine() -> dict[str, Any]:
    """Git commit, versions, and what this runs on."""
    return provenance() | {"threads": torch.get_num_threads()}


def record(path: Path, seed: int, found: dict[str, Any]) -> None:
    """Puts a seed into results.json, beside others; the same seed is replaced.

    Args:
        path: of results.json.
        seed: which.
        found: what is known of it; `asked` must be the same for all seeds.

    Raises:
        UserError: another seed was asked something else.
    """
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seeds": {}}
    for other, there in results["seeds"].items():
        if other != str(seed) and there["asked"] != found["asked"]:
            raise UserError(
                f"{path}: seed {other} was asked {there['asked']}, this one {found['asked']}; give the same "
                "options, or another file as --out"
            )
    seeds = {**results["seeds"], str(seed): found}
    results["seeds"] = dict(sorted(seeds.items(), key=lambda one: int(one[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(results, indent=1) + "\n")
