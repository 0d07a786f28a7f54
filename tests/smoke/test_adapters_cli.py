"""Low-rank training of a pretrained decoder, as a person starts it: killed, resumed, stage after stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from decoders import rounded
from forks import Forks
from small import ROOT, assert_one_line, stopped_at, train_in_process
from test_pretrained_cli import STEPS, Training, places, plato2  # noqa: F401 (a fixture)
from test_resume import assert_same

from plato2.files import file_sha256
from plato2.model.pretrained import is_of_base
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

ADAPTER = ["model.adapter=lora", "model.adapter_rank=4", "model.adapter_alpha=8"]


@pytest.mark.slow
def test_three_stages_of_adapters_from_a_folder_to_a_reply(
    forks: Forks,
    places: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Killed, each stage is what it would have been; the second ones go on with the first one's adapter."""
    decoder = Path(places[0].removeprefix("model.path="))
    whole, killed = tmp_path / "whole" / "runs", tmp_path / "killed" / "runs"
    for stage in ("1_coarse", "2_gen", "2_eval"):
        given = [*places, *ADAPTER, f"stage={stage}"]
        Training(forks, whole, *given, RUN_ID="a").finish()
        run = killed / f"pretrained-{stage}" / "a"
        process = Training(forks, killed, *given, RUN_ID="a")
        process.wait_for_step(run, 4)
        os.kill(process.pid, signal.SIGKILL)
        process.finish(expect=-signal.SIGKILL)
        assert "resuming" in Training(forks, killed, *given, RUN_ID="a").finish()
        assert_same(whole / f"pretrained-{stage}" / "a", run)
        assert (RunFolder(run).lineage()["parent"] is None) == (stage == "1_coarse")
        losses = [value for _, metric, value in read_metrics(run / "metrics.csv") if metric == "train/loss"]
        assert losses[-1] < losses[0]
        saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        assert not [name for name in saved["state_dict"] if is_of_base(name)]
        assert saved["hyper_parameters"]["model"]["base_sha256"] == file_sha256(decoder / "model.safetensors")
        assert len(saved["optimizer_states"][0]["state"]) == len(
            [name for name in saved["state_dict"] if name not in ("validation", "recognition.centre")]
        )
    runs = ["--generation", whole / "pretrained-2_gen/a", "--evaluation", whole / "pretrained-2_eval/a"]
    code, out, errors = plato2("reply", *runs, "--max-tokens", 6, "--json", "bon kan", "dus")
    assert code == 0, errors
    assert len(json.loads(out)["candidates"]) == 4
    shutil.move(decoder, tmp_path / "elsewhere")
    try:
        code, _, errors = plato2("reply", *runs, "--max-tokens", 6, "bon kan", "dus")
        assert code != 0
        assert "which is not there; put it back" in errors
    finally:
        shutil.move(tmp_path / "elsewhere", decoder)


@pytest.mark.slow
def test_a_base_in_bfloat16_changes_nothing_but_memory(
    places: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of a decoder in bfloat16: every loss and weight, also of a run that was stopped; then it talks."""
    decoder = rounded(Path(places[0].removeprefix("model.path=")), tmp_path / "decoder")
    half = ["model.base_dtype=bfloat16", "strategy.precision=bf16-mixed"]

    def train(run_id: str, stage: str, *overrides: str) -> Path:
        given = [*STEPS, *places, *ADAPTER, *half, f"model.path={decoder}", f"stage={stage}"]
        given += ["output_dir=runs", f"run_id={run_id}", "init_from=scratch", "sample_replies=2", *overrides]
        last = {item.split("=", 1)[0]: item for item in given}
        done = train_in_process(list(last.values()), tmp_path, ROOT / "train.py")
        assert done.returncode == 0, done.stderr
        return tmp_path / "runs" / f"pretrained-{stage}" / run_id

    def learned(run: Path) -> tuple[list[tuple[int, str, float]], dict[str, torch.Tensor]]:
        rows = [row for row in read_metrics(run / "metrics.csv") if row[1] == "train/loss"]
        weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        return rows, {name: weight for name, weight in weights.items() if name != "validation"}

    with stopped_at(4):
        train("stopped", "2_gen")
    runs = {"generation": train("half", "2_gen"), "evaluation": train("half", "2_eval")}
    stopped, whole = train("stopped", "2_gen"), train("whole", "2_gen", "model.base_dtype=float32")
    judge = train("whole", "2_eval", "model.base_dtype=float32")
    for role, other in (("generation", stopped), ("generation", whole), ("evaluation", judge)):
        (rows, weights), (known_rows, known) = learned(runs[role]), learned(other)
        assert rows == known_rows
        assert len(rows) == 6
        assert weights.keys() == known.keys()
        assert all(torch.equal(weight, known[name]) for name, weight in weights.items())
    paths = [word for role, run in runs.items() for word in (f"--{role}", run)]
    code, out, errors = plato2("reply", *paths, "--max-tokens", 6, "--json", "bon kan", "dus")
    assert code == 0, errors
    assert len(json.loads(out)["candidates"]) == 4
    given = [*STEPS, *places, *ADAPTER, half[0], "strategy.precision=32-true", "output_dir=runs"]
    done = train_in_process(given, tmp_path, ROOT / "train.py")
    assert_one_line(
        done.stderr, "model.base_dtype=bfloat16: is for strategy.precision=bf16-mixed, not 32-true"
    )


@pytest.mark.slow
def test_averages_and_the_guard_go_on_after_a_kill(
    forks: Forks,
    places: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The average is that of what is trained; the base is in no part of a checkpoint."""
    given = [*places, *ADAPTER, "callbacks=[ema,spike_guard]", "callbacks.ema.decay=0.5"]
    Training(forks, tmp_path / "whole", *given, RUN_ID="a").finish()
    run = tmp_path / "killed" / "pretrained-1_coarse" / "a"
    process = Training(forks, tmp_path / "killed", *given, RUN_ID="a")
    process.wait_for_step(run, 4)
    os.kill(process.pid, signal.SIGKILL)
    process.finish(expect=-signal.SIGKILL)
    Training(forks, tmp_path / "killed", *given, RUN_ID="a").finish()
    assert_same(tmp_path / "whole" / "pretrained-1_coarse" / "a", run)
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = saved["state_dict"], saved["current_model_state"]
    assert averaged.keys() == current.keys()
    assert not any(map(is_of_base, averaged))
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
