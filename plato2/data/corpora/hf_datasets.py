"""Hugging Face `datasets`: a folder written by `save_to_disk`, or Parquet and Arrow files.

The rows are read straight from the Arrow files, a batch at a time; the package `datasets` is not needed.
The dialogue is a column of texts (`["hi !", "hello ."]`), or of messages with the keys `role`/`content`,
`from`/`value` or `speaker`/`text`; a message of the role `system` becomes persona. A folder of several splits
must be named with the split (`FOLDER/train`), so that a test split is never trained on by accident.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from plato2.config import UserError
from plato2.data.corpora import ReadReport, expand, open_binary
from plato2.data.corpora.jsonl import parse_turns
from plato2.data.samples import Dialogue

COLUMNS = ("dialog", "dialogue", "turns", "messages", "conversation", "conversations", "utterances")


def read(files: Sequence[str], report: ReadReport, column: str | None = None) -> Iterator[Dialogue]:
    """Yield one dialogue for each row.

    Args:
        files: `save_to_disk` folders, Parquet files or Arrow files.
        report: counts rows of another form.
        column: the column with the turns; else the first of COLUMNS there is.
    """
    for file in (data for path in expand(files) for data in _data_files(path)):
        row = 0
        for batch in _batches(file):
            name = _turns_column(batch.schema.names, column, file)
            for value in batch.column(name).to_pylist():
                row += 1
                try:
                    yield parse(value)
                except ValueError as error:
                    report.broken(file, row, f"column {name}: {error}")


def parse(value: Any) -> Dialogue:
    """A dialogue from the value of one row.

    Raises:
        ValueError: it has another form.
    """
    if isinstance(value, dict):  # a sequence of records is stored as a record of sequences
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError("not a list of turns")
    return parse_turns(value)


def _turns_column(names: list[str], column: str | None, file: str) -> str:
    if column is not None:
        if column not in names:
            raise UserError(f"reader.column={column!r}: {file} has the columns {', '.join(names)}")
        return column
    for name in COLUMNS:
        if name in names:
            return name
    raise UserError(
        f"{file} has the columns {', '.join(names)}: name the one with the turns in reader.column"
    )


def _data_files(path: str) -> list[str]:
    """The Arrow files of a `save_to_disk` folder, in order; a file stands for itself."""
    import fsspec

    filesystem, local = fsspec.core.url_to_fs(path)
    if not filesystem.isdir(local):
        return [path]
    if filesystem.exists(f"{local}/dataset_dict.json"):
        splits = json.loads(filesystem.cat_file(f"{local}/dataset_dict.json"))["splits"]
        if len(splits) != 1:
            raise UserError(
                f"{path} holds the splits {', '.join(splits)}: name one, such as {path}/{splits[0]}"
            )
        return _data_files(f"{path}/{splits[0]}")
    if not filesystem.exists(f"{local}/state.json"):
        raise UserError(f"{path} was not written by datasets' save_to_disk: name its Parquet or Arrow files")
    state = json.loads(filesystem.cat_file(f"{local}/state.json"))
    return [f"{path}/{part['filename']}" for part in state["_data_files"]]


def _batches(file: str) -> Iterator[pa.RecordBatch]:
    try:
        with open_binary(file) as stream:
            if PurePosixPath(file).suffix == ".arrow":
                yield from pa.ipc.open_stream(stream)
            else:
                yield from pq.ParquetFile(stream).iter_batches(batch_size=1024)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a readable Parquet or Arrow file ({error}); get it again") from error
