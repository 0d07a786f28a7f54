"""Pairs of Weibo (STC and the like): `post<TAB>reply`, one pair per line.

    我 也 要 去 健 身 懒 半 年 了<TAB>我 一 直 懒 现 在 终 于 动 起 来 了

Or two files, with the replies in the same lines as their posts: give the posts as the file and the other as
the option `replies`. The blanks between characters are taken out, see `lccc.join_characters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, expand, read_lines
from plato2.prepare.corpora.lccc import join_characters

SPEAKERS = ("A", "B")
_Line = tuple[str, int, str]


def read(
    files: Sequence[str], report: ReadReport, replies: str | None = None, keep_blanks: bool = False
) -> Iterator[Dialogue]:
    """Yield a dialogue of two turns for each line.

    Args:
        files: files of pairs; with `replies`, one file of posts.
        report: counts lines that are not a pair of texts.
        replies: the file with the replies.
        keep_blanks: leave the text as it is.
    """
    for file, number, pair in _pairs(files, report) if replies is None else _two(files, replies, report):
        if len(pair) != 2:
            report.broken(file, number, f"{len(pair)} column(s) instead of 2: a post, a tab and a reply")
            continue
        texts = [text.strip() if keep_blanks else join_characters(text) for text in pair]
        if not all(texts):
            report.broken(file, number, "the post is empty" if texts[1] else "the reply is empty")
            continue
        yield Dialogue([Turn(text, speaker) for text, speaker in zip(texts, SPEAKERS, strict=True)])


def _pairs(files: Sequence[str], report: ReadReport) -> Iterator[tuple[str, int, list[str]]]:
    for file, number, text in read_lines(files, report):
        yield file, number, text.split("\t")


def _two(files: Sequence[str], replies: str, report: ReadReport) -> Iterator[tuple[str, int, list[str]]]:
    """Lines of the same number of two files; one that has no partner is broken."""
    if len(expand(files)) != 1 or len(expand([replies], "reader.replies")) != 1:
        raise UserError(f"reader.replies={replies}: give one file of posts and one of replies")
    left, right = read_lines(files, report), read_lines([replies], report)
    post, reply = next(left, None), next(right, None)
    while post is not None or reply is not None:
        if post is not None and reply is not None and post[1] == reply[1]:
            yield post[0], post[1], [post[2], reply[2]]
            post, reply = next(left, None), next(right, None)
        elif reply is None or (post is not None and post[1] < reply[1]):
            post = _alone(post, "reply in that line", left, report)
        else:
            reply = _alone(reply, "post in that line", right, report)


def _alone(line: _Line | None, missing: str, lines: Iterator[_Line], report: ReadReport) -> _Line | None:
    """Count a line without partner and go on to the next."""
    if line is not None:
        report.broken(line[0], line[1], f"there is no {missing} of the other file")
    return next(lines, None)
