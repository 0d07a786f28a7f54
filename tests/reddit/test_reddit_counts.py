"""`plato2 prepare reddit` loses nothing: what it counts is what the dumps have, made up or real."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from preparing import OFFENSIVE, assert_adds_up, digest, facts_of, index_of, prepare
from small import ROOT, train_in_process
from small import SMALL as SMALL_RUN

from benchmarks.reddit_dumps import QUARANTINED, DumpFacts, Shares, write_dumps
from plato2.data.shards import read_index
from plato2.prepare.reddit.rules import RedditRules

REAL = ROOT.parent / "shared" / "data" / "reddit_pushshift"


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
