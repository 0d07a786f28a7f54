"""Corpus readers: one file per format, each a generator of `Dialogue` objects.

A reader is a module in this folder (or anywhere: give its dotted name) with one function:

    def read(files: Sequence[str], report: ReadReport, ...) -> Iterator[Dialogue]

`files` are the user's paths or globs, local or remote (empty for a corpus that comes from a package).
Further keyword arguments with defaults are the reader's own options; where the default is true or false, the
command line's `true`, `false`, `on` and `off` are understood. A record that cannot be used is handed
to `report.broken(...)`, which counts it and stops in strict mode. `plato2 prepare` reads a corpus two or
three times, so a reader must yield the same dialogues in the same order each time.
To add a corpus, add one such file; its name is the name on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from plato2.config import UserError, did_you_mean
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.reading import (
    ReadReport,
    endings,
    expand,
    in_folders,
    json_value,
    open_binary,
    read_dialogues,
    read_json,
    read_lines,
    read_records,
    readable,
)

__all__ = [
    "ReadReport",
    "corpus_names",
    "endings",
    "expand",
    "in_folders",
    "json_value",
    "merge_speakers",
    "open_binary",
    "parse_time",
    "read_corpus",
    "read_dialogues",
    "read_json",
    "read_lines",
    "read_records",
    "readable",
]

_LATEST_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
_FLAGS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def corpus_names() -> list[str]:
    """The readers that come with plato2."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def read_corpus(
    corpus: str, files: Sequence[str], report: ReadReport, options: Mapping[str, Any] | None = None
) -> Iterator[Dialogue]:
    """Dialogues of a corpus by the reader's name, or by the dotted name of a module with a `read` function.

    Raises:
        UserError: no such reader or option, no such file, or a broken record in strict mode.
    """
    names = corpus_names()
    if corpus not in names and ("/" in corpus or Path(corpus).exists()):
        raise UserError(
            f"corpus={corpus!r} is a path: name the reader before it, such as jsonl {corpus}; there are "
            f"{', '.join(names)}"
        )
    if corpus not in names and "." not in corpus:
        near = did_you_mean(corpus, names)
        all_names = f"there are {', '.join(names)}"
        raise UserError(
            f"corpus={corpus!r} is not known; {near if near != all_names else 'choose another one'} "
            f"({all_names}, or a module with a read function by its dotted name)"
        )
    module_name = f"{__name__}.{corpus}" if corpus in names else corpus
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"corpus={corpus!r} cannot be imported: {error}") from error
    if not hasattr(module, "read"):
        raise UserError(f"corpus={corpus!r}: the module has no function read(files, report)")
    files = [files] if isinstance(files, str) else files
    known = dict(list(inspect.signature(module.read).parameters.items())[2:])
    values = dict(options or {})
    for option, value in values.items():
        if option not in known:
            cure = f"({', '.join(known)}); {did_you_mean(option, known)}" if known else "(it has none)"
            raise UserError(f"reader.{option}: {corpus} has no such option {cure}")
        if isinstance(known[option].default, bool):
            values[option] = _flag(option, value)
    return cast(Iterator[Dialogue], module.read(list(files), report, **values))


def _flag(option: str, value: object) -> bool:
    """True or false of an option that the command line gives as text."""
    if isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    if not isinstance(value, bool):
        raise UserError(f"reader.{option}={value}: must be true or false")
    return value


def merge_speakers(turns: Iterable[Turn]) -> list[Turn]:
    """Join consecutive turns of one speaker; turns without a speaker stay as they are."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and turn.speaker is not None and merged[-1].speaker == turn.speaker:
            merged[-1].text += " " + turn.text
            merged[-1].knowledge += turn.knowledge
            merged[-1].n_joined += 1
        else:
            merged.append(turn)
    return merged


def parse_time(value: object) -> float | None:
    """Seconds since 1970 from a number or an ISO 8601 text (UTC when it names no zone).

    Raises:
        ValueError: neither, or no date (such as milliseconds).
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"time {value!r} is neither a number nor an ISO 8601 text")
    if isinstance(value, int | float):
        if not 0 <= value <= _LATEST_TIME:
            raise ValueError(f"time {value!r} is not in seconds since 1970")
        return float(value)
    moment = datetime.fromisoformat(value)
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).timestamp()
    except OverflowError:
        raise ValueError(f"time {value!r} is out of range") from None
