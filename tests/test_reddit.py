"""`plato2 prepare reddit` on the local engine, end to end: the same shards whatever happens, nothing lost.

Default runs go through Python where a process of its own proves no more; kills and signals are real ones.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small import ROOT, Done, assert_one_line, environment, train_in_process
from small import SMALL as SMALL_RUN
from typer.testing import CliRunner

from plato2.bench.dumps import (
    CLEAN,
    QUARANTINED,
    DumpFacts,
    Shares,
    deep_thread,
    flip_bytes,
    truncate,
    wide_thread,
    write_dumps,
)
from plato2.config import UserError
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.reddit import card
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.pipeline import prepare_reddit
from plato2.prepare.reddit.rules import RedditRules
from plato2.prepare.reddit.threads import TreeOptions, build_threads

REAL = ROOT.parent / "shared" / "data" / "reddit_pushshift"
OFFENSIVE = "zorkblat"
RUN = {"vocab_pieces": 500, "shard_nodes": 300, "valid_samples": 40}

SMALL = {"workers": 1, "valid_from": "2011-01-25"}

# ------------------------------------------------------------------------------------------------------ dumps


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> DumpFacts:
    """Six months with everything that real dumps have."""
    folder = tmp_path_factory.mktemp("reddit") / "dumps"
    return write_dumps(folder, 6000, months=6, submissions=True, offensive_words=[OFFENSIVE])


@pytest.fixture(scope="module")
def whole(dumps: DumpFacts) -> Path:
    """The corpus of these dumps, made without any interruption by one process."""
    return prepare(dumps.comments[0].parent.parent / "whole", dumps.comments, workers=1, keep_work=True)


@pytest.fixture(scope="module")
def tokenizer(whole: Path) -> str:
    """A small tokenizer, so that a run need not train one."""
    return str(whole / "tokenizer")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of a small dump that break no rule."""
    folder = tmp_path_factory.mktemp("sound")
    facts = write_dumps(folder, 300, months=1, shares=CLEAN, compression="", deepest_chain=20)
    return facts.comments[0].read_bytes().splitlines()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small corpora made in this process get no pictures, which take ten times as long as all the rest."""
    for name in ("draw_lengths", "write_page"):
        monkeypatch.setattr(card, name, lambda path, *_: path.touch())


@pytest.fixture
def small(tmp_path: Path, tokenizer: str) -> Callable[..., Path]:
    """Prepares lines (or files) with the small tokenizer; keyword arguments are options."""

    def run(name: str, comments: list[bytes] | list[Path], **options: Any) -> Path:
        if comments and isinstance(comments[0], bytes):
            path = tmp_path / f"{name}.ndjson"
            path.write_bytes(b"\n".join(comments) + b"\n")  # type: ignore[arg-type]
            comments = [path]
        return prepare(tmp_path / name, comments, **SMALL | {"tokenizer": tokenizer} | options)

    return run


def prepare(out: Path, comments: list[Any], **options: Any) -> Path:
    given = RUN | ({"vocab_pieces": None} if "tokenizer" in options else {}) | {"memory": "200MB"} | options
    made = RedditOptions(comments=[str(path) for path in comments], out=str(out), **given)
    return prepare_reddit(made, show_progress=False)


def refused(*parts: str, call: Callable[[], object]) -> str:
    """The one line that `call` is refused with; it names all `parts`."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def comment(number: int, parent: str, body: str | None, link: str = "t3_zz1", **more: Any) -> bytes:
    record = {
        "id": f"c{number:05d}",
        "parent_id": parent,
        "link_id": link,
        "body": body,
        "author": f"a{number}",
    }
    record |= {"subreddit": "chat", "created_utc": 1_294_000_000 + number} | more
    return json.dumps(record).encode()


# -------------------------------------------------------------------------------------------- what came of it


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())  # type: ignore[no-any-return]


def facts_of(folder: Path) -> dict[str, Any]:
    return index_of(folder)["facts"]  # type: ignore[no-any-return]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a corpus that must not depend on how it was made."""
    index = index_of(folder)
    del index["source"]["prepared"], index["source"]["engine"]
    names = [*folder.glob("*.parquet"), *folder.glob("tokenizer/*"), folder / "subreddits.csv"]
    shas = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    lines = (folder / "card.md").read_text().splitlines()
    card = [line for line in lines if not line.startswith(("- prepared", "- engine"))]
    return {"index": index, "files": shas, "card": card}


def digest(folder: Path) -> str:
    """The digest of the index, which must be that of the samples: it is computed anew."""
    index = read_index(folder)
    digests = {split: [] for split in index.splits}  # type: dict[str, list[str]]
    by_number: dict[int, str] = {}
    for split, shards in index.splits.items():
        for info in shards.shards:
            samples = read_shard(folder, info)
            sha = hashlib.sha256()
            sha.update(np.diff(samples.offsets).astype("<i8").tobytes())
            sha.update(samples.context_len.astype("<i8").tobytes())
            sha.update(samples.token_ids.astype("<u4").tobytes())
            digests[split].append(sha.hexdigest())
            by_number[int(re.findall(r"\d+", info.file)[0])] = sha.hexdigest()
    empty = hashlib.sha256().hexdigest()  # a shard without a training sample has no file
    stated: str = index.extra["digest"]
    counted = len(digests["train"])
    for n_shards in range(counted, counted + 200):
        train = {
            int(re.findall(r"\d+", info.file)[0]): sha
            for info, sha in zip(index.splits["train"].shards, digests["train"], strict=True)
        }
        parts = [train.get(number, empty) for number in range(n_shards)]
        if hashlib.sha256("\n".join([*parts, *digests["valid"]]).encode()).hexdigest() == stated:
            return stated
    raise AssertionError("the digest of the index is not that of the samples")


def records(folder: Path, split: str) -> list[tuple[int, ...]]:
    """(context length, ids) of every sample."""
    index = read_index(folder)
    found = []
    for info in index.splits[split].shards:
        samples = read_shard(folder, info)
        for row, n_context in enumerate(samples.context_len.tolist()):
            ids = samples.token_ids[samples.offsets[row] : samples.offsets[row + 1]]
            found.append((n_context, *ids.tolist()))
    return found


def same_samples(folder: Path, other: Path) -> bool:
    """The same samples, whatever the shard."""
    return all(
        Counter(records(folder, split)) == Counter(records(other, split)) for split in ("train", "valid")
    )


def more_than(folder: Path, other: Path) -> dict[str, int]:
    """What the funnel counts more than that of another corpus."""
    counts, others = (facts_of(path)["counts"] for path in (folder, other))
    return {name: n - others[name] for name, n in counts.items() if n != others[name]}


def texts(folder: Path) -> set[tuple[str, ...]]:
    """The turns of every sample, decoded."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    found = set()
    for split in ("train", "valid"):
        for _, *ids in records(folder, split):
            turns: list[list[int]] = [[]]
            for token in ids:
                if token in (1, 2):  # [CLS] and [SEP]
                    turns.append([])
                else:
                    turns[-1].append(token)
            found.add(tuple(tokenizer.decode(turn) for turn in turns if turn))
    return found


# -------------------------------------------------------------------------------------- a process of its own


def arguments(out: Path, comments: list[Any], **options: Any) -> list[str]:
    given = RUN | ({"vocab_pieces": None} if "tokenizer" in options else {}) | options
    texts = ["prepare", "reddit", "--out", str(out)]
    for path in comments:
        texts += ["--comments", str(path)]
    for key, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            flag = f"--{key.replace('_', '-')}"
            texts += [] if one is None or one is False else [flag] if one is True else [flag, str(one)]
    return texts


class Run:
    """`plato2 prepare reddit`, started; its workers can be found by a mark in their environment."""

    def __init__(self, out: Path, comments: list[Any], **options: Any) -> None:
        self.mark = uuid.uuid4().hex
        out.parent.mkdir(parents=True, exist_ok=True)
        self.work = Path(options.get("work", f"{out}.work"))
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  no pipes: a worker may hold them
        self.process = subprocess.Popen(
            [sys.executable, "-m", "plato2", *arguments(out, comments, **options)],
            env=environment(PLATO2_TEST_MARK=self.mark),
            cwd=ROOT,
            stdout=self._outputs[0],
            stderr=self._outputs[1],
            start_new_session=True,
        )

    def family(self, having: str = "") -> list[int]:
        """Processes of this run (also those whose parent is gone) with this in their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes()
                if marked and having.encode() in (line := (folder / "cmdline").read_bytes()) and line:
                    found.append(int(folder.name))
            except OSError:  # ended meanwhile, or not ours
                continue
        return found

    def wait_for(self, ready: Callable[[], object]) -> None:
        until = time.monotonic() + 120
        while not ready():
            assert self.process.poll() is None, f"over too early: {self.finish(self.process.returncode)}"
            assert time.monotonic() < until
            time.sleep(0.002)

    def wait_for_parts(self, pattern: str, n: int) -> None:
        """Wait until the work folder has `n` files of this kind."""
        self.wait_for(lambda: len([*self.work.glob(pattern)]) >= n)

    def wait_for_workers(self, n: int = 1) -> list[int]:
        self.wait_for(lambda: len(self.family("spawn_main")) >= n)
        return self.family("spawn_main")

    def signal(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def finish(self, expect: int = 0, within: float = 120) -> Done:
        """Wait for the end; within seconds nothing of the run may be left."""
        code = self.process.wait(within)
        until = time.monotonic() + 5
        while (left := self.family()) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "processes that outlive the run"
        for file in self._outputs:
            file.seek(0)
        stdout, stderr = (file.read() for file in self._outputs)
        assert code == expect, f"exit code {code}\n{stdout}\n{stderr}"
        assert "Traceback" not in stderr, stderr
        return Done(code, stdout, stderr)


NODES, SHARDS = "nodes-*/*/*.parquet", "shards-*/[0-9]*.json"
FINISHED = (NODES, "nodes-*/*/done.json", "repeated-*/repeated.parquet", SHARDS)


def finished(work: Path) -> dict[str, tuple[int, int]]:
    """The finished parts of a work folder, and when each was written."""
    paths = [path for pattern in FINISHED for path in work.glob(pattern)]
    for path in work.glob(SHARDS):
        paths += path.parent.glob(f"*-{path.stem}.parquet")
    return {str(p.relative_to(work)): ((s := p.stat()).st_mtime_ns, s.st_ino) for p in paths}


def assert_kept(before: dict[str, tuple[int, int]], work: Path) -> None:
    """No part that was finished has been written again."""
    now = finished(work)
    assert {name: now.get(name) for name in before} == before


# ------------------------------------------------------------------------------- the same, however it is made


def test_a_link_is_followed_to_its_disk(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    disk.mkdir()
    out.symlink_to(disk / "mine")
    Run(out, dumps.comments, keep_work=True).finish()
    assert out.is_symlink()
    assert digest(disk / "mine") == digest(whole)
    assert sorted(path.name for path in disk.iterdir()) == ["mine", "mine.work"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


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


def fatten(path: Path, to: Path) -> Path:
    """The same comments in lines of 60 KB."""
    lines = (
        zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(path.open("rb")).read().splitlines()
    )
    junk = b'{"junk":"' + b"x" * 60_000 + b'",'
    to.write_bytes(zstandard.compress(b"".join(junk + line[1:] + b"\n" for line in lines), 1))
    return to


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
            spilled = max(spilled, sum(p.stat().st_size for p in tolerant_glob(run.work / "duckdb")))
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


def tolerant_glob(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.exists()]
    except OSError:
        return []


@pytest.fixture(scope="module")
def long_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 comments of about 250 ids: 50 MB of nodes."""
    path = tmp_path_factory.mktemp("long") / "RC_2011-03"
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(3000)]
    with path.open("wb") as file:
        for number in range(100_000):
            thread = f"t3_y{number // 20:05d}"
            parent = f"t1_c{number - 1:05d}" if number % 20 else thread
            file.write(comment(number, parent, " ".join(rng.choices(words, k=60)), thread) + b"\n")
    return path


# ----------------------------------------------------------------------------------------- kills and signals


@pytest.mark.slow
def test_killed_twice_and_started_again(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    given = {"workers": 2, "keep_work": True}
    before: dict[str, tuple[int, int]] = {}
    for pattern, n in ((NODES, 2), (SHARDS, 2)):
        run = Run(tmp_path / "out", dumps.comments, **given)
        run.wait_for_parts(pattern, n)
        run.signal(signal.SIGKILL)
        run.finish(-signal.SIGKILL)
        assert_kept(before, run.work)
        before = finished(run.work)
    assert not (tmp_path / "out").exists()
    run = Run(tmp_path / "out", dumps.comments, **given)
    run.finish()
    assert_kept(before, run.work)
    assert outcome(tmp_path / "out") == outcome(whole)
    assert not [*run.work.rglob("*.part")]


@pytest.mark.slow
def test_killed_again_and_again(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    """At every stage, always the same work folder until it is done."""
    given = {"workers": 2, "keep_work": True}
    out = tmp_path / "out"
    moments: list[Callable[[Run], object]] = [
        lambda run: run.wait_for(lambda: [*run.work.glob("tokenizer-*/settings.json")]),
        lambda run: run.wait_for(lambda: [*run.work.rglob("*.part")]),
        *(lambda run, n=n: run.wait_for_parts(NODES, n) for n in (1, 2, 4, 6)),  # type: ignore[misc]
        lambda run: run.wait_for(lambda: [*run.work.glob("repeated-*")]),
        *(lambda run, n=n: run.wait_for_parts(SHARDS, n) for n in (1, 4, 8)),  # type: ignore[misc]
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
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.slow
def test_killed_at_random_times(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    before: dict[str, tuple[int, int]] = {}
    for _ in range(60):
        run = Run(tmp_path / "out", dumps.comments, workers=2, keep_work=True)
        try:
            run.process.wait(rng.uniform(0.6, 6))
        except subprocess.TimeoutExpired:
            run.signal(signal.SIGKILL)
        code = run.process.wait(60)
        run.finish(code)
        assert_kept(before, run.work)
        before = finished(run.work)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcome(tmp_path / "out") == outcome(whole)


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
@pytest.mark.parametrize(("workers", "group"), [(1, False), (2, True)])
def test_ctrl_c_at_every_stage(
    dumps: DumpFacts, whole: Path, tmp_path: Path, workers: int, group: bool
) -> None:
    before: dict[str, tuple[int, int]] = {}
    for pattern, n in (("*", 1), (NODES, 1), (NODES, 4), (SHARDS, 1), (SHARDS, 5)):
        run = Run(tmp_path / "out", dumps.comments, workers=workers, keep_work=True)
        run.wait_for_parts(pattern, n)
        began = time.monotonic()
        run.signal(signal.SIGINT, group)
        assert "error" not in run.finish(130).stderr
        assert time.monotonic() - began < 5
        assert_kept(before, run.work)
        before = finished(run.work)
    run = Run(tmp_path / "out", dumps.comments, workers=workers, keep_work=True)
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


def test_a_worker_that_dies_is_one_line(dumps: DumpFacts, tokenizer: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "out", dumps.comments, tokenizer=tokenizer, workers=2)
    worker = run.wait_for_workers(2)[0]
    os.kill(worker, signal.SIGKILL)
    done = run.finish(2)
    assert_one_line(done.stderr, "a worker process died", "run the command again", "--workers 1")


@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle(dumps: DumpFacts, whole: Path, tmp_path: Path) -> None:
    big = [fatten(path, tmp_path / path.name) for path in dumps.comments]
    before: dict[str, tuple[int, int]] = {}
    for n in (1, 4, 8):
        run = Run(tmp_path / "out", big, workers=2, keep_work=True)
        run.wait_for_parts(NODES, n)
        os.kill(run.family("spawn_main")[-1], signal.SIGKILL)
        assert_one_line(run.finish(2).stderr, "a worker process died")
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


# ------------------------------------------------------------------------------------------------- full disks


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
            spilled = max(spilled, sum(p.stat().st_size for p in tolerant_glob(run.work / "duckdb")))
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


# -------------------------------------------------------------------------------------------------- bad input

Bad = tuple[bytes, str]
BAD_LINES: dict[str, Bad] = {
    "half a line": (b'{"id":"c1","body":"hal', "not valid JSON"),
    "not UTF-8": (
        b'{"id":"c1","link_id":"t3_a","body":"\xff\xfe","created_utc":1300000000}',
        "not valid JSON",
    ),
    "an array": (b"[1, 2]", "not an object"),
    "another object": (b'{"id":"c1","title":"no comment"}', "no body"),
    "no time": (b'{"id":"c1","link_id":"t3_a","body":"so what"}', "created_utc"),
    "a wrong id": (b'{"id":"c-?","link_id":"t3_a","body":"so what","created_utc":1300000000}', "id"),
    "no text but a list": (b'{"id":"c1","link_id":"t3_a","body":["a"],"created_utc":1300000000}', "body"),
    "zeros": (b"\0" * 40, "not valid JSON"),
}


def test_a_broken_line_stops_or_is_counted(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    expected = digest(small("sound", sound))
    for line, says in BAD_LINES.values():
        lines = [*sound[:122], line, *sound[122:]]
        message = refused(
            f"{tmp_path / 'bad.ndjson'}:123: ",
            says,
            "--on-broken skip",
            call=lambda: small("bad", lines),  # noqa: B023
        )
        assert not message.endswith(": ")
    lines = [*sound[:122], *(line for line, _ in BAD_LINES.values()), *sound[122:], b"", b"  "]
    out = small("bad", lines, on_broken="skip")
    assert digest(out) == expected
    facts = facts_of(out)
    assert facts["n_broken"] == len(BAD_LINES)
    assert [example.split(": ")[0] for example in facts["broken_examples"]] == [
        f"{tmp_path / 'bad.ndjson'}:{number}" for number in range(123, 128)
    ]
    assert facts["counts"]["read"] == len(sound)
    assert index_of(out)["source"]["files"][0]["n_lines"] == len(lines)
    card = (out / "card.md").read_text()
    assert f"could not be read | {len(BAD_LINES)} |" in card
    assert f"= messages | {len(sound)} |" in card
    assert "bad.ndjson:123: not valid JSON" in card


def junk(lines: list[bytes]) -> list[bytes]:
    """The same comments, but they do not compress: libraries hand out what they have read in big pieces."""
    rng = random.Random(2)
    return [b'{"junk":"%s",%s' % (rng.randbytes(2500).hex().encode(), line[1:]) for line in lines]


def compressed(lines: list[bytes], path: Path) -> Path:
    data = b"\n".join(lines) + b"\n"
    if path.suffix == ".zst":  # several blocks, so that there is something before a damage
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        pieces = [data[start : start + 30_000] for start in range(0, len(data), 30_000)]
        flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        path.write_bytes(
            b"".join(compressor.compress(p) + compressor.flush(flush) for p in pieces) + compressor.flush()
        )
    else:
        path.write_bytes({".bz2": bz2.compress, ".gz": gzip.compress}[path.suffix](data))
    return path


def readable_part(path: Path) -> list[bytes]:
    """The whole lines that can be read of a truncated file, byte by byte."""
    new = {
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
        ".bz2": bz2.BZ2Decompressor,
        ".gz": lambda: __import__("zlib").decompressobj(wbits=31),
    }
    decompressor = new[path.suffix]()
    found = [decompressor.decompress(bytes([byte])) for byte in path.read_bytes()]
    return b"".join(found).split(b"\n")[:-1]


@pytest.mark.parametrize("ending", ["zst", "gz", "bz2"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_stream(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path, ending: str, damage: str
) -> None:
    sound = junk(sound)
    if ending == "bz2":  # a block of bz2 is 900 KB: several streams, as parallel compressors write
        path = tmp_path / "RC_2011-01.bz2"
        streams = [bz2.compress(b"\n".join(sound[at : at + 50]) + b"\n") for at in range(0, len(sound), 50)]
        path.write_bytes(b"".join(streams))
        expected = sound[:150]
        offset = sum(map(len, streams[:3])) + len(streams[3]) // 2
    else:
        path = compressed(sound, tmp_path / f"RC_2011-01.{ending}")
        expected = []
        offset = int(path.stat().st_size * 0.7)
    if damage == "truncated":
        truncate(path, offset / path.stat().st_size)
    else:
        flip_bytes(path, offset, 20)
    if damage == "truncated" and not expected:
        expected = readable_part(path)
    early = {"valid_from": "2011-01-08"}
    message = refused(str(path), "after line ", "--on-broken skip", call=lambda: small("out", [path]))
    after = int(re.findall(r"after line ([\d,]+)", message)[0].replace(",", ""))
    out = small("out", [path], on_broken="skip", **early)
    facts = facts_of(out)
    n_read = facts["counts"]["read"]
    assert 0 < n_read < len(sound)
    if expected:
        assert n_read == len(expected)
    assert after == n_read + facts["n_broken"]
    (report,) = index_of(out)["source"]["files"]
    assert report["cut"] is not None
    assert report["n_lines"] == after
    assert "1 of 1 files" in (out / "card.md").read_text()
    if expected:
        assert facts["n_broken"] == 0
        assert digest(out) == digest(small("part", expected, **early))


def test_the_checksum_at_the_end_of_a_stream(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    """Then all lines were there, but one of them may be wrong."""
    sound = junk(sound)
    path = compressed(sound, tmp_path / "RC_2011-01.zst")
    flip_bytes(path, -2)
    refused(str(path), "damaged", call=lambda: small("out", [path]))
    out = small("out", [path], on_broken="skip")
    assert 0 < facts_of(out)["counts"]["read"] < len(sound)  # the last piece is not trusted
    assert "damaged" in index_of(out)["source"]["files"][0]["cut"]


def test_files_that_are_no_dumps(sound: list[bytes], small: Callable[..., Path], tmp_path: Path) -> None:
    good = tmp_path / "RC_good"
    good.write_bytes(b"\n".join(sound))
    expected = digest(small("good", [good]))
    png, document, lone = (tmp_path / name for name in ("RC_picture", "RC_x.json", "RC_lone.json"))
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 300)
    document.write_text(json.dumps({"no": "comment", "list": [1, 2]}, indent=1))
    lone.write_text(json.dumps({"no": "comment"}))
    for path, lines in ((png, 602), (document, 7), (lone, 1)):
        message = refused(str(path), "--on-broken skip", call=lambda: small("new", [path, good]))  # noqa: B023
        assert f"{path}:1: " in message
        out = small("out", [path, good], on_broken="skip", force=True)
        assert digest(out) == expected
        n_lines = len(path.read_bytes().split(b"\n"))
        assert 0 < facts_of(out)["n_broken"] <= n_lines <= lines
        refused(str(path), call=lambda: small("only", [path], on_broken="skip"))  # noqa: B023
    for ending in ("zst", "gz", "bz2", "xz"):
        empty = tmp_path / f"RC_empty.{ending}"
        empty.write_bytes(b"")
        refused(str(empty), "no bytes", call=lambda: small("new", [empty, good]))  # noqa: B023
    out = small("out", [tmp_path / "RC_empty.zst", good], on_broken="skip", force=True)
    assert digest(out) == expected
    (tmp_path / "RC_fake.zst").write_bytes(b"this is not compressed")
    refused(
        str(tmp_path / "RC_fake.zst"),
        "after line 0",
        call=lambda: small("out", [tmp_path / "RC_fake.zst"], force=True),
    )


def test_an_empty_month(sound: list[bytes], small: Callable[..., Path], tmp_path: Path) -> None:
    good, plain, packed = (tmp_path / name for name in ("RC_2", "RC_1", "RC_3.zst"))
    good.write_bytes(b"\n".join(sound))
    plain.write_bytes(b"")
    packed.write_bytes(zstandard.compress(b""))
    out = small("out", [plain, good, packed])
    assert digest(out) == digest(small("good", [good]))
    assert [(file["n_lines"], file["cut"]) for file in index_of(out)["source"]["files"]] == [
        (0, None),
        (len(sound), None),
        (0, None),
    ]
    refused(str(plain), "no comment", call=lambda: small("nothing", [plain, packed]))


def test_files_that_are_not_there(small: Callable[..., Path], tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "RC_none.zst", "no such file"),
        (tmp_path / "RC_*.zst", "no such file"),
        (tmp_path, "is a folder"),
    ):
        refused("comments=", str(path), says, call=lambda: small("out", [path]))  # noqa: B023
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_messages_without_text_are_no_errors(sound: list[bytes], small: Callable[..., Path]) -> None:
    bodies = [None, "", "  \n ", "[deleted]", "[removed]", "[deleted by user]"]
    gone = [comment(number, "t3_zz1", body) for number, body in enumerate(bodies)]
    below = comment(50, "t1_c00000", "This answers a message that is gone, so it goes too.")
    out = small("out", [*sound, *gone, below])
    clean = small("sound", sound)
    assert same_samples(out, clean)
    more = more_than(out, clean)
    assert more == {"read": 7, "no text": len(bodies), "no parent in the dumps, or it was removed": 1}
    assert facts_of(out)["n_broken"] == 0


def test_cycles_and_duplicates(sound: list[bytes], small: Callable[..., Path]) -> None:
    text = "A message that nobody has written before, number {}."
    cycle = [comment(n, f"t1_c{(n + 1) % 3:05d}", text.format(n)) for n in range(3)]
    below = [comment(3, "t1_c00000", text.format(3)), comment(4, "t1_c00003", text.format(4))]
    itself = comment(5, "t1_c00005", text.format(5))
    out = small("out", [*sound, *cycle, *below, itself, *sound[:7], sound[-1]])
    clean = small("sound", sound)
    assert same_samples(out, clean)
    assert more_than(out, clean) == {"read": 14, "in or below a cycle": 6, "the same message again": 8}
    assert_adds_up(out)


def test_a_chain_of_5000(small: Callable[..., Path], tmp_path: Path) -> None:
    facts = deep_thread(tmp_path / "dumps", 5000)
    given = {"rules": RedditRules.off(), "max_context": 40, "valid_from": None, "valid_samples": 10_000}
    out = small("out", facts.comments, **given)
    n = sum(len(records(out, split)) for split in ("train", "valid"))
    counts = facts_of(out)["counts"]
    assert n == counts["samples"]
    assert n + counts["its parent is too long for a context"] == 5000 - 1
    assert_adds_up(out)


@pytest.mark.slow
def test_a_thread_of_100_000(small: Callable[..., Path], tmp_path: Path) -> None:
    facts = wide_thread(tmp_path / "dumps", 100_000)
    out = small("out", facts.comments, rules=RedditRules.off(), valid_samples=100_000, valid_from=None)
    counts = facts_of(out)["counts"]
    assert counts["read"] == 100_000
    assert sum(len(records(out, split)) for split in ("train", "valid")) == counts["samples"]
    n_samples = counts["samples"] + counts["its parent is too long for a context"]
    assert n_samples == 100_000 - facts.top_level
    assert_adds_up(out)


# ---------------------------------------------------------------------------------------------------- options


def test_other_settings_in_the_same_work_folder(
    sound: list[bytes], small: Callable[..., Path], tokenizer: str, tmp_path: Path
) -> None:
    """The result is that of a fresh run: no part of other settings or other files is taken."""
    words = tmp_path / "words.txt"
    dump, titles = tmp_path / "RC_2011-01", tmp_path / "RS_2011-01"
    twice = [
        comment(9000 + n, "t3_zz1" if n % 2 else f"t1_c{9001 + n:05d}", "The same words, once and again")
        for n in range(2)
    ]
    answer = comment(9002, "t1_c09001", "Here is an answer to what was said twice.")
    dump.write_bytes(b"\n".join([*sound, *twice, answer]))
    other = Tokenizer.load(tokenizer)
    (tmp_path / "lower").mkdir()
    replace_lower(other, tmp_path / "lower")
    link = json.loads(sound[0])["link_id"]
    titles.write_bytes(
        json.dumps({"id": link[3:], "title": "What do you do?", "created_utc": 1293840000}).encode()
    )
    the, to = "the", "to"
    words.write_text(the)
    steps: list[tuple[dict[str, Any], Callable[[], object]]] = [
        ({}, lambda: None),
        ({"rules": RedditRules(max_chars=80)}, lambda: None),
        ({"rules": RedditRules(max_overlap=0.2)}, lambda: None),
        ({"rules": RedditRules(max_repeats=1)}, lambda: None),
        ({"tokenizer": str(tmp_path / "lower")}, lambda: None),
        ({"rules": RedditRules(offensive_words=str(words))}, lambda: None),
        ({"rules": RedditRules(offensive_words=str(words))}, lambda: words.write_text(to)),
        ({"rules": RedditRules(bots=str(words))}, lambda: words.write_text(json.loads(sound[5])["author"])),
        ({"max_context": 50}, lambda: None),
        ({"cut_turn": True, "max_context": 50}, lambda: None),
        ({"valid_samples": 3}, lambda: None),
        ({"valid_from": "2011-01-20"}, lambda: None),
        ({"shard_nodes": 50}, lambda: None),
        ({"submissions": [str(titles)]}, lambda: None),
        ({}, lambda: rewrite(dump, b"\n".join(sound[10:]))),
        ({"orphans": "root"}, lambda: None),
    ]
    fresh_digests = []
    for step, (options, change) in enumerate(steps):
        change()
        again = small("again", [dump], keep_work=True, force=True, **options)
        fresh = small("fresh", [dump], force=True, **options)
        assert outcome(again) == outcome(fresh), (step, options)
        fresh_digests.append(index_of(fresh)["digest"] + str(index_of(fresh)["splits"]))
    for step, one in enumerate(fresh_digests[:-1]):
        assert one not in fresh_digests[step + 1 :], steps[step][0]  # so each change does change something


def replace_lower(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    (folder / "text.json").write_text('{"lower_case": true}')


def rewrite(path: Path, data: bytes) -> None:
    time.sleep(0.02)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("before", "after"),
    [("what do you", "how do you"), ("我喜欢你", "你好吗"), ("!!", "??")],
    ids=["phrases", "chinese", "signs"],
)
def test_another_word_list_of_the_same_name(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path, before: str, after: str
) -> None:
    words = tmp_path / "words.txt"
    lines = [comment(9000 + 2 * i, "t3_zz1", f"A first message, number {i} of all.") for i in range(4)]
    lines += [
        comment(9001 + 2 * i, f"t1_c{9000 + 2 * i:05d}", f"So {text} think, said number {i}.")
        for i, text in enumerate(("what do you", "how do you", "我喜欢你 as they", "你好吗 as they"))
    ]
    lines += [
        comment(9100 + i, "t1_c09000", f"Well {sign} said somebody to me")
        for i, sign in enumerate(("!!", "??"))
    ]
    made = {}
    for text in (before, after):
        words.write_text(text)
        rules = RedditRules(offensive_words=str(words), min_letters=None)
        made[text] = small(
            text[:3], [*sound, *lines], work=str(tmp_path / "work"), keep_work=True, rules=rules
        )
        fresh = small(f"fresh {text[:3]}", [*sound, *lines], rules=rules)
        assert digest(made[text]) == digest(fresh)
    assert index_of(made[before])["digest"] != index_of(made[after])["digest"]


def test_folders_that_are_there_already(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    out = small("out", sound)
    assert not (tmp_path / "out.work").exists()
    refused(f"out={out}", "force", call=lambda: small("out", sound))
    first = outcome(out)
    assert outcome(small("out", sound, force=True)) == first
    small("out", sound, force=True, keep_work=True)
    assert [*(tmp_path / "out.work").glob(NODES)]
    (out / "notes.txt").write_text("mine")
    refused("notes.txt", call=lambda: small("out", sound, force=True))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    refused(f"out={foreign}", call=lambda: small("foreign", sound, force=True))
    assert (foreign / "notes.txt").read_text() == "mine"


def test_an_interrupted_replacement_leaves_the_old_corpus(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    out = small("out", sound)
    first = outcome(out)
    refused("bad.ndjson", call=lambda: small("bad", [*sound, b"{"]))
    refused("out.ndjson:2", call=lambda: small("out", [sound[0], b"{", *sound[1:]], force=True))
    assert outcome(out) == first


def test_validation_samples_are_those_with_the_lowest_keys(
    dumps: DumpFacts, tokenizer: str, tmp_path: Path
) -> None:
    """The same samples from all nodes at once, chosen by looking at each."""
    day, n_valid = "2011-05-10", 25
    out = prepare(
        tmp_path / "out",
        dumps.comments,
        tokenizer=tokenizer,
        workers=1,
        keep_work=True,
        valid_from=day,
        valid_samples=n_valid,
        shard_nodes=150,
    )
    nodes = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "out.work").glob(NODES)])
    (repeated,) = (tmp_path / "out.work").glob("repeated-*/repeated.parquet")
    gone = {*pq.read_table(repeated).column("text_key").to_pylist()}
    nodes = nodes.filter(pa.array([key not in gone for key in nodes.column("text_key").to_pylist()]))
    samples = build_threads(nodes, TreeOptions())
    limit = int(np.datetime64(day, "s").astype(int))
    before, after = [], []
    for row, (moment, key, n) in enumerate(
        zip(samples.time.tolist(), samples.keys.tolist(), samples.context_len.tolist(), strict=True)
    ):
        record = (n, *samples.token_ids[samples.offsets[row] : samples.offsets[row + 1]].tolist())
        before += [record] * (moment < limit)
        after += [(key, record)] * (moment >= limit)
    assert len(after) > n_valid
    assert records(out, "valid") == [record for _, record in sorted(after)[:n_valid]]
    assert Counter(records(out, "train")) == Counter(before)
    facts = facts_of(out)
    assert (facts["n_candidates"], facts["n_valid"]) == (len(after), n_valid)
    refused(
        "2001-01-01",
        "--valid-from",
        call=lambda: prepare(
            tmp_path / "no", dumps.comments, tokenizer=tokenizer, workers=1, valid_from="2001-01-01"
        ),
    )
    refused(
        "2031-01-01",
        "--valid-from",
        call=lambda: prepare(
            tmp_path / "no", dumps.comments, tokenizer=tokenizer, workers=1, valid_from="2031-01-01"
        ),
    )


def test_orphans_may_be_roots(sound: list[bytes], small: Callable[..., Path]) -> None:
    orphan = comment(9000, "t1_gone", "Nobody knows what this message answers.")
    answer = comment(9001, "t1_c09000", "But this one answers the message above.")
    clean = small("sound", sound)
    dropped = small("dropped", [*sound, orphan, answer])
    rooted = small("rooted", [*sound, orphan, answer], orphans="root")
    assert more_than(dropped, clean) == {
        "read": 2,
        "no parent in the dumps, or it was removed": 1,
        "below such a message": 1,
    }
    removed = ("no parent in the dumps, or it was removed", "below such a message", "in or below a cycle")
    assert not any(facts_of(rooted)["counts"][reason] for reason in removed)
    pair = ("Nobody knows what this message answers.", "But this one answers the message above.")
    assert pair in texts(rooted)
    assert pair not in texts(dropped)


def test_titles_are_roots_and_flag_forums(small: Callable[..., Path], tmp_path: Path) -> None:
    lines, titles = [], []
    for thread in range(40):
        link, forum = f"q{thread:03d}", ("fine", "Flagged")[thread % 2]
        titles.append(
            {
                "id": link,
                "title": f"What do you think of number {thread}?",
                "created_utc": 1_294_000_000 + thread,
                "subreddit": forum,
                "author": f"b{thread}",
                "quarantine": forum == "Flagged" and thread % 4 == 1,
            }
        )
        first = 10 * thread
        for number, parent in ((first, f"t3_{link}"), (first + 1, f"t1_c{first:05d}")):
            text = f"An answer to whoever asked about it, the one numbered {number} here."
            lines.append(
                comment(number, parent, text, f"t3_{link}", subreddit=forum.upper() if thread % 3 else forum)
            )
    path = tmp_path / "RS_2011-03.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, titles)).encode()))
    rules = replace(RedditRules.off(), quarantined="quarantined")
    given = {"rules": rules, "valid_from": "2011-01-02T20:28", "valid_samples": 1000}
    with_titles = small("with", lines, submissions=[str(path)], **given)
    found = texts(with_titles)
    assert found
    numbers = {int(re.findall(r"number (\d+)\?", sample[0])[0]) for sample in found}
    assert numbers == {*range(0, 40, 2)}  # the title opens each, and the whole flagged forum is gone
    assert {len(sample) for sample in found} == {2, 3}
    assert len(found) == 40
    assert facts_of(with_titles)["quarantined"] == ["flagged"]
    assert facts_of(with_titles)["hits"]["2011-01"]["9. a quarantined subreddit"] == 40 + 10
    without = texts(small("without", lines, **given))
    assert {len(sample) for sample in without} == {2}
    assert len(without) == 40
    assert_adds_up(with_titles)
    kinds = [file["kind"] for file in index_of(with_titles)["source"]["files"]]
    assert kinds == ["submissions", "comments"]


def test_chinese(small: Callable[..., Path], tmp_path: Path) -> None:
    rng = random.Random(1)
    characters = "我你他们今天去吃好的东西知道什么时候可以来北京吗喜欢学习工作朋友电影音乐"
    lines = []
    for number in range(300):
        parent = f"t1_c{number - 1:05d}" if number % 3 else "t3_zz1"
        lines.append(
            comment(
                number,
                parent,
                "".join(rng.choices(characters, k=rng.randint(8, 40))) + "。",
                created_utc=1_294_000_000 + 2 * number,
            )
        )
    bad = next(
        word
        for word in (ROOT / "plato2/lists/offensive_zh.txt").read_text().split()
        if not word.isascii() and not word.startswith("#")
    )
    lines.append(comment(900, "t1_c00001", f"我们今天{bad}知道什么时候"))
    path = tmp_path / "RC_zh"
    path.write_bytes(b"\n".join(lines))
    given = {"workers": 1, "language": "zh", "valid_from": "2011-01-02T20:30"}
    done = CliRunner().invoke(app(), arguments(tmp_path / "cli", [path], **given | {"vocab_pieces": 150}))
    assert done.exit_code == 0, done.output
    facts = facts_of(tmp_path / "cli")
    assert facts["counts"]["8. an offensive word"] == 1
    assert facts["counts"]["samples"] > 100
    assert any("。" in text for sample in texts(tmp_path / "cli") for text in sample)
    done = CliRunner().invoke(app(), arguments(tmp_path / "x", [path], **given | {"vocab_pieces": None}))
    assert re.search(
        r"the corpus gives [\d,]+ pieces, not 30,000: its models have model.vocab_size=\d+", done.output
    )


def app() -> Any:
    from plato2.commands import app as commands

    return commands


def test_help_lists_everything() -> None:
    done = CliRunner().invoke(
        app(), ["prepare", "reddit", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )
    assert done.exit_code == 0
    options = [
        name.replace("_", "-") for name in vars(RedditOptions(comments=["x"], out="x")) if name != "rules"
    ]
    renamed = {"spark-master": "master", "spark-conf": "conf"}
    for name in [*(renamed.get(option, option) for option in options), "rule", "no-clean", "json"]:
        assert f"--{name}" in done.output, name
    for rule in vars(RedditRules()):
        assert rule in done.output


WRONG = [
    (["--workers", "0"], ["--workers 0", "at least 1"]),
    (["--workers", "-3"], ["--workers -3", "at least 1"]),
    (["--memory", "nonsense"], ["--memory 'nonsense'", "1GB"]),
    (["--memory", ""], ["--memory ''", "1GB"]),
    (["--memory", "-1GB"], ["--memory '-1GB'", "1GB"]),
    (["--tokenizer", "/nowhere"], ["/nowhere"]),
    (["--vocab-pieces", "3"], ["--vocab-pieces 3", "at least 4"]),
    (["--character-coverage", "0.5"], ["--character-coverage 0.5", "0.98"]),
    (["--tokenizer-messages", "0"], ["--tokenizer-messages 0", "at least 1"]),
    (["--max-context", "2"], ["--max-context 2", "at least 3"]),
    (["--max-context", "70000"], ["--max-context 70000", "at most 65,535"]),
    (["--max-response", "2"], ["--max-response 2", "at least 3"]),
    (["--shard-nodes", "0"], ["--shard-nodes 0", "at least 1"]),
    (["--valid-samples", "0"], ["--valid-samples 0", "at least 1"]),
    (["--valid-from", "yesterday"], ["--valid-from 'yesterday'", "2019-08-01"]),
    (["--language", "fr"], ["--language 'fr'", "en, zh"]),
    (["--rule", "max_chars"], ["--rule max_chars", "NAME=VALUE"]),
    (["--rule", "max_chars=many"], ["--rule max_chars=many", "int or off"]),
    (["--rule", "max_chars=0"], ["max_chars=0", "at least 1"]),
    (["--rule", "fun=1"], ["--rule fun=1", "there is no rule fun"]),
    (["--rule", "min_letters=7"], ["min_letters=7", "between 0 and 1"]),
    (["--rule", "offensive_words=/nowhere"], ["offensive_words", "/nowhere", "cannot be read"]),
    (["--rule", "bots=/nowhere"], ["bots", "/nowhere", "cannot be read"]),
    (["--conf", "executor"], ["--conf executor", "NAME=VALUE"]),
    (["--submissions", "/nowhere/RS_*"], ["--submissions ", "/nowhere/RS_*", "no such file"]),
    (["--out", "s3://bucket/x"], ["--out s3://bucket/x", "folder"]),
    (["--work", "s3://bucket/x"], ["--work s3://bucket/x", "folder"]),
    (["--rule", "max_chars=1"], ["no message to train a tokenizer on", "passes the rules", "--rule"]),
]


@pytest.mark.parametrize(("wrong", "parts"), WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_a_wrong_value_is_one_line(
    sound: list[bytes], tmp_path: Path, wrong: list[str], parts: list[str]
) -> None:
    path = tmp_path / "RC_2011-01"
    path.write_bytes(b"\n".join(sound))
    given = ["prepare", "reddit", "--comments", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    if "pieces" not in wrong[0] and "coverage" not in wrong[0]:
        given += ["--vocab-pieces", "300"]
    done = CliRunner().invoke(app(), [*given, *wrong])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert_one_line(done.stderr, *parts)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        (["--orphans", "adopt"], ["drop", "root"]),
        (["--on-broken", "weep"], ["stop", "skip"]),
        (["--engine", "steam"], ["local", "spark"]),
        (["--workers", "two"], ["--workers"]),
    ],
)
def test_a_value_outside_the_choices(tmp_path: Path, wrong: list[str], allowed: list[str]) -> None:
    """Typer's own message: usage, then what may stand there."""
    done = CliRunner().invoke(
        app(), ["prepare", "reddit", "--comments", "x", "--out", str(tmp_path / "o"), *wrong]
    )
    assert done.exit_code == 2
    for word in [wrong[0], *allowed]:
        assert word in done.stderr


def test_settings_of_spark_change_nothing_for_the_local_engine(
    sound: list[bytes], tokenizer: str, tmp_path: Path
) -> None:
    """They are refused or ignored, but never halfway."""
    path = tmp_path / "RC_2011-01"
    path.write_bytes(b"\n".join(sound))
    given = arguments(tmp_path / "out", [path], tokenizer=tokenizer, workers=1)
    done = CliRunner().invoke(app(), [*given, "--master", "spark://head:7077", "--conf", "spark.x=1"])
    if done.exit_code == 2:
        assert_one_line(done.stderr, "spark")
    else:
        assert done.exit_code == 0, done.output
        digest(tmp_path / "out")


# ------------------------------------------------------------------------------------------ nothing gets lost


def assert_adds_up(folder: Path) -> None:
    """Every message read ends in exactly one line of the funnel, in every month and in all."""
    index, facts = index_of(folder), facts_of(folder)
    totals: Counter[str] = Counter()
    for month in facts["months"].values():
        assert month["read"] == sum(n for name, n in month.items() if name != "read")
        totals.update(month)
    assert {name: n for name, n in facts["counts"].items() if n} == dict(totals)
    written = {
        split: sum(shard["samples"] for shard in index["splits"][split]["shards"])
        for split in ("train", "valid")
    }
    assert totals["samples"] == written["train"] + facts["n_candidates"]
    assert facts["n_valid"] == written["valid"]
    assert facts["n_candidates"] >= facts["n_valid"]
    n_lines = sum(file["n_lines"] for file in index["source"]["files"])
    assert n_lines == totals["read"] + facts["n_broken"]
    forums = [*facts["subreddits"].values(), facts["other_subreddits"]]
    assert sum(forum["read"] for forum in forums) == totals["read"]
    assert sum(forum.get("kept", 0) for forum in forums) == sum(facts["kept"].values())
    assert "not accounted for" not in (folder / "card.md").read_text()


def test_all_counts_add_up(whole: Path, dumps: DumpFacts) -> None:
    assert_adds_up(whole)
    counts = facts_of(whole)["counts"]
    assert counts["read"] == dumps.n_comments + dumps.duplicates
    assert set(facts_of(whole)["months"]) == set(dumps.comments_per_month)


def hits(folder: Path) -> Counter[str]:
    return sum((Counter(month) for month in facts_of(folder)["hits"].values()), Counter[str]())


def test_what_was_planted_is_found(tokenizer: str, tmp_path: Path) -> None:
    shares = Shares(duplicates=0, deleted=0, removed=0, null_bodies=0, offensive=0.004, lone_surrogates=0.003)
    planted = write_dumps(
        tmp_path / "dumps", 4000, months=2, shares=shares, submissions=True, offensive_words=[OFFENSIVE]
    )
    words = tmp_path / "words.txt"
    words.write_text(OFFENSIVE)
    given = {"tokenizer": tokenizer, "workers": 1, "rules": RedditRules(offensive_words=str(words))}
    out = prepare(tmp_path / "out", planted.comments, **given)
    assert_adds_up(out)
    facts = facts_of(out)
    assert {name: month["read"] for name, month in facts["months"].items()} == planted.comments_per_month
    found = hits(out)
    assert found["4. a web address"] == planted.urls
    assert found["5. r/, u/ or an HTML entity"] == planted.special_strings
    assert found["2. more than 1024 characters"] == planted.long_messages
    assert found["8. an offensive word"] == planted.offensive > 0
    assert found["10. written by a bot"] == planted.bots
    assert found["3. under 70% letters"] >= planted.few_letters
    assert found["2. a word over 30 characters"] >= planted.long_words
    assert facts["n_broken"] == 0

    titled = prepare(
        tmp_path / "titled", planted.comments, submissions=list(map(str, planted.submissions)), **given
    )
    assert_adds_up(titled)
    assert facts_of(titled)["counts"]["read"] == planted.n_comments + planted.n_submissions
    lines = b"".join(
        zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(path.open("rb")).read()
        for path in planted.submissions
    ).splitlines()
    n_titles = sum(json.loads(line)["subreddit"] == QUARANTINED for line in lines)
    assert hits(titled)["9. a quarantined subreddit"] == planted.quarantined + n_titles


def test_what_was_planted_in_the_trees_is_found(tokenizer: str, tmp_path: Path) -> None:
    shares = Shares(deleted=0, removed=0, null_bodies=0, missing_links=0, bots=0, cycles=0.001)
    planted = write_dumps(tmp_path / "dumps", 4000, months=3, shares=shares)
    given = {"tokenizer": tokenizer, "workers": 1, "max_context": 3000, "max_response": 3000}
    out = prepare(tmp_path / "out", planted.comments, rules=RedditRules.off(), valid_samples=9999, **given)
    assert_adds_up(out)
    counts = facts_of(out)["counts"]
    assert counts["read"] == planted.n_comments + planted.duplicates
    assert counts["the same message again"] == planted.duplicates
    assert counts["no parent in the dumps, or it was removed"] == planted.missing_parents
    assert counts["first of its tree: context only"] == planted.top_level
    assert counts["in or below a cycle"] >= 2 * planted.cycles > 0
    assert counts["its parent is too long for a context"] == 0

    rules = replace(RedditRules.off(), max_repeats=12)
    often = {text: n for text, n in planted.repeats.items() if n > 12}
    assert 0 < len(often) < len(planted.repeats)
    seldom = prepare(tmp_path / "seldom", planted.comments, rules=rules, **given)
    assert_adds_up(seldom)
    removed = facts_of(seldom)["counts"]["7. repeated more than 12 times"]
    assert sum(often.values()) <= removed <= sum(often.values()) + planted.duplicates


# --------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not REAL.exists():
        pytest.skip("the real comments are not here (shared/data/reddit_pushshift)")
    files = [
        REAL / name
        for name in ("pmaw_comments.ndjson.gz", "praw_comments.ndjson.gz", "arctic_2024-02_comments.ndjson")
    ]
    out = tmp_path_factory.mktemp("real") / "shards"
    return prepare(out, files, workers=1, orphans="root", vocab_pieces=1000, max_context=32, max_response=32)


def test_real_comments_add_up(real: Path) -> None:
    assert_adds_up(real)
    n_lines = 0
    for path in map(Path, (file["path"] for file in index_of(real)["source"]["files"])):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        n_lines += sum(bool(line.strip()) for line in data.splitlines())
    assert facts_of(real)["counts"]["read"] == n_lines
    digest(real)


@pytest.mark.slow
def test_a_model_trains_on_real_comments(real: Path, tmp_path: Path) -> None:
    index = read_index(real)
    given = [
        *(option for option in SMALL_RUN if not option.startswith("model.vocab_size")),
        "model=tiny",
        f"data.path={real}",
        f"model.vocab_size={index.vocab_size}",
        "trainer.max_steps=3",
        "trainer.val_check_interval=3",
        f"output_dir={tmp_path / 'outputs'}",
    ]
    done = train_in_process(given, tmp_path, ROOT / "train.py")
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "outputs").glob("*/*/checkpoints/last.ckpt")]
