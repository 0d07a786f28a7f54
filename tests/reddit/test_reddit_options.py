"""The options of `plato2 prepare reddit` do what they say, also in a work folder of other settings."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import (
    NODES,
    arguments,
    assert_adds_up,
    comment,
    digest,
    facts_of,
    index_of,
    more_than,
    outcome,
    prepare,
    records,
    refused,
    texts,
)
from small import ROOT
from typer.testing import CliRunner

from benchmarks.reddit_dumps import DumpFacts
from plato2.commands import app
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.reddit.rules import RedditRules
from plato2.prepare.reddit.threads import TreeOptions, build_threads


@pytest.mark.slow
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
    done = CliRunner().invoke(app, arguments(tmp_path / "cli", [path], **given | {"vocab_pieces": 150}))
    assert done.exit_code == 0, done.output
    facts = facts_of(tmp_path / "cli")
    assert facts["counts"]["8. an offensive word"] == 1
    assert facts["counts"]["samples"] > 100
    assert any("。" in text for sample in texts(tmp_path / "cli") for text in sample)
    done = CliRunner().invoke(app, arguments(tmp_path / "x", [path], **given | {"vocab_pieces": None}))
    assert re.search(
        r"the corpus gives [\d,]+ pieces, not 30,000: its models have model.vocab_size=\d+", done.output
    )
