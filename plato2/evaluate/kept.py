"""What takes long to find, kept line by line: a killed evaluation continues where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from plato2.config import UserError
from plato2.files import lock_file, locked
from plato2.formats import parse

Found = TypeVar("Found")


@contextmanager
def kept(
    path: Path | None, about: Mapping[str, Any], schema: type[Found]
) -> Iterator[tuple[list[Found], Callable[[Found], None]]]:
    """What a file of `--scores` has already, and what appends to it.

    Its first line says what they are the scores of; a half-written last line is cut off.

    Args:
        path: the file; None keeps nothing.
        about: what the scores depend on.
        schema: of a line.

    Raises:
        UserError: scores of something else, a damaged file, or one that cannot be written.
    """
    if path is None:
        yield [], lambda found: None
        return
    cure = "remove it to start over, or name another file"
    about = json.loads(json.dumps({"format": "plato2 scores 1", **about}))
    try:
        with locked(lock_file(path), f"--scores {path}"), path.open("a+b") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
            if len(lines) == 1:
                file.write(json.dumps(about).encode() + b"\n")
            else:
                before = parse(dict[str, Any], lines[0], f"--scores {path}:1", cure)
                for key in sorted(about.keys() | before.keys()):
                    if before.get(key) != about.get(key):
                        raise UserError(f"--scores {path}: has scores of other {key}; {cure}")
            done = [
                parse(schema, line, f"--scores {path}:{number}", cure)
                for number, line in enumerate(lines[1:-1], start=2)
            ]

            def append(found: Found) -> None:
                line = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

            yield done, append
    except OSError as error:
        raise UserError(f"--scores {path}: cannot be written ({error.strerror}); name another file") from None


def continued(
    path: Path | None, about: Mapping[str, Any], schema: type[Found], find: Callable[[int], Iterable[Found]]
) -> Iterator[Found]:
    """What is found, one after the other: first what the file has already, then the rest, which it gets.

    Args:
        path: as `kept`.
        about: as `kept`.
        schema: as `kept`.
        find: finds all from this number on.
    """
    with kept(path, about, schema) as (done, append):
        yield from done
        for found in find(len(done)):
            append(found)
            yield found
