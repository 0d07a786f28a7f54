"""The ten rules at their thresholds, lists of the user, Chinese, and `plato2 prepare explain`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from plato2.commands import app
from plato2.commands.prepare_reddit import default_rules
from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.prepare.reddit.dumps import Block, Dump
from plato2.prepare.reddit.messages import Message
from plato2.prepare.reddit.nodes import NodeMaker
from plato2.prepare.reddit.rules import (
    LANGUAGES,
    Judge,
    RedditRules,
    check_language,
    explain,
    length_rules,
    lists_sha256,
    overlap_rule,
    overlaps,
    repeat_rule,
)
from plato2.prepare.reddit.threads import TreeOptions, build_threads

TOKENIZER = Tokenizer.load(str(files("plato2.weights") / "knover_english"))
CHINESE = train_tokenizer(["今天天气真好。我们一起去公园散步。好不好。", "你好吗。我很好。谢谢你。"], 38)


def message(text: str, author: str = "", subreddit: str = "", quarantined: bool = False) -> Message:
    return Message(0, 0, 0, 0, text, author, subreddit, quarantined)


def rules(**on: Any) -> RedditRules:
    """These rules on, all others off."""
    return dataclasses.replace(RedditRules.off(), **on)


def failing(rules: RedditRules, text: str, *fields: Any) -> list[str]:
    return Judge(rules).failing(message(text, *fields))


# -- thresholds ------------------------------------------------------------------------------------------

AT_THRESHOLD = [
    ({"max_chars": 10}, "2. more than 10 characters", "abc def 12", "abc def 123"),
    ({"max_chars": 3}, "2. more than 3 characters", "汉字é", "汉字é "),
    ({"max_word_chars": 5}, "2. a word over 5 characters", "abcde abcde", "abcde abcdef"),
    ({"max_word_chars": 5}, "2. a word over 5 characters", "a\nbcdef\tabcd", "a\nbcdefg\tabcd"),
    ({"max_word_chars": 5}, "2. a word over 5 characters", "汉字abcde汉字汉字", "汉字abcdef汉字"),
    ({"min_letters": 0.7}, "3. under 70% letters", "abcdefg 123", "abcdef 1234"),
    (
        {"min_letters": 0.7},
        "3. under 70% letters",
        "\u00e9\u0439\u6c49abcd 123",
        "\u00e9\u0439\u6c49abc 1😂34",
    ),
    ({"min_letters": 1.0}, "3. under 100% letters", "a b\nc", "a b."),
    ({"min_letters": 0.0}, "3. under 0% letters", "...", None),
    ({"urls": True}, "4. a web address", "a.comb https:// www. com", "see A.COM"),
    ({"urls": True}, "4. a web address", "http//x dot com", "http://x"),
    ({"special_strings": True}, "5. r/, u/ or an HTML entity", "and/or you/me & amp;", "in r/pics"),
    ({"special_strings": True}, "5. r/, u/ or an HTML entity", "R/pics", "(u/ann)"),
    ({"special_strings": True}, "5. r/, u/ or an HTML entity", "&copy", "this &amp; that"),
    ({"offensive_words": "en"}, "8. an offensive word", "classic hello", "what a BITCH!"),
]


@pytest.mark.parametrize(("on", "name", "passing", "broken"), AT_THRESHOLD)
def test_at_its_threshold(on: dict[str, Any], name: str, passing: str, broken: str | None) -> None:
    assert Judge(rules(**on)).rules == [name]
    assert failing(rules(**on), passing) == []
    if broken is not None:
        assert failing(rules(**on), broken) == [name]


@pytest.mark.parametrize("share", ["0.1", "0.3", "0.6", "0.7", "0.8", "0.9"])
def test_shares_are_exact(share: str) -> None:
    """As fractions: no rounding removes a message that is exactly at the threshold."""
    exact = Fraction(share)
    for n in range(1, 129):
        for k in range(n + 1):
            below = failing(rules(min_letters=float(share)), "a" * k + "1" * (n - k)) if n < 41 else None
            assert below is None or bool(below) == (Fraction(k, n) < exact)
            ids = [5] * k + [7] * (n - k)
            assert overlaps(ids, [5] * n, float(share)) == (Fraction(k, n) > exact), (k, n)


@given(st.lists(st.integers(3, 6), max_size=9), st.lists(st.integers(3, 6), max_size=9), st.integers(0, 100))
def test_overlap_counts_each_token_as_often_as_the_parent_has_it(
    ids: list[int], parent: list[int], percent: int
) -> None:
    both = sum(min(ids.count(token), parent.count(token)) for token in set(ids))
    assert overlaps(ids, parent, percent / 100) == (100 * both > len(ids) * percent)


def test_rule_1_at_its_thresholds() -> None:
    fewest, most = length_rules(RedditRules()).items()
    assert (fewest[0], most[0]) == ("1. fewer than 2 tokens", "1. more than 128 tokens")
    assert [fewest[1](n) for n in (0, 1, 2, 999)] == [True, True, False, False]
    assert [most[1](n) for n in (0, 128, 129)] == [False, False, True]
    assert list(length_rules(rules(max_tokens=5))) == ["1. more than 5 tokens"]


@pytest.mark.parametrize(("key", "value"), [("max_chars", 0), ("min_letters", 1.1), ("max_overlap", -0.1)])
def test_thresholds_that_make_no_sense(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{key}={value}: must be"):
        rules(**{key: value})


def test_the_order_of_the_rules() -> None:
    """Cheap and certain ones first; it decides which of several rules removes a message."""
    numbers = [name.split(".")[0] for name in Judge(RedditRules()).rules]
    assert numbers == ["9", "10", "2", "2", "3", "4", "5", "8", "1", "1"]
    assert overlap_rule(RedditRules()) == "6. over 80% of its tokens in the parent"
    assert repeat_rule(RedditRules()) == "7. repeated more than 100 times"


TEXTS = st.lists(
    st.sampled_from(
        [
            *(
                "hello",
                "the",
                "sea",
                "fuck",
                "r/pics",
                "u/ann",
                "&amp;",
                "www.x.com",
                "http://a.b",
                "123",
                "!",
            ),
            *(
                "x" * 31,
                "word " * 30,
                "今天",
                "天气",
                "操你妈",
                "😂",
                "é",
                "\u200b",
                "\n",
                "[bold]",
                "~",
                "~~",
            ),
        ]
    ),
    max_size=12,
).flatmap(lambda words: st.sampled_from([" ", "", "  "]).map(lambda blank: blank.join(words)))
NAMES = st.sampled_from(["", "ann", "AutoModerator", "autotldr", "CoonTown", "pics"])


@given(TEXTS | st.text(max_size=40), NAMES, NAMES, st.booleans())
def test_no_rule_removes_nothing(text: str, author: str, subreddit: str, quarantined: bool) -> None:
    off = RedditRules.off()
    assert Judge(off, frozenset({"pics"})).failing(message(text, author, subreddit, quarantined)) == []
    assert (Judge(off).rules, length_rules(off), overlap_rule(off), repeat_rule(off)) == ([], {}, None, None)
    assert explain(message(text, author, subreddit), off, TOKENIZER, "the parent") == []
    assert off == default_rules("en", no_clean=True)


# -- lists -----------------------------------------------------------------------------------------------


def test_authors_and_forums_whatever_the_case() -> None:
    judge = Judge(RedditRules(), frozenset({"flagged"}))
    for author in ("AutoModerator", "automoderator", "AUTOMODERATOR"):
        assert judge.failing(message("hello you", author)) == ["10. written by a bot"]
    for forum in ("TheDonald", "the_donald", "The_Donald", "Flagged"):
        found = judge.failing(message("hello you", "ann", forum))
        assert found == ["9. a quarantined subreddit"] * (forum != "TheDonald")
    assert judge.failing(message("hello you", "ann", "pics", True)) == ["9. a quarantined subreddit"]
    assert judge.failing(message("hello you", "", "")) == []


def test_lists_from_files(tmp_path: Path) -> None:
    for name, content in {
        "bots": "\ufeff# my bots\r\nu/MyBot\r\n\r\n/u/Other_Bot\r\n",
        "forums": "r/Mine\n/r/yours\nTheirs",
        "words": "darn\nholy cow\n",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    own = RedditRules(
        bots=str(tmp_path / "bots"),
        quarantined=str(tmp_path / "forums"),
        offensive_words=str(tmp_path / "words"),
    )
    for author in ("mybot", "MyBot", "other_bot"):
        assert failing(own, "hello you", author) == ["10. written by a bot"]
    for forum in ("mine", "YOURS", "theirs"):
        assert failing(own, "hello you", "", forum) == ["9. a quarantined subreddit"]
    for text in ("oh DARN it", "Holy Cow!"):
        assert failing(own, text) == ["8. an offensive word"]
    for fields in (("what the fuck",), ("hello you", "AutoModerator"), ("hello you", "", "CoonTown")):
        assert failing(own, *fields) == []  # the lists that ship are out


def test_the_hash_of_lists_is_that_of_their_content(tmp_path: Path) -> None:
    own = tmp_path / "own"

    def sha256(text: str, **changes: Any) -> str:
        own.write_text(text, encoding="utf-8")
        return lists_sha256(RedditRules(bots=str(own), **changes))

    first = sha256("ann\nbob\n")
    assert first == sha256("# others\n\nu/Bob\nANN\n") != sha256("ann\nbo\n")
    assert first != lists_sha256(RedditRules())
    copy = tmp_path / "copy"
    copy.write_text(own.read_text(encoding="utf-8"), encoding="utf-8")
    assert sha256("ann\nbo\n") == lists_sha256(RedditRules(bots=str(copy)))
    hashes = {sha256("ann\n", offensive_words=words) for words in ("en", "zh", None)}
    assert len(hashes | {sha256("ann\n", quarantined=None), lists_sha256(RedditRules.off())}) == 5


def test_the_hash_sees_each_word_and_phrase(tmp_path: Path) -> None:
    words = tmp_path / "words"
    hashes = set()
    for text in ("bad word", "word", "bad", "bad\nword", "bad-word", "坏话", "坏", ":-*"):
        words.write_text(text, encoding="utf-8")
        hashes.add(lists_sha256(RedditRules(offensive_words=str(words))))
    assert len(hashes) == 8


@pytest.mark.parametrize("key", ["bots", "quarantined", "offensive_words"])
@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read"), (b"", "the file has no"), (b"# only\n", "has no"), (b"\xff\xfe", "not UTF-8")],
)
def test_faults_of_lists(tmp_path: Path, key: str, content: bytes | None, why: str) -> None:
    path = tmp_path / "list"
    if content is not None:
        path.write_bytes(content)
    for use in (Judge, lists_sha256):
        with pytest.raises(UserError, match=f"^rule {key}=.*list: .*{why}"):
            use(RedditRules(**{key: str(path)}))


# -- explain ---------------------------------------------------------------------------------------------

CHOSEN = st.builds(
    RedditRules,
    min_tokens=st.sampled_from([None, 1, 2, 5]),
    max_tokens=st.sampled_from([None, 3, 128]),
    max_word_chars=st.sampled_from([None, 4, 30]),
    max_chars=st.sampled_from([None, 20, 1024]),
    min_letters=st.sampled_from([None, 0.0, 0.5, 0.7, 1.0]),
    urls=st.booleans(),
    special_strings=st.booleans(),
    max_overlap=st.sampled_from([None, 0.0, 0.5, 0.8, 1.0]),
    max_repeats=st.sampled_from([None, 100]),
    offensive_words=st.sampled_from([None, "en", "zh"]),
    quarantined=st.sampled_from([None, "quarantined"]),
    bots=st.sampled_from([None, "bots"]),
)


@given(TEXTS, st.none() | TEXTS, NAMES, NAMES, CHOSEN)
@settings(max_examples=100, deadline=None)
def test_explain_says_what_the_rules_do(
    text: str, parent: str | None, author: str, subreddit: str, chosen: RedditRules
) -> None:
    said = message(text, author, subreddit)
    verdicts = explain(said, chosen, TOKENIZER, parent)
    n_tokens = len(TOKENIZER.encode(text))
    broken = Judge(chosen).failing(said)
    broken += [name for name, breaks in length_rules(chosen).items() if breaks(n_tokens)]
    unknown = [repeat_rule(chosen)]
    if parent is None or chosen.max_overlap is None:
        unknown.append(overlap_rule(chosen))
    elif overlaps(TOKENIZER.encode(text), TOKENIZER.encode(parent), chosen.max_overlap):
        broken.append(str(overlap_rule(chosen)))
    assert {verdict.rule for verdict in verdicts if verdict.passes is False} == set(broken)
    assert {verdict.rule for verdict in verdicts if verdict.passes is None} == set(unknown) - {None}
    on = {*Judge(chosen).rules, overlap_rule(chosen), repeat_rule(chosen)} - {None}
    assert Counter(verdict.rule for verdict in verdicts) == Counter(on)  # each rule once
    numbers = [int(verdict.rule.split(".")[0]) for verdict in verdicts]
    assert numbers == sorted(numbers)


@given(TEXTS, TEXTS, NAMES, NAMES, CHOSEN)
@settings(max_examples=60, deadline=None)
def test_explain_says_what_becomes_of_a_comment(
    text: str, parent: str, author: str, subreddit: str, chosen: RedditRules
) -> None:
    """Through stage 1 and stage 3: a comment is a response unless a rule removes it, or it has no text."""

    def node(number: int, above: str, text: str, rules: RedditRules, **fields: str) -> pa.Table:
        record = {"id": f"{number}", "parent_id": above, "link_id": "t3_1", "created_utc": 1, "body": text}
        block = Block(0, 1, json.dumps(record | fields).encode())
        return NodeMaker(rules, TOKENIZER).nodes(Dump("x", "comments", 0, "x"), block)[0]

    above = node(2, "t3_1", parent, RedditRules.off())
    below = node(3, "t1_2", text, chosen, author=author, subreddit=subreddit)
    nodes = pa.concat_tables([above, below])
    samples = build_threads(nodes, TreeOptions(max_overlap=chosen.max_overlap, max_context=4096))
    verdicts = explain(message(text, author, subreddit), chosen, TOKENIZER, parent)
    passes = all(verdict.passes is not False for verdict in verdicts)
    assert len(samples) == (passes and len(above) == 1 and len(TOKENIZER.encode(text)) > 0)


def found(text: str, start: str, parent: str | None = None, **fields: str) -> str:
    verdicts = explain(message(text, **fields), RedditRules(), TOKENIZER, parent)
    return next(verdict.found for verdict in verdicts if verdict.rule.startswith(start))


def test_what_explain_measures() -> None:
    assert found("I like the sea", "1. fewer") == found("I like the sea", "1. more") == "4 tokens"
    assert found("so looooong", "2. a word") == "the longest has 8"
    assert found("", "2. a word") == "the longest has 0"
    assert found("so looooong", "2. more") == "11 characters"
    assert found("abc 1", "3.") == "75% letters"
    assert found("I like the sea", "6.", "the sea is what I see") == "75% of its tokens"
    assert found("I like the sea", "6.") == "no parent given"
    assert found("I like the sea", "7.") == "known only with the whole corpus"
    assert found("What a BITCH!", "8.") == "'bitch'"
    assert found("hello", "9.", subreddit="pics") == "r/pics"
    assert found("hello", "10.", author="ann") == "u/ann"


# -- Chinese ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("今天天气真好。我们一起去公园散步。好不好。", []),
        ("今" * 1024, []),  # a character is a word
        ("今" * 1025, ["2. more than 1024 characters"]),
        ("看abcdefghijklmnopqrstuvwxyzabcde吧", ["2. a word over 30 characters"]),
        ("今天。。。。。。", ["3. under 70% letters"]),
        ("我的网址是 www.baidu.com", ["4. a web address"]),
        ("看https://t.cn/abc", ["4. a web address"]),
        ("我们去操你妈的", ["8. an offensive word"]),
        ("what the fuck", []),
        ("ไปเที่ยวทะเลกันดีกว่า", []),  # Thai vowels are marks of letters
        ("Жёлудь лежит в траве", []),
    ],
)
def test_chinese(text: str, broken: list[str]) -> None:
    assert failing(default_rules("zh"), text) == broken


def test_the_lists_of_the_languages() -> None:
    assert LANGUAGES == {"en": 8000, "zh": 30000}
    for language, text in {"en": "what the fuck", "zh": "操你妈"}.items():
        check_language(language)
        assert [bool(failing(default_rules(other), text)) for other in LANGUAGES] == [
            other == language for other in LANGUAGES
        ]


def test_explain_counts_the_tokens_of_a_chinese_tokenizer(tmp_path: Path) -> None:
    CHINESE.save(tmp_path)
    said = ["今天天气真好", "--parent", "天气不好", "--language", "zh", "--tokenizer", tmp_path]
    verdicts = {verdict["rule"]: verdict for verdict in json.loads(run(*said, "--json", status=0))["rules"]}
    n = len(CHINESE.encode("今天天气真好"))
    assert verdicts["1. fewer than 2 tokens"]["found"] == f"{n} tokens"
    assert verdicts["6. over 80% of its tokens in the parent"]["passes"] is True


def test_explain_does_not_judge_chinese_by_english_tokens() -> None:
    printed = CliRunner().invoke(
        app, ["prepare", "explain", "今天天气真好", "--parent", "你好吗", "--language", "zh", "--json"]
    )
    assert printed.exit_code == 2 or not json.loads(printed.stdout)["removed"]


# -- the command -----------------------------------------------------------------------------------------


def run(*arguments: object, status: int) -> str:
    done = CliRunner().invoke(app, ["prepare", "explain", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["I like the sea"], None),
        (["--", "-- I like the sea --"], None),
        (["see www.example.com"], "4. a web address"),
        (["see www.example.com", "--rule", "urls=off"], None),
        (["I like the sea", "--rule", "max_chars=13"], "2. more than 13 characters"),
        (["I like the sea", "--rule", "max_chars=14"], None),
        (["I like the sea", "--parent", "I like the sea , too"], "6. over 80% of its tokens in the parent"),
        (["I like the sea", "--parent", "do you like the sea ?"], None),
        (["thanks a lot", "--author", "AutoModerator"], "10. written by a bot"),
        (["thanks a lot", "--author", "AutoModerator", "--rule", "bots=off"], None),
        (["thanks a lot", "--subreddit", "CoonTown"], "9. a quarantined subreddit"),
        ([""], "1. fewer than 2 tokens"),
        (["yes", "--rule", "min_letters=OFF"], "1. fewer than 2 tokens"),
    ],
)
def test_exit_status_text_and_json(arguments: list[str], rule: str | None) -> None:
    status = int(rule is not None)
    last = run(*arguments, status=status).splitlines()[-1]
    assert last == ("the message passes" if rule is None else f"removed by rule {rule}")
    options = ["--json", *arguments]
    printed = json.loads(run(*options, status=status))
    assert printed["removed"] is (rule is not None)
    broken = [verdict["rule"] for verdict in printed["rules"] if verdict["passes"] is False]
    assert broken == [rule] * status


def test_several_rules_are_named_in_the_order_of_the_paper() -> None:
    printed = run("fuck www.x.com r/pics", "--author", "autotldr", status=1)
    rows = [line for line in printed.splitlines()[1:-1] if "removed" in line]
    assert [row.split(".")[0] for row in rows] == ["4", "5", "8", "10"]
    assert printed.splitlines()[-1] == "removed by rule 4. a web address"


@pytest.mark.parametrize("name", ["[bold]ann", "[/]", "[red]x[/red]", "\\[x]", ":smile:", "[link=http://x]y"])
def test_markup_is_text(name: str) -> None:
    arguments = [f"I like {name} the sea and the sun", "--author", name, "--subreddit", name]
    printed = run(*arguments, "--rule", "urls=off", status=0)
    assert f"u/{name}" in printed
    assert f"r/{name}" in printed
    verdicts = json.loads(run(*arguments, "--rule", "urls=off", "--json", status=0))["rules"]
    assert verdicts[-1]["found"] == f"u/{name}"


def test_control_characters_in_the_message_are_text() -> None:
    text = "I like\x07 the\x1b[31m sea\x00 and\r\nthe sun"
    for options in ([], ["--json"]):
        printed = run(text, *options, status=0)
        assert not {"\x07", "\x1b", "\x00", "\r"} & set(printed)


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    printed = run("I like the sea", "--author", "\x1b[31mann", "--subreddit", "\x1b]0;title\x07", status=0)
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "fr"], "--language 'fr': there are settings for en, zh; for another language"),
        (
            ["--rule", "max_cahrs=3"],
            "there is no rule max_cahrs; did you mean max_chars?",
        ),
        (["--rule", "max_chars=many"], "--rule max_chars=many: the value must be int or off"),
        (["--rule", "min_letters=x"], "--rule min_letters=x: the value must be float or off"),
        (["--rule", "urls=maybe"], "--rule urls=maybe: the value must be on or off"),
        (["--rule", "max_chars"], "--rule max_chars: must be NAME=VALUE"),
        (["--rule", "max_chars=0"], "max_chars=0: must be at least 1"),
        (["--rule", "bots=nowhere.txt"], "rule bots=nowhere.txt: cannot be read"),
        (["--rule", "offensive_words=fr"], "rule offensive_words=fr: cannot be read"),
        (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["prepare", "explain", "I like the sea", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_as_a_person_starts_it() -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "plato2", "prepare", "explain", *arguments]
        root = Path(__file__).parents[2]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)

    done = start("see www.example.com [bold]", "--json")
    assert (done.returncode, json.loads(done.stdout)["removed"], done.stderr) == (1, True, "")
    done = start("see you", "--language", "xx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --language 'xx': there are settings for en, zh")
