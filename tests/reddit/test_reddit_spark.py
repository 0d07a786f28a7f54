"""The Spark engine: the digest of the local engine, whatever is killed on the way; errors in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from small import ROOT, environment

from benchmarks.reddit_dumps import write_dumps
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.pipeline import prepare_reddit

needs_spark = pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pyspark") is None,
    reason="needs Java 17 (apt install openjdk-17-jre-headless) and PySpark (pip install '.[spark]')",
)
pytestmark = needs_spark
TIMEOUT = 300
"""Seconds; a run takes 15 to 30 on two idle cores."""
CLUSTER = ["--master", "local-cluster[2,1,1024]"]
RETRIES = ["--master", "local[2,4]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SPARK_HOME whose `work` folder, where local-cluster's executors write, is not in site-packages."""
    import pyspark

    folder = tmp_path_factory.mktemp("spark")
    for path in Path(pyspark.__file__).parent.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


class Corpus:
    """Dumps, and what the local engine makes of them."""

    def __init__(self, folder: Path, n_comments: int, months: int) -> None:
        write_dumps(folder, n_comments, months=months, compression="gz", submissions=True)
        self.comments, self.submissions = str(folder / "RC_*"), str(folder / "RS_*")
        self.local = folder / "local"
        sizes = {"vocab_pieces": 500, "shard_nodes": 800, "workers": 1}
        given = {"comments": [self.comments], "submissions": [self.submissions], "out": str(self.local)}
        prepare_reddit(RedditOptions(**given, **sizes), show_progress=False)
        self.digest = digest(self.local)

    def arguments(self, out: Path, *more: str) -> list[str]:
        files = ["--comments", self.comments, "--submissions", self.submissions, "--out", str(out)]
        return [*files, "--vocab-pieces", "500", "--shard-nodes", "800", "--keep-work", *more]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Long enough to be interrupted: each of three dumps takes a worker most of a second."""
    return Corpus(tmp_path_factory.mktemp("dumps"), 12_000, 3)


def digest(folder: Path) -> str:
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))["digest"]


@contextmanager
def started(home: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`plato2 prepare reddit --engine spark`, in a folder and a session of its own."""
    command = [sys.executable, "-m", "plato2", "prepare", "reddit", "--engine", "spark", *arguments]
    process = subprocess.Popen(
        command,
        cwd=home.parent,  # not the checkout: workers have to find plato2 by themselves
        env=environment(SPARK_HOME=str(home), PYTHONPATH=str(ROOT)) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in processes(process.pid):
            kill(pid)
        process.communicate()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes(session: int, *words: str, running: bool = False) -> list[int]:
    """The processes of a session whose command line has these words; `running`: those at work now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            state, _, _, its_session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        is_wanted = int(its_session) == session and all(word in line for word in words)
        if is_wanted and (state == "R" if running else state != "Z"):
            found.append(int(entry.name))
    return found


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """The end of a command; its stderr."""
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, stderr
    return stderr


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def log_of(work: Path) -> str:
    return (work / "spark.log").read_text(encoding="utf-8", errors="replace")


def times(work: Path) -> dict[Path, int]:
    """When each part was written."""
    parts = [*work.glob("nodes-*/*/*.parquet"), *work.glob("shards-*/[0-9]*.json")]
    return {part: part.stat().st_mtime_ns for part in parts}


@pytest.mark.slow
def test_a_cluster_and_an_executor_that_is_killed(home: Path, corpus: Corpus, tmp_path: Path) -> None:
    with started(home, *corpus.arguments(tmp_path / "out", *CLUSTER)) as process:
        work = tmp_path / "out.work"
        wait_until(lambda: list(work.glob("nodes-*/RC*")), process)
        executors = processes(process.pid, "CoarseGrainedExecutorBackend", "java")
        assert len(executors) == 2
        os.kill(executors[0], signal.SIGKILL)
        finish(process)
    assert "Lost executor" in log_of(work)
    assert digest(tmp_path / "out") == corpus.digest


@pytest.mark.slow
def test_python_workers_that_are_killed(home: Path, corpus: Corpus, tmp_path: Path) -> None:
    work = tmp_path / "out.work"

    def n_deaths() -> int:
        return log_of(work).count("ERROR Executor: Exception in task")

    with started(home, *corpus.arguments(tmp_path / "out", *RETRIES)) as process:
        for stage, began in enumerate(["nodes-*", "shards-*/00000.json"]):
            wait_until(lambda began=began: list(work.glob(began)), process)
            assert n_deaths() == stage
            while n_deaths() == stage:  # a worker may be between two tasks
                for pid in processes(process.pid, "pyspark.daemon", running=True)[:1]:
                    kill(pid)
                    time.sleep(0.5)
                assert process.poll() is None
        finish(process)
    assert log_of(work).count("Python worker exited unexpectedly") >= 2
    assert digest(tmp_path / "out") == corpus.digest


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_goes_on(home: Path, corpus: Corpus, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    with started(home, *corpus.arguments(tmp_path / "out")) as process:
        wait_until(lambda: len(list(work.glob("shards-*/[0-9]*.json"))) > 3, process)
        os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while processes(process.pid):
            assert time.monotonic() < end, "Spark outlived its driver"
            time.sleep(0.1)
    finished = times(work)
    assert not (tmp_path / "out").exists()
    shutil.copytree(work, tmp_path / "local.work")
    with started(home, *corpus.arguments(tmp_path / "out", "--master", "local[2]")) as process:
        assert "WARN" not in finish(process)
    engine = json.loads((tmp_path / "out" / "index.json").read_text())["source"]["engine"]
    assert engine == {"engine": "spark", "master": "local[2]", "conf": {}}
    after = times(work)
    assert len(after) > len(finished)
    assert {part: after[part] for part in finished} == finished
    assert digest(tmp_path / "out") == corpus.digest
    more = {"vocab_pieces": 500, "shard_nodes": 800, "keep_work": True, "workers": 1}
    given = {"comments": [corpus.comments], "submissions": [corpus.submissions]}
    prepare_reddit(RedditOptions(**given, out=str(tmp_path / "local"), **more), show_progress=False)
    assert digest(tmp_path / "local") == corpus.digest
    assert set(times(tmp_path / "local.work").values()) > set(finished.values())  # what Spark made stayed


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once(home: Path, corpus: Corpus, tmp_path: Path) -> None:
    with started(home, *corpus.arguments(tmp_path / "out")) as process:
        wait_until(lambda: list((tmp_path / "out.work").glob("nodes-*")), process)
        os.kill(process.pid, signal.SIGINT)
        began = time.monotonic()
        stderr = finish(process, 130)
        assert time.monotonic() - began < 15
    assert "Traceback" not in stderr
    assert not processes(process.pid)


@pytest.mark.slow
def test_a_broken_line_is_named_in_one_line(home: Path, corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "RC_2011-01"
    path.write_text('{"id": "a", "author"\n')
    tokenizer = str(corpus.local / "tokenizer")
    arguments = ["--comments", str(path), "--out", str(tmp_path / "out"), "--tokenizer", tokenizer]
    with started(home, *arguments) as process:
        stderr = finish(process, 2)
    [line] = [line for line in stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: {path}:1: not valid JSON")
    assert "Exception" not in stderr
    assert "Traceback" not in stderr


def test_no_java(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "RC_2011-01"
    path.write_text("{}\n")
    arguments = ["--comments", str(path), "--out", str(tmp_path / "out")]
    with started(home, *arguments, PATH=str(tmp_path), JAVA_HOME="") as process:
        stderr = finish(process, 2)
    assert stderr.startswith("error: Spark needs Java 17")
    assert "openjdk-17-jre-headless" in stderr


@pytest.mark.slow
def test_spark_that_does_not_start(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "RC_2011-01"
    path.write_text("{}\n")
    arguments = ["--comments", str(path), "--out", str(tmp_path / "out"), "--master", "nowhere"]
    with started(home, *arguments) as process:
        stderr = finish(process, 2)
    assert stderr.startswith("error: Spark did not start: Master must")
    assert stderr.count("\n") == 1
