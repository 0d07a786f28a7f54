"""Every option of `plato2 prepare reddit`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from plato2.config import UserError, check_options, expand_path, option
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
        UserError: an impossible value; names the key.
    """

    comments: list[str] = option(help="Dumps of comments (RC_*): paths or globs, local or remote.")
    out: str = option(help="Folder to write.")
    submissions: list[str] = option(
        factory=list,
        help="Dumps of submissions (RS_*): their titles open the conversations, and their flags say which "
        "forums are quarantined.",
    )
    language: str = option(
        "en", help=f"{' or '.join(LANGUAGES)}: the word list and the size of a trained tokenizer."
    )
    rules: RedditRules = option(factory=RedditRules, help="The cleaning rules.")
    tokenizer: str | None = option(
        None, help="Folder of a tokenizer; default: one is trained on a sample of the messages."
    )
    vocab_pieces: int | None = option(
        None, help="Pieces of a tokenizer to train.", ge=4, default_text="the language's"
    )
    character_coverage: float = option(0.9995, help="Share of the characters a trained tokenizer knows.")
    lower_case: bool = option(False, help="Make a trained tokenizer lower-case all text.")
    tokenizer_messages: int = option(300_000, help="Train it on at most this many messages.", ge=1)
    orphans: Orphans = option(
        "drop", help="A comment whose parent is missing: removed with all below it, or a root."
    )
    max_context: int = option(128, help="Ids of a context, special ids included.", ge=3, le=65535)
    max_response: int = option(128, help="Ids of a response, special ids included.", ge=3)
    cut_turn: bool = option(
        False, help="Cut a parent that is too long by itself (its end stays); otherwise the sample is lost."
    )
    valid_from: str | None = option(
        None,
        help="First day (UTC, 2019-08-01) of the validation responses.",
        default_text="the last 2 % of the comments",
    )
    valid_samples: int = option(
        200_000, help="At most this many validation samples, drawn from all after that day.", ge=1
    )
    test_fraction: float = option(
        0.02,
        help="Share of the comments that are held out for test: those of random communities; 0: none.",
    )
    test_from: str | None = option(
        None, help="First day (UTC) of responses that are for test and not for validation; needs valid_from."
    )
    test_samples: int = option(200_000, help="At most this many test samples, drawn from all of these.", ge=1)
    without: list[str] = option(
        factory=list,
        help="Evaluation sets: training samples that have to do with their texts are removed.",
    )
    without_words: int = option(
        13, help="Words in a row that a sample may not share with an evaluation set.", ge=1
    )
    without_similarity: float = option(
        0.8,
        help="Jaccard index of runs of three words from which a sample is a near-duplicate of a text.",
        ge=0,
        le=1,
        means={0: "none is"},
    )
    shard_nodes: int = option(32_768, help="Comments per shard, on average.", ge=1)
    on_broken: OnBroken = option(
        "stop", help="At a line or file that cannot be read: stop, or skip and count."
    )
    engine: EngineName = option(
        "local", help="local: processes and DuckDB on this machine; spark: a cluster."
    )
    workers: int = option(
        factory=usable_cores, help="Processes of the local engine.", ge=1, default_text="the processors"
    )
    memory: str = option("1GB", help="Memory that DuckDB may use before it goes to disk.")
    spark_master: str | None = option(
        None, help="Master URL of Spark.", default_text="Spark's own, else local[workers]"
    )
    spark_conf: dict[str, str] = option(
        factory=dict, help="Settings of Spark, such as spark.executor.memory=8g."
    )
    work: str | None = option(None, help="Folder of the parts in progress.", default_text="OUT.work")
    keep_work: bool = option(False, help="Keep that folder at the end.")
    force: bool = option(False, help="Replace an existing prepared corpus.")

    @property
    def pieces(self) -> int:
        """Pieces of a tokenizer that is to be trained."""
        return self.vocab_pieces or LANGUAGES[self.language]

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("out", "work", "tokenizer"):
            if (path := getattr(self, key)) is not None:
                setattr(self, key, expand_path(path, key))
        for key in ("comments", "submissions", "without"):
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
        check_options(self)
        if self.engine != "spark" and (self.spark_master or self.spark_conf):
            raise UserError("master and conf are Spark's: add --engine spark, or leave them out")
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"test_fraction={self.test_fraction}: must be at least 0 and below 1")
        valid_time, test_time = self.valid_time, self.test_time  # a wrong day fails here
        if test_time is not None and (valid_time is None or test_time <= valid_time):
            raise UserError(
                f"test_from={self.test_from!r}: comes after validation: give an earlier day as valid_from"
            )

    @property
    def valid_time(self) -> int | None:
        """`valid_from` in seconds since 1970.

        Raises:
            UserError: it is no day.
        """
        return _seconds("valid_from", self.valid_from)

    @property
    def test_time(self) -> int | None:
        """`test_from` in seconds since 1970.

        Raises:
            UserError: it is no day.
        """
        return _seconds("test_from", self.test_from)

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


def _seconds(key: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        day = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{key}={text!r}: must be a day such as 2019-08-01") from None
    return int((day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp())
