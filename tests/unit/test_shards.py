"""Shards keep what was written, and nothing damaged gets through."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import records, write_corpus

from plato2.config import UserError
from plato2.data.shards import ShardWriter, has_index, read_index, read_shard


@given(st.integers(1, 60), st.integers(1, 25), st.sampled_from([300, 8001, 70000]))
@settings(deadline=None, max_examples=25)
def test_what_is_written_is_read(n: int, shard_samples: int, vocab_size: int) -> None:
    rng = np.random.default_rng(n)
    made = [rng.integers(0, vocab_size, rng.integers(2, 50)).tolist() for _ in range(n)]
    context_len = [int(rng.integers(1, len(record))) for record in made]
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(folder, "train", vocab_size, shard_samples)
        half = n // 2
        writer.write(made[:half], context_len[:half])
        writer.write([np.array(record) for record in made[half:]], context_len[half:])
        infos = writer.close()
        assert [info.samples for info in infos[:-1]] == [shard_samples] * (len(infos) - 1)
        read, first = [], 0
        for info in infos:
            samples = read_shard(folder, info, first)
            assert samples.sample_ids.tolist() == list(range(first, first + info.samples))
            assert samples.context_len.sum() == info.context_tokens
            assert samples.token_ids.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
            read += [ids.tolist() for ids in np.split(samples.token_ids, samples.offsets[1:-1])]
            first += info.samples
            assert context_len[first - info.samples : first] == samples.context_len.tolist()
        assert read == made


def test_any_arrow_tool_reads_a_shard(tmp_path: Path) -> None:
    made, context_len = records(20)
    writer = ShardWriter(tmp_path, "train", 8001)
    writer.write(made, context_len)
    info = writer.close()[0]
    table = pq.read_table(tmp_path / info.file, page_checksum_verification=True)
    assert table.column_names == ["token_ids", "context_len"]
    assert str(table.schema.field("token_ids").type.value_type) == "uint16"
    assert table.to_pydict() == {"token_ids": made, "context_len": context_len}
    assert info.bytes == (tmp_path / info.file).stat().st_size


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_corpus(tmp_path / name, 30, shard_samples=8) for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("record", "context_len"), [([1, 5, 2], 0), ([1, 5, 2], 3), ([1, 8001], 1), ([1, -1], 1)]
)
def test_impossible_records_are_refused(tmp_path: Path, record: list[int], context_len: int) -> None:
    writer = ShardWriter(tmp_path, "train", 8001, shard_samples=1)
    with pytest.raises(ValueError, match=r"context_len|token ids"):
        writer.write([record], [context_len])
    assert not list(tmp_path.iterdir())


def test_index_round_trip_keeps_unknown_keys(tmp_path: Path) -> None:
    index = write_corpus(
        tmp_path, 5, unigram={"ppl": 594.0}, prepare={"policy": "split"}, extra={"facts": {"a": [1]}}
    )
    assert index.unigram == {"ppl": 594.0}
    assert index.prepare == {"policy": "split"}
    assert index.extra == {"facts": {"a": [1]}}
    assert index.mask_id == 8000
    assert index.splits["train"].samples == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        "train-00000.parquet",
        "valid-00000.parquet",
    ]


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "no prepared corpus"),
        (lambda f: (f / "index.json").write_text('{"format": '), "not valid JSON"),
        (lambda f: (f / "index.json").write_bytes(b"\xff\xfe{}"), "not valid JSON"),
        (lambda f: (f / "index.json").write_text("[]"), "format is None"),
        (lambda f: _edit_index(f, format="plato2-shards/9"), "plato2-shards/9"),
        (lambda f: _edit_index(f, splits={"train": {"shards": [{"file": "x"}]}}), "damaged index"),
        (lambda f: _edit_index(f, splits=3), "damaged index"),
        (lambda f: _edit_index(f, tokenizer=None), "damaged index"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, damage: object, message: str) -> None:
    write_corpus(tmp_path, 5)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        read_index(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "plato2 prepare" in str(error.value)


def test_missing_and_truncated_shards_are_named(tmp_path: Path) -> None:
    info = write_corpus(tmp_path, 40).splits["train"].shards[0]
    path = tmp_path / info.file
    data = path.read_bytes()
    for n_bytes in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(UserError, match=r"train-00000\.parquet.*truncated.*restore the file"):
            read_shard(tmp_path, info)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: shard is missing; restore the file"):
        read_shard(tmp_path, info)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    info = write_corpus(tmp_path, 12).splits["train"].shards[0]
    path = tmp_path / info.file
    data = path.read_bytes()
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-00000\.parquet.*damaged"):
            read_shard(tmp_path, info)


def test_index_and_shard_of_different_runs(tmp_path: Path) -> None:
    info = write_corpus(tmp_path, 12).splits["train"].shards[0]
    with pytest.raises(UserError, match=r"train-00000\.parquet.*the index says.*prepare the corpus again"):
        read_shard(tmp_path, dataclasses.replace(info, samples=13))


def test_remote_shards_come_from_a_checked_cache(tmp_path: Path) -> None:
    folder = "memory://corpora/remote"
    assert not has_index(folder)
    index = write_corpus(folder, 30, shard_samples=16)
    assert has_index(folder)
    info = index.splits["train"].shards[1]
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:  # they all find an empty cache
        found = list(pool.map(lambda _: read_shard(folder, info, 16, cache), range(16)))
    assert all(np.array_equal(found[0].token_ids, samples.token_ids) for samples in found)
    copies = [path for path in cache.rglob("*") if path.is_file()]
    assert [path.name for path in copies] == [f"{info.sha256}.parquet"]

    copies[0].write_bytes(b"damaged")  # found out and mended
    assert np.array_equal(read_shard(folder, info, 16, cache).token_ids, found[0].token_ids)
    fs = fsspec.filesystem("memory")
    fs.rm(f"/corpora/remote/{info.file}")  # and now the copy is enough
    assert read_shard(folder, info, 16, cache).sample_ids[0] == 16
    with pytest.raises(UserError, match=r"memory://corpora/remote/train-00001\.parquet: shard is missing"):
        read_shard(folder, info, 16, tmp_path / "other")


def test_a_damaged_download_is_not_kept(tmp_path: Path) -> None:
    folder = "memory://corpora/damaged"
    info = write_corpus(folder, 30).splits["train"].shards[0]
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/corpora/damaged/{info.file}", fs.cat_file(f"/corpora/damaged/{info.file}")[:-1] + b"?")
    with pytest.raises(UserError, match=r"memory://corpora/damaged/train-00000\.parquet.*damaged"):
        read_shard(folder, info, 0, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = "memory://corpora/nocache"
    info = write_corpus(folder, 3).splits["train"].shards[0]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/shards.*data\.cache_dir"):
        read_shard(folder, info, 0, tmp_path / "file")


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed here")
def test_a_missing_remote_file_system_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install '\.\[s3\]'"):
        read_index("s3://bucket/corpus")
    with pytest.raises(UserError, match="nothing://corpus"):
        read_index("nothing://corpus")
