"""The package as `pip install .` leaves it: without conf/, without this checkout, everything talks."""

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
from small import ROOT, environment

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
    shutil.copytree(ROOT / "plato2", source / "plato2", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
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


def run(site: Path, *arguments: object) -> str:
    """Python in an empty folder, with the wheel's files first."""
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
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"plato2"}
    assert "plato2/weights/knover_english/spm.model" in names
    packaged = {name for name in names if name.startswith("plato2/") and name.endswith(".py")}
    assert packaged == {str(file.relative_to(ROOT)) for file in (ROOT / "plato2").rglob("*.py")}


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
