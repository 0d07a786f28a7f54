"""`plato2 prepare reddit` on a disk that is full: one line that names the disk; with more room it goes on."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from preparing import NODES, Run, assert_kept, bytes_in, digest, finished, outcome, prepare, refused
from small import assert_one_line

from benchmarks.reddit_dumps import DumpFacts
from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 96 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m,mode=777", "plato2-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(disk: Path, n_bytes: int) -> None:
    """Fill the disk up to `n_bytes`."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        file.write(b"\1" * (free - n_bytes))


@pytest.mark.slow
def test_the_disk_of_the_work_folder_is_full(
    dumps: DumpFacts, whole: Path, disk: Path, tmp_path: Path
) -> None:
    """With a little more room each time it comes a little further, until it is done."""
    work = disk / "work"
    stages = []
    before: dict[str, tuple[int, int]] = {}
    for n_pages in [0, 2, 4, 8, *range(10, 400, 15)]:
        leave(disk, n_pages * 4096)
        stage = "none"
        try:
            prepare(tmp_path / "out", dumps.comments, work=str(work), workers=1, keep_work=True)
            break
        except UserError as error:
            message = str(error)
        assert message.startswith(f"the disk of {work} is full (")
        assert "--work" in message
        assert "\n" not in message
        assert not (tmp_path / "out").exists()
        assert not [*work.rglob("*.part")]
        assert_kept(before, work)
        before = finished(work)
        for name in ("tokenizer", "nodes", "repeated", "shards"):
            stage = name if [*work.glob(f"{name}-*")] else stage
        stages.append(stage)
    else:
        raise AssertionError(f"never done: {stages}")
    assert {"tokenizer", "nodes", "shards"} <= {*stages}, stages
    assert_kept(before, work)
    assert outcome(tmp_path / "out") == outcome(whole)


def test_a_worker_meets_the_full_disk(dumps: DumpFacts, tokenizer: str, disk: Path, tmp_path: Path) -> None:
    Tokenizer.load(tokenizer).save(disk / "tokenizer")
    leave(disk, 40 * 4096)
    run = Run(disk / "out", dumps.comments[:3], tokenizer=disk / "tokenizer", workers=2)
    done = run.finish(2)
    assert_one_line(done.stderr, f"the disk of {run.work} is full", "--work")
    if [*run.work.glob(NODES)]:
        assert all(pq.read_metadata(path) for path in run.work.glob(NODES))


@pytest.mark.slow
def test_workers_meet_the_full_disk_at_every_stage(
    dumps: DumpFacts, whole: Path, disk: Path, tmp_path: Path
) -> None:
    before: dict[str, tuple[int, int]] = {}
    stages: Counter[str] = Counter()
    for n_pages in range(5, 400, 30):
        leave(disk, n_pages * 4096)
        run = Run(tmp_path / "out", dumps.comments, workers=2, work=str(disk / "work"), keep_work=True)
        code = run.process.wait(120)
        done = run.finish(code)
        assert_kept(before, disk / "work")
        before = finished(disk / "work")
        if code == 0:
            break
        assert_one_line(done.stderr, f"the disk of {disk / 'work'} is full", "--work")
        stages["shards" if [*run.work.glob("shards-*")] else "nodes"] += 1
    assert stages["shards"]
    assert stages["nodes"]
    assert outcome(tmp_path / "out") == outcome(whole)


def test_the_disk_of_the_corpus_is_full(
    dumps: DumpFacts, whole: Path, tokenizer: str, disk: Path, tmp_path: Path
) -> None:
    given = {"tokenizer": tokenizer, "workers": 1, "keep_work": True, "work": str(tmp_path / "work")}
    for n_pages in (0, 1, 20, 60):
        leave(disk, n_pages * 4096)
        message = refused(
            f"the disk of {disk / 'out'} is full",
            "--out",
            call=lambda: prepare(disk / "out", dumps.comments[:3], **given),
        )
        assert "--work" not in message
        assert not (disk / "out").exists()
        assert not (disk / ".out.preparing").exists()
    (disk / "ballast").unlink()
    before = finished(tmp_path / "work")
    prepare(disk / "out", dumps.comments[:3], **given)
    assert_kept(before, tmp_path / "work")
    digest(disk / "out")


@pytest.mark.slow
def test_the_database_fills_the_disk(long_dump: Path, tokenizer: str, disk: Path, tmp_path: Path) -> None:
    """Its own message says that there is too little memory."""
    workers = 1
    given = {"tokenizer": tokenizer, "no_clean": True, "max_context": 400, "shard_nodes": 3000}
    spilling = None
    out = tmp_path / "out"
    for memory in ("48MB", "64MB", "80MB", "96MB", "128MB"):  # the smallest that it can work with
        plain = {"memory": memory, "workers": workers, "keep_work": True, "work": str(tmp_path / "plain")}
        run = Run(tmp_path / "made", [long_dump], force=True, **plain, **given)
        spilled = 0
        while run.process.poll() is None:
            spilled = max(spilled, bytes_in(run.work / "duckdb"))
            time.sleep(0.003)
        run.finish(run.process.returncode)
        if run.process.returncode == 0:
            spilling = memory if spilled > 500_000 else None
            break
        shutil.rmtree(tmp_path / "plain" / "shards", ignore_errors=True)
    if spilling is None:
        pytest.skip("this version of the database sorts 50 MB in memory, or not at all")
    shutil.copytree(tmp_path / "plain", disk / "work", ignore=shutil.ignore_patterns("shards-*", "duckdb"))
    leave(disk, 20 * 4096)
    on_disk = {"memory": spilling, "workers": workers, "work": str(disk / "work"), **given}
    done = Run(out, [long_dump], **on_disk).finish(2)
    assert_one_line(done.stderr, f"the disk of {disk / 'work'} is full", "--work")
    (disk / "ballast").unlink()
    shutil.move(disk / "work", tmp_path / "work")
    Run(out, [long_dump], **on_disk | {"work": str(tmp_path / "work")}).finish()
    assert outcome(out)["files"] == outcome(tmp_path / "made")["files"]


def test_a_folder_that_cannot_be_written(dumps: DumpFacts, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    for options in ({"work": str(tmp_path / "file" / "work")}, {"work": str(tmp_path / "file")}):
        refused(
            str(tmp_path / "file"),
            call=lambda: prepare(tmp_path / "out", dumps.comments, tokenizer=tokenizer, workers=1, **options),  # noqa: B023
        )
    refused(
        "/proc/x", call=lambda: prepare(Path("/proc/x/out"), dumps.comments, tokenizer=tokenizer, workers=1)
    )
