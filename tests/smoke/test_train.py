"""Every stage through `plato2.train`, and a model that memorizes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import ROOT, command

import plato2
from plato2.config import UserError
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics
from plato2.stages import known_stages

STAGES = known_stages()

Trains = Callable[..., plato2.Trained | None]


@pytest.fixture
def trains(corpus: Path, tmp_path: Path) -> Trains:
    """`plato2.train` on the small corpus."""
    return lambda *overrides: plato2.train(*command(corpus, tmp_path / "outputs", *overrides)[2:])


def losses(run: Path, name: str) -> list[float]:
    return [value for _, metric, value in read_metrics(run / "metrics.csv") if metric == name]


def test_every_stage_trains_for_a_few_steps(trains: Trains, tmp_path: Path) -> None:
    for stage, kind in STAGES.items():
        found = trains(f"stage={stage}", "init_from=auto", "run_id=r")
        assert found
        run = RunFolder(tmp_path / "outputs" / f"tiny-{stage}" / "r")
        assert run.finished
        assert (found.run, found.checkpoint) == (run.path, run.best)
        assert found.metrics == pytest.approx(run.lineage()["metrics"])
        assert found.value == pytest.approx(
            min(losses(run.path, kind.monitor[0]), key=lambda v: sign(kind) * v)
        )
        assert len(losses(run.path, "train/loss")) == 6


@pytest.mark.parametrize("head", ["first", "dual"])
def test_what_an_evaluation_model_is_worth_is_logged_and_kept(
    trains: Trains, tmp_path: Path, head: str
) -> None:
    trains("stage=1_coarse", "run_id=r")
    made = ("stage=2_eval", f"stage.head={head}", "stage.batch.mask_prob=0", "run_id=j")
    trains(*made, "selection=20", "human_rank=4")
    run = RunFolder(tmp_path / "outputs" / "tiny-2_eval" / "j")
    for name in ("pair_acc", "p1", "mrr", "p1_matched", "overlap_p1", "human_first", "coherence_acc", "rce"):
        assert len(losses(run.path, f"val/{name}")) == 2
        assert all(0 <= value < 1.5 for value in losses(run.path, f"val/{name}"))
    assert losses(run.path, "val/mlm") == []  # nothing was masked
    assert all(math.isfinite(value) for value in losses(run.path, "val/loss"))
    checkpoint = torch.load(run.last, weights_only=True)
    assert checkpoint["figures"]["p1"] == pytest.approx(losses(run.path, "val/p1")[-1])  # logged in float32
    if head == "dual":
        assert losses(run.path, "train/contrast")
        assert checkpoint["state_dict"]["coherence.calibration"].tolist() != [1.0, 0.0]
    with pytest.raises(UserError, match="selection=3: use 10 or more, or 0"):
        trains("stage=2_eval", "selection=3")
    other = "dual" if head == "first" else "first"
    with pytest.raises(UserError, match=rf"stage.batch.head={other}, stage.head={head}: the batch is"):
        trains("stage=2_eval", f"stage.head={head}", f"+stage.batch.head={other}")
    with pytest.raises(UserError, match=r"^stage\.head=second: must be first or dual or pmi"):
        trains("stage=2_eval", "stage.head=second")
    with pytest.raises(UserError, match=r"^stage\.head=pmi: CoherenceBatch is for .*; use stage=2_eval_pmi"):
        trains("stage=2_eval", "stage.head=pmi")
    with pytest.raises(UserError, match=rf"^stage\.head={head}: .* for pmi; use stage=2_eval"):
        trains("stage=2_eval_pmi", f"stage.head={head}")


def test_a_model_that_ranks_by_pmi_is_trained_from_what_it_writes(trains: Trains, tmp_path: Path) -> None:
    trains("stage=1_coarse", "run_id=r")
    trains("stage=2_eval_pmi", "data.row_length=256", "run_id=j", "selection=20", "human_rank=4")
    run = RunFolder(tmp_path / "outputs" / "tiny-2_eval_pmi" / "j")
    for name in ("pair_acc", "p1", "human_first", "coherence_acc", "rce", "nll", "nll_alone", "ppl"):
        assert len(losses(run.path, f"val/{name}")) == 2
    state = torch.load(run.last, weights_only=True)["state_dict"]
    assert all(float(state[f"coherence.{name}"]) != 0 for name in ("log_scale", "bias"))


def test_what_talking_shows_of_the_latents_is_logged_and_changes_nothing(
    trains: Trains, tmp_path: Path
) -> None:
    fine = ("stage=2_gen", "init_from=scratch", "model.n_latent=5")
    trains(*fine, "latent_contexts=3", "run_id=shown")
    trains(*fine, "run_id=plain")
    shown, plain = (tmp_path / "outputs" / "tiny-2_gen" / name for name in ("shown", "plain"))
    names = ("greedy_different", "greedy_distinct_2", "distinct_2_between_z", "distinct_2_within_z")
    for name in names:
        assert len(losses(shown, f"val/{name}")) == 2
        assert losses(plain, f"val/{name}") == []
    assert all(1 <= value <= 5 for value in losses(shown, "val/greedy_different"))
    assert all(0 <= value <= 1 for name in names[1:] for value in losses(shown, f"val/{name}"))
    for name in ("train/loss", "val/nll", "val/nll_uniform"):
        assert losses(shown, name) == losses(plain, name)
    assert RunFolder(shown).lineage()["metrics"]["val/greedy_different"] >= 1
    trains("latent_contexts=3", "run_id=r")  # stage 1 has no latents: nothing to show
    assert losses(tmp_path / "outputs" / "tiny-1_coarse" / "r", "val/greedy_different") == []
    with pytest.raises(UserError, match="latent_contexts=-1: use 0 for none"):
        trains("latent_contexts=-1")


def sign(kind: Any) -> int:
    return 1 if kind.monitor[1] == "min" else -1


def test_a_plan_trains_nothing(trains: Trains, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trains("model=1.6b", "stage=2_gen", "plan=true") is None
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_plan_gives_every_figure_of_64_gpus_and_of_the_curriculum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipes of the paper, whose parameters and tokens are known (docs/spec.md); nothing but JSON."""
    given = ("model=1.6b", "strategy=fsdp_64", "data=shards", f"data.path={tmp_path}/none", "plan=json")
    monkeypatch.chdir(tmp_path)
    plato2.train("stage=2_gen", "plan_gpu_hour_price=2", "callbacks=ema", *given)
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 1_641_037_462
    assert (found["ranks"], found["unit_tokens"], found["units_per_rank_and_step"]) == (64, 1024, 1)
    assert found["tokens"] == 100_000 * 65_536
    assert found["epochs"] is None
    stages = found["curriculum"]["stages"]
    assert [*stages] == ["1_coarse", "2_gen", "2_eval"]
    assert stages["1_coarse"]["tokens"] == 200_000 * 524_288
    assert found["curriculum"]["flop"] == pytest.approx(1.67e21, rel=0.02)
    memory = found["memory_bytes"]
    assert memory["total"] == pytest.approx(sum(size for name, size in memory.items() if name != "total"))
    assert memory["weights"] == pytest.approx(4 * found["parameters"] / 64, rel=0.01)
    assert memory["average"] == memory["weights"]  # of the callback
    assert memory["total"] < 8 * 2**30
    for gpu, limit in found["largest_unit_tokens"].items():
        assert limit["with_checkpointing"] > limit["without_checkpointing"] >= 1024, gpu
    a100 = found["gpus"]["A100-80G"]
    assert a100["curriculum_cost"] == pytest.approx(2 * a100["curriculum_gpu_hours"])
    assert found["gpus"]["H100-80G"]["bound_by"] == "network"
    assert any("strategy.devices=8" in sentence for sentence in found["advice"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("plan=maybe", "plan=maybe: choose true or json"),
        ("plan_mfu=1.2", "plan_mfu=1.2: must be above 0 and at most 1"),
        ("plan_gb_per_s=0", "plan_gb_per_s=0.0: must be above 0"),
        ("plan_gpu_hour_price=-1", "plan_gpu_hour_price=-1.0: must be 0 or more"),
    ],
)
def test_a_plan_refuses_impossible_terms(trains: Trains, given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        trains(given)


@pytest.fixture(scope="module")
def four_dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations to be memorized; the last one is for validation."""
    folder = tmp_path_factory.mktemp("four")
    turns = [
        ["do you like tea ?", "no , coffee .", "why is that ?", "it keeps me awake at night ."],
        ["where is the cat ?", "under the old table .", "is it asleep ?", "i hear it purr ."],
        ["what a day !", "did you go to the sea ?", "yes , by train .", "i wish i had come along ."],
        ["good morning .", "good evening !", "is it late ?", "very ."],
    ]
    lines = [json.dumps({"turns": dialogue}) for dialogue in turns]
    (folder / "dialogues.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "term", "ends_below"), [("1_coarse", "nll", 0.1), ("2_gen", "nll", 0.3)])
def test_a_model_memorizes_a_few_samples(
    trains: Trains, four_dialogues: Path, tmp_path: Path, stage: str, term: str, ends_below: float
) -> None:
    """The experiment `overfit` itself, on a smaller corpus and model."""
    prepare = {"corpus": "jsonl", "max_dialogues": "null", "vocab_pieces": "60"}
    more = {"files": f"[{four_dialogues}/dialogues.jsonl]", "max_context": "32", "max_response": "32"}
    steps = 80
    trains(
        "experiment=overfit",
        "data=chitchat",
        f"data.path={four_dialogues}/shards",
        *(f"data.prepare.{key}={value}" for key, value in prepare.items()),
        *(f"+data.prepare.{key}={value}" for key, value in (more | {"valid_dialogues": "1"}).items()),
        f"stage={stage}",
        "init_from=scratch",
        "run_id=r",
        "model.vocab_size=61",
        "model.n_layer=2",
        "model.n_head=2",
        "model.hidden_size=64",
        "optim.batch_tokens=512",
        "optim.lr=5e-3",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.log_every_n_steps=1",
    )
    found = losses(tmp_path / "outputs" / f"tiny-{stage}" / "r", f"train/{term}")
    assert len(found) == steps
    assert found[0] > 3.5  # about log 61: nothing is known yet
    assert max(found[-5:]) < ends_below


def test_the_overfit_experiment_fits_its_own_corpus() -> None:
    """Its tokenizer and its model have the same vocabulary, and it takes but few conversations."""
    experiment = yaml.safe_load((ROOT / "conf" / "experiment" / "overfit.yaml").read_text())
    assert experiment["model"]["vocab_size"] == experiment["data"]["prepare"]["vocab_pieces"] + 1
    assert experiment["model"]["dropout"] == 0.0
    assert experiment["data"]["prepare"]["max_dialogues"] <= 10


def test_mistakes_from_python_are_user_errors(trains: Trains) -> None:
    with pytest.raises(UserError, match=r"optim\.lrr: no such key; did you mean optim\.lr\?"):
        trains("optim.lrr=1")
    with pytest.raises(UserError, match=r"is a sweep; start it on the command line"):
        plato2.train("experiment=quickstart")
