"""Dump files to blocks of lines: every compression, every cut, damage, and files that are no dumps."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import lzma
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.prepare.reddit.dumps import Block, Dump, DumpReader, find_dumps


def zst(text: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(text)


def zst_long(text: bytes) -> bytes:
    """A frame that asks its reader for a window of 2 GiB, as `zstd --long=31` makes them."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=20, write_checksum=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = bytearray(compressor.compress(text) + compressor.flush())
    assert not frame[4] & 0x20  # a header with a byte for the window, as the size is not known
    frame[5] = (31 - 10) << 3
    return bytes(frame)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "zst": zst,
    "gz": lambda text: gzip.compress(text, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
ENDINGS = [*COMPRESS, "", "ndjson"]
RANDOM = random.Random(0)
TEXT = b"".join(b"%d %s\n" % (number, RANDOM.randbytes(12).hex().encode()) for number in range(2000))


def dump(path: object) -> Dump:
    return Dump(str(path), "comments", 0, "key")


def read(path: object, *arguments: object, **options: object) -> tuple[list[Block], DumpReader]:
    reader = DumpReader(dump(path), *arguments, **options)
    return list(reader.blocks()), reader


def content(blocks: list[Block]) -> bytes:
    return b"".join(block.data for block in blocks)


def written(folder: Path, data: bytes, ending: str, name: str = "RC_2011-01") -> Path:
    path = folder / (f"{name}.{ending}" if ending else name)
    path.write_bytes(data)
    return path


# -- sound files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 24])
def test_every_compression(tmp_path: Path, ending: str, place: str, block_bytes: int) -> None:
    stored = COMPRESS.get(ending, bytes)(TEXT)
    path = str(written(tmp_path, stored, ending))
    if place == "memory":
        path = f"memory://reddit{path}"
        with fsspec.open(path, "wb") as file:
            file.write(stored)
    blocks, reader = read(path, block_bytes=block_bytes)
    assert content(blocks) == TEXT
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert len(blocks) == {1: 2000, 1 << 24: 1}.get(block_bytes, len(blocks)) > 0
    assert (reader.n_lines, reader.cut, reader.bytes_read) == (2000, None, len(stored))
    assert reader.sha256 == hashlib.sha256(stored).hexdigest()


def test_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    assert content(read(written(tmp_path, gzip.compress(TEXT), "GZ"))[0]) == TEXT


def test_a_window_of_2_gib(tmp_path: Path) -> None:
    path = written(tmp_path, zst_long(TEXT), "zst")
    window = zstandard.get_frame_parameters(path.read_bytes()).window_size
    assert window == 2**31
    with pytest.raises(zstandard.ZstdError, match="memory"):  # as readers do that were not told
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert content(read(path)[0]) == TEXT


def test_a_window_of_4_gib_is_refused(tmp_path: Path) -> None:
    frame = bytearray(zst_long(TEXT))
    frame[5] = (32 - 10) << 3
    with pytest.raises(UserError, match=r"RC_2011-01\.zst: damaged \(.*memory"):
        read(written(tmp_path, bytes(frame), "zst"))


@pytest.mark.parametrize("ending", COMPRESS)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=4))
@settings(max_examples=15, deadline=None)
def test_streams_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, ending: str, cuts: list[int]
) -> None:
    bounds = [0, *sorted(cuts), len(TEXT)]
    streams = [COMPRESS[ending](TEXT[a:b]) for a, b in itertools.pairwise(bounds)]
    path = written(tmp_path_factory.mktemp("streams"), b"".join(streams), ending)
    blocks, reader = read(path, block_bytes=10_000)
    assert content(blocks) == TEXT
    assert (reader.n_lines, reader.cut) == (2000, None)


def test_zst_frames_to_be_skipped(tmp_path: Path) -> None:
    """pzstd writes such frames before each of its own."""
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"size"
    path = written(tmp_path, skippable + zst(TEXT[:999]) + skippable + zst(TEXT[999:]) + skippable, "zst")
    assert content(read(path)[0]) == TEXT


LINES = st.lists(st.integers(0, 60), max_size=60)


@given(LINES, st.integers(1, 200), st.booleans(), st.sampled_from(ENDINGS))
@settings(max_examples=150, deadline=None)
def test_blocks_are_the_lines_of_the_file(
    lengths: list[int], block_bytes: int, newline: bool, ending: str
) -> None:
    """Line numbers included; lines of length 0 are blank, and the last one may have no newline."""
    text = b"\n".join(b"%c" % (97 + number % 26) * n for number, n in enumerate(lengths)) + b"\n" * newline
    path = f"memory://lines/RC.{ending}" if ending else "memory://lines/RC"
    with fsspec.open(path, "wb") as file:
        file.write(COMPRESS.get(ending, bytes)(text))
    blocks, reader = read(path, block_bytes=block_bytes)
    assert content(blocks) == text
    line = 1
    for block in blocks:
        assert block.first_line == line
        line += block.data.count(b"\n")
    assert reader.n_lines == len(text.splitlines())
    for block in blocks[:-1]:  # whole lines, as few as reach the size
        assert block.data.endswith(b"\n")
        assert len(block.data) >= block_bytes
        assert block_bytes > block.data.rfind(b"\n", 0, -1) + 1
    assert all(block.data for block in blocks)


@pytest.mark.parametrize("block_bytes", [1000, 100_000])
def test_cuts_depend_on_the_text_alone(tmp_path: Path, block_bytes: int) -> None:
    """Not on how a compressor or the reads cut it: a part of a run can be made again after a kill."""
    text = b"".join(b"%s\n" % RANDOM.randbytes(RANDOM.randint(0, 900)).hex().encode() for _ in range(500))
    stored = {ending: COMPRESS.get(ending, bytes)(text) for ending in ENDINGS}
    stored["1.zst"] = b"".join(zst(text[at : at + 7777]) for at in range(0, len(text), 7777))
    found = [read(written(tmp_path, data, name), block_bytes=block_bytes)[0] for name, data in stored.items()]
    assert len(found[0]) > 3
    assert all(blocks == found[0] for blocks in found)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("text", [b"", b"\n", b"\n\n\n", b"a", b"a\r\n\r\nb\r\n", b"\na\n\nb"])
def test_blank_lines_ends_and_nothing_at_all(tmp_path: Path, ending: str, text: bytes) -> None:
    blocks, reader = read(written(tmp_path, COMPRESS.get(ending, bytes)(text), ending))
    assert content(blocks) == text
    assert len(blocks) == bool(text)
    assert (reader.n_lines, reader.cut) == (len(text.splitlines()), None)


# -- damaged files ---------------------------------------------------------------------------------------

SHORT = b"".join(b"line %d: %s\n" % (number, RANDOM.randbytes(4).hex().encode()) for number in range(40))


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_of_no_bytes(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, b"", ending)
    with pytest.raises(UserError, match=rf"RC_2011-01\.{ending}: has no bytes, after line 0; get the file"):
        read(path)
    blocks, reader = read(path, "skip")
    assert (blocks, reader.n_lines, reader.cut) == ([], 0, "has no bytes")


def cut_everywhere(streams: list[bytes], ending: str, texts: list[bytes]) -> None:
    """A file is whole at the end of each of its streams, and cut at any other byte."""
    stored, path = b"".join(streams), f"memory://cut/RC.{ending}"
    whole, at = {}, 0
    for number, stream in enumerate(streams, start=1):
        at += len(stream)
        whole[at] = b"".join(texts[:number])
    text, n_before = b"".join(texts), 0
    for size in range(len(stored) + 1):
        fsspec.filesystem("memory").pipe_file("/cut/RC." + ending, stored[:size])
        if size in whole:
            blocks, reader = read(path, block_bytes=100)
            assert content(blocks) == whole[size]
            assert reader.cut is None
            continue
        with pytest.raises(UserError, match=rf"^{path}: (ends in the middle|has no bytes)") as caught:
            read(path, block_bytes=100)
        blocks, reader = read(path, "skip", 100)
        kept = content(blocks)
        assert text.startswith(kept)
        assert kept == b"" or kept.endswith(b"\n")
        assert reader.n_lines == kept.count(b"\n") >= n_before  # never fewer with more bytes
        assert f", after line {reader.n_lines:,}; get the file again" in str(caught.value)
        assert reader.cut
        n_before = reader.n_lines


@pytest.mark.parametrize("ending", COMPRESS)
def test_cut_at_every_byte(ending: str) -> None:
    cut_everywhere([COMPRESS[ending](SHORT)], ending, [SHORT])


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_streams_cut_at_every_byte(ending: str) -> None:
    texts = [SHORT[:500], SHORT[500:777], SHORT[777:]]
    cut_everywhere([COMPRESS[ending](text) for text in texts], ending, texts)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("block_bytes", [1000, 1 << 24])
def test_all_whole_lines_before_the_cut_are_kept(tmp_path: Path, ending: str, block_bytes: int) -> None:
    """As many as the library's own file object gives of the same bytes, or more."""
    text = b"".join(RANDOM.randbytes(20).hex().encode() + b"\n" for _ in range(30_000))
    path = written(tmp_path, COMPRESS[ending](text)[:-300], ending)
    plain = b""
    with path.open("rb") as file:
        opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(ending)
        stream = opened(file) if opened else zstandard.ZstdDecompressor().stream_reader(file)
        try:
            while data := stream.read1(1000) if opened else stream.read(1000):
                plain += data
        except EOFError:
            pass
    blocks, reader = read(path, "skip", block_bytes)
    kept = content(blocks)
    assert text.startswith(kept)
    assert len(kept) >= plain.rfind(b"\n") + 1
    assert len(kept) > 100_000
    assert reader.n_lines == kept.count(b"\n")
    assert reader.cut == "ends in the middle of its compressed stream"


@pytest.mark.parametrize("lines", [b"\n", b"\n\n", b"a\n\n", b"\n\nhalf", b"half"])
def test_lines_before_a_cut_that_are_blank(tmp_path: Path, lines: bytes) -> None:
    path = written(tmp_path, bz2.compress(lines) + b"BZh9", "bz2")
    blocks, reader = read(path, "skip")
    assert content(blocks) == lines[: lines.rfind(b"\n") + 1]
    assert reader.n_lines == lines.count(b"\n")
    with pytest.raises(UserError, match=f"after line {reader.n_lines};"):
        read(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_byte_that_flipped_is_never_other_text(ending: str) -> None:
    stored, path = COMPRESS[ending](SHORT), f"memory://flip/RC.{ending}"
    n_found = 0
    for at, flip in itertools.product(range(len(stored)), (0, 0xFF)):
        damaged = bytearray(stored)
        damaged[at] ^= flip or 1 << at % 8
        fsspec.filesystem("memory").pipe_file("/flip/RC." + ending, bytes(damaged))
        blocks, reader = read(path, "skip", 100)
        if reader.cut is None:
            assert content(blocks) == content(read(path)[0]) == SHORT
            continue
        n_found += (
            1  # the checksums of gz and zst stand at the end: under skip, lines before it may be other ones
        )
        with pytest.raises(UserError, match=f"^{path}: "):
            read(path)
    assert n_found > 1.7 * len(stored)  # the others are in headers: a time, a system


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("garbage", [b"\0" * 512, b"</html>", b"{}\n"])
def test_bytes_after_the_end(tmp_path: Path, ending: str, garbage: bytes) -> None:
    path = written(tmp_path, COMPRESS[ending](SHORT) + garbage, ending)
    with pytest.raises(UserError, match="after line 40;"):
        read(path)
    blocks, reader = read(path, "skip")
    assert content(blocks) == SHORT
    assert reader.cut


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_under_the_wrong_name(tmp_path: Path, ending: str) -> None:
    for other, compress in {**COMPRESS, "": bytes}.items():
        if other != ending:
            with pytest.raises(UserError, match=rf"\.{ending}: damaged \(.*after line 0;"):
                read(written(tmp_path, compress(SHORT), ending))


@pytest.mark.parametrize("ending", ["", "gz"])
def test_100_mb_without_a_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"RC.{ending}".rstrip(".")
    with (gzip.open if ending else open)(path, "wb") as file:
        file.write(b"first\n")
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    for on_broken in ("stop", "skip"):
        with pytest.raises(UserError, match=r"RC.*: no line ends within \d+ MB after line 1: this is not"):
            read(path, on_broken, 5)


def test_a_line_of_10_mb(tmp_path: Path) -> None:
    text = b"a\n" + b"x" * 10_000_000 + b"\nb\n"
    blocks, reader = read(written(tmp_path, text, ""), block_bytes=100)
    assert [block.first_line for block in blocks] == [1, 3]
    assert content(blocks) == text
    assert reader.n_lines == 3


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RC_2011-01\.zst: no such file"):
        read(tmp_path / "RC_2011-01.zst")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


# -- find_dumps ------------------------------------------------------------------------------------------


def names(dumps: list[Dump]) -> list[str]:
    return [dump.path.rsplit("/", 1)[-1] for dump in dumps]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for month in ("2011-02", "2011-01", "2012-01"):
        written(tmp_path, b"{}\n", "zst", f"RC_{month}")
    written(tmp_path, b"{}\n", "zst", "RS_2011-01")
    return tmp_path


def test_globs(folder: Path) -> None:
    found = find_dumps([f"{folder}/RC_2011-*.zst"], "comments")
    assert names(found) == ["RC_2011-01.zst", "RC_2011-02.zst"]
    assert {(dump.kind, dump.size) for dump in found} == {("comments", 3)}
    again = [f"{folder}/RC_*", f"{folder}/RC_2011-02.zst", f"{folder}/./RC_2012-01.zst"]
    again += [f"file://{folder}/RC_2011-01.zst", str(folder / "link.zst")]
    (folder / "link.zst").symlink_to("RC_2012-01.zst")
    assert len(find_dumps(again, "comments")) == 3
    twice = [f"{folder}/RC_2012-01.zst", f"{folder}/RC_2011*", f"{folder}/RC_2011-01.zst"]
    assert find_dumps(twice, "") == find_dumps([f"{folder}/RC_*"], "")


def test_globs_of_a_remote_place() -> None:
    for month in ("02", "01"):
        fsspec.filesystem("memory").pipe_file(f"/globs/RC_2011-{month}", b"{}\n" * int(month))
    found = find_dumps(["memory://globs/RC_*", "memory://globs/RC_2011-01"], "comments")
    assert [dump.path for dump in found] == ["memory:///globs/RC_2011-01", "memory:///globs/RC_2011-02"]
    assert [content(list(DumpReader(dump).blocks())) for dump in found] == [b"{}\n", b"{}\n{}\n"]


def test_a_name_with_the_signs_of_globs(tmp_path: Path) -> None:
    path = written(tmp_path, b"{}\n", "ndjson", "RC [1] *?é")
    (found,) = find_dumps([str(path)], "comments")
    assert found.path == str(path)
    assert found.key.startswith("RC__1_____.ndjson-")
    assert content(list(DumpReader(found).blocks())) == b"{}\n"


def test_faults_of_names(folder: Path) -> None:
    with pytest.raises(UserError, match=r"comments=.*: is a folder; name the files, such as '.*/RC_\*\.zst'"):
        find_dumps([str(folder)], "comments")
    for pattern in ("RC_2013*", "RC_2013-01.zst"):
        with pytest.raises(UserError, match=r"RC_2013.*: no such file"):
            find_dumps([f"{folder}/RC_2011-01.zst", f"{folder}/{pattern}"], "comments")
    with pytest.raises(UserError, match="comments is empty"):
        find_dumps([], "comments")


def test_the_key_tells_versions_of_a_file_apart(tmp_path: Path) -> None:
    def key(path: Path) -> str:
        (found,) = find_dumps([str(path)], "comments")
        return found.key

    path = written(tmp_path, b"{}\n", "zst")
    first = key(path)
    assert first == key(path)
    assert first.startswith("RC_2011-01.zst-")
    os.utime(path, (1, 1))
    touched = key(path)
    path.write_bytes(b"{ }\n")
    os.utime(path, (1, 1))
    grown = key(path)
    (tmp_path / "other").mkdir()
    elsewhere = written(tmp_path / "other", b"{ }\n", "zst")
    os.utime(elsewhere, (1, 1))
    assert len({first, touched, grown, key(elsewhere)}) == 4
