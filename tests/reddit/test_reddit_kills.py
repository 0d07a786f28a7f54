"""`plato2 prepare reddit` goes on after kills, signals and dead workers, and nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from preparing import NODES, SHARDS, Run, assert_kept, fatten, finished, outcome, prepare, refused
from small import assert_one_line

from benchmarks.reddit_dumps import DumpFacts
from plato2.prepare.reddit.local import LocalEngine


@pytest.mark.slow
def test_killed_again_and_again(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    """At every stage, always the same work folder until it is done."""
    given = {"workers": 2, "keep_work": True}
    out = tmp_path / "out"
    moments: list[Callable[[Run], object]] = [
        lambda run: run.wait_for(lambda: [*run.work.glob("tokenizer-*/settings.json")]),
        lambda run: run.wait_for(lambda: [*run.work.rglob("*.part")]),
        *(lambda run, n=n: run.wait_for_parts(NODES, n) for n in (1, 4)),  # type: ignore[misc]
        lambda run: run.wait_for(lambda: [*run.work.glob("repeated-*")]),
        *(lambda run, n=n: run.wait_for_parts(SHARDS, n) for n in (1, 8)),  # type: ignore[misc]
        lambda run: run.wait_for((tmp_path / ".out.preparing").exists),
        lambda run: run.wait_for((tmp_path / ".out.preparing" / "card.html").exists),
    ]
    before: dict[str, tuple[int, int]] = {}
    for moment in moments:
        run = Run(out, dumps.comments, **given)
        moment(run)
        run.signal(signal.SIGKILL)
        run.finish(-signal.SIGKILL)
        assert_kept(before, run.work)
        before = finished(run.work)
    assert not out.exists()
    Run(out, dumps.comments, **given).finish()
    assert_kept(before, run.work)
    assert outcome(out) == outcome(whole)
    assert not [*run.work.rglob("*.part"), *tmp_path.glob(".out.preparing")]


@pytest.mark.slow
def test_killed_at_random_times(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    before: dict[str, tuple[int, int]] = {}
    moments = [rng.uniform(0.6, 4) for _ in range(8)]
    for seconds in (*moments, 120):  # the last is to end by itself
        run = Run(tmp_path / "out", dumps.comments, workers=2, keep_work=True)
        try:
            run.process.wait(seconds)
        except subprocess.TimeoutExpired:
            run.signal(signal.SIGKILL)
        code = run.process.wait(60)
        done = run.finish(code)
        assert_kept(before, run.work)
        before = finished(run.work)
        if code == 0 or (tmp_path / "out").exists():  # killed when all was done, but for the process
            break
        assert code == -signal.SIGKILL, done.stderr
    assert outcome(tmp_path / "out") == outcome(whole)


@pytest.mark.slow
def test_ctrl_c_reaches_the_whole_group_and_a_second_run_is_refused(
    dumps: DumpFacts, tokenizer: str, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to all processes of a command, also to workers that are still starting."""
    given = {"workers": 2, "tokenizer": tokenizer, "work": str(tmp_path / "work")}
    run = Run(tmp_path / "out", dumps.comments, **given)
    run.wait_for_workers(2)
    refused(
        str(tmp_path / "work"),
        "another process",
        call=lambda: prepare(tmp_path / "other", dumps.comments, work=str(tmp_path / "work"), workers=1),
    )
    began = time.monotonic()
    run.signal(signal.SIGINT, group=True)
    done = run.finish(130)
    assert time.monotonic() - began < 5
    assert "error" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_at_every_stage(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    before: dict[str, tuple[int, int]] = {}
    for pattern, n in (("*", 1), (NODES, 1), (SHARDS, 1)):
        run = Run(tmp_path / "out", dumps.comments, workers=2, keep_work=True)
        run.wait_for_parts(pattern, n)
        began = time.monotonic()
        run.signal(signal.SIGINT, group=True)
        assert "error" not in run.finish(130).stderr
        assert time.monotonic() - began < 5
        assert_kept(before, run.work)
        before = finished(run.work)
    run = Run(tmp_path / "out", dumps.comments, workers=2, keep_work=True)
    run.finish()
    assert_kept(before, run.work)
    assert outcome(tmp_path / "out") == outcome(whole)


@pytest.mark.slow
def test_ctrl_c_while_the_database_works(long_dump: Path, tokenizer: str, tmp_path: Path) -> None:
    given = {"tokenizer": tokenizer, "shard_nodes": 3000, "no_clean": True, "max_context": 400, "workers": 1}
    for pattern in ("repeated-*", "shards-*"):
        run = Run(tmp_path / "out", [long_dump], rule="max_repeats=3", memory="120MB", **given)
        run.wait_for(lambda: [*run.work.glob(pattern)])  # noqa: B023
        time.sleep(0.03)
        run.signal(signal.SIGINT)
        assert "error" not in run.finish(130, within=30).stderr


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_while_the_database_asks_python_for_rows(after: int, tmp_path: Path) -> None:
    """DuckDB makes an error of its own of the exception; it is an interruption all the same."""
    rows = pa.table({"text_key": [1, 2, 3]})

    def interrupted() -> Iterator[pa.RecordBatch]:
        for n in range(3):
            if n == after:
                signal.raise_signal(signal.SIGINT)
            yield from rows.to_batches()

    reader = pa.RecordBatchReader.from_batches(rows.schema, interrupted())
    with pytest.raises(KeyboardInterrupt), LocalEngine(tmp_path, 1, "100MB")._connection() as connection:
        connection.from_arrow(reader).fetchall()


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_work_in_hand(long_dump: Path, tokenizer: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "out", [long_dump], tokenizer=tokenizer, workers=2, no_clean=True)
    run.wait_for(lambda: [*run.work.glob("nodes-*")])
    run.wait_for_workers(2)
    time.sleep(1.5)
    began = time.monotonic()
    run.signal(signal.SIGINT, group=True)
    run.finish(130)
    assert time.monotonic() - began < 2


@pytest.mark.slow
def test_sigterm_ends_all_processes(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    for group in (False, True):
        run = Run(tmp_path / "out", dumps.comments, workers=2)
        run.wait_for_parts(NODES, 1 + group)
        run.signal(signal.SIGTERM, group)
        run.finish(-signal.SIGTERM)
    Run(tmp_path / "out", dumps.comments, workers=2).finish()
    assert outcome(tmp_path / "out") == outcome(whole)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    big = [fatten(path, tmp_path / path.name) for path in dumps.comments]
    before: dict[str, tuple[int, int]] = {}
    for n in (1, 8):
        run = Run(tmp_path / "out", big, workers=2, keep_work=True)
        run.wait_for_parts(NODES, n)
        os.kill(run.family("spawn_main")[-1], signal.SIGKILL)
        assert_one_line(run.finish(2).stderr, "a worker process died", "run the command again", "--workers 1")
        assert_kept(before, run.work)
        before = finished(run.work)
    Run(tmp_path / "out", big, workers=2, keep_work=True).finish()
    assert_kept(before, run.work)
    assert outcome(tmp_path / "out")["files"] == outcome(whole)["files"]


def test_what_a_kill_left_of_the_database_is_swept_up(
    whole: Path, dumps: DumpFacts, tokenizer: str, tmp_path: Path
) -> None:
    spilled = tmp_path / "out.work" / "duckdb" / "duckdb_temp_4711_0_storage_DEFAULT-0.tmp"
    half = tmp_path / "out.work" / "nodes-1" / "00000.parquet.abc.part"
    for path in (spilled, half):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
    prepare(tmp_path / "out", dumps.comments[:2], tokenizer=tokenizer, workers=1, keep_work=True)
    assert not spilled.exists()
    assert not half.exists()
