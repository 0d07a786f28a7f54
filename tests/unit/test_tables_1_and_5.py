"""experiments/table1 and table5 on untrained models: pairs, people, tests, and the whole of both."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import KNOVER, make_run, write_metrics
from small import ROOT, WORDS, train_in_process

from plato2 import metrics
from plato2.config import UserError
from plato2.evaluate import automatic
from plato2.evaluate.dialogues import read_dialogues
from plato2.evaluate.metrics import Distinct
from plato2.evaluate.said import Utterance
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.talk import self_chat

ONE, FIVE = ROOT / "experiments" / "table1", ROOT / "experiments" / "table5"
MODULES = ("variants", "people", "paired", "plato", "table1", "table5")


@pytest.fixture(autouse=True)
def _its_modules_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FIVE)
    monkeypatch.syspath_prepend(ONE)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of dialogues of a greeting and six turns."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    lines = [
        json.dumps({"turns": ["hi", *(" ".join(random.choice(WORDS, 7)) for _ in range(6))]})
        for _ in range(40)
    ]
    (folder / "dialogues.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = PrepareOptions(
        corpus="jsonl",
        files=[str(folder / "dialogues.jsonl")],
        out=str(folder / "corpus"),
        tokenizer=str(KNOVER),
        valid_dialogues=5,
        test_dialogues=8,
    )
    return prepare(options, show_progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    stages = {"coarse": "1_coarse", "fine": "2_gen", "first": "2_eval", "plato": "plato"}
    found = {name: make_run(folder / name, stage) for name, stage in stages.items()}
    return found | {"dual": make_run(folder / "dual", "2_eval", head="dual")}


# --------------------------------------------------------------------------------------------------- table 1


def test_people_in_disorder_say_the_same() -> None:
    from people import excerpts, shuffled

    dialogues = [[f"{number} {turn}" for turn in range(4)] for number in range(5)]
    found = shuffled(dialogues)
    assert [said[0] for said in found] == [said[0] for said in dialogues]
    for number, said in enumerate(found):
        assert [text.split()[1] for text in said] == ["0", "1", "2", "3"]  # each in its place
        assert len({text.split()[0] for text in said}) == 4  # no two of one dialogue, none of its own
        assert said[1].split()[0] == str((number + 1) % 5)
    assert Counter(chain(*found)) == Counter(chain(*dialogues))
    start = "this is a turn of seven words"
    assert excerpts([["hi", "hello", start, "b", "c"], ["hi", start, "b"], [start, "b", "c", "d"]], 3) == [
        [start, "b", "c"],
        [start, "b", "c"],
    ]


def test_held_out_people(data: Path) -> None:
    from people import held_out

    found = held_out(data)
    assert len(found) == 8
    assert all(len(turns) == 7 and turns[0] == "hi" for turns in found)


def test_distinct_without_each_dialogue_by_a_slow_loop() -> None:
    from paired import distinct_difference, distinct_left_out, equal_size

    random = np.random.default_rng(1)
    some = [[tuple(random.choice(list("abcdefgh"), 5)) for _ in range(2)] for _ in range(6)]
    for n in (1, 2):
        value, left = distinct_left_out(some, n)
        for number in range(-1, 6):
            metric = Distinct(n)
            for other, utterances in enumerate(some):
                if other != number:
                    metric.update(utterances)
            assert float(metric.compute()) == pytest.approx(value if number < 0 else left[number])
    a, b = equal_size([[("x", "y"), ("z", "w")]], [[("x",), ("x", "x")]])
    assert (a, b) == ([[("x", "y"), ("z",)]], [[("x",), ("x", "x")]])
    twice = distinct_difference([[("x", "y"), ("z", "w")]] * 2, [[("x",), ("x", "x")]] * 2, 1)
    assert twice == pytest.approx([3 / 6 - 1 / 6] * 3)  # without one of two equal dialogues nothing changes
    found, low, high = distinct_difference(some, some[::-1], 2)
    assert found == 0.0
    assert low < 0.0 < high
    same = distinct_difference(some, some, 2)
    assert same == (0.0, 0.0, 0.0)


def said(dialogue: int, start: str, *texts: str) -> list[Utterance]:
    return [Utterance(dialogue, dialogue, "B", (start,), start, text, tuple(text.split())) for text in texts]


def test_shares_of_dialogues() -> None:
    from paired import difference, of_share, share, shares

    def similarity(texts: Any, others: Any) -> np.ndarray:
        return np.array([[float(other in text) for other in others] for text in texts])

    system = said(0, "a", "a b c", "a b c d") + said(2, "x", "y")
    found = shares(system, 3, similarity)
    assert found["length"].tolist() == [[7, 2], [0, 0], [1, 1]]
    assert found["repeated_3"].tolist() == [[1, 3], [0, 0], [0, 0]]
    assert found["topic"].tolist() == [[2, 2], [0, 0], [0, 1]]
    assert found["topic_other"].tolist() == [[0, 2], [0, 0], [0, 1]]
    assert share(found["length"]) == pytest.approx(8 / 3)
    assert np.isnan(share(np.zeros((2, 2))))
    assert "topic" not in shares(system, 3)
    ones = np.array([[float(n), 1.0] for n in range(20)])
    value, low, high = of_share(ones)
    assert low < value == 9.5 < high
    assert difference(ones + np.array([1.0, 0.0]), ones) == pytest.approx(
        (1.0, 1.0, 1.0)
    )  # the same starts are drawn


def test_plato_gets_the_curriculum_s_time(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plato

    runs = dict(models)
    for name, spent in {"coarse": 100.0, "fine": 50.0, "dual": 30.0}.items():
        write_metrics(runs[name], [(10, "perf/cpu_s", 1.0), (20, "perf/cpu_s", spent)])
    asked: list[list[str]] = []

    def train(command: list[str], **_: Any) -> None:
        asked.append(command)
        options = dict(word.split("=", 1) for word in command if "=" in word)
        run = Path(options["output_dir"]) / options["name"] / options["run_id"]
        run.mkdir(parents=True)
        steps = int(options["trainer.max_steps"])
        write_metrics(run, [(step, "perf/cpu_s", 5.0 + 0.5 * step) for step in range(10, steps + 1, 10)])
        (run / "lineage.json").write_text('{"status": "finished"}', encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", train)
    run = plato.trained(runs, tmp_path / "data", 0, 3, tmp_path)
    assert run == tmp_path / "runs" / "plato"
    assert ["trainer.max_steps=60" in asked[0], "trainer.max_steps=360" in asked[1]] == [True, True]  # 180 s
    assert {"stage=plato", "seed=3", "model.n_layer=1", "optim.warmup_steps=18"} <= set(asked[1])
    assert plato.trained(runs, tmp_path / "data", 10, 3, tmp_path) == run  # finished: left alone
    assert len(asked) == 2
    del runs["dual"]
    with pytest.raises(UserError, match="what dual took"):
        plato.curriculum_cpu_s(runs)


@pytest.mark.slow
def test_plato_trains(
    models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plato
    from small import SMALL

    run_really = subprocess.run

    def train(command: list[str], **more: Any) -> Any:
        if "train.py" not in command:
            return run_really(command, **more)
        assert train_in_process(command[2:], tmp_path, ROOT / "train.py").returncode == 0

    monkeypatch.setattr(subprocess, "run", train)
    own = ("experiment=", "data", "optim.schedule", "strategy=", "sample_replies", "data=shards")
    small = [one for one in SMALL if not one.startswith(own)]
    more = (*small, "data.unit_tokens=512", "data.row_length=128")
    run = plato.trained(models, corpus, 0.001, 0, tmp_path, more, probe_steps=20)
    assert json.loads((run / "lineage.json").read_text(encoding="utf-8"))["stage"] == "plato"


def test_a_run_of_another_head_is_refused(models: dict[str, Path], data: Path) -> None:
    import argparse

    from variants import add_options, given_runs

    def given(*words: str) -> Any:
        parser = argparse.ArgumentParser()
        add_options(parser)
        return given_runs(parser.parse_args(["--data", str(data), *words]))

    assert given("--dual", str(models["dual"])) == {"dual": models["dual"]}
    with pytest.raises(UserError, match="its head is dual; give it as --dual"):
        given("--first", str(models["dual"]))
    with pytest.raises(UserError, match="give a run of 1_coarse"):
        given("--coarse", str(models["fine"]))


def test_seeds_stand_side_by_side(tmp_path: Path) -> None:
    from variants import record

    file = tmp_path / "new" / "results.json"
    for seed in (10, 2):
        record(file, seed, {"asked": {"starts": 3}, "number": seed})
    record(file, 2, {"asked": {"starts": 3}, "number": 5})
    found = json.loads(file.read_text(encoding="utf-8"))["seeds"]
    assert [(seed, one["number"]) for seed, one in found.items()] == [("2", 5), ("10", 10)]
    with pytest.raises(UserError, match="seed 2 was asked"):
        record(file, 10, {"asked": {"starts": 4}})


class Letters:
    """An encoder of no cost: which letters a text has."""

    name = "letters"

    def __init__(self, device: str = "auto") -> None:
        pass

    def __call__(self, texts: Any) -> np.ndarray:
        found = np.zeros((len(texts), automatic.WIDTH))
        for row, text in enumerate(texts):
            for letter in text.lower():
                found[row, ord(letter) % automatic.WIDTH] += 1.0
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four utterances of at most 8 tokens, 50 draws for an interval, nothing heavy loaded."""
    import variants

    monkeypatch.setattr(self_chat, "UTTERANCES", 4)
    for drawn in (metrics.bootstrap, metrics.bootstrap_means):
        monkeypatch.setattr(drawn, "__defaults__", (50, 0))  # resamples and seed
    monkeypatch.setattr(variants, "MAX_TOKENS", 8)
    monkeypatch.setattr(automatic, "Encoder", Letters)
    monkeypatch.setattr(automatic, "offensive_by_classifier", lambda texts: [False] * len(texts))


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")


def options(models: dict[str, Path], *names: str) -> list[object]:
    return [word for name in names for word in (f"--{name}", models[name])]


@pytest.mark.usefixtures("_quick")
@pytest.mark.slow
def test_the_whole_of_table_1(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "results.json", tmp_path / "work"
    common = ["--data", data, "--limit", 3, "--work", work, "--out", out]
    run(ONE / "table1.py", monkeypatch, *common, *options(models, "coarse"))
    first = json.loads(out.read_text(encoding="utf-8"))["seeds"]["0"]
    assert [*first["figures"]] == ["coarse", "people", "shuffled"]
    kept = {path: path.read_bytes() for path in work.rglob("*.jsonl")}
    assert len(kept) == 3
    run(ONE / "table1.py", monkeypatch, *common, *options(models, *models))
    assert {path: path.read_bytes() for path in kept} == kept  # nothing is said again
    results = json.loads(out.read_text(encoding="utf-8"))
    found = results["seeds"]["0"]
    systems = ["coarse", "coarse_dual", "coarse_first", "fine", "fine_dual", "fine_first", "plato"]
    assert [*found["figures"]] == [*systems, "people", "shuffled"]
    for name in systems:
        (file,) = work.rglob(f"{name}-3.jsonl")
        dialogues = read_dialogues(file)
        assert len(dialogues) == 3
        assert found["figures"][name]["utterances"][0] == sum(
            len(one.said_by(name, "B")) for one in dialogues
        )
        assert found["cpu_s"][name] >= 0
    latents = {
        turn["latent"]
        for line in (work / "seed-0" / "fine-3.jsonl").read_text(encoding="utf-8").splitlines()
        for turn in json.loads(line)["turns"][1:]
    }
    assert len(latents) > 1  # a random z, not always the same
    disorder = found["differences"]["people - shuffled"]
    assert disorder["length"][0] == 0.0
    same = [found["figures"][name] for name in ("people", "shuffled")]
    assert same[0]["distinct_2"][0] == same[1]["distinct_2"][0]
    assert {"fine_dual - coarse", "fine_dual - fine", "fine_dual - coarse_dual"} <= set(found["differences"])
    assert found["paper"]["PLATO-2 1.6B"]["distinct_1"] == 0.169
    assert len(found["paper"]) == 6
    assert out.with_name("self_chats.png").stat().st_size > 10_000
    results["seeds"]["1"] = found  # as if another seed were there
    tables = runpy.run_path(str(ONE / "tables.py"))
    for both in ({"seeds": {"0": found}}, {"seeds": {"0": first}}, results):
        for name in ("variety", "coherence", "differences", "systems", "models"):
            assert tables[name](both).startswith("| ")
    assert "[" in tables["variety"](results)


# --------------------------------------------------------------------------------------------------- table 5


def test_sign_tests() -> None:
    from table5 import sign_test

    found = sign_test(np.array([1.0, 2.0, 0.5, 0.1, 0.2, -1.0, 0.0, 0.0]), "chrf")
    assert (found["wins"], found["ties"], found["losses"]) == (5, 2, 1)
    assert found["p"] == pytest.approx(2 * 7 / 64)  # 6 or 5 of 6, both sides
    assert found["low"] < found["difference"] == 0.35 < found["high"]
    less = sign_test(np.array([-1.0, -1.0, 0.0]), "repeated")  # fewer are better
    assert (less["wins"], less["ties"], less["losses"], less["difference"]) == (2, 1, 0, -0.6667)
    assert sign_test(np.zeros(4), "chrf")["p"] == 1.0


def test_relevance_is_of_the_head_that_did_not_choose() -> None:
    from table5 import MEASURES, compare

    random = np.random.default_rng(0)
    names = ("coarse", "coarse_dual", "coarse_first", "fine", "fine_dual", "fine_first", "plato")
    scores = {name: {key: random.normal(size=30) for key in MEASURES} for name in names}
    scores["fine_dual"]["shared"] = scores["coarse"]["shared"] + 1.0
    for head, other in (("dual", "first"), ("first", "dual")):
        found = compare(scores, head)
        assert len(found) == 6 * 7
        assert not any(name.endswith(other) for one in found for name in (one["a"], one["b"]))
        relevances = {one["measure"] for one in found if one["measure"].startswith(("rel", "spec"))}
        assert relevances == {f"relevance_{other}", f"specific_{other}"}
        tested = [one for one in found if one["measure"] != "words"]
        assert all(one["p_holm"] >= round(one["p"], 4) for one in tested)
        assert not any("p_holm" in one for one in found if one["measure"] == "words")
        smallest = min(tested, key=lambda one: one["p"])
        assert smallest["p_holm"] == pytest.approx(min(1.0, len(tested) * smallest["p"]), abs=1e-4)
    (sure,) = [
        one
        for one in compare(scores, "dual")
        if (one["a"], one["b"], one["measure"]) == ("fine_dual", "coarse", "shared")
    ]
    assert (sure["wins"], sure["losses"], sure["difference"]) == (30, 0, 1.0)


def test_what_is_said_before() -> None:
    from table5 import said_before

    assert said_before("I like red cars", ["you like", "I like red wine"]) == 0.5
    assert said_before("a b c a b c", []) == 0.25  # the last of four trigrams
    assert said_before("a b", ["a b"]) == 0.0


@pytest.mark.usefixtures("_quick")
@pytest.mark.slow
def test_the_whole_of_table_5(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "results.json", tmp_path / "work"
    common = ["--data", data, "--limit", 6, "--work", work, "--out", out]
    run(FIVE / "table5.py", monkeypatch, *common, *options(models, *models))
    whole = json.loads(out.read_text(encoding="utf-8"))
    found = whole["seeds"]["0"]
    assert found["asked"]["contexts"] == 6
    systems = ["coarse", "coarse_dual", "coarse_first", "fine", "fine_dual", "fine_first", "plato"]
    assert [*found["figures"]] == [*systems, "people", "elsewhere"]
    assert "chrf" not in found["figures"]["people"]
    assert {"chrf", "similarity", "relevance_first", "specific_dual"} <= set(found["figures"]["elsewhere"])
    assert len(found["tests"]["dual"]) == len(found["tests"]["first"]) == 6 * 7
    lines = (
        (work / "seed-0" / "coarse-dual-first-6.candidates.jsonl").read_text(encoding="utf-8").splitlines()
    )
    for line, one, best in zip(
        lines[1:],
        read_dialogues(work / "seed-0" / "coarse-6.jsonl"),
        read_dialogues(work / "seed-0" / "coarse_first-6.jsonl"),
        strict=True,
    ):
        written = json.loads(line)
        assert one.texts()[-1] == written["texts"][0]  # the first sample
        assert best.texts()[-1] == written["texts"][int(np.argmax(written["scores"]["first"]))]
        assert one.references == best.references != ()

    run_really = subprocess.run

    def ask(command: list[str], **more: Any) -> Any:
        """A judge that fails."""
        if "judge" not in command:
            return run_really(command, **more)
        files = [word.partition("=")[0] for word in command[5:9]]
        assert files == ["coarse", "coarse_dual", "fine", "fine_dual"]
        details = {"withheld": ["it guesses"], "controls": [{"text": "it guesses"}], "outcomes": []}
        where = Path(command[command.index("--out") + 1])
        where.write_text(json.dumps({"details": details, "systems": {}}), encoding="utf-8")

    before = {path: path.read_bytes() for path in work.rglob("*.candidates.jsonl")}
    monkeypatch.setattr(subprocess, "run", ask)
    judge = ["--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "none"]
    run(FIVE / "table5.py", monkeypatch, *common, *judge, *options(models, *models))
    assert {path: path.read_bytes() for path in before} == before  # nothing is written again
    asked = json.loads(out.read_text(encoding="utf-8"))
    assert asked["seeds"]["0"]["figures"] == found["figures"]
    tables = runpy.run_path(str(FIVE / "tables.py"))
    assert "The table is withheld: it guesses." in tables["judge"](asked)
    assert tables["judge"](whole) == "Seed 0: no judge was asked."
    two = {"seeds": {"0": found, "1": asked["seeds"]["0"]}}
    for results in (whole, asked, two):
        for name in ("figures", "dual", "first", "paper", "models"):
            assert tables[name](results).startswith("| ")
    assert out.with_name("differences.png").stat().st_size > 10_000


def test_a_judge_that_passes_has_a_table() -> None:
    from table5 import counted

    outcomes = [{"left": "coarse", "right": "fine", "score": score} for score in (1.0, 0.5, 0.0, 0.0)]
    assert counted(outcomes) == {"coarse - fine": [1, 1, 2]}
    of = {"win_rate": [0.4, 0.3, 0.5], "strength_same_length": [-0.2, None, None]}
    found = {
        "model": "m",
        "withheld": [],
        "controls": ["all is well"],
        "systems": {"coarse": of},
        "pairs": counted(outcomes),
    }
    tables = runpy.run_path(str(FIVE / "tables.py"))
    text = tables["judge"]({"seeds": {"0": {"judge": {"humanness": found}}}})
    assert "| `coarse - fine` | 1 | 1 | 2 |" in text
    assert "| `coarse` | 0.400 (0.300 to 0.500) | -0.20 |" in text
