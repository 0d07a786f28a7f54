"""Blocks of lines to nodes and counts: one line for each rule, damaged lines, and sums of counts."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.prepare.clean import message_key
from plato2.prepare.reddit.dumps import Block, Dump
from plato2.prepare.reddit.nodes import N_EXAMPLES, Counts, NodeMaker, month_name, node_schema
from plato2.prepare.reddit.rules import RedditRules
from plato2.prepare.reddit.shard_parts import month_of

TOKENIZER = Tokenizer.load(str(files("plato2.weights") / "knover_english"))
JANUARY, FEBRUARY = (int(datetime(2011, month, 9, tzinfo=UTC).timestamp()) for month in (1, 2))
DUMPS = {kind: Dump(f"dumps/{kind}.zst", kind, 0, "key") for kind in ("comments", "submissions")}
OFF = RedditRules.off()


def line(body: str | None, number: int = 1, **changes: object) -> bytes:
    record: dict[str, object] = {"id": f"c{number}", "parent_id": "t1_b0", "link_id": "t3_a0"}
    record |= {"created_utc": JANUARY, "author": "ann", "subreddit": "pics", "body": body}
    return json.dumps(record | changes).encode()


def title(text: str | None, **changes: object) -> bytes:
    record = {"id": "a0", "created_utc": str(JANUARY), "author": "bob", "subreddit": "pics", "title": text}
    return json.dumps(record | changes).encode()


def make(
    lines: list[bytes],
    rules: RedditRules | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    first_line: int = 1,
    kind: str = "comments",
    **options: Any,
) -> tuple[pa.Table, Counts]:
    maker = NodeMaker(rules or RedditRules(), tokenizer, **options)
    return maker.nodes(DUMPS[kind], Block(first_line // 100, first_line, b"\n".join(lines) + b"\n"))


# -- one line for each rule ------------------------------------------------------------------------------

PLAIN = "I like the sea and the sun"
BREAKING = [
    ("1. fewer than 2 tokens", {"body": "yes"}),
    ("1. more than 128 tokens", {"body": "I am we are " * 43}),
    ("2. a word over 30 characters", {"body": "what is " + "a" * 31}),
    ("2. more than 1024 characters", {"body": "congratulations " * 65}),
    ("3. under 70% letters", {"body": "no: 10 + 20 = 30, 4 + 5 = 9"}),
    ("4. a web address", {"body": "the picture is on imgur.com today"}),
    ("5. r/, u/ or an HTML entity", {"body": "that is something for r/pics again"}),
    ("8. an offensive word", {"body": "what the hell is the fuck about"}),
    ("9. a quarantined subreddit", {"body": PLAIN, "subreddit": "CoonTown"}),
    ("10. written by a bot", {"body": PLAIN, "author": "AutoModerator"}),
]


@pytest.mark.parametrize(("rule", "fields"), BREAKING)
def test_one_line_for_each_rule(rule: str, fields: dict[str, Any]) -> None:
    nodes, counts = make([line(**fields), line(PLAIN, 2)])
    n_tokens = len(TOKENIZER.encode(PLAIN))
    assert counts.funnel == {"2011-01": Counter({"read": 2, rule: 1, "kept": 1, "tokens": n_tokens})}
    assert counts.hits == {"2011-01": Counter({rule: 1})}
    assert nodes.column("id").to_pylist() == [2 * int("c2", 36)]
    kept, everything = make([line(**fields), line(PLAIN, 2)], OFF)
    assert len(kept) == 2
    assert everything.hits == {"2011-01": Counter()}


def test_each_rule_alone_removes_its_lines_and_no_other() -> None:
    """The lines of all rules at once, with one rule on at a time."""
    on = {
        "1. fewer": {"min_tokens": 2},
        "1. more": {"max_tokens": 128},
        "2. a word": {"max_word_chars": 30},
        "2. more": {"max_chars": 1024},
        "3.": {"min_letters": 0.7},
        "4.": {"urls": True},
        "5.": {"special_strings": True},
        "8.": {"offensive_words": "en"},
        "9.": {"quarantined": "quarantined"},
        "10.": {"bots": "bots"},
    }
    lines = [line(**fields, number=number) for number, (_, fields) in enumerate(BREAKING)]
    for start, rule in on.items():
        _, counts = make(lines, RedditRules(**{**vars(OFF), **rule}))
        (name,) = (name for name, _ in BREAKING if name.startswith(start))
        hits = counts.hits["2011-01"]
        assert set(hits) == {name}
        extra = 1 if start == "1. more" else 0  # 65 congratulations are over 128 tokens, too
        assert hits[name] == 1 + extra, start


def test_a_line_that_breaks_many_rules_is_removed_once_and_hits_each() -> None:
    fields = {"author": "autotldr", "subreddit": "coontown"}
    _, counts = make([line("fuck http://www.x.com/123456789-10 r/pics " + "_" * 31, **fields)])
    rules = ["9. a quarantined subreddit", "10. written by a bot", "2. a word over 30 characters"]
    rules += [
        "3. under 70% letters",
        "4. a web address",
        "5. r/, u/ or an HTML entity",
        "8. an offensive word",
    ]
    assert counts.funnel == {"2011-01": Counter({"read": 1, rules[0]: 1})}
    assert counts.hits == {"2011-01": Counter(rules)}


def test_months_forums_and_hours() -> None:
    lines = [
        line(PLAIN, 1, created_utc=FEBRUARY, subreddit="Pics"),
        line(PLAIN, 2),
        line("[deleted]", 3, subreddit="pics"),
        line("yes", 4, created_utc=FEBRUARY),
        line(PLAIN, 5, created_utc=JANUARY + 3599.5),
        line(PLAIN, 6, created_utc=JANUARY + 3600, subreddit=None),
    ]
    nodes, counts = make(lines)
    n = len(TOKENIZER.encode(PLAIN))
    assert counts.funnel == {
        "2011-01": Counter({"read": 4, "no text": 1, "kept": 3, "tokens": 3 * n}),
        "2011-02": Counter({"read": 2, "1. fewer than 2 tokens": 1, "kept": 1, "tokens": n}),
    }
    assert counts.subreddits == {
        "Pics": Counter({"read": 1, "kept": 1}),
        "pics": Counter({"read": 4, "kept": 2}),
        "": Counter({"read": 1, "kept": 1}),
    }
    hours = {str(JANUARY // 3600): 2, str(JANUARY // 3600 + 1): 1, str(FEBRUARY // 3600): 1}
    assert counts.hours == Counter(hours)
    assert [month_of(month) for month in nodes.column("month").to_pylist()] == ["2011-02"] + 3 * ["2011-01"]
    assert nodes.column("time").to_pylist() == [FEBRUARY, JANUARY, JANUARY + 3599, JANUARY + 3600]


@given(st.integers(0, 253_402_300_799))
def test_the_name_and_the_number_of_a_month_agree(time: int) -> None:
    nodes, counts = make([line(PLAIN, created_utc=time)], OFF)
    day = datetime.fromtimestamp(time, UTC)
    assert month_name(time) == month_of(nodes.column("month")[0].as_py()) == f"{day.year}-{day.month:02d}"
    assert list(counts.funnel) == [month_name(time)]
    assert nodes.column("month")[0].as_py() == 12 * day.year + day.month - 1


def test_quarantined_forums() -> None:
    lines = [
        line(PLAIN, 1, subreddit="FlaggedHere", quarantined=True),
        line(PLAIN, 2, subreddit="flaggedhere"),  # the flag of another line of the block says nothing yet
        line(None, 3, subreddit="Silent", quarantine=True),
        line(PLAIN, 4, subreddit="Titled"),
    ]
    nodes, counts = make(lines, quarantined=frozenset({"titled"}))
    assert counts.quarantined == ["flaggedhere", "silent"]
    assert counts.funnel["2011-01"]["9. a quarantined subreddit"] == 2
    assert nodes.column("id").to_pylist() == [2 * int("c2", 36)]
    nodes, counts = make(lines, RedditRules(quarantined=None), quarantined=frozenset({"titled"}))
    assert (len(nodes), counts.quarantined) == (3, ["flaggedhere", "silent"])


@pytest.mark.parametrize(
    "body", [None, "", "[deleted]", "[removed]", " ", "\n\t \u3000", "[deleted by user]"]
)
@pytest.mark.parametrize("rules", [RedditRules(), OFF])
def test_messages_without_text(body: str | None, rules: RedditRules) -> None:
    nodes, counts = make([line(body), line(body, 2, author="AutoModerator")], rules)
    assert len(nodes) == 0
    assert counts.funnel == {"2011-01": Counter({"read": 2, "no text": 2})}
    assert counts.hits == {"2011-01": Counter()}


def test_text_without_a_token_is_no_text() -> None:
    """Characters that the tokenizer drops, and no rule that would remove them."""
    nodes, counts = make([line("\u200b\u200d"), line(PLAIN, 2), line("\x7f\x00", 3)], OFF)
    assert counts.funnel["2011-01"]["no text"] == 2
    assert nodes.column("token_ids").to_pylist() == [TOKENIZER.encode(PLAIN)]
    _, counts = make([line("\u200b\u200d")], RedditRules(min_letters=None))
    assert counts.funnel["2011-01"]["1. fewer than 2 tokens"] == 1


def test_submissions_are_their_titles() -> None:
    lines = [
        title(PLAIN, selftext="more"),
        title("[removed]"),
        title(PLAIN, quarantine=True, subreddit="Bad"),
    ]
    nodes, counts = make(lines, kind="submissions")
    assert counts.quarantined == ["bad"]
    assert counts.funnel["2011-01"]["kept"] == 1
    (node,) = nodes.to_pylist()
    assert node["id"] == node["parent"] == 2 * int("a0", 36) + 1
    assert node["token_ids"] == TOKENIZER.encode(PLAIN)
    (comment,) = make([line(PLAIN)])[0].to_pylist()
    assert comment["shard_key"] == node["shard_key"] >= 0  # a thread stays together


# -- nodes -----------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [*"~\u200b\x00é…", "the", "THE", "sea", "Käse", "汉字", "don't", "  ", " ", "\n", "😂"]
)
BODIES = st.lists(WORDS, max_size=12).map("".join)


@given(st.lists(BODIES, max_size=20))
@settings(max_examples=60, deadline=None)
def test_ids_are_those_of_the_text(bodies: list[str]) -> None:
    nodes, counts = make([line(body, number) for number, body in enumerate(bodies)], OFF)
    expected = [TOKENIZER.encode(body) for body in bodies]
    assert nodes.column("token_ids").to_pylist() == [ids for ids in expected if ids]
    assert nodes.column("text_key").to_pylist() == [
        int.from_bytes(message_key(body).to_bytes(8, "little"), "little", signed=True)
        for body, ids in zip(bodies, expected, strict=True)
        if ids
    ]
    assert counts.total("tokens") == sum(map(len, expected))
    assert counts.total("read") == len(bodies) == counts.total("kept") + counts.total("no text")


def test_more_messages_than_are_encoded_at_once() -> None:
    bodies = ["yes" if number % 7 == 0 else f"this is number {number} of many" for number in range(2500)]
    nodes, counts = make([line(body, number) for number, body in enumerate(bodies)])
    kept = [(number, body) for number, body in enumerate(bodies) if body != "yes"]
    assert nodes.column("id").to_pylist() == [2 * int(f"c{number}", 36) for number, _ in kept]
    assert nodes.column("token_ids").to_pylist() == [TOKENIZER.encode(body) for _, body in kept]
    assert counts.funnel["2011-01"]["1. fewer than 2 tokens"] == len(bodies) - len(kept)


def test_text_keys_do_not_see_case_and_white_space() -> None:
    same = ["Thank You  all", "thank you all", " THANK\tyou\nall ", "thank you\u3000ALL"]
    other = ["thank you all !", "thankyou all", "thank you alle"]
    nodes, _ = make([line(body, number) for number, body in enumerate([*same, *other])], OFF)
    keys = nodes.column("text_key").to_pylist()
    assert len(set(keys[: len(same)])) == 1
    assert len(set(keys)) == 1 + len(other)


@pytest.mark.parametrize(("vocab_size", "kind"), [(8001, "int16"), (2**15, "int16"), (2**15 + 1, "int32")])
def test_ids_take_two_bytes_where_they_fit(vocab_size: int, kind: str) -> None:
    assert str(node_schema(vocab_size).field("token_ids").type.value_type) == kind
    assert node_schema(vocab_size).names == node_schema(8001).names


def test_a_block_without_a_node_is_a_table_all_the_same() -> None:
    small = train_tokenizer(["a b c d"] * 9, 10)
    for lines in ([], [b""], [b" ", b"\r"], [line(None)]):
        nodes, counts = make(lines, OFF, small)
        assert nodes.schema == node_schema(small.vocab_size)
        assert (len(nodes), counts.total("kept")) == (0, 0)


def test_the_largest_ids_fit() -> None:
    last = "t1_" + "z" * 11
    (node,) = make([line(PLAIN, id=last, parent_id=last, link_id="t3" + last[2:])])[0].to_pylist()
    assert node["id"] == node["parent"] == 2 * (36**11 - 1)
    assert 0 <= node["shard_key"] < 2**63


# -- lines that are no messages --------------------------------------------------------------------------

BROKEN = [
    (b'{"body": "hal', "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"body": "caf\xe9", "id": "c1"}', "not valid JSON"),
    (line(PLAIN, score=float("nan")), "not valid JSON"),
    (line(PLAIN, created_utc=float("nan")), "not valid JSON"),
    (line("\u00e9 \\u", created_utc=float("nan")), "created_utc nan"),  # the reader of surrogates takes NaN
    (b"\xef\xbb\xbf" + line(PLAIN), "not valid JSON"),
    (b"\0" * 20, "not valid JSON"),
    (b"[" * 5000, "not valid JSON"),
    (b'["\\u00e9",' + b"[" * 5000, "not valid JSON"),
    (b"[]", "not a comment: not an object"),
    (b"null", "not a comment: not an object"),
    (b'"\\ud800"', "not a comment: not an object"),
    (title(PLAIN), "not a comment: no body"),
    (line(PLAIN, id="c-1"), "id 'c-1' is not an id"),
    (line(PLAIN, created_utc=None), "created_utc None"),
    (line(PLAIN) + line(PLAIN), "not valid JSON"),
    (b"<html>", "not valid JSON"),
]


@pytest.mark.parametrize(("broken", "why"), BROKEN)
@pytest.mark.parametrize("first_line", [1, 70_001])
def test_a_broken_line_stops_or_is_counted(broken: bytes, why: str, first_line: int) -> None:
    lines = [line(PLAIN), b"", line("yes", 2), broken, b"\r", line(PLAIN, 3) + b"\r", broken]
    with pytest.raises(UserError) as caught:
        make(lines, first_line=first_line)
    message = str(caught.value)
    assert message.startswith(f"dumps/comments.zst:{first_line + 3}: {why}")
    assert message.endswith("; fix the file, or leave such lines out with --on-broken skip")
    nodes, counts = make(lines, first_line=first_line, on_broken="skip")
    assert nodes.column("id").to_pylist() == [2 * int("c1", 36), 2 * int("c3", 36)]
    assert (counts.n_broken, counts.total("read")) == (2, 3)
    assert [text.split(": ")[0].split(":")[1] for text in counts.broken_examples] == [
        str(first_line + 3),
        str(first_line + 6),
    ]
    assert all(why in text for text in counts.broken_examples)


def test_only_the_first_broken_lines_are_kept() -> None:
    _, counts = make([b"x"] * 100, on_broken="skip")
    assert counts.n_broken == 100
    assert [text.split(":")[1] for text in counts.broken_examples] == list("12345")
    assert N_EXAMPLES == 5


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('"half \\ud83d of a pair"', "half \ufffd of a pair"),
        ('"half \\uDE00"', "half \ufffd"),
        ('"a pair \\ud83d\\ude00"', "a pair 😀"),
        ('"\\u00e9t\\u00e9"', "été"),
    ],
)
def test_half_a_surrogate_pair(body: str, text: str) -> None:
    whole = line("BODY").replace(b'"BODY"', body.encode())
    nodes, counts = make([whole], OFF)
    assert nodes.column("token_ids").to_pylist() == [TOKENIZER.encode(text)]
    assert counts.n_broken == 0


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_bytes_have_another_error(data: bytes) -> None:
    """Each line is blank, a message, or counted."""
    nodes, counts = make([data], on_broken="skip")
    assert len(nodes) == 0
    assert counts.n_broken == sum(bool(part.strip(b" \t\r\v\f")) for part in data.split(b"\n"))


# -- counts ----------------------------------------------------------------------------------------------

COUNTERS = st.dictionaries(st.text(max_size=3), st.integers(1, 2**40), max_size=3).map(Counter)
NAMED = st.dictionaries(st.sampled_from(["2011-01", "2011-02", "ä", ""]), COUNTERS, max_size=3)
COUNTS = st.builds(
    Counts,
    NAMED,
    NAMED,
    NAMED,
    COUNTERS,
    st.lists(st.text(max_size=2), max_size=3, unique=True).map(sorted),
    st.integers(0, 9),
    st.lists(st.text(max_size=4), max_size=N_EXAMPLES),
)


def total(*parts: Counts) -> Counts:
    counts = Counts()
    for part in parts:
        counts.add(part)
    return counts


@given(COUNTS, COUNTS, COUNTS)
def test_counts_add_up_in_any_grouping(a: Counts, b: Counts, c: Counts) -> None:
    before = [Counts.from_json(part.to_json()) for part in (a, b, c)]
    assert total(a, b, c) == total(total(a, b), c) == total(a, total(b, c))
    assert total(a) == total(a, Counts()) == total(Counts(), a) == a
    assert total(a, b).broken_examples == [*a.broken_examples, *b.broken_examples][:N_EXAMPLES]
    assert before == [a, b, c]  # what was added is as it was
    both, other = total(a, b), total(b, a)
    assert (both.funnel, both.hours, both.quarantined) == (other.funnel, other.hours, other.quarantined)
    assert both.total("x") == a.total("x") + b.total("x")


@given(COUNTS)
def test_counts_survive_json(counts: Counts) -> None:
    again = Counts.from_json(counts.to_json())
    assert again == counts
    assert json.loads(counts.to_json()) == json.loads(again.to_json())
    again.add(counts)  # what comes back can be added to
    assert again.n_broken == 2 * counts.n_broken
    assert again.total("x") == 2 * counts.total("x")


def test_the_counts_of_blocks_add_up_to_those_of_the_file() -> None:
    lines = [line(**fields, number=number) for number, (_, fields) in enumerate(BREAKING * 3)] + [b"x"]
    whole = make(lines, on_broken="skip")
    parts = [make(lines[i : i + 4], first_line=i + 1, on_broken="skip") for i in range(0, len(lines), 4)]
    assert total(*(counts for _, counts in parts)) == whole[1]
    assert pa.concat_tables([nodes for nodes, _ in parts]).equals(whole[0].combine_chunks())
