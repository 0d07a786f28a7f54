"""A backward model is trained from stage 1 and ranks what a generation model says, as a person starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import Train, assert_one_line
from typer.testing import CliRunner

from plato2.commands import app
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

STEPS = ("trainer.max_steps=1", "trainer.val_check_interval=1")
COARSE, BACKWARD = Path("outputs/tiny-1_coarse/a"), Path("outputs/tiny-backward/b")


def plato2(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_from_stage_1_to_a_ranked_reply(train_here: Train) -> None:
    train_here("stage=1_coarse", "run_id=a")
    done = train_here("stage=backward", "init_from=auto", "run_id=b", "sample_replies=2")
    run = RunFolder(BACKWARD)
    assert f"weights from {COARSE.resolve()}/checkpoints/best.ckpt" in done.stderr + done.stdout
    lineage = run.lineage()
    assert (lineage["stage"], lineage["status"], lineage["curriculum"]) == ("backward", "finished", "a")
    assert not (run.path / "replies.jsonl").exists()  # it is not asked to reply
    logged = {metric for _, metric, _ in read_metrics(run.path / "metrics.csv")}
    assert {"train/nll", "train/acc", "val/nll", "val/ppl", "val/acc"} <= logged

    models = ["--generation", COARSE, "--backward", BACKWARD]
    weights = {"forward=1,backward=5": (1.0, 5.0), "backward": (0.0, 1.0), "forward": (1.0, 0.0)}
    heard = {}
    for text, (forward, backward) in weights.items():
        code, out, errors = plato2(
            "reply", *models, "--rank", text, "--max-tokens", 6, "--json", "bon kan", "dus"
        )
        assert code == 0, errors
        answer = json.loads(out)
        candidates = answer["candidates"]
        assert answer["reply"] == candidates[0]["text"]
        assert all(("backward" in candidate) == (backward != 0.0) for candidate in candidates)
        scores = [
            forward * candidate["log_prob"] + backward * candidate.get("backward", 0.0)
            for candidate in candidates
        ]
        assert scores == sorted(scores, reverse=True)
        heard[text] = [candidate["text"] for candidate in candidates]
    first, *others = heard.values()
    assert len(first) == 20
    for other in others:
        assert sorted(other) == sorted(first)
        assert other != first

    # going on from its own kind, and from nothing else than stage 1
    train_here("stage=backward", f"init_from={BACKWARD}", "run_id=c", *STEPS)
    train_here("stage=2_gen", "init_from=auto", "run_id=d", "model.n_latent=4", *STEPS)
    refused = train_here("stage=backward", "init_from=outputs/tiny-2_gen/d", expect=2)
    assert_one_line(refused.stderr, "a 2_gen run; stage backward starts from 1_coarse or backward")
    refused = train_here("stage=2_gen", f"init_from={BACKWARD}", expect=2)
    assert_one_line(refused.stderr, "a backward run; stage 2_gen starts from 1_coarse or 2_gen")


@pytest.mark.parametrize("verb", ["reply", "chat"])
def test_it_does_not_reply_itself(train_here: Train, verb: str) -> None:
    train_here("stage=backward", "init_from=scratch", "run_id=b", *STEPS)
    code, out, errors = plato2(verb, "--generation", BACKWARD, *(["hi"] if verb == "reply" else []))
    assert (code, out) == (2, "")
    wanted = "give a run of 2_gen or 1_coarse or plato"
    assert errors == f"error: --generation {BACKWARD}: this is a backward run; {wanted}\n"


def test_auto_needs_a_finished_stage_1(train_here: Train) -> None:
    train_here("stage=backward", "init_from=scratch", "run_id=b", *STEPS)
    done = train_here("stage=backward", "init_from=auto", "run_id=c", expect=2)
    assert_one_line(done.stderr, "init_from=auto: no finished 1_coarse run of model=tiny")


@pytest.mark.slow
def test_a_sweep_over_all_four_stages_with_its_report(train_here: Train) -> None:
    reported = ("report=true", "latent_contexts=2")
    done = train_here("-m", "stage=1_coarse,2_gen,2_eval,backward", "init_from=auto", *reported, *STEPS)
    runs = [RunFolder(path) for path in sorted(Path("outputs").glob("tiny-*/*"))]
    assert [run.lineage()["stage"] for run in runs] == ["1_coarse", "2_eval", "2_gen", "backward"]
    assert all(run.finished for run in runs)
    assert len({run.lineage()["curriculum"] for run in runs}) == 1
    assert "The curriculum on its validation data" in done.stdout
    assert "sampled: distinct-2 of 20 samples of stage 1" in done.stdout
