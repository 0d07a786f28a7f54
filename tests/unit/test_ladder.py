"""experiments/ladder: a known law is found again, and the whole of it on networks of a few numbers."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import ROOT, SMALL, write_dialogues

HERE = ROOT / "experiments" / "ladder"
N = np.array([1e5, 6e5, 1.8e6, 3.2e6])[:, None] * np.ones(8)
D = np.linspace(1.6e6, 7.4e6, 8) * np.ones((4, 1))


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(HERE)
    yield importlib.import_module("ladder")
    for name in ("ladder", "law"):
        sys.modules.pop(name, None)


def test_a_known_law_is_found_again(ladder: Any) -> None:
    from law import Law, fit, intervals, power_law

    true = Law(e=2.5, a=20.0, alpha=0.2, b=250.0, beta=0.4)
    assert true(np.inf, np.inf) == 2.5
    assert true(1e5, np.inf) == pytest.approx(2.5 + 2.0)
    loss = true(N, D)
    loss[2, 5] *= 1.05  # one bad point hardly counts
    found = fit(N.ravel(), D.ravel(), loss.ravel())
    assert (found.e, found.alpha, found.beta) == pytest.approx((2.5, 0.2, 0.4), rel=0.05)
    assert found(85e6, 7.5e6) == pytest.approx(true(85e6, 7.5e6), rel=0.01)
    again = fit(N.ravel(), D.ravel(), loss.ravel(), near=found)
    assert again(85e6, 7.5e6) == pytest.approx(found(85e6, 7.5e6), rel=1e-3)
    assert power_law(np.array([1.0, 10.0]), np.array([4.0, 2.0]), 100.0) == pytest.approx(1.0)

    # Whole runs that are off: the interval has the truth, and no width where nothing is off.
    figures = {"at": lambda law: float(law(6.2e6, 7.4e6))}
    loss = true(N, D) * np.array([1.0, 0.998, 1.003, 0.999])[:, None]
    low, high = intervals(N, D, loss, fit(N.ravel(), D.ravel(), loss.ravel()), figures, 30)["at"]
    assert low < high
    assert low - 0.02 < true(6.2e6, 7.4e6) < high + 0.02
    low, high = intervals(N, D, true(N, D), true, figures, 5)["at"]
    assert (low, high) == pytest.approx([float(true(6.2e6, 7.4e6))] * 2, rel=1e-4)


def test_parameters_are_those_of_the_stage(ladder: Any) -> None:
    from plato2.config import ModelConfig
    from plato2.stages import CoarseGeneration

    config = ModelConfig(n_layer=2, n_head=1, hidden_size=64, max_position=128)
    n = ladder.parameters(ladder.FITTED["2x64"], 8001)
    assert n["with"] == sum(parameter.numel() for parameter in CoarseGeneration(config).parameters())
    assert n["with"] - n["without"] == (8001 + 128 + 2) * 64 + 8001
    heads = [size.n_head for size in (ladder.FITTED | ladder.HELD_OUT | ladder.FAR).values()]
    assert heads == [1, 2, 3, 4, 5, 12]


def test_every_size_composes(ladder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = Namespace(data=tmp_path / "none", every=200)
    for size in (ladder.FITTED | ladder.HELD_OUT).values():
        ladder.plato2.train(*ladder.overrides(size, size.rate, 2400, 0, given), "plan=true")
        total = ladder.parameters(size, 8001)["with"]
        assert f"{total:,}" in "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from plato2.prepare.dialogues import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("ladder")
    file = write_dialogues(folder / "dialogues.jsonl")
    options = PrepareOptions(
        corpus="jsonl", files=[str(file)], out=str(folder / "corpus"), vocab_pieces=300, max_context=32,
        max_response=32, valid_dialogues=20, test_dialogues=10,
    )  # fmt: skip
    return prepare(options, show_progress=False)


@pytest.mark.slow
def test_the_whole(ladder: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, size = ladder.overrides, ladder.Size

    def overrides(*given: Any) -> list[str]:
        wanted = full(*given)
        chosen = {word.split("=", 1)[0]: word for word in (*wanted, *SMALL)}
        kept = ("model.n_layer", "model.n_head", "model.hidden_size", "optim.lr", "optim.schedule")
        chosen |= {word.split("=", 1)[0]: word for word in wanted if word.startswith(kept)}
        chosen |= {"optim.batch_tokens": "optim.batch_tokens=512", "data": "data=shards"}
        return [*chosen.values()]

    monkeypatch.setattr(ladder, "overrides", overrides)
    monkeypatch.setattr(ladder, "HEAD_SIZE", 8)
    monkeypatch.setattr(ladder, "POSITIONS", 64)
    monkeypatch.setattr(ladder, "LOGGED_EVERY", 2)
    monkeypatch.setattr(ladder, "FITTED", {"1x8": size(1, 8), "1x16": size(1, 16), "2x24": size(2, 24)})
    monkeypatch.setattr(ladder, "HELD_OUT", {"2x32": size(2, 32)})
    monkeypatch.setattr(ladder, "CHECKED", ("1x8",))
    monkeypatch.setattr(sys.modules["law"], "TRIALS", 2)
    monkeypatch.setattr(sys.modules["law"], "TRIAL_RESAMPLES", 3)
    monkeypatch.setattr(ladder, "intervals", partial(ladder.intervals, resamples=3))
    monkeypatch.setattr(sys.modules["law"], "SHARES", (0.4,))
    monkeypatch.setattr(sys.modules["law"], "EXPONENTS", (0.4,))
    results = tmp_path / "results"
    words = ["--data", data, "--out", tmp_path / "out", "--results", results, "--steps", 24, "--every", 4]
    words += ["--first", 8, "--known", 12, "--rate-steps", 8]

    def started(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *map(str, words), *more])
        ladder.main()
        return dict(json.loads((results / "results.json").read_text(encoding="utf-8")))

    found = started()
    samples = found["corpus"]["samples"]
    curve = found["seeds"]["0"]["sizes"]["2x32"]["curve"]
    assert [point["step"] for point in curve] == [4, 8, 12, 16, 20, 24]
    assert found["fitted"] == [p["step"] for p in curve if p["step"] >= 8 and p["samples"] <= samples]
    assert found["fitted"][-1] < 24  # the curve ends in the second epoch
    assert curve[-1]["nll"] < curve[0]["nll"]
    assert [len(one) for one in found["seeds"]["0"]["rates"]["1x8"].values()] == [2, 2]
    assert len(found["tokens"]["actual"]) == 4
    assert (results / "ladder.png").stat().st_size > 10_000
    assert len([*(results / "config").glob("*.yaml")]) == 6
    assert str(tmp_path) not in "".join(file.read_text() for file in (results / "config").iterdir())

    # The same command again trains nothing and finds the same.
    def trained_again(*given: str) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(ladder.plato2, "train", trained_again)
    again = started()
    assert again | {"fitted_with": None} == found | {"fitted_with": None}

    # Two seeds, as if another had been trained.
    again["seeds"]["1"] = found["seeds"]["0"]
    (results / "results.json").write_text(json.dumps(again), encoding="utf-8")
    both = started("--only-fit")
    assert both["size"] == found["size"]
    tables = runpy.run_path(str(HERE / "tables.py"))
    places = re.findall(r"results: ladder (\w+)", (HERE / "README.md").read_text(encoding="utf-8"))
    for name in places:
        assert tables[name](both).startswith("| "), name
    assert set(places) == {name for name in tables if callable(tables[name]) and not name.startswith("_")} - {
        "Any", "Sequence", "Results", "markdown"
    }  # fmt: skip
    with pytest.raises(SystemExit, match="was made with"):
        started("--first", "4")
