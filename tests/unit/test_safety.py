"""The safety filter: which words are found, which side and rule acted, what is said instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import KNOVER, make_stage

from plato2.config import DecodeConfig, UserError
from plato2.data.tokenizer import Tokenizer
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.safety import REFUSAL, Flag, Safety, WordRule, read_rule

TOKENIZER = Tokenizer.load(KNOVER)
CONTEXT = ["hello !", "how was your day ?"]
DECODE = DecodeConfig(max_tokens=8)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("you darn fool", "darn"),
        ("DARN!", "darn"),
        ("darned", None),  # whole words only
        ("a\u200bd\u200barn thing", None),  # what is left reads `adarn`
        ("da\u200brn", "darn"),  # a character without width hides nothing
        ("\uff44\uff41\uff52\uff4e", "darn"),  # full width
        ("go to   Heck\nnow", "go to heck"),  # a phrase over blanks
        ("go to the heck", None),
        ("这是坏话吗", "坏话"),  # Chinese has no blanks
        ("a+b", "a+b"),  # no regular expression
        ("aab", None),
        ("", None),
    ],
)
def test_words_and_phrases(text: str, found: str | None) -> None:
    rule = WordRule(["Darn", "go to heck", "坏话", "a+b", "  "], "list")
    assert rule([text]) == [None if found is None else f"list: {found}"]


@given(st.lists(st.text(min_size=1, max_size=8)), st.text(max_size=60))
def test_any_word_list_reads_any_text(words: list[str], text: str) -> None:
    rule = WordRule(words)
    assert rule([text, "fine"])[0] == rule([text])[0]
    for word in words:
        if word.strip() and rule([word])[0] is None:  # nothing but characters without width
            assert not WordRule([word]).words.entries
    assert WordRule([])(["anything", text]) == [None, None]


def test_one_text_is_checked_whole() -> None:
    assert Safety([WordRule(["you"])]).check("input", "you") == ["words: you"]
    with pytest.raises(UserError, match="give texts"):
        Safety([]).check("input", [b"you"])  # type: ignore[list-item]


def test_a_file_of_words_has_comments_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("# words\n\ndarn\n  go to heck  \n#tag\n", encoding="utf-8")
    assert read_rule(str(tmp_path / "bad.txt"))(["darn", "fine", "go to heck", "a #TAG"]) == [
        "bad.txt: darn",
        None,
        "bad.txt: go to heck",
        "bad.txt: #tag",
    ]


def test_the_lists_that_ship_with_plato2() -> None:
    assert read_rule("en")(["what the f\u200buck", "what a day"]) == ["en: fuck", None]
    assert read_rule("zh")(["操你妈", "你好"]) == ["zh: 操你妈", None]


def test_mistakes_name_the_file_or_rule_and_the_cure(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, words in [
        ("no_such.txt", "No such file"),
        ("empty.txt", "the file has no word or phrase; give a file with one word or phrase per line"),
        ("latin.txt", "not UTF-8"),
        (".", "Is a directory"),
    ]:
        with pytest.raises(UserError, match=words):
            read_rule(str(tmp_path / name))
    with pytest.raises(UserError, match="no_such_module"):
        read_rule("no_such_module:rule")
    with pytest.raises(UserError, match="has no attribute 'rule'"):
        read_rule("json:rule")
    with pytest.raises(UserError, match="cannot be called"):
        read_rule("plato2.talk.safety:REFUSAL")
    with pytest.raises(UserError, match=r"safety input='maybe': use off, warn, block"):
        Safety([], input="maybe")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 verdicts for 2 texts"):
        Safety([lambda texts: [None]]).check("input", ["a", "b"])


def shouting(texts: Sequence[str]) -> list[str | None]:
    """A rule of a user's own."""
    return ["shouting" if text.isupper() else None for text in texts]


def bot_with(safety: Safety | None) -> PlatoBot:
    return PlatoBot(make_stage("2_gen"), TOKENIZER, make_stage("2_eval"), DECODE, safety=safety)


def without_filter() -> Reply:
    return bot_with(None).reply(CONTEXT)


def flag_texts(*texts: str) -> Safety:
    """A filter that is against exactly these candidates."""
    return Safety([lambda said: ["these" if text in texts else None for text in said]])


def test_a_blocked_message_is_refused_and_the_others_of_its_batch_are_answered() -> None:
    safety = Safety([WordRule(["darn"], "words"), shouting])
    contexts = [CONTEXT, [*CONTEXT, "Darn you"], ["HELLO"], ["darn .", "sorry ?"]]
    plain, blocked, loud, earlier = bot_with(safety).reply_batch(contexts, seeds=[1, 2, 3, 4])
    assert blocked == Reply(REFUSAL, [], (Flag("input", "words: darn", "block"),))
    assert loud.flags == (Flag("input", "shouting", "block"),)
    assert blocked.is_refusal
    alone = bot_with(None).reply_batch([CONTEXT, contexts[3]], seeds=[1, 4])
    assert [plain.text, earlier.text] == [reply.text for reply in alone]
    assert plain.flags == earlier.flags == ()  # only the message that is answered is looked at
    assert not plain.is_refusal


def test_the_next_best_candidate_is_said_when_the_first_is_blocked() -> None:
    free = without_filter()
    texts = [candidate.text for candidate in free.candidates]
    assert len(set(texts)) == len(texts)
    reply = bot_with(flag_texts(texts[0], texts[1], texts[3])).reply(CONTEXT)
    assert reply.text == texts[2]
    assert [candidate.text for candidate in reply.candidates] == [
        texts[2],
        *texts[4:],
        texts[0],
        texts[1],
        texts[3],
    ]
    assert reply.flags == (Flag("output", "these", "block"),) * 2  # those that would have been said before it
    assert [candidate.flag for candidate in reply.candidates[-3:]] == ["these"] * 3
    assert not reply.is_refusal
    assert reply.to_dict()["flags"] == [{"side": "output", "rule": "these", "action": "block"}] * 2


def test_all_blocked_is_a_refusal() -> None:
    texts = [candidate.text for candidate in without_filter().candidates]
    reply = bot_with(flag_texts(*texts)).reply(CONTEXT)
    assert reply.text == REFUSAL
    assert reply.is_refusal
    assert [candidate.text for candidate in reply.candidates] == texts


def test_warn_says_so_and_changes_nothing_and_off_does_not_look() -> None:
    free = without_filter()
    rule = flag_texts(free.text, CONTEXT[-1]).rules[0]
    warned = bot_with(Safety([rule], input="warn", output="warn")).reply(CONTEXT)
    assert [c.text for c in warned.candidates] == [c.text for c in free.candidates]
    assert warned.flags == (Flag("input", "these", "warn"), Flag("output", "these", "warn"))
    assert not warned.is_refusal

    def refuse(texts: Sequence[str]) -> list[str | None]:
        raise AssertionError("must not be asked")

    off = bot_with(Safety([refuse], input="off", output="off")).reply(CONTEXT)
    assert off == free


def test_one_word_is_a_list_of_it() -> None:
    assert WordRule("piano")(["p i a n o", "a piano"]) == [None, "words: piano"]
