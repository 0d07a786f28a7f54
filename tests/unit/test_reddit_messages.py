"""Lines of dumps to messages: real lines of every year, ids in every form, and what is refused."""

from __future__ import annotations

import gzip
import json
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plato2.prepare.reddit.messages import Message, parse_comment, parse_submission

SHARED = Path(__file__).parents[3] / "shared" / "data"
COMMENT = {
    "id": "c0b7g40",
    "parent_id": "t1_c0b7g2x",
    "link_id": "t3_8s2rp",
    "created_utc": 1245000000,
    "author": "ann",
    "subreddit": "pics",
    "body": "hello there",
}
SUBMISSION = {
    "id": "8s2rp",
    "created_utc": "1245000000",
    "author": "bob",
    "subreddit": "pics",
    "title": "look",
}


def base36(node: int) -> str:
    """The id as Reddit writes it, such as `t1_c81`."""
    number, digits = node >> 1, ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return f"t{3 if node & 1 else 1}_{digits}"


@pytest.fixture
def samples() -> Path:
    folder = SHARED / "reddit_pushshift"
    if not folder.exists():
        pytest.skip("needs ../shared/data (real dumps)")
    return folder


def records(path: Path) -> Iterator[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    yield from map(json.loads, text.splitlines())


def comment(**changes: object) -> Message:
    return parse_comment({key: value for key, value in (COMMENT | changes).items() if value is not ...})


def submission(**changes: object) -> Message:
    return parse_submission({key: value for key, value in (SUBMISSION | changes).items() if value is not ...})


def node(number: str, kind: int = 1) -> int:
    return 2 * int(number, 36) + (kind == 3)


# -- real lines ------------------------------------------------------------------------------------------


def same_text(text: str | None, record: dict[str, Any], key: str) -> bool:
    return text == ("" if record[key] in ("[deleted]", "[removed]", None) else record[key])


@pytest.mark.parametrize(
    ("file", "n", "of_submissions", "empty", "without_submission"),
    [
        ("praw_comments.ndjson.gz", 6842, 2283, 58, 179),
        ("pmaw_comments.ndjson.gz", 2019, 558, 399, 0),
        ("arctic_2024-02_comments.ndjson", 27, 18, 4, 0),
    ],
)
def test_real_comments(
    samples: Path, file: str, n: int, of_submissions: int, empty: int, without_submission: int
) -> None:
    lines = list(records(samples / file))
    assert len(lines) == n
    n_to_submission = n_without = n_empty = 0
    for line in lines:
        message = parse_comment(line)
        assert base36(message.id) == f"t1_{line['id'].lower()}"
        assert same_text(message.text, line, "body")
        assert (message.time, message.author) == (int(line["created_utc"]), line["author"] or "")
        parent, link = line.get("parent_id"), line.get("link_id")
        if isinstance(parent, str):
            assert base36(message.parent) == parent
        elif parent is None:
            assert message.parent == message.thread
        else:
            assert message.parent == 2 * parent
        if link is not None:
            assert base36(message.thread) == link
        n_to_submission += message.parent & 1
        n_without += not message.thread & 1
        n_empty += not message.text
    assert (n_without, n_to_submission) == (without_submission, of_submissions)
    assert n_empty == empty


def test_a_decimal_parent_is_the_comment_that_other_lines_call_by_name(samples: Path) -> None:
    """The numbers of 2020 fit the ids: parents are older than their answers, by number and by time."""
    messages = [parse_comment(line) for line in records(samples / "pmaw_comments.ndjson.gz")]
    by_id = {message.id: message for message in messages}
    answers = [message for message in messages if not message.parent & 1]
    assert all(message.parent < message.id for message in answers)
    known = [(message, by_id[message.parent]) for message in answers if message.parent in by_id]
    assert len(known) > 188  # those with a name
    assert all(above.thread == below.thread and above.time <= below.time for below, above in known)


@pytest.mark.parametrize(
    ("file", "n", "quarantined"),
    [
        ("praw_submissions.ndjson.gz", 7233, 101),
        ("pmaw_submissions.ndjson.gz", 3329, 0),
        ("arctic_2024-02_submissions.ndjson", 31, 0),
    ],
)
def test_real_submissions(samples: Path, file: str, n: int, quarantined: int) -> None:
    lines = list(records(samples / file))
    messages = [parse_submission(line) for line in lines]
    for line, message in zip(lines, messages, strict=True):
        assert base36(message.id) == f"t3_{line['id']}"
        assert message.id == message.parent == message.thread
        assert same_text(message.text, line, "title")
    assert (len(messages), sum(message.quarantined for message in messages)) == (n, quarantined)


def test_a_thread_of_bigquery_with_numbers_as_texts(samples: Path) -> None:
    """An array of JSON, not a dump: its objects are comments all the same."""
    lines = json.loads((samples / "polyai_thread.json").read_text(encoding="utf-8"))
    messages = [parse_comment(line) for line in lines]
    assert len(messages) == 13
    assert {base36(message.thread) for message in messages} == {"t3_82ymmx"}
    assert [str(message.time) for message in messages] == [line["created_utc"] for line in lines]
    ids = {message.id for message in messages}
    assert Counter(message.parent in ids for message in messages)[True] >= 6


# -- ids -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 2**61 - 1)


@given(NUMBERS, st.booleans())
def test_ids_there_and_back(number: int, is_submission: bool) -> None:
    name = base36(2 * number + is_submission)
    prefix, _, digits = name.partition("_")
    assert prefix == ("t3" if is_submission else "t1")
    assert int(digits, 36) == number
    assert digits == "0" or digits[0] != "0"
    for form in (name, digits, digits.upper()):
        if is_submission:
            assert submission(id=form).id == 2 * number + 1
        else:
            assert comment(id=form).id == 2 * number
    assert comment(parent_id=name).parent == 2 * number + is_submission
    assert comment(parent_id=number).parent == 2 * number


@given(st.text(string.digits + string.ascii_lowercase, min_size=1, max_size=4))
def test_the_first_ids_have_one_to_three_characters(digits: str) -> None:
    for name in (digits, f"t1_{digits}"):
        assert comment(id=name).id == node(digits)
    for name in (digits, f"t3_{digits}"):
        assert submission(id=name).id == comment(link_id=name).thread == node(digits, 3)


def test_ids_of_comments_and_submissions_never_meet() -> None:
    assert comment(id="abc").id != submission(id="abc").id
    assert comment(parent_id="t3_abc").parent == submission(id="abc").id
    assert comment(parent_id="abc").parent == comment(id="abc").id


@pytest.mark.parametrize(
    ("changes", "parent", "thread"),
    [
        ({}, node("c0b7g2x"), node("8s2rp", 3)),
        ({"parent_id": None}, node("8s2rp", 3), node("8s2rp", 3)),
        ({"parent_id": ...}, node("8s2rp", 3), node("8s2rp", 3)),
        ({"parent_id": 35}, node("z"), node("8s2rp", 3)),
        ({"parent_id": 0}, node("0"), node("8s2rp", 3)),
        ({"parent_id": "t3_8s2rp", "link_id": ...}, node("8s2rp", 3), node("8s2rp", 3)),
        (
            {"parent_id": "t3_8s2rp", "link_id": ..., "permalink": "/r/a/comments/z9/"},
            node("8s2rp", 3),
            node("8s2rp", 3),
        ),
        ({"link_id": ..., "permalink": "/r/a/comments/z9/title/c0/"}, node("c0b7g2x"), node("z9", 3)),
        ({"link_id": None, "permalink": "http://x.com/r/a/comments/z9"}, node("c0b7g2x"), node("z9", 3)),
        ({"link_id": ...}, node("c0b7g2x"), node("c0b7g2x")),
        ({"link_id": ..., "permalink": "/r/comments/"}, node("c0b7g2x"), node("c0b7g2x")),
        ({"link_id": ..., "parent_id": ..., "permalink": "/comments/z9/"}, node("z9", 3), node("z9", 3)),
        ({"id": ..., "name": "t1_c0b7g40"}, node("c0b7g2x"), node("8s2rp", 3)),
        ({"id": "", "name": "t1_c0b7g40"}, node("c0b7g2x"), node("8s2rp", 3)),
    ],
)
def test_what_a_comment_answers(changes: dict[str, object], parent: int, thread: int) -> None:
    assert comment(**changes)[:3] == (node("c0b7g40"), parent, thread)


# -- the other fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse", [comment, submission])
@pytest.mark.parametrize(
    ("flags", "quarantined"),
    [
        ({}, False),
        ({"quarantine": True}, True),
        ({"quarantined": True}, True),
        ({"quarantine": False, "quarantined": True}, True),
        ({"quarantine": None, "quarantined": None}, False),
        ({"quarantine": "false", "quarantined": 0}, False),
    ],
)
def test_flags(parse: Callable[..., Message], flags: dict[str, object], quarantined: bool) -> None:
    assert parse(**flags).quarantined is quarantined


@pytest.mark.parametrize(("parse", "key"), [(comment, "body"), (submission, "title")])
@pytest.mark.parametrize(
    ("text", "is_gone"),
    [
        ("[deleted]", True),
        ("[removed]", True),
        ("[ Removed by Reddit ]", True),
        ("[deleted by user]", True),
        (None, True),
        ("", True),
        ("[deleted] ?", False),
        ("deleted", False),
        (" ", False),
    ],
)
def test_texts_that_are_gone(
    parse: Callable[..., Message], key: str, text: str | None, is_gone: bool
) -> None:
    assert parse(**{key: text}).text == ("" if is_gone else text)


@pytest.mark.parametrize("name", [None, ..., 5, ["ann"]])
@pytest.mark.parametrize("parse", [comment, submission])
def test_authors_and_forums_may_be_missing(parse: Callable[..., Message], name: object) -> None:
    message = parse(author=name, subreddit=name)
    assert (message.author, message.subreddit) == ("", "")


@pytest.mark.parametrize("time", [1245000000, 1245000000.0, "1245000000", "1245000000.0", 1245000000.9])
def test_times(time: object) -> None:
    assert comment(created_utc=time).time == submission(created_utc=time).time == 1245000000


# -- faults ----------------------------------------------------------------------------------------------

NO_IDS = ["", "t1_", "c-1", "-1", "t1_é", "٣", "  ", "%", "z" * 14, 7, 7.5, True, [], ["t", "1", "_"], {}]


@pytest.mark.parametrize("key", ["id", "link_id", "parent_id"])
@pytest.mark.parametrize("value", NO_IDS)
def test_what_is_no_id_is_named(key: str, value: object) -> None:
    if key == "parent_id" and isinstance(value, int):
        return  # the comment's number, in decimal
    with pytest.raises(ValueError, match=f"^{key} .* is not an id in base 36$") as caught:
        comment(**{key: value})
    if key != "id" or value:  # an empty id is looked for under `name`
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": ...}, "not a comment: no body"),
        ({"body": 5}, "body is not a text but int"),
        ({"body": ["a"]}, "body is not a text but list"),
        ({"id": ...}, "id None is not an id"),
        ({"parent_id": -1}, "parent_id -1 is out of range"),
        ({"parent_id": 2**61}, f"parent_id {2**61} is out of range"),
        ({"parent_id": None, "link_id": None}, "the comment answers nothing"),
        ({"link_id": None, "permalink": f"/comments/{'z' * 20}/"}, "permalink 'zzzz"),
        ({"created_utc": ...}, "created_utc None is not a time"),
        ({"created_utc": "June"}, "created_utc 'June' is not a time"),
        ({"created_utc": -1}, "created_utc -1 is not a time"),
        ({"created_utc": 1245000000000}, "created_utc 1245000000000 is not a time"),
        ({"created_utc": float("nan")}, "created_utc nan is not a time"),
        ({"created_utc": "inf"}, "created_utc 'inf' is not a time"),
        ({"created_utc": [1]}, r"created_utc \[1\] is not a time"),
    ],
)
def test_comments_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comment(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": ...}, "not a submission: no title"),
        ({"title": {}}, "title is not a text but dict"),
        ({"id": None}, "id None is not an id"),
        ({"created_utc": ""}, "created_utc '' is not a time"),
    ],
)
def test_submissions_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submission(**changes)


def test_a_submission_is_no_comment() -> None:
    with pytest.raises(ValueError, match="not a comment: no body"):
        parse_comment(SUBMISSION)
    with pytest.raises(ValueError, match="not a submission: no title"):
        parse_submission(COMMENT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(JSON, st.sampled_from([*COMMENT, "permalink", "name", "quarantine"]), st.booleans())
def test_no_value_of_a_field_has_another_error(value: Any, key: str, links: bool) -> None:
    """A message or a ValueError, and node ids that fit in int64."""
    for parse, record, more in (
        (parse_comment, COMMENT, {} if links else {"link_id": None, "parent_id": None}),
        (parse_submission, SUBMISSION, {}),
    ):
        try:
            message = parse({**record, **more, key: value})
        except ValueError:
            continue
        assert all(0 <= number < 2**62 for number in message[:3])


@given(JSON)
def test_no_line_has_another_error(value: Any) -> None:
    for parse, what in ((parse_comment, "comment"), (parse_submission, "submission")):
        with pytest.raises(ValueError, match=f"not a {what}: "):
            parse(value)
