"""benchmarks/device.sh as a dry run: every part on a CPU, tiny models, and one that fails among them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import ROOT, environment

MODELS = ("no_such_model", "93m")  # a dry run makes every size the same
STAGES = ("1_coarse", "2_gen", "2_eval")
CORPORA = {"chitchat": (128, 128), "chitchat_64": (64, 64)}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What benchmarks/wheels.sh prepares."""
    from plato2.prepare.dialogues import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("corpora")
    for name, (max_context, max_response) in CORPORA.items():
        out, limits = str(folder / name), {"max_context": max_context, "max_response": max_response}
        prepare(PrepareOptions(corpus="chitchat", out=out, **limits))
    return folder


@pytest.fixture(scope="module")
def done(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit code, output and folder of a dry run in which one model does not exist."""
    out = tmp_path_factory.mktemp("device")
    command = ["bash", str(ROOT / "benchmarks" / "device.sh"), str(out), "--dry-run"]
    variables = environment(MODELS=" ".join(MODELS), DEVICE_DATA=str(corpora))
    run = subprocess.run(command, env=variables, cwd=out, capture_output=True, text=True, timeout=900)
    return run.returncode, run.stdout + run.stderr, out


def numbers(value: Any) -> Iterator[float]:
    """All numbers in plain values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield float(value)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(done: tuple[int, str, Path]) -> None:
    code, output, out = done
    parts = json.loads((out / "device.json").read_text(encoding="utf-8"))["parts"]
    expected = ["machine", "tests", *(f"{verb} {model}" for verb in ("train", "decode") for model in MODELS)]
    assert list(parts) == [*expected, "evening"], output
    status = {name: part["status"] for name, part in parts.items()}
    failed = {f"{verb} no_such_model" for verb in ("train", "decode")}
    assert status == {name: "failed" if name in failed else "ok" for name in status}, output
    assert all("no_such_model" in parts[name]["error"] for name in failed)
    assert code == 1  # not all of it was well
    assert all(math.isfinite(number) for number in numbers(parts)), output

    assert parts["machine"]["product_tflops"] > 0
    assert parts["tests"]["passed"] >= 20
    for model in set(MODELS) - {"no_such_model"}:
        trained, decoded = parts[f"train {model}"]["stages"], parts[f"decode {model}"]
        assert set(trained) == set(STAGES)
        for found in trained.values():
            assert min(found[name] for name in ("tokens_per_s", "samples_per_s", "step_s", "mfu")) > 0
            assert found["timed_steps"] in (1, 2)  # one, where the seconds are over by then
        assert decoded["weights"] == "random"
        assert set(decoded["batches"]) == {"1", "8", "32"}
        assert all(found["replies_per_s"] > 0 for found in decoded["batches"].values())
    stages = parts["evening"]["stages"]
    assert list(stages) == ["1_coarse", "2_gen", "2_eval_dual", "2_eval"]
    assert all(found["metrics"]["val/loss"] > 0 for found in stages.values())


@pytest.mark.slow
def test_a_dry_run_leaves_four_small_files(done: tuple[int, str, Path]) -> None:
    _, output, out = done
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(sizes) == {"device.json", "dialogues.txt", "curriculum.csv", "log.txt"}
    assert sum(sizes.values()) < 2**20
    assert (out / "dialogues.txt").read_text(encoding="utf-8").count("human: ") == 3
    rows = (out / "curriculum.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "stage,step,metric,value"
    assert {row.split(",")[0] for row in rows[1:]} == {"1_coarse", "2_gen", "2_eval_dual", "2_eval"}
    assert (out / "log.txt").read_text(encoding="utf-8").splitlines()[-1] in output


def test_a_part_without_time_is_recorded_and_what_was_found_stays(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "benchmarks.device_results", str(tmp_path)]
    (tmp_path / "device.json").write_text(json.dumps({"parts": {"train 93m": {"stages": {}}}}))
    for name, code in (("train 93m", "124"), ("evening", "137"), ("machine", "0"), ("tests", "1")):
        subprocess.run([*script, "ended", name, code, "40", "41"], cwd=ROOT, check=True)
    parts = json.loads((tmp_path / "device.json").read_text())["parts"]
    assert parts["train 93m"] == {
        "stages": {},
        "status": "timed out",
        "exit_code": 124,
        "limit_s": 40,
        "wall_s": 41,
    }
    statuses = ["timed out", "timed out", "ok", "failed"]
    assert [part["status"] for part in parts.values()] == statuses
    told = subprocess.run([*script, "summary"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1
    assert [line.split()[0] for line in told.stdout.splitlines()] == ["train", "evening", "machine", "tests"]
