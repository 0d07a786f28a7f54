"""experiments/rivals: what is charged to whom, seeds that are added later, its tables, and its GPT-2."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small import ROOT, SMALL, WORDS, write_dialogues

from plato2.config import UserError

HERE = ROOT / "experiments" / "rivals"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """Loads a module of the folder, as its scripts do; not tests/unit/rivals.py."""
    known = set(sys.modules)
    sys.path.insert(0, str(HERE))
    yield importlib.import_module
    sys.path.remove(str(HERE))
    for name in ("plan", "tables", "measure", "gpt2", "systems"):
        if name not in known:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def plan(modules: Any) -> ModuleType:
    return modules("plan")


@pytest.fixture(scope="module")
def measure(modules: Any) -> ModuleType:
    return modules("measure")


@pytest.fixture
def rivals(modules: Any) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rivals_experiment", HERE / "rivals.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_row_is_charged_the_whole_budget(plan: ModuleType) -> None:
    for letter, row in plan.ROWS.items():
        charged = set(row.charged)
        assert sum(plan.RUNS[name].percent for name in charged) == 100, letter
        assert {row.generation, row.ranker} - {None} <= charged
        parents = {plan.RUNS[name].parent for name in charged} - {None}
        free = {"coarse_50"} if letter == "b2" else set()
        assert parents - charged == free, letter
    assert sorted(plan.FIRST) == sorted(plan.ROWS)
    assert {name for row in plan.ROWS.values() for name in row.charged} == set(plan.RUNS)
    assert set(plan.ROWS) | {plan.SMOLLM2} >= {letter for pair in plan.DIFFERENCES for letter in pair}


def test_steps_are_what_the_budget_pays_for(plan: ModuleType) -> None:
    paces = {"2_gen": plan.Pace(cpu_s=0.5, samples=60.0), "gpt2": plan.Pace(cpu_s=0.3, samples=64.0)}
    minutes, tokens = plan.Budget("cpu", 20), plan.Budget("tokens", 1.5)
    assert plan.steps_of(plan.RUNS["latent_35"], minutes, paces, 66.4) == 840  # 0.35 * 1,200 s / 0.5 s
    assert plan.steps_of(plan.RUNS["gpt2_100"], minutes, paces, 66.4) == 4000
    assert plan.steps_of(plan.RUNS["gpt2_100"], tokens, paces, 66.4) == round(1.5e6 / (64 * 66.4))
    assert plan.steps_of(plan.RUNS["gpt2_35"], plan.Budget("cpu", 0.0001), paces, 66.4) == 1
    assert (minutes.name, tokens.name) == ("cpu-20", "tokens-1.5")


def test_a_run_comes_after_the_one_it_starts_from(plan: ModuleType) -> None:
    for rows in (list(plan.FIRST), ["b2"], ["e"]):
        order = plan.needed(rows)
        for name in order:
            parent = plan.RUNS[name].parent
            assert parent is None or order.index(parent) < order.index(name)
    assert plan.needed(["b2"]) == ["gpt2_85", "coarse_50", "ranker_of_50"]
    assert len(plan.needed(list(plan.FIRST))) == len(plan.RUNS)


def a_seed(shift: float, rows: str = "ebc") -> dict[str, Any]:
    """What rivals.make returns; row e is ahead of b by `shift` and 0.2 more in every second context."""
    n = 20
    even = [0.2 * (number % 2) for number in range(n)]
    columns = {"e": [0.5 + shift + x for x in even], "b": [0.5] * n, "c": [0.4] * (n - 1) + [None]}
    scores = {row: {"chrf": columns[row], "coverage": columns[row]} for row in rows}
    figures = {row: {"dailydialog": {"chrf": [1.0 + shift, None, None]}} for row in rows}
    charged = {"cpu_minutes": 20.0, "million_tokens": 3.0}
    return {
        "rows": {row: {**figures[row], "charged": charged} for row in rows},
        "scores": {"dailydialog": scores},
        "asked": {"contexts": n},
    }


def test_seeds_land_in_one_file(measure: ModuleType, tmp_path: Path) -> None:
    measure.record(tmp_path, "cpu-20", 1, a_seed(0.1))
    measure.record(tmp_path, "cpu-20", 0, a_seed(0.3))
    measure.record(tmp_path, "tokens-5", 0, a_seed(0.0))
    measure.record(tmp_path, "cpu-20", 2, a_seed(0.0, rows="c"))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(found["budgets"]) == ["cpu-20", "tokens-5"]
    there = found["budgets"]["cpu-20"]
    assert list(there["seeds"]) == ["0", "1", "2"]
    assert there["means"]["e"]["dailydialog"]["chrf"] == 1.2
    of = there["differences"]["e - b"]["dailydialog"]["chrf"]
    assert of["seeds"] == [0.4, 0.2]  # the third has no e
    assert of["value"] == 0.3
    assert 0.2 <= of["low"] < 0.3 < of["high"] <= 0.4
    assert there["differences"]["e - c"]["dailydialog"]["coverage"]["seeds"] == [0.4947, 0.2947]
    measure.record(tmp_path, "cpu-20", 1, a_seed(0.3))  # the same seed again takes its own place
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["budgets"]["cpu-20"]
    assert again["differences"]["e - b"]["dailydialog"]["chrf"]["seeds"] == [0.4, 0.4]
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match="was asked"):
        measure.record(tmp_path, "cpu-20", 3, a_seed(0.1) | {"asked": {"contexts": 9}})
    assert (tmp_path / "results.json").read_bytes() == before


def test_tables_of_two_budgets(measure: ModuleType, tmp_path: Path) -> None:
    took = {"steps": 1200, "cpu_s": 360.2}
    tried = {"0.001": took | {"ppl": 90.14}, "0.003": took | {"ppl": 95.0}}
    measure.record(tmp_path, "cpu-20", 0, a_seed(0.1) | {"rates": {"rate": 0.001, "tried": tried}})
    measure.record(tmp_path, "tokens-5", 0, a_seed(0.1))
    measure.record(tmp_path, "tokens-5", 1, a_seed(0.1))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    tables = runpy.run_path(str(HERE / "tables.py"))
    text = tables["figures"](results)
    assert text.startswith("20 CPU minutes a row, 1 seed; DailyDialog, several references:\n\n| row |")
    assert "\n\n5 million tokens of text a row, 2 seeds; DailyDialog, several references:\n\n| row |" in text
    assert "\n| (b) GPT-2, 20 samples, our ranker | 20.00 | 3.00 | 1.10 |  |\n" in text
    assert "| (e) - (b) | chrF, dailydialog | +0.200 |" in tables["differences"](results)
    assert tables["rates"](results).splitlines()[2:] == [
        "| 20 CPU minutes | 1e-3 | 1,200 | 360 | 90.1 | yes |",
        "| 20 CPU minutes | 3e-3 | 1,200 | 360 | 95.0 |  |",
    ]
    del results["budgets"]["cpu-20"]
    assert tables["rates"](results) == "Only one rate was given, so none was compared."


def test_what_cannot_be_done_is_said_at_once(
    rivals: ModuleType, measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rivals.py", "--only-draw", "--results", str(tmp_path)])
    with pytest.raises(UserError, match="nothing is recorded"):
        rivals.main()
    measure.record(tmp_path, "cpu-20", 0, a_seed(0.1))
    measure.check_asked(tmp_path, "cpu-20", 0, {"contexts": 9})  # takes its own place
    measure.check_asked(tmp_path, "cpu-30", 1, {"contexts": 9})
    with pytest.raises(UserError, match="was asked"):
        measure.check_asked(tmp_path, "cpu-20", 1, {"contexts": 9})


def test_gpt2_takes_the_rate_that_is_best(
    rivals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(name: str, run: Any, steps: int, seed: int, data: Path, folder: Path, rate: float) -> Any:
        asked.append((name, run.kind, steps, seed, folder.name, rate))
        return {"ppl": {3e-4: 95.0, 1e-3: 99.0, 3e-3: 91.0}[rate]}

    monkeypatch.setattr(rivals, "train", train)
    three = rivals.tried_rates([3e-4, 1e-3, 3e-3], 7, tmp_path, tmp_path / "cpu-20")
    assert three["rate"] == 3e-3
    assert three["tried"] == {"0.0003": {"ppl": 95.0}, "0.001": {"ppl": 99.0}, "0.003": {"ppl": 91.0}}
    assert asked[0] == ("gpt2_0.0003", "gpt2", 7, 0, "rates", 3e-4)
    assert rivals.tried_rates([3e-4, 1e-3, 3e-3], 7, tmp_path, tmp_path / "cpu-20") == three
    one = rivals.tried_rates([1e-3], 7, tmp_path, tmp_path / "cpu-30")
    assert one == {"rate": 1e-3, "tried": {}}
    assert len(asked) == 3
    with pytest.raises(UserError, match="--gpt2-rates"):
        rivals.tried_rates([1e-3], 7, tmp_path, tmp_path / "cpu-20")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from plato2.prepare.dialogues import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("rivals")
    file = write_dialogues(folder / "dialogues.jsonl")
    options = PrepareOptions(
        corpus="jsonl", files=[str(file)], out=str(folder / "corpus"), vocab_pieces=300, max_context=32,
        max_response=32, valid_dialogues=20, test_dialogues=10,
    )  # fmt: skip
    prepare(options)
    return folder / "corpus"


@pytest.fixture(scope="module")
def gpt2(modules: Any) -> ModuleType:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    return modules("gpt2")


def test_gpt2_has_our_ids(gpt2: ModuleType, corpus: Path) -> None:
    from plato2.data.tokenizer import Tokenizer

    ours, theirs = Tokenizer.load(corpus / "tokenizer"), gpt2.fast_tokenizer(corpus / "tokenizer")
    texts = [
        "ba  den sik",
        "Z\u00fcrich \u2014 \u201cquoted\u201d",
        "dan</s>",
        "x",
        *(w + " " + w[::-1] for w in ("bas", "kon")),
    ]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (2, 0, ours.vocab_size)


def test_gpt2_goes_on_after_a_kill(
    gpt2: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(gpt2, "SAVE_STEPS", 2)
    monkeypatch.setattr(gpt2, "BATCH_SAMPLES", 4)
    whole = gpt2.train(corpus, tmp_path / "whole", 6, seed=1)
    ended = gpt2.Spent.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        ended(self, args, state, control, **given)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpt2.Spent, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            gpt2.train(corpus, tmp_path / "cut", 6, seed=1)
    (tmp_path / "cut" / "trainer" / "checkpoint-4" / "spent.json").unlink()  # as if killed while saving
    cut = gpt2.train(corpus, tmp_path / "cut", 6, seed=1)
    assert (cut["steps"], cut["samples"]) == (whole["steps"], whole["samples"]) == (6, 24)
    assert cut["ppl"] == pytest.approx(whole["ppl"])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(one[name].equal(two[name]) for name in one)
    assert not (tmp_path / "cut" / "trainer").exists()
    trained = (tmp_path / "cut" / "trained.json").read_bytes()
    assert gpt2.train(corpus, tmp_path / "cut", 6, seed=1)["cpu_s"] == cut["cpu_s"]  # left alone
    assert (tmp_path / "cut" / "trained.json").read_bytes() == trained


# ------------------------------------------------------------------------------------------- all of it


@pytest.fixture
def small_rivals(rivals: ModuleType, gpt2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """rivals.py with networks that train in seconds."""
    import transformers

    full = rivals.overrides

    def overrides(*given: Any) -> list[str]:
        kept = [
            word
            for word in full(*given)
            if word.startswith(("stage=", "seed=", "data.path=", "trainer.", "optim.", "hydra.mode="))
        ]
        merged = {word.split("=", 1)[0]: word for word in (*SMALL, "selection=10", "human_rank=0", *kept)}
        return list(merged.values())

    def tiny(vocab_size: int, positions: int) -> Any:
        config = transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=2,
            eos_token_id=2,
        )
        return transformers.GPT2LMHeadModel(config)

    monkeypatch.setattr(rivals, "overrides", overrides)
    monkeypatch.setattr(gpt2, "tiny", tiny)
    return rivals


@pytest.mark.slow
def test_from_a_corpus_to_results_and_again(
    small_rivals: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("all_minilm_l6_v2", reason="similarity needs pip install '.[eval]'")
    several = [
        {"turns": [f"{one} {WORDS[0]}"], "references": [f"{one} {other}" for other in WORDS[1:6]]}
        for one in WORDS[:6]
    ]
    multiref = tmp_path / "multiref.jsonl"
    multiref.write_text("\n".join(map(json.dumps, several)) + "\n", encoding="utf-8")
    results = tmp_path / "results"
    words = ["--data", corpus, "--out", tmp_path / "out", "--results", results, "--multiref", multiref]
    words += ["--budget-tokens", 0.01, "--probe-steps", 2, "--contexts", 3, "--starts", 2, "--utterances", 6]
    words += ["--gpt2-rates", 1e-3, 1e-2]

    def started(*rows: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["rivals.py", *map(str, words), "--rows", *rows])
        small_rivals.main()
        found = json.loads((results / "results.json").read_text(encoding="utf-8"))
        return dict(found["budgets"]["tokens-0.01"])

    first = started("e", "b")
    both = started("d", "f")  # e and b stay
    assert list(first["means"]) == ["b", "e"]
    assert list(both["means"]) == ["b", "d", "e", "f"]
    assert first["means"]["e"]["dailydialog"]["chrf"] == both["means"]["e"]["dailydialog"]["chrf"]
    assert {m: both["seeds"]["0"]["runs"][m]["cpu_s"] for m in first["seeds"]["0"]["runs"]} == {
        name: run["cpu_s"] for name, run in first["seeds"]["0"]["runs"].items()
    }
    for row, figures in both["means"].items():
        assert abs(figures["charged"]["million_tokens"] - 0.01) < 0.005, row
        assert ("coverage" in figures["dailydialog"]) == (row != "d")
        assert {"chrf", "similarity", "matched_2"} <= figures["chitchat"].keys()
        assert "repeated_3" in figures["chats"]
    of = both["differences"]["e - b"]["dailydialog"]
    assert of.keys() == {"chrf", "similarity", "best_chrf", "best_similarity", "coverage"}
    rates = both["seeds"]["0"]["rates"]
    assert rates["tried"].keys() == {"0.001", "0.01"}
    assert both["seeds"]["0"]["runs"]["gpt2_35"]["rate"] == rates["rate"]
    assert (results / "figure.png").exists()
