"""What a run leaves to be looked at: its folder, metrics.csv, TensorBoard, W&B without a network."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache
from small import ROOT, Train, assert_one_line, command, environment
from wandb_server import WandbServer

from plato2.runs.folder import RunFolder
from plato2.runs.metrics import MetricsCsv
from plato2.runs.panels import PANELS
from plato2.runs.saved import last_metrics, read_metrics
from plato2.runs.wandb import shortened
from plato2.stages import Stage

FINE = ["stage=2_gen", "init_from=scratch", "sample_replies=2", "run_id=r", "model.n_latent=5"]
Run = Callable[..., subprocess.CompletedProcess[str]]
RUN = Path("outputs/tiny-2_gen/r")


def test_the_run_folder_says_what_the_run_was(train_here: Train, corpus: Path) -> None:
    train_here("run_id=a", "tags=[one,two]")
    train_here("stage=2_gen", "init_from=outputs/tiny-1_coarse/a", "run_id=b", "sample_replies=2")
    first, second = (RunFolder(Path(f"outputs/tiny-{name}")) for name in ("1_coarse/a", "2_gen/b"))
    for run, stage in ((first, "1_coarse"), (second, "2_gen")):
        lineage = run.lineage()
        assert (lineage["stage"], lineage["model"], lineage["run_id"]) == (stage, "tiny", run.path.name)
        assert (lineage["status"], lineage["step"]) == ("finished", 6)
        assert lineage["metrics"]["val/ppl"] == pytest.approx(math.exp(lineage["metrics"]["val/nll"]))
        assert set(lineage["packages"]) >= {"torch", "pytorch-lightning", "hydra-core", "numpy"}
        assert lineage["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
        assert lineage["git"] is None or len(lineage["git"]["commit"]) == 40
        index = json.loads((corpus / "index.json").read_text())
        assert lineage["tokenizer_sha256"] == index["tokenizer"]["sha256"]
        assert lineage["data"]["path"] == str(corpus)
        config = yaml.safe_load((run.path / "config.yaml").read_text())
        assert config["name"] == f"tiny-{stage}"  # resolved: no ${...} is left
        assert config == lineage["config"]
        for file in ("spm.model", "vocab.txt"):
            assert (run.tokenizer / file).read_bytes() == (corpus / "tokenizer" / file).read_bytes()
        names = ["best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256"]
        assert sorted(path.name for path in run.checkpoints.iterdir()) == names
        assert sha256_line(run.last) == run.last.with_suffix(".ckpt.sha256").read_text()
        checkpoint = torch.load(run.last, weights_only=True)
        assert (checkpoint["stage"], checkpoint["global_step"]) == (stage, 6)
        assert checkpoint["tokenizer_sha256"] == index["tokenizer"]["sha256"]
    assert first.lineage()["config"]["tags"] == ["one", "two"]
    assert first.lineage()["parent"] is None
    parent = second.lineage()["parent"]
    assert parent["run"] == str(first.path)
    assert parent["checkpoint"] == str(first.best)
    assert len(parent["sha256"]) == 64
    assert second.lineage()["curriculum"] == "a"  # of the run it started from

    replies = [json.loads(line) for line in (second.path / "replies.jsonl").read_text().splitlines()]
    assert [reply["step"] for reply in replies] == [3, 3, 6, 6]
    for reply in replies:
        assert reply["context"]
        assert reply["reference"]
        assert [set(c) for c in reply["candidates"]] == [{"text", "latent", "log_prob", "coherence"}] * 3


def sha256_line(path: Path) -> str:
    """What `sha256sum` prints."""
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def test_metrics_are_tidy_rows(train_here: Train) -> None:
    train_here(*FINE)
    text = (RUN / "metrics.csv").read_text()
    assert text.startswith("step,metric,value\n")
    rows = read_metrics(RUN / "metrics.csv")
    assert len({(step, name) for step, name, _ in rows}) == len(rows)
    steps = {name: [step for step, other, _ in rows if other == name] for _, name, _ in rows}
    for name in ("loss", "nll", "bow", "z_entropy", "grad_norm", "lr"):
        assert steps[f"train/{name}"] == [1, 2, 3, 4, 5, 6]
    z = ("z_effective", "z_in_use", "z_mutual_information", "z_usage_04")
    for name in ("loss", "nll", "bow", "ppl", "nll_uniform", "ppl_uniform", *z):
        assert steps[f"val/{name}"] == [3, 6]
    assert "train/nll_uniform" not in steps
    assert {"perf/tokens_per_s", "perf/mfu", "perf/step_s"} <= set(steps)
    assert not {"epoch", "step"} & set(steps)
    values = last_metrics(RUN / "metrics.csv")
    assert values["val/loss"] == pytest.approx(values["val/nll"] + values["val/bow"])
    assert sum(values[f"val/z_usage_{z:02d}"] for z in range(5)) == pytest.approx(1.0)
    assert 1.0 <= values["val/z_effective"] <= 5.0
    assert values["val/ppl_uniform"] == pytest.approx(math.exp(values["val/nll_uniform"]))
    assert 0.0 <= values["val/z_mutual_information"] <= math.log(5)


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    for step in (1, 2, 3, 4):
        logger.log_metrics({"train/loss": step / 3, "epoch": 0}, step)
    path = tmp_path / "metrics.csv"
    before = read_metrics(path)
    with path.open("a") as file:
        file.write("5,train/lo")  # killed while it wrote
    resumed = MetricsCsv(tmp_path, resumed_step=2)
    assert path.read_text().endswith("5,train/lo")  # nothing is touched before something is logged
    resumed.log_metrics({"train/loss": 9.0}, 3)
    assert read_metrics(path) == [*before[:2], (3, "train/loss", 9.0)]
    MetricsCsv(tmp_path).log_metrics({"train/loss": 1.0}, 1)  # a new run starts a new file
    assert read_metrics(path) == [(1, "train/loss", 1.0)]


def test_floats_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-30, "c": float("inf"), "d": 12345678.9}
    MetricsCsv(tmp_path).log_metrics(values, 1)
    assert last_metrics(tmp_path / "metrics.csv") == values
    assert last_metrics(tmp_path / "nothing.csv") == {}


def test_no_logger_leaves_no_metrics(train_here: Train) -> None:
    train_here("logger=none", "run_id=r", "trainer.max_steps=2")
    assert not Path("outputs/tiny-1_coarse/r/metrics.csv").exists()
    assert RunFolder(Path("outputs/tiny-1_coarse/r")).finished


def test_tensorboard_has_numbers_replies_and_latents(train_here: Train) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here("logger=tensorboard", *FINE)
    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "val/ppl"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    written = yaml.safe_load((RUN / "tensorboard" / "hparams.yaml").read_text())
    assert (written["optim"]["lr"], written["stage"]["tau"]) == (5e-4, 0.67)
    assert "hp_metric" not in tags["scalars"]
    logged = {(step, name): value for step, name, value in read_metrics(RUN / "metrics.csv")}
    for event in events.Scalars("val/nll"):
        assert event.value == pytest.approx(logged[event.step, "val/nll"])
    assert [event.step for event in events.Histograms("latent_usage")] == [3, 6]
    assert events.Histograms("latent_usage")[-1].histogram_value.num == pytest.approx(1000, abs=3)
    (text,) = [event for event in events.Tensors("replies/text_summary") if event.step == 6]
    last = json.loads((RUN / "replies.jsonl").read_text().splitlines()[-1])
    assert last["reference"] in text.tensor_proto.string_val[0].decode()

    # the dashboard's panels, as `custom scalars`: each of this stage's has something to show
    from tensorboard.plugins.custom_scalar import layout_pb2

    (laid_out,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(laid_out.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert [part.title for part in layout.category] == [name for name in PANELS if name != "replies"]
    shown = {
        title for title, tags in charts.items() if any(fits(tag, tags) for tag in events.Tags()["scalars"])
    }
    of_stage_22 = {"coherence: accuracy", "coherence: first of ten"}
    assert charts.keys() - shown == of_stage_22 | {"steps passed over (callbacks=spike_guard)"}
    assert "2_gen: loss" in charts
    assert "1_coarse: loss" not in charts


def fits(tag: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, tag) for pattern in patterns)


def test_tensorboard_that_is_not_installed(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RequirementCache("a-package-that-is-not-there")
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", missing)
    done = train_here("logger=tensorboard", "run_id=r", expect=2)
    assert_one_line(done.stderr, "logger=tensorboard needs tensorboard: pip install '.[tensorboard]'")
    assert not Path("outputs/tiny-1_coarse/r").exists()


def test_tensorboard_forgets_what_a_killed_run_logged_after_its_checkpoint(
    train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_step = Stage.training_step

    def dies_at_step_6(stage: Stage, *given: Any) -> None:
        if stage.global_step == 5:
            raise KeyError("as if killed")
        train_step(stage, *given)

    given = ["logger=tensorboard", "run_id=r", "trainer.val_check_interval=3", "checkpoint_steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", dies_at_step_6)
        with pytest.raises(KeyError):
            train_here(*given)
    assert "from step 3" in train_here(*given).stderr
    events = EventAccumulator("outputs/tiny-1_coarse/r/tensorboard").Reload()
    for tag, steps in (("train/loss", [1, 2, 3, 4, 5, 6]), ("val/loss", [3, 6])):
        assert [event.step for event in events.Scalars(tag)] == steps


# ----------------------------------------------------------------------------------------------- W&B


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """What is in the record of an offline run."""
    (file,) = folder.glob("*.wandb")
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(reader, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines()]


def wandb_run(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The record of an offline run, and the history of each key."""
    records = wandb_records(folder)
    history: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record.get("history", {}).get("item", {}).items():
            history.setdefault(key, []).append(value)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    return run, history


def test_wandb_offline(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
    train_here("logger=wandb", *FINE, "trainer.max_steps=3", "tags=[mine]")
    (folder,) = (RUN / "wandb").glob("offline-run-*")
    run, history = wandb_run(folder)
    assert (run["run_group"], run["job_type"], run["project"]) == ("r", "2_gen", "plato2")
    named = (run["run_id"], run["display_name"], run["tags"])
    assert named == ("tiny-2_gen-r", "tiny-2_gen/r seed 11", ["mine"])
    assert run["config"]["update"]["optim"]["lr"] == 5e-4
    about = {"curriculum": "r", "stage": "2_gen", "size": "tiny", "seed": 11, "parent": None}
    assert run["config"]["update"]["run"] == about
    logged = {(step, name): value for step, name, value in read_metrics(RUN / "metrics.csv")}
    assert history["train/loss"] == [logged[step, "train/loss"] for step in (1, 2, 3)]
    assert history["trainer/global_step"][-1] == 3
    assert history["latent_usage._type"] == ["histogram"]
    assert history["latent_usage.values"][0] == pytest.approx(
        [logged[3, f"val/z_usage_{z:02d}"] for z in range(5)]
    )
    assert history["replies._type"] == ["table-file"]
    rows = json.loads((folder / "files" / history["replies.path"][0]).read_text())
    assert rows["columns"] == ["context", "human", "candidate"]
    assert len(rows["data"]) == 2 * 3

    # the same run goes on: a new offline fragment with the same id, group, job type and tags
    train_here("logger=wandb", *FINE, "tags=[mine]")
    fragments = sorted((RUN / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(fragments) == 2
    again, history = wandb_run(next(path for path in fragments if path != folder))
    for name in ("run_id", "run_group", "job_type", "display_name", "project", "tags"):
        assert again[name] == run[name]
    assert history["trainer/global_step"][-1] == 6
    assert len(history["train/loss"]) == 3


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("logger.wandb.project=a/b", "Invalid project name 'a/b'"),
        (f"tags=[{'x' * 70}]", "Tags must be between 1 and 64 characters"),
    ],
)
def test_what_wandb_refuses_is_one_line(train_here: Train, override: str, told: str) -> None:
    done = train_here("logger=wandb", override, "trainer.max_steps=1", expect=2)
    assert_one_line(done.stderr, "logger=wandb", told, "logger.wandb.project")


@pytest.mark.slow
def test_wandb_without_a_key_and_a_terminal_is_one_line(run_train: Run, tmp_path: Path) -> None:
    nobody = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}
    done = run_train("logger=wandb", "trainer.max_steps=1", expect=2, WANDB_MODE="online", **nobody)
    assert_one_line(done.stderr, "logger=wandb: No API key configured", "logger.wandb.offline=true")


def test_any_name_of_a_run_gives_an_id_that_wandb_takes(train_here: Train) -> None:
    train_here("logger=wandb", "run_id='a:b'", "trainer.max_steps=1")
    (folder,) = Path("outputs/tiny-1_coarse/a:b/wandb").glob("offline-run-*")
    assert folder.name.endswith("-tiny-1_coarse-a_b")


@pytest.mark.slow
def test_a_curriculum_is_one_wandb_group(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    curriculum = ["-m", "stage=1_coarse,2_gen,2_eval", "init_from=auto", "trainer.max_steps=2"]
    train_here(*curriculum, "logger=wandb", "run_id=family")
    found = {}
    for folder in Path("outputs").glob("*/*/wandb/offline-run-*"):
        run, history = wandb_run(folder)
        found[run["job_type"]] = (run["run_group"], run["run_id"], len(history["train/loss"]))
    assert found == {
        stage: ("family", f"tiny-{stage}-family-{number}", 2)
        for number, stage in enumerate(("1_coarse", "2_gen", "2_eval"))
    }


def test_long_names_fit_wandb_and_stay_different() -> None:
    assert shortened("tiny-1_coarse-r") == "tiny-1_coarse-r"
    long = [shortened("x" * 140 + end) for end in "ab"]
    assert max(map(len, long)) == 100
    assert long[0] != long[1]


DIES = """
import os, runpy, signal, sys, time
from plato2.runs.checkpoint import Checkpoints
from plato2.stages import Stage
step, in_save = int(sys.argv.pop(1)), sys.argv.pop(1) == "save"
trained, saved = Stage.training_step, Checkpoints._put_in_place
def training_step(stage, *given):
    if stage.global_step == step and not in_save:
        time.sleep(5)  # W&B sends what it has now and then
        os.kill(os.getpid(), signal.SIGKILL)
    trained(stage, *given)
def put_in_place(checkpoints, *given):
    if in_save:
        os.kill(os.getpid(), signal.SIGKILL)
    saved(checkpoints, *given)
Stage.training_step, Checkpoints._put_in_place = training_step, put_in_place
del sys.argv[0]  # -c
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""train.py, killed when a step begins, or when a checkpoint is written but not yet in its place."""
KILLED = ["logger=wandb", "run_id=r", "trainer.max_steps=9", "trainer.val_check_interval=4"]
KILLED += ["checkpoint_steps=100"]


def killed(corpus: Path, folder: Path, step: int, where: str, **variables: str) -> None:
    """A run of KILLED that ends by SIGKILL."""
    python, *given = command(corpus, folder / "outputs", *KILLED)
    died = subprocess.run(
        [python, "-c", DIES, str(step), where, *given],
        env=environment(PYTHONPATH=str(ROOT), **variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr


@pytest.mark.slow
def test_wandb_has_each_step_once_after_kills_offline(
    train_here: Train, corpus: Path, tmp_path: Path
) -> None:
    killed(corpus, tmp_path, 7, "step")  # W&B has 6 steps, the checkpoint is that of 4
    killed(corpus, tmp_path, 0, "save")  # goes on from 4; W&B has 8 when the checkpoint of 8 is lost
    done = train_here(*KILLED)
    assert "from step 4" in done.stderr
    folder = tmp_path / "outputs" / "tiny-1_coarse" / "r"
    fragments = list((folder / "wandb").glob("offline-run-*"))
    assert len(fragments) == 3
    rows = [one["history"]["item"] for part in fragments for one in wandb_records(part) if "history" in one]
    assert all(row["_step"] == row["trainer/global_step"] for row in rows)
    logged = read_metrics(folder / "metrics.csv")
    for name in ("train/loss", "val/loss", "perf/tokens_per_s"):
        found = sorted((row["_step"], row[name]) for row in rows if name in row)
        steps = [step for step, _ in found]
        assert steps == [step for step, other, _ in logged if other == name]
        if name != "perf/tokens_per_s":  # the speed of a repeated step is another
            assert found == [(step, value) for step, other, value in logged if other == name]


@pytest.mark.slow
def test_wandb_online_from_names_to_lineage(run_train: Run, corpus: Path, tmp_path: Path) -> None:
    with WandbServer() as server:
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server.address}
        online |= {"WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path)}
        killed(corpus, tmp_path, 7, "step", **online)
        sent = server.steps("tiny-1_coarse-r", "train/loss")  # step 7 was not over
        assert sent == [1, 2, 3, 4, 5, 6][: len(sent)]
        assert "from step 4" in run_train(*KILLED, **online).stderr
        assert server.steps("tiny-1_coarse-r", "train/loss") == list(range(1, 10))
        assert server.steps("tiny-1_coarse-r", "val/loss") == [4, 8, 9]
        logged = read_metrics(tmp_path / "outputs/tiny-1_coarse/r/metrics.csv")
        history = server.runs["tiny-1_coarse-r"].history.values()
        losses = [row["train/loss"] for row in history if "train/loss" in row]
        assert losses == [value for _, name, value in logged if name == "train/loss"]

        short = ["logger=wandb", "trainer.max_steps=2", "run_id=s"]
        done = run_train("stage=2_eval", "init_from=outputs/tiny-1_coarse/r", *short, **online)
        assert "warning: W&B" not in done.stderr
        first, second = server.runs["tiny-1_coarse-r"], server.runs["tiny-2_eval-s"]
        assert (second.first["groupName"], second.first["jobType"]) == ("r", "2_eval")
        assert second.first["displayName"] == "tiny-2_eval/s seed 11 from tiny-1_coarse/r"
        assert second.config["run"]["value"]["parent"] == "tiny-1_coarse/r"
        assert (
            first.config["run"]["value"] | {"curriculum": "r", "parent": None} == first.config["run"]["value"]
        )
        made = {key: one["artifactCollectionName"] for key, one in server.artifacts.items()}
        assert [*made.values()] == ["tiny-1_coarse-r", "tiny-2_eval-s"]
        assert second.used == [next(iter(made))]
        assert not any("best.ckpt" in path for path in server.uploaded)  # named, not sent

        # a folder is moved away: another run of the same name must not be mixed with the first
        (tmp_path / "outputs/tiny-2_eval/s").rename(tmp_path / "away")
        again = ["stage=2_eval", "init_from=scratch", *short]
        assert_one_line(run_train(*again, expect=2, **online).stderr, "logger=wandb", "choose another run_id")


@pytest.mark.slow
def test_wandb_without_a_network_is_one_line(run_train: Run, tmp_path: Path) -> None:
    nowhere = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    nowhere |= {"WANDB_INIT_TIMEOUT": "2"}
    done = run_train("logger=wandb", "trainer.max_steps=1", expect=2, **nowhere)
    assert_one_line(done.stderr, "logger=wandb", "127.0.0.1:9", "logger.wandb.offline=true")
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.slow
def test_wandb_may_be_sent_the_best_checkpoint(train_here: Train) -> None:
    wandb = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.log_model=true"]
    train_here(*wandb, f"run_id={'r' * 140}", "trainer.max_steps=1", "trainer.val_check_interval=1")
    (folder,) = Path("outputs").glob("*/*/wandb/offline-run-*")
    (artifact,) = [one["artifact"] for one in wandb_records(folder) if one["type"] == "artifact"]
    names = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert names == {"best.ckpt", "config.yaml", "lineage.json"}
