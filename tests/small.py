"""A model and a corpus that train in milliseconds, and the train.py command on them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [  # a model and batches that train in milliseconds
    "experiment=smoke",
    "data=shards",
    "model.vocab_size=301",
    "optim.schedule=inverse_sqrt",  # a linear one hangs on max_steps, which tests raise to go on
    "model.dropout=0.1",  # tiny has none, and resuming must be exact with it, too
    "model.max_position=64",
    "data.row_length=128",
    "data.unit_tokens=512",
    "data.valid_units=2",
    "optim.batch_tokens=1024",
    "strategy=cpu",
    "strategy.precision=32-true",
    "sample_replies=0",
]
WORDS = [a + b + c for a in "bdgklmnprst" for b in "aeiou" for c in ("", "n", "s", "k")]


def write_dialogues(path: Path, n_dialogues: int = 300, seed: int = 0) -> Path:
    """Random dialogues of made-up words in which an answer repeats a word of the turn before."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n_dialogues):
            turns = [" ".join(rng.choices(WORDS, k=rng.randint(3, 8)))]
            while len(turns) < rng.randint(2, 5):
                words = [rng.choice(turns[-1].split()), *rng.choices(WORDS, k=rng.randint(2, 6))]
                turns.append(" ".join(words))
            file.write(json.dumps({"turns": turns}) + "\n")
    return path


def command(corpus: Path, output_dir: Path, *overrides: str) -> list[str]:
    """`python train.py` on the small corpus; later overrides win."""
    flags = [item for item in overrides if item.startswith("-")]
    given = [*SMALL, f"data.path={corpus}", f"output_dir={output_dir}", *overrides]
    last = {item.split("=", 1)[0].lstrip("+"): item for item in given if item not in flags}
    return [sys.executable, str(ROOT / "train.py"), *flags, *last.values()]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a run: one thread, no run name and no W&B process from outside."""
    dropped = ("RUN_ID", "SLURM_JOB_ID", "WORLD_SIZE", "LOCAL_RANK", "RANK", "WANDB_SERVICE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | variables


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Train = Callable[..., Done]


def train_in_process(arguments: list[str], cwd: Path, script: Path, **variables: str) -> Done:
    """`python SCRIPT ARGUMENTS` in this process: saves the seconds of a start.

    The file runs as `__main__`, so all is as on a command line but for the exit code, which is returned. An
    exception that would end in a traceback is raised.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(script), *arguments])
        for name in {*os.environ} - {*environment()} | {"RUN_ID"}:  # also what a stopped sweep leaves behind
            patch.delenv(name, raising=False)
        for name, value in {"WANDB_MODE": "offline", "HYDRA_FULL_ERROR": "1", **variables}.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
    os.environ.pop("RUN_ID", None)
    return Done(int(str(code)), stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Runs in this process end early after that step, as with `max_time`."""
    from plato2.stages import Stage

    trained = Stage.training_step

    def training_step(stage: Stage, *given: Any) -> None:
        trained(stage, *given)
        stage.trainer.should_stop |= stage.global_step >= step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        yield


def assert_one_line(stderr: str, *names: str) -> None:
    """The last line is for the user and names what is wrong; before it only progress, nothing of Python's."""
    *before, last = stderr.splitlines()
    assert last.startswith("error: "), stderr
    assert not any(line.startswith("error: ") for line in before), stderr
    assert "Traceback" not in stderr, stderr
    for name in names:
        assert name in last, stderr
