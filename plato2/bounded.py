"""A user's files, read within bounds: irregular files are never waited for, huge ones never held."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO

from plato2.config import UserError

LINE_BYTES = 1 << 24
"""The longest line of text that is read: 16 MiB, some thousand pages."""
TEXT_BYTES = 1 << 26
"""The largest text that is read as a whole: a list of words, the starts of dialogues."""


def read_file(path: str | Path, most: int, cure: str, option: str = "") -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: the most bytes that such a file has.
        cure: for the message.
        option: the option that it was given by, as `--starts `, for the message.

    Raises:
        UserError: a folder, pipe or device, more than `most` bytes, or not readable.
        FileNotFoundError: no such file; `NotADirectoryError` where a file is in the place of a folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer does not hang
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{option}{path}: not a regular file; {cure}")
            data = file.read(most + 1) if os.fstat(descriptor).st_size <= most else None
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}{path}: cannot be read ({reason}); {cure}") from None
    if data is None or len(data) > most:
        raise UserError(f"{option}{path}: larger than {most:,} bytes, too large for such a file; {cure}")
    return data


def read_unpacked(path: str | Path, most: int, cure: str, option: str = "") -> bytes:
    """As `read_file`; a name that ends in `.gz` is decompressed, and `most` holds for what comes out, too."""
    data = read_file(path, most, cure, option)
    if Path(path).suffix.lower() != ".gz":
        return data
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as packed:
            data = packed.read(most + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{option}{path}: cannot be unpacked ({error}); {cure}") from None
    if len(data) > most:
        raise UserError(f"{option}{path}: unpacks to more than {most:,} bytes; {cure}")
    return data


def read_text(path: str | Path, most: int, cure: str, option: str = "") -> str:
    """The text of such a file, which is UTF-8.

    Raises:
        UserError: also where there is no such file, or it is not UTF-8.
    """
    try:
        return read_unpacked(path, most, cure, option).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{option}{path}: no such file; {cure}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None


def read_lines_of(stream: IO[bytes], most: int = LINE_BYTES) -> Iterator[bytes | None]:
    """The lines of a stream with their ends; None for one of more than `most` bytes, which is skipped."""
    while line := stream.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(most)
        yield None
