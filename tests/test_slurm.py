"""Slurm: signals, arrays, requeue, the order of jobs; slowly with submitit and a real Slurm of one node."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from forks import Forks
from hydra.core.utils import JobReturn, JobStatus
from small import ROOT, Train, assert_one_line, command, environment
from test_resume import Start, assert_same, read_metrics_quietly

from hydra_plugins import plato2_slurm
from hydra_plugins.plato2_slurm import in_order, result
from plato2.runs.folder import RunFolder, requeue, slurm_job
from plato2.runs.traces import folder_of, read_states

START = ROOT.parent / "shared" / "slurm" / "start"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CURRICULUM = "stage=1_coarse,2_gen,2_eval"
DDP = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]


# ------------------------------------------------------------------------------------ what Slurm is told


def program(folder: Path, name: str, lines: str) -> None:
    """A stand-in for one of Slurm's commands."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`scontrol` that notes what it is told, `sbatch` that keeps what it is given, and an `srun`."""
    folder = tmp_path / "bin"
    program(folder, "scontrol", f'echo "$@" >> {tmp_path}/told')
    count = f"n=$(($(ls {tmp_path} | grep -c batch) + 1))"
    program(folder, "sbatch", f'{count}; cat "$1" > {tmp_path}/batch$n; echo "Submitted batch job $n"')
    program(folder, "srun", "exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_they_were")
def test_the_task_of_an_array_is_requeued_not_the_array(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last task's own SLURM_JOB_ID is that of the array."""
    assert slurm_job() is None
    requeue()
    assert not (tmp_path / "told").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    requeue()
    assert (tmp_path / "told").read_text() == "requeue 4711\nrequeue 4711_8\n"
    assert "job 4711_8 is back in the queue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # Slurm's answer

    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit) as ended:
        requeue()
    assert ended.value.code == 0  # or KillOnBadExit would kill the one that asks
    monkeypatch.setenv("SLURM_PROCID", "0")
    program(stand_ins, "scontrol", "echo Job is pending execution for job 4711_8 >&2; exit 1")  # asked before
    requeue()
    assert capsys.readouterr().err == "job 4711_8 is back in the queue\n"
    program(stand_ins, "scontrol", "echo Requested operation is presently disabled >&2; exit 1")
    requeue()
    (stand_ins / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(stand_ins))
    requeue()
    first, second = capsys.readouterr().err.splitlines()
    for line, problem in ((first, "Requested operation is presently disabled"), (second, "No such file")):
        assert line.startswith(
            "warning: job 4711_8 is not back in the queue: scontrol requeue 4711_8 failed ("
        )
        assert problem in line
        assert line.endswith("submit it again, with sbatch --requeue")


def test_a_run_in_an_array_has_its_folder_by_array_and_task(train_here: Train, tmp_path: Path) -> None:
    array = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "8"}
    given = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    assert "new run" in train_here(*given, **array).stderr
    assert "4711_8 is finished: skipped" in train_here(*given, **array).stderr
    assert [path.name for path in (tmp_path / "outputs" / "tiny-1_coarse").iterdir()] == ["4711_8"]


def test_lightning_does_not_requeue(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning import Trainer

    found = []
    fit = Trainer.fit

    def noted(trainer: Trainer, *given: object, **more: object) -> None:
        found.append(trainer._accelerator_connector.cluster_environment)
        fit(trainer, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "fit", noted)
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    train_here("trainer.max_steps=1", "trainer.val_check_interval=1", **task)
    assert [(type(one).__name__, one.auto_requeue) for one in found] == [("SLURMEnvironment", False)]


# -------------------------------------------------------------------------------------- hydra/launcher=slurm


def test_stages_wait_for_those_that_they_start_from() -> None:
    assert in_order([("1_coarse", None), ("2_gen", "1_coarse"), ("2_eval", "1_coarse")]) == [[0], [1, 2]]
    assert in_order([("2_gen", "1_coarse"), ("own", "2_gen"), ("1_coarse", None)]) == [[2], [0], [1]]
    assert in_order([("2_gen", "1_coarse"), ("2_gen", "1_coarse")]) == [[0, 1]]  # from a run that is there
    assert in_order([("1_coarse", None), ("2_gen", None)]) == [[0, 1]]
    assert in_order([("a", "b"), ("b", "a")]) == [[0, 1]]


@pytest.fixture
def batches(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[set[str]]]:
    """The options of all that was submitted; results come at once."""
    submitit = pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setattr(submitit.Job, "done", lambda job: True)
    monkeypatch.setattr(submitit.Job, "results", lambda job: [JobReturn(status=JobStatus.COMPLETED)])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))

    def read() -> list[set[str]]:
        files = sorted(tmp_path.glob("batch*"))
        return [set(re.findall(r"^#SBATCH (\S+)$", file.read_text(), re.M)) for file in files]

    return read


def test_the_curriculum_on_64_gpus(train_here: Train, batches: Callable[[], list[set[str]]]) -> None:
    done = train_here(
        "-m", "hydra/launcher=slurm", CURRICULUM, "strategy=fsdp_64", "hydra.launcher.partition=gpu"
    )
    assert "waiting for Slurm's jobs 1 2_0 2_1" in done.stderr
    first, later = batches()
    both = {"--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8", "--time=1440"}
    both |= {"--signal=USR2@180", "--requeue", "--partition=gpu", "--kill-on-invalid-dep=yes"}
    assert both <= first & later
    assert {"--dependency=afterok:1", "--array=0-1%2"} <= later
    assert not any(option.startswith(("--dependency", "--array")) for option in first)


def test_a_sweep_over_values_is_an_array(train_here: Train, batches: Callable[[], list[set[str]]]) -> None:
    train_here(
        "-m", "hydra/launcher=slurm", "optim.lr=1e-3,2e-3", "strategy=cpu", "hydra.launcher.timeout_min=9"
    )
    (only,) = batches()
    assert {"--nodes=1", "--ntasks-per-node=1", "--array=0-1%2", "--time=9"} <= only
    assert not any(option.startswith(("--dependency", "--gpus")) for option in only)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["hydra/launcher=slurm"], ["hydra/launcher=slurm", "add -m"]),
        (["-m", "hydra/launcher=slurm", "strategy=ddp"], ["strategy.devices=auto", "strategy.devices=8"]),
        (
            ["-m", "hydra/launcher=slurm", "strategy=fsdp_64", "hydra.launcher.nodes=4"],
            ["hydra.launcher.nodes=4", "strategy.num_nodes=8"],
        ),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.partiton=gpu"], ["hydra.launcher.partiton"]),
    ],
)
def test_what_the_launcher_refuses(
    train_here: Train, batches: Callable[[], list[set[str]]], given: list[str], names: list[str]
) -> None:
    assert_one_line(train_here(*given, expect=2).stderr, *names)
    assert not batches()


def test_what_sbatch_refuses_is_one_line(train_here: Train, stand_ins: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra slurm")
    given = ["-m", "hydra/launcher=slurm", "strategy=cpu"]
    program(stand_ins, "sbatch", "echo sbatch: error: invalid partition specified: gpu >&2; exit 1")
    done = train_here(*given, expect=2)
    assert_one_line(done.stderr, "hydra/launcher=slurm", "invalid partition specified: gpu", "partition=NAME")


def test_ctrl_c_ends_the_waiting_and_not_the_jobs(
    train_here: Train, batches: Callable[[], list[set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="needs the extra slurm")

    def interrupted(job: object) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(submitit.Job, "done", interrupted)
    done = train_here("-m", "hydra/launcher=slurm", "seed=1,2", "strategy=cpu", expect=130)
    (last,) = done.stderr.splitlines()[-1:]
    assert last.startswith("stopped: Slurm's jobs 1_0 1_1 go on, scancel ends them; the same command"), last


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["JobState=CANCELLED Reason=DependencyNeverSatisfied"], "never began: the job that it starts from"),
        (["JobState=PENDING Reason=DependencyNeverSatisfied"], "never began: the job that it starts from"),
        (["JobState=OUT_OF_MEMORY Reason=OutOfMemory"], "without a result (OUT_OF_MEMORY, OutOfMemory); its"),
        (["JobState=RUNNING Reason=None", "JobState=NODE_FAIL Reason=None"], "without a result (NODE_FAIL)"),
        (["JobState=TIMEOUT Reason=TimeLimit", "forgotten"], "ended without a result (COMPLETED); its log:"),
    ],
)
def test_no_job_is_waited_for_that_ended_without_a_result(
    stand_ins: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[str],
    told: str,
) -> None:
    """On a cluster without accounts; what Slurm answers in turn, the last of it for ever."""
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="needs the extra slurm")
    monkeypatch.setattr(plato2_slurm, "LOOK_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for number, answer in enumerate([*answers[:-1], *[answers[-1]] * 9]):
        (tmp_path / f"answer{number}").write_text(answer)
    count = f"n=$(ls {tmp_path} | grep -c asked); touch {tmp_path}/asked$n; a=$(cat {tmp_path}/answer$n)"
    no_more = '[ "$a" = forgotten ] && echo "slurm_load_jobs error: Invalid job id specified" >&2 && exit 1'
    program(stand_ins, "scontrol", f"{count}; {no_more}; echo JobId=$4 JobName=train $a")
    program(stand_ins, "sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    found = result(slurm.SlurmJob(tmp_path, "4711"))
    assert found.status == JobStatus.FAILED
    assert str(found._return_value).startswith("Slurm's job 4711 ")
    assert told in str(found._return_value)
    assert capsys.readouterr().err == f"failed: {found._return_value}\n"


def test_a_job_that_is_requeued_is_waited_for(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended at one look and is in the queue at the next; or Slurm does not answer for a while."""
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="needs the extra slurm")
    monkeypatch.setattr(plato2_slurm, "LOOK_S", 0.0)
    states = iter(["RUNNING", "NODE_FAIL", "PENDING", "UNKNOWN", "UNKNOWN", "RUNNING", "COMPLETED"])
    monkeypatch.setattr(plato2_slurm, "state_of", lambda job: (next(states), "None"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    looks = iter(range(100))
    monkeypatch.setattr(slurm.SlurmJob, "done", lambda job: next(looks) == 7)
    monkeypatch.setattr(slurm.SlurmJob, "results", lambda job: ["the result"])
    assert result(slurm.SlurmJob(tmp_path, "4711")) == "the result"


# ---------------------------------------------------------------------------------- submitit, on this machine


@pytest.mark.slow
def test_submitits_signal_saves_and_submitit_leaves_the_rest(
    forks: Forks, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("submitit", reason="needs the extra slurm")
    outputs, whole = tmp_path / "outputs", tmp_path / "whole"
    long = [
        "-m",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=20",
        "trainer.max_steps=100000",
    ]
    long += ["run_id=s", "checkpoint_steps=100000", "trainer.val_check_interval=100000"]
    submitted = subprocess.Popen(
        command(corpus, outputs, *long), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    run = outputs / "tiny-1_coarse" / "s-0"
    wait_for(lambda: last_step(run) >= 2)
    os.kill(json.loads((run / "lock").read_text())["pid"], signal.SIGUSR2)
    _, said = submitted.communicate(timeout=100)
    assert submitted.returncode == 2  # no result: with Slurm, the job would be in the queue
    step = saved_step(run)
    assert_one_line(said, "1 of 1 jobs failed", f"ended without a result: step {step} is saved", "its log: ")
    (log,) = outputs.glob("sweeps/*/.submitit/*/*.err")
    assert f"stopped: step {step} is saved" in log.read_text()
    assert "Caught signal" not in log.read_text()  # submitit's own handler
    more = [*long, f"trainer.max_steps={step + 2}"]
    subprocess.run(command(corpus, outputs, *more), cwd=ROOT, env=environment(), timeout=200, check=True)
    Start(forks, corpus, whole, *more[3:]).finish()
    assert_same(whole / "tiny-1_coarse" / "s", run)


def wait_for(ready: Callable[[], object], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def last_step(run: Path) -> int:
    """The last one on disk; -1 if there is none."""
    rows = read_metrics_quietly(run) if (run / "metrics.csv").exists() else []
    return max((step for step, *_ in rows), default=-1)


def saved_step(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


# ---------------------------------------------------------------------------------------------- a real Slurm


class Slurm:
    """Slurm of one node of two cores, and what the jobs of a test are given."""

    def __init__(self, folder: Path, corpus: Path, *overrides: str) -> None:
        self.folder, self.corpus = folder, corpus
        self.outputs, self.log = folder / "outputs", folder / "log"
        self.log.mkdir()
        experiment = folder / "conf" / "experiment" / "long.yaml"
        experiment.parent.mkdir(parents=True)
        self.experiment = experiment
        self.set_max_steps(100_000)
        given = [f"--config-dir={experiment.parents[1]}", "experiment=long", "checkpoint_steps=100000"]
        self.given = [*given, "trainer.val_check_interval=100000", *overrides]
        self.words = command(corpus, self.outputs, *self.given)[2:]
        path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
        config = {"SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "SBATCH_OUTPUT": f"{self.log}/%A_%a"}
        self.environment = environment(PATH=path, **config)

    def set_max_steps(self, steps: int) -> None:
        """What a job will find that is started, or started again: the command of a job cannot change."""
        text = f"# @package _global_\ndefaults: [smoke, _self_]\ntrainer:\n  max_steps: {steps}\n"
        self.experiment.write_text(text)

    def call(self, *words: object) -> str:
        """A command's output."""
        given = [str(word) for word in words]
        done = subprocess.run(
            given, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def scripts(self, options: str) -> Path:
        """The scripts of examples/, for one process on this node."""
        folder = self.folder / "scripts"
        shutil.copytree(ROOT / "examples" / "slurm", folder)
        text = (folder / "stage.sh").read_text()
        own = "#SBATCH --nodes=1 --ntasks-per-node=1\n#SBATCH --requeue --open-mode=append " + options
        text, n = re.subn(r"#SBATCH --nodes=8.*\n#SBATCH --time=24:00:00 --signal=USR1@180 .*", own, text)
        assert n == 1
        (folder / "stage.sh").write_text(text)
        return folder

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, **expected: str) -> None:
        """Waits until Slurm says this of a job; a requeued one begins at once, not after two minutes."""
        until = time.monotonic() + 400
        while not expected.items() <= (state := self.state(job)).items():
            assert state["JobState"] not in ("FAILED", "TIMEOUT", "CANCELLED"), self.logs()
            told = {key: state.get(key) for key in ("JobState", "Reason", "Restarts", "NodeList")}
            assert time.monotonic() < until, (told, expected, self.call("sinfo", "-N", "-l"), self.logs())
            time.sleep(0.5)

    def wait_until_requeued(self, job: str) -> None:
        """And has not begun again."""
        self.wait(job, JobState="PENDING", Reason="BeginTime", Restarts="1")

    def begin_again(self, job: str) -> None:
        """Spares the two minutes that Slurm waits."""
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def have_three_nodes(self) -> None:
        """Starts Slurm again, with three nodes of one core, all on this machine, that are soon missed.

        Slurm gives a node up that has not answered for `SlurmdTimeout`, 300 seconds by default.
        """
        folder, host = self.folder / "slurm", socket.gethostname().partition(".")[0]
        self.call("scontrol", "shutdown")
        wait_for(lambda: not list(folder.glob("*.pid")))
        config = (folder / "slurm.conf").read_text()
        for old, new in ((f"{folder}/spool", f"{folder}/spool-%n"), (f"{folder}/d.pid", f"{folder}/%n.pid")):
            config = config.replace(old, new)
        config = re.sub("^(NodeName|PartitionName)=.*\n", "", config, flags=re.M) + "SlurmdTimeout=30\n"
        for number in (1, 2, 3):
            config += (
                f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={16820 + number} CPUs=1\n"
            )
        config += "PartitionName=p Nodes=n[1-3] Default=YES MaxTime=INFINITE\n"
        (folder / "slurm.conf").write_text(config)
        self.call("slurmctld", "-c")
        self.start_nodes("n1", "n2", "n3")
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%D %t") == "3 idle\n")

    def start_nodes(self, *names: str) -> None:
        """As when machines are up again."""
        for name in names:
            (self.folder / "slurm" / f"spool-{name}").mkdir(exist_ok=True)
            self.call("slurmd", "-N", name)

    def kill_node(self, job: str, name: str) -> None:
        """Kills Slurm on a node, and what it runs of a job.

        If slurmd came back at once, Slurm would not notice that the node has lost a job that began less than
        20 seconds before (BatchStartTimeout and MessageTimeout), and would ask again half an hour later.
        """
        listed = self.call("scontrol", "listpids", job, name).splitlines()[1:]
        processes = {int(line.split()[0]) for line in listed}
        assert processes
        above = {
            int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes
        }
        node = int((self.folder / "slurm" / f"{name}.pid").read_text())
        for pid in (node, *(above - processes - {1}), *processes):
            with suppress(ProcessLookupError):  # a step ends when another one does
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.log.iterdir()))


@pytest.fixture
def slurm(corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Slurm]]:
    """Starts Slurm, one at a time on this machine."""
    path = f"/usr/sbin:{os.environ['PATH']}"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"needs {missing[0]} (apt-get install slurmctld slurmd slurm-client munge)")
    if not START.exists() or os.geteuid():
        pytest.skip("needs ../shared/slurm (starts a Slurm of one node), and to be root")
    folder = tmp_path / "slurm"
    before = set(pids("munged"))
    with FileLock(Path("/tmp") / "plato2-tests-slurm.lock"):
        subprocess.run([START, folder], env=environment(PATH=path), check=True, timeout=60)
        try:
            yield lambda *overrides: Slurm(tmp_path, corpus, *overrides)
        finally:
            variables = environment(PATH=path, SLURM_CONF=str(folder / "slurm.conf"))
            subprocess.run(["scancel", "--user=root"], env=variables, timeout=60)
            time.sleep(2)
            subprocess.run(["scontrol", "shutdown"], env=variables, timeout=60)  # with all nodes
            subprocess.run([START.with_name("stop"), folder], check=True, timeout=60)
            for pid in set(pids("munged")) - before:
                os.kill(pid, signal.SIGTERM)


def pids(name: str, how: str = "-x") -> list[int]:
    found = subprocess.run(["pgrep", how, name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def documented(start: str) -> list[str]:
    """The command of docs/slurm.md that begins so, without its overrides."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{re.escape(start)}.*$", text, re.M)
    return [word for word in line.split() if "=" not in word or word.startswith("-")]


@pytest.mark.slow
def test_an_array_at_its_time_limit_goes_on_exactly(
    slurm: Callable[..., Slurm], forks: Forks, tmp_path: Path
) -> None:
    """Slurm itself warns, half a minute before the two minutes are over, or up to a minute earlier."""
    one = slurm("stage=1_coarse")
    script = one.scripts("--time=2 --signal=USR1@30") / "stage.sh"
    assert documented("sbatch examples/slurm/stage.sh") == ["sbatch", "examples/slurm/stage.sh"]
    array = one.call("sbatch", "--parsable", "--array=0-1", script, *one.words).strip()
    jobs = [f"{array}_{n}" for n in (0, 1)]
    runs = [one.outputs / "tiny-1_coarse" / job for job in jobs]
    for job in jobs:
        one.wait_until_requeued(job)
    steps = [saved_step(run) for run in runs]
    for job, step in zip(jobs, steps, strict=True):
        assert f"stopped: step {step} is saved" in one.logs()
        assert f"job {job} is back in the queue" in one.logs()
    one.set_max_steps(max(steps) + 3)
    for job in jobs:
        one.begin_again(job)
    for job in jobs:
        one.wait(job, JobState="COMPLETED", Restarts="1")
    more = [*one.given, f"trainer.max_steps={max(steps) + 3}"]
    Start(forks, one.corpus, tmp_path / "whole", *more, RUN_ID="a").finish()
    for run, step in zip(runs, steps, strict=True):
        assert f"resuming {run} from step {step:,}" in one.logs()
        assert_same(tmp_path / "whole" / "tiny-1_coarse" / "a", run)


@pytest.mark.slow
def test_the_curriculum_is_a_chain_of_jobs(slurm: Callable[..., Slurm], forks: Forks, tmp_path: Path) -> None:
    """Stage 1 is preempted, as by `scontrol requeue`; the others wait until it is finished."""
    one = slurm()
    script = one.scripts("--time=20 --signal=USR1@30") / "curriculum.sh"
    (name,) = documented("examples/slurm/curriculum.sh")[1:]
    first, *later = re.findall(r"job (\d+)", one.call(script, name, *one.words))
    run = one.outputs / "tiny-1_coarse" / name
    wait_for(lambda: last_step(run) >= 2)
    assert [one.state(job)["Reason"] for job in later] == ["Dependency"] * 2
    one.call("scontrol", "requeue", first)
    one.wait_until_requeued(first)
    wait_for(lambda: "stopped: step" in one.logs())
    step = saved_step(run)
    one.set_max_steps(step + 3)
    assert [one.state(job)["Reason"] for job in later] == ["Dependency"] * 2
    one.begin_again(first)
    for job in (first, *later):
        one.wait(job, JobState="COMPLETED")
    for stage in ("2_gen", "2_eval"):
        lineage = RunFolder(one.outputs / f"tiny-{stage}" / name).lineage()
        assert (lineage["status"], lineage["parent"]["run"]) == ("finished", str(run))
    more = [*one.given, f"trainer.max_steps={step + 3}", "stage=1_coarse"]
    Start(forks, one.corpus, tmp_path / "whole", *more, RUN_ID="a").finish()
    assert_same(tmp_path / "whole" / "tiny-1_coarse" / "a", run)


@pytest.mark.slow
def test_the_launcher_submits_a_chain_of_two_processes_each(
    slurm: Callable[..., Slurm], tmp_path: Path
) -> None:
    """submitit's USR2 before the time limit reaches both; the job is requeued once, and not by submitit."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    one = slurm(*DDP)
    given = ["-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
    launcher = [*one.given, *given, CURRICULUM, "run_id=s"]
    said = tmp_path / "said"
    with said.open("w") as file:
        waiting = subprocess.Popen(
            command(one.corpus, one.outputs, *launcher), cwd=ROOT, env=one.environment, stderr=file
        )
    run = one.outputs / "tiny-1_coarse" / "s-0"
    wait_for(lambda: last_step(run) >= 2)
    first, *later = re.findall(r"Slurm's jobs (\S+) (\S+) (\S+);", said.read_text())[0]
    assert [one.state(job)["Reason"] for job in later] == ["Dependency"] * 2
    one.call("scancel", "--signal=USR2", first)
    one.wait_until_requeued(first)
    step = saved_step(run)
    one.set_max_steps(step + 3)
    one.begin_again(first)
    assert waiting.wait(timeout=400) == 0, said.read_text()
    assert one.state(first)["Restarts"] == "1"
    logs = "".join(
        path.read_text()
        for path in one.outputs.glob("sweeps/*/.submitit/*/*")
        if path.suffix in (".out", ".err")
    )
    assert logs.count(f"job {first} is back in the queue") == 1
    assert "Caught signal" not in logs
    for stage in ("2_gen", "2_eval"):
        (found,) = (one.outputs / f"tiny-{stage}").iterdir()
        lineage = RunFolder(found).lineage()
        assert (lineage["status"], lineage["parent"]["run"]) == ("finished", str(run))

    whole = [*one.given, "stage=1_coarse", f"trainer.max_steps={step + 3}", "run_id=a"]
    variables = one.environment | {"SLURM_CONF": ""}
    alone = command(one.corpus, tmp_path / "whole", *whole)
    subprocess.run(alone, cwd=tmp_path, env=variables, check=True, timeout=300)
    assert_same(tmp_path / "whole" / "tiny-1_coarse" / "a", run)

    wrong = [*one.given, *given, "stage=1_coarse,2_gen", "run_id=w", "optim.batch_tokens=1000"]
    done = subprocess.run(
        command(one.corpus, one.outputs, *wrong),
        cwd=ROOT,
        env=one.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    failed = ["2 of 2 jobs failed: job 0 (stage=1_coarse)", "Slurm's job", "failed: optim.batch_tokens=1000"]
    assert_one_line(done.stderr, *failed, ".err", "1 more for other reasons")
    assert "never began: the job that it starts from failed" in done.stderr
    assert not one.call("squeue", "-h")  # the second stage has left the queue


def pid_of_rank(run: Path, rank: int) -> int:
    lines = (folder_of(run) / f"rank_{rank}.jsonl").read_text().splitlines()
    return int([json.loads(line) for line in lines if '"pid"' in line][-1]["pid"])


@pytest.mark.slow
def test_a_job_goes_on_exactly_after_a_killed_rank(slurm: Callable[..., Slurm], tmp_path: Path) -> None:
    """The rank that is left asks for the requeue."""
    one = slurm("stage=1_coarse", *DDP, "optim.batch_tokens=2048", "checkpoint_steps=2", "run_id=r")
    script = one.scripts("--time=20 --ntasks-per-node=2 --cpus-per-task=1") / "stage.sh"
    job = one.call("sbatch", "--parsable", script, *one.words).strip()
    run = one.outputs / "tiny-1_coarse" / "r"
    wait_for(lambda: last_step(run) >= 3)
    os.kill(pid_of_rank(run, 1), signal.SIGKILL)
    one.wait_until_requeued(job)
    told = rf"error: rank 1 of 2 on \S+ stopped after step \d+ and does not answer .*job {job} is back in the"
    assert re.search(told, one.logs()), one.logs()
    step = saved_step(run)
    assert step >= 2
    one.set_max_steps(step + 3)
    one.begin_again(job)
    one.wait(job, JobState="COMPLETED", Restarts="1")
    assert f"resuming {run} from step {step:,}" in one.logs()
    assert_same(run_alone(one, tmp_path / "whole", step + 3, *one.given), run)


@pytest.mark.slow
def test_a_job_goes_on_exactly_on_other_machines_when_its_own_die(
    slurm: Callable[..., Slurm], tmp_path: Path
) -> None:
    """The rank on the machine that is left asks for the first requeue. Nothing is left to ask for the second:
    Slurm finds that no node of the job answers any more."""
    given = ["stage=1_coarse", "optim.batch_tokens=2048", "checkpoint_steps=2", "run_id=r"]
    machines = ["strategy=ddp_64", "strategy.accelerator=cpu", "strategy.num_nodes=2", "strategy.devices=1"]
    one = slurm(*given, *machines)
    if "MULTIPLE_SLURMD         = Yes" not in one.call("scontrol", "show", "config"):
        pytest.skip("needs a Slurm that was built with --enable-multiple-slurmd, as Debian's is")
    one.have_three_nodes()
    script = one.scripts("--time=20 --nodes=2 --cpus-per-task=1") / "stage.sh"
    one.environment["MASTER_ADDR"] = "127.0.0.1"  # no name server knows n1
    job = one.call("sbatch", "--parsable", script, *one.words).strip()
    run = one.outputs / "tiny-1_coarse" / "r"
    wait_for(lambda: last_step(run) >= 3)
    assert one.state(job)["NodeList"] == "n[1-2]"
    one.kill_node(job, "n2")
    one.wait(job, JobState="RUNNING", Restarts="1", NodeList="n[1,3]")
    told = rf"error: rank 1 of 2 on \S+ stopped after step \d+ and does not answer .*job {job} is back in the"
    assert re.search(told, one.logs()), one.logs()
    killed_at = saved_step(run)
    assert killed_at >= 2

    wait_for(lambda: last_step(run) >= killed_at + 5)
    for node in ("n1", "n3"):
        one.kill_node(job, node)
    step = saved_step(run)
    one.set_max_steps(step + 3)
    one.wait(job, JobState="PENDING", Restarts="2")
    one.begin_again(job)
    one.start_nodes("n1", "n2")
    one.wait(job, JobState="COMPLETED", Restarts="2", NodeList="n[1-2]")
    for saved in (killed_at, step):
        assert f"resuming {run} from step {saved:,}" in one.logs()
    assert [entry["step"] for entry in RunFolder(run).lineage()["resumed"]] == [killed_at, step]
    plain = [word for word in one.given if word not in machines]
    assert_same(run_alone(one, tmp_path / "whole", step + 3, *plain, *DDP), run)


def run_alone(one: Slurm, outputs: Path, steps: int, *given: str) -> Path:
    """The run that was never stopped, outside Slurm: two processes that Lightning starts."""
    words = command(one.corpus, outputs, *given, f"trainer.max_steps={steps}")
    variables = one.environment | {"SLURM_CONF": ""}
    subprocess.run(words, cwd=one.folder, env=variables, check=True, timeout=300)
    return outputs / "tiny-1_coarse" / "r"


@pytest.mark.slow
def test_a_search_whose_runs_are_slurm_jobs_of_two_processes(slurm: Callable[..., Slurm]) -> None:
    """Two points at a time are an array; both processes of a bad one end at the same validation."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    pytest.importorskip("optuna", reason="needs the extra sweep")
    from plato2.runs.study import JOURNAL, open_study

    one = slurm(*DDP, "trainer.val_check_interval=2")
    one.set_max_steps(6)
    assert "python train.py sweep=optuna hydra/launcher=slurm" in (ROOT / "docs" / "sweeps.md").read_text()
    search = ["-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra/sweeper=optuna"]
    search += ["optim.lr=x(0.05,2)", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "run_id=s"]
    search += ["hydra.sweeper.pruner.n_startup_trials=1"]
    words = command(one.corpus, one.outputs, *one.given, *search)
    done = subprocess.run(words, cwd=ROOT, env=one.environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Slurm's jobs (\S+) (\S+);", done.stderr) == [("1_0", "1_1"), ("3_0", "3_1")]
    (sweep,) = (one.outputs / "sweeps").iterdir()
    trials = open_study(sweep / JOURNAL).trials
    states = {"COMPLETE": "finished", "PRUNED": "pruned"}
    assert {trial.state.name for trial in trials} == {*states}
    for trial in trials:
        run = RunFolder(one.outputs / "tiny-1_coarse" / f"s-{trial.number}-seed11")
        assert run.lineage()["status"] == states[trial.state.name]
        ended = [(state.last.event, state.last.step) for state in read_states(run.path)]
        assert ended == [("end", max(trial.intermediate_values))] * 2
    assert "best: point " in done.stderr
