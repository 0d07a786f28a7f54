"""experiments/table8 on untrained models: sets, the latents' prior, controls, and the whole of it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_run
from small import ROOT, write_dialogues

from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.candidates import Query
from plato2.evaluate.scorers import forward
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.weights.folder import load_generation

HERE = ROOT / "experiments" / "table8"
SETS = ("chitchat random", "chitchat matched", "DailyDialog++ random", "DailyDialog++ adversarial")


@pytest.fixture(autouse=True)
def _its_modules_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(HERE)
    yield
    for name in ("sets", "prior", "controls", "table8"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("table8") / "dialogues.jsonl", 80)


@pytest.fixture(scope="module")
def data(dialogues: Path) -> Path:
    """A corpus with a test split, in the ids of the models' tokenizer."""
    options = PrepareOptions(
        corpus="jsonl",
        files=[str(dialogues)],
        out=str(dialogues.parent / "corpus"),
        tokenizer=str(KNOVER),
        valid_dialogues=10,
        test_dialogues=20,
    )
    return prepare(options, show_progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    stages = {"coarse": "1_coarse", "fine": "2_gen", "backward": "backward", "first": "2_eval"}
    found = {name: make_run(folder / name, stage) for name, stage in stages.items()}
    return found | {"dual": make_run(folder / "dual", "2_eval", head="dual")}


def test_wrong_replies_are_of_other_test_conversations(dialogues: Path, data: Path) -> None:
    from sets import held_out

    tokenizer = Tokenizer.load(KNOVER)
    said = [
        [tokenizer.decode(tokenizer.encode(turn)) for turn in json.loads(line)["turns"]]
        for line in dialogues.read_text(encoding="utf-8").splitlines()
    ]
    source = held_out(data, 12, seed=0)
    assert source.about["contexts"] == len(source.queries) == 12
    for number, query in enumerate(source.queries):
        own, *wrong = query.candidates
        seen = [*query.context, own]
        (conversation,) = [
            turns for turns in said if any(turns[n : n + len(seen)] == seen for n in range(len(turns)))
        ]
        assert query.labels == (True, *[False] * 18)
        for numbers in query.sets.values():
            assert len({query.candidates[place] for place in numbers}) == 10
        assert not {*wrong} & {*conversation}
        assert query.context[-1] not in source.queries[source.other[number]].context
    differences = source.about["tokens that wrong and right replies differ by"]
    assert differences["matched"] < differences["random"]
    assert held_out(data, 12, seed=0) == source
    assert held_out(data, 12, seed=1) != source


def test_the_prior_learns_the_mean_posterior(data: Path, models: dict[str, Path]) -> None:
    from prior import Prior, context_vectors, posteriors
    from sets import records

    network = load_generation(models["fine"], with_recognition=True)
    pairs = list(records(data, "train"))
    prior = Prior(network, pairs)
    found = prior.log_probs([context for context, _ in pairs])
    assert np.exp(found).sum(axis=1) == pytest.approx(1.0)
    expected = posteriors(network, pairs)
    assert np.exp(found).mean(axis=0) == pytest.approx(expected.mean(dim=0).numpy(), abs=0.02)
    told = prior.figures(pairs)
    assert (
        told["entropy of the posterior"] <= told["cross-entropy"] < told["cross-entropy without the context"]
    )
    # Packed with others or alone: the same.
    assert torch.allclose(posteriors(network, pairs[3:4]), expected[3:4], atol=1e-5)
    contexts = [context for context, _ in pairs[:5]]
    alone = torch.cat([context_vectors(network, [context]) for context in contexts])
    assert torch.allclose(context_vectors(network, contexts), alone, atol=1e-5)


def test_sums_over_latents(models: dict[str, Path]) -> None:
    from table8 import Latents

    class Sure:
        """p(z|c) that knows z = 2."""

        def log_probs(self, contexts: list[list[int]]) -> np.ndarray:
            return np.log(np.eye(5)[[2]] + 1e-30)

    network, tokenizer = load_generation(models["fine"], with_recognition=True), Tokenizer.load(KNOVER)
    latents: Any = Latents(network, tokenizer, Sure())  # type: ignore[arg-type]
    turns, candidates = ["hi there", "how are you ?"], ["fine thanks", "", "a much longer answer"]
    expected = forward(network, tokenizer)(turns, candidates)
    assert np.array(latents.uniform(turns, candidates)) == pytest.approx(np.array(expected), abs=1e-4)
    _, by_latent, n_tokens = latents._read(turns, candidates)
    learned = np.array(latents.learned(turns, candidates))
    assert learned == pytest.approx(np.array([by_latent[:, 2], n_tokens]).T)


def test_a_weighted_sum_finds_what_tells() -> None:
    from controls import combined, surface

    random = np.random.default_rng(0)
    queries = [Query((f"{n}",), ("a", "b", "c"), (True, False, False), {"x": range(3)}) for n in range(40)]
    scored = [{"tells": [3.0 + n, 1.0 + n, 2.0 + n], "noise": list(random.normal(size=3))} for n in range(40)]
    assert all(np.argmax(found) == 0 for found in combined(queries, scored, ["noise", "tells"]))
    alone = [np.argmax(found) == 0 for found in combined(queries, scored, ["noise"])]
    assert 0 < np.mean(alone) < 1
    scores = surface(["yes yes no", "yes"])
    assert scores["frequent words"](["hi"], ["yes", "no", "new"]) == sorted(
        scores["frequent words"](["hi"], ["yes", "no", "new"]), reverse=True
    )
    assert scores["frequent words, summed"](["hi"], ["yes", "yes yes"])[1] == pytest.approx(2 * np.log(4 / 7))


def test_the_whole(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {
            "context": [f"turn {n}", f"and turn {n + 1}"],
            **{
                f"{kind}_responses": [f"{kind} {n} {m}" + " word" * (m % 3) for m in range(5)]
                for kind in ("positive", "adversarial_negative", "random_negative")
            },
        }
        for n in range(10)
    ]
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out, scores = tmp_path / "results.json", tmp_path / "scores"
    command = ["table8.py", "--data", str(data), "--dailydialog", str(dev), "--contexts", "10"]
    command += ["--scores", str(scores), "--out", str(out)]

    def run(*names: str) -> dict[str, Any]:
        chosen = [word for name in names for word in (f"--{name}", str(models[name]))]
        monkeypatch.setattr(sys, "argv", [*command, *chosen])
        runpy.run_path(str(HERE / "table8.py"), run_name="__main__")
        return json.loads(out.read_text(encoding="utf-8"))

    first = run("coarse")
    kept = {path: path.read_bytes() for path in scores.glob("*.jsonl")}
    assert len(kept) == 2
    whole = run(*models)
    assert {path: path.read_bytes() for path in kept} == kept  # nothing is computed again
    assert tuple(whole["suite"]["sets"]) == SETS
    for system in first["suite"]["figures"]:
        assert whole["suite"]["figures"][system] == first["suite"]["figures"][system]
    assert [*whole["suite"]["figures"]][:4] == ["random", "shared words", "BM25", "short"]
    assert len(whole["suite"]["figures"]) == 13
    assert len(whole["suite"]["tests"]) == len(SETS) * 13 * 12 / 2
    assert out.with_name("map.png").stat().st_size > 10_000
    tables = runpy.run_path(str(HERE / "tables.py"))
    for name in ("suite", "first", "controls", "tests", "sources", "models", "prior"):
        assert tables[name](whole).startswith("| ")
        assert tables[name](first)
