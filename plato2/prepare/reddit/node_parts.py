"""Stage 1's output: the nodes of a dump as Parquet parts, one for each block of lines.

<stage folder>/RC_2011-01.zst-1f2e3d4c/00000.parquet ...    nodes; the counts are in the file's metadata
<stage folder>/RC_2011-01.zst-1f2e3d4c/done.json            what was read; with it the dump is finished
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from plato2.data.tokenizer import Tokenizer
from plato2.prepare.reddit.dumps import BLOCK_BYTES, Block, Dump, DumpReader
from plato2.prepare.reddit.messages import parse_comment
from plato2.prepare.reddit.nodes import Counts, NodeMaker, load_line
from plato2.prepare.reddit.rules import Judge, RedditRules
from plato2.prepare.reddit.work import part_metadata, read_record, write_part, write_text

Advance = Callable[[int], None]
"""Told how much more is done: bytes of stored dumps, or nodes."""


@dataclass(frozen=True)
class NodeJob:
    """What is the same for all blocks of stage 1."""

    folder: str
    tokenizer: str
    """Folder."""
    rules: RedditRules
    quarantined: frozenset[str] = frozenset()
    """Forums that the submissions flag, lower case."""
    on_broken: str = "stop"
    block_bytes: int = BLOCK_BYTES

    def parts(self, dump: Dump) -> Path:
        """The folder of a dump's parts."""
        return Path(self.folder) / dump.key

    def part(self, dump: Dump, number: int) -> Path:
        """The file with the nodes of a block."""
        return self.parts(dump) / f"{number:05d}.parquet"

    def is_finished(self, dump: Dump) -> bool:
        """Whether all parts of a dump are there."""
        return (self.parts(dump) / "done.json").exists()

    def is_written(self, dump: Dump, block: Block) -> bool:
        """Whether the part is there, and of this very block: a damaged file may have been repaired since."""
        part = self.part(dump, block.number)
        return part.exists() and part_metadata(part)["lines"] == block.sha256


@dataclass(frozen=True)
class DumpReport:
    """What was read of one dump."""

    path: str
    kind: str
    size: int
    sha256: str
    """Of the stored file, as far as it could be read."""
    n_lines: int
    n_blocks: int
    cut: str | None
    """Why the file ended before its end; None: it did not."""


class NodeWriter:
    """Writes parts; made once in every process that works on stage 1."""

    def __init__(self, job: NodeJob) -> None:
        """Load the tokenizer and the lists."""
        self._job = job
        self._maker = NodeMaker(job.rules, Tokenizer.load(job.tokenizer), job.quarantined, job.on_broken)

    def write(self, dump: Dump, block: Block) -> None:
        """Write the part of one block.

        Raises:
            UserError: a line is no message and `on_broken` is `stop`.
        """
        nodes, counts = self._maker.nodes(dump, block)
        part = self._job.part(dump, block.number)
        part.parent.mkdir(exist_ok=True)
        write_part(part, nodes, {"counts": counts.to_json(), "lines": block.sha256})

    def write_dump(self, dump: Dump) -> None:
        """Write all parts of a dump that are missing, in this process."""
        reader = DumpReader(dump, self._job.on_broken, self._job.block_bytes)
        for block in reader.blocks():
            if not self._job.is_written(dump, block):
                self.write(dump, block)
        finish_dump(self._job, dump, reader)


def finish_dump(job: NodeJob, dump: Dump, reader: DumpReader) -> None:
    """Say that all parts are there, and what was read."""
    counted = (reader.n_lines, reader.n_blocks, reader.cut)
    report = DumpReport(dump.path, dump.kind, dump.size, reader.sha256, *counted)
    job.parts(dump).mkdir(exist_ok=True)  # a month may be empty
    write_text(job.parts(dump) / "done.json", json.dumps(asdict(report), indent=1))


def read_reports(job: NodeJob, dumps: Iterable[Dump]) -> tuple[list[DumpReport], list[Path], Counts]:
    """(what was read of each dump, all parts, all counts), in the order of the dumps and their blocks."""
    reports, parts, counts = [], [], Counts()
    for dump in dumps:
        report = read_record(DumpReport, job.parts(dump) / "done.json")
        reports.append(report)
        for part in [job.part(dump, number) for number in range(report.n_blocks)]:
            counts.add(Counts.from_json(part_metadata(part)["counts"]))
            parts.append(part)
    return reports, parts, counts


# -- a sample of the messages to train a tokenizer on -----------------------------------------------------


@dataclass(frozen=True)
class SampleJob:
    """Which messages: at most `n_messages` of those whose line has the lowest hashes and passes the rules."""

    rules: RedditRules
    n_messages: int
    on_broken: str = "stop"


SampledText = tuple[int, str]
"""(hash of the line, text)."""


def sample_dump(job: SampleJob, dump: Dump) -> list[SampledText]:
    """The sample of one dump of comments: those of the whole corpus are among them.

    Only lines with a low hash are parsed; broken ones are left for stage 1 to report.
    """
    judge = Judge(job.rules)
    kept: list[SampledText] = []
    limit = 1 << 32
    for line in _lines(DumpReader(dump, job.on_broken)):
        number = zlib.crc32(line)
        if number >= limit:
            continue
        try:
            message = parse_comment(load_line(line))
        except ValueError:
            continue
        if message.text and not message.text.isspace() and not judge.failing(message):
            kept.append((number, message.text))
            if len(kept) > job.n_messages:
                limit, kept = lowest(kept, job.n_messages, limit)
    return kept


def _lines(reader: DumpReader) -> Iterator[bytes]:
    for block in reader.blocks():
        yield from block.data.split(b"\n")


def lowest(texts: list[SampledText], most: int, limit: int = 1 << 32) -> tuple[int, list[SampledText]]:
    """Halve the limit of the hashes until at most `most` texts are below it; (limit, those texts)."""
    while len(texts) > most and limit > 1:
        limit //= 2
        texts = [text for text in texts if text[0] < limit]
    return limit, texts
