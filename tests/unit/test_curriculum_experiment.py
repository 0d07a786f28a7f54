"""experiments/curriculum: what is trained, its arithmetic, and all of it on a network that trains quickly."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from small import ROOT, SMALL, write_dialogues

HERE = ROOT / "experiments" / "curriculum"
TABLES: dict[str, Any] = runpy.run_path(str(HERE / "tables.py"))
TABLE_NAMES = (
    "fine", "dual", "first", "fine_own", "dual_own", "first_own", "fine_test", "dual_test", "first_test",
    "starts", "differences", "stability", "runs",
)  # fmt: skip


@pytest.fixture
def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curriculum_experiment", HERE / "curriculum.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def test_random_weights_have_both_rates_and_come_last(experiment: ModuleType) -> None:
    names = [run.name for run in experiment.planned("2_gen", [400, 200])]
    assert names == ["2_gen-200", "2_gen-400", "2_gen-400-high", "2_gen-scratch", "2_gen-scratch-high"]


def test_spikes_are_what_stands_out(experiment: ModuleType) -> None:
    noise = np.random.default_rng(0).normal(size=400)
    assert experiment.spikes(np.linspace(9, 3, 400) + 0.01 * noise) == 0
    assert experiment.spikes(noise) <= 1
    spiked = noise.copy()
    spiked[[100, 250]] += 12
    spiked[300] -= 12  # below is no spike
    assert experiment.spikes(spiked) == experiment.spikes(noise) + 2
    assert experiment.spikes(noise[:30]) == 0


def test_a_setback_is_lasting(experiment: ModuleType) -> None:
    falling = np.linspace(9, 3, 400)
    assert experiment.setback(falling) == 0
    falling[200:] += 2
    assert experiment.setback(falling) == pytest.approx(2 - 6 / 399 * 20, abs=0.01)  # falls on for 20 steps
    once = np.linspace(9, 3, 400)
    once[200] += 2
    assert experiment.setback(once) < 0.11


def test_differences_are_of_the_same_samples(experiment: ModuleType) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 30, 200).astype(float)
    one = {"nll": tokens * random.uniform(2, 8, 200), "tokens": tokens}
    other = {"nll": one["nll"] + 0.25 * tokens, "tokens": tokens}
    assert experiment.difference(one, other, "nll") == [0.25, 0.25, 0.25]
    value, low, high = experiment.figures(one)["ppl"]
    assert low < value == pytest.approx(np.exp(one["nll"].sum() / tokens.sum()), abs=1e-4)
    assert value < high


def test_between_two_validations() -> None:
    curve = [{"cpu_s": 10.0, "ppl": 100.0}, {"cpu_s": 20.0, "ppl": 80.0}, {"cpu_s": 25.0}]
    assert TABLES["value_at"](curve, "ppl", 15.0) == 90.0
    assert TABLES["value_at"](curve, "ppl", 20.0) == 80.0
    assert TABLES["value_at"](curve, "ppl", 9.0) is TABLES["value_at"](curve, "ppl", 21.0) is None
    assert TABLES["value_at"](curve, "p1", 15.0) is None


def a_run(start: int, before: float, values: tuple[float, ...]) -> dict[str, Any]:
    """Of stage 2.1, validated every 60 CPU seconds."""
    names = ("ppl_uniform", "ppl", "z_mutual_information", "z_effective")
    curve = [{"step": n, "cpu_s": 60.0 * n, **dict.fromkeys(names, v)} for n, v in enumerate(values, 1)]
    return {
        "stage": "2_gen", "start": start, "rate": "own", "start_cpu_s": before, "cpu_s": 60.0 * len(values),
        "curve": curve,
    }  # fmt: skip


def test_time_before_the_start_counts() -> None:
    runs = {"a": a_run(5, 120.0, (50.0, 40.0)), "b": a_run(0, 0.0, (90.0, 80.0, 70.0, 60.0))}
    first = {"curve": [{"step": 1, "cpu_s": 300.0, "ppl": 55.0}]}
    results = {"seeds": {"0": {"first": first, "runs": runs}}, "baselines": {"unigram_ppl": 600.0}}
    lines = TABLES["fine"](results).splitlines()[2:]
    assert lines[0].startswith("| 4.0 | from 5 steps, own rate | 40.0 |")
    assert lines[1].startswith("| 4.0 | from random weights, own rate | 60.0 |")
    lines = TABLES["fine_own"](results).splitlines()[2:]
    assert lines[0].startswith("| 2.0 | from 5 steps, own rate | 40.0 |")
    assert lines[1].startswith("| 2.0 | from random weights, own rate | 80.0 |")
    results["seeds"]["1"] = {"first": first, "runs": {"a": a_run(5, 120.0, (60.0, 44.0))}}
    assert "| 4.0 | from 5 steps, own rate | 42.0 (40.0 to 44.0) |" in TABLES["fine"](results)


def test_when_z_speaks() -> None:
    def since(*nats: float) -> float | None:
        curve = [{"cpu_s": float(n), "z_mutual_information": one} for n, one in enumerate(nats)]
        return TABLES["_speaks_from"](curve)  # type: ignore[no-any-return]

    assert since(0.0, 0.05, 0.2, 0.3) == 2.0
    assert since(0.0, 0.2, 0.05, 0.3) == 3.0
    assert since(0.2, 0.3, 0.01) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a test split."""
    from plato2.prepare.dialogues import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("curriculum")
    file = write_dialogues(folder / "dialogues.jsonl", 120)
    options = PrepareOptions(
        corpus="jsonl", files=[str(file)], out=str(folder / "corpus"), vocab_pieces=300, max_context=32,
        max_response=32, valid_dialogues=20, test_dialogues=20,
    )  # fmt: skip
    return prepare(options, show_progress=False)


@pytest.fixture
def run(
    experiment: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """The experiment with stages of four steps; what is in results.json then."""
    short = experiment.Second(4, every=2, scratch_every=2)
    monkeypatch.setattr(experiment, "SECOND", dict.fromkeys(experiment.SECOND, short))

    def make(points: list[int], stages: list[str]) -> dict[str, Any]:
        given = argparse.Namespace(
            data=data, out=tmp_path / "out", seed=0, points=points, stages=stages, contexts=10,
            results=tmp_path, overrides=[word for word in SMALL if word.partition("=")[0] != "data.path"],
        )  # fmt: skip
        experiment.make(given)
        return dict(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))

    return make


@pytest.mark.slow
def test_from_a_corpus_to_results(
    experiment: ModuleType, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole = run([2], ["2_gen"])
    made = whole["seeds"]["0"]
    assert list(made["runs"]) == ["2_gen-2", "2_gen-2-high", "2_gen-scratch", "2_gen-scratch-high"]
    longest, scratch = made["runs"]["2_gen-2"], made["runs"]["2_gen-scratch"]
    assert longest["start_cpu_s"] == made["first"]["points"]["2"]["cpu_s"] > 0
    assert scratch["start_cpu_s"] == 0 < longest["cpu_s"]
    assert scratch["cpu_s"] >= longest["start_cpu_s"] + longest["cpu_s"] - 0.02
    assert made["runs"]["2_gen-2-high"]["lr"] == scratch["lr"] * 3 == 1.5e-3
    assert [point["step"] for point in longest["curve"]] == [2, 4]
    assert len(made["differences"]) == 4
    experiment.draw(tmp_path)
    assert (tmp_path / "2_gen.png").stat().st_size > 10_000
    for name in TABLE_NAMES:
        assert TABLES[name](whole).startswith("This stage" if name.startswith(("dual", "first")) else "| ")
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "config" / "seed-0").glob("*.yaml")]
    assert len(texts) == 5
    assert not any(str(tmp_path) in text for text in texts)


@pytest.mark.slow
def test_a_longer_first_stage_goes_on_with_what_is_there(
    experiment: ModuleType, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first = run([2], ["2_gen"])["seeds"]["0"]
    on = run([2, 4], ["2_gen", "2_eval_dual"])["seeds"]["0"]
    assert on["runs"]["2_gen-2"] == first["runs"]["2_gen-2"]  # neither trained nor measured again
    assert on["first"]["points"]["2"] == first["first"]["points"]["2"]
    assert on["first"]["steps"] == 4
    before = first["runs"]["2_gen-scratch"]["curve"]
    assert on["runs"]["2_gen-scratch"]["curve"][: len(before)] == before  # went on
    assert {"coherence_acc", "pair_acc", "p1"} <= on["runs"]["2_eval_dual-4"]["test"].keys()
    whole = run([2, 4], ["2_eval"])
    assert len(whole["seeds"]["0"]["runs"]) == 16  # of all three, and 2_gen-2-high
    experiment.draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"2_gen.png", "2_eval_dual.png", "2_eval.png"}
    for name in TABLE_NAMES:
        assert TABLES[name](whole).startswith("| "), name
