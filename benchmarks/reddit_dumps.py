"""Synthetic Reddit dumps that look like real ones, for benchmarks and tests, with known contents.

The choices:

- Threads have power-law sizes, one of them exactly `biggest_thread`; its last `deepest_chain` comments reply
  to each other in a chain. Elsewhere about 40 % of the comments are at the top level and replies prefer
  recent comments. A comment comes hours after its thread began, so threads cross from month to month.
- The structure is arrays of about 70 bytes a comment; lines are made 4,000 at a time.
- Texts are runs of real sentences (of the Chit-Chat corpus, shuffled once), cut out of one long string that
  is JSON already, with log-normal lengths; planted texts are such a run and an addition. Planting is exact:
  a share of the comments drawn without replacement, one kind of text a comment.
- Fields are those of the real dumps: 40 % of the lines as in 2011 (few fields, numbers as strings), 45 % as
  in 2017 (integers, raw UTF-8), the last 15 % as in 2024 (all fields, times with .0, blanks after commas).
- `zst` demands a window of 2 GiB of its reader, as `zstd --long=31` does. It is compressed with 128 MiB,
  and the header is changed afterwards (a frame may ask for more than it needs): the memory stays flat.

The same arguments write the same bytes (with the same versions of NumPy and of the compressor).

    python -m benchmarks.reddit_dumps FOLDER COMMENTS MONTHS SEED     also facts.json, when they are whole
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import IntEnum
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
import zstandard

from plato2.config import UserError
from plato2.prepare.corpora import ReadReport, chitchat

Compression = Literal["zst", "bz2", "xz", "gz", ""]

BOTS = ("AutoModerator", "RemindMeBot", "autotldr")
QUARANTINED = "TheQuarantined"
SUBREDDITS = [
    *["AskReddit", "pics", "funny", "politics", "gaming", "fffffffuuuuuuuuuuuu", "reddit.com", "WTF"],
    *["worldnews", "technology", "science", "IAmA", "todayilearned", "trees", "Minecraft", "movies", "Music"],
    *["programming", "nfl", "soccer", "books", "askscience", "Android", "linux", "math", QUARANTINED],
]
PHRASES = [
    *["this", "lol", "thanks!", "yes", "no", "thank you", "nice", "what?", "me too", "upvoted", "haha"],
    *["exactly", "source?", "i agree", "same here", "wow", "really?", "good point", "you too", "awesome"],
]
"""Messages repeated over and over, the first one most."""
_LANGUAGES = (
    ("c'était déjà très français où l'été garçon même à côté être là voilà préféré sûr", " "),
    ("mañana también años señor está día fácil corazón después aquí qué más todavía", " "),
    ("это было очень хорошо потому что никто здесь не знает сколько времени осталось привет", " "),
    ("schöne Grüße für über müssen natürlich größer können später Straße wäre hätte", " "),
    ("我 们 今 天 去 吃 好 的 东 西 你 知 道 什 么 时 候 可 以 来 北 京 吗", ""),
)
_ADDRESSES = (
    " http://i.imgur.com/{:x}.jpg",
    " [here](http://www.youtube.com/watch?v={:x})",
    r"\n\nhttps://en.wikipedia.org/wiki/{:x}",
)
_SPECIAL = (" Try /r/{}.", " r/{} is that way", " Ask u/spez!", " Salt &amp; pepper.", " &gt; so they say")
_EMOJI = ("😂", "👍", "❤️", "🤔", "👨‍👩‍👧", "🇫🇷", "ಠ_ಠ")
_NAMES = ("throwaway", "Sir_", "the_real_", "mr-", "xX", "cat", "Blue", "not_a_", "doctor", "pizza_")

_FIRST_COMMENT = int("c300000", 36)
_FIRST_SUBMISSION = int("eu0000", 36)
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8)
_TOP, _MISSING = -1, -2
"""Instead of the parent's number: the submission; a comment in no file."""
_GENERATIONS = (0.40, 0.85)
_BLOCK = 4_000
_WINDOW, _DEMANDED_WINDOW = 27, 31
_TOP_SHARE = 0.34  # the first comment of a thread comes on top of it: 40 % in all
_CHARACTERS = (39.0, 1.15)
"""Median and sigma of the wanted length; a run goes on to the end of a sentence: 115 on average."""
_SENTENCES = 100_000


@dataclass(frozen=True)
class Shares:
    """How much is planted, as shares of all comments; above 0 it is at least one comment."""

    repeats: float = 0.04
    """Texts out of `PHRASES`."""
    urls: float = 0.03
    special_strings: float = 0.01
    """r/..., u/..., &amp; or &gt;."""
    quotes: float = 0.02
    """"> " and the whole text of the parent, then a word or two."""
    few_letters: float = 0.005
    """Nothing but numbers and signs."""
    long_words: float = 0.001
    """A word over 30 characters."""
    emoji: float = 0.01
    non_ascii: float = 0.02
    """Words with accents, Cyrillic or Chinese."""
    shouted: float = 0.01
    """ALL CAPS."""
    offensive: float = 0.002
    """One of the caller's words; nothing without them."""
    deleted: float = 0.05
    """The text is [deleted], the author too."""
    removed: float = 0.01
    """The text is [removed]; the author stays."""
    null_bodies: float = 0.0005
    lone_surrogates: float = 0.0
    """Half of a surrogate pair: sound JSON, but no Unicode text. Some readers stop at it."""
    bots: float = 0.01
    missing_links: float = 0.001
    """No link_id."""
    missing_parents: float = 0.005
    """The parent is a comment that no file has."""
    cycles: float = 0.00002
    """Pairs of comments that are each other's parent."""
    out_of_order: float = 0.001
    """The line stands right before its parent's."""
    duplicates: float = 0.001
    """Lines that are there twice: some lines later, or at the beginning of the next month's file."""
    missing_submissions: float = 0.02
    """Of the threads: the submission is in no file."""


CLEAN = Shares(**{field.name: 0.0 for field in fields(Shares)})
"""Sound lines with plain texts only."""


_Kind = IntEnum(
    "_Kind",
    "PLAIN REPEATS URLS SPECIAL_STRINGS QUOTES FEW_LETTERS LONG_WORDS EMOJI NON_ASCII SHOUTED OFFENSIVE "
    "DELETED REMOVED NULL_BODIES LONE_SURROGATES",
    start=0,
)
"""What stands in the body; but for the first, a field of `Shares`."""


@dataclass(frozen=True)
class DumpFacts:
    """The files and what is in them. Counts are of comments (a duplicate line is none) unless they say else.

    Counts of texts are of those planted: an address, say, may also have a word over 30 characters.
    """

    comments: list[Path]
    submissions: list[Path]
    n_comments: int
    n_threads: int
    n_submissions: int
    """Lines of all submission files."""
    comments_per_month: dict[str, int]
    """By month as in 2011-01."""
    n_bytes: int
    """Of all comment lines, not compressed."""
    deepest_chain: int
    """Comments from the top level down (or from below a missing parent), cycles left out."""
    biggest_thread: int
    top_level: int
    month_crossings: int
    """Comments whose parent is in an earlier month."""
    long_messages: int
    """Texts over 1,024 characters."""
    quarantined: int
    """Comments in the forum `QUARANTINED`; its submissions say quarantine: true, its newest comments too."""
    repeats: dict[str, int]
    """Times by message of `PHRASES`."""
    urls: int
    special_strings: int
    quotes: int
    few_letters: int
    long_words: int
    emoji: int
    non_ascii: int
    """Planted sentences and emoji are the only texts that are not ASCII."""
    shouted: int
    offensive: int
    deleted: int
    removed: int
    null_bodies: int
    lone_surrogates: int
    bots: int
    missing_links: int
    missing_parents: int
    cycles: int
    """Pairs."""
    out_of_order: int
    duplicates: int
    """Lines too many."""


def write_dumps(
    folder: Path,
    n_comments: int,
    *,
    seed: int = 7,
    months: int = 3,
    first_month: str = "2011-01",
    compression: Compression = "zst",
    submissions: bool = False,
    deepest_chain: int | None = None,
    biggest_thread: int | None = None,
    shares: Shares = Shares(),
    offensive_words: Sequence[str] = (),
) -> DumpFacts:
    """Write RC_2011-01.zst and so on, one file a month, and with `submissions` RS_2011-01.zst too.

    Args:
        folder: made if it is missing; files of these names are replaced.
        n_comments: different comments of all months together.
        seed: of everything random.
        months: number of files.
        first_month: as in 2011-01.
        compression: the ending of the names; "" writes plain text, its names have no ending.
        submissions: also write submissions.
        deepest_chain: comments of the longest chain; None: 150, less in a small dump.
        biggest_thread: comments of the biggest thread; None: 3,000, at most a tenth of all.
        shares: what is planted how often; `CLEAN`: nothing.
        offensive_words: planted in texts; none: no offensive texts.

    Raises:
        UserError: no month, or a chain or thread that does not fit.
    """
    biggest = min(3000, max(1, n_comments // 10)) if biggest_thread is None else biggest_thread
    deepest = min(150, biggest // 2) if deepest_chain is None else deepest_chain
    if not 0 <= deepest <= biggest <= n_comments or biggest < 1:
        raise UserError(
            f"deepest_chain={deepest}, biggest_thread={biggest}, n_comments={n_comments}: the chain is "
            "part of the biggest thread, and the thread of all comments"
        )
    if not offensive_words:
        shares = replace(shares, offensive=0.0)
    rng = np.random.default_rng(seed)
    borders = _borders(first_month, months)
    dump = _plant(rng, _threads(rng, n_comments, biggest, deepest, borders), shares, offensive_words)
    names = [f"{datetime.fromtimestamp(border, UTC):%Y-%m}" for border in borders[:-1]]
    ending = f".{compression}" if compression else ""
    folder.mkdir(parents=True, exist_ok=True)
    comment_files = [folder / f"RC_{name}{ending}" for name in names]
    submission_files = [folder / f"RS_{name}{ending}" for name in names] if submissions else []
    month_rows = list(_month_rows(rng, dump, shares.duplicates))
    n_bytes = 0
    for path, rows in zip(comment_files, month_rows, strict=True):
        n_bytes += _write(path, compression, rows, partial(_comment_lines, dump))
    there = np.flatnonzero(rng.random(len(dump.submitted)) >= shares.missing_submissions)
    for path, begin, end in zip(submission_files, borders, borders[1:], strict=False):
        rows = there[(dump.submitted[there] >= begin) & (dump.submitted[there] < end)]
        _write(path, compression, rows, partial(_submission_lines, dump))
    return _facts(dump, comment_files, submission_files, names, len(there), month_rows, n_bytes)


def deep_thread(folder: Path, depth: int) -> DumpFacts:
    """Write RC_2011-01.zst with one chain of `depth` comments and nothing else."""
    return write_dumps(folder, depth, months=1, deepest_chain=depth, biggest_thread=depth, shares=CLEAN)


def wide_thread(folder: Path, n_comments: int) -> DumpFacts:
    """Write RC_2011-01.zst with one thread of `n_comments` comments."""
    return write_dumps(folder, n_comments, months=1, deepest_chain=0, biggest_thread=n_comments, shares=CLEAN)


def truncate(path: Path, share: float) -> None:
    """Keep only this share of the bytes of a file, from its beginning."""
    os.truncate(path, int(path.stat().st_size * share))


def flip_bytes(path: Path, offset: int, n: int = 1) -> None:
    """Invert `n` bytes of a file from `offset` on; a negative offset counts from the end."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        old = file.read(n)
        file.seek(-len(old), os.SEEK_CUR)
        file.write(bytes(byte ^ 0xFF for byte in old))


# --- structure: who replies to whom, and when -----------------------------------------------------------


@dataclass
class _Threads:
    """All comments in the order of time; row i of each array is comment i."""

    borders: np.ndarray
    """(months + 1) seconds since 1970 at which months begin."""
    time: np.ndarray
    """(n) seconds since 1970."""
    parent: np.ndarray
    """(n) row of the parent, _TOP or _MISSING."""
    thread: np.ndarray
    """(n) threads are numbered by the time of their submissions."""
    submitted: np.ndarray
    """(threads) seconds since 1970."""
    chain_thread: int
    """The thread with the deepest chain, which no planting breaks."""

    @property
    def month(self) -> np.ndarray:
        """(n) month of each comment, from 0."""
        return np.searchsorted(self.borders, self.time, side="right") - 1


def _borders(first_month: str, months: int) -> np.ndarray:
    """Seconds at which each month begins, and the end of the last one."""
    try:
        first = datetime.strptime(first_month, "%Y-%m")
    except ValueError as error:
        raise UserError(f"first_month={first_month!r}: must be a month such as 2011-01") from error
    if months < 1:
        raise UserError(f"months={months}: must be at least 1")
    numbers = range(first.month - 1, first.month + months)
    return np.array(
        [int(datetime(first.year + i // 12, i % 12 + 1, 1, tzinfo=UTC).timestamp()) for i in numbers]
    )


def _threads(rng: np.random.Generator, n: int, biggest: int, deepest: int, borders: np.ndarray) -> _Threads:
    """Random threads of n comments in all."""
    sizes = np.minimum(rng.zipf(1.8, n), biggest)
    sizes[0] = biggest
    ends = np.cumsum(sizes)
    n_threads = int(np.searchsorted(ends, n)) + 1
    sizes = sizes[:n_threads]
    sizes[-1] -= ends[n_threads - 1] - n
    first = np.cumsum(sizes) - sizes
    thread = np.repeat(np.arange(n_threads, dtype=np.int32), sizes)

    place = np.arange(n, dtype=np.int32) - first[thread].astype(np.int32)
    back = (place * rng.random(n, dtype=np.float32) ** 3).astype(np.int32)
    parent = np.arange(n, dtype=np.int32) - 1 - np.minimum(back, np.maximum(place - 1, 0))
    parent[(place == 0) | (rng.random(n, dtype=np.float32) < _TOP_SHARE)] = _TOP
    chain = np.arange(biggest - deepest, biggest)
    parent[chain] = chain - 1
    parent[chain[:1]] = _TOP

    begin = rng.uniform(borders[0], borders[-1] - 3600, n_threads)
    delay = rng.lognormal(np.log(3 * 3600), 1.4, n) % (borders[-1] - begin)[thread]
    time = begin[thread] + delay[np.lexsort((delay, thread))]  # a parent is earlier than its replies

    submitted = np.maximum(time[first].astype(np.int64) - 60, borders[0])
    by_time = np.argsort(submitted, kind="stable")
    number = np.empty(n_threads, dtype=np.int32)
    number[by_time] = np.arange(n_threads, dtype=np.int32)

    order = np.argsort(time, kind="stable")
    row = np.empty(n, dtype=np.int32)
    row[order] = np.arange(n, dtype=np.int32)
    return _Threads(
        borders=borders,
        time=time[order].astype(np.int64),
        parent=np.where(parent >= 0, row[parent], parent)[order],
        thread=number[thread][order],
        submitted=submitted[by_time],
        chain_thread=int(number[0]),
    )


# --- planting -------------------------------------------------------------------------------------------


@dataclass
class _Dump(_Threads):
    """Comments with everything that their lines say."""

    id: np.ndarray
    link_id: np.ndarray
    """(threads) ids of the submissions."""
    forum: np.ndarray
    """(threads) number in `SUBREDDITS`."""
    kind: np.ndarray
    """(n) a `_Kind`."""
    start: np.ndarray
    end: np.ndarray
    """(n) the run of sentences in the pool's text."""
    length: np.ndarray
    """(n) characters of this run."""
    salt: np.ndarray
    """(n) 32 random bits for whatever small choice."""
    author: np.ndarray
    """(n) the bots come first; -1: deleted."""
    offensive_words: Sequence[str]
    in_cycle: np.ndarray
    moved: np.ndarray
    """(n) whether the line stands right before its parent's."""
    no_link: np.ndarray


def _plant(
    rng: np.random.Generator, threads: _Threads, shares: Shares, offensive_words: Sequence[str]
) -> _Dump:
    """Give the comments their texts, authors and faults."""
    n, n_threads = len(threads.time), len(threads.submitted)
    parent, thread, month = threads.parent, threads.thread, threads.month

    def pick(share: float, among: np.ndarray) -> np.ndarray:
        count = min(len(among), max(1, round(share * n))) if share else 0
        return rng.choice(among, count, replace=False)

    def without_parents(picked: np.ndarray) -> np.ndarray:
        return picked[~np.isin(parent[picked], picked)]

    breakable = thread != threads.chain_thread if n_threads > 1 else np.ones(n, dtype=bool)
    in_cycle = _close_cycles(
        parent, without_parents(pick(shares.cycles, np.flatnonzero((parent >= 0) & breakable)))
    )
    parent[pick(shares.missing_parents, np.flatnonzero((parent >= 0) & breakable & ~in_cycle))] = _MISSING

    rows = np.arange(n)
    near = (parent >= 0) & ~in_cycle & (rows - parent <= 5000) & (month == month[parent])
    moved = np.zeros(n, dtype=bool)
    moved[without_parents(pick(shares.out_of_order, np.flatnonzero(near)))] = True

    kind = _kinds(rng, n, shares)
    wanted = rng.lognormal(np.log(_CHARACTERS[0]), _CHARACTERS[1], n)
    wanted[kind != _Kind.PLAIN] = np.minimum(wanted[kind != _Kind.PLAIN], 300)  # only plain texts are long
    start, end, length = _runs(rng, wanted)
    quotable = (kind == _Kind.PLAIN) & (length >= 130) & (length <= 300)  # so that 80 % of the words overlap
    may_quote = (kind == _Kind.PLAIN) & (parent >= 0) & quotable[parent]
    kind[without_parents(pick(shares.quotes, np.flatnonzero(may_quote)))] = _Kind.QUOTES

    author = (len(BOTS) + max(20, n // 8) * rng.random(n) ** 3).astype(np.int32)
    robots = pick(shares.bots, rows)
    author[robots] = robots % len(BOTS)
    author[kind == _Kind.DELETED] = -1

    weights = 1 / np.arange(1, len(SUBREDDITS) + 1)
    forum = rng.choice(len(SUBREDDITS), n_threads, p=weights / weights.sum())
    if n_threads > 1:
        forum[(threads.chain_thread + 1) % n_threads] = SUBREDDITS.index(QUARANTINED)
    no_link = np.zeros(n, dtype=bool)
    no_link[pick(shares.missing_links, rows)] = True
    return _Dump(
        **vars(threads),
        id=_FIRST_COMMENT + np.cumsum(rng.integers(1, 6, n)),
        link_id=_FIRST_SUBMISSION + np.cumsum(rng.integers(1, 6, n_threads)),
        forum=forum,
        kind=kind,
        start=start,
        end=end,
        length=length,
        salt=rng.integers(0, 2**32, n, dtype=np.uint32),
        author=author,
        offensive_words=offensive_words,
        in_cycle=in_cycle,
        moved=moved,
        no_link=no_link,
    )


def _close_cycles(parent: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Make the parents of some comments answer them in turn, one of each parent's; (n) who is in a cycle."""
    lower = lower[np.unique(parent[lower], return_index=True)[1]]
    upper = parent[lower]
    parent[upper] = lower
    in_cycle = np.zeros(len(parent), dtype=bool)
    in_cycle[lower] = in_cycle[upper] = True
    return in_cycle


def _kinds(rng: np.random.Generator, n: int, shares: Shares) -> np.ndarray:
    """(n) what is wrong with each comment, if anything; those that quote are chosen when texts are known."""
    kind = np.zeros(n, dtype=np.int8)
    free = rng.permutation(n)
    for planted in _Kind:
        if planted in (_Kind.PLAIN, _Kind.QUOTES):
            continue
        share = getattr(shares, planted.name.lower())
        count = max(1, round(share * n)) if share else 0
        kind[free[:count]] = planted
        free = free[count:]
    return kind


def _month_rows(rng: np.random.Generator, dump: _Dump, duplicates: float) -> Iterator[np.ndarray]:
    """The comments of each file, line by line."""
    seam = np.empty(0, dtype=np.int64)  # the end of the month before, which stands in the next file too
    bounds = np.searchsorted(dump.time, dump.borders)
    for month, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = np.arange(begin, end)
        # right before the parent, which stands nearby and does not move itself
        key = np.where(dump.moved[rows], dump.parent[rows] - 0.5, rows)
        rows = rows[np.argsort(key, kind="stable")]
        count = min(len(rows), max(1, round(duplicates * len(rows)))) if duplicates else 0
        at_seam = (count + 1) // 2 if month + 2 < len(dump.borders) else 0
        picked = rng.choice(len(rows), count - at_seam, replace=False)
        again = np.minimum(picked + rng.integers(1, 50, len(picked)), len(rows))
        tail = rows[len(rows) - at_seam :]
        yield np.concatenate([seam, np.insert(rows, again, rows[picked])])
        seam = tail


def _facts(
    dump: _Dump,
    comment_files: list[Path],
    submission_files: list[Path],
    months: list[str],
    n_submissions: int,
    month_rows: list[np.ndarray],
    n_bytes: int,
) -> DumpFacts:
    """Count what the files have."""
    n, month, parent = len(dump.time), dump.month, dump.parent
    by_kind = np.bincount(dump.kind, minlength=len(_Kind)).tolist()
    said = np.bincount(_phrase(dump.salt[dump.kind == _Kind.REPEATS]), minlength=len(PHRASES)).tolist()
    return DumpFacts(
        comments=comment_files,
        submissions=submission_files,
        n_comments=n,
        n_threads=len(dump.submitted),
        n_submissions=n_submissions if submission_files else 0,
        comments_per_month=dict(zip(months, np.bincount(month, minlength=len(months)).tolist(), strict=True)),
        n_bytes=n_bytes,
        deepest_chain=_deepest(parent),
        biggest_thread=int(np.bincount(dump.thread).max()),
        top_level=int((parent == _TOP).sum()),
        month_crossings=int(((parent >= 0) & (month[parent] < month)).sum()),
        long_messages=int(((dump.length > 1024) & (dump.kind == _Kind.PLAIN)).sum()),
        quarantined=int((dump.forum[dump.thread] == SUBREDDITS.index(QUARANTINED)).sum()),
        repeats=dict(zip(PHRASES, said, strict=True)),
        **{kind.name.lower(): by_kind[kind] for kind in _Kind if kind > _Kind.REPEATS},
        bots=int(((dump.author >= 0) & (dump.author < len(BOTS))).sum()),
        missing_links=int(dump.no_link.sum()),
        missing_parents=int((parent == _MISSING).sum()),
        cycles=int(dump.in_cycle.sum()) // 2,
        out_of_order=int(dump.moved.sum()),
        duplicates=sum(map(len, month_rows)) - n,
    )


def _deepest(parent: np.ndarray) -> int:
    """The length of the longest chain, by jumps of 1, 2, 4, ... parents; replies to a cycle are left out."""
    jump = np.where(parent >= 0, parent, np.arange(len(parent)))
    depth = (parent >= 0).astype(np.int64)
    on_way, before = parent[jump] >= 0, -1
    while (left := int(on_way.sum())) != before:  # what is left in the end goes round in circles
        before = left
        depth += depth[jump]
        jump = jump[jump]
        on_way = parent[jump] >= 0
    return int(depth[~on_way].max()) + 1


# --- texts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Real sentences in one text that is JSON already."""

    text: str
    starts: np.ndarray
    ends: np.ndarray
    """(sentences) where they stand in `text`."""
    raw_starts: np.ndarray
    raw_ends: np.ndarray
    """(sentences) the same without JSON's backslashes."""


# What a rule of cleaning hits: an address (a point inside a word), r/ and &amp;, a word over 30 characters.
_HIT = re.compile(r"[/&\\@]|\.\w|\S{31}")
_NO_LETTERS = str.maketrans("", "", "".join(char for char in map(chr, range(128)) if not char.isalpha()))


@cache
def _pool() -> _Pool:
    """Sentences that no rule of cleaning hits, each once, in a random order that is always the same."""
    sentences: dict[str, str] = {}
    for dialogue in chitchat.read([], ReadReport()):
        for sentence in itertools.chain(
            *(re.split(r"(?<=[.!?])\s+|\n+", turn.text) for turn in dialogue.turns)
        ):
            if 15 <= len(sentence) <= 250 and sentence.isascii() and sentence.isprintable():
                letters = len(sentence.translate(_NO_LETTERS))
                if letters >= 0.8 * (len(sentence) - sentence.count(" ")) and not _HIT.search(sentence):
                    sentences.setdefault(sentence.casefold(), sentence)
        if len(sentences) >= _SENTENCES:
            break
    rng = random.Random(7)
    sound = list(sentences.values())
    rng.shuffle(sound)
    gaps = rng.choices([" ", "\n\n"], [0.95, 0.05], k=len(sound))
    pairs = zip(sound, gaps, strict=True)
    text = "".join(a.replace('"', '\\"') + b.replace("\n", "\\n") for a, b in pairs)
    raw = np.array([(len(sentence), len(gap)) for sentence, gap in zip(sound, gaps, strict=True)])
    written = raw + np.array(
        [(sentence.count('"'), gap.count("\n")) for sentence, gap in zip(sound, gaps, strict=True)]
    )
    starts, raw_starts = (np.cumsum(lengths.sum(1)) - lengths.sum(1) for lengths in (written, raw))
    return _Pool(
        text,
        starts.astype(np.int32),
        (starts + written[:, 0]).astype(np.int32),
        raw_starts.astype(np.int32),
        (raw_starts + raw[:, 0]).astype(np.int32),
    )


def _json(text: str, raw: bool = False) -> str:
    """`text` as it stands between the quotes of JSON; `raw`: as UTF-8 where others have \\u escapes."""
    return json.dumps(text, ensure_ascii=not raw)[1:-1]


def _runs(rng: np.random.Generator, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of sentences of at least `wanted` characters (n; 9,000 at most): starts, ends and lengths (n)."""
    pool = _pool()
    possible = int(np.searchsorted(pool.raw_starts, pool.raw_ends[-1] - 10_000))
    first = rng.integers(0, possible, len(wanted), dtype=np.int32)
    last = np.searchsorted(pool.raw_ends, pool.raw_starts[first] + np.minimum(wanted, 9000).astype(np.int32))
    return pool.starts[first], pool.ends[last], pool.raw_ends[last] - pool.raw_starts[first]


def _phrase(salt: np.ndarray) -> np.ndarray:
    """Which of `PHRASES` (n), the first ones more often."""
    weights = np.cumsum(1 / np.arange(1, len(PHRASES) + 1))
    return np.searchsorted(weights / weights[-1], salt / 2**32, side="right")


def _planted(dump: _Dump, row: int, run: str, raw: bool) -> str:
    """The text of a comment with a planted fault, as JSON without quotes. `run`: its sentences, as JSON."""
    kind, salt = dump.kind[row], int(dump.salt[row])
    if kind == _Kind.REPEATS:
        return PHRASES[int(_phrase(dump.salt[row]))]
    if kind == _Kind.URLS:
        return run + _ADDRESSES[salt % len(_ADDRESSES)].format(salt)
    if kind == _Kind.SPECIAL_STRINGS:
        return run + _SPECIAL[salt % len(_SPECIAL)].format(SUBREDDITS[salt % 6])
    if kind == _Kind.QUOTES:
        parent = dump.parent[row]
        quoted = _pool().text[dump.start[parent] : dump.end[parent]].replace("\\n\\n", "\\n\\n> ")
        return f"> {quoted}\\n\\n" + ("So true.", "This.", "Why?")[salt % 3]
    if kind == _Kind.FEW_LETTERS:
        return f"{salt} + {row} = {salt + row} :)"
    if kind == _Kind.LONG_WORDS:
        return run + " N" + "o" * (31 + salt % 50)
    if kind == _Kind.EMOJI:
        return run + " " + _json(_EMOJI[salt % len(_EMOJI)], raw)
    if kind == _Kind.NON_ASCII:
        return _json(_foreign(salt), raw)
    if kind == _Kind.SHOUTED:
        return run.upper().replace("\\N", "\\n")
    if kind == _Kind.OFFENSIVE:
        return f"{run} {_json(dump.offensive_words[salt % len(dump.offensive_words)], raw)}"
    if kind == _Kind.LONE_SURROGATES:
        return run + r" \ud83d"
    return "[deleted]" if kind == _Kind.DELETED else "[removed]"


def _foreign(salt: int) -> str:
    """Random words of a random language."""
    rng = random.Random(salt)
    words, blank = rng.choice(_LANGUAGES)
    return blank.join(rng.choices(words.split(), k=rng.randint(6, 24))) + rng.choice(".!?")


# --- lines ----------------------------------------------------------------------------------------------


class _Comment(NamedTuple):
    """What differs from line to line."""

    body: str
    """As JSON."""
    id: str
    parent: str
    link: str
    link_id: str
    """With its key and a comma; empty where it is missing."""
    author: str
    author_number: int
    forum: str
    forum_id: str
    time: int
    salt: int


def _comment_lines(dump: _Dump, rows: np.ndarray) -> list[str]:
    """The lines of these comments."""
    text = _pool().text
    parent, thread = dump.parent[rows], dump.thread[rows]
    generation = _generation(rows, len(dump.time))
    bodies = [f'"{text[a:b]}"' for a, b in zip(*_lists(dump.start[rows], dump.end[rows]), strict=True)]
    for i in np.flatnonzero(dump.kind[rows]).tolist():
        null = dump.kind[rows[i]] == _Kind.NULL_BODIES
        raw = bool(generation[i] == 1)
        bodies[i] = "null" if null else f'"{_planted(dump, int(rows[i]), bodies[i][1:-1], raw)}"'
    links = _base36(dump.link_id[thread], 6)
    # a missing parent has an id from before the first comment
    parent_ids = np.where(parent == _MISSING, _FIRST_COMMENT - 1 - rows, dump.id[np.maximum(parent, 0)])
    parents = _base36(parent_ids, 7)
    tops, missing, forums = _lists(parent == _TOP, dump.no_link[rows], dump.forum[thread])
    authors, times, salts = _lists(dump.author[rows], dump.time[rows], dump.salt[rows])
    columns = (
        bodies,
        _base36(dump.id[rows], 7),
        [f"t3_{a}" if top else f"t1_{b}" for top, a, b in zip(tops, links, parents, strict=True)],
        links,
        ["" if gone else f'"link_id":"t3_{link}",' for gone, link in zip(missing, links, strict=True)],
        [_author(number) for number in authors],
        authors,
        [SUBREDDITS[forum] for forum in forums],
        [f"t5_2q{1000 + forum}" for forum in forums],
        times,
        salts,
    )
    line_of = (_line_2011, _line_2017, _line_2024)
    comments = map(_Comment._make, zip(*columns, strict=True))
    return [line_of[age](comment) for age, comment in zip(generation.tolist(), comments, strict=True)]


def _generation(rows: np.ndarray, n: int) -> np.ndarray:
    """0, 1 or 2: the fields of 2011, 2017 or 2024 (rows)."""
    return np.searchsorted(np.array(_GENERATIONS) * n, rows, side="right")


def _lists(*columns: np.ndarray) -> list[list[Any]]:
    """Lists of Python's numbers, which are faster to write out than NumPy's."""
    return [column.tolist() for column in columns]


def _author(number: int) -> str:
    """The name of an author."""
    if number < 0:
        return "[deleted]"
    return BOTS[number] if number < len(BOTS) else f"{_NAMES[number % len(_NAMES)]}{number}"


def _base36(numbers: np.ndarray, width: int) -> list[str]:
    """Reddit's ids, `width` digits each."""
    digits = numbers[:, None] // 36 ** np.arange(width - 1, -1, -1) % 36
    return cast(list[str], _DIGITS[digits].view(f"S{width}").ravel().astype(f"U{width}").tolist())


def _line_2011(c: _Comment) -> str:
    ups = c.salt % 97 % 23
    return (
        f'{{"body":{c.body},"archived":true,"score_hidden":false,"name":"t1_{c.id}","author":"{c.author}",'
        f'"author_flair_text":null,"downs":"0","created_utc":"{c.time}","subreddit_id":"{c.forum_id}",{c.link_id}'
        f'"parent_id":"{c.parent}","score":"{ups}","retrieved_on":"{1_427_000_000 + c.salt % 1_000_000}",'
        f'"controversiality":"0","gilded":"0","id":"{c.id}","subreddit":"{c.forum}","ups":"{ups}",'
        f'"distinguished":null,"author_flair_css_class":null,"edited":false}}'
    )


def _line_2017(c: _Comment) -> str:
    flair = f'"team {c.salt % 31}"' if c.salt % 5 == 0 else "null"
    edited = c.time + c.salt % 5000 if c.salt % 41 == 0 else "false"
    return (
        f'{{"author":"{c.author}","author_flair_css_class":null,"author_flair_text":{flair},"body":{c.body},'
        f'"can_gild":true,"controversiality":{c.salt % 60 // 59},"created_utc":{c.time},"distinguished":null,'
        f'"edited":{edited},"gilded":0,"id":"{c.id}","is_submitter":{_bool(c.salt % 9 == 0)},{c.link_id}'
        f'"parent_id":"{c.parent}","permalink":"/r/{c.forum}/comments/{c.link}/what_do_you_think/{c.id}/",'
        f'"retrieved_on":{c.time + 3_000_000},"score":{c.salt % 97 % 23 - 2},"stickied":false,'
        f'"subreddit":"{c.forum}","subreddit_id":"{c.forum_id}","subreddit_type":"public"}}'
    )


_FLAIR = """[{"e": "text", "t": "Real "}, {"a": ":ape:", "e": "emoji", "u": "https://emoji.redditmedia.com/ape"}]"""
_AWARD = (
    '{"award_sub_type": "GLOBAL", "award_type": "global", "coin_price": 500, "coin_reward": 100, "count": 1, '
    '"description": "Gives a week of Premium.", "icon_height": 512, "id": "gid_2", "is_enabled": true, '
    '"name": "Gold", "resized_icons": [{"height": 16, "url": "https://www.redditstatic.com/gold/awards/icon/'
    'gold_16.png", "width": 16}, {"height": 32, "url": "https://www.redditstatic.com/gold/awards/icon/'
    'gold_32.png", "width": 32}], "tiers_by_required_awardings": null}'
)


def _line_2024(c: _Comment) -> str:
    link_id = c.link_id.replace(":", ": ").replace(",", ", ")
    fullname = "" if c.author_number < 0 else f'"author_fullname": "t2_{c.author_number:x}", '
    flair = _FLAIR if c.salt % 11 == 0 else "[]"
    awards = f"[{_AWARD}]" if c.salt % 17 == 0 else "[]"
    time = f"{c.time}.0" if c.salt & 1 else c.time
    score = c.salt % 97 % 23 - 2
    return (
        f'{{"_meta": {{"retrieved_2nd_on": {c.time + 130_000}}}, "all_awardings": {awards}, '
        '"approved_at_utc": null, "approved_by": null, "archived": false, "associated_award": null, '
        f'"author": "{c.author}", "author_flair_background_color": null, "author_flair_css_class": null, '
        f'"author_flair_richtext": {flair}, "author_flair_template_id": null, "author_flair_text": null, '
        f'"author_flair_text_color": null, "author_flair_type": "text", {fullname}'
        '"author_is_blocked": false, "author_patreon_flair": false, "author_premium": false, "awarders": [], '
        f'"banned_at_utc": null, "banned_by": null, "body": {c.body}, "can_gild": false, '
        '"can_mod_post": false, "collapsed": false, "collapsed_because_crowd_control": null, '
        '"collapsed_reason": null, "collapsed_reason_code": null, "comment_type": null, '
        f'"controversiality": 0, "created": {time}, "created_utc": {time}, "distinguished": null, '
        f'"downs": 0, "edited": false, "gilded": 0, "gildings": {{}}, "id": "{c.id}", '
        f'"is_submitter": {_bool(c.salt % 9 == 0)}, "likes": null, {link_id}"locked": false, '
        '"mod_note": null, "mod_reason_by": null, "mod_reason_title": null, "mod_reports": [], '
        f'"name": "t1_{c.id}", "no_follow": true, "num_reports": 0, "parent_id": "{c.parent}", '
        f'"permalink": "/r/{c.forum}/comments/{c.link}/what_do_you_think/{c.id}/", '
        f'"quarantined": {_bool(c.forum == QUARANTINED)}, "removal_reason": null, "replies": "", '
        f'"report_reasons": [], "retrieved_on": {c.time + 15}, "saved": false, "score": {score}, '
        f'"score_hidden": false, "send_replies": true, "stickied": false, "subreddit": "{c.forum}", '
        f'"subreddit_id": "{c.forum_id}", "subreddit_name_prefixed": "r/{c.forum}", '
        '"subreddit_type": "public", "top_awarded_type": null, "total_awards_received": 0, '
        f'"treatment_tags": [], "unrepliable_reason": null, "updated_on": {c.time + 30}, "ups": {score}, '
        '"user_reports": []}'
    )


def _submission_lines(dump: _Dump, threads: np.ndarray) -> list[str]:
    """The lines of the submissions of these threads."""
    rng, text = np.random.default_rng(int(dump.link_id[threads[0]])), _pool().text
    titles, selftexts = (_runs(rng, rng.lognormal(np.log(mean), 0.8, len(threads))) for mean in (30.0, 150.0))
    ids, salts = _base36(dump.link_id[threads], 6), rng.integers(0, 2**32, len(threads)).tolist()
    forums, times, ages = _lists(
        dump.forum[threads], dump.submitted[threads], _generation(threads, len(dump.submitted))
    )
    lines = []
    for i, (id, salt, forum, time, age) in enumerate(zip(ids, salts, forums, times, ages, strict=True)):
        title = text[titles[0][i] : titles[1][i]]
        selftext = text[selftexts[0][i] : selftexts[1][i]] if salt % 3 else ""
        name, author = SUBREDDITS[forum], _author(salt % max(20, len(dump.time) // 8))
        permalink = f"/r/{name}/comments/{id}/what_do_you_think/"
        url = f"http://www.reddit.com{permalink}" if selftext else f"http://i.imgur.com/{salt:x}.jpg"
        quarantine = _bool(name == QUARANTINED)
        created: object = (f'"{time}"', time, f"{time}.0")[age]
        lines.append(
            f'{{"author":"{author}","created_utc":{created},"distinguished":null,"edited":false,"gilded":0,'
            f'"id":"{id}",'
            + (f'"name":"t3_{id}",' if age != 1 else "")
            + f'"is_self":{_bool(selftext != "")},'
            f'"link_flair_text":null,"num_comments":{salt % 50},"over_18":false,"permalink":"{permalink}",'
            f'"quarantine":{quarantine},"retrieved_on":{time + 3_000_000},"score":{salt % 977},'
            f'"selftext":"{selftext}","stickied":false,"subreddit":"{name}",'
            f'"subreddit_id":"t5_2q{1000 + forum}","title":"{title}","url":"{url}"}}'
        )
    return lines


def _bool(value: bool) -> str:
    return "true" if value else "false"


# --- files ----------------------------------------------------------------------------------------------


def _write(
    path: Path, compression: Compression, rows: np.ndarray, lines_of: Callable[[np.ndarray], list[str]]
) -> int:
    """Write the lines of `rows`; returns their bytes before compression."""
    n_bytes = 0
    with path.open("w+b") as file:
        with _compressed(file, compression) as stream:
            for begin in range(0, len(rows), _BLOCK):
                block = ("\n".join(lines_of(rows[begin : begin + _BLOCK])) + "\n").encode()
                stream.write(block)
                n_bytes += len(block)
        if compression == "zst":
            file.seek(5)  # the byte of the window, 8 * (log2 - 10), after the magic number and the flags
            file.write(bytes([8 * (_DEMANDED_WINDOW - 10)]))
    return n_bytes


def _compressed(file: IO[bytes], compression: Compression) -> AbstractContextManager[Any]:
    """A stream that writes to `file`."""
    if compression == "zst":
        # The size is not told: with it the header would not have the byte that `_write` changes.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            3, window_log=_WINDOW, enable_ldm=True, ldm_hash_log=20, write_checksum=1
        )
        return zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file, closefd=False)
    if compression == "gz":
        return gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0)  # no name and time: same bytes
    if compression == "bz2":
        return bz2.BZ2File(file, "wb")
    if compression == "xz":
        return lzma.LZMAFile(file, "wb", preset=1)
    return nullcontext(file)


def main(folder: Path, n_comments: int, months: int, seed: int) -> None:
    """Write dumps, and when they are whole what is in them."""
    facts = write_dumps(folder, n_comments, months=months, seed=seed)
    known = {
        "comments": facts.n_comments,
        "lines": facts.n_comments + facts.duplicates,
        "bytes": facts.n_bytes,
        "stored_bytes": sum(path.stat().st_size for path in facts.comments),
        "files": [path.name for path in facts.comments],
        "made_by": [months, seed],
    }
    (folder / "facts.json").write_text(json.dumps(known), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
