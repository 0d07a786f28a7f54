"""`plato2 prepare reddit` on broken lines, damaged streams, files that are no dumps, and odd trees."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from preparing import (
    assert_adds_up,
    comment,
    digest,
    facts_of,
    index_of,
    more_than,
    records,
    refused,
    same_samples,
)

from benchmarks.reddit_dumps import deep_thread, flip_bytes, truncate, wide_thread
from plato2.prepare.reddit.rules import RedditRules

Bad = tuple[bytes, str]
BAD_LINES: dict[str, Bad] = {
    "half a line": (b'{"id":"c1","body":"hal', "not valid JSON"),
    "not UTF-8": (
        b'{"id":"c1","link_id":"t3_a","body":"\xff\xfe","created_utc":1300000000}',
        "not valid JSON",
    ),
    "an array": (b"[1, 2]", "not an object"),
    "another object": (b'{"id":"c1","title":"no comment"}', "no body"),
    "no time": (b'{"id":"c1","link_id":"t3_a","body":"so what"}', "created_utc"),
    "a wrong id": (b'{"id":"c-?","link_id":"t3_a","body":"so what","created_utc":1300000000}', "id"),
    "no text but a list": (b'{"id":"c1","link_id":"t3_a","body":["a"],"created_utc":1300000000}', "body"),
    "zeros": (b"\0" * 40, "not valid JSON"),
}


def test_a_broken_line_stops_or_is_counted(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    expected = digest(small("sound", sound))
    for line, says in BAD_LINES.values():
        lines = [*sound[:122], line, *sound[122:]]
        message = refused(
            f"{tmp_path / 'bad.ndjson'}:123: ",
            says,
            "--on-broken skip",
            call=lambda: small("bad", lines),  # noqa: B023
        )
        assert not message.endswith(": ")
    lines = [*sound[:122], *(line for line, _ in BAD_LINES.values()), *sound[122:], b"", b"  "]
    out = small("bad", lines, on_broken="skip")
    assert digest(out) == expected
    facts = facts_of(out)
    assert facts["n_broken"] == len(BAD_LINES)
    assert [example.split(": ")[0] for example in facts["broken_examples"]] == [
        f"{tmp_path / 'bad.ndjson'}:{number}" for number in range(123, 128)
    ]
    assert facts["counts"]["read"] == len(sound)
    assert index_of(out)["source"]["files"][0]["n_lines"] == len(lines)
    card = (out / "card.md").read_text()
    assert f"could not be read | {len(BAD_LINES)} |" in card
    assert f"= messages | {len(sound)} |" in card
    assert "bad.ndjson:123: not valid JSON" in card


def junk(lines: list[bytes]) -> list[bytes]:
    """The same comments, but they do not compress: libraries hand out what they have read in big pieces."""
    rng = random.Random(2)
    return [b'{"junk":"%s",%s' % (rng.randbytes(2500).hex().encode(), line[1:]) for line in lines]


def compressed(lines: list[bytes], path: Path) -> Path:
    data = b"\n".join(lines) + b"\n"
    if path.suffix == ".zst":  # several blocks, so that there is something before a damage
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        pieces = [data[start : start + 30_000] for start in range(0, len(data), 30_000)]
        flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        path.write_bytes(
            b"".join(compressor.compress(p) + compressor.flush(flush) for p in pieces) + compressor.flush()
        )
    else:
        path.write_bytes({".bz2": bz2.compress, ".gz": gzip.compress}[path.suffix](data))
    return path


def readable_part(path: Path) -> list[bytes]:
    """The whole lines that can be read of a truncated file, byte by byte."""
    new = {
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
        ".bz2": bz2.BZ2Decompressor,
        ".gz": lambda: __import__("zlib").decompressobj(wbits=31),
    }
    decompressor = new[path.suffix]()
    found = [decompressor.decompress(bytes([byte])) for byte in path.read_bytes()]
    return b"".join(found).split(b"\n")[:-1]


@pytest.mark.parametrize("ending", ["zst", "gz", "bz2"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_stream(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path, ending: str, damage: str
) -> None:
    sound = junk(sound)
    if ending == "bz2":  # a block of bz2 is 900 KB: several streams, as parallel compressors write
        path = tmp_path / "RC_2011-01.bz2"
        streams = [bz2.compress(b"\n".join(sound[at : at + 50]) + b"\n") for at in range(0, len(sound), 50)]
        path.write_bytes(b"".join(streams))
        expected = sound[:150]
        offset = sum(map(len, streams[:3])) + len(streams[3]) // 2
    else:
        path = compressed(sound, tmp_path / f"RC_2011-01.{ending}")
        expected = []
        offset = int(path.stat().st_size * 0.7)
    if damage == "truncated":
        truncate(path, offset / path.stat().st_size)
    else:
        flip_bytes(path, offset, 20)
    if damage == "truncated" and not expected:
        expected = readable_part(path)
    early = {"valid_from": "2011-01-08"}
    message = refused(str(path), "after line ", "--on-broken skip", call=lambda: small("out", [path]))
    after = int(re.findall(r"after line ([\d,]+)", message)[0].replace(",", ""))
    out = small("out", [path], on_broken="skip", **early)
    facts = facts_of(out)
    n_read = facts["counts"]["read"]
    assert 0 < n_read < len(sound)
    if expected:
        assert n_read == len(expected)
    assert after == n_read + facts["n_broken"]
    (report,) = index_of(out)["source"]["files"]
    assert report["cut"] is not None
    assert report["n_lines"] == after
    assert "1 of 1 files" in (out / "card.md").read_text()
    if expected:
        assert facts["n_broken"] == 0
        assert digest(out) == digest(small("part", expected, **early))


def test_the_checksum_at_the_end_of_a_stream(
    sound: list[bytes], small: Callable[..., Path], tmp_path: Path
) -> None:
    """Then all lines were there, but one of them may be wrong."""
    sound = junk(sound)
    path = compressed(sound, tmp_path / "RC_2011-01.zst")
    flip_bytes(path, -2)
    refused(str(path), "damaged", call=lambda: small("out", [path]))
    out = small("out", [path], on_broken="skip")
    assert 0 < facts_of(out)["counts"]["read"] < len(sound)  # the last piece is not trusted
    assert "damaged" in index_of(out)["source"]["files"][0]["cut"]


def test_files_that_are_no_dumps(sound: list[bytes], small: Callable[..., Path], tmp_path: Path) -> None:
    good = tmp_path / "RC_good"
    good.write_bytes(b"\n".join(sound))
    expected = digest(small("good", [good]))
    png, document, lone = (tmp_path / name for name in ("RC_picture", "RC_x.json", "RC_lone.json"))
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 300)
    document.write_text(json.dumps({"no": "comment", "list": [1, 2]}, indent=1))
    lone.write_text(json.dumps({"no": "comment"}))
    for path, lines in ((png, 602), (document, 7), (lone, 1)):
        message = refused(str(path), "--on-broken skip", call=lambda: small("new", [path, good]))  # noqa: B023
        assert f"{path}:1: " in message
        out = small("out", [path, good], on_broken="skip", force=True)
        assert digest(out) == expected
        n_lines = len(path.read_bytes().split(b"\n"))
        assert 0 < facts_of(out)["n_broken"] <= n_lines <= lines
        refused(str(path), call=lambda: small("only", [path], on_broken="skip"))  # noqa: B023
    for ending in ("zst", "gz", "bz2", "xz"):
        empty = tmp_path / f"RC_empty.{ending}"
        empty.write_bytes(b"")
        refused(str(empty), "no bytes", call=lambda: small("new", [empty, good]))  # noqa: B023
    out = small("out", [tmp_path / "RC_empty.zst", good], on_broken="skip", force=True)
    assert digest(out) == expected
    (tmp_path / "RC_fake.zst").write_bytes(b"this is not compressed")
    refused(
        str(tmp_path / "RC_fake.zst"),
        "after line 0",
        call=lambda: small("out", [tmp_path / "RC_fake.zst"], force=True),
    )


def test_an_empty_month(sound: list[bytes], small: Callable[..., Path], tmp_path: Path) -> None:
    good, plain, packed = (tmp_path / name for name in ("RC_2", "RC_1", "RC_3.zst"))
    good.write_bytes(b"\n".join(sound))
    plain.write_bytes(b"")
    packed.write_bytes(zstandard.compress(b""))
    out = small("out", [plain, good, packed])
    assert digest(out) == digest(small("good", [good]))
    assert [(file["n_lines"], file["cut"]) for file in index_of(out)["source"]["files"]] == [
        (0, None),
        (len(sound), None),
        (0, None),
    ]
    refused(str(plain), "no comment", call=lambda: small("nothing", [plain, packed]))


def test_where_parents_are_missing_it_is_said(small: Callable[..., Path]) -> None:
    """Not only another day is named, which helps nobody where all that is replied to is in other dumps."""
    replies = [comment(number, f"t1_p{number}", f"this is what {number} says") for number in range(20)]
    said = ("no sample is left to train on", "20 have no parent in the dumps", "--orphans root")
    refused(*said, call=lambda: small("out", replies))


def test_files_that_are_not_there(small: Callable[..., Path], tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "RC_none.zst", "no such file"),
        (tmp_path / "RC_*.zst", "no such file"),
        (tmp_path, "is a folder"),
    ):
        refused("comments=", str(path), says, call=lambda: small("out", [path]))  # noqa: B023
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_messages_without_text_are_no_errors(sound: list[bytes], small: Callable[..., Path]) -> None:
    bodies = [None, "", "  \n ", "[deleted]", "[removed]", "[deleted by user]"]
    gone = [comment(number, "t3_zz1", body) for number, body in enumerate(bodies)]
    below = comment(50, "t1_c00000", "This answers a message that is gone, so it goes too.")
    out = small("out", [*sound, *gone, below])
    clean = small("sound", sound)
    assert same_samples(out, clean)
    more = more_than(out, clean)
    assert more == {"read": 7, "no text": len(bodies), "no parent in the dumps, or it was removed": 1}
    assert facts_of(out)["n_broken"] == 0


def test_cycles_and_duplicates(sound: list[bytes], small: Callable[..., Path]) -> None:
    text = "A message that nobody has written before, number {}."
    cycle = [comment(n, f"t1_c{(n + 1) % 3:05d}", text.format(n)) for n in range(3)]
    below = [comment(3, "t1_c00000", text.format(3)), comment(4, "t1_c00003", text.format(4))]
    itself = comment(5, "t1_c00005", text.format(5))
    out = small("out", [*sound, *cycle, *below, itself, *sound[:7], sound[-1]])
    clean = small("sound", sound)
    assert same_samples(out, clean)
    assert more_than(out, clean) == {"read": 14, "in or below a cycle": 6, "the same message again": 8}
    assert_adds_up(out)


def test_a_chain_of_5000(small: Callable[..., Path], tmp_path: Path) -> None:
    facts = deep_thread(tmp_path / "dumps", 5000)
    given = {"rules": RedditRules.off(), "max_context": 40, "valid_from": None, "valid_samples": 10_000}
    out = small("out", facts.comments, **given)
    n = sum(len(records(out, split)) for split in ("train", "valid"))
    counts = facts_of(out)["counts"]
    assert n == counts["samples"]
    assert n + counts["its parent is too long for a context"] == 5000 - 1
    assert_adds_up(out)


@pytest.mark.slow
def test_a_thread_of_100_000(small: Callable[..., Path], tmp_path: Path) -> None:
    facts = wide_thread(tmp_path / "dumps", 100_000)
    out = small("out", facts.comments, rules=RedditRules.off(), valid_samples=100_000, valid_from=None)
    counts = facts_of(out)["counts"]
    assert counts["read"] == 100_000
    assert sum(len(records(out, split)) for split in ("train", "valid")) == counts["samples"]
    n_samples = counts["samples"] + counts["its parent is too long for a context"]
    assert n_samples == 100_000 - facts.top_level
    assert_adds_up(out)
