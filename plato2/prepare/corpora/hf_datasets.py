"""Hugging Face `datasets`: a folder written by `save_to_disk`, or Parquet and Arrow files.

The rows are read straight from the Arrow files, a batch at a time; the package `datasets` is not needed.
The dialogue is a column of texts (`["hi !", "hello ."]`), or of messages with the keys `role`/`content`,
`from`/`value` or `speaker`/`text`; a message of the role `system` becomes persona. A folder of several splits
must be named with the split (`FOLDER/train`), so that a test split is never trained on by accident.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from plato2.config import UserError
from plato2.data.samples import Dialogue
from plato2.formats import JSON_BYTES, Open, Schema
from plato2.formats import parse as parse_json
from plato2.prepare.corpora import ReadReport, endings, expand, open_binary, readable
from plato2.prepare.corpora.jsonl import parse_turns

COLUMNS = ("dialog", "dialogue", "turns", "messages", "conversation", "conversations", "utterances")
_ROWS = 1024


def read(files: Sequence[str], report: ReadReport, column: str | None = None) -> Iterator[Dialogue]:
    """Yield one dialogue for each row.

    Args:
        files: `save_to_disk` folders, Parquet files or Arrow files.
        report: counts rows of another form.
        column: the column with the turns; else the first of COLUMNS there is.
    """
    for file in (data for path in expand(files) for data in _data_files(path)):
        for row, value in enumerate(_values(file, column), start=1):
            try:
                yield parse(value)
            except ValueError as error:
                report.broken(file, row, str(error))


def parse(value: Any) -> Dialogue:
    """A dialogue from the value of one row.

    Raises:
        ValueError: it has another form.
    """
    if isinstance(value, dict):  # a sequence of records is stored as a record of sequences
        if not all(isinstance(cells, list) for cells in value.values()):
            raise ValueError("not a list of turns")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError("not a list of turns")
    return parse_turns(value)


def _turns_column(schema: pa.Schema, column: str | None, file: str) -> str:
    names = schema.names
    shown = " ".join(", ".join(names[:20]).split())[:500]
    if column is not None and column not in names:
        raise UserError(f"reader.column={column!r}: {file} has the columns {shown}")
    for name in COLUMNS if column is None else [column]:
        if names.count(name) == 1:
            if not _takes_space(kind := schema.field(name).type):
                raise UserError(f"{file}: column {name} is of type {kind!s:.100}, not of lists of texts")
            return name
    raise UserError(f"{file} has the columns {shown}: name the one with the turns in reader.column")


def _takes_space(kind: pa.DataType) -> bool:
    """Whether each value takes bytes of the file: a million nulls, or repeats of one text, need not."""
    if pa.types.is_struct(kind):
        return all(_takes_space(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _takes_space(kind.value_type)
    return pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _data_files(path: str) -> list[str]:
    """The Arrow files of a `save_to_disk` folder, in order; a file stands for itself."""
    import fsspec

    filesystem, local = fsspec.core.url_to_fs(path)
    if not filesystem.isdir(local):
        return [path]
    if filesystem.exists(f"{local}/dataset_dict.json"):
        splits = _record(DatasetDict, f"{path}/dataset_dict.json").splits
        if len(splits) != 1:
            raise UserError(
                f"{path} holds the splits {', '.join(splits)}: name one, such as {path}/{splits[0]}"
            )
        return _data_files(f"{path}/{splits[0]}")
    if not filesystem.exists(f"{local}/state.json"):
        raise UserError(f"{path} was not written by datasets' save_to_disk: name its Parquet or Arrow files")
    return [f"{path}/{part.filename}" for part in _record(State, f"{path}/state.json").data_files]


Name = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
"""Of a file or folder in the same folder."""


class DatasetDict(Open):
    """`dataset_dict.json` of a folder of splits."""

    splits: Annotated[list[Name], Field(min_length=1)]


class _DataFile(Open):
    filename: Name


class State(Open):
    """`state.json` beside the Arrow files."""

    data_files: Annotated[list[_DataFile], Field(alias="_data_files")]


def _record(schema: type[Schema], file: str) -> Schema:
    with readable(file) as stream:
        data = stream.read(JSON_BYTES)
    return parse_json(schema, data, file, "get the folder again")


def _values(file: str, column: str | None) -> Iterator[Any]:
    """The dialogues of a file as they are stored, some rows at a time."""
    try:
        with open_binary(file) as stream:
            for batch in _batches(stream, file, column):
                batch.validate(full=True)  # a flipped bit may point out of memory
                for start in range(0, len(batch), _ROWS):
                    yield from batch.column(0).slice(start, _ROWS).to_pylist()
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} is not a readable Parquet or Arrow file ({reason}); get it again") from error


def _batches(stream: IO[bytes], file: str, column: str | None) -> Iterator[pa.RecordBatch]:
    """Batches of the one column with the turns."""
    if endings(file)[-1:] == [".arrow"]:
        batches = pa.ipc.open_stream(stream)
        name = _turns_column(batches.schema, column, file)
        yield from (batch.select([name]) for batch in batches)
    else:
        parquet = pq.ParquetFile(stream)
        name = _turns_column(parquet.schema_arrow, column, file)
        yield from parquet.iter_batches(batch_size=_ROWS, columns=[name])
