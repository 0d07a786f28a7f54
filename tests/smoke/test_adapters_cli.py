"""Low-rank training of a pretrained decoder, as a person starts it: killed, resumed, stage after stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forks import Forks
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
            [name for name in saved["state_dict"] if name != "validation"]
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
