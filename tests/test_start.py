"""Where weights come from when nothing is said: the newest finished stage 1 that fits, or one clear line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
from small import ROOT, Train, assert_one_line, stopped_at, train_in_process, write_dialogues

from plato2.config import UserError
from plato2.files import locked, was_killed
from plato2.runs.folder import RunFolder
from plato2.runs.start import GEOMETRY, OwnSweep, newest_parent, parent_stage
from plato2.stages import known_stages

STAGES = known_stages()

STEPS = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
STAGE_2 = ["stage=2_gen", *STEPS]


def parent(run: Path) -> str:
    """Name of the run that another one has its weights from."""
    return Path(RunFolder(run).lineage()["parent"]["run"]).name


def test_the_cards_own_line_says_at_once_what_to_run_first(tmp_path: Path) -> None:
    """Before 1.6 billion weights take their memory, before any data are prepared, with nothing written."""
    given = ["model=1.6b", "stage=2_gen", "strategy=fsdp_64", "optim.lr=1e-5"]
    done = train_in_process(given, tmp_path, ROOT / "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(
        done.stderr,
        "init_from=auto: no finished 1_coarse run of model=1.6b under outputs; run this first: "
        "python train.py model=1.6b strategy=fsdp_64 stage=1_coarse (or ",
    )
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_parent_and_data_still_to_be_made(train_here: Train, tmp_path: Path) -> None:
    file = write_dialogues(tmp_path / "my dialogues.jsonl")
    node = f"+data.prepare={{corpus: jsonl, files: ['{file}'], vocab_pieces: 300}}"
    done = train_here("stage=2_eval", node, f"data.path={tmp_path}/made", "seed=3", expect=2)
    assert_one_line(done.stderr, "run this first: python train.py experiment=smoke ")
    first = shlex.split(done.stderr.split("run this first: ")[1].split(" (or ")[0])  # as a shell reads it
    assert {node, f"data.path={tmp_path}/made", "strategy=cpu", "stage=1_coarse"} <= set(first)
    assert not {"stage=2_eval", "seed=3", "sample_replies=0"} & set(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my dialogues.jsonl"]


def test_the_newest_run_that_fits_is_taken_and_named(train_here: Train, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    for name in ("older", "right"):
        train_here(*STEPS, f"run_id={name}")
    train_here(*STEPS, "run_id=small", "model.n_layer=1")  # the same name, another geometry, newer
    with stopped_at(1):
        train_here(*STEPS, "run_id=stopped")  # newer and not finished
    done = train_here(*STAGE_2, "run_id=x")
    chosen = re.findall(r"^init_from=auto: (.*) \(2 steps, best val/ppl [\d.]+\)$", done.stderr, re.M)
    assert chosen == [str(outputs / "tiny-1_coarse" / "right")]
    assert parent(outputs / "tiny-2_gen" / "x") == "right"
    train_here(*STAGE_2, "run_id=y", "model.n_layer=1", "model.dropout=0")
    assert parent(outputs / "tiny-2_gen" / "y") == "small"
    done = train_here(*STAGE_2, "model.hidden_size=64", expect=2)
    assert_one_line(
        done.stderr, "with this geometry", "small has model.n_layer=1, not 2, model.hidden_size=32"
    )

    with stopped_at(1):
        train_here(*STAGE_2, "run_id=stopped2")
    shutil.rmtree(outputs / "tiny-1_coarse")  # a run that goes on needs its parent no more
    assert "resuming" in train_here(*STAGE_2, "run_id=stopped2").stderr


def test_a_curriculum_takes_no_other_stage_1_than_its_own(train_here: Train, tmp_path: Path) -> None:
    train_here(*STEPS, RUN_ID="other")
    with stopped_at(1):
        train_here(*STEPS, RUN_ID="mine")
    done = train_here(*STAGE_2, RUN_ID="mine", expect=2)
    assert_one_line(done.stderr, "no finished 1_coarse run of model=tiny of the curriculum mine")
    train_here(*STEPS, RUN_ID="mine")
    train_here(*STEPS, "seed=12", RUN_ID="newest")
    train_here(*STAGE_2, RUN_ID="mine")
    assert parent(tmp_path / "outputs" / "tiny-2_gen" / "mine") == "mine"


def test_a_damaged_neighbour_is_skipped_with_a_warning(train_here: Train, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    train_here(*STEPS, "run_id=a")
    damaged = {"empty": b"", "half": b'{"format": "plato2-run/1", "sta', "noise": b"\xff\xfe\x00"}
    for stage in ("1_coarse", "2_gen"):  # of the runs to start from, and of those to go on with
        for name, content in damaged.items():
            (outputs / f"tiny-{stage}" / name).mkdir(parents=True)
            (outputs / f"tiny-{stage}" / name / "lineage.json").write_bytes(content)
    foreign = outputs / "tiny-1_coarse" / "foreign"
    shutil.copytree(outputs / "tiny-1_coarse" / "a", foreign)
    lineage = json.loads((foreign / "lineage.json").read_text())
    (foreign / "lineage.json").write_text(json.dumps({**lineage, "format": "other", "created": "9999"}))
    done = train_here(*STAGE_2)
    for stage in ("1_coarse", "2_gen"):
        for name in damaged:
            lines = [line for line in done.stderr.splitlines() if f"tiny-{stage}/{name}/lineage.json" in line]
            assert [line.startswith(f"warning: {name} is skipped: ") for line in lines] == [True], name
    (run,) = [run for run in (outputs / "tiny-2_gen").iterdir() if run.name not in damaged]
    assert parent(run) == "a"


def test_a_damaged_parent_is_skipped_for_an_older_one(train_here: Train, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_here(*STEPS, f"run_id={name}")
    newest, older = (tmp_path / "outputs" / "tiny-1_coarse" / name / "checkpoints/best.ckpt" for name in "ba")
    newest.write_bytes(newest.read_bytes()[:-1])
    done = train_here(*STAGE_2, "run_id=f")
    assert "tiny-1_coarse/b is skipped: " in done.stderr
    assert parent(tmp_path / "outputs" / "tiny-2_gen" / "f") == "a"
    older.write_bytes(older.read_bytes()[:-1])
    done = train_here(*STAGE_2, "run_id=g", expect=2)
    assert_one_line(done.stderr, "init_from=auto: ", "best.ckpt: damaged", "run this again: python train.py")


def test_the_tokenizer_is_compared_as_soon_as_it_is_known(train_here: Train, tmp_path: Path) -> None:
    file = write_dialogues(tmp_path / "dialogues.jsonl", n_dialogues=150)
    node = f"corpus: jsonl, files: [{file}], vocab_pieces: 300, max_context: 32, max_response: 32"
    given = [f"+data.prepare={{{node}}}", f"data.path={tmp_path}/made"]
    train_here(*STEPS, *given, "run_id=a")
    shutil.rmtree(tmp_path / "made")
    train_here(*STAGE_2, *given, "run_id=b")  # prepared again: the same tokenizer
    assert parent(tmp_path / "outputs" / "tiny-2_gen" / "b") == "a"

    RunFolder(tmp_path / "outputs" / "tiny-1_coarse" / "a").write_lineage(tokenizer_sha256="ab" * 32)
    shutil.rmtree(tmp_path / "made")
    for prepared_before in (False, True):
        assert (tmp_path / "made").exists() == prepared_before
        done = train_here(*STAGE_2, *given, "run_id=c", expect=2)
        assert_one_line(done.stderr, "with the tokenizer of this data", "tiny-1_coarse/a has another")
        assert "reusing" not in done.stdout  # where it is known before, it is compared before


def test_a_run_of_another_name_fits_if_its_geometry_does(train_here: Train, tmp_path: Path) -> None:
    train_here(*STEPS, "run_id=a", "name=mine-1_coarse", "model_name=mine")
    assert "init_from=auto: " in train_here(*STAGE_2, "run_id=b").stderr
    assert parent(tmp_path / "outputs" / "tiny-2_gen" / "b") == "a"


def test_jobs_side_by_side_wait_for_the_parent_of_their_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for no other, though an older run is finished."""
    monkeypatch.setattr("plato2.runs.start.POLL_S", 0.01)
    model = dict.fromkeys(GEOMETRY, 1)

    def record(name: str, family: str, *overrides: str, status: str) -> RunFolder:
        run = RunFolder(tmp_path / "tiny-1_coarse" / name)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.last.touch()
        run.write_lineage(
            status=status, curriculum=family, overrides=sorted(overrides), config={"model": model}
        )
        return run

    record("older", "x", status="finished")
    record("s-1", "s", "seed=2", status="finished")
    sweep = OwnSweep(frozenset({"seed=1"}), side_by_side=True)

    def later() -> None:
        record("s-0", "s", "seed=1", status="running")
        record("s-0", "s", "seed=1", status="finished")

    record("s-0", "s", "seed=1", status="running")
    timer = Timer(0.3, later)
    timer.start()
    found = newest_parent(tmp_path, "1_coarse", "tiny", model, None, "s", "first", sweep)
    timer.join()
    assert found.path.name == "s-0"
    with locked(found.path / "lock", found.path):
        assert not was_killed(found.path / "lock")

    record("s-0", "s", "seed=1", status="running")
    dies = "import os, sys; from pathlib import Path; from plato2.files import locked\n"
    dies += "with locked(Path(sys.argv[1]), ''): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", dies, found.path / "lock"], cwd=ROOT)
    assert was_killed(found.path / "lock")
    with pytest.raises(UserError, match="no finished 1_coarse run of model=tiny of the curriculum s"):
        newest_parent(tmp_path, "1_coarse", "tiny", model, None, "s", "first", sweep)

    (found.path / "lock").unlink()
    monkeypatch.setattr("plato2.runs.start.WAIT_S", 0.0)
    with pytest.raises(UserError, match="no finished 1_coarse run of model=tiny of the curriculum s"):
        newest_parent(tmp_path, "1_coarse", "tiny", model, None, "s", "first", sweep)


@pytest.mark.parametrize(
    "signed",
    [
        "",
        "[]",
        "{}",
        '{"pid": "x"}',
        '{"pid": null}',
        '{"pid": 1e400}',
        '{"pid": 99999999999999999999}',
        "pid",
    ],
)
def test_nobody_was_killed_where_a_lock_does_not_say_who_held_it(tmp_path: Path, signed: str) -> None:
    lock = tmp_path / "lock"
    assert not was_killed(lock)
    lock.write_text(signed.replace("{", f'{{"host": "{socket.gethostname()}", ').replace(", }", "}"))
    assert not was_killed(lock)
    lock.write_text(json.dumps({"host": "another", "pid": 2**22 + 1}))
    assert not was_killed(lock)


def test_which_stages_need_a_parent() -> None:
    parents = {name: parent_stage(name, stage.warm_starts_from) for name, stage in STAGES.items()}
    assert parents == {**dict.fromkeys(STAGES, "1_coarse"), "1_coarse": None, "plato": None}
    assert parent_stage("own", ("own",)) is None
    assert parent_stage("own", ("own", "2_gen", "1_coarse")) == "2_gen"


def test_a_record_without_a_configuration_is_no_other_geometry(tmp_path: Path) -> None:
    """The weights' shapes are compared when they are loaded."""
    run = RunFolder(tmp_path / "tiny-1_coarse" / "a")
    model = {"n_layer": 2, "n_head": 2, "hidden_size": 8, "vocab_size": 9, "max_position": 4, "n_type": 2}
    model |= {"n_role": 0}
    run.checkpoints.mkdir(parents=True)
    run.last.touch()
    run.write_lineage(status="finished")
    assert newest_parent(tmp_path, "1_coarse", "tiny", model, None, None, "first") == run
    for config, fits in (({}, True), ({"model": model}, True), ({"model": {**model, "n_type": 3}}, False)):
        run.write_lineage(config=config)
        if fits:
            assert newest_parent(tmp_path, "1_coarse", "tiny", model, None, None, "first") == run
        else:
            with pytest.raises(UserError, match=r"model\.n_type=3, not 2; run this first: first"):
                newest_parent(tmp_path, "1_coarse", "tiny", model, None, None, "first")


def test_an_adapter_goes_on_where_its_decoder_has_been_moved(tmp_path: Path) -> None:
    """Its weights tell a decoder, not its folder; of a run from before their hash the folder does."""
    run = RunFolder(tmp_path / "pretrained-1_coarse" / "a")
    run.checkpoints.mkdir(parents=True)
    run.last.touch()
    then = {"path": "/old/llama", "adapter": "lora", "adapter_rank": 4, "base_sha256": "12ab"}
    run.write_lineage(status="finished", config={"model": then})
    now = {**then, "path": "/new/llama"}
    assert newest_parent(tmp_path, "1_coarse", "pretrained", now, None, None, "first") == run
    for changed, said in (
        ({"base_sha256": "34cd"}, "model.path=/old/llama, not /new/llama, model.base_sha256=12ab, not 34cd"),
        ({"adapter_rank": 8}, "has model.adapter_rank=4, not 8"),
    ):
        with pytest.raises(UserError, match=said):
            newest_parent(tmp_path, "1_coarse", "pretrained", {**now, **changed}, None, None, "first")
    then = {"path": "/old/llama", "adapter": "none", "adapter_rank": 4}
    now = {**then, "path": "/new/llama", "base_sha256": "12ab"}
    run.write_lineage(config={"model": {**then, "base_sha256": "12ab"}})
    assert newest_parent(tmp_path, "1_coarse", "pretrained", now, None, None, "first") == run
    run.write_lineage(config={"model": then})
    with pytest.raises(UserError, match=r"has model\.path=/old/llama, not /new/llama"):
        newest_parent(tmp_path, "1_coarse", "pretrained", now, None, None, "first")
