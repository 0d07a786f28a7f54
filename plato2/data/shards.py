"""Prepared corpora on disk: Parquet shards of token ids and the index that vouches for them.

A corpus is a folder (local, or any fsspec address such as `s3://bucket/corpus`) with `index.json` and shards
`<split>-00000.parquet`. A shard has two columns, readable by any Arrow tool: `token_ids` (list of small
unsigned integers: the whole record, context + response) and `context_len`. The index is written last and
holds the size, the counts and the sha256 of every shard. Shards are small (a few MB), so a reader hashes the
bytes it is about to decode: a truncated file or one flipped byte anywhere (also in the Parquet footer, which
page checksums do not cover) is an error that names the file, never a wrong sample. Page checksums are
written anyway, for other tools.
"""

from __future__ import annotations

import hashlib
import io
import json
import reprlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from plato2.bounded import read_file
from plato2.config import LARGEST, UserError, install
from plato2.files import cache_folder, replaced
from plato2.formats import Closed, Count, Open, Sha256, parse

FORMAT = "plato2-shards/1"
INDEX_FILE = "index.json"
INDEX_BYTES = 1 << 26
"""An index of 200,000 shards is smaller."""
DENSEST = 64
"""Token ids that a byte of a shard stands for at most; real ones are one or two."""


@dataclass(frozen=True)
class ShardInfo:
    """What the index knows about one shard file."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.parquet$")]
    samples: Count
    context_tokens: Count
    response_tokens: Count
    sha256: Sha256
    bytes: Count

    @property
    def tokens(self) -> int:
        """All token ids of the shard."""
        return self.context_tokens + self.response_tokens


@dataclass(frozen=True)
class SplitIndex:
    """The shards of one split (`train`, `valid`, `test`) in stored order."""

    shards: tuple[ShardInfo, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples in the split."""
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of token ids in the split, special tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def first_sample_ids(self) -> list[int]:
        """Global sample id of the first row of every shard."""
        ids, total = [], 0
        for shard in self.shards:
            ids.append(total)
            total += shard.samples
        return ids


@dataclass(frozen=True)
class ShardIndex:
    """`index.json`: all that is known about a prepared corpus without opening a shard."""

    tokenizer_sha256: str
    vocab_size: int
    """[MASK], the last id, included: 8001 for 8,000 pieces."""
    max_context: int
    max_response: int
    splits: dict[str, SplitIndex]
    unigram: dict[str, float] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)
    """The options that made the corpus."""
    source: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further top-level keys of index.json; kept, not interpreted."""

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class Samples:
    """Decoded samples without Python objects: sample i is `token_ids[offsets[i]:offsets[i + 1]]`."""

    token_ids: np.ndarray
    """(tokens,) uint16 or uint32, records one after the other."""
    offsets: np.ndarray
    """(n + 1,) int64."""
    context_len: np.ndarray
    """(n,) int64: leading ids of each record that are context; the rest is response."""
    sample_ids: np.ndarray
    """(n,) int64 global sample ids (number of samples in earlier shards of the split + row)."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.context_len)


# ---------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes the samples of one split into shards of `shard_samples` rows, in the order given.

    Args:
        folder: the corpus folder, local or fsspec address; created when missing.
        split: name of the split; files are `<split>-00000.parquet`, ...
        vocab_size: decides between uint16 and uint32 ids; ids outside it are a ValueError.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_samples: int = 16384) -> None:
        """Nothing is written before the first shard is full."""
        self._folder, self._split, self._vocab_size = str(folder), split, vocab_size
        self._shard_samples = shard_samples
        self._records: list[np.ndarray] = []
        self._context_len: list[int] = []
        self._infos: list[ShardInfo] = []

    def write(self, token_ids: Sequence[np.ndarray | list[int]], context_len: Sequence[int]) -> None:
        """Append samples: whole records (context + response) and the length of each context.

        Raises:
            ValueError: an id outside the vocabulary, an empty context or response, unequal list lengths.
        """
        for record, n_context in zip(token_ids, context_len, strict=True):
            ids = np.asarray(record, dtype=np.int64)
            if not 0 < n_context < len(ids):
                raise ValueError(f"context_len {n_context} of a record of {len(ids)} ids")
            self._records.append(ids)
            self._context_len.append(int(n_context))
            if len(self._records) == self._shard_samples:
                self._flush()

    def close(self) -> list[ShardInfo]:
        """Write the last, smaller shard and return what belongs into the index."""
        if self._records:
            self._flush()
        return self._infos

    def _flush(self) -> None:
        lengths = np.array([len(record) for record in self._records], dtype=np.int64)
        samples = Samples(
            np.concatenate(self._records),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.array(self._context_len, dtype=np.int64),
            np.arange(len(lengths)),
        )
        file = f"{self._split}-{len(self._infos):05d}.parquet"
        self._infos.append(write_shard(self._folder, file, samples, self._vocab_size))
        self._records, self._context_len = [], []


def write_shard(folder: str | Path, file: str, samples: Samples, vocab_size: int) -> ShardInfo:
    """Write one shard file, whole or not at all, and return what belongs into the index.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    token_ids = samples.token_ids
    if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        found = f"{token_ids.min()}..{token_ids.max()}"
        raise ValueError(f"token ids must be in [0, {vocab_size}), got {found}")
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    data = _encode(token_ids.astype(dtype), samples.offsets, samples.context_len.astype(np.uint16))
    n_context = int(samples.context_len.sum())
    info = ShardInfo(
        file=file,
        samples=len(samples),
        context_tokens=n_context,
        response_tokens=len(token_ids) - n_context,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
    )
    _write_bytes(_join(str(folder), file), data)
    return info


def _encode(token_ids: np.ndarray, offsets: np.ndarray, context_len: np.ndarray) -> bytes:
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(token_ids))
    table = pa.table({"token_ids": column, "context_len": pa.array(context_len)})
    sink = io.BytesIO()
    # One row group: a shard is read whole. A dictionary of token ids costs time and saves nothing after zstd.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=max(len(context_len), 1),
    )
    return sink.getvalue()


def write_index(folder: str | Path, index: ShardIndex) -> None:
    """Write `index.json`, last and atomically: a folder with an index is complete."""
    document = {
        "format": FORMAT,
        "tokenizer": {"sha256": index.tokenizer_sha256, "vocab_size": index.vocab_size},
        "max_context": index.max_context,
        "max_response": index.max_response,
        "splits": {
            name: {"shards": [vars(shard) for shard in split.shards]} for name, split in index.splits.items()
        },
        "unigram": index.unigram,
        "prepare": index.prepare,
        "source": index.source,
        **index.extra,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    _write_bytes(_join(str(folder), INDEX_FILE), text.encode())


def _write_bytes(path: str, data: bytes) -> None:
    """Write a whole file; on a local disk under a temporary name first, so that it is never incomplete."""
    fs, inner = _open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    Path(inner).parent.mkdir(parents=True, exist_ok=True)
    with replaced(Path(inner), f".{uuid.uuid4().hex}.part") as new:
        new.write_bytes(data)


# ---------------------------------------------------------------------------------------------- reading


def has_index(folder: str | Path) -> bool:
    """Whether the folder holds a finished corpus."""
    fs, inner = _open_fs(_join(str(folder), INDEX_FILE))
    return bool(fs.exists(inner))


def read_index(folder: str | Path, option: str = "") -> ShardIndex:
    """Read `index.json` of a corpus folder (local path or fsspec address).

    Args:
        folder: the corpus.
        option: what is typed before the folder where it was asked for, such as `--data ` or `data.path=`.

    Raises:
        UserError: no index, not JSON, not an index of this format or version, or a key is missing.
    """
    path = _join(str(folder), INDEX_FILE)
    cure = "prepare the corpus (`plato2 prepare`) or correct the path"
    data = _read_bytes(path, INDEX_BYTES, f"{option}{folder}: no prepared corpus there; {cure}")
    name = f"{path}: damaged index"
    value = parse(dict[str, Any] | list[Any], data, name, cure)  # type: ignore[arg-type]
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format is {reprlib.repr(found)}, this version reads {FORMAT!r}; {cure}")
    document = parse(_Document, data, name, cure)
    for split in document.splits.values():
        for shard in split.shards:
            if shard.tokens > DENSEST * shard.bytes or shard.samples > shard.tokens:
                raise UserError(
                    f"{name}: {shard.file} cannot hold {shard.samples} samples of {shard.tokens} ids in "
                    f"{shard.bytes} bytes; {cure}"
                )
    return ShardIndex(
        tokenizer_sha256=document.tokenizer.sha256,
        vocab_size=document.tokenizer.vocab_size,
        max_context=document.max_context,
        max_response=document.max_response,
        splits={name: SplitIndex(tuple(split.shards)) for name, split in document.splits.items()},
        unigram=document.unigram,
        prepare=document.prepare,
        source=document.source,
        extra=dict(document.model_extra or {}),
    )


class _Split(Closed):
    shards: list[ShardInfo]


class _TokenizerEntry(Closed):
    sha256: Sha256
    vocab_size: Annotated[int, Field(ge=4, le=LARGEST["vocab_size"])]


class _Document(Open):
    """`index.json` as it is written."""

    format: str
    tokenizer: _TokenizerEntry
    max_context: Annotated[int, Field(ge=3, le=65535)]
    max_response: Annotated[int, Field(ge=3, le=65535)]
    splits: dict[str, _Split]
    unigram: dict[str, float] = Field(default_factory=dict)
    prepare: dict[str, Any] = Field(default_factory=dict)
    source: dict[str, Any] = Field(default_factory=dict)


def read_shard(
    folder: str | Path, info: ShardInfo, first_sample_id: int = 0, cache_dir: str | Path | None = None
) -> Samples:
    """Decode one shard; a remote one comes from the local cache, which is filled first.

    Args:
        folder: the corpus folder, local or fsspec address.
        info: the shard's entry in the index.
        first_sample_id: global sample id of its first row.
        cache_dir: where copies of remote shards are kept; that of `cache_folder` when not given.

    Raises:
        UserError: the file is missing, has another size or other bytes than the index says, or other counts.
    """
    path = _join(str(folder), info.file)
    data = _shard_bytes(path, info, cache_dir)
    other_run = "shard and index are of different runs of `plato2 prepare`: prepare the corpus again"
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if file.metadata.num_rows != info.samples:
            raise UserError(
                f"{path}: holds {file.metadata.num_rows} samples, the index says {info.samples}; {other_run}"
            )
        table = file.read(use_threads=False).combine_chunks()
        table.validate(full=True)
        ids = table.column("token_ids").combine_chunks()
        if ids.null_count or ids.values.null_count or ids.values.type not in (pa.uint16(), pa.uint32()):
            raise ValueError(f"ids of type {ids.type}")
        token_ids = ids.values.to_numpy(zero_copy_only=True)
        offsets = ids.offsets.to_numpy().astype(np.int64)
        context_len = table.column("context_len").to_numpy().astype(np.int64)
        if (context_len < 1).any() or (context_len >= np.diff(offsets)).any():
            raise ValueError("a sample without context or response")
    except (
        pa.ArrowException,
        OSError,
        MemoryError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a plato2 shard ({reason}); prepare the corpus again") from None
    counts = (len(context_len), int(context_len.sum()), len(token_ids) - int(context_len.sum()))
    expected = (info.samples, info.context_tokens, info.response_tokens)
    if counts != expected:
        raise UserError(
            f"{path}: holds (samples, context tokens, response tokens) {counts}, the index says {expected}; "
            + other_run
        )
    sample_ids = np.arange(first_sample_id, first_sample_id + len(context_len), dtype=np.int64)
    return Samples(token_ids, offsets, context_len, sample_ids)


def _shard_bytes(path: str, info: ShardInfo, cache_dir: str | Path | None) -> bytes:
    """The bytes of a shard, proven to be those the index speaks of."""
    cure = "restore the file or prepare the corpus again (`plato2 prepare`)"
    missing = f"{path}: shard is missing; {cure}"
    fs, _ = _open_fs(path)
    if isinstance(fs, LocalFileSystem):
        data = _read_bytes(path, info.bytes + 1, missing)
        _check(path, data, info, cure)
        return data
    # The name is the content's hash: corpora share the cache and a stale copy cannot be taken for a new one.
    root = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    copy = root / "shards" / f"{info.sha256}.parquet"
    if copy.exists():
        data = read_file(copy, info.bytes + 1, f"remove {copy}")
        if hashlib.sha256(data).hexdigest() == info.sha256:
            return data  # a damaged copy is downloaded again
    data = _read_bytes(path, info.bytes + 1, missing)
    _check(path, data, info, cure)
    try:
        _write_bytes(str(copy), data)
    except OSError as error:
        raise UserError(
            f"{copy}: cannot write the copy of {path} ({error.strerror}); "
            "free some space or set data.cache_dir to another disk"
        ) from None
    return data


def _check(path: str, data: bytes, info: ShardInfo, cure: str) -> None:
    if len(data) != info.bytes:
        raise UserError(f"{path}: {len(data)} bytes, the index says {info.bytes} (truncated?); {cure}")
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise UserError(f"{path}: its bytes are not those in the index (sha256 differs: damaged); {cure}")


def _read_bytes(path: str, most: int, missing: str) -> bytes:
    """A whole file of at most `most` bytes."""
    cure = "prepare the corpus again"
    fs, inner = _open_fs(path)
    try:
        if isinstance(fs, LocalFileSystem):
            return read_file(inner, most, cure)
        if (fs.size(inner) or 0) > most:
            raise UserError(f"{path}: larger than {most:,} bytes, too large for such a file; {cure}")
        return bytes(fs.cat_file(inner))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing) from None
    except Exception as error:  # remote file systems raise their own kinds: credentials, time-outs, ...
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); check access rights and connection"
        ) from None


def _open_fs(path: str) -> tuple[Any, str]:
    """The file system of a path; not kept between calls, because fsspec makes a new one after a fork."""
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(path.partition("://")[0])
        raise UserError(f"{path}: {error}{f'; {install(extra)}' if extra else ''}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; use a local path or s3://, gs://, ...") from None
    return fs, inner


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
