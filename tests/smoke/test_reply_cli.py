"""`plato2 reply` and `report` as a person starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import make_corpus, make_run, write_metrics
from typer.testing import CliRunner

from plato2.commands import app


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("1_coarse", "2_gen", "2_eval")}


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def plato2(*arguments: object, stdin: str | bytes = "") -> Done:
    """The command in this process, which saves the seconds that importing torch takes."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def plato2_itself(*arguments: object, stdin: str = "") -> Done:
    """The command as a person starts it."""
    command = [sys.executable, "-m", "plato2", *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, cwd=root)
    return Done(done.returncode, done.stdout, done.stderr)


def models(runs: dict[str, Path]) -> list[object]:
    return ["--generation", runs["2_gen"], "--evaluation", runs["2_eval"], "--max-tokens", 8]


def test_one_json_object_best_first_and_the_same_again(runs: dict[str, Path]) -> None:
    done = plato2_itself("reply", *models(runs), "--seed", 4, "hello !", "hi , how was your day ?", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer.pop("timing").keys() == {"decode_s", "rank_s", "contexts"}
    assert answer.keys() == {"reply", "candidates"}
    assert answer["reply"] == answer["candidates"][0]["text"]
    assert [set(c) for c in answer["candidates"]] == [{"text", "latent", "log_prob", "coherence"}] * 5
    scores = [candidate["coherence"] for candidate in answer["candidates"]]
    assert scores == sorted(scores, reverse=True)
    again = plato2("reply", *models(runs), "--seed", 4, "hello !", "hi , how was your day ?", "--json")
    assert {**json.loads(again.stdout), "timing": None} == {**answer, "timing": None}


def test_without_evaluation_it_says_how_they_are_ranked(runs: dict[str, Path]) -> None:
    done = plato2("reply", "--generation", runs["1_coarse"], "--max-tokens", 8, "hi", "--json")
    assert done.returncode == 0
    assert "ranked by log-probability" in done.stderr
    candidates = json.loads(done.stdout)["candidates"]
    assert len(candidates) == 20
    assert all(candidate["latent"] is None and candidate["coherence"] is None for candidate in candidates)
    log_probs = [candidate["log_prob"] for candidate in candidates]
    assert log_probs == sorted(log_probs, reverse=True)


def test_the_table_has_the_reply_on_top(runs: dict[str, Path]) -> None:
    done = plato2("reply", *models(runs), "--top-k", 1, "hi")
    answer = json.loads(plato2("reply", *models(runs), "--top-k", 1, "hi", "--json").stdout)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == answer["reply"]
    assert "coherence" in done.stdout


def test_a_report(runs: dict[str, Path], tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "data", [([f"question {n} ?"], f"answer {n} .") for n in range(5)])
    write_metrics(runs["2_gen"], [(2, "val/nll", 5.0), (2, "val/ppl", 148.4)])
    given = ["report", "--generation", runs["2_gen"], "--data", data, "--contexts", 1]
    report = json.loads(plato2(*given, "--json").stdout)
    assert report["stages"]["2_gen"]["ppl"] == 148.4
    assert report["contexts"][0]["human"] == "answer 2 ."
    printed = plato2(*given)
    assert printed.returncode == 0
    assert "answer 2 ." in printed.stdout
    assert report["latents"] == {"ppl": 148.4}
    measured = json.loads(plato2(*given, "--latent-contexts", 2, "--json").stdout)["latents"]["variety"]
    assert (measured["n_contexts"], measured["n_candidates"]) == (2, 5)
    assert "sampled: distinct-2 of 5 latents" in plato2(*given, "--latent-contexts", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generation", "{2_gen}x", "hi"], "no such run folder, checkpoint or model folder; did you mean"),
        (["--generation", "{2_eval}", "hi"], "this is a 2_eval run; give a run of 2_gen or 1_coarse"),
        (["--generation", "{2_gen}", "--evaluation", "{1_coarse}", "hi"], "give a run of 2_eval"),
        (["--generation", "{2_gen}", " "], "the message is empty"),
        (["--generation", "{2_gen}", "--top-k", "0", "hi"], "--top-k 0: must be at least 1"),
        (["--generation", "{2_gen}", "--max-tokens", "0", "hi"], "--max-tokens 0: must be at least 1"),
        (["--generation", "{2_gen}", "--device", "warp9", "hi"], "--device warp9: cannot be used"),
    ],
)
def test_mistakes_are_one_line(runs: dict[str, Path], arguments: list[str], message: str) -> None:
    filled = [argument.format(**runs) for argument in arguments]
    done = plato2("reply", *filled)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_mistake_is_one_line_for_a_person_too(runs: dict[str, Path]) -> None:
    done = plato2_itself("reply", "--generation", runs["2_gen"], "--top-k", 0, "hi")
    assert done.returncode == 2
    assert done.stderr == "error: --top-k 0: must be at least 1 (1 = greedy)\n"
