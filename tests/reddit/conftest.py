"""Fixtures of the tests of `plato2 prepare reddit`: dumps, their corpus, and small corpora.

Default runs go through Python where a process of its own proves no more; kills and signals are real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preparing import OFFENSIVE, SMALL, comment, prepare

from benchmarks.reddit_dumps import CLEAN, DumpFacts, write_dumps
from plato2.prepare.reddit import card


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> DumpFacts:
    """Six months with everything that real dumps have."""
    folder = tmp_path_factory.mktemp("reddit") / "dumps"
    return write_dumps(folder, 6000, months=6, submissions=True, offensive_words=[OFFENSIVE])


@pytest.fixture(scope="session")
def whole(dumps: DumpFacts) -> Path:
    """The corpus of these dumps, made without any interruption by one process."""
    return prepare(dumps.comments[0].parent.parent / "whole", dumps.comments, workers=1, keep_work=True)


@pytest.fixture(scope="session")
def tokenizer(whole: Path) -> str:
    """A small tokenizer, so that a run need not train one."""
    return str(whole / "tokenizer")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
