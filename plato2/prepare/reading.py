"""A user's files: found by path or glob, opened wherever they are, read line by line or record by record.

What cannot be used is handed to a `ReadReport`; what is damaged as a whole is a `UserError` that names it.
"""

from __future__ import annotations

import codecs
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, cast
from zipfile import BadZipFile, ZipFile

from plato2.bounded import LINE_BYTES, read_lines_of
from plato2.config import UserError
from plato2.data.samples import Dialogue
from plato2.prepare.json_values import read_values

N_EXAMPLES = 5
"""Broken records whose place and reason are kept for the report; all are counted."""
OPENING_BYTES = 1000
"""Of a file, by which its encoding is told."""
Parse = Callable[[Any, str], Dialogue]
"""A dialogue from a record and its name: its key in a JSON object, else FILE-NUMBER. Raises ValueError."""


@dataclass
class ReadReport:
    """What a reader could not use."""

    strict: bool = False
    """Stop at the first broken record."""
    n_broken: int = 0
    examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records left out on purpose, by reason (such as the negatives of a labelled file)."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know of the files, such as columns that are not read."""

    def broken(self, file: str, line: int, why: str) -> None:
        """Count the record at `line` (from 1) of `file`.

        Raises:
            UserError: in strict mode.
        """
        if self.strict:
            raise UserError(f"{file}:{line}: {why}; fix the line, or leave out strict to skip such lines")
        self.n_broken += 1
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(f"{file}:{line}: {why}")

    def note(self, text: str) -> None:
        """Keep a note, once however many files give it; of many different ones the first."""
        if text not in self.notes and len(self.notes) < N_EXAMPLES:
            self.notes.append(text)

    def sentence(self) -> str:
        """What could not be used, and the notes, in words; empty where all could."""
        parts = []
        if self.n_broken:
            parts.append(f"{self.n_broken:,} records could not be read, the first: {self.examples[0]}")
        parts += [f"{n:,} records were left out: {reason}" for reason, n in self.skipped.items()]
        return "; ".join([*parts, *self.notes])


def expand(files: Sequence[str], key: str = "files") -> list[str]:
    """Paths and globs to a sorted list of files; local, or remote with their protocol.

    `key` is what the user gave them by, for messages.

    Raises:
        UserError: no file given, none found under a name, or what is found is a pipe or device.
    """
    import fsspec

    if not files:
        raise UserError(f"{key} is empty: name the files of this corpus (paths or globs)")
    found: list[str] = []
    for pattern in [files] if isinstance(files, str) else files:
        try:
            filesystem, path = fsspec.core.url_to_fs(pattern)
            is_glob = any(char in path for char in "*?[") and not filesystem.exists(path)
            matches = sorted(filesystem.glob(path)) if is_glob else [path] * filesystem.exists(path)
            for name in matches if "file" in filesystem.protocol else []:
                if not os.path.isfile(name) and not os.path.isdir(name):  # files are read more than once
                    raise UserError(f"{key}={name!r}: a pipe or device; write its output to a file first")
        except ImportError as error:
            raise UserError(f"{key}={pattern!r}: {error}") from error
        if not matches:
            raise UserError(f"{key}={pattern!r}: no such file")
        found += matches if "://" not in pattern else [filesystem.unstrip_protocol(name) for name in matches]
    return found


def endings(file: str) -> list[str]:
    """The endings of a file's name in lower case, such as .jsonl and .gz."""
    return [suffix.lower() for suffix in PurePosixPath(file).suffixes]


def open_binary(path: str) -> IO[bytes]:
    """Open a file, local or remote; `.gz`, `.zst` and other usual endings are decompressed."""
    import fsspec

    if endings(path)[-1:] == [".zst"]:  # fsspec's own needs a further package and has no lines
        import pyarrow

        stored = pyarrow.PythonFile(fsspec.open(path, "rb", compression=None).open(), mode="r")
        return io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(stored, "zstd")))
    return cast(IO[bytes], fsspec.open(path, "rb", compression="infer").open())


@contextmanager
def readable(file: str, again: str = "get the file again") -> Iterator[IO[bytes]]:
    """A file open for reading; `again` tells the user where a whole one comes from.

    Raises:
        UserError: in the `with` block, when the file or its compressed stream is damaged.
    """
    if endings(file)[-1:] == [".zip"]:
        _check_zip(file)
    try:
        with open_binary(file) as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError, BadZipFile, MemoryError) as error:
        if "too much memory" in str(error):  # Zstandard with a window above 128 MB
            again = "unpack it first: zstd -d --long=31 FILE"
        reason = "it needs more memory than there is" if isinstance(error, MemoryError) else error
        raise UserError(f"{file} cannot be read to its end ({reason}); {again}") from error


def read_lines(
    files: Sequence[str], report: ReadReport, key: str = "files"
) -> Iterator[tuple[str, int, str]]:
    """(file, line number from 1, text) of every line that is not blank; not UTF-8, or too long, is broken.

    `key` is what the user gave the files by, for messages.

    Raises:
        UserError: a file is missing or in UTF-16, or its compressed stream is damaged.
    """
    for file in expand(files, key):
        with readable(file) as stream:
            for number, raw in enumerate(read_lines_of(stream), start=1):
                if raw is None:
                    report.broken(file, number, f"longer than {LINE_BYTES >> 20} MiB")
                    continue
                if number == 1:
                    _refuse_utf16(file, raw)
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    report.broken(file, number, "not valid UTF-8: save the file as UTF-8")
                    continue
                if text.strip():
                    yield file, number, text


def _refuse_utf16(file: str, opening: bytes) -> None:
    """What Windows calls Unicode, and some versions of PowerShell write with `>`; also without its mark.

    Without it, every second byte of what is ASCII is 0, which in UTF-8 is no character of a text.
    """
    if opening.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{file} is in UTF-16, not UTF-8; save it as UTF-8 (iconv -f UTF-16 -t UTF-8, or in PowerShell "
            "Get-Content FILE | Set-Content -Encoding utf8 NEW)"
        )
    zeros = [opening[:OPENING_BYTES][start::2].count(0) for start in (0, 1)]
    if min(zeros) == 0 and max(zeros) > max(1, len(opening[:OPENING_BYTES]) / 20):
        form = "UTF-16BE" if zeros[0] else "UTF-16LE"
        raise UserError(
            f"{file} is in UTF-16 (without a byte-order mark), not UTF-8; save it as UTF-8 (iconv -f {form} "
            "-t UTF-8)"
        )


def in_folders(files: Sequence[str], pattern: str) -> list[str]:
    """The same names, but in place of a folder the pattern in it."""
    import fsspec

    names = []
    for name in files:
        try:
            filesystem, path = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise UserError(f"files={name!r}: {error}") from error
        names.append(f"{name.rstrip('/')}/{pattern}" if filesystem.isdir(path) else name)
    return names


def read_json(
    file: str, enter: Callable[[int, str], bool], again: str = "get the file again"
) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    """(line from 1, keys, value) of the parts of a JSON file, one at a time: it may be larger than memory.

    Args:
        file: compressed or not; local or remote.
        enter: which lists and objects come element by element, see `json_values.read_values`.
        again: for the message, where a whole file comes from.

    Raises:
        UserError: the file is in UTF-16, or damaged, also by its end missing.
    """
    with readable(file, again) as start:
        _refuse_utf16(file, start.read(OPENING_BYTES))
    with readable(file, again) as stream:
        try:
            yield from read_values(stream, enter)
        except ValueError as error:
            raise UserError(
                f"{file} is damaged: {error}; {again}, or name the corpus that it is of"
            ) from error


def read_dialogues(
    files: Sequence[str], report: ReadReport, parse: Parse, *, one_each: bool = False
) -> Iterator[Dialogue]:
    """Parse the records of JSON lists, JSON objects and JSON lines; `one_each`: a JSON file is one record.

    A record that is not JSON, not UTF-8 or has another form counts as broken.

    Raises:
        UserError: a file is missing or damaged.
    """
    for file in expand(files):
        stem = PurePosixPath(file).name.partition(".")[0]
        is_lines = ".jsonl" in endings(file)
        records = _lines(file, report) if is_lines else _parts(file, one_each)
        for number, (line, key, record) in enumerate(records, start=1):
            name = key if key is not None else stem if one_each and not is_lines else f"{stem}-{number}"
            try:
                dialogue = parse(record, name)
                for turn in dialogue.turns:
                    "".join([turn.text, *turn.knowledge]).encode()  # read_json leaves broken bytes to us
            except UnicodeEncodeError:
                report.broken(file, line, f"{name}: not valid UTF-8")
            except ValueError as error:
                report.broken(file, line, f"{name}: {error}")
            else:
                yield dialogue


def read_records(files: Sequence[str], report: ReadReport) -> Iterator[tuple[str, int, Any]]:
    """(file, line from 1, value) of JSON lines and JSON lists of objects; how a file begins says which it is.

    A line that is not JSON counts as broken.

    Raises:
        UserError: a file is missing or damaged.
    """
    for file in expand(files):
        with readable(file) as stream:
            opening = b"".join(stream.read(4096).removeprefix(b"\xef\xbb\xbf").split())[:2]
        is_list = opening == b"[{"
        parts = _parts(file, one_each=False) if is_list else _lines(file, report)
        yield from ((file, line, value) for line, _, value in parts)


def _parts(file: str, one_each: bool) -> Iterator[tuple[int, str | None, Any]]:
    """(line, key or None, value) of each record of a JSON file."""
    line = 0
    for line, keys, value in read_json(file, lambda depth, _: depth == 0 and not one_each):
        yield line, keys[0] if keys else None, value
    if not line:  # an empty list is sound, a file cut to nothing is not
        with readable(file) as stream:
            if not stream.read(64).strip():
                raise UserError(f"{file} is empty; get the file again")


def _lines(file: str, report: ReadReport) -> Iterator[tuple[int, str | None, Any]]:
    """(line, None, value) of each line of a JSON lines file."""
    for _, line, text in read_lines([file], report):
        try:
            value = json_value(text)
        except ValueError as error:
            report.broken(file, line, str(error))
        else:
            yield line, None, value


def json_value(text: str) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: it is not JSON, or its nesting or digits never end; says where.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deep: recursion)") from None


def _check_zip(file: str) -> None:
    """A zip is read from the stream of its first member, so it must not have others. Nothing is unpacked."""
    import fsspec

    try:
        with fsspec.open(file, "rb", compression=None).open() as stream, ZipFile(stream) as archive:
            names = archive.namelist()
    except (BadZipFile, OSError) as error:
        raise UserError(f"{file} cannot be read to its end ({error}); get the file again") from error
    if len(names) != 1:
        raise UserError(f"{file} holds {len(names)} files, not one: unpack it and name the file to read")
