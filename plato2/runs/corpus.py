"""The corpus of a run, prepared before training where it is not there yet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from plato2.config import UserError, expand_path, in_typed_words
from plato2.data.shards import has_index, read_index
from plato2.files import is_being_written

PATIENCE_S = 120.0
"""Seconds that a process waits for a corpus that nobody is preparing: the first process may start later."""


class CorpusOfRun:
    """Where the shards are, and how to make them where there are none.

    Args:
        path: `data.path`, the folder of the prepared corpus, local or an fsspec address.
        prepare: `data.prepare`, options of `plato2 prepare` (without `out`); None = it must be there.
    """

    def __init__(self, path: str, prepare: dict[str, Any] | None) -> None:
        self.path, self.prepare = expand_path(path, "data.path"), prepare

    @property
    def exists(self) -> bool:
        """Whether `path` holds a prepared corpus."""
        return has_index(self.path)

    @property
    def will_be_made(self) -> bool:
        """Whether `make` has to prepare it, so that nothing is known of it yet."""
        return self.prepare is not None and (bool(self.prepare.get("force")) or not self.exists)

    def make_or_wait(self) -> None:
        """Prepares it before the ranks know each other: the first does it, others started beside it wait.

        Raises:
            UserError: the first one failed, or does not begin.
        """
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or "0"
        if rank == "0":
            self.make()
        if self.prepare is None:
            return
        seen = time.monotonic()
        while not self.exists:
            if is_being_written(Path(self.path)):
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE_S:
                raise UserError(
                    f"data.path={self.path}: no corpus there, and for {PATIENCE_S:g} s no process has been "
                    "preparing one; the first process (rank 0) says why it failed or does not run"
                )
            time.sleep(1.0)

    def make(self) -> None:
        """Prepares it when there is none and `prepare` says how; otherwise reuses it and says so.

        Raises:
            UserError: options that cannot be, or a corpus there that was made with others.
        """
        if self.prepare is None:
            return
        # slow to import, rarely needed
        from plato2.prepare.dialogues import PrepareOptions, prepare, summary

        try:
            options = PrepareOptions.from_dict({**self.prepare, "out": self.path})
            if self.will_be_made:
                print("\n".join(summary(prepare(options))))
                return
        except UserError as error:
            keys = [field.name for field in fields(PrepareOptions)] + ["reader.", "clean."]
            typed = {key: f"data.prepare.{key}" for key in keys} | {"out": "data.path"}
            raise UserError(in_typed_words(str(error), typed)) from error
        index = read_index(self.path)
        self._check_options(index.prepare, asdict(options))
        samples = ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items())
        print(f"data: reusing {self.path} ({samples} samples)")

    def _check_options(self, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(asked, default=str))
        differing = [
            f"data.prepare.{key} is {stored[key]!r}, asked for {wanted[key]!r}"
            for key in sorted(stored.keys() & wanted.keys())
            if stored[key] != wanted[key]
        ]
        if differing:
            raise UserError(
                f"{self.path} was prepared with other options: {'; '.join(differing)}; "
                "use another data.path, or correct data.prepare, or prepare it again with `plato2 prepare`"
            )
