"""JSON files of any size, one part at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

_JSON_CHUNK = 1 << 20  # bytes read at a time
_JSON_VALUE = 1 << 26  # characters of one value: a damaged file of gigabytes must not be held as a whole
_NOT_BLANK = re.compile(r"\S")
_DECODE = json.JSONDecoder().raw_decode
_JSON_OPENING = re.compile(r"([\[{])\s*(\S)")


def read_values(
    stream: IO[bytes], enter: Callable[[int, str], bool]
) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    """(line from 1, keys, value) of the parts of one or more JSON values.

    Args:
        stream: the text, UTF-8.
        enter: whether the elements of a list or an object come one by one and not as one value; asked with
            the number of containers around it and its first two characters, such as `[[`, `["` or `{"`.

    `keys` are those of the entered objects around the value. Bytes that are not UTF-8 are in the value as
    lone surrogates, so that a reader can leave out that value alone.

    Raises:
        ValueError: no JSON from some line on, or its end is missing.
    """
    text = _JsonText(stream)
    try:
        while text.peek():
            yield from _json_values(text, enter, ())
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"not valid JSON at line {text.line()} ({why})") from error


def _json_values(
    text: _JsonText, enter: Callable[[int, str], bool], keys: tuple[str, ...], depth: int = 0
) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    opening = text.opening()
    if not opening or not enter(depth, opening):
        line = text.line()
        yield line, keys, text.value()
        return
    text.take(opening[0])
    close = "]" if opening[0] == "[" else "}"
    while text.peek() != close:
        inner = keys
        if close == "}":
            inner = (*keys, str(text.value()))
            text.take(":")
        yield from _json_values(text, enter, inner, depth + 1)
        if text.peek() != close:
            text.take(",")
    text.take(close)


class _JsonText:
    """The text of a JSON file from where its reader stands, read on as it is needed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._position, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # the line of the character at `_counted`

    def line(self) -> int:
        """The line of the next character, from 1."""
        self.peek()
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while (match := _NOT_BLANK.search(self._text, self._position)) is None and not self._ended:
            self._read_on()
        self._position = match.start() if match else len(self._text)
        return match[0] if match else ""

    def opening(self) -> str:
        """The bracket that comes next and the character after it; nothing when a value is no container."""
        if self.peek() not in ("[", "{"):
            return ""
        while (match := _JSON_OPENING.match(self._text, self._position)) is None and not self._ended:
            self._read_on()
        return match[1] + match[2] if match else ""

    def take(self, char: str) -> None:
        """Go over `char`, which must come next."""
        if (found := self.peek()) != char:
            raise ValueError(
                f"{char} expected" + (f" instead of {found}" if found else ", but the file ends")
            )
        self._position += 1

    def value(self) -> Any:
        """The value that comes next, as a whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODE(self._text, self._position)
            except ValueError:
                if self._ended or len(self._text) - self._position > _JSON_VALUE:
                    raise
            else:
                if end < len(self._text) or self._ended:  # else a number might go on
                    self._position = end
                    return value
            self._read_on()

    def _read_on(self) -> None:
        """Drop what was used and read as much as is left, so that a long value is tried a few times only."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._text = self._text[self._position :]
        self._position = self._counted = 0
        raw = self._stream.read(max(_JSON_CHUNK, len(self._text)))
        self._ended = not raw
        self._text += self._utf8.decode(raw, final=self._ended)
