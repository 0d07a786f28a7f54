"""Sweeps that look for something: factors of the recipe's values, Optuna, joblib, W&B's file."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from forks import Forks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from small import ROOT, Train, assert_one_line, command, environment
from test_ranks import Pair, error_of
from test_slurm import last_step
from test_sweeps import sweeps
from wandb_server import WandbServer

from hydra_plugins.plato2_local import A_YEAR, result
from plato2.runs.folder import RunFolder
from plato2.runs.saved import checkpoint_step
from plato2.runs.study import open_study
from plato2.runs.traces import read_states

STEPS = ["trainer.max_steps=6", "trainer.val_check_interval=2"]
SEARCH = ["-m", "hydra/sweeper=optuna", "optim.lr=x(0.05,2)", *STEPS]
COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


def runs(outputs: Path, name: str = "tiny-1_coarse") -> dict[str, RunFolder]:
    return {
        path.parent.name: RunFolder(path.parent) for path in sorted(outputs.glob(f"{name}/*/lineage.json"))
    }


def the_study(outputs: Path) -> optuna.Study:
    (journal,) = outputs.glob("sweeps/*/study.journal")
    return open_study(journal)


def what_was_found(study: optuna.Study) -> list[tuple[Any, ...]]:
    """All of a study that a kill must not change."""
    return [
        (one.number, one.state, one.params, one.value, one.intermediate_values, one.user_attrs)
        for one in study.trials
    ]


# ------------------------------------------------------------------------------------------------- factors


@pytest.fixture
def launched(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """The jobs that Hydra's launcher would get, with what is swept alone; nothing is trained."""
    launcher: Any = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    found: list[list[str]] = []

    def launch(self: Any, jobs: list[list[str]], initial_job_idx: int) -> list[Any]:
        found.extend(jobs)
        raise SystemExit(0)

    def jobs(*given: str) -> list[list[str]]:
        found.clear()
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "launch", launch)
            train_here(*given)
        return [[word for word in job if not all(word in other for other in found)] for job in found]

    return jobs


def test_factors_are_of_the_value_that_the_rest_of_the_job_composes(
    launched: Callable[..., list[list[str]]],
) -> None:
    """1.6b-2_gen has a rate of 1e-5 and tiny-2_gen one of 5e-4; files and the command line alike."""
    assert launched("sweep=lr", "stage=2_gen") == [
        ["optim.lr=0.00025"],
        ["optim.lr=0.0005"],
        ["optim.lr=0.001"],
    ]
    both = launched("-m", "stage=2_gen", "model=tiny,1.6b", "optim.lr=x0.5,x4")
    rates = [word for job in both for word in job if word.startswith("optim.lr")]
    assert rates == ["optim.lr=0.00025", "optim.lr=0.002", "optim.lr=5e-06", "optim.lr=4e-05"]
    assert launched("sweep=latent_k") == [[f"model.n_latent={k}"] for k in (5, 10, 20, 40)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["-m", "optim.lrr=x0.5,x1"], ["optim.lrr: no such key; did you mean optim.lr?"]),
        (["-m", "hydra/sweeper=optuna", "optim.lrr=x(0.5,2)"], ["optim.lrr: no such key", "optim.lr?"]),
        (
            ["-m", "optim.lr=x(0.5,2)"],
            ["a range, which hydra/sweeper=optuna draws from", "optim.lr=x0.5,x1,x2"],
        ),
        (["-m", "hydra/sweeper=optuna", "optim.lr=x(2,0.5)"], ["factors from 2 to 0.5; give x(LOW,HIGH)"]),
        (["-m", "model.n_role=x1,x2"], ["model.n_role=x1: the recipe's value is 0", "give values"]),
        (["optim.lr=x2"], ["optim.lr=x2: a factor of the recipe's value, for sweeps", "x0.5,x1,x2"]),
        (["-m", "hydra/sweeper=optuna", "seed=1,2"], ["seed: no key to search", "hydra.sweeper.seeds"]),
        (["-m", "hydra/sweeper=optuna"], ["nothing to search"]),
        (["hydra/sweeper=optuna"], ["hydra/sweeper=optuna: chooses the jobs of a sweep; add -m"]),
        ([*SEARCH, "hydra.sweeper.pruner.name=MedianPrune"], ["pruner.name=MedianPrune", "MedianPruner?"]),
        ([*SEARCH, "+hydra.sweeper.sampler.seeed=1"], ["hydra.sweeper.sampler.seeed", "no such option"]),
        ([*SEARCH, "hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials=0: must be a whole number"]),
        (["-m", "optim.lr=big,1e-3"], ["optim.lr=big: must be a number"]),
        (["-m", "trainer.max_steps=1", "optim.batch_tokens=1.5,1024"], ["batch_tokens=1.5: must be a whole"]),
        (["-m", "model.dropout=0.1,2"], ["model.dropout=2.0: must be in [0, 1)"]),
        (["-m", "hydra/sweeper=optuna", "model.dropout=0.1,2"], ["model.dropout=2.0: must be in [0, 1)"]),
        (["-m", "hydra/sweeper=optuna", "model.dropout=interval(0,2)"], ["dropout=2.0: must be in [0, 1)"]),
        (["-m", "seed=range(3,1)"], ["seed=range(3,1): no values", "range(START,STOP)"]),
        (["-m", "hydra/sweeper=optuna", "model.n_layer=range(3,1)"], ["range(3,1): no values"]),
        (["-m", "hydra/launcher=jobs", "seed=1,2"], ["hydra/launcher=jobs: no such option", "joblib"]),
        (["-m", "hydra.launcher.n_jobs=2", "seed=1,2"], ["n_jobs: no such key", "hydra/launcher=joblib"]),
        (["-m", "hydra.sweeper.n_trials=2", "seed=1,2"], ["n_trials: no such key", "hydra/sweeper=optuna"]),
        ([*SEARCH, "sweep_metric=val/fun", "hydra.sweeper.n_trials=1"], ["sweep_metric=val/fun: not logged"]),
    ],
)
def test_mistakes_in_a_search_are_one_line(train_here: Train, given: list[str], told: list[str]) -> None:
    assert_one_line(train_here(*given, expect=2).stderr, *told)


# -------------------------------------------------------------------------------------------------- Optuna


def test_a_search_prunes_bad_points_and_takes_the_mean_over_seeds(train_here: Train, tmp_path: Path) -> None:
    pruner = ["hydra.sweeper.pruner.n_startup_trials=1", "hydra.sweeper.n_trials=3"]
    done = train_here(*SEARCH, *pruner, "hydra.sweeper.seeds=[1,2]", "run_id=s")
    outputs = tmp_path / "outputs"
    study, found = the_study(outputs), runs(outputs)
    assert {one.state for one in study.trials} == {COMPLETE, PRUNED}
    for one in study.trials:
        first = found[f"s-{one.number}-seed1"]
        config = first.lineage()["config"]
        assert config["optim"]["lr"] == pytest.approx(1.5e-3 * one.params["optim.lr"], rel=1e-5)
        assert (config["seed"], config["trial"]) == (1, one.number)
        values = [value for name, value in metrics(first, "val/loss")]
        assert list(one.intermediate_values.values()) == pytest.approx(values)
        if one.state == PRUNED:
            assert first.lineage()["status"] == "pruned"
            assert first.lineage()["step"] == checkpoint_step(first.last) == max(one.intermediate_values) < 6
            assert f"s-{one.number}-seed2" not in found  # it would cost as much as a good one
        else:
            both = [
                min(v for _, v in metrics(found[f"s-{one.number}-seed{seed}"], "val/loss")) for seed in (1, 2)
            ]
            assert one.value == pytest.approx(sum(both) / 2)
            assert one.user_attrs["spread"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
    assert "best: point " in done.stderr
    assert [sweep["finished"] for sweep in sweeps(outputs)] == [True]


def metrics(run: RunFolder, name: str) -> list[tuple[int, float]]:
    from plato2.runs.saved import read_metrics

    return [(step, value) for step, metric, value in read_metrics(run.path / "metrics.csv") if metric == name]


@pytest.mark.slow
def test_a_search_killed_ten_times_finds_what_one_finds_that_was_not(
    forks: Forks, corpus: Path, tmp_path: Path
) -> None:
    """Killed just before a change of a file, or in the middle of a write, wherever that is."""
    given = [
        *SEARCH,
        "checkpoint_steps=1",
        "hydra.sweeper.n_trials=5",
        "hydra.sweeper.seeds=[1,2]",
        "run_id=s",
    ]
    given += ["hydra.sweeper.pruner.n_startup_trials=1", "model.dropout=0.0,0.1"]

    def arguments(outputs: Path) -> list[str]:
        return command(corpus, outputs, *given)[2:]

    whole = tmp_path / "whole"
    whole.mkdir()
    code, changes, output = forks.run(ROOT / "train.py", *arguments(whole / "outputs"), folder=whole)
    assert code == 0, output

    killed = tmp_path / "killed"
    killed.mkdir()
    rng, n_kills, in_journal = random.Random(5), 0, 0
    for number in range(10):
        at = rng.randint(1, len(changes) // 5)
        code, made, output = forks.run(
            ROOT / "train.py", *arguments(killed / "outputs"), folder=killed, kill_at=at, cut=number % 3 == 2
        )
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), f"{number}: {code}\n{output}"
        n_kills += 1
        in_journal += "study.journal" in made[-1][1]
    code, _, output = forks.run(ROOT / "train.py", *arguments(killed / "outputs"), folder=killed)
    assert code == 0, output
    assert "resuming the unfinished sweep s" in output
    assert n_kills == 10
    assert in_journal
    expected, found = the_study(whole / "outputs"), the_study(killed / "outputs")
    assert len(found.trials) == 5
    assert {one.state for one in found.trials} == {COMPLETE, PRUNED}
    assert what_was_found(found) == what_was_found(expected)
    assert [sweep["finished"] for sweep in sweeps(killed / "outputs")] == [True]
    for name, run in runs(killed / "outputs").items():
        other = runs(whole / "outputs")[name]
        assert run.lineage()["status"] == other.lineage()["status"]
        assert metrics(run, "val/loss") == metrics(other, "val/loss")


def test_a_line_cut_by_a_kill_is_no_part_of_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    study = open_study(journal, "minimize")
    study.tell(study.ask(), 1.0)
    before = journal.read_bytes()
    for cut in (b'{"op_code":4,"worker_id":"a', b"\xff"):
        with journal.open("ab") as file:
            file.write(cut)
        again = open_study(journal)
        assert [one.value for one in again.trials] == [1.0]
        again.tell(again.ask(), 2.0)
        assert [one.value for one in open_study(journal).trials] == [1.0, 2.0]
        journal.write_bytes(before)


def test_a_failed_point_does_not_lose_the_others(train_here: Train, tmp_path: Path) -> None:
    """Too large a unit is refused; another point takes its place when the same command is given again."""
    given = ["-m", "hydra/sweeper=optuna", "optim.batch_tokens=1000,1024", "trainer.max_steps=1"]
    given += ["hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.name=RandomSampler", "run_id=s"]
    done = train_here(*given, "hydra.sweeper.seed=1", expect=2)
    assert_one_line(done.stderr, "of 2 runs failed: point", "optim.batch_tokens=1000 is not a multiple")
    assert "the others went on" in done.stderr
    states = [one.state.name for one in the_study(tmp_path / "outputs").trials]
    assert sorted(set(states)) == ["COMPLETE", "FAIL"]
    assert [sweep["finished"] for sweep in sweeps(tmp_path / "outputs")] == [False]


def test_a_sweep_is_not_gone_on_with_in_another_configuration(train_here: Train, tmp_path: Path) -> None:
    """The same command after a file of conf/ has changed: its runs could not be compared."""
    train_here("-m", "seed=1,2", "trainer.max_steps=1", "run_id=s")
    (record,) = (tmp_path / "outputs" / "sweeps").glob("*/sweep.json")
    content = json.loads(record.read_text())
    content["config"]["optim"]["clip_norm"] = 0.25
    record.write_text(json.dumps(content | {"finished": False}))
    done = train_here("-m", "seed=1,2", "trainer.max_steps=1", "run_id=s", expect=2)
    assert_one_line(
        done.stderr, "optim.clip_norm", "the unfinished sweep s was started with", "0.25", "resume=never"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [[], ["strategy=fsdp", "strategy.strategy.save_distributed_checkpoint=true"]],
    ids=["ddp", "shares"],
)
def test_two_ranks_of_a_bad_point_end_at_the_same_validation(
    forks: Forks, corpus: Path, tmp_path: Path, strategy: list[str]
) -> None:
    """The first one asks the study; both end there, saved, and one of them says so."""
    pair = Pair(forks, corpus, tmp_path)
    journal = pair.folder / "study.journal"
    study = open_study(journal, "minimize")
    study.set_user_attr("pruner", {"name": "MedianPruner", "n_startup_trials": 1})
    good, bad = study.ask(), study.ask()
    for step in (2, 4, 6):
        good.report(-1.0, step)
    study.tell(good, -1.0)
    pair.begin(*STEPS, *strategy, f"study={journal}", f"trial={bad.number}")
    codes, said = pair.end()
    assert codes == [0, 0], said
    run = RunFolder(pair.run)
    assert run.last.is_dir() == bool(strategy)
    assert (run.lineage()["status"], run.lineage()["step"], checkpoint_step(run.last)) == ("pruned", 2, 2)
    assert [(state.last.event, state.last.step) for state in read_states(run.path)] == [("end", 2)] * 2
    assert len(re.findall(r"^.*\bpruned\b.*$", said[0], re.M)) == 1
    assert "pruned" not in said[1]
    assert "warning" not in said[0] + said[1]

    run.write_lineage(
        status="running"
    )  # killed before it could record that it ends here: it is not trained on
    pair.begin(*STEPS, *strategy, f"study={journal}", f"trial={bad.number}")
    codes, said = pair.end()
    assert codes == [0, 0], said
    assert "pruned after 2 steps" in said[0]
    assert (run.lineage()["status"], run.lineage()["step"], checkpoint_step(run.last)) == ("pruned", 2, 2)

    pair.begin(*STEPS, f"study={pair.folder}/gone.journal", "trial=1", "seed=12", "run_id=gone")
    codes, said = pair.end()
    assert codes == [2, 2]
    assert f"study={pair.folder}/gone.journal: no such journal" in error_of(said[0])
    assert "rank 0 of 2" in error_of(said[1])
    assert "no such journal" in error_of(said[1])


# ------------------------------------------------------------------------------------- launchers and files


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(run_train: Callable[..., Any], tmp_path: Path) -> None:
    """Real processes: a grid of which one job fails, and a search with two points at a time."""
    joblib = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *STEPS]
    done = run_train(*joblib, "optim.batch_tokens=1024,1000,2048", "run_id=g", expect=2)
    assert_one_line(done.stderr, "1 of 3 jobs failed: job 1 (optim.batch_tokens=1000)")
    assert [name for name, run in runs(tmp_path / "outputs").items() if run.finished] == ["g-0", "g-2"]

    search = [
        "hydra/sweeper=optuna",
        "optim.lr=x(0.05,2)",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.n_trials=4",
    ]
    run_train(*joblib, *search, "hydra.sweeper.pruner.n_startup_trials=2", "run_id=s")
    study = the_study(tmp_path / "outputs")
    assert len(study.trials) == 4
    assert {one.state for one in study.trials} <= {COMPLETE, PRUNED}
    for one in study.trials:
        assert runs(tmp_path / "outputs")[f"s-{one.number}-seed11"].lineage()["status"] in (
            "finished",
            "pruned",
        )


@pytest.mark.slow
def test_a_signal_lets_all_jobs_of_joblib_save_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path
) -> None:
    """Ctrl-C, which all processes get, and SIGTERM to the first one; a third job waits, and is not begun."""
    given = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2,3", "run_id=j"]
    given += ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "checkpoint_steps=100000"]
    words = command(corpus, tmp_path / "outputs", *given)
    both = [tmp_path / "outputs" / "tiny-1_coarse" / f"j-{number}" for number in (0, 1)]
    steps = [2, 2]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, process_group=0
        )
        until = time.monotonic() + 300
        while not all(last_step(run) >= step for run, step in zip(both, steps, strict=True)):
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 128 + number, said
        assert len(re.findall(r"^stopped: step [\d,]+ is saved", said, re.M)) == 2
        assert said.splitlines()[-1] == "stopped: the same command goes on with the sweep"
        assert "Traceback" not in said
        steps = [checkpoint_step(RunFolder(run).last) + 2 for run in both]
    assert said.count("resuming ") == 3  # the sweep and both runs
    assert sorted(path.name for path in both[0].parent.iterdir()) == [run.name for run in both]


@pytest.mark.slow
def test_ctrl_c_lets_all_jobs_of_submitit_save_and_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """On this machine: submitit's own processes would kill the jobs, and print where they stopped."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    given = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20", "seed=1,2", "run_id=j"]
    given += ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "checkpoint_steps=100000"]
    words = command(corpus, tmp_path / "outputs", *given)
    both = [tmp_path / "outputs" / "tiny-1_coarse" / f"j-{number}" for number in (0, 1)]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=elsewhere(), stderr=subprocess.PIPE, text=True, process_group=0
    )
    until = time.monotonic() + 300
    while not all(last_step(run) >= 2 for run in both):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pids = [json.loads((run / "lock").read_text())["pid"] for run in both]
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, said
    began, last = said.splitlines()
    assert began.startswith("2 jobs side by side on this machine; their logs: ")
    assert last == "stopped: the same command goes on with the sweep"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    for log in (tmp_path / "outputs").glob("sweeps/*/.submitit/*/*.err"):
        (step,) = re.findall(r"^stopped: step (\d+) is saved", log.read_text(), re.M)
        assert int(step) in [checkpoint_step(RunFolder(run).last) for run in both]


@pytest.mark.slow
def test_a_job_of_submitit_that_is_killed_is_one_line_and_the_others_go_on(
    corpus: Path, tmp_path: Path
) -> None:
    """Started outside the clone: a job is killed, one is a mistake; the same command tries both again."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    outputs = tmp_path / "outputs"
    given = ["-m", "hydra/launcher=submitit_local", "optim.batch_tokens=1024,1000,2048", "run_id=k"]
    words = command(corpus, outputs, *given, "trainer.max_steps=200", "trainer.val_check_interval=200")
    gpus = elsewhere(CUDA_VISIBLE_DEVICES="7")
    process = subprocess.Popen(words, cwd=tmp_path, env=gpus, stderr=subprocess.PIPE, text=True)
    victim = outputs / "tiny-1_coarse" / "k-0"
    until = time.monotonic() + 300
    while last_step(victim) < 2:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pid = json.loads((victim / "lock").read_text())["pid"]
    assert b"CUDA_VISIBLE_DEVICES=7" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 2, said
    killed = "its process was killed (perhaps memory ran out); its log: "
    assert_one_line(said, f"2 of 3 jobs failed: job 0 (optim.batch_tokens=1024): {killed}")
    assert_one_line(said, "(1 more for other reasons, see above); the others went on", "tries these again")
    told = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert told[0].startswith(f"failed: job 0: {killed}{outputs}/sweeps/")
    assert Path(told[0].rpartition(": ")[2]).is_file()
    assert told[1].startswith("failed: job 1: optim.batch_tokens=1000 is not a multiple")
    assert {name: run.finished for name, run in runs(outputs).items()} == {"k-0": False, "k-2": True}

    done = subprocess.run(words, cwd=tmp_path, env=elsewhere(), capture_output=True, text=True, timeout=300)
    assert_one_line(done.stderr, "1 of 3 jobs failed: job 1 (optim.batch_tokens=1000)")
    assert runs(outputs)["k-0"].finished


def elsewhere(**variables: str) -> dict[str, str]:
    """The environment of somebody whose Python does not know where plato2 is."""
    return {name: value for name, value in environment(**variables).items() if name != "PYTHONPATH"}


@pytest.mark.parametrize(
    ("log", "outcome", "told"),
    [
        ("tiny step 2/4 loss 5.1\n", None, "was killed (perhaps memory ran out); its log: "),
        (
            None,
            None,
            "was killed (perhaps memory ran out, or hydra.launcher.timeout_min=9 minutes were over)",
        ),
        ("stopped: step 2 is saved\n\n", None, "ended without a result: step 2 is saved; its log: "),
        ("Traceback\nOSError: no room\n", "error", "ended without a result: OSError: no room; its log: "),
    ],
)
def test_what_is_said_of_a_job_without_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: str | None, outcome: str | None, told: str
) -> None:
    local = pytest.importorskip("submitit.local.local", reason="needs the extra slurm")
    job = local.LocalJob(tmp_path, "4711", process=subprocess.Popen(["true"]))
    if log is not None:
        job.paths.stderr.write_text(log)
    if outcome:
        job.paths.result_pickle.write_bytes(pickle.dumps((outcome, log)))
    found = result(job, 3, 9 if log is None else A_YEAR)
    assert found.status == JobStatus.FAILED
    assert str(found._return_value).startswith(f"its process {told}")
    assert str(found._return_value).endswith(str(job.paths.stderr))
    assert capsys.readouterr().err == f"failed: job 3: {found._return_value}\n"


def test_submitits_jobs_need_its_extra_and_have_few_keys(
    train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["-m", "hydra/launcher=submitit_local", "seed=1,2"]
    assert_one_line(
        train_here(*given, "hydra.launcher.nodes=2", expect=2).stderr, "hydra.launcher.nodes: no such key"
    )
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher.submitit_launcher", None)
    assert_one_line(train_here(*given, expect=2).stderr, "hydra/launcher=submitit_local: needs", "[slurm]")


@pytest.mark.slow
def test_the_sweep_files(train_here: Train, tmp_path: Path) -> None:
    """Each as a new user gives it, on a small model; the table of each names its points."""
    outputs = tmp_path / "outputs"
    train_here("stage=1_coarse", "trainer.max_steps=2")
    swept = {"sweep=lr": 3, "sweep=seeds": 5, "sweep=latent_k": 4, "sweep=optuna": 3}
    for number, (file, n_points) in enumerate(swept.items()):
        few = ["hydra.sweeper.n_trials=3"] if file == "sweep=optuna" else []
        done = train_here(
            file, *few, "trainer.max_steps=2", "trainer.val_check_interval=1", f"run_id=n{number}"
        )
        stage = "tiny-2_gen" if file == "sweep=latent_k" else "tiny-1_coarse"
        own = [run for name, run in runs(outputs, stage).items() if name.startswith(f"n{number}-")]
        assert len(own) == n_points, file
        assert {run.lineage()["status"] for run in own} <= {"finished", "pruned"}
        assert f"the sweep n{number}, the best first:" in done.stderr
        assert ("over seeds" in done.stdout) == (file == "sweep=seeds")
    by = [run.lineage()["metrics"]["val/nll_uniform"] for run in runs(outputs, "tiny-2_gen").values()]
    assert len(set(by)) == 4


def test_the_file_for_wandb_trains(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command with values in the place of W&B's variables; `plan=true` composes and builds it all."""
    done = train_here("sweep=optuna", "hydra/sweeper=wandb", "hydra.sweeper.seeds=[1,2]", "plan=true")
    made = yaml.safe_load(done.stdout)
    assert (made["method"], made["metric"]) == ("bayes", {"name": "val/loss", "goal": "minimize"})
    rate = made["parameters"]["optim.lr"]
    assert (rate["distribution"], rate["min"], rate["max"]) == ("log_uniform_values", 1.5e-3 / 4, 1.5e-3 * 4)
    whole = {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 4}
    assert made["parameters"]["optim.warmup_steps"] == whole
    assert made["parameters"]["seed"] == {"values": [1, 2]}
    assert not list(tmp_path.glob("outputs/*"))
    drawn = {key: one.get("values", [one.get("max")])[-1] for key, one in made["parameters"].items()}
    words: list[str] = []
    for word in made["command"]:
        if word == "${args_no_hyphens}":
            words += [f"{key}={value}" for key, value in drawn.items()]
        elif not word.startswith("${"):
            words.append(word)
    assert words[0] == "train.py"
    done = train_here(*words[1:], "logger=csv")
    assert "what the run needs" in done.stdout

    grid = yaml.safe_load(train_here("sweep=lr", "hydra/sweeper=wandb").stdout)
    assert grid["method"] == "grid"
    assert grid["parameters"] == {"optim.lr": {"values": [0.00075, 0.0015, 0.003]}}
    assert shlex.join(grid["command"]).startswith(
        "'${env}' '${interpreter}' train.py hydra.mode=RUN logger=wandb"
    )


@pytest.mark.slow
def test_wandb_sweep_and_agent_train_what_the_file_says(
    train_here: Train, corpus: Path, tmp_path: Path
) -> None:
    """W&B's own commands with a server of ours: it keeps the file, and has drawn two points from it."""
    ranges = ["optim.lr=x(0.25,4)", "optim.warmup_steps=x(0.5,2)", "model.dropout=0.0,0.1"]
    done = train_here("-m", "hydra/sweeper=wandb", *ranges, *STEPS, "hydra.sweeper.seeds=[1,2]")
    file = tmp_path / "sweep.yaml"
    file.write_text(done.stdout)
    drawn: list[dict[str, Any]] = [
        {"model.dropout": 0.0, "optim.lr": 0.0012095798171631064, "optim.warmup_steps": 3, "seed": 2},
        {"model.dropout": 0.1, "optim.lr": 5.173753266542481e-05, "optim.warmup_steps": 2, "seed": 1},
    ]
    with WandbServer() as server:
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server.address}
        online |= {"WANDB_CONFIG_DIR": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "false"}
        online["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

        def wandb(*words: object) -> str:
            given = [sys.executable, "-m", "wandb", *map(str, words)]
            found = subprocess.run(
                given, cwd=ROOT, env=environment(**online), capture_output=True, text=True, timeout=300
            )
            assert found.returncode == 0, found.stderr
            return found.stderr

        told = re.search(r"wandb agent (\S+)", wandb("sweep", "--project", "plato2", file))
        assert told
        assert server.sweeps == {"sweep0": yaml.safe_load(done.stdout)}
        server.points = list(drawn)
        said = wandb("agent", told[1])
    for number, point in zip(("drawn1", "drawn0"), drawn, strict=True):
        kept = server.runs[number]
        assert kept.first["sweep"] == "sweep0"
        assert [row["val/loss"] for row in kept.history.values() if "val/loss" in row][2:], said
        config = kept.config
        assert config["optim"]["value"]["lr"] == point["optim.lr"]
        assert (config["seed"]["value"], config["model"]["value"]["dropout"]) == (
            point["seed"],
            point["model.dropout"],
        )
    trained = [run.lineage() for run in runs(tmp_path / "outputs").values()]
    assert [run["status"] for run in trained] == ["finished", "finished"]
    assert [run["config"]["optim"]["warmup_steps"] for run in trained] == [3, 2]
