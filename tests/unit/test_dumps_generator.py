"""What the made-up dumps claim to have is really in the files, as plain json reads them."""

import bz2
import gzip
import itertools
import json
import lzma
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zstandard

from benchmarks.reddit_dumps import (
    BOTS,
    CLEAN,
    PHRASES,
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
from plato2.prepare.clean import (
    has_long_word,
    has_special_string,
    has_url,
    letter_share,
    overlaps,
)
from plato2.words import split_words

N = 20_000
PLACEHOLDERS = ("[deleted]", "[removed]")
SHARES = Shares(cycles=0.0005, lone_surrogates=0.001)


def read(path: Path) -> list[dict]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data).read()
    elif path.suffix:
        data = {".bz2": bz2, ".xz": lzma, ".gz": gzip}[path.suffix].decompress(data)
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def seconds(line: dict) -> int:
    return int(float(line["created_utc"]))


def month_of(line: dict) -> str:
    return f"{datetime.fromtimestamp(seconds(line), UTC):%Y-%m}"


class Dump:
    """A dump as read: the first line of each comment, by id."""

    def __init__(self, facts: DumpFacts) -> None:
        self.facts = facts
        self.files = [read(path) for path in facts.comments]
        self.lines = [line for file in self.files for line in file]
        self.place: dict[str, int] = {}
        for i, line in enumerate(self.lines):
            self.place.setdefault(line["id"], i)
        self.comments = [self.lines[i] for i in self.place.values()]
        self.texts = [line["body"] for line in self.comments if line["body"] is not None]
        self.parents = {
            line["id"]: line["parent_id"].removeprefix("t1_")
            for line in self.comments
            if line["parent_id"].startswith("t1_")
        }
        self.pairs = {child for child, parent in self.parents.items() if self.parents.get(parent) == child}


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    folder = tmp_path_factory.mktemp("dumps")
    return Dump(write_dumps(folder, N, shares=SHARES, submissions=True, offensive_words=["fudgebucket"]))


@pytest.mark.slow
def test_names_and_counts_of_comments(dump):
    facts = dump.facts
    assert [path.name for path in facts.comments] == ["RC_2011-01.zst", "RC_2011-02.zst", "RC_2011-03.zst"]
    assert facts.n_comments == len(dump.place) == N
    assert facts.duplicates == len(dump.lines) - N
    by_month = Counter(map(month_of, dump.comments))
    assert facts.comments_per_month == dict(sorted(by_month.items()))
    copies: dict[str, list[dict]] = {}
    for line in dump.lines:
        copies.setdefault(line["id"], []).append(line)
    assert all(line == group[0] for group in copies.values() for line in group)
    in_two_files = [
        {line["id"] for line in a} & {line["id"] for line in b} for a, b in itertools.pairwise(dump.files)
    ]
    assert all(in_two_files)
    assert sum(map(len, in_two_files)) < facts.duplicates


@pytest.mark.slow
def test_fields_of_three_generations(dump):
    first, last = dump.files[0][0], dump.files[-1][-1]
    assert isinstance(first["created_utc"], str)
    assert isinstance(first["score"], str)
    assert first["name"] == f"t1_{first['id']}"
    assert "all_awardings" in last
    kinds = Counter(
        (type(line["created_utc"]).__name__, "name" in line, "all_awardings" in line)
        for line in dump.comments
    )
    assert kinds[("str", True, False)] == N * 40 // 100
    assert kinds[("int", False, False)] == N * 45 // 100
    assert kinds[("int", True, True)] > N // 20 < kinds[("float", True, True)]
    assert 600 < dump.facts.n_bytes / N < 1000


def test_lines_stand_in_the_order_of_time_but_for_those_moved(dump):
    behind = 0
    for file in dump.files:
        seen: set[str] = set()
        latest = (0, "")
        for line in file:
            if line["id"] in seen:
                continue
            seen.add(line["id"])
            if line["id"] not in dump.pairs:
                parent = dump.place.get(dump.parents.get(line["id"], ""), -1)
                if parent > dump.place[line["id"]]:
                    behind += 1
                    continue
            assert (seconds(line), line["id"]) > latest
            latest = (seconds(line), line["id"])
    assert behind == dump.facts.out_of_order > 10


def test_structure(dump):
    facts = dump.facts
    missing = [child for child, parent in dump.parents.items() if parent not in dump.place]
    assert facts.missing_parents == len(missing) == N * 0.005
    assert facts.cycles == len(dump.pairs) / 2 > 1
    assert facts.top_level == N - len(dump.parents)
    assert 0.35 < facts.top_level / N < 0.45
    assert facts.missing_links == sum("link_id" not in line for line in dump.comments) == 20
    month = {line["id"]: month_of(line) for line in dump.comments}
    crossings = sum(month[child] > month[parent] for child, parent in dump.parents.items() if parent in month)
    assert facts.month_crossings == crossings > 0
    depth: dict[str, int] = {}
    for line in sorted(dump.comments, key=lambda line: line["id"]):  # a parent's id is smaller
        if line["id"] in dump.pairs:
            continue
        parent = dump.parents.get(line["id"], "")
        if parent not in month or parent in depth:
            depth[line["id"]] = depth.get(parent, 0) + 1
    assert facts.deepest_chain == max(depth.values()) == 150
    links = Counter(line["link_id"] for line in dump.comments if "link_id" in line)
    sizes = sorted(links.values(), reverse=True)
    assert facts.biggest_thread == 2000 >= sizes[0] > 1900
    assert len(links) == facts.n_threads
    assert sum(sizes[: len(sizes) // 100]) > 0.3 * N  # 1 % of the threads
    for child, parent in dump.parents.items():
        if parent in dump.place:
            a, b = (dump.lines[dump.place[id]].get("link_id") for id in (child, parent))
            assert a == b or None in (a, b)


def test_authors_and_forums(dump):
    facts = dump.facts
    authors = Counter(line["author"] for line in dump.comments)
    assert facts.bots == sum(authors[bot] for bot in BOTS) > 100
    assert authors["[deleted]"] == facts.deleted
    assert 20 < authors.most_common(6)[-1][1] < N // 20
    forums = Counter(line["subreddit"] for line in dump.comments)
    assert len(forums) > 20
    assert facts.quarantined == forums[QUARANTINED] > 0


def test_submissions(dump):
    facts = dump.facts
    files = [read(path) for path in facts.submissions]
    assert [path.name for path in facts.submissions] == ["RS_2011-01.zst", "RS_2011-02.zst", "RS_2011-03.zst"]
    submissions = {line["id"]: line for file in files for line in file}
    assert facts.n_submissions == len(submissions) == sum(map(len, files))
    assert all(seconds(a) <= seconds(b) for file in files for a, b in itertools.pairwise(file))
    links = {line["link_id"][3:] for line in dump.comments if "link_id" in line}
    assert submissions.keys() <= links
    assert 0 < len(links) - len(submissions) < 0.05 * len(links)
    for line in dump.comments:
        submission = submissions.get(line.get("link_id", "")[3:])
        if submission:
            assert seconds(submission) <= seconds(line)
            assert submission["subreddit"] == line["subreddit"]
            assert submission["quarantine"] == (line["subreddit"] == QUARANTINED)


def test_planted_texts(dump):
    facts, texts = dump.facts, dump.texts
    assert facts.null_bodies == N - len(texts) == 10
    assert facts.deleted == texts.count("[deleted]") == 1000
    assert facts.removed == texts.count("[removed]") == 200
    said = Counter(texts)
    assert facts.repeats == {phrase: said[phrase] for phrase in PHRASES}
    assert facts.repeats["this"] > 100
    assert not [text for text, times in said.items() if times > 20 and text not in (*PHRASES, *PLACEHOLDERS)]
    assert facts.urls == sum(map(has_url, texts)) == 600
    assert facts.special_strings == sum(map(has_special_string, texts)) == 200
    assert facts.few_letters == sum(letter_share(text) < 0.3 for text in texts) == 100
    assert (
        facts.few_letters <= sum(letter_share(text) < 0.7 for text in texts) <= facts.few_letters + facts.urls
    )
    assert facts.long_words == sum(has_long_word(text, 30) and not has_url(text) for text in texts) == 20
    assert facts.offensive == sum("fudgebucket" in text for text in texts) == 40
    loud = sum(bool(re.search("[A-Z]", text)) and text == text.upper() for text in texts)
    assert facts.shouted == 200 <= loud < 250  # some of the real sentences are loud
    assert facts.lone_surrogates == sum(bool(re.search("[\ud800-\udfff]", text)) for text in texts) == 20
    foreign = sum(not re.sub("[\ud800-\udfff]", "", text).isascii() for text in texts)
    assert foreign == facts.non_ascii + facts.emoji == 600
    assert facts.long_messages == sum(len(text) > 1024 for text in texts) > 20
    assert sum("\n\n" in text for text in texts) > N // 50
    assert sum('"' in text for text in texts) > 50


def test_quotes_overlap_with_the_parent(dump):
    quoting = [line for line in dump.comments if line["body"] and line["body"].startswith("> ")]
    assert dump.facts.quotes == len(quoting) > N // 100
    for line in quoting:
        parent = dump.lines[dump.place[line["parent_id"][3:]]]["body"]
        assert overlaps(split_words(line["body"]), split_words(parent), 0.8)


def test_lengths(dump):
    texts = [text for text in dump.texts if text not in PLACEHOLDERS]
    lengths = sorted(map(len, texts))
    assert 110 < sum(lengths) / len(lengths) < 130
    assert 60 < lengths[len(lengths) // 2] < 100
    assert lengths[-1] > 2000


def test_raw_and_escaped_characters_both_occur(tmp_path):
    (path,) = write_dumps(tmp_path, 3000, months=1, compression="").comments
    data = path.read_bytes()
    assert not data.isascii()
    assert re.search(rb"\\u[0-9a-f]{4}", data)


@pytest.mark.parametrize("compression", ["zst", "bz2", "xz", "gz", ""])
def test_the_same_arguments_write_the_same_bytes(tmp_path, compression):
    kinds = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        facts = write_dumps(
            tmp_path / name, 500, seed=seed, months=2, first_month="2012-12", compression=compression
        )
        kinds[name] = [path.read_bytes() for path in facts.comments]
    ending = f".{compression}" if compression else ""
    assert [path.name for path in facts.comments] == [f"RC_2012-12{ending}", f"RC_2013-01{ending}"]
    assert kinds["a"] == kinds["b"] != kinds["c"]
    assert sum(map(len, map(read, facts.comments))) == 500 + facts.duplicates


def test_zst_demands_a_window_of_2_gib(tmp_path):
    (path,) = write_dumps(tmp_path, 100, months=1).comments
    data = path.read_bytes()
    assert zstandard.get_frame_parameters(data).window_size == 2**31
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().stream_reader(data).read(1)


def test_every_share_above_0_plants_something(tmp_path):
    facts = write_dumps(tmp_path, 400, offensive_words=["fudgebucket"], shares=SHARES)
    assert min(facts.missing_parents, facts.cycles, facts.out_of_order, facts.duplicates, facts.quotes) >= 1
    assert min(facts.null_bodies, facts.long_words, facts.offensive, facts.missing_links, facts.bots) >= 1


def test_deep_and_wide_threads(tmp_path):
    deep = Dump(deep_thread(tmp_path / "deep", 5000))
    assert (
        deep.facts.deepest_chain == deep.facts.n_comments == len(deep.lines) == len(deep.parents) + 1 == 5000
    )
    assert all(
        parent == before["id"] for parent, before in zip(deep.parents.values(), deep.lines, strict=False)
    )
    wide = wide_thread(tmp_path / "wide", 20_000)
    assert (wide.biggest_thread, wide.n_threads, wide.missing_parents) == (20_000, 1, 0)
    assert len({line["link_id"] for line in read(wide.comments[0])}) == 1


def test_damage(tmp_path):
    (path,) = write_dumps(tmp_path, 2000, months=1, compression="", shares=CLEAN).comments
    data = path.read_bytes()
    flip_bytes(path, 10, 2)
    flip_bytes(path, -1)
    damaged = path.read_bytes()
    changed = [i for i, (a, b) in enumerate(zip(data, damaged, strict=True)) if a != b]
    assert changed == [10, 11, len(data) - 1]
    truncate(path, 0.25)
    assert path.read_bytes() == damaged[: len(data) // 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_month": "January"}, "must be a month"),
        ({"months": 0}, "at least 1"),
        ({"deepest_chain": 50, "biggest_thread": 20}, "part of the biggest thread"),
        ({"biggest_thread": 200}, "thread of all comments"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_dumps(tmp_path, 100, **arguments)
