"""Paddle's files, read and written without Paddle.

- One binary file for each parameter (docs/spec.md, Parameters): u32 0 | u64 levels of detail, then for each
  u64 bytes and data | u32 0 | i32 n | n bytes of a TensorDesc protobuf (field 1 dtype, field 2 dimensions) |
  the values, little-endian.
- `.pdparams`: a pickle of a dict of arrays. What such a pickle calls is replaced by stand-ins that can do
  nothing but build arrays; a pickle that names anything else is refused before it runs.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from plato2.config import UserError

DTYPES: dict[int, np.dtype[Any]] = {5: np.dtype("<f4"), 4: np.dtype("<f2"), 6: np.dtype("<f8")}
"""Paddle's number of a dtype that weights may have."""
_OTHER_DTYPES = {0: "bool", 1: "int16", 2: "int32", 3: "int64", 20: "uint8", 21: "int8", 22: "bfloat16"}
_MAX_DESC = 1 << 10
_DTYPE_FIELD, _DIM_FIELD, _PACKED_DIMS = 0x08, 0x10, 0x12


@dataclass(frozen=True)
class Parameter:
    """Where a parameter's values lie."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Of the values in the file, in bytes."""

    def read(self) -> np.ndarray:
        """The values, memory-mapped: nothing is read before it is used."""
        if not prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def open_parameter(path: Path) -> Parameter:
    """Reads the header of a parameter file and checks that the values are all there.

    Raises:
        UserError: not such a file, truncated, too long, or a dtype that weights do not have.
    """
    with path.open("rb") as file:
        version = _number(file, "<I", path)
        levels = _number(file, "<Q", path)
        if version != 0:
            raise UserError(f"{path}: not a Paddle parameter (version {version}, not 0)")
        if levels > 4:
            raise UserError(f"{path}: not a Paddle parameter ({levels} levels of detail)")
        for _ in range(levels):
            n_bytes = _number(file, "<Q", path)
            _read(file, min(n_bytes, path.stat().st_size + 1), path)
        tensor_version = _number(file, "<I", path)
        if tensor_version != 0:
            raise UserError(f"{path}: not a Paddle parameter (tensor version {tensor_version}, not 0)")
        size = _number(file, "<i", path)
        if not 0 < size <= _MAX_DESC:
            raise UserError(f"{path}: not a Paddle parameter (a description of {size} bytes)")
        dtype, shape = _describe(_read(file, size, path), path)
        offset = file.tell()
    expected, found = prod(shape) * dtype.itemsize, path.stat().st_size - offset
    if found != expected:
        kind = "truncated" if found < expected else "longer than it should be"
        raise UserError(
            f"{path}: {kind}: {found:,} bytes of values, {list(shape)} {dtype.name} are {expected:,}; "
            "download it again"
        )
    return Parameter(path, dtype, shape, offset)


def write_parameter(path: Path, array: np.ndarray) -> None:
    """Writes a float16, float32 or float64 array as Knover does, byte for byte."""
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    description = bytes([_DTYPE_FIELD, numbers[array.dtype.newbyteorder("<")]])
    for dimension in array.shape:
        description += bytes([_DIM_FIELD]) + _varint(dimension)
    header = struct.pack("<IQIi", 0, 0, 0, len(description)) + description
    with path.open("wb") as file:
        file.write(header)
        file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def _describe(data: bytes, path: Path) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """dtype and shape of a TensorDesc."""
    dtype_number, place = -1, 0
    shape: list[int] = []
    while place < len(data):
        tag, place = _read_varint(data, place, path)
        value, place = _read_varint(data, place, path)
        if tag == _DTYPE_FIELD:
            dtype_number = value
        elif tag == _DIM_FIELD:
            shape.append(value)
        elif tag == _PACKED_DIMS and place + value <= len(data):
            end = place + value
            while place < end:
                dimension, place = _read_varint(data, place, path)
                shape.append(dimension)
        else:
            raise UserError(f"{path}: not a Paddle parameter (field {tag} in its description)")
    if dtype_number not in DTYPES:
        name = _OTHER_DTYPES.get(dtype_number, "unknown")
        raise UserError(
            f"{path}: dtype {dtype_number} ({name}) is not one of weights; float32 and float16 are"
        )
    if any(dimension >= 1 << 40 for dimension in shape):
        raise UserError(f"{path}: impossible shape {shape}")
    return DTYPES[dtype_number], tuple(shape)


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{path}: truncated in its header, or not a Paddle parameter; download it again")
    return data


def _number(file: BinaryIO, form: str, path: Path) -> int:
    (number,) = struct.unpack(form, _read(file, struct.calcsize(form), path))
    return int(number)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _read_varint(data: bytes, place: int, path: Path) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, place
    raise UserError(f"{path}: not a Paddle parameter (its description ends early)")


# --------------------------------------------------------------------------------------------- .pdparams


class _Dtype:
    """Stands in for a numeric numpy.dtype."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, *flags: Any) -> None:
        if not re.fullmatch(r"[biuf]\d", name):
            raise UserError(f"it holds an array of {name}, not of numbers: refused, nothing was run")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for a numpy.ndarray."""

    __slots__ = ("array",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
        """Takes the values, without a copy."""
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
        return self


class _Call:
    """A function that a pickle may call; it does nothing."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it may only call")


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if encoding not in ("latin1", "latin-1"):
        raise UserError(f"the pickle wants to encode as {encoding!r}: refused, nothing was run")
    return text.encode("latin1")


_TUPLE = _Call(tuple)
"""Newer Paddle pickles a tensor as `tuple((name, array))`."""
_SAFE: dict[tuple[str, str], _Call | None] = {
    ("builtins", "tuple"): _TUPLE,
    ("__builtin__", "tuple"): _TUPLE,
    ("collections", "OrderedDict"): _Call(dict),
    ("_codecs", "encode"): _Call(_latin1),
    ("numpy", "dtype"): _Call(_Dtype),
    ("numpy", "ndarray"): None,  # only named: what _reconstruct is to make
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _SAFE[f"{_core}.multiarray", "_reconstruct"] = _Call(lambda *what: _Array())
    _SAFE[f"{_core}.numeric", "_frombuffer"] = _Call(lambda *what: _Array().fill(*what))


class _Memo(dict[int, Any]):
    """What a pickle may refer to again: never an array's values, which are in memory only once."""

    def __setitem__(self, place: int, value: Any) -> None:
        held = value if isinstance(value, tuple) else (value,)
        has_values = any(isinstance(one, (str, bytes, bytearray)) and len(one) > 1 << 10 for one in held)
        super().__setitem__(place, None if has_values else value)


class _ArraysOnly(pickle._Unpickler):  # the one in Python: it can be given a memo
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what builds arrays; nothing is imported."""
        try:
            return _SAFE[module, name]
        except KeyError:
            raise UserError(
                f"the pickle wants to call {module}.{name}, which builds no array: refused, nothing was run"
            ) from None


def read_pdparams(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a `.pdparams` file.

    Raises:
        UserError: not a pickle, truncated, one that calls anything but array building, or no dict of arrays.
    """
    try:
        with path.open("rb") as file:
            loaded = _ArraysOnly(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a broken pickle leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable .pdparams file ({reason}); download it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: not a dict of parameters ({type(loaded).__name__})")
    arrays = {}
    for name, value in loaded.items():
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        array = getattr(value, "array", None)
        if isinstance(name, str) and array is not None:
            if array.dtype.newbyteorder("<") not in DTYPES.values():
                raise UserError(f"{path}: {name} is {array.dtype}; weights are float32 or float16")
            arrays[name] = array
        elif name != "StructuredToParameterName@@":
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not an array")
    return arrays
