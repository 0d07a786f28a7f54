"""The engine on a cluster: PySpark 4 DataFrames and `mapInArrow`, so Spark Connect is possible.

The choices:

- Only DataFrames, no `sparkContext`. What a task computes it writes itself into the work folder, which all
  machines share: the same files as those of the local engine, so either engine continues where the other
  one stopped. A part is whole or not there and has the same bytes each time: tasks may be retried or run
  twice.
- A task of stage 1 is a whole dump, the largest first: a compressed file has to be read from its beginning.
- In stage 3 `shard % partitions` is the partition (`repartitionById`), so that a task knows its shards.
- This process waits beside Spark, looks which files are there (the progress bars) and takes Ctrl-C.
- What Spark says goes to `spark.log` in the work folder; what a task says to the user comes out as it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import plato2
from plato2.config import UserError, install
from plato2.prepare.reddit.dumps import Dump
from plato2.prepare.reddit.node_parts import (
    Advance,
    NodeJob,
    NodeWriter,
    SampledText,
    SampleJob,
    sample_dump,
)
from plato2.prepare.reddit.rules import lists_sha256
from plato2.prepare.reddit.shard_parts import ShardJob, group_by_shard, write_samples
from plato2.prepare.reddit.work import stage_folder, write_part

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_GET_JAVA = (
    "apt install openjdk-17-jre-headless, or conda install -c conda-forge openjdk=17 (--engine local "
    "needs no Java)"
)
_NO_PYSPARK = f"the Spark engine needs PySpark: {install('spark')}"
_CONFIGURED = ("MASTER", "SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS")
"""With one of these in the environment it is Spark that knows its master."""
_SHARDS_PER_TASK = 64
"""At most, in stage 3: about 2 million nodes or 200 MB."""
_LATE = 90.0
"""Seconds until a network disk shows what another machine has written."""


class SparkEngine:
    """Runs the stages on Spark; a context manager that stops the session it started.

    Args:
        work: the folder of the run, absolute; every executor has it under this path.
        master: such as `local[4]`, `spark://host:7077`, `yarn`, `k8s://...`, `sc://host:15002`; None: as
            Spark is configured, else `local[workers]`.
        conf: settings of Spark; they win over those made here.
        workers: processes of `local[...]` when no master is configured.

    Raises:
        UserError: Java or PySpark is missing, or Spark does not start.
    """

    name = "spark"

    def __init__(self, work: Path, master: str | None, conf: dict[str, str], workers: int) -> None:
        """Start a session, or take the one that is there."""
        try:
            import pandas  # noqa: F401  mapInArrow asks for it
            import pyspark
            from pyspark.sql import SparkSession
        except ImportError:
            raise UserError(_NO_PYSPARK) from None
        warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
        self._work, self._log = work, work / "spark.log"
        self._java: dict[str, str] = {}
        active = SparkSession.getActiveSession()
        master = _master(master, conf, workers) if active is None else None
        self._is_ours = active is None
        self._session: SparkSession = active or self._start(master, conf)
        self.settings = {
            "engine": self.name,
            "master": (master or self._session.conf.get("spark.master") or "").partition(";")[0],  # no token
            "conf": {key: "***" if _is_secret(key) else value for key, value in conf.items()},
        }
        self.versions = {"pyspark": pyspark.__version__, "spark": self._session.version, **self._java}

    def __enter__(self) -> SparkEngine:
        """The session is there already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the session if it is ours; jobs that still run end with it."""
        if self._is_ours:
            with suppress(Exception):  # one that has died says so in many ways
                self._session.stop()

    def sample(self, job: SampleJob, dumps: list[Dump], advance: Advance) -> Iterator[list[SampledText]]:
        """The sampled messages of every dump, by way of the work folder: this process could not hold all."""
        folder = stage_folder(self._work, "sample", [asdict(job), lists_sha256(job.rules)])
        parts = {dump.key: folder / f"{dump.key}.parquet" for dump in dumps}
        there = [dump for dump in dumps if parts[dump.key].exists()]
        advance(sum(dump.size for dump in there))
        missing = [dump for dump in dumps if dump not in there]
        self._each_dump(
            partial(_write_sample, job, str(folder)),
            folder,
            {dump: parts[dump.key] for dump in missing},
            advance,
        )
        for part in parts.values():
            table = pq.read_table(part)
            yield list(zip(table["hash"].to_pylist(), table["text"].to_pylist(), strict=True))

    def make_nodes(self, job: NodeJob, dumps: list[Dump], advance: Advance) -> None:
        """Stage 1: the parts of these dumps."""
        done = {dump: job.parts(dump) / "done.json" for dump in dumps}
        self._each_dump(partial(_write_nodes, job), Path(job.folder), done, advance)

    def find_repeated(self, parts: list[Path], max_repeats: int, out: Path) -> None:
        """Stage 2: the `text_key`s of messages that occur more often; a comment there twice is one."""
        from pyspark.sql import functions as F

        def keys() -> DataFrame:
            nodes = self._read(parts)
            often = nodes.groupBy("text_key").count().where(F.col("count") > max_repeats).select("text_key")
            groups = nodes.join(F.broadcast(often), "text_key", "left_semi").groupBy("text_key")
            ids = groups.agg(F.count_distinct("id").alias("n"))
            return ids.where(F.col("n") > max_repeats).select("text_key")

        def months() -> DataFrame:
            repeated = F.broadcast(self._session.createDataFrame(table))
            return self._read(parts).join(repeated, "text_key", "left_semi").groupBy("month").count()

        table = pa.table({"text_key": pa.array(sorted(row[0] for row in self._collect(keys)), pa.int64())})
        counts = sorted((row[0], row[1]) for row in self._collect(months)) if len(table) else []
        write_part(out, table, {"months": json.dumps(counts).encode()})

    def build_shards(
        self,
        job: ShardJob,
        parts: list[Path],
        repeated: Path | None,
        n_shards: int,
        missing: list[int],
        advance: Advance,
    ) -> None:
        """Stage 3: the samples of the shards in `missing`."""
        from pyspark.sql import functions as F

        def shards() -> DataFrame:
            nodes = self._read(parts).withColumn("shard", F.col("shard_key") % n_shards).drop("shard_key")
            if repeated is not None:
                nodes = nodes.join(F.broadcast(self._read([repeated])), "text_key", "left_anti")
            if len(missing) < n_shards:
                wanted = pa.table({"shard": pa.array(missing, pa.int64())})
                nodes = nodes.join(F.broadcast(self._session.createDataFrame(wanted)), "shard", "left_semi")
            wished = int(self._session.conf.get("spark.sql.shuffle.partitions") or 200)
            n_tasks = min(len(missing), max(wished, -(-len(missing) // _SHARDS_PER_TASK)))
            nodes = nodes.repartitionById(n_tasks, (F.col("shard") % n_tasks).cast("int"))
            task = partial(_write_shards, job, missing, n_tasks)
            return nodes.sortWithinPartitions("shard").mapInArrow(task, "number long, n_nodes long")

        folder = Path(job.folder)
        n_nodes = sum(pq.read_metadata(part).num_rows for part in parts)
        files = {number: folder / f"{number:05d}.json" for number in missing}
        rows = self._collect(shards, dict.fromkeys(files.values(), n_nodes // n_shards), advance)
        written = {row[0] for row in rows}
        self._wait_for(files[number] for number in written)
        schema = pq.read_schema(parts[0])
        for number in missing:
            if number not in written:  # no task met a node of it, because it has none
                write_samples(job, number, schema.empty_table())

    # -- Spark --------------------------------------------------------------------------------------------

    def _start(self, master: str | None, conf: dict[str, str]) -> SparkSession:
        from pyspark.sql import SparkSession

        if master is not None and master.startswith("sc://"):
            builder = SparkSession.builder.remote(master)
            settings = dict(conf)  # ours are of processes that are running already
        else:
            if "PYSPARK_GATEWAY_PORT" not in os.environ:  # else Java has started this process
                self._java = {"java": _java_version()}
            builder = SparkSession.builder if master is None else SparkSession.builder.master(master)
            settings = _defaults(self._work, master) | conf
        for key, value in settings.items():
            builder = builder.config(key, value)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            with _stderr_to(self._log):
                return builder.getOrCreate()
        except Exception as error:  # of PySpark, Py4J, gRPC or the operating system
            self._note(error)
            raise UserError(f"Spark did not start: {self._reason(error)} (more in {self._log})") from error
        finally:
            if on_interrupt is not None and signal.getsignal(signal.SIGINT) is not on_interrupt:
                signal.signal(signal.SIGINT, on_interrupt)  # Spark's own one would outlive Spark

    def _read(self, parts: list[Path]) -> DataFrame:
        """Parquet files that every machine finds on its own disks, whatever Spark's default file system."""
        return self._session.read.parquet(*(f"file://{_without_globs(part)}" for part in parts))

    def _each_dump(
        self, work: Callable[[Dump], None], folder: Path, done: dict[Dump, Path], advance: Advance
    ) -> None:
        """Call `work` for each dump, in a task of its own; afterwards the files in `done` are there."""
        if not done:
            return
        dumps = sorted(done, key=lambda dump: -dump.size)

        def tasks() -> DataFrame:
            numbers = self._session.range(0, len(dumps), 1, len(dumps))
            return numbers.mapInArrow(partial(_do_dumps, work, str(folder), dumps), "key string, bytes long")

        self._collect(tasks, {path: dump.size for dump, path in done.items()}, advance)
        self._wait_for(done.values())

    def _collect(
        self,
        frame: Callable[[], DataFrame],
        files: Mapping[Path, int] | None = None,
        advance: Advance = lambda n: None,
    ) -> list[Any]:
        """The rows of a frame; meanwhile `advance` hears of `files` that have come to be there.

        Spark is called in a thread, so that Ctrl-C ends this one without a word of Py4J.

        Raises:
            UserError: as raised by a task, or the reason why Spark failed.
            OSError: as raised by a task.
        """
        future: Future[list[Any]] = Future()
        Thread(target=_call, args=(future, lambda: frame().collect()), daemon=True).start()
        waiting = dict(files or {})
        pause = 0.2
        while not wait([future], pause).done:
            began = monotonic()
            for path in [path for path in waiting if path.exists()]:
                advance(waiting.pop(path))
            pause = max(0.5, 10 * (monotonic() - began))  # the disk has other work
        error = future.exception()
        if error is None:
            return future.result()
        if found := re.search(rf"{_TaskError.__name__}: (\{{.*\}})", str(error)):
            told = json.loads(found[1])
            if told["errno"] is None:
                raise UserError(told["text"]) from error
            raise OSError(told["errno"], told["text"], told["file"]) from error
        self._note(error)
        raise UserError(
            f"Spark failed: {self._reason(error)} (more in {self._log}); what is finished is "
            "kept: run the command again"
        ) from error

    def _wait_for(self, paths: Iterable[Path]) -> None:
        """See to it that this machine sees what others have written."""
        end = monotonic() + _LATE
        for path in paths:
            while not path.exists():
                if monotonic() > end:
                    raise UserError(f"{path}: an executor wrote it, and it is not here: {_share(self._work)}")
                sleep(0.5)

    def _note(self, error: BaseException) -> None:
        """Keep the whole of an error."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{error}\n")

    def _reason(self, error: BaseException) -> str:
        """The line of an error of Spark that says why."""
        text = str(error)
        if "JAVA_GATEWAY_EXITED" in text:  # what Java said before
            text = self._log.read_text(encoding="utf-8", errors="replace").partition("[JAVA_GATEWAY")[0]
            found = re.findall(
                r"^(?!WARNING|Using|\s|\d\d/\d\d/)(?:Exception in thread \S+ )?(.+)$", text, re.M
            )
            return _short(found[0] if found else "Java ended")
        if "Python worker:" in text:  # a traceback, its last line first
            lines = [line for line in text.splitlines() if line.strip() and "SQLSTATE" not in line]
            cure = "; install plato2 on every executor" if "ModuleNotFoundError" in lines[-1] else ""
            return _short(lines[-1]) + cure
        lost = re.search(r"most recent failure: Lost task .*?\(TID \d+\) \((\S+) executor \S+\): (.*)", text)
        if lost:
            return f"{_short(lost[2])} (on {lost[1]})"
        lines = [line.strip(" :") for line in text.splitlines() if line.strip(" :")]
        useful = [line for line in lines if not line.startswith("An error occurred while calling")]
        return _short((useful or [type(error).__name__])[0])


def _master(master: str | None, conf: dict[str, str], workers: int) -> str | None:
    """The master to ask for; None: Spark knows."""
    master = master or conf.get("spark.master") or os.environ.get("SPARK_REMOTE")
    if master is None and not any(os.environ.get(name) for name in _CONFIGURED):
        return f"local[{workers}]"
    return master


def _java_version() -> str:
    """The version of the Java that Spark will start, such as `17.0.15`."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        raise UserError(f"Spark needs Java 17 or newer and found none: {_GET_JAVA}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "((\d+)[^"]*)"', said)
    if found is not None and int(found[2]) < 17:
        raise UserError(f"Spark needs Java 17 or newer and {java} is {found[1]}: {_GET_JAVA}")
    return found[1] if found else "unknown"


def _defaults(work: Path, master: str | None) -> dict[str, str]:
    """Settings of a new Spark that the user may override."""
    settings = {"spark.app.name": "plato2 prepare reddit", "spark.ui.showConsoleProgress": "false"}
    source = Path(plato2.__file__).resolve().parents[1]
    if source.name not in ("site-packages", "dist-packages"):  # run from a checkout
        settings["spark.executorEnv.PYTHONPATH"] = str(source)
    if master is not None and master.startswith("local"):  # all on this machine: nothing listens outwards
        settings |= {"spark.driver.host": "localhost", "spark.driver.bindAddress": "127.0.0.1"}
        settings |= {"spark.ui.enabled": "false", "spark.local.dir": str(work / "spark")}
        settings |= {"spark.sql.shuffle.partitions": "16"}  # Spark's 200 are for more than one machine
    return settings


def _is_secret(key: str) -> bool:
    """Whether the value of a setting must not be written to the index."""
    return bool(re.search(r"secret|password|token|access.?key|credential", key, re.I))


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """What programs started in the block say goes to a file, for good; our own words only meanwhile."""
    sys.stderr.flush()
    before = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def _call(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _short(line: str) -> str:
    """A line without the names of Java's classes before it."""
    return re.sub(r"^(?:[a-z]\w*\.)+\w+: ", "", line.strip(" :"))[:300]


def _without_globs(path: Path) -> str:
    """A path whose brackets and stars Hadoop takes as they are."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", str(path))


def _share(folder: Path | str) -> str:
    return f"--work ({folder}) must be a folder that this machine and all executors share"


# -- in the workers -----------------------------------------------------------------------------------------


class _TaskError(Exception):
    """What the user has to know, as JSON, on its way through Java to the driver."""


@contextmanager
def _task(folder: str) -> Iterator[None]:
    """Work in a folder that must exist here."""
    try:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not there on {socket.gethostname()}: {_share(Path(folder).parent)}")
        yield
    except UserError as error:
        raise _TaskError(json.dumps({"text": str(error), "errno": None})) from None
    except OSError as error:
        told = {"text": error.strerror or str(error), "errno": error.errno, "file": str(error.filename or "")}
        raise _TaskError(json.dumps(told)) from error


def _do_dumps(
    work: Callable[[Dump], None], folder: str, dumps: list[Dump], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The task of the dumps with these numbers."""
    for batch in batches:
        for dump in [dumps[number] for number in batch.column("id").to_pylist()]:
            with _task(folder):
                work(dump)
            yield pa.RecordBatch.from_pydict({"key": [dump.key], "bytes": [dump.size]})


def _write_nodes(job: NodeJob, dump: Dump) -> None:
    NodeWriter(job).write_dump(dump)


def _write_sample(job: SampleJob, folder: str, dump: Dump) -> None:
    texts = sample_dump(job, dump)
    columns = [pa.array([number for number, _ in texts], pa.int64()), pa.array([text for _, text in texts])]
    table = pa.table([columns[0], columns[1].cast(pa.large_string())], names=["hash", "text"])
    write_part(Path(folder) / f"{dump.key}.parquet", table, {})


def _write_shards(
    job: ShardJob, missing: list[int], n_tasks: int, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The task of the shards that are the same modulo `n_tasks`; without a node it does nothing."""
    several = iter(batches)
    first = next((batch for batch in several if len(batch)), None)
    if first is None:
        return
    mine = first.column("shard")[0].as_py() % n_tasks

    def checked() -> Iterator[pa.RecordBatch]:
        for batch in (first, *several):
            if (batch.column("shard").to_numpy() % n_tasks != mine).any():
                raise AssertionError("Spark merged partitions: a shard may be in several")
            yield batch

    numbers = [number for number in missing if number % n_tasks == mine]
    for number, nodes in group_by_shard(checked(), first.schema, numbers):
        with _task(job.folder):
            write_samples(job, number, nodes)
        yield pa.RecordBatch.from_pydict({"number": np.array([number]), "n_nodes": np.array([len(nodes)])})
