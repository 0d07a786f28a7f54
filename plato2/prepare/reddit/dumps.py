"""Dump files: compressed or plain NDJSON, local or remote, read to the end or not at all.

A dump is one JSON object per line, a month a file: `RC_2011-01.zst` (comments), `RS_2011-01.zst`
(submissions). The newer ones are compressed with a window of 2 GiB, which a reader has to allow and to hold.
A compressed stream that stops in the middle looks like its end to most libraries; here it is an error.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plato2.config import UserError
from plato2.prepare.reading import expand

BLOCK_BYTES = 32 << 20
"""Uncompressed bytes of a block, the unit of work: some ten thousand comments."""
_READ_BYTES = 1 << 18
_PIECE_BYTES = 1 << 10
"""Compressed bytes at a time: 32 MiB at most in Zstandard, 1 MiB in gzip; in bz2 and xz without bounds."""
_MOST_BYTES = 1 << 25
"""Uncompressed bytes at a time."""
_LONGEST_LINE = 64 << 20
_MAX_WINDOW = 2**31
"""Bytes: what `zstd --long=31` needs."""


@dataclass(frozen=True)
class Dump:
    """One input file and what tells it from another version of itself."""

    path: str
    kind: str
    """`comments` or `submissions`."""
    size: int
    """Bytes, as stored."""
    key: str
    """Names its parts in the work folder: the file's name and a hash of address, size and time of change."""


@dataclass(frozen=True)
class Block:
    """Whole lines of a dump."""

    number: int
    first_line: int
    """Line number in the file, from 1."""
    data: bytes

    @property
    def sha256(self) -> bytes:
        """Of the lines; it tells whether a part was made from this block."""
        return hashlib.sha256(self.data).hexdigest().encode()


class BrokenStream(Exception):
    """The compressed stream ends too early or is damaged; the message says which, and after which line."""


class _Whole:
    """zlib's or zstandard's object with the names of those of bz2 and lzma; gives all that a piece has."""

    needs_input = True

    def __init__(self, decompressor: Any) -> None:
        self._object = decompressor

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._object.decompress(data)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data


def find_dumps(patterns: list[str], kind: str) -> list[Dump]:
    """The files of the user's paths and globs, in the order of their names; no file twice.

    Raises:
        UserError: none found under a name.
    """
    import fsspec

    dumps: dict[str, Dump] = {}
    for path in sorted(set(expand(patterns, kind))):
        filesystem, inner = fsspec.core.url_to_fs(path)
        info = filesystem.info(inner)
        if info["type"] == "directory":
            raise UserError(f"{kind}={path}: is a folder; name the files, such as '{path}/RC_*.zst'")
        changed = info.get("mtime") or info.get("LastModified") or info.get("ETag") or ""
        version = hashlib.sha256(f"{path}|{info['size']}|{changed}".encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", inner.rsplit("/", 1)[-1])
        place = os.path.realpath(inner) if "file" in filesystem.protocol else path
        dumps.setdefault(place, Dump(path, kind, int(info["size"] or 0), f"{name}-{version}"))
    return list(dumps.values())


class DumpReader:
    """The blocks of one dump in order; then `sha256`, `n_lines`, `n_blocks` and `cut` say what was read.

    Args:
        dump: the file.
        on_broken: `stop` raises at a damaged stream; `skip` ends there and keeps the reason in `cut`.
        block_bytes: uncompressed bytes of a block.
    """

    def __init__(self, dump: Dump, on_broken: str = "stop", block_bytes: int = BLOCK_BYTES) -> None:
        """Nothing is opened before the first block is asked for."""
        self._dump, self._on_broken, self._block_bytes = dump, on_broken, block_bytes
        self._hash = hashlib.sha256()
        self.n_lines = self.n_blocks = 0
        self.bytes_read = 0
        """Bytes of the stored file read so far."""
        self.cut: str | None = None

    @property
    def sha256(self) -> str:
        """Of the stored file, as far as it was read."""
        return self._hash.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Yield the file's lines in blocks that are cut at the same places each time.

        Raises:
            UserError: the file cannot be opened, or its stream is damaged and `on_broken` is `stop`.
        """
        waiting: list[bytes] = []
        n_waiting = 0
        try:
            for data in self._decompressed():
                waiting.append(data)
                n_waiting += len(data)
                if n_waiting < self._block_bytes or b"\n" not in data:
                    self._check_lines(n_waiting)
                    continue
                text = b"".join(waiting)
                while (end := text.find(b"\n", self._block_bytes - 1)) >= 0:  # cuts depend on the text alone
                    yield self._block(text[: end + 1])
                    text = text[end + 1 :]
                waiting, n_waiting = [text], len(text)
                self._check_lines(n_waiting)
        except BrokenStream as error:
            lines, newline, _ = b"".join(waiting).rpartition(b"\n")  # what follows is half a line
            message = f"{self._dump.path}: {error}"
            if self._on_broken == "stop":
                line = self.n_lines + lines.count(b"\n") + bool(newline)
                raise UserError(
                    f"{message}, after line {line:,}; get the file again, or use what can be read of it with "
                    "--on-broken skip"
                ) from None
            self.cut = str(error)
            if newline:
                yield self._block(lines + newline)
            return
        if any(waiting):
            yield self._block(b"".join(waiting))

    def _check_lines(self, n_waiting: int) -> None:
        if n_waiting > self._block_bytes + _LONGEST_LINE:
            raise UserError(
                f"{self._dump.path}: no line ends within {n_waiting >> 20} MB after line {self.n_lines:,}: "
                "this is not a dump (one JSON object per line)"
            )

    def _block(self, data: bytes) -> Block:
        block = Block(self.n_blocks, self.n_lines + 1, data)
        self.n_lines += data.count(b"\n") + (not data.endswith(b"\n"))
        self.n_blocks += 1
        return block

    def _decompressed(self) -> Iterator[bytes]:
        new = _decompressor(self._dump.path)
        current = new() if new else None
        stored = b""
        for stored in self._stored():
            if current is None:
                yield stored
                continue
            assert new is not None
            # In small pieces: what a piece holds before the damage in it is lost.
            for start in range(0, len(stored), _PIECE_BYTES):
                data = stored[start : start + _PIECE_BYTES]
                while data:
                    if current.eof:  # several streams one after the other are one file
                        current = new()
                    try:
                        text = current.decompress(data, _MOST_BYTES)
                        while not (current.eof or current.needs_input):
                            yield text
                            text = current.decompress(b"", _MOST_BYTES)
                    except Exception as error:  # each library has its own kinds
                        raise BrokenStream(f"damaged ({error})") from None
                    if text:
                        yield text
                    data = current.unused_data if current.eof else b""
        if current is not None and not current.eof:
            raise BrokenStream("ends in the middle of its compressed stream" if stored else "has no bytes")

    def _stored(self) -> Iterator[bytes]:
        import fsspec

        try:
            with fsspec.open(self._dump.path, "rb").open() as file:
                while data := file.read(_READ_BYTES):
                    self._hash.update(data)
                    self.bytes_read += len(data)
                    yield data
        except FileNotFoundError:
            raise UserError(f"{self._dump.path}: no such file") from None
        except OSError as error:
            raise UserError(f"{self._dump.path}: cannot be read ({error})") from error


def _decompressor(path: str) -> Any:
    """A function that makes the decompressor of a file by its ending; None for plain text."""
    ending = path.rsplit(".", 1)[-1].lower()
    if ending == "zst":
        import zstandard

        return lambda: _Whole(zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj())
    if ending == "gz":
        return lambda: _Whole(zlib.decompressobj(wbits=31))
    return {"bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}.get(ending)
