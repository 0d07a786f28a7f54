"""Several runs from one command: the curriculum, sweeps over values, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from small import ROOT, Train, assert_one_line, command

from plato2.runs.folder import RunFolder

CURRICULUM = ["-m", "stage=1_coarse,2_gen,2_eval", "init_from=auto", "trainer.max_steps=4"]
STAGES = ("1_coarse", "2_gen", "2_eval")


def sweeps(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output_dir.glob("sweeps/*/sweep.json"))]


def jobs(output_dir: Path, stages: tuple[str, ...] = STAGES) -> dict[str, RunFolder]:
    """The one run of each stage."""
    found = {}
    for stage in stages:
        (found[stage],) = [RunFolder(path) for path in (output_dir / f"tiny-{stage}").iterdir()]
    return found


def test_the_curriculum_is_one_command(train_here: Train, tmp_path: Path) -> None:
    done = train_here(*CURRICULUM)
    outputs = tmp_path / "outputs"
    (sweep,) = sweeps(outputs)
    assert sweep["finished"]
    lineages = {stage: run.lineage() for stage, run in jobs(outputs).items()}
    for number, (stage, lineage) in enumerate(lineages.items()):
        assert lineage["status"] == "finished"
        assert lineage["run_id"] == f"{sweep['name']}-{number}"
        assert lineage["curriculum"] == sweep["name"]
        parent = None if stage == "1_coarse" else Path(lineage["parent"]["run"]).name
        assert parent == (None if stage == "1_coarse" else f"{sweep['name']}-0")
    assert done.stderr.count("weights from ") == 2
    (record,) = (outputs / "sweeps").iterdir()  # what it says last works in a clone, which has no command
    assert done.stderr.splitlines()[-1] == f"python -m plato2 report {record} --out sweep.html draws it"
    assert "RUN_ID" not in os.environ
    assert not (tmp_path / ".hydra").exists()
    assert not (tmp_path / "multirun").exists()


def test_a_finished_sweep_is_not_gone_on_with(train_here: Train, tmp_path: Path) -> None:
    for _ in range(2):
        train_here("-m", "seed=1", "trainer.max_steps=1")
    assert len(sweeps(tmp_path / "outputs")) == 2


@pytest.mark.slow
def test_an_interrupted_sweep_warm_starts_from_its_own_stage_1(train_here: Train, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    train_here(*CURRICULUM)
    (record,) = outputs.glob("sweeps/*/sweep.json")
    sweep = json.loads(record.read_text())
    judge = jobs(outputs)["2_eval"]
    judge.path.rename(tmp_path / "away")  # as if it had been stopped before its last job,
    record.write_text(json.dumps(sweep | {"finished": False}))
    train_here(
        "stage=1_coarse", "seed=12", "trainer.max_steps=4", "run_id=later"
    )  # and then this came between
    assert len(sweeps(outputs)) == 1

    done = train_here(*CURRICULUM)
    assert f"resuming the unfinished sweep {sweep['name']}" in done.stderr
    assert done.stderr.count("is finished: skipped") == 2
    assert Path(judge.lineage()["parent"]["run"]).name == f"{sweep['name']}-0"
    assert [record["finished"] for record in sweeps(outputs)] == [True]


@pytest.mark.slow
def test_jobs_that_run_side_by_side_wait_for_their_parent(forks: Forks, corpus: Path, tmp_path: Path) -> None:
    """And take no older run, though one is there. Stage 2 is the first job: in turn it would fail."""
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    sweep = ["-m", "stage=2_gen,1_coarse", "hydra/launcher=side_by_side", "run_id=s"]
    for given in (["run_id=older"], sweep):
        arguments = command(corpus, tmp_path / "outputs", *steps, *given)[2:]
        code, _, output = forks.run(ROOT / "train.py", *arguments, folder=tmp_path)
        assert code == 0, output
    assert "init_from=auto: waiting for stage 1_coarse of the sweep s to finish" in output
    run = RunFolder(tmp_path / "outputs" / "tiny-2_gen" / "s-0")
    assert run.finished
    assert Path(run.lineage()["parent"]["run"]).name == "s-1"


def test_damaged_records_of_other_sweeps_are_passed_over(train_here: Train, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    damaged = {"a": b"", "b": b"[1]", "c": b'{"command": ', "d": b"\xff\xfe", "e": b'{"finished": false}'}
    damaged |= {"f": b"[" * 200_000}
    for name, content in damaged.items():
        (outputs / "sweeps" / name).mkdir(parents=True)
        (outputs / "sweeps" / name / "sweep.json").write_bytes(content)
    (outputs / "tiny-1_coarse" / "s-0").mkdir(parents=True)
    (outputs / "tiny-1_coarse" / "t-9").mkdir(parents=True)
    (outputs / "tiny-1_coarse" / "t-9" / "lineage.json").write_bytes(b"")
    done = train_here("-m", "stage=1_coarse,2_gen", "trainer.max_steps=1", "run_id=t", "report=true")
    for name in damaged:
        assert f"warning: {outputs}/sweeps/{name}/sweep.json is skipped" in done.stderr
    assert "unigram baseline" in done.stdout


def test_two_sweeps_of_one_second_have_a_folder_each(train_here: Train, tmp_path: Path) -> None:
    same = ["hydra.sweep.dir=${output_dir}/sweeps/now", "trainer.max_steps=1"]
    for seed in ("1,2", "3,4"):
        train_here("-m", f"seed={seed}", *same)
    assert [sweep["name"] for sweep in sweeps(tmp_path / "outputs")] == ["now", "now-2"]
    names = sorted(path.name for path in (tmp_path / "outputs" / "tiny-1_coarse").iterdir())
    assert names == ["now-0", "now-1", "now-2-0", "now-2-1"]


def test_each_job_of_a_sweep_has_its_own_parent(train_here: Train, tmp_path: Path) -> None:
    """Of a sweep over stages and seeds a stage 2 takes the stage 1 of its seed, not the newest."""
    train_here("-m", "stage=1_coarse,2_gen", "seed=1,2", "trainer.max_steps=1", "run_id=s")
    for number in (2, 3):
        run = RunFolder(tmp_path / "outputs" / "tiny-2_gen" / f"s-{number}")
        parent = RunFolder(Path(run.lineage()["parent"]["run"]))
        assert run.lineage()["config"]["seed"] == parent.lineage()["config"]["seed"] == number - 1


@pytest.mark.slow
def test_a_sweep_killed_in_its_second_job_goes_on(forks: Forks, corpus: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    steps = ["trainer.max_steps=40", "trainer.val_check_interval=40", "checkpoint_steps=1"]
    arguments = command(corpus, outputs, *CURRICULUM[:-1], *steps)[2:]
    pid, until = forks.begin(ROOT / "train.py", *arguments, folder=tmp_path), time.monotonic() + 200
    while not list(outputs.glob("tiny-2_gen/*/checkpoints/last.ckpt")):
        assert Path(f"/proc/{pid}").exists(), forks.end()
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert forks.end()[0] == -signal.SIGKILL
    assert not jobs_finished(outputs, "2_gen")

    code, _, output = forks.run(ROOT / "train.py", *arguments, folder=tmp_path)
    assert code == 0, output
    (sweep,) = sweeps(outputs)
    assert sweep["finished"]
    found = jobs(outputs)
    assert f"{found['1_coarse'].path} is finished: skipped" in output
    assert f"resuming {found['2_gen'].path}" in output
    assert f"new run {found['2_eval'].path}" in output
    assert all(run.finished for run in found.values())
    for stage in ("2_gen", "2_eval"):
        assert Path(found[stage].lineage()["parent"]["run"]) == found["1_coarse"].path


def jobs_finished(outputs: Path, stage: str) -> bool:
    return any(RunFolder(path).finished for path in (outputs / f"tiny-{stage}").iterdir())


def test_a_sweep_over_values_gives_a_run_each(train_here: Train, tmp_path: Path) -> None:
    done = train_here("-m", "optim.lr=1e-3,2e-3", "trainer.max_steps=2", "run_id=lr")
    runs = sorted((tmp_path / "outputs" / "tiny-1_coarse").iterdir())
    assert [run.name for run in runs] == ["lr-0", "lr-1"]
    assert [RunFolder(run).lineage()["config"]["optim"]["lr"] for run in runs] == [1e-3, 2e-3]
    (sweep,) = sweeps(tmp_path / "outputs")
    assert (sweep["name"], sweep["finished"]) == ("lr", True)
    table = done.stdout.rpartition("tiny-1_coarse, by val/loss")[2]
    best = [RunFolder(run).lineage()["metrics"]["val/loss"] for run in runs]
    assert re.findall(r"lr-\d", table) == sorted(["lr-0", "lr-1"], key=lambda name: best[int(name[-1])])
    assert "optim.lr=0.002" in table


def test_a_sweep_file_needs_no_m(train_here: Train, tmp_path: Path) -> None:
    train_here("sweep=lr", "trainer.max_steps=1")
    assert len(list((tmp_path / "outputs" / "tiny-1_coarse").iterdir())) == 3


def test_a_job_that_fails_does_not_lose_the_others(train_here: Train, tmp_path: Path) -> None:
    """Stage 2 comes first, and fails; stage 1 is trained. The same command then has what stage 2 lacked."""
    given = ["-m", "stage=2_gen,1_coarse", "trainer.max_steps=1"]
    done = train_here(*given, expect=2)
    (record,) = (tmp_path / "outputs" / "sweeps").iterdir()
    told = ["1 of 2 jobs failed: job 0 (stage=2_gen)", "no finished 1_coarse run", f"plato2 report {record}"]
    assert_one_line(done.stderr, *told)
    assert jobs(tmp_path / "outputs", ("1_coarse",))["1_coarse"].finished
    assert [sweep["finished"] for sweep in sweeps(tmp_path / "outputs")] == [False]

    again = train_here(*given)
    assert again.stderr.count("is finished: skipped") == 1
    assert all(run.finished for run in jobs(tmp_path / "outputs", ("1_coarse", "2_gen")).values())
    assert [path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()] == [record.name]
    assert [sweep["finished"] for sweep in sweeps(tmp_path / "outputs")] == [True]


@pytest.mark.parametrize("strategy", [["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]])
def test_several_processes_in_a_sweep_are_refused(train_here: Train, strategy: list[str]) -> None:
    done = train_here("-m", "optim.lr=1e-3,2e-3", *strategy, expect=2)
    assert_one_line(done.stderr, "strategy.devices=2 in a sweep", "torchrun", "devices=1")


def test_what_a_sweeper_gets(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best value of the stage's monitor, or `sweep_metric`; also of a job that is skipped."""
    from hydra.core.plugins import Plugins

    returned: list[list[Any]] = []
    grid: Any = Plugins.instance().class_name_to_class["hydra_plugins.plato2_sweep.Grid"]
    sweep = grid.sweep

    def watched(self: Any, arguments: list[str]) -> Any:
        jobs = sweep(self, arguments)
        returned.append([job.return_value for batch in jobs for job in batch])
        return jobs

    monkeypatch.setattr(grid, "sweep", watched)
    command_line = ["-m", "optim.lr=1e-3,2e-3", "trainer.max_steps=2", "trainer.val_check_interval=1"]
    for metric in ([], ["sweep_metric=train/lr"]):
        train_here(*command_line, *metric, "run_id=s")
        (record,) = [
            p for p in tmp_path.glob("outputs/sweeps/*/sweep.json") if json.loads(p.read_text())["finished"]
        ]
        record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
        train_here(*command_line, *metric, "run_id=s")  # all skipped
        record.unlink()
    best, best_skipped, rate, rate_skipped = returned
    lineages = [RunFolder(tmp_path / "outputs/tiny-1_coarse" / f"s-{n}").lineage() for n in (0, 1)]
    assert best == best_skipped == [pytest.approx(lineage["metrics"]["val/loss"]) for lineage in lineages]
    assert rate == rate_skipped == [lineage["metrics"]["train/lr"] for lineage in lineages]


@pytest.mark.slow
def test_quickstart_is_a_sweep(train_here: Train, tmp_path: Path) -> None:
    """The experiment file itself, with a smaller model on a smaller corpus."""
    small = ["model.n_layer=1", "model.n_head=2", "model.hidden_size=32", "data.valid_units=2"]
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
    prepare = "data.prepare=null"
    given = ["experiment=quickstart", "data=chitchat", prepare, *small, *steps, "optim.batch_tokens=1024"]
    done = train_here(*given)
    stages = ("1_coarse", "2_gen", "2_eval_dual")
    assert all(run.finished for run in jobs(tmp_path / "outputs", stages).values())
    reported = ("unigram baseline", "coherence accuracy", "validation context 3", "python -m plato2 chat")
    for told in reported:
        assert told in done.stdout

    again = train_here(*given)  # trains nothing, and shows the report once more
    assert len(jobs(tmp_path / "outputs", stages)) == 3
    assert again.stderr.count("is finished: skipped") == 3
    assert "showing its report (resume=never trains it again)" in again.stderr
    for told in reported:
        assert told in again.stdout
