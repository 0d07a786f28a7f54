"""Stage 1: a block of lines to the nodes that may be part of a sample, with their token ids.

A node that breaks rules 1-5 or 8-10 is not written, so the messages below it have no parent any more and go
with it in stage 3. A node takes about 43 bytes and its ids; its text is not kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.clean import length_rules, message_key
from plato2.prepare.reddit.dumps import Block, Dump
from plato2.prepare.reddit.messages import Message, parse_comment, parse_submission
from plato2.prepare.reddit.rules import Judge, RedditRules
from plato2.random import hashed

N_EXAMPLES = 5
"""Broken lines whose place and reason are kept; all are counted."""
_CHUNK = 1024  # messages that are encoded together


def node_schema(vocab_size: int) -> pa.Schema:
    """Columns of the nodes; signed types only, because Spark has no others.

    `shard_key` is a hash of the thread (not negative), `month` counts from year 0, `community` stands for the
    name of the forum, `text_key` for the text in rule 7.
    """
    ids = pa.int16() if vocab_size <= 2**15 else pa.int32()
    return pa.schema(
        [
            ("shard_key", pa.int64()),
            ("id", pa.int64()),
            ("parent", pa.int64()),
            ("time", pa.int64()),
            ("month", pa.int32()),
            ("community", pa.int64()),
            ("text_key", pa.int64()),
            ("token_ids", pa.list_(ids)),
        ]
    )


@dataclass
class Counts:
    """What stage 1 counted, by month where it makes sense; addable.

    `funnel[month][name]`: `read`, `no text`, each rule that removed messages, `kept`, `tokens`.
    `hits[month][rule]`: messages that break a rule, whether another one removed them or not; for rule 1 only
    messages that pass all others.
    """

    funnel: dict[str, Counter[str]] = field(default_factory=dict)
    hits: dict[str, Counter[str]] = field(default_factory=dict)
    subreddits: dict[str, Counter[str]] = field(default_factory=dict)
    """`read` and `kept`."""
    hours: Counter[str] = field(default_factory=Counter)
    """Kept comments by hour since 1970, to find the cut-off between training and validation."""
    quarantined: list[str] = field(default_factory=list)
    """Forums the dumps flag, lower case."""
    n_broken: int = 0
    broken_examples: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add what another block counted."""
        for mine, others in (
            (self.funnel, other.funnel),
            (self.hits, other.hits),
            (self.subreddits, other.subreddits),
        ):
            for key, counter in others.items():
                mine.setdefault(key, Counter()).update(counter)
        self.hours.update(other.hours)
        self.quarantined = sorted({*self.quarantined, *other.quarantined})
        self.n_broken += other.n_broken
        self.broken_examples = (self.broken_examples + other.broken_examples)[:N_EXAMPLES]

    def total(self, name: str) -> int:
        """A funnel count over all months."""
        return sum(counter[name] for counter in self.funnel.values())

    def to_json(self) -> bytes:
        """As JSON, for the metadata of a part."""
        return orjson.dumps(vars(self))

    @classmethod
    def from_json(cls, data: bytes) -> Counts:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(data)
        for key in ("funnel", "hits", "subreddits"):
            values[key] = {name: Counter(counter) for name, counter in values[key].items()}
        return cls(**{**values, "hours": Counter(values["hours"])})


class NodeMaker:
    """Turns blocks into nodes; made once in every process that works."""

    def __init__(
        self,
        rules: RedditRules,
        tokenizer: Tokenizer,
        quarantined: frozenset[str] = frozenset(),
        on_broken: str = "stop",
    ) -> None:
        """`quarantined`: forums flagged in the submissions, lower case; `on_broken`: `stop` or `skip`."""
        self._judge = Judge(rules, quarantined)
        self._lengths = length_rules(rules)
        self._tokenizer = tokenizer
        self._on_broken = on_broken
        self._communities: dict[str, int] = {}
        self._schema = node_schema(tokenizer.vocab_size)
        self._id_type = np.int16 if tokenizer.vocab_size <= 2**15 else np.int32

    def nodes(self, dump: Dump, block: Block) -> tuple[pa.Table, Counts]:
        """The nodes of a block (sorted as its lines are) and its counts.

        Raises:
            UserError: a line is no message and `on_broken` is `stop`.
        """
        counts = Counts()
        kept: list[Message] = []
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        waiting: list[Message] = []
        flagged: set[str] = set()
        for message in parse_lines(dump, block, self._on_broken, counts):
            month = month_name(message.time)
            funnel = counts.funnel.get(month)
            if funnel is None:
                funnel = counts.funnel[month] = Counter()
                counts.hits[month] = Counter()
            funnel["read"] += 1
            forum = counts.subreddits.get(message.subreddit)
            if forum is None:
                forum = counts.subreddits[message.subreddit] = Counter()
            forum["read"] += 1
            if message.quarantined:
                flagged.add(message.subreddit.casefold())
            if not message.text or message.text.isspace():
                funnel["no text"] += 1
                continue
            if failing := self._judge.failing(message):
                funnel[failing[0]] += 1
                counts.hits[month].update(failing)
                continue
            waiting.append(message)
            if len(waiting) == _CHUNK:
                ids.append(self._encode(waiting, counts, kept, lengths))
                waiting = []
        ids.append(self._encode(waiting, counts, kept, lengths))
        counts.quarantined = sorted(flagged)
        return self._table(kept, np.concatenate(ids), lengths), counts

    def _encode(
        self, waiting: list[Message], counts: Counts, kept: list[Message], lengths: list[int]
    ) -> np.ndarray:
        """Rule 1 on many messages at once, much faster than one by one: the ids of those that are kept."""
        ids, offsets = self._tokenizer.encode_flat([message.text for message in waiting])
        n_tokens = np.diff(offsets)
        is_kept = np.ones(len(waiting), dtype=bool)
        for row, (message, n) in enumerate(zip(waiting, n_tokens.tolist(), strict=True)):
            funnel = counts.funnel[month_name(message.time)]
            failing = [name for name, breaks in self._lengths.items() if breaks(n)]
            if failing or not n:
                is_kept[row] = False
                funnel[failing[0] if failing else "no text"] += 1
                counts.hits[month_name(message.time)].update(failing)
                continue
            funnel["kept"] += 1
            funnel["tokens"] += n
            counts.subreddits[message.subreddit]["kept"] += 1
            counts.hours[str(message.time // 3600)] += 1
            kept.append(message)
            lengths.append(n)
        return ids[np.repeat(is_kept, n_tokens)]

    def _table(self, kept: list[Message], ids: np.ndarray, lengths: list[int]) -> pa.Table:
        offsets = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        keys = np.array([message_key(message.text) for message in kept], dtype=np.uint64)
        time = np.array([message.time for message in kept], dtype=np.int64)
        threads = np.array([message.thread for message in kept], dtype=np.uint64)
        months = time.astype("datetime64[s]").astype("datetime64[M]").astype(np.int32) + 1970 * 12
        communities = np.array([self._community(message.subreddit) for message in kept], dtype=np.uint64)
        columns = [
            pa.array((hashed(threads) >> np.uint64(1)).astype(np.int64)),
            pa.array([message.id for message in kept], pa.int64()),
            pa.array([message.parent for message in kept], pa.int64()),
            pa.array(time),
            pa.array(months),
            pa.array(communities.view(np.int64)),
            pa.array(keys.view(np.int64)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(self._id_type))),
        ]
        return pa.table(columns, schema=self._schema)

    def _community(self, name: str) -> int:
        key = self._communities.get(name)
        if key is None:
            key = self._communities[name] = message_key(name)
        return key


def parse_lines(dump: Dump, block: Block, on_broken: str, counts: Counts) -> Iterator[Message]:
    """The messages of a block; a line that holds none stops the run or is counted.

    Raises:
        UserError: such a line, when `on_broken` is `stop`.
    """
    parse = parse_comment if dump.kind == "comments" else parse_submission
    for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not line or line.isspace():
            continue
        try:
            yield parse(load_line(line))
        except ValueError as error:  # orjson's are ValueErrors, also for bytes that are not UTF-8
            why = f"not valid JSON ({error})" if isinstance(error, orjson.JSONDecodeError) else str(error)
            if on_broken == "stop":
                raise UserError(
                    f"{dump.path}:{number}: {why}; fix the file, or leave such lines out with "
                    "--on-broken skip"
                ) from None
            counts.n_broken += 1
            if len(counts.broken_examples) < N_EXAMPLES:
                counts.broken_examples.append(f"{dump.path}:{number}: {why}")


def load_line(line: bytes) -> Any:
    """The JSON value of a line.

    A few real lines hold half a surrogate pair, which strict JSON does not allow: it becomes U+FFFD.

    Raises:
        ValueError: not JSON, or not UTF-8.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b"\\u" not in line:
            raise
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise error from None
        return (
            {key: _whole_pairs(value) for key, value in record.items()}
            if isinstance(record, dict)
            else record
        )


def _whole_pairs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_MONTHS: dict[int, str] = {}


def month_name(time: int) -> str:
    """The month of a time in seconds since 1970, such as `2011-01`."""
    day = time // 86400
    name = _MONTHS.get(day)
    if name is None:
        name = _MONTHS[day] = datetime.fromtimestamp(time, UTC).strftime("%Y-%m")
    return name
