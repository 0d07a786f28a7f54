"""Fixtures of all tests: a small real-shaped corpus, prepared once, and train.py on it.

Nothing heavy is imported at the top: the process that hands out the tests reads this file, too.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads only slow small tensors down

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks
from small import ROOT, Done, Train, command, environment, train_in_process, write_dialogues


def pytest_collection_finish() -> None:
    """Some libraries collect garbage by hand, which took seconds among all that the tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _compositions_are_remembered() -> Iterator[None]:
    from composing import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of about 500 short samples with a 300-piece tokenizer."""
    from plato2.prepare.dialogues import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("corpus")
    dialogues = write_dialogues(folder / "dialogues.jsonl")
    options = PrepareOptions(
        corpus="jsonl",
        files=[str(dialogues)],
        out=str(folder / "shards"),
        vocab_pieces=300,
        max_context=32,
        max_response=32,
        shard_samples=128,
        valid_dialogues=20,
        test_fraction=0.0,
    )
    prepare(options)
    return folder / "shards"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes in no time."""
    assert not {"RUN_ID", "SLURM_JOB_ID"} & set(environment())
    path = f"{ROOT}:{ROOT / 'tests' / 'plugins'}"
    server = Forks(PYTHONPATH=path, OMP_NUM_THREADS="1", WANDB_MODE="offline")
    yield server
    server.close()


@pytest.fixture
def run_train(corpus: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python train.py OVERRIDES` on the small corpus; `returncode` is asserted to be `expect`."""

    def run(*overrides: str, expect: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(corpus, tmp_path / "outputs", *overrides),
            env=environment(**variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def train_here(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`python train.py OVERRIDES` on the small corpus in this process; `returncode` is asserted."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, expect: int = 0, script: Path = ROOT / "train.py", **variables: str) -> Done:
        arguments = command(corpus, tmp_path / "outputs", *overrides)[2:]
        done = train_in_process(arguments, tmp_path, script, **variables)
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
