"""Corpus readers: one file a format, each a generator of `Dialogue` objects.

A reader is a module in this folder (or anywhere: give its dotted name) with one function:

    def read(files: Sequence[str], report: ReadReport, ...) -> Iterator[Dialogue]

`files` are the user's paths or globs, local or remote (empty for a corpus that comes from a package).
Further keyword arguments with defaults are the reader's own options. A record that cannot be used is handed
to `report.broken(...)`, which counts it and stops in strict mode. `plato2 prepare` reads a corpus two or
three times, so a reader must yield the same dialogues in the same order each time.
To add a corpus, add one such file; its name is the name on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, Any, cast

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn

N_EXAMPLES = 5
"""Broken records whose place and reason are kept for the report; all are counted."""
_LATEST_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


@dataclass
class ReadReport:
    """What a reader could not use."""

    strict: bool = False
    """Stop at the first broken record."""
    n_broken: int = 0
    examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records left out on purpose, by reason (such as the negatives of a labelled file)."""

    def broken(self, file: str, line: int, why: str) -> None:
        """Count the record at `line` (from 1) of `file`.

        Raises:
            UserError: in strict mode.
        """
        if self.strict:
            raise UserError(f"{file}:{line}: {why}; mend the line, or leave out strict to skip such lines")
        self.n_broken += 1
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(f"{file}:{line}: {why}")


def corpus_names() -> list[str]:
    """The readers that come with plato2."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def read_corpus(
    corpus: str, files: Sequence[str], report: ReadReport, options: Mapping[str, Any] | None = None
) -> Iterator[Dialogue]:
    """Dialogues of a corpus by the reader's name, or by the dotted name of a module with a `read` function.

    Raises:
        UserError: no such reader or option, no such file, or a broken record in strict mode.
    """
    names = corpus_names()
    if corpus not in names and "." not in corpus:
        raise UserError(
            f"corpus={corpus!r} is not known; there are {', '.join(names)}, or a module with a read function "
            "by its dotted name"
        )
    module_name = f"{__name__}.{corpus}" if corpus in names else corpus
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"corpus={corpus!r} cannot be imported: {error}") from error
    if not hasattr(module, "read"):
        raise UserError(f"corpus={corpus!r}: the module has no function read(files, report)")
    known = list(inspect.signature(module.read).parameters)[2:]
    for option in options or {}:
        if option not in known:
            raise UserError(
                f"reader.{option}: {corpus} has no such option ({', '.join(known) or 'it has none'})"
            )
    return cast(Iterator[Dialogue], module.read(list(files), report, **(options or {})))


def expand(files: Sequence[str]) -> list[str]:
    """Paths and globs to a sorted list of files; local, or remote with their protocol.

    Raises:
        UserError: no file given, or none found under a name.
    """
    import fsspec

    if not files:
        raise UserError("files is empty: name the files of this corpus (paths or globs)")
    found: list[str] = []
    for pattern in files:
        try:
            filesystem, path = fsspec.core.url_to_fs(pattern)
            is_glob = any(char in path for char in "*?[") and not filesystem.exists(path)
            matches = sorted(filesystem.glob(path)) if is_glob else [path] * filesystem.exists(path)
        except ImportError as error:
            raise UserError(f"files={pattern!r}: {error}") from error
        if not matches:
            raise UserError(f"files={pattern!r}: no such file")
        found += matches if "://" not in pattern else [filesystem.unstrip_protocol(name) for name in matches]
    return found


def open_binary(path: str) -> IO[bytes]:
    """Open a file, local or remote; `.gz` and other usual endings are decompressed."""
    import fsspec

    return cast(IO[bytes], fsspec.open(path, "rb", compression="infer").open())


def read_lines(files: Sequence[str], report: ReadReport) -> Iterator[tuple[str, int, str]]:
    """(file, line number from 1, text) of every line that is not blank; not UTF-8 counts as broken.

    Raises:
        UserError: a file is missing, or its compressed stream is damaged.
    """
    for file in expand(files):
        try:
            with open_binary(file) as stream:
                for number, raw in enumerate(stream, start=1):
                    try:
                        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                    except UnicodeDecodeError:
                        report.broken(file, number, "not valid UTF-8")
                        continue
                    if text.strip():
                        yield file, number, text
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{file} cannot be read to its end ({error}); get the file again") from error


def merge_speakers(turns: Iterable[Turn]) -> list[Turn]:
    """Join consecutive turns of one speaker; turns without a speaker stay as they are."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and turn.speaker is not None and merged[-1].speaker == turn.speaker:
            merged[-1].text += " " + turn.text
            merged[-1].knowledge += turn.knowledge
        else:
            merged.append(turn)
    return merged


def parse_time(value: object) -> float | None:
    """Seconds since 1970 from a number or an ISO 8601 text (UTC when it names no zone).

    Raises:
        ValueError: neither, or no date (such as milliseconds).
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"time {value!r} is neither a number nor an ISO 8601 text")
    if isinstance(value, int | float):
        if not 0 <= value <= _LATEST_TIME:
            raise ValueError(f"time {value!r} is not in seconds since 1970")
        return float(value)
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
