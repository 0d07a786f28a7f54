"""Every option of `plato2 prepare reddit`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from plato2.config import UserError, expand_path
from plato2.prepare.reddit.rules import LANGUAGES, RedditRules, check_language
from plato2.prepare.reddit.threads import Orphans

EngineName = Literal["local", "spark"]
OnBroken = Literal["stop", "skip"]


def usable_cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class RedditOptions:
    """All that decides what is written, and where and how it is made.

    Raises:
        UserError: a value that cannot be; names the key.
    """

    comments: list[str]
    """Paths or globs of the dumps of comments (`RC_*`), local or remote."""
    out: str
    """The folder to write."""
    submissions: list[str] = field(default_factory=list)
    """Dumps of submissions (`RS_*`): their titles become the roots of the trees, and their flags say which
    forums are quarantined."""
    language: str = "en"
    """`en` or `zh`: rule 8's list and the size of a trained tokenizer."""
    rules: RedditRules = field(default_factory=RedditRules)
    """The cleaning rules."""
    tokenizer: str | None = None
    """Folder of a tokenizer; None trains one on a sample of the messages."""
    vocab_pieces: int | None = None
    """Pieces of a tokenizer to train; None: the language's."""
    character_coverage: float = 0.9995
    """Share of the characters a trained tokenizer knows."""
    lower_case: bool = False
    """Whether a trained tokenizer lower-cases."""
    tokenizer_messages: int = 300_000
    """Messages it is trained on at most."""
    orphans: Orphans = "drop"
    """A comment whose parent is not there: removed with its sub-tree, or the root of a tree."""
    max_context: int = 128
    """Ids of a context, special ids included."""
    max_response: int = 128
    """Ids of a response, special ids included."""
    cut_turn: bool = False
    """Keep the end of a parent that alone is too long, instead of losing the sample."""
    valid_from: str | None = None
    """First day (UTC, `2019-08-01`) of the responses for validation; None: the last 2 % of the comments."""
    valid_samples: int = 200_000
    """Validation samples at most, drawn from all after `valid_from`; the paper: 0.2M."""
    shard_nodes: int = 32_768
    """Nodes that make a shard, on average."""
    on_broken: OnBroken = "stop"
    """At a line or stream that cannot be read: stop, or skip and count."""
    engine: EngineName = "local"
    """Where the work is done."""
    workers: int = field(default_factory=usable_cores)
    """Processes of the local engine."""
    memory: str = "1GB"
    """What DuckDB may take before it writes to disk."""
    spark_master: str | None = None
    """Master URL of Spark; None: as Spark is configured, else `local[workers]`."""
    spark_conf: dict[str, str] = field(default_factory=dict)
    """Settings of Spark, such as `spark.executor.memory`."""
    work: str | None = None
    """Folder of the parts in progress; None: `<out>.work`."""
    keep_work: bool = False
    """Keep that folder at the end."""
    force: bool = False
    """Replace an existing prepared corpus."""

    @property
    def pieces(self) -> int:
        """Pieces of a tokenizer that is to be trained."""
        return self.vocab_pieces or LANGUAGES[self.language]

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("out", "work", "tokenizer"):
            if (path := getattr(self, key)) is not None:
                setattr(self, key, expand_path(path, key))
        for key in ("comments", "submissions"):
            files = [getattr(self, key)] if isinstance(getattr(self, key), str) else getattr(self, key)
            setattr(self, key, [expand_path(file, key) for file in files])
        for key in ("out", "work"):
            if "://" in str(getattr(self, key)):
                raise UserError(
                    f"{key}={getattr(self, key)}: must be a folder that this machine (and every executor) "
                    "has mounted; copy the result afterwards"
                )
        if not self.comments:
            raise UserError("comments is empty: name the dumps, such as --comments 'dumps/RC_*.zst'")
        check_language(self.language)
        for key, kind in (("orphans", Orphans), ("on_broken", OnBroken), ("engine", EngineName)):
            if getattr(self, key) not in get_args(kind):
                raise UserError(f"{key}={getattr(self, key)!r}: must be one of {', '.join(get_args(kind))}")
        at_least = {"max_context": 3, "max_response": 3, "shard_nodes": 1, "workers": 1, "valid_samples": 1}
        at_least |= {"tokenizer_messages": 1, "vocab_pieces": 4}
        for key, least in at_least.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key}={value}: must be at least {least}")
        if self.engine != "spark" and (self.spark_master or self.spark_conf):
            raise UserError("master and conf are Spark's: add --engine spark, or leave them out")
        if self.max_context > 65535:
            raise UserError(f"max_context={self.max_context}: must be at most 65535")
        self.valid_time  # noqa: B018  a wrong day fails here

    @property
    def valid_time(self) -> int | None:
        """`valid_from` in seconds since 1970.

        Raises:
            UserError: it is no day.
        """
        if self.valid_from is None:
            return None
        try:
            day = datetime.fromisoformat(self.valid_from)
        except ValueError:
            raise UserError(f"valid_from={self.valid_from!r}: must be a day such as 2019-08-01") from None
        return int((day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp())

    def plain(self) -> dict[str, Any]:
        """The options that shape the samples, as plain values for the index."""
        elsewhere = {
            "out",
            "force",
            "work",
            "keep_work",
            "engine",
            "workers",
            "memory",
            "spark_master",
            "spark_conf",
        }
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in elsewhere}
