"""`plato2 prepare reddit`, here and in a process of its own, and what came of it, for the tests of Reddit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from small import ROOT, Done, environment

from plato2.config import UserError
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.pipeline import prepare_reddit

OFFENSIVE = "zorkblat"
RUN = {"vocab_pieces": 500, "shard_nodes": 300, "valid_samples": 40, "test_fraction": 0.0}
SMALL = {"workers": 1, "valid_from": "2011-01-25"}


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
        if (
            hashlib.sha256(
                "\n".join([*parts, *digests["valid"], *digests.get("test", [])]).encode()
            ).hexdigest()
            == stated
        ):
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


STARTING = r"Traceback [^\n]*\n(?:  [^\n]*\n)*?[^\n]*spawn_main\n(?:  [^\n]*\n)*EOFError: [^\n]*\n"
"""What Python says in a worker whose parent is killed while it starts, before any code of ours is in it."""


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

    def wait_for(self, ready: Callable[[], object], every: float = 0.002) -> None:
        until = time.monotonic() + 120
        while not ready():
            assert self.process.poll() is None, f"over too early: {self.finish(self.process.returncode)}"
            assert time.monotonic() < until
            time.sleep(every)

    def wait_for_parts(self, pattern: str, n: int) -> None:
        """Wait until the work folder has `n` files of this kind."""
        self.wait_for(lambda: len([*self.work.glob(pattern)]) >= n, every=0.01)

    def wait_for_workers(self, n: int = 1) -> list[int]:
        self.wait_for(lambda: len(self.family("spawn_main")) >= n, every=0.1)  # /proc takes long to read
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
        if expect == -signal.SIGKILL:
            stderr = re.sub(STARTING, "", stderr)
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


def fatten(path: Path, to: Path) -> Path:
    """The same comments in lines of 60 KB."""
    lines = (
        zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(path.open("rb")).read().splitlines()
    )
    junk = b'{"junk":"' + b"x" * 60_000 + b'",'
    to.write_bytes(zstandard.compress(b"".join(junk + line[1:] + b"\n" for line in lines), 1))
    return to


def bytes_in(folder: Path) -> int:
    """Of the files of a folder, which may come and go meanwhile."""
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                total += path.stat().st_size
    return total


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
        for split in index["splits"]
    }
    assert (
        totals["samples"]
        == written["train"] + facts["n_candidates"] + facts["n_held_out"] + facts["n_removed"]
    )
    assert facts["n_test"] == written.get("test", 0)
    assert facts["n_valid"] == written["valid"]
    assert facts["n_candidates"] >= facts["n_valid"]
    n_lines = sum(file["n_lines"] for file in index["source"]["files"])
    assert n_lines == totals["read"] + facts["n_broken"]
    forums = [*facts["subreddits"].values(), facts["other_subreddits"]]
    assert sum(forum["read"] for forum in forums) == totals["read"]
    assert sum(forum.get("kept", 0) for forum in forums) == sum(facts["kept"].values())
    assert "not accounted for" not in (folder / "card.md").read_text()
