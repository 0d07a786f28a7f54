"""`plato2 prepare reddit` makes the same corpus however many processes work at it, and wherever it sorts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import NODES, Run, bytes_in, digest, fatten, index_of, outcome, prepare
from small import assert_one_line

from benchmarks.reddit_dumps import DumpFacts
from plato2.prepare.reddit.rules import RedditRules


def test_a_link_is_followed_to_its_disk(
    small: Callable[..., Path], sound: list[bytes], tmp_path: Path
) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    disk.mkdir()
    out.symlink_to(disk / "mine")
    made = digest(small("out", sound, keep_work=True))
    assert out.is_symlink()
    assert digest(disk / "mine") == made
    assert sorted(path.name for path in disk.iterdir()) == ["mine", "mine.work"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "out.ndjson"]


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "two", dumps.comments, workers=2, memory="150MB", json=True)
    done = run.finish()
    assert outcome(tmp_path / "two") == {**outcome(whole), "index": {**outcome(whole)["index"]}}
    assert digest(tmp_path / "two") == digest(whole)
    summary = json.loads(done.stdout)
    index = index_of(whole)
    assert summary["digest"] == index["digest"]
    assert summary["counts"] == index["facts"]["counts"]
    assert summary["samples"] == {
        split: sum(shard["samples"] for shard in index["splits"][split]["shards"])
        for split in ("train", "valid")
    }
    assert not run.work.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.mark.slow
def test_three_processes_and_several_blocks_a_file(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    """Fields that nobody reads make each file several blocks long; they do not change a sample."""
    fat = [fatten(path, tmp_path / path.name) for path in dumps.comments]
    found = {}
    for workers in (1, 3):
        out = prepare(tmp_path / f"out{workers}", fat, workers=workers, keep_work=True)
        found[workers] = outcome(out)
        assert len([*(tmp_path / f"out{workers}.work").glob(NODES)]) >= 2 * len(fat)
    assert found[1] == found[3]
    assert found[1]["files"] == outcome(whole)["files"]


@pytest.mark.slow
def test_a_sort_that_goes_to_disk(long_dump: Path, tokenizer: str, tmp_path: Path) -> None:
    given = {"tokenizer": tokenizer, "shard_nodes": 3000, "rules": RedditRules.off(), "max_context": 400}
    plenty = prepare(tmp_path / "plenty", [long_dump], memory="2GB", workers=1, keep_work=True, **given)
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "plenty.work").glob(NODES))
    little = {}
    spilled = 0
    for memory in ("4MB", "8MB", "16MB", "32MB", "64MB", "96MB"):
        options = {**given, "rules": None, "no_clean": True, "memory": memory, "workers": 1}
        work = tmp_path / f"{memory}.work"  # cleaned already
        shutil.copytree(
            tmp_path / "plenty.work", work, ignore=shutil.ignore_patterns("shards-*", "repeated-*")
        )
        run = Run(tmp_path / memory, [long_dump], **{k: v for k, v in options.items() if v is not None})
        while run.process.poll() is None:
            spilled = max(spilled, bytes_in(run.work / "duckdb"))
            time.sleep(0.005)
        if run.process.returncode == 2:
            assert_one_line(run.finish(2).stderr, f"--memory {memory}")
        else:
            run.finish()
            little[memory] = outcome(tmp_path / memory)
    assert spilled > 0, f"nothing was spilled of {n_bytes} bytes"
    assert little
    for found in little.values():
        assert found["files"] == outcome(plenty)["files"]
        assert found["index"] == outcome(plenty)["index"]
