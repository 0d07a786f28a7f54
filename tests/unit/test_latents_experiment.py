"""experiments/latents: its arithmetic by known answers, its warm starts, and the whole on small networks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_run, make_stage
from small import ROOT, SMALL, WORDS, write_dialogues

import plato2
from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.runs.start import warm_start

HERE = ROOT / "experiments" / "latents"
pytest.importorskip("sacrebleu", reason="chrF needs pip install '.[eval]'")


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("figures")
    sys.path.remove(str(HERE))
    sys.modules.pop("figures", None)


@pytest.fixture(scope="module")
def latents(figures: ModuleType) -> Iterator[ModuleType]:
    """latents.py; its dataclasses are looked up by the name of their module."""
    spec = importlib.util.spec_from_file_location("latents_experiment", HERE / "latents.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules["latents_experiment"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    del sys.modules["latents_experiment"]


# ------------------------------------------------------------------------------------------ arithmetic


def drawn(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A posterior and -log p(r|c,z)."""
    random = np.random.default_rng(seed)
    return random.dirichlet(np.ones(k), n), random.uniform(1, 9, (n, k))


def test_ways_are_those_of_a_slow_loop(figures: ModuleType) -> None:
    p, nll = drawn(7, 3)
    case = np.array([0, 0, 1, 2, 2, 2, 3])
    found = figures.ways(p, nll, case)
    for n in range(7):
        others = [m for m in range(7) if case[m] != case[n]]
        expected = {
            "mixture": -math.log(sum(math.exp(-x) for x in nll[n]) / 3),
            "uniform": sum(nll[n]) / 3,
            "other": sum(p[m][z] * nll[n][z] for m in others for z in range(3)) / len(others),
            "right": sum(p[n][z] * nll[n][z] for z in range(3)),
        }
        expected["paid"] = expected["right"] + sum(x * math.log(3 * x) for x in p[n])
        assert {name: values[n] for name, values in found.items()} == pytest.approx(expected)
        assert expected["paid"] > expected["mixture"]


def test_the_true_posterior_costs_what_the_mixture_does(figures: ModuleType) -> None:
    _, nll = drawn(5, 4)
    p = np.exp(-nll) / np.exp(-nll).sum(axis=1, keepdims=True)
    found = figures.ways(p, nll, np.arange(5))
    assert found["paid"] == pytest.approx(found["mixture"])


def test_a_latent_that_says_nothing_gains_nothing(figures: ModuleType) -> None:
    p, nll = drawn(6, 5)
    found = figures.ways(p, np.repeat(nll[:, :1], 5, axis=1), np.arange(6))
    for way in ("uniform", "other", "right", "mixture"):
        assert found[way] == pytest.approx(nll[:, 0])
    without = figures.ways(np.ones((6, 1)), nll[:, :1], np.arange(6))  # stage 1
    assert all(values == pytest.approx(nll[:, 0]) for values in without.values())


def test_information_of_latents_that_know_all_and_nothing(figures: ModuleType) -> None:
    case = np.repeat(np.arange(20), 4)
    of_reply, of_context = (np.eye(4)[place] for place in (np.tile(np.arange(4), 20), case % 4))
    knows = figures.information(of_reply, 1 - of_reply, case)
    assert knows["bound"] == pytest.approx(math.log(4), abs=1e-4)
    assert knows["mutual_information"][0] == pytest.approx(math.log(4), abs=1e-4)
    assert knows["latents_in_effect"][0] == pytest.approx(4)
    assert (knows["in_use"], knows["named"][0], knows["named_by_chance"]) == (4, 1.0, 0.25)
    assert knows["within"][0] == pytest.approx(math.log(4), abs=1e-4)
    assert knows["within_shuffled"][0] < math.log(4) - 0.2
    topic = figures.information(of_context, 1 - of_context, case)
    assert topic["mutual_information"][0] == pytest.approx(math.log(4), abs=1e-4)
    assert topic["within"][0] == 0.0
    assert topic["within_shuffled"][0] > 0.5
    nothing = figures.information(np.full((80, 4), 0.25), 1 - of_reply, case)
    assert nothing["mutual_information"][0] == pytest.approx(0, abs=1e-4)
    one = figures.information(np.ones((80, 1)), np.ones((80, 1)), case)
    assert (one["bound"], one["mutual_information"][0], one["latents_in_effect"][0]) == (0, 0, 1)


def test_coverage_and_the_best_candidate(figures: ModuleType) -> None:
    similarity = [np.array([[0.1, 0.9], [0.2, 0.3], [0.6, 0.0]]), np.array([[0.4, 0.2]])]
    found = figures.against(similarity, 0.5)
    assert found["one"] == pytest.approx([(0.6 + 0.9) / 2, (0.4 + 0.2) / 2])
    assert found["best"] == pytest.approx([0.9, 0.4])
    assert found["coverage"] == pytest.approx([2 / 3, 0])
    assert "coverage" not in figures.against(similarity, math.nan)
    people = [np.array([[1.0, 0.2, 0.3], [0.2, 1.0, 0.7], [0.3, 0.7, 1.0]]), np.ones((1, 1))]
    assert figures.people_are_near(people) == 0.7  # the median of 0.3, 0.7, 0.7
    assert math.isnan(figures.people_are_near([np.ones((1, 1))]))


def test_perplexity_is_that_of_all_tokens(figures: ModuleType) -> None:
    nats, tokens, case = np.array([2.0, 4.0, 9.0]), np.array([2, 1, 7]), np.array([0, 0, 2])
    value, low, high = figures.perplexity(nats, tokens, case, seed=0)
    assert value == pytest.approx(math.exp(15 / 10), abs=1e-4)
    assert low == pytest.approx(math.exp(9 / 7), abs=1e-4)  # contexts are drawn, not responses
    assert high == pytest.approx(math.exp(6 / 3), abs=1e-4)


def test_alarms_in_training_are_those_of_evaluate_latents(latents: ModuleType) -> None:
    def at(information: float, different: float, k: int, effective: float = 4.0) -> dict[str, Any]:
        row = {"nll": 4.0, "z_mutual_information": information, "greedy_different": different}
        row = {f"val/{name}": value for name, value in row.items()} | {"val/z_effective": effective}
        return dict(latents.validation(100, row, k))

    assert not at(1.0, 12.0, 20)["alarms"]
    assert not at(1.0, 12.0, 20)["warned"]
    (nothing,) = at(0.14, 12.0, 20)["alarms"]  # 5 % of ln 20 are 0.15
    assert nothing.startswith("z knows nothing")
    assert not at(0.14, 4.0, 5)["alarms"]  # of ln 5 they are 0.08
    (silent,) = at(1.0, 2.8, 20)["alarms"]
    assert silent.startswith("z changes nothing")
    assert at(0.09, 12.0, 20)["warned"]
    assert at(1.0, 12.0, 20, effective=1.4)["warned"]
    assert "alarms" not in latents.validation(100, {"val/nll": 4.0}, None)


# -------------------------------------------------------------------------------------- candidates, starts


def test_all_systems_draw_with_the_same_numbers(latents: ModuleType) -> None:
    """20 latents that are all alike say what 20 samples of one latent do."""
    tokenizer = Tokenizer.load(KNOVER)
    size = {"vocab_size": tokenizer.vocab_size, "max_position": 64}
    one, twenty = (make_stage("2_gen", n_latent=k, **size) for k in (1, 20))
    weights = one.state_dict()
    table = weights["recognition.latent_embedding"].expand(-1, 20)
    weights |= {"recognition.latent_embedding": table, "recognition.bias": torch.zeros(20)}
    twenty.load_state_dict({name: weights[name] for name in twenty.state_dict()})
    cases = [latents.Case([1, 7, 8, n, 2], (), []) for n in range(9, 12)]
    found = [[*latents.answered(stage, tokenizer, cases, 3, 0)] for stage in (one, twenty)]
    assert [a.candidates for a in found[0]] == [a.candidates for a in found[1]]
    assert all(len(a.candidates) == 20 and len({*a.candidates}) > 1 for a in found[0])
    assert [a.greedy_different for a in found[1]] == [1, 1, 1]
    rest = [*latents.answered(one, tokenizer, cases, 3, 2)]  # as after a kill
    assert rest[0].candidates == found[0][2].candidates


def test_a_stage_1_starts_any_number_of_latents(latents: ModuleType, tmp_path: Path) -> None:
    coarse = make_run(tmp_path / "coarse", "1_coarse")
    for k in latents.LATENTS.values():
        found = latents.warm_started(coarse, k, seed=0)
        assert found["latents"] == [16, k]
        assert found["equal"] >= found["backbone"]  # heads of zeros may be equal to nothing of stage 1
        assert found["told"].endswith("; new: bag_of_words, recognition")
    five = make_run(tmp_path / "five", "2_gen")
    vocab_size = Tokenizer.load(KNOVER).vocab_size
    stage = make_stage("2_gen", n_latent=20, vocab_size=vocab_size)
    with pytest.raises(UserError, match=r"latent_embedding|recognition.bias"):
        warm_start(stage, five / "checkpoints" / "last.ckpt", ("2_gen",), Tokenizer.load(KNOVER).sha256)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    file = write_dialogues(folder / "dialogues.jsonl", 80)
    options = PrepareOptions(
        corpus="jsonl", files=[str(file)], out=str(folder / "corpus"), vocab_pieces=300, max_context=32,
        max_response=32, valid_dialogues=10, test_dialogues=10,
    )  # fmt: skip
    return prepare(options, show_progress=False)


class Bags:
    """Instead of the sentence encoder: counts of letters."""

    name = "letters"

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), 384))
        for number, text in enumerate(texts):
            for letter in text:
                counts[number, ord(letter) % 384] += 1
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.mark.slow
def test_from_a_stage_1_to_results_and_again(
    latents: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*SMALL, "data.valid_units=1", f"data.path={corpus}", "selection=10", "human_rank=0"]
    where = [f"output_dir={tmp_path}", "name=runs", "run_id=coarse"]
    plato2.train(*small, "stage=1_coarse", "trainer.max_steps=2", "trainer.val_check_interval=2", *where)
    full = latents.overrides

    def overrides(*given: Any) -> list[str]:
        kept = ("stage=", "init_from=", "seed=", "model.n_latent=", "trainer.", "optim.lr")
        words = [word for word in full(*given) if word.startswith(kept)]
        return [*small, "latent_contexts=2", *words]

    several = [
        {"turns": [f"{one} {WORDS[0]}"], "references": [f"{one} {other}" for other in WORDS[1:6]]}
        for one in WORDS[:4]
    ]
    multiref = tmp_path / "multiref.jsonl"
    multiref.write_text("\n".join(map(json.dumps, several)) + "\n", encoding="utf-8")
    results = tmp_path / "latents" / "results.json"
    results.parent.mkdir()
    monkeypatch.setattr(latents, "overrides", overrides)
    monkeypatch.setattr(latents, "Encoder", Bags)
    command = ["latents.py", "--coarse", tmp_path / "runs" / "coarse", "--data", corpus, "--steps", 2]
    command += [
        "--samples",
        6,
        "--contexts",
        3,
        "--heard",
        2,
        "--out",
        tmp_path / "out",
        "--results",
        results,
    ]

    def run(*more: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, *more)])
        latents.main()
        return dict(json.loads(results.read_text(encoding="utf-8")))

    first = run("--multiref", multiref)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    assert len(kept) == 2 * 2 * 5 + 3  # scores and replies of two sets and five systems, and what is heard
    monkeypatch.setattr(plato2, "train", None)  # nothing is trained again
    again = run("--multiref", multiref)
    assert again["seeds"]["0"]["sets"] == first["seeds"]["0"]["sets"]
    assert {path: path.read_bytes() for path in kept} == kept
    made = first["seeds"]["0"]
    assert [*made["runs"]] == [*latents.TRAINED]
    assert [len(made["runs"][name]["curve"]) for name in latents.TRAINED] == [2] * 4
    for of in ("test", "dailydialog"):
        found = made["sets"][of]
        assert [*found["perplexity"]] == [*latents.SYSTEMS]
        assert len({tuple(x) for x in found["perplexity"]["K = 1"].values()}) == 1  # all ways are one
        assert found["information"]["K = 1"]["mutual_information"] == [0, 0, 0]
        assert [*found["candidates"]] == [*latents.SYSTEMS, latents.RANDOM, latents.ELSEWHERE]
        assert [*found["differences"]] == [f"{one} - {other}" for one, other in latents.PAIRS]
        difference = found["differences"]["K = 20 - K = 1"]["chrf_best"][0]
        values = [found["candidates"][name]["chrf_best"][0] for name in ("K = 20", "K = 1")]
        assert difference == pytest.approx(values[0] - values[1], abs=2e-4)
        assert ("cosine_coverage" in found["candidates"]["K = 20"]) == (of == "dailydialog")
    assert len(made["heard"]["K = 20"]["lines"]) == 20
    assert (results.parent / "curves.png").stat().st_size > 10_000
    assert len([*(results.parent / "config").glob("seed-0-*.yaml")]) == 4
    tables = runpy.run_path(str(HERE / "tables.py"))
    both = {"seeds": {**first["seeds"], "1": made}}
    names = ("started", "training", "curve", "information", "within", "perplexity", "gains", "candidates")
    for name in (*names, "dailydialog", "differences", "says", "heard", "sets", "cost"):
        for some in (first, both):
            assert tables[name](some).startswith("| "), name
    with pytest.raises(UserError, match="was asked"):
        latents.record(results, 1, {**made, "asked": {}})
