"""The engine on one machine: processes of our own and DuckDB in this one; pip alone, no Java.

One process reads and decompresses the dumps and hands out blocks of lines, so that a single monthly file
keeps all processors busy. DuckDB counts the repeated messages and sorts the nodes by shard; what does not fit
into its memory goes to disk.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from plato2.config import UserError, install
from plato2.prepare.reddit.dumps import Block, Dump, DumpReader
from plato2.prepare.reddit.node_parts import (
    Advance,
    NodeJob,
    NodeWriter,
    SampledText,
    SampleJob,
    finish_dump,
    sample_dump,
)
from plato2.prepare.reddit.processes import Processes
from plato2.prepare.reddit.shard_parts import ShardJob, group_by_shard, write_samples
from plato2.prepare.reddit.work import write_part

if TYPE_CHECKING:
    import duckdb

_ROWS = 65_536
_SPILLED = "duckdb"


class LocalEngine:
    """Runs the stages in `workers` processes.

    Args:
        work: the folder of the run; DuckDB's temporary files go there.
        workers: processes beside this one; 1: all in this one.
        memory: what DuckDB may take before it writes to disk, such as `1GB`.

    Raises:
        UserError: DuckDB is not installed, or `memory` is no size.
    """

    name = "local"

    def __init__(self, work: Path, workers: int, memory: str) -> None:
        """Check that DuckDB is there and takes the settings."""
        try:
            import duckdb
        except ImportError:
            raise UserError(f"the local engine needs DuckDB: {install('reddit')}") from None
        self._work, self._workers, self._memory = work, workers, memory
        self.settings = {"engine": self.name, "workers": workers, "memory": memory}
        self.versions = {"duckdb": duckdb.__version__}
        shutil.rmtree(work / _SPILLED, ignore_errors=True)  # of a run that was killed
        self._connect().close()

    def sample(self, job: SampleJob, dumps: list[Dump], advance: Advance) -> Iterator[list[SampledText]]:
        """The sampled messages of every dump."""
        with Processes(self._workers, _as_is, job) as processes:
            for dump, texts in zip(dumps, processes.each(sample_dump, dumps), strict=True):
                advance(dump.size)
                yield texts

    def make_nodes(self, job: NodeJob, dumps: list[Dump], advance: Advance) -> None:
        """Stage 1: the parts of these dumps."""
        with Processes(self._workers, NodeWriter, job) as processes:
            for dump in dumps:
                reader = DumpReader(dump, job.on_broken, job.block_bytes)
                for _ in processes.each(_write_block, _unwritten(job, dump, reader, advance)):
                    pass
                finish_dump(job, dump, reader)

    def find_repeated(self, parts: list[Path], max_repeats: int, out: Path) -> None:
        """Stage 2: the `text_key`s of messages that occur more often; a comment there twice is one."""
        with self._connection() as connection:
            names = {"parts": [str(part) for part in parts]}
            keys = connection.sql(
                """
                WITH often AS (SELECT text_key FROM read_parquet($parts) GROUP BY 1 HAVING count(*) > $most)
                SELECT text_key FROM read_parquet($parts) AS nodes SEMI JOIN often USING (text_key)
                GROUP BY 1 HAVING count(DISTINCT id) > $most ORDER BY 1
                """,
                params=names | {"most": max_repeats},
            ).to_arrow_table()
            connection.register("repeated", keys)
            months = connection.sql(
                """
                SELECT month, count(*) FROM read_parquet($parts) AS nodes SEMI JOIN repeated USING (text_key)
                GROUP BY 1 ORDER BY 1
                """,
                params=names,
            ).fetchall()
        write_part(out, keys, {"months": json.dumps(months).encode()})

    def build_shards(
        self,
        job: ShardJob,
        parts: list[Path],
        repeated: Path | None,
        n_shards: int,
        missing: list[int],
        advance: Advance,
    ) -> None:
        """Stage 3: the samples of the shards in `missing`."""
        with Processes(self._workers, _as_is, job) as processes, self._connection() as connection:
            connection.register("missing", pa.table({"shard": pa.array(missing, pa.int64())}))
            values: dict[str, Any] = {"parts": [str(part) for part in parts], "n": n_shards}
            if repeated is not None:
                values["repeated"] = str(repeated)
            anti_join = "ANTI JOIN read_parquet($repeated) AS repeated USING (text_key)" if repeated else ""
            batches = connection.sql(
                f"""
                SELECT shard_key % $n AS shard, id, parent, time, month, community, nodes.text_key, token_ids
                FROM read_parquet($parts) AS nodes {anti_join}
                WHERE shard_key % $n IN (SELECT shard FROM missing) ORDER BY shard
                """,
                params=values,
            ).to_arrow_reader(_ROWS)
            for n_nodes in processes.each(_write_shard, group_by_shard(batches, batches.schema, missing)):
                advance(n_nodes)

    @contextmanager
    def _connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A database in this process; its errors become the user's."""
        import duckdb

        connection = self._connect()
        try:
            yield connection
        except (duckdb.Error, OSError, RuntimeError) as error:
            # Ctrl-C in the middle of a query, or while DuckDB asks Python for rows, whose exception it wraps.
            if "Query interrupted" in str(error) or "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from error
            # An OSError with a number is a worker's; without one it is DuckDB's, through Arrow's reader.
            if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno):
                raise
            raise self._failure(str(error)) from error
        finally:
            connection.close()

    def _failure(self, message: str) -> Exception:
        """What DuckDB's message means to the user."""
        line = message.partition("\n")[0]
        # The limit of the temporary files is DuckDB's own: most of what is free on the disk.
        if any(sign in message for sign in ("No space left", "quota", "max_temp_directory_size")):
            return OSError(errno.ENOSPC, line, str(self._work))
        if "out of memory" in line.lower():
            return UserError(
                f"memory={self._memory}: too little for DuckDB ({line}); give it more with --memory, or take "
                "fewer --workers"
            )
        return UserError(f"DuckDB failed: {line}")

    def _connect(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        connection = duckdb.connect()
        try:
            if self._memory.lstrip().startswith("-"):  # to DuckDB: no limit
                raise duckdb.Error("it is negative")
            connection.execute("SET memory_limit = $1", [self._memory])
        except duckdb.Error as error:
            raise UserError(
                f"memory={self._memory!r}: not a size such as 1GB ({str(error).partition(chr(10))[0]})"
            ) from None
        connection.execute("SET threads = $1", [self._workers])
        connection.execute("SET temp_directory = $1", [str(self._work / _SPILLED)])
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET enable_progress_bar = false")  # it writes to stdout, where --json is
        return connection


def _as_is(job: Any) -> Any:
    """The state of processes that need nothing but the job."""
    return job


def _unwritten(
    job: NodeJob, dump: Dump, reader: DumpReader, advance: Advance
) -> Iterator[tuple[Dump, Block]]:
    """The blocks of a dump that have no part yet."""
    n_read = 0
    for block in reader.blocks():
        advance(reader.bytes_read - n_read)
        n_read = reader.bytes_read
        if not job.is_written(dump, block):
            yield dump, block
    advance(reader.bytes_read - n_read)


def _write_block(writer: NodeWriter, item: tuple[Dump, Block]) -> None:
    writer.write(*item)


def _write_shard(job: ShardJob, item: tuple[int, pa.Table]) -> int:
    number, nodes = item
    write_samples(job, number, nodes)
    return len(nodes)
