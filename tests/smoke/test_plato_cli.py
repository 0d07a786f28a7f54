"""The baseline from training to a report, as a person starts it: one run that writes and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import Train, assert_one_line, stopped_at
from typer.testing import CliRunner

from plato2.commands import app
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_checkpoint, read_metrics

STEPS = ("trainer.max_steps=1", "trainer.val_check_interval=1")
RUN = Path("outputs/tiny-plato/a")
TRAIN = ("stage=plato", "run_id=a", "model.n_latent=4", "sample_replies=2")
MEASURED = ("selection=10", "latent_contexts=2")


def plato2(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_one_run_is_trained_resumed_talked_to_and_reported(train_here: Train, corpus: Path) -> None:
    with stopped_at(4):
        train_here(*TRAIN, *MEASURED)
    assert "resuming" in train_here(*TRAIN, *MEASURED).stderr
    run = RunFolder(RUN)
    lineage = run.lineage()
    assert (lineage["status"], lineage["parent"], lineage["monitor"]) == (
        "finished",
        None,
        ["val/loss", "min"],
    )
    assert (lineage["use"]["role"], lineage["use"]["coherence_head"]) == ("generation", "mask")
    logged = {metric for _, metric, _ in read_metrics(run.path / "metrics.csv")}
    assert {f"train/{term}" for term in ("loss", "nll", "bow", "rce", "coherence_acc")} <= logged
    assert {f"val/{name}" for name in ("loss", "nll", "ppl", "bow", "rce", "coherence_acc")} <= logged
    assert {"val/z_entropy", "val/z_mutual_information", "val/ppl_uniform", "val/p1"} <= logged
    assert {"p1", "greedy_different"} <= read_checkpoint(run.best)["figures"].keys()
    (first, *_) = (json.loads(line) for line in (RUN / "replies.jsonl").read_text().splitlines())
    assert "coherence" in json.dumps(first)
    assert '"coherence": null' not in (RUN / "replies.jsonl").read_text()

    code, out, errors = plato2("reply", "--generation", RUN, "--max-tokens", 6, "--json", "bon kan", "dus")
    assert code == 0, errors
    assert "no --evaluation" not in errors
    candidates = json.loads(out)["candidates"]
    assert len(candidates) == 4
    assert all(0 < candidate["coherence"] < 1 for candidate in candidates)
    code, out, errors = plato2(
        "reply", "--generation", RUN, "--rank", "forward", "--max-tokens", 6, "--json", "bon kan", "dus"
    )
    log_probs = [candidate["log_prob"] for candidate in json.loads(out)["candidates"]]
    assert log_probs == sorted(log_probs, reverse=True)

    Path("starts.txt").write_text("bon kan\n")
    code, out, errors = plato2(
        *("self-chat", "--starts", "starts.txt", "--out", "chats.jsonl", "--generation", RUN),
        *("--utterances", 2, "--max-tokens", 4, "--candidates"),
    )
    assert code == 0, errors
    _, said = json.loads(Path("chats.jsonl").read_text())["turns"]
    assert 0 < said["coherence"] < 1
    code, out, errors = plato2("report", "--generation", RUN, "--data", corpus, "--contexts", 1)
    assert code == 0, errors
    assert "head=mask" in out
    assert "coherence accuracy" in out
    code, out, errors = plato2("runs", "outputs", "--json")
    assert (code, json.loads(out)[0]["monitor"]) == (0, "val/loss")


def test_what_it_starts_from_and_what_starts_from_it(train_here: Train) -> None:
    train_here(*TRAIN, *STEPS)
    done = train_here("stage=plato", f"init_from={RUN}", "run_id=b", "model.n_latent=4", *STEPS)
    assert "weights from outputs/tiny-plato/a/checkpoints/best.ckpt" in done.stderr + done.stdout
    train_here("stage=1_coarse", "run_id=c", *STEPS)
    refused = train_here("stage=plato", "init_from=outputs/tiny-1_coarse/c", expect=2)
    assert_one_line(refused.stderr, "a 1_coarse run; stage plato starts from plato")
    refused = train_here("stage=2_gen", f"init_from={RUN}", expect=2)
    assert_one_line(refused.stderr, "a plato run; stage 2_gen starts from 1_coarse or 2_gen")


@pytest.mark.slow
def test_the_report_of_a_sweep_keeps_the_curriculum_s_own_model(train_here: Train) -> None:
    given = ("-m", "report=true", "model.n_latent=4", *STEPS)
    done = train_here(*given, "stage=1_coarse,2_gen,plato", "run_id=s")
    assert "│ 2_gen " in done.stdout
    assert "│ plato " not in done.stdout
    done = train_here(*given, "stage=plato,plato", "run_id=t")
    assert "│ plato " in done.stdout
