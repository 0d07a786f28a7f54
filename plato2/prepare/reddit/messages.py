"""One line of a dump to a message, whatever the year it was written in.

What the schemas of 2005 to 2024 disagree on: numbers are numbers or strings; ids come with and without their
`t1_` (comment) or `t3_` (submission); `parent_id` may be a decimal number, or null for a comment on the
submission itself; `link_id` may be missing and is then read from `permalink`; a quarantined forum is flagged
as `quarantine` or `quarantined`, in newer dumps only.

Node ids are one number for comments and submissions alike: twice the base-36 number, plus 1 for a submission.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_PERMALINK = re.compile(r"/comments/([0-9a-z]+)(?:/|$)")
_GONE = frozenset({"[deleted]", "[removed]", "[ Removed by Reddit ]", "[deleted by user]"})
_LATEST = 253_402_300_799  # 9999-12-31


class Message(NamedTuple):
    """A comment, or a submission as its title."""

    id: int
    parent: int
    """Node id of what it answers; a submission is its own parent."""
    thread: int
    """Node id of its submission; of its parent when the dump does not say."""
    time: int
    """Seconds since 1970, UTC."""
    text: str
    """Empty when the message was deleted, removed, or never had one."""
    author: str
    subreddit: str
    quarantined: bool
    """The dump flags its forum as quarantined."""


def parse_comment(record: Any) -> Message:
    """A message from a parsed line of `RC_*`.

    Raises:
        ValueError: this is no comment; says what is wrong.
    """
    if not isinstance(record, dict) or "body" not in record:
        raise ValueError("not a comment: " + ("no body" if isinstance(record, dict) else "not an object"))
    number = _number(record.get("id") or record.get("name"), "id")
    parent = _parent(record.get("parent_id"))
    link = record.get("link_id")
    if link is not None:
        thread = 2 * _number(link, "link_id") + 1
    elif parent is not None and parent & 1:
        thread = parent
    elif found := _PERMALINK.search(str(record.get("permalink") or "")):
        thread = 2 * _number(found[1], "permalink") + 1
    elif parent is not None:
        thread = parent
    else:
        raise ValueError("neither parent_id nor link_id nor permalink: the comment answers nothing")
    return _message(record, "body", 2 * number, thread if parent is None else parent, thread)


def parse_submission(record: Any) -> Message:
    """A message from a parsed line of `RS_*`: its title, the root of a thread.

    Raises:
        ValueError: this is no submission; says what is wrong.
    """
    if not isinstance(record, dict) or "title" not in record:
        raise ValueError("not a submission: " + ("no title" if isinstance(record, dict) else "not an object"))
    number = 2 * _number(record.get("id") or record.get("name"), "id") + 1
    return _message(record, "title", number, number, number)


def _message(record: dict[str, Any], key: str, number: int, parent: int, thread: int) -> Message:
    """What comments and submissions have in common; `key` is that of the text."""
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{key} is not a text but {type(text).__name__}")
    return Message(
        number,
        parent,
        thread,
        _time(record.get("created_utc")),
        "" if text is None or text in _GONE else text,
        _name(record.get("author")),
        _name(record.get("subreddit")),
        record.get("quarantine") is True or record.get("quarantined") is True,
    )


def _number(value: Any, key: str) -> int:
    """The number of an id such as `t1_c81`, `c81`."""
    try:
        number = int(value[3:] if value[2] == "_" else value, 36)
    except (TypeError, ValueError, LookupError):
        is_short = isinstance(value, str) and len(value) < 3 and value.isascii() and value.isalnum()
        number = int(value, 36) if is_short else -1  # one of the first thousand
    if not 0 <= number < 2**61:
        raise ValueError(f"{key} {value!r} is not an id in base 36")
    return number


def _parent(value: Any) -> int | None:
    """Node id of `parent_id`; None: the submission itself."""
    if value is None:
        return None
    if isinstance(value, int):  # dumps of pushshift's last years: the comment's number, in decimal
        if not 0 <= value < 2**61:
            raise ValueError(f"parent_id {value!r} is out of range")
        return 2 * value
    return 2 * _number(value, "parent_id") + (isinstance(value, str) and value.startswith("t3_"))


def _time(value: Any) -> int:
    try:
        seconds = int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"created_utc {value!r} is not a time in seconds since 1970") from None
    if not 0 <= seconds <= _LATEST:
        raise ValueError(f"created_utc {value!r} is not a time in seconds since 1970")
    return seconds


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""
