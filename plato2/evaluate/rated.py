"""Replies with human ratings, from the files that metric audits read.

Three forms: FED (`.json`, turns with nine qualities each), the ratings of DailyDialog's multi-reference set
(`.csv`, one mean per reply), and JSON lines of anyone's own.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plato2.config import UserError
from plato2.evaluate.dialogues import read_text
from plato2.formats import Open, parse

CURE = (
    'give JSON lines of {"context": ["..."], "reply": "...", "ratings": [3, 4]} (or "ratings": '
    "{\"quality\": [3, 4]}), FED's JSON or DailyDialog's CSV of ratings"
)
QUALITY = "rating"
"""What is rated where a file does not say."""
_SPEAKER = re.compile(r"(User|System): ?")


@dataclass(frozen=True)
class RatedReply:
    """A reply and what people gave it."""

    context: tuple[str, ...]
    reply: str
    ratings: dict[str, tuple[float, ...]]
    """Quality -> the ratings of people, in any order."""
    references: tuple[str, ...] = ()


class _Own(Open):
    context: list[str]
    reply: str
    ratings: list[float | None] | dict[str, list[float | None]]
    references: list[str] | None = None


class _Fed(Open):
    context: str
    annotations: dict[str, list[float | str | None]]
    response: str | None = None


def read_rated(path: str | Path) -> tuple[list[RatedReply], dict[str, int]]:
    """The rated replies of a file; `.gz` is decompressed.

    Returns:
        The replies, and counts: `replies`; `unrated`, left out; `labels_missing`, such as null or a text;
        `dialogues`, FED's ratings of whole dialogues, left out.

    Raises:
        UserError: no such file, another format, or no rating in it.
    """
    path = Path(path)
    text = read_text(path, CURE)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    counts: Counter[str] = Counter()
    read = {".csv": _csv, ".json": _fed}.get(suffix, _own)
    replies = []
    for reply in read(path, text, counts):
        counts["unrated"] += not reply.ratings
        if reply.ratings:
            replies.append(reply)
    if not replies:
        raise UserError(f"{path}: no rated reply in it; {CURE}")
    counts["replies"] = len(replies)
    names = ("replies", "unrated", "labels_missing", "dialogues")
    return replies, {name: counts[name] for name in names}


def _numbers(labels: dict[str, Any], counts: Counter[str]) -> dict[str, tuple[float, ...]]:
    """Only the labels that are numbers, only the qualities that have one."""
    found = {}
    for quality, given in labels.items():
        kept = tuple(float(label) for label in given if isinstance(label, int | float))
        counts["labels_missing"] += len(given) - len(kept)
        if kept:
            found[quality] = kept
    return found


def _own(path: Path, text: str, counts: Counter[str]) -> Iterator[RatedReply]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            own = parse(_Own, line.encode("utf-8", "surrogatepass"), f"{path}:{number}", CURE)
            labels = own.ratings if isinstance(own.ratings, dict) else {QUALITY: own.ratings}
            ratings = _numbers(labels, counts)
            yield RatedReply(tuple(own.context), own.reply, ratings, tuple(own.references or ()))


def _fed(path: Path, text: str, counts: Counter[str]) -> Iterator[RatedReply]:
    for record in parse(list[_Fed], text.encode("utf-8", "surrogatepass"), str(path), CURE):
        if record.response is None:
            counts["dialogues"] += 1
            continue
        turns: list[str] = []
        for line in record.context.split("\n"):
            if (speaker := _SPEAKER.match(line)) or not turns:
                turns.append(line[speaker.end() if speaker else 0 :])
            else:
                turns[-1] += f" {line}"
        reply = _SPEAKER.sub("", record.response, count=1)
        yield RatedReply(tuple(turns), reply, _numbers(record.annotations, counts))


def _csv(path: Path, text: str, counts: Counter[str]) -> Iterator[RatedReply]:
    """Turns of `context` are divided by ||||, `all_references` by tabs."""
    rows = csv.DictReader(io.StringIO(text, newline=""), restval="")
    columns = ("context", "response", "human_average_rating", "all_references")
    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
        raise UserError(f"{path}: no column {missing[0]}; {CURE}")
    try:
        for number, row in enumerate(rows, start=1):
            label = row["human_average_rating"].strip()
            try:
                rating = float(label) if label else math.nan
            except ValueError:
                raise UserError(
                    f"{path}: row {number}: human_average_rating={label!r}: not a number; {CURE}"
                ) from None
            ratings = _numbers({QUALITY: [rating if math.isfinite(rating) else None]}, counts)
            references = tuple(filter(None, row["all_references"].split("\t")))
            yield RatedReply(tuple(row["context"].split("||||")), row["response"], ratings, references)
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error}); {CURE}") from None
