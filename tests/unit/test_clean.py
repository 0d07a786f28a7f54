"""Each rule at its threshold and against its plain definition, the policies, rule 7 against a dictionary."""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.prepare.clean import (
    Cleaner,
    CleanRules,
    RepeatCounter,
    conversations,
    has_long_word,
    has_special_string,
    has_url,
    letter_share,
    message_key,
    option_of,
    overlaps,
)
from plato2.words import UNSPACED, split_words

ZH = "今天天气真好我们一起去公园散步好不好然后再去吃一碗热热的牛肉面你觉得怎么样呢"


def failed(text, previous="something else", n_tokens=10, **rules):
    """The rules that `text` breaks, by their number."""
    cleaner = Cleaner(CleanRules(**rules))
    cleaner.check([previous], [10])
    before = Counter(cleaner.hits)
    cleaner = Cleaner(CleanRules(**rules))
    cleaner.check([previous, text], [10, n_tokens])
    return {name[0] for name in cleaner.hits - before}


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("a perfectly fine message .", set()),
        ("x" * 30 + " is just short enough", set()),
        ("x" * 31 + " is too long a word", {"2"}),
        (ZH, set()),  # no blanks: a character is a word
        ("wo " * 341 + "w", set()),
        ("wo " * 341 + "wo", {"2"}),
        ("abcdefg 123", set()),  # 7 of 10 are letters; the blank does not count
        ("abcdef 1234", {"3"}),
        ("!!! ... ???", {"3"}),
        ("🙂🙂", {"3"}),
        ("नमस्ते दोस्त", set()),  # vowel signs belong to the letters
        ("", set()),
        ("look at https://example.com/a ?", {"4"}),
        ("it is on www.example.net I think", {"4"}),
        ("ask at example.org please", {"4"}),
        ("that was it.come back soon", set()),
        ("he and/or she likes it", set()),
        ("seen on r/aww yesterday", {"5"}),
        ("ask u/someone about that", {"5"}),
        ("/r/aww is nice to look at", {"5"}),
        ("salt &amp; pepper for me", {"5"}),
        ("&gt; what you said\n\nindeed", {"5"}),
        ("a line &#x200B; with nothing", {"5"}),
        ("this & that ; R&D; &amp", set()),
        ("salt & pepper for me", set()),
    ],
)
def test_rules_2_to_5(text, rules):
    assert failed(text) == rules


@pytest.mark.parametrize(("n_tokens", "fails"), [(0, True), (1, True), (2, False), (128, False), (129, True)])
def test_rule_1_counts_tokens(n_tokens, fails):
    assert (failed("fine words", n_tokens=n_tokens) == {"1"}) == fails


@pytest.mark.parametrize(
    ("text", "previous", "fails"),
    [
        ("I like tea", "I like tea", True),
        ("i LIKE tea !", "I like tea", True),  # case and punctuation do not count
        ("one two three four new", "one two three four", False),  # 80 % is not over 80 %
        ("one two three four five new", "one two three four five", True),
        ("no no no no no", "no way", False),  # a word counts as often as it stands in the other turn
        ("我很好", "我很好吗", True),
        ("anything", "", False),
    ],
)
def test_rule_6_overlap(text, previous, fails):
    assert ("6" in failed(text, previous)) == fails


def test_rule_8_finds_whole_words_and_phrases(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("ass\nbad phrase\n\n坏话\n")
    rules = {"offensive_words": str(words)}
    assert failed("what an ASS !", **rules) == {"8"}
    assert failed("first class passage", **rules) == set()
    assert failed("such a Bad Phrase indeed", **rules) == {"8"}
    assert failed("他说坏话了吗", **rules) == {"8"}


def test_rule_8_with_the_lists_that_ship_with_plato2():
    assert failed("what the HELL is that ?", offensive_words="en") == {"8"}
    assert failed("what is that ?", offensive_words="en") == set()
    assert failed("你这个傻逼", offensive_words="zh") == {"8"}


def test_rule_8_needs_a_file_with_words(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for path, why in ((empty, "has no word"), (tmp_path / "missing.txt", "cannot be read.*en, zh")):
        with pytest.raises(UserError, match=rf"clean.offensive_words={re.escape(str(path))}: .*{why}"):
            Cleaner(CleanRules(offensive_words=str(path)))


# -- the rules as they are meant, without haste -----------------------------------------------------------

# Before and after an address stands no ASCII letter; a Chinese one may.
SLOW_URL = re.compile(
    r"(?i)(?:^|[^a-z0-9_])(?:https?://|www\.)\S|[a-z0-9-]+\.(?:com|org|net|edu|gov)(?:$|[^a-z0-9_])"
)
PIECES = [
    "www.",
    "WWW.",
    "https://",
    "http\u017f://",
    ".com",
    ".ORG",
    ".Gov",
    "r/",
    "/u/",
    "&amp;",
    "&gt;",
    "&#39;",
    "&#x2B;",
    "and/or",
]
BLANKS = [" ", " ", "  ", "\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u3000", "\u200b", "\u2028"]
CHARACTERS = [*"éßİ\u017fﬁ²Ⅷ_9\u2019…天\uff0c🙂\ud800\x00", "नि", "e\u0301"]
WORDS = ["I", "i", "tea", "Tea", "don't", "x" * 29, "x" * 30, "x" * 31, ZH]
TEXTS = st.lists(
    st.one_of(*map(st.sampled_from, (PIECES, BLANKS, BLANKS, CHARACTERS, WORDS)), st.text(max_size=8)),
    max_size=20,
).map("".join)


@given(TEXTS, st.sampled_from([1, 2, 5, 30]))
def test_long_words_are_what_they_were(text, longest):
    runs = re.split(rf"(?:\s|[{UNSPACED}])+", text)
    assert has_long_word(text, longest) == any(len(run) > longest for run in runs)


@given(TEXTS)
def test_letters_are_what_they_were(text):
    characters = "".join(text.split())
    letters = [char for char in characters if char.isalpha() or unicodedata.category(char)[0] == "M"]
    assert letter_share(text) == (len(letters) / len(characters) if characters else 1.0)


@given(TEXTS)
def test_addresses_and_special_strings_are_what_they_were(text):
    assert has_url(text) == bool(SLOW_URL.search(text))
    assert has_special_string(text) == bool(
        re.search(r"(?<!\w)[ru]/|&(amp|lt|gt|quot|nbsp|#[0-9]+|#x[0-9A-Fa-f]+);", text)
    )


@given(TEXTS, TEXTS, st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_words_and_their_overlap_are_what_they_were(text, previous, most):
    words = split_words(text)
    assert words == re.findall(rf"[^\W{UNSPACED}]+|[{UNSPACED}]", text.casefold())
    common = (Counter(words) & Counter(split_words(previous))).total()
    assert overlaps(words, split_words(previous), most) == (common > most * len(words))


@given(TEXTS)
def test_keys_of_messages_are_what_they_were(text):
    folded = " ".join(text.split()).casefold().encode("utf-8", "replace")
    assert message_key(text) == int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "little")


@pytest.mark.parametrize(
    "off",
    [
        {"min_tokens": None, "max_tokens": None},
        {"max_word_chars": None, "max_chars": None},
        {"min_letters": None},
        {"urls": False},
        {"special_strings": False},
        {"max_overlap": None},
    ],
)
def test_every_rule_can_be_switched_off(off):
    text = "r/aww www.example.com " + "9" * 2000
    everything = failed(text, text, n_tokens=1)
    assert everything == set("123456")
    assert len(everything - failed(text, text, n_tokens=1, **off)) == 1


def test_no_rule_at_all():
    cleaner = Cleaner(CleanRules.off())
    assert cleaner.check(["", "!!!"], [0, 1]) == [True, True]
    assert not cleaner.hits


@pytest.mark.parametrize(("key", "value"), [("min_tokens", 0), ("min_letters", 1.5), ("max_overlap", -1)])
def test_thresholds_that_make_no_sense(key, value):
    with pytest.raises(UserError, match=f"clean.{key}={value}"):
        CleanRules(**{key: value})


@given(
    st.lists(st.sampled_from(["hi", "Hi ", "hello", "bye", "ok", "x y", "x  Y"]), max_size=60),
    st.integers(1, 9),
)
def test_rule_7_counts_like_a_dictionary(texts, max_repeats):
    counter = RepeatCounter()
    for text in texts:
        counter.add(text)
    plain = Counter(" ".join(text.split()).casefold() for text in texts)
    assert counter.above(max_repeats) == {message_key(t) for t, n in plain.items() if n > max_repeats}
    assert len(counter) == len(texts)


def test_rule_7_in_a_dialogue():
    cleaner = Cleaner(CleanRules(), frozenset({message_key("hello")}))
    assert cleaner.check(["Hello ", "hello you"], [2, 2]) == [False, True]
    assert cleaner.hits["7. repeated more than 100 times"] == 1
    assert (cleaner.n_messages, cleaner.n_failing) == (2, 1)


@pytest.mark.parametrize(
    ("passing", "policy", "parts"),
    [
        ("110111", "split", [range(0, 2), range(3, 6)]),
        ("110111", "subtree", [range(0, 2)]),
        ("110111", "response", [range(0, 6)]),
        ("011", "subtree", []),
        ("0110", "split", [range(1, 3)]),
        ("000", "split", []),
        ("111", "split", [range(0, 3)]),
        ("111", "subtree", [range(0, 3)]),
    ],
)
def test_policies(passing, policy, parts):
    assert conversations([flag == "1" for flag in passing], policy) == parts


@given(st.lists(st.booleans(), max_size=20))
def test_split_keeps_every_passing_turn_once(passing):
    kept = [turn for part in conversations(passing, "split") for turn in part]
    assert kept == [turn for turn, passes in enumerate(passing) if passes]


def test_every_rule_in_the_counts_has_its_option() -> None:
    for option in fields(CleanRules):
        value = {"max_overlap": 0.5, "min_letters": 0.5, "offensive_words": "en"}.get(option.name, 3)
        one = CleanRules(**vars(CleanRules.off()) | {option.name: value})
        assert [option_of(rule) for rule in Cleaner(one).hits] == [option.name]
