"""Word lists: `find` against the plain regular expression, the shipped lists, and mistakes of the user."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.words import NAME_LISTS, UNSPACED, WORD_LISTS, WordList, ascii_words, read_names

KEY = "clean.offensive_words"
LISTS = files("plato2") / "lists"
OWN = [
    "ass",
    "Bad phrase",
    "f.u.c.k",
    "sh!t",
    "-x-",
    "don't",
    "caf",
    "café",
    "Жёлудь",
    "éé",
    "坏话",
    "T恤",
    ":-*",
]


def shipped(file: str) -> list[str]:
    lines = (LISTS / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("# ")]


ENTRIES = {"own": OWN, **{name: shipped(file) for name, file in WORD_LISTS.items()}}


def slow_pattern(entries: list[str]) -> re.Pattern[str]:
    """The meaning of a word list, as one alternation; it takes over 100 microseconds a message."""
    ordered = sorted(set(entries), key=lambda entry: (-len(entry), entry))
    spaced = [re.escape(entry) for entry in ordered if not re.search(f"[{UNSPACED}]", entry)]
    glued = [re.escape(entry) for entry in ordered if re.search(f"[{UNSPACED}]", entry)]
    parts = ([rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)"] if spaced else []) + glued
    return re.compile("|".join(parts), re.IGNORECASE)


SLOW = {name: slow_pattern(entries) for name, entries in ENTRIES.items()}
FAST = {name: WordList(entries) for name, entries in ENTRIES.items()}


def same_case_rules(char: str) -> bool:
    """Whether casefolding and re.IGNORECASE agree on it; they do not on ß, ﬁ, and some Greek and Cherokee."""
    folded = char.casefold()
    lower = char.lower()
    return len(folded) == 1 and (folded == lower or char.isascii()) and char not in "\u0131\u03c2\u0345"


CHARACTERS = st.characters(codec="utf-8").filter(same_case_rules)


@st.composite
def texts(draw: st.DrawFn, entries: list[str]) -> str:
    """Entries and parts of them in any case, glued together with or without something between."""
    change = st.sampled_from([str, str.upper, str.lower, str.title])
    words = st.builds(lambda word, how: how(word), st.sampled_from(entries), change)
    halves = words.map(lambda word: word[: (len(word) + 1) // 2])
    between = st.sampled_from(["", "  ", *" \n.'\u2019-_!…你。és🙂"])
    other = st.text(CHARACTERS, max_size=6)
    parts = st.one_of(words, halves, between, between, between, other, st.sampled_from(["well", "I", "2"]))
    text = "".join(draw(st.lists(parts, max_size=12)))
    return "".join(filter(same_case_rules, text))


@pytest.mark.parametrize("name", ENTRIES)
@given(data=st.data())
def test_find_means_what_the_alternation_means(name: str, data: st.DataObject) -> None:
    text = data.draw(texts(ENTRIES[name]))
    found = FAST[name].find(text)
    assert (found is not None) == bool(SLOW[name].search(text))
    if found is not None:
        assert found in map(str.casefold, ENTRIES[name])
        assert slow_pattern([found]).search(text)


@given(st.lists(st.text(CHARACTERS, min_size=1, max_size=5), min_size=1, max_size=6), st.data())
def test_find_with_any_entries(entries: list[str], data: st.DataObject) -> None:
    text = data.draw(texts(entries))
    assert (WordList(entries).find(text) is not None) == bool(slow_pattern(entries).search(text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("what an ASS !", "ass"),
        ("first class passage", None),
        ("ass_hat", None),
        ("such a BAD phrase, indeed", "bad phrase"),
        ("bad  phrase", None),
        ("F.U.C.K!", "f.u.c.k"),
        ("f u c k", None),
        ("oh Sh!t.", "sh!t"),
        ("don\u2019t", None),
        ("un café", "café"),
        ("cafés", None),
        ("à caf", "caf"),
        ("ИЩИ ЖЁЛУДЬ!", "жёлудь"),
        ("他说坏话了吗", "坏话"),
        ("my t恤s", "t恤"),
        ("bye :-*", ":-*"),
        ("a:-*", None),
        ("", None),
    ],
)
def test_what_is_found(text: str, found: str | None) -> None:
    assert FAST["own"].find(text) == found


@given(st.text())
def test_ascii_words(text: str) -> None:
    folded = text.casefold()
    assert ascii_words(folded) == re.findall(r"[a-z0-9_]+", folded)


def test_the_shipped_lists() -> None:
    for name, file in WORD_LISTS.items():
        entries = shipped(file)
        assert len(entries) == len(set(map(str.casefold, entries)))
        assert entries == sorted(entries, key=lambda entry: (entry.casefold(), entry))
        words = WordList.read(name, KEY)
        assert sorted(words.entries) == sorted(map(str.casefold, entries))
        assert all(words.find(f"well {entry} !") for entry in entries)
    assert WordList.read("en", KEY).find("how was your day ? I fixed my bike .") is None
    assert WordList.read("zh", KEY).find("今天天气真好。我们一起去公园散步。好不好") is None
    assert {"automoderator", "remindmebot"} <= read_names("bots", "bots")
    assert {"coontown", "the_donald"} <= read_names("quarantined", "quarantined")


def test_sources_say_where_every_list_comes_from() -> None:
    sources = (LISTS / "SOURCES.md").read_text(encoding="utf-8")
    names = {file.name for file in LISTS.iterdir()} - {"SOURCES.md"}
    assert names == {*WORD_LISTS.values(), *NAME_LISTS.values(), "starts_en.txt"}
    for file in names:
        assert re.search(rf"`{file}` .*\| {len(shipped(file))} \|", sources)
    assert "Permission is hereby granted, free of charge" in sources
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"plato2" = ["py.typed", "lists/*"]' in project  # else the wheel is without them


def test_a_file_has_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# a comment\n#\n\n#tag\n  Some Words \n", encoding="utf-8")
    words = WordList.read(str(path), KEY)
    assert words.find("a comment #TAG") == "#tag"
    assert words.find("some words") == "some words"
    assert words.find("a comment # tag") is None
    path.write_text("# bots\nu/One\n/u/TWO\nr/Three\n/r/four\nu_five\n", encoding="utf-8")
    assert read_names(str(path), KEY) == {"one", "two", "three", "four", "u_five"}


def test_mistakes_name_the_key_the_value_and_the_cure(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, why in [
        ("no_such.txt", "cannot be read.*No such file"),
        ("latin.txt", "cannot be read.*not UTF-8"),
        (".", "cannot be read.*Is a directory"),
        ("empty.txt", "the file has no word or phrase"),
    ]:
        value = str(tmp_path / name)
        with pytest.raises(UserError, match=rf"^{KEY}={re.escape(value)}: {why}.* per line.*: en, zh$"):
            WordList.read(value, KEY)
    with pytest.raises(
        UserError, match=r"^bots=robots: cannot be read.*one name per line.*: bots, quarantined$"
    ):
        read_names("robots", "bots")
