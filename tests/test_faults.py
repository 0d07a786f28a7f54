"""What can go wrong is one clear line that names the file or key, and nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from knover import apart
from pytorch_lightning import Trainer
from small import (
    ROOT,
    Train,
    assert_one_line,
    command,
    environment,
    stopped_at,
    train_in_process,
    write_dialogues,
)

from plato2.config import UserError
from plato2.data.tokenizer import train_tokenizer
from plato2.files import write_sha256
from plato2.runs.checkpoint import Checkpoints
from plato2.runs.folder import RunFolder, held
from plato2.runs.saved import checkpoint_step, read_checkpoint, read_metrics
from plato2.weights.folder import load_generation, read_saved

STAGE_2 = ["stage=2_gen", "trainer.max_steps=2", "trainer.val_check_interval=2"]


@pytest.fixture(scope="module")
def coarse(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage-1 run; to be copied before it is changed."""
    output_dir = tmp_path_factory.mktemp("runs")
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    arguments = command(corpus, output_dir, *steps, "run_id=c")[2:]
    assert train_in_process(arguments, output_dir, ROOT / "train.py").returncode == 0
    return output_dir / "tiny-1_coarse" / "c"


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(corpus, tmp_path / "shards"))


def copy_run(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def edit_checkpoint(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes the newest checkpoint of a run, which becomes its best, too."""
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    write_sha256(path)
    (run / "checkpoints" / "best.ckpt").unlink()
    return run


# --------------------------------------------------------------------------------------------------- the data


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize(
    ("kind", "says"), [("missing", "missing"), ("truncated", "truncated"), ("flipped", "damaged")]
)
def test_a_damaged_shard(train_here: Train, shards: Path, kind: str, says: str) -> None:
    shard = shards / "train-00002.parquet"
    damage(shard, kind)
    done = train_here(f"data.path={shards}", expect=2)
    assert_one_line(done.stderr, str(shard), says, "prepare the corpus again")


def test_a_damaged_shard_in_a_worker_process(train_here: Train, shards: Path) -> None:
    damage(shards / "train-00002.parquet", "flipped")
    windows = ["data.window_samples=128", "trainer.max_steps=20"]  # the first window is read before
    done = train_here(f"data.path={shards}", "data.n_workers=1", *windows, expect=2)
    assert "epochs of " in done.stderr
    assert_one_line(done.stderr, "train-00002.parquet", "damaged")


def test_a_damaged_validation_shard(train_here: Train, shards: Path) -> None:
    damage(shards / "valid-00000.parquet", "truncated")
    assert_one_line(train_here(f"data.path={shards}", expect=2).stderr, "valid-00000.parquet", "truncated")


def test_no_corpus_and_a_damaged_index(train_here: Train, shards: Path, tmp_path: Path) -> None:
    done = train_here(f"data.path={tmp_path}/nothing", expect=2)
    assert_one_line(done.stderr, f"{tmp_path}/nothing", "plato2 prepare")
    (shards / "index.json").write_text('{"format": "plato2-sha')
    assert_one_line(train_here(f"data.path={shards}", expect=2).stderr, "index.json", "not valid JSON")


def prepared_while_training(files: list[Path], **options: Any) -> str:
    """The `data.prepare` node of a corpus of files."""
    node = {"corpus": "jsonl", "files": [str(file) for file in files], "vocab_pieces": 300}
    node |= {"max_context": 32, "max_response": 32, **options}
    return f"+data.prepare={json.dumps(node)}".replace('"', "")


def test_an_empty_corpus_leaves_nothing_behind(train_here: Train, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    done = train_here(prepared_while_training([empty]), f"data.path={tmp_path}/made", expect=2)
    assert_one_line(done.stderr, "jsonl is empty", str(empty))
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "outputs").exists()


def test_broken_corpus_lines_are_counted_and_strict_stops_at_the_first(
    train_here: Train, tmp_path: Path
) -> None:
    file = write_dialogues(tmp_path / "dialogues.jsonl", n_dialogues=150)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3], lines[6] = b'{"turns": ["half a\n', b'{"turns": ["\xff\xfe", "b"]}\n'
    file.write_bytes(b"".join(lines))
    made = f"data.path={tmp_path}/made"

    done = train_here(prepared_while_training([file], strict="true"), made, expect=2)
    assert_one_line(done.stderr, f"{file}:4: ", "strict")
    train_here(prepared_while_training([file]), made, "trainer.max_steps=1")
    facts = json.loads((tmp_path / "made" / "index.json").read_text())["facts"]
    assert facts["counts"]["broken"] == 2
    assert [example.split(": ")[0] for example in facts["broken_examples"]] == [f"{file}:4", f"{file}:7"]
    again = train_here(
        prepared_while_training([file]), made, "trainer.max_steps=1", "resume=never", "seed=12"
    )
    assert "reusing" in again.stdout


def test_limits_of_model_and_data_must_fit(train_here: Train) -> None:
    for override, says in {
        "model.vocab_size=8001": "use model.vocab_size=301",
        "model.max_position=63": "use model.max_position=64",
        "data.row_length=32": "use data.row_length=",
        "optim.batch_tokens=1000": "use optim.batch_tokens=512 or 1024",
        "data.unit_tokens=500": "use data.unit_tokens=384 or 512",
    }.items():
        overrides = [override, "data.unit_tokens=512"] if override.startswith("data.row") else [override]
        assert_one_line(train_here(*overrides, expect=2).stderr, override, says)


def test_more_ranks_than_units(train_here: Train) -> None:
    done = train_here("strategy=ddp_64", "plan=true", expect=2)
    assert_one_line(done.stderr, "optim.batch_tokens=1024", "64 ranks", "use optim.batch_tokens=32768")
    nothing = "data.path=nowhere"  # it is said before data are looked for, or other ranks started
    several = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=3", nothing]
    done = train_here(*several, expect=2)
    assert_one_line(done.stderr, "strategy.devices=3: 3 ranks cannot", "use optim.batch_tokens=1536")
    done = train_here(*several, "strategy.devices='0,1,2'", expect=2)
    assert_one_line(done.stderr, "strategy.devices=0,1,2: 3 ranks cannot")
    done = train_here(*several, "strategy.devices=8", expect=2)
    told = "use data.unit_tokens=128, or optim.batch_tokens=4096"
    assert_one_line(done.stderr, "strategy.devices=8: 8 ranks cannot", told)
    done = train_here(*several, "strategy.devices=8", "data.unit_tokens=128", expect=2)
    assert_one_line(done.stderr, "nowhere")


# -------------------------------------------------------------------------------------------------- init_from


def test_stage_2_without_a_start(train_here: Train) -> None:
    for stage in ("2_gen", "2_eval", "backward"):
        done = train_here(f"stage={stage}", expect=2)
        told = ["init_from=auto", "no finished 1_coarse run", "stage=1_coarse", "init_from=scratch"]
        assert_one_line(done.stderr, *told)
    assert train_here(f"stage={stage}", "init_from=auto", expect=2).stderr == done.stderr  # the default


def test_starts_that_are_none(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint")
    half = tmp_path / "half.ckpt"
    half.write_bytes((coarse / "checkpoints" / "last.ckpt").read_bytes()[:3000])
    tensors = tmp_path / "tensors.pt"
    torch.save({"a": torch.zeros(2)}, tensors)
    nothing = "neither a run folder (no lineage.json), a model folder (no config.json) nor a checkpoint"
    for path, says in {
        tmp_path / "nowhere": "no such run folder, checkpoint or model folder",
        tmp_path: nothing,
        coarse / "checkpoints": nothing,
        text: "not a readable checkpoint",
        half: "not a readable checkpoint",
        tensors: "not a plato2 checkpoint (no state_dict, stage, use, hyper_parameters)",
    }.items():
        assert_one_line(train_here(*STAGE_2, f"init_from={path}", expect=2).stderr, str(path), says)


def test_a_checkpoint_that_would_run_code_is_refused_unread(train_here: Train, tmp_path: Path) -> None:
    proof = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {proof}",))

    plain, zipped = tmp_path / "plain.ckpt", tmp_path / "zipped.ckpt"
    plain.write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {}, "stage": Evil(), "hyper_parameters": {}}, zipped)
    for path in (plain, zipped):
        done = train_here(*STAGE_2, f"init_from={path}", expect=2)
        assert_one_line(done.stderr, str(path), "not a readable checkpoint")
    assert not proof.exists()
    torch.load(zipped, weights_only=False)  # the trap works
    assert proof.exists()


def test_unfinished_and_wrong_runs_as_a_start(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    unfinished = copy_run(coarse, tmp_path / "unfinished")
    RunFolder(unfinished).write_lineage(status="running")
    done = train_here(*STAGE_2, f"init_from={unfinished}", expect=2)
    last = unfinished / "checkpoints" / "last.ckpt"
    assert_one_line(done.stderr, str(unfinished), "not finished", f"init_from={last}")
    train_here(*STAGE_2, f"init_from={last}")  # the cure works

    judge = copy_run(coarse, tmp_path / "judge")
    RunFolder(judge).write_lineage(stage="2_eval")
    done = train_here(*STAGE_2, f"init_from={judge}", expect=2)
    assert_one_line(done.stderr, str(judge), "a 2_eval run", "stage 2_gen starts from 1_coarse or 2_gen")
    edit_checkpoint(judge, lambda checkpoint: checkpoint.update(stage="2_eval"))
    done = train_here(*STAGE_2, f"init_from={judge}/checkpoints/last.ckpt", expect=2)
    assert_one_line(done.stderr, "this is a 2_eval run", "give a run of 1_coarse or 2_gen")


def test_a_start_of_another_size(train_here: Train, coarse: Path) -> None:
    for override, says in {
        "model.hidden_size=64": "is (32,) there and (64,) here",
        "model.n_layer=3": "lacks backbone.blocks.2.",
        "model.n_layer=1": "has backbone.blocks.1.",
        "model.max_position=65": "backbone.position.weight is (64, 32) there and (65, 32) here",
    }.items():
        done = train_here(*STAGE_2, f"init_from={coarse}", override, expect=2)
        assert_one_line(done.stderr, f"init_from={coarse}/checkpoints/best.ckpt", says)


def test_a_start_with_another_tokenizer(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    other = edit_checkpoint(
        copy_run(coarse, tmp_path / "other"), lambda checkpoint: checkpoint.update(tokenizer_sha256="ab" * 32)
    )
    done = train_here(*STAGE_2, f"init_from={other}", expect=2)
    assert_one_line(done.stderr, "trained with tokenizer abababababab", "--tokenizer RUN/tokenizer")
    RunFolder(other).write_lineage(tokenizer_sha256="ab" * 32)
    shutil.copytree(other, tmp_path / "outputs" / "tiny-1_coarse" / "other")
    done = train_here(*STAGE_2, "init_from=auto", expect=2)
    assert_one_line(done.stderr, "no finished 1_coarse run", "with the tokenizer of this data")


# ----------------------------------------------------------------------------------------------------- resume


def test_going_on_with_a_run(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    done = train_here(*steps, "run_id=c", expect=2)
    assert_one_line(
        done.stderr, "trainer.max_steps=2", str(run.name), "already trained 2 steps", "raise trainer"
    )
    more = ["trainer.max_steps=4", "trainer.val_check_interval=2", "run_id=c"]
    for key, before in {"optim.lr": 0.0015, "seed": 11, "model.dropout": 0.1, "data.row_length": 128}.items():
        value = {"data.row_length": 64}.get(key, 0.5 if key != "seed" else 12)
        done = train_here(*more, f"{key}={value}", expect=2)
        assert_one_line(done.stderr, f"{key}={value}", f"started with {key}={before}", "another run_id")
    assert_one_line(train_here(*more, "resume=never", expect=2).stderr, "run_id=c", "exists")

    done = train_here(*more, "data.n_workers=1")  # what changes no number may change
    assert "resuming" in done.stderr
    lineage = RunFolder(run).lineage()
    assert (lineage["status"], lineage["step"], lineage["resumed"][0]["step"]) == ("finished", 4, 2)
    done = train_here(*[*more[1:], "trainer.max_steps=5", "run_id=x", f"resume={run}"])
    assert "resuming" in done.stderr


def test_a_run_killed_between_its_last_checkpoint_and_its_record_is_finished(
    train_here: Train, coarse: Path, tmp_path: Path
) -> None:
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    RunFolder(run).write_lineage(status="running")
    done = train_here("trainer.max_steps=2", "trainer.val_check_interval=2", "run_id=c")
    assert "finished" in done.stderr
    assert RunFolder(run).finished
    train_here(*STAGE_2, "init_from=auto")


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_of_its_own(train_here: Train, coarse: Path, tmp_path: Path, kind: str) -> None:
    """The best one takes its place; where that is lost, too, nothing is started over."""
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    last, best = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt"
    damage(last, kind)
    done = train_here("run_id=c")
    says = "missing" if kind == "missing" else "damaged"
    assert f"warning: {last}: " in done.stderr or f"warning: {last} is missing" in done.stderr
    assert says in done.stderr
    assert f"resuming from step 2 with best.ckpt\nresuming {run} from step 2\n" in done.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 6

    damage(last, "flipped")
    damage(best, "truncated")
    before = files(run)
    done = train_here("run_id=c", "trainer.max_steps=8", expect=2)
    assert_one_line(done.stderr, str(best), "damaged", "no checkpoint in", "run_id=NAME")
    assert files(run) == before


ODD_STATES: list[dict[str, Any]] = [
    {"optimizer_states": 5},
    {"optimizer_states": [{}]},
    {"optimizer_states": [{"state": {}, "param_groups": []}]},
    {"optimizer_states": [{"state": {0: {"exp_avg": 5}}, "param_groups": None}]},
    {"lr_schedulers": [5]},
    {"loops": [1]},
    {"DialogueDataModule": {"step": "two"}},
    {"DialogueDataModule": 5},
]


@pytest.mark.parametrize("odd", ODD_STATES, ids=str)
def test_a_checkpoint_with_odd_states(
    train_here: Train, coarse: Path, tmp_path: Path, odd: dict[str, Any]
) -> None:
    """Whatever cannot be restored is one line, and the run stays as it was."""
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    edit_checkpoint(run, lambda checkpoint: checkpoint.update(odd))
    before = files(run / "checkpoints")
    done = train_here("run_id=c", "trainer.max_steps=4", expect=2)
    assert_one_line(done.stderr, "last.ckpt", "run_id=NAME")
    assert files(run / "checkpoints") == before


def test_a_checkpoint_from_before_qkv_was_one_parameter(
    train_here: Train, coarse: Path, tmp_path: Path
) -> None:
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    edit_checkpoint(run, lambda checkpoint: checkpoint.update(state_dict=apart(checkpoint["state_dict"])))
    for given in (
        ["run_id=c", "trainer.max_steps=4"],
        ["run_id=d", f"init_from={run / 'checkpoints/last.ckpt'}"],
    ):
        done = train_here(*given, expect=2)
        assert_one_line(done.stderr, "last.ckpt", "three parameters", "plato2 export knover")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_without_checkpoints_is_not_started_over(
    train_here: Train, coarse: Path, tmp_path: Path
) -> None:
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    for path in run.glob("checkpoints/*.ckpt"):
        path.unlink()
    before = files(run)
    done = train_here("run_id=c", "trainer.max_steps=4", expect=2)
    assert_one_line(done.stderr, "its checkpoints are gone", "run_id=NAME")
    assert files(run) == before


def test_a_tokenizer_that_is_gone_comes_back(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    shutil.rmtree(run / "tokenizer")
    train_here("run_id=c", "trainer.max_steps=4", "trainer.val_check_interval=2")
    assert sorted(files(run / "tokenizer").values()) == sorted(files(coarse / "tokenizer").values())
    load_generation(run / "checkpoints")  # the folder itself will do


@pytest.mark.parametrize(
    ("old", "new"), [("{", "["), ("plato2-run/1", "plato2-rum/1"), ('"config"', '"conf1g"')]
)
def test_a_damaged_record(train_here: Train, coarse: Path, tmp_path: Path, old: str, new: str) -> None:
    """One changed character: the run is never started over its checkpoints."""
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")
    record = run / "lineage.json"
    record.write_text(record.read_text().replace(old, new, 1))
    before = files(run)
    done = train_here("run_id=c", expect=2)
    assert_one_line(
        done.stderr, "tiny-1_coarse/c", "run_id" if new != "[" else "lineage.json: cannot be read"
    )
    assert files(run) == before
    record.unlink()
    assert_one_line(train_here("run_id=c", expect=2).stderr, "lineage.json: missing", "run_id=NAME")


def test_flipped_bits_are_never_loaded(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    """Any bit of a checkpoint that something starts from; skipped on request."""
    run = copy_run(coarse, tmp_path / "flipped")
    best = run / "checkpoints" / "best.ckpt"
    whole, random = best.read_bytes(), Random(3)
    for place in random.sample(range(len(whole)), 12):
        flipped = whole[:place] + bytes([whole[place] ^ 1 << random.randrange(8)]) + whole[place + 1 :]
        best.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{best}: damaged: its bytes are not those that were saved"):
            read_saved(best)
        with pytest.raises(UserError, match=f"{best}: damaged"):
            load_generation(run)
    done = train_here(*STAGE_2, f"init_from={run}", expect=2)
    assert_one_line(done.stderr, str(best), "damaged", "choose another one")
    best.write_bytes(whole.replace(b"1_coarse", b"1_coarsf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLATO2_CHECK_HASHES", "0")
        assert read_checkpoint(best)["stage"] == "1_coarsf"


def test_an_early_stop_is_not_a_finished_run(train_here: Train, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "t")
    whole = ["run_id=t", "trainer.max_steps=6", "trainer.val_check_interval=6", "checkpoint_steps=6"]
    with stopped_at(3):
        done = train_here(*whole)
    assert "stopped at step 3 of 6; the same command resumes it: " in done.stderr
    assert not run.finished
    assert torch.load(run.last, weights_only=True)["global_step"] == 3
    assert "resuming" in train_here(*whole).stderr
    assert run.finished
    assert [row[0] for row in read_metrics(run.path / "metrics.csv") if row[1] == "train/loss"] == [
        *range(1, 7)
    ]


def test_what_goes_on_with_a_run_that_was_started_anew(train_here: Train) -> None:
    given = ["trainer.max_steps=100000", "+trainer.max_time=00:00:00:01", "sample_replies=0"]
    done = train_here(*given, "resume=never")
    told = re.search(
        "stopped at step .*; the same command with (resume=auto run_id=.*) resumes it: (.*)", done.stderr
    )
    assert told
    assert f"resuming {told[2]} from step" in train_here(*given, *told[1].split()).stderr


# -------------------------------------------------------------------------------------------- while it trains


def test_a_nan_stops_with_step_samples_and_the_last_good_checkpoint(
    train_here: Train, coarse: Path, tmp_path: Path
) -> None:
    def poison(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["backbone.word.weight"][7] = float("nan")

    poisoned = edit_checkpoint(copy_run(coarse, tmp_path / "poisoned"), poison)
    done = train_here(*STAGE_2, f"init_from={poisoned}", expect=2)
    assert_one_line(done.stderr, "step 1: loss nan on samples ", "there is no checkpoint yet", "optim.lr")

    steps = [
        "trainer.max_steps=12",
        "trainer.val_check_interval=12",
        "optim.warmup_steps=0",
        "checkpoint_steps=1",
    ]
    done = train_here(*steps, "optim.lr=1e18", "run_id=n", "model.dropout=0", expect=2)
    last = Path("outputs/tiny-1_coarse/n/checkpoints/last.ckpt")
    assert_one_line(done.stderr, "on samples ", "last good checkpoint: ", str(last))
    step = int(done.stderr.rsplit("step ", 1)[1].split(":")[0])
    checkpoint = torch.load(tmp_path / last, weights_only=True)
    assert checkpoint["global_step"] == step - 1
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())
    rows = read_metrics(tmp_path / "outputs/tiny-1_coarse/n/metrics.csv")
    assert max(row[0] for row in rows) == step - 1
    run = RunFolder(tmp_path / "outputs/tiny-1_coarse/n")
    assert run.lineage()["status"] == "failed"
    done = train_here(*steps, "optim.lr=1e18", "run_id=n", "model.dropout=0", expect=2)
    assert f"from step {step - 1}" in done.stderr  # the same command goes on with it
    assert run.lineage()["status"] == "failed"


@contextlib.contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond the limit, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def save_on_a_full_disk(self: Checkpoints, trainer: Trainer, best: bool = False) -> None:
        with full_disk(100_000) if trainer.global_step >= 4 else contextlib.nullcontext():
            save(self, trainer, best)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        done = train_here("run_id=f", expect=2)
    assert_one_line(
        done.stderr, "last.ckpt", "step 4 could not be written", "step 3 is untouched", "Free some space"
    )
    folder = tmp_path / "outputs" / "tiny-1_coarse" / "f" / "checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    names = ["best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256"]
    assert sorted(path.name for path in folder.iterdir()) == names

    assert "resuming" in train_here("run_id=f").stderr
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_disk_too_full_for_metrics_is_one_line(train_here: Train) -> None:
    with full_disk(2):
        done = train_here(expect=2)
    assert_one_line(done.stderr, "File too large", "free some space")


def test_a_folder_that_cannot_be_written(train_here: Train) -> None:
    assert_one_line(
        train_here("output_dir=/proc/x", expect=2).stderr, "output_dir", "/proc/x", "cannot be made"
    )


def test_a_gpu_that_is_not_there(train_here: Train) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_one_line(train_here("strategy=gpu", expect=2).stderr, "strategy", "gpu")


def test_an_unknown_sweep_metric(train_here: Train) -> None:
    """It is refused at the first validation, not when the run has been trained; and nothing is lost."""
    given = ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    done = train_here("sweep_metric=val/pp", *given, expect=2)
    assert_one_line(done.stderr, "sweep_metric=val/pp: not logged; did you mean val/ppl?")
    (run,) = Path("outputs/tiny-1_coarse").iterdir()
    assert checkpoint_step(run / "checkpoints/last.ckpt") == 2
    done = train_here("sweep_metric=val/ppl", *given)
    assert f"{run} from step 2" in done.stderr, done.stderr


def test_the_real_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    """Of a mistake found before torch is imported; tests/test_paths.py has one that is found later."""
    started = [sys.executable, str(ROOT / "train.py"), "stag=2_gen"]
    done = subprocess.run(
        started, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "stag: no such key")


# ------------------------------------------------------------------------------------------ one process a run


def test_a_run_that_is_being_trained_is_refused(train_here: Train, coarse: Path, tmp_path: Path) -> None:
    run = RunFolder(copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c"))
    run.write_lineage(status="running")
    config = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    with held(run, False):
        for named in (["run_id=c"], ["resume=outputs/tiny-1_coarse/c"]):
            done = train_here(*config, *named, expect=2)
            told = [str(run.path.relative_to(tmp_path)), f"process {os.getpid()} on ", "run_id=NAME"]
            assert_one_line(done.stderr, "is being written by another process", *told)
        train_here(*config, "run_id=d")  # the cure
    train_here(*config, "run_id=c")
    assert not (run.path / "lock").exists()


def test_two_commands_at_once(train_here: Train, corpus: Path, tmp_path: Path) -> None:
    """The second is refused while the first one trains, and the first one's run is as if alone."""
    given = ["run_id=r", "checkpoint_steps=100000"]
    given += ["trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    run = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "r")
    arguments = command(corpus, tmp_path / "outputs", *given)[2:]

    def train() -> None:
        raise SystemExit(train_in_process(arguments, tmp_path, ROOT / "train.py").returncode)

    first = get_context("fork").Process(target=train)
    first.start()
    until = time.monotonic() + 100
    while not (run.path / "metrics.csv").exists():
        assert first.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    assert json.loads((run.path / "lock").read_text())["pid"] == first.pid
    done = train_here(*given, expect=2)
    assert_one_line(
        done.stderr, "tiny-1_coarse/r is being written by", f"(process {first.pid} on ", "run_id=NAME"
    )
    first.terminate()
    first.join()
    assert first.exitcode == 128 + signal.SIGTERM
    steps = [step for step, name, _ in read_metrics(run.path / "metrics.csv") if name == "train/loss"]
    assert steps == [*range(1, len(steps) + 1)]


def test_a_run_where_the_file_system_has_no_locks(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*given: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    train_here("run_id=r", "trainer.max_steps=2")
    run = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "r")
    monkeypatch.setattr("plato2.files.SEEN_DEAD_S", 0.1)
    with held(run, False):
        done = train_here("run_id=r", expect=2)
        assert_one_line(done.stderr, "is being written by another process", f"process {os.getpid()}")
    assert "resuming" in train_here("run_id=r", "trainer.max_steps=3").stderr
    assert not list(run.path.glob("lock*"))


@pytest.mark.parametrize("fails", ["the log", "the checkpoint"])
def test_a_run_folder_that_is_removed_while_it_trains(tmp_path: Path, fails: str) -> None:
    run = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "r")

    def work() -> None:
        with held(run, False):
            shutil.rmtree(run.path)
            if fails == "the log":
                (run.path / "metrics.csv").open("a")
            torch.save({}, run.path / "last.ckpt")

    with pytest.raises(UserError, match="tiny-1_coarse/r: the folder was removed"):
        work()


def test_an_unnamed_run_that_is_being_trained_is_not_started_twice(train_here: Train, tmp_path: Path) -> None:
    given = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    train_here(*given)
    (path,) = (tmp_path / "outputs" / "tiny-1_coarse").iterdir()
    RunFolder(path).write_lineage(status="running")
    shutil.rmtree(path / "checkpoints")  # as before its first checkpoint
    with held(RunFolder(path), False):
        assert_one_line(train_here(*given, expect=2).stderr, path.name, "another process")
        train_here(*given, "resume=never")
    assert len(list(path.parent.iterdir())) == 2


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "20261128-101500")
    with held(run, True) as first, held(run, True) as second, held(run, True) as third:
        assert [held_run.path.name for held_run in (first, second, third)] == [
            run.path.name,
            f"{run.path.name}-2",
            f"{run.path.name}-3",
        ]
        second.write_lineage(stage="1_coarse")
    assert list(run.path.parent.iterdir()) == [second.path]  # where nothing began nothing is left


def test_a_start_that_fails_leaves_no_folder(train_here: Train, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    train_here("strategy=gpu", "logger=tensorboard", expect=2)
    assert not (tmp_path / "outputs").exists()
    mine = tmp_path / "outputs" / "tiny-1_coarse" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep")
    train_here("strategy=gpu", "run_id=mine", expect=2)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_names_are_text(train_here: Train, tmp_path: Path) -> None:
    given = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    places = ["output_dir=2e3", "name=4e3", "logger=tensorboard", "logger.tensorboard.name=5e3"]
    train_here("run_id=12e4567", "tags=[1e3,true,x]", *places, *given)
    run = RunFolder(tmp_path / "2e3" / "4e3" / "12e4567")
    assert run.lineage()["config"]["tags"] == ["1e3", "true", "x"]
    assert (run.path / "5e3" / "tensorboard").is_dir()
    train_here("-m", "run_id=1e3", "hydra.sweep.dir=3e3", "seed=1,2", *given)
    assert (tmp_path / "outputs" / "tiny-1_coarse" / "1e3-1").is_dir()
    assert (tmp_path / "3e3" / "sweep.json").exists()
    for key in ("init_from", "resume", "data.path"):
        assert_one_line(train_here(f"{key}=6e3", "stage=2_gen", expect=2).stderr, f"{key}=6e3")


def test_paths_of_a_corpus_are_text(train_here: Train, tmp_path: Path) -> None:
    made = f"data.path={tmp_path}/made"
    for name in ("2024", "1e3"):
        write_dialogues(tmp_path / name, n_dialogues=150)
        done = train_here(f"+data.prepare={{corpus: jsonl, files: [{name}]}}", made, expect=2)
        assert_one_line(done.stderr, "data.prepare.files=", "in quotes")
    given = ["+data.prepare.corpus=jsonl", "+data.prepare.files=[2024,1e3]", made]
    done = train_here(*given, "+data.prepare.tokenizer=1e4", expect=2)
    assert_one_line(done.stderr, "no tokenizer at 1e4")
    small = [f"+data.prepare.{limit}" for limit in ("vocab_pieces=300", "max_context=32", "max_response=32")]
    train_here(*given, *small, "trainer.max_steps=1")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\udcff"])
def test_names_that_are_none(train_here: Train, tmp_path: Path, name: str) -> None:
    assert_one_line(train_here(f"run_id={name}", expect=2).stderr, "run_id=")
    assert_one_line(train_here(expect=2, RUN_ID=name).stderr, "run_id=")
    assert not (tmp_path / "outputs").exists()


def test_a_validation_shard_that_is_another_leaves_no_run(train_here: Train, shards: Path) -> None:
    (shards / "valid-00000.parquet").write_bytes((shards / "train-00000.parquet").read_bytes())
    assert_one_line(train_here(f"data.path={shards}", expect=2).stderr, "valid-00000.parquet")
    assert not Path("outputs").exists()


def test_pipes_in_a_run_folder_do_not_hang(train_here: Train, coarse: Path) -> None:
    run = copy_run(coarse, Path("outputs/tiny-1_coarse/c"))
    hashes, metrics = run / "checkpoints" / "last.ckpt.sha256", run / "metrics.csv"
    kept = metrics.read_bytes()
    for path in (hashes, metrics):
        path.unlink()
        os.mkfifo(path)
    more = ("run_id=c", "trainer.max_steps=4", "trainer.val_check_interval=2")
    assert_one_line(train_here(*more, expect=2).stderr, "metrics.csv: not a regular file")
    metrics.unlink()
    metrics.write_bytes(kept)
    assert "with best.ckpt" in train_here(*more).stderr


def test_commands_of_one_slurm_job(train_here: Train, tmp_path: Path) -> None:
    """Each configuration has its folder, and finds it again; what is finished is skipped."""
    given, job = ["trainer.max_steps=1", "trainer.val_check_interval=1"], {"SLURM_JOB_ID": "4711"}
    folder = tmp_path / "outputs" / "tiny-1_coarse"
    train_here(*given, **job)
    assert "new run" in train_here(*given, "optim.lr=0.5", **job).stderr
    assert "4711-2 is finished: skipped" in train_here(*given, "optim.lr=0.5", **job).stderr
    assert "4711 is finished: skipped" in train_here(*given, **job).stderr
    train_here(*given, "resume=never", **job)
    assert sorted(path.name for path in folder.iterdir()) == ["4711", "4711-2", "4711-3"]
    variables = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
    done = train_here("resume=never", expect=2, **job, **variables)
    assert_one_line(done.stderr, "2 processes need one name", "run_id=NAME")


def test_a_checkpoint_every_few_minutes(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Checkpoints.save

    def noted(self: Checkpoints, trainer: Trainer, best: bool = False) -> None:
        saved.append(trainer.global_step)
        save(self, trainer, best)

    monkeypatch.setattr(Checkpoints, "save", noted)
    given = ["trainer.max_steps=4", "trainer.val_check_interval=4", "checkpoint_steps=100"]
    train_here(*given, "run_id=slow")
    train_here(*given, "run_id=quick", "checkpoint_minutes=1e-9")
    assert saved == [4, 1, 2, 3, 4]
    saved.clear()
    clock = iter(range(0, 100_000, 250))  # what `Checkpoints` alone looks at: a step takes 250 s
    monkeypatch.setattr("plato2.runs.checkpoint.time", SimpleNamespace(monotonic=lambda: next(clock)))
    train_here(*given, "trainer.max_steps=9", "trainer.val_check_interval=9", "run_id=default")
    assert saved == [3, 6, 9]
    assert_one_line(train_here("checkpoint_minutes=0", expect=2).stderr, "checkpoint_minutes=0")


# --------------------------------------------------------------------------------------- what the data are


def test_another_validation_split_is_refused(train_here: Train, shards: Path, coarse: Path) -> None:
    run = copy_run(coarse, Path("outputs/tiny-1_coarse/c"))
    more = ["run_id=c", "trainer.max_steps=4", "trainer.val_check_interval=2", f"data.path={shards}"]
    index = json.loads((shards / "index.json").read_text())
    index["splits"]["valid"]["shards"] = index["splits"]["train"]["shards"][:1]
    whole = (shards / "index.json").read_text()
    (shards / "index.json").write_text(json.dumps(index))
    before = files(run)
    assert_one_line(train_here(*more, expect=2).stderr, "validation split was ", "start a new run")
    assert files(run) == before  # its record, too: it is still a finished run
    (shards / "index.json").write_text(whole)
    assert "resuming" in train_here(*more).stderr


@pytest.mark.parametrize("name", ["spm.model", "vocab.txt"])
def test_a_damaged_tokenizer_of_the_data(train_here: Train, shards: Path, tmp_path: Path, name: str) -> None:
    for kind in ("flipped", "truncated", "missing"):
        damage(shards / "tokenizer" / name, kind)
        done = train_here(f"data.path={shards}", expect=2)
        assert_one_line(done.stderr, f"{shards}/tokenizer")
        assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("address", ["", "file://"], ids=["folder", "address"])
def test_another_tokenizer_in_the_data(train_here: Train, shards: Path, tmp_path: Path, address: str) -> None:
    """A whole one, of the same size: only its hash tells."""
    texts = write_dialogues(tmp_path / "other.jsonl", seed=1).read_text().splitlines()
    other = train_tokenizer(texts, n_pieces=300)
    assert other.vocab_size == 301
    path = f"data.path={address}{shards}"
    train_here(path, "run_id=r", "trainer.max_steps=1")
    other.save(shards / "tokenizer")
    for run_id in ("r", "new"):
        done = train_here(path, f"run_id={run_id}", expect=2)
        assert_one_line(done.stderr, f"{shards}/tokenizer: not the tokenizer that the shards were made with")
    assert not (tmp_path / "outputs" / "tiny-1_coarse" / "new").exists()


@pytest.mark.slow
def test_a_run_folder_that_is_read_only(corpus: Path, coarse: Path, tmp_path: Path) -> None:
    """Also for the superuser, who gives up the right to write anywhere."""
    run = copy_run(coarse, tmp_path / "outputs" / "tiny-1_coarse" / "c")

    def give_up() -> None:
        drop_from_bounding_set, override = 24, 1
        ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0)

    for folder in (run, run / "checkpoints"):
        folder.chmod(0o555)
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "run_id=c"]
    done = subprocess.run(
        command(corpus, tmp_path / "outputs", *steps),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=give_up,
        timeout=300,
    )
    run.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, str(run), "Permission denied")
