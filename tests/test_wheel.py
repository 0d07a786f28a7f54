"""The package as `pip install .` leaves it: without this checkout it talks and trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runs import make_run
from small import ROOT, command, environment

from plato2.runs.saved import read_metrics
from plato2.weights.export import export_to_huggingface

pytestmark = pytest.mark.slow

TALK = """
import json, sys
import plato2
from plato2 import PlatoBot
bot = PlatoBot.load(sys.argv[1], device="cpu")
reply = bot.reply(["hi"])
print(json.dumps([plato2.__file__, reply.text, sorted(c.latent for c in reply.candidates)]))
"""


def pip(*arguments: object) -> None:
    """One call of pip."""
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside the source
    for name in ("plato2", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
    shutil.copytree(
        ROOT / "benchmarks",
        source / "benchmarks",
        ignore=shutil.ignore_patterns("__pycache__", "data", "wheels"),
    )
    (source / "conf" / "local").mkdir()
    (source / "conf" / "local" / "default.yaml").write_text("output_dir: /home/somebody\n")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "-w", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    site = wheel.parent / "site"
    pip("install", "--no-deps", "--target", site, wheel)
    return site


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    runs = [make_run(folder / name, name) for name in ("2_gen", "2_eval")]
    export_to_huggingface(folder / "model", *runs)
    return folder / "model"


def run(site: Path, *arguments: object, expect: int = 0) -> str:
    """What Python prints, on stderr if it fails, in an empty folder with the wheel's files first."""
    empty = site.parent / "empty"
    empty.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=empty,
        env=environment(PYTHONPATH=os.fspath(site)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == expect, done.stderr
    return done.stderr if expect else done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"plato2", "hydra_plugins"}
    assert "plato2/weights/knover_english/spm.model" in names
    packaged = {name for name in names if name.startswith("plato2/") and name.endswith(".py")}
    assert packaged == {str(file.relative_to(ROOT)) for file in (ROOT / "plato2").rglob("*.py")}
    composed = {name for name in names if name.startswith("plato2/conf/")}
    files = {file.relative_to(ROOT) for file in (ROOT / "conf").rglob("*.yaml")}
    assert composed == {f"plato2/{file}" for file in files if file.parts[1] != "local"}


def test_it_trains(installed: Path, corpus: Path, tmp_path: Path) -> None:
    given = command(corpus, tmp_path, "run_id=w", "trainer.max_steps=2", "trainer.val_check_interval=2")[2:]
    run(installed, "-m", "plato2", "train", *given)
    found = run(
        installed, "-c", "import plato2, sys; print(plato2.train(*sys.argv[1:]).run)", *given, "run_id=p"
    )
    assert found.splitlines()[-1] == str(tmp_path / "tiny-1_coarse" / "p")
    (named, called) = (read_metrics(tmp_path / "tiny-1_coarse" / name / "metrics.csv") for name in "wp")
    losses = [[row for row in rows if not row[1].startswith("perf/")] for rows in (named, called)]
    assert losses[0] == losses[1] != []
    swept = run(installed, "-m", "plato2", "train", "-m", *given, "seed=1,2", "run_id=s")
    assert "s-0" in swept
    assert "s-1" in swept
    alone = ["stage=2_gen", f"output_dir={tmp_path}/none"]
    first = run(installed, "-m", "plato2", "train", *given, *alone, expect=2)
    assert "run this first: plato2 train experiment=smoke" in first
    assert run(installed, "-c", "from plato2.runs.console import VERBS; print(VERBS)") == "plato2\n"
    assert "Groups (GROUP=OPTION)" in run(installed, "-m", "plato2", "train", "--help")


def test_it_talks_from_python(installed: Path, model: Path) -> None:
    file, text, latents = json.loads(run(installed, "-c", TALK, model))
    assert Path(file).is_relative_to(installed)
    assert text
    assert latents == list(range(5))


def test_it_talks_on_the_command_line(installed: Path, model: Path) -> None:
    assert "chat" in run(installed, "-m", "plato2", "--help")
    answer = json.loads(run(installed, "-m", "plato2", "reply", "--generation", model, "--json", "hi"))
    assert len(answer["candidates"]) == 5
    assert answer["candidates"][0]["coherence"] is not None
