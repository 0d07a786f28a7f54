"""The closing table: numbers of the best validation, candidates beside the human reply, what to type next."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from knover import apart
from rich.console import Console
from runs import make_corpus, make_run, small_tokenizer_texts, write_metrics

from plato2.config import UserError
from plato2.data.tokenizer import train_tokenizer
from plato2.evaluate.runs import compare, find_runs
from plato2.report.curriculum import best_validation, curriculum_report, print_report, report_sweep
from plato2.runs.folder import RunFolder
from plato2.weights.folder import checkpoint_file

PAIRS = [([f"question {n} ?", f"and {n} ?"], f"answer {n} .") for n in range(9)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), PAIRS)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Two sweeps of a curriculum; the runs of the second, `two`, are the ones reported on."""
    folder = tmp_path_factory.mktemp("outputs")
    metrics = {
        "1_coarse": [
            (2, "val/nll", 5.0),
            (2, "val/loss", 5.0),
            (2, "val/ppl", 148.4),
            (2, "train/loss", 0.1),
        ],
        "2_gen": [
            *[(2, "val/nll", 4.5), (2, "val/ppl", 90.0), (2, "val/z_effective", 4.2), (3, "train/nll", 1.0)],
            *[(2, "val/ppl_uniform", 93.25), (2, "val/z_mutual_information", 0.81), (2, "val/z_in_use", 3.0)],
            *[(4, "val/nll", 4.75), (4, "val/ppl", 115.6), (4, "val/bow", 6.0)],
        ],
        "2_eval": [(2, "val/coherence_acc", 0.6), (4, "val/coherence_acc", 0.75), (4, "val/rce", 0.5)],
    }
    for sweep in ("one", "two"):
        for job, (name, rows) in enumerate(metrics.items()):
            run = make_run(folder / f"tiny-{name}" / f"{sweep}-{job}", name)
            write_metrics(run, rows if sweep == "two" else [(1, "val/nll", 9.9)])
            RunFolder(run).write_lineage(data={"path": str(data)}, created=f"2026-01-0{job + 1}")
    return folder


@pytest.fixture(scope="module")
def runs(outputs: Path) -> dict[str, Path]:
    jobs = ("1_coarse", "2_gen", "2_eval")
    parts = ("coarse", "generation", "evaluation")
    return {
        part: outputs / f"tiny-{name}" / f"two-{job}"
        for job, (part, name) in enumerate(zip(parts, jobs, strict=True))
    }


def test_the_report_is_plain_values(runs: dict[str, Path], data: Path) -> None:
    report = json.loads(json.dumps(curriculum_report(runs, data)))
    assert report["stages"]["1_coarse"] == {
        "run": str(runs["coarse"]),
        "step": 2,
        "nll": 5.0,
        "loss": 5.0,
        "ppl": 148.4,
    }
    assert report["stages"]["2_gen"] == {
        "run": str(runs["generation"]),
        "step": 2,
        "nll": 4.5,
        "ppl": 90.0,
        "ppl_uniform": 93.25,
        "z_effective": 4.2,
        "z_in_use": 3.0,
        "z_mutual_information": 0.81,
    }
    assert report["latents"] == {
        "ppl": 90.0,
        "ppl_uniform": 93.25,
        "z_effective": 4.2,
        "z_in_use": 3.0,
        "z_mutual_information": 0.81,
    }
    assert report["stages"]["2_eval"]["coherence_acc"] == 0.75
    assert report["unigram"] == {"nll": 6.2, "ppl": 492.7}
    assert report["chance"] == 0.5
    assert [context["human"] for context in report["contexts"]] == ["answer 1 .", "answer 4 .", "answer 7 ."]
    for context in report["contexts"]:
        assert len(context["turns"]) == 2
        assert 0 < context["human_coherence"] < 1
        scores = [candidate["coherence"] for candidate in context["candidates"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
    assert any("plato2 chat --generation" in command for command in report["next"])


def test_a_sweep_is_reported_in_print(outputs: Path, runs: dict[str, Path]) -> None:
    out = io.StringIO()
    report_sweep(outputs, "two", Console(file=out, width=120))
    text = out.getvalue()
    for expected in ("unigram baseline", "492.7", "148.4", "90.0", "0.750 (chance 0.5)", "answer 4 ."):
        assert expected in text
    models = f"--generation {runs['generation']} --evaluation {runs['evaluation']}"
    assert f"python -m plato2 chat {models}\n" in text
    with pytest.raises(UserError, match="the sweep three has no runs"):
        report_sweep(outputs, "three")


def test_the_latents_are_measured_when_asked_for(
    outputs: Path, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    report = json.loads(json.dumps(curriculum_report(runs, data, 0, n_latent_contexts=3)))
    found = report["latents"]["variety"]
    assert (found["n_contexts"], found["n_candidates"]) == (3, 5)
    assert 1 <= found["greedy_different"]["mean"] <= 5
    for name in ("between_z", "within_z", "stage_1"):
        assert 0 < found[f"distinct_2_{name}"]["mean"] <= 1
    out = io.StringIO()
    report_sweep(outputs, "two", Console(file=out, width=120), n_latent_contexts=3)
    text = out.getvalue()
    for expected in ("0.81", "93.2", "mean over 3 contexts", "of 5 samples of one latent", "stage 1"):
        assert expected in text
    alone = curriculum_report({"generation": runs["generation"]}, data, 0, n_latent_contexts=2)
    assert alone["latents"]["variety"]["distinct_2_stage_1"] is None
    print_report(alone, Console(file=io.StringIO()))
    assert curriculum_report({"coarse": runs["coarse"]}, data, 0, 2)["latents"] == {}
    train_tokenizer(small_tokenizer_texts(), 60).save(tmp_path / "tokenizer")
    coarse = make_run(tmp_path / "other", "1_coarse", tokenizer_folder=tmp_path / "tokenizer")
    write_metrics(coarse, [(2, "val/loss", 5.0)])
    with pytest.raises(UserError, match=r"--coarse .* another tokenizer than --generation"):
        curriculum_report(runs | {"coarse": coarse}, data, 0, n_latent_contexts=2)


def test_some_of_the_stages(runs: dict[str, Path], data: Path) -> None:
    coarse = curriculum_report({"coarse": runs["coarse"]}, data, n_contexts=1)
    assert coarse["contexts"][0]["candidates"][0]["latent"] is None
    assert coarse["contexts"][0]["human_coherence"] is None
    print_report(coarse, Console(file=io.StringIO()))
    only_evaluation = curriculum_report({"evaluation": runs["evaluation"]}, data)
    assert only_evaluation["contexts"] == []
    print_report(only_evaluation, Console(file=io.StringIO()))
    with pytest.raises(UserError, match="at least one run"):
        curriculum_report({}, data)


def test_a_checkpoint_file_answers_but_has_no_numbers(runs: dict[str, Path], data: Path) -> None:
    files = {stage: checkpoint_file(run) for stage, run in runs.items()}
    report = curriculum_report(files, data, n_contexts=1)
    assert report["stages"]["2_gen"] == {"run": str(files["generation"]), "step": None}
    of_runs = curriculum_report(runs, data, n_contexts=1)
    assert report["contexts"] == of_runs["contexts"]
    print_report(report, Console(file=io.StringIO()))


def test_runs_that_do_not_fit_are_named(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--coarse .*: this is a 2_gen model; give a generation model without latents"
    ):
        best_validation(runs["generation"], "coarse")
    with pytest.raises(UserError, match=r"--generation .*: this is a 1_coarse model; give .* with latents"):
        best_validation(runs["coarse"], "generation")
    with pytest.raises(UserError, match="there is no checkpoint in it"):
        best_validation(tmp_path, "coarse")
    run = make_run(tmp_path / "run", "2_gen")
    with pytest.raises(UserError, match=r"metrics\.csv: missing; train with logger=csv"):
        best_validation(run, "generation")
    write_metrics(run, [(3, "train/loss", 2.0), (4, "val/nll", float("nan"))])
    with pytest.raises(UserError, match="no val/nll in it yet"):
        best_validation(run, "generation")
    (run / "metrics.csv").write_text("step,metric,value\n1,val/nll,x\n")
    with pytest.raises(UserError, match="not rows of step,metric,value"):
        best_validation(run, "generation")


def test_a_run_of_an_older_plato2_is_one_line(tmp_path: Path) -> None:
    """Its record does not say what it is for, and its weights have query, key and value apart."""
    run = make_run(tmp_path / "run", "2_gen")
    record = json.loads((run / "lineage.json").read_text())
    (run / "lineage.json").write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("use", "monitor")})
    )
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] = apart(checkpoint["state_dict"])
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    write_metrics(run, [(2, "val/nll", 4.5)])
    with pytest.raises(UserError, match=r"three parameters; export it with the plato2 that wrote it"):
        best_validation(run, "generation")
    assert find_runs([run]) == [run]
    (found,) = compare([run], None)
    assert (found.stage, found.monitor) == ("2_gen", "val/loss")
