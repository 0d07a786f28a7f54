"""Paddle's files without Paddle: what is whole is read bit for bit, what is not is named, no pickle runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import tracemalloc
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plato2.config import UserError
from plato2.weights.paddle import open_parameter, read_pdparams, write_parameter

RNG = np.random.default_rng(3)
ARRAYS = {
    "matrix": RNG.standard_normal((7, 5), dtype=np.float32),
    "vector": RNG.standard_normal(300).astype(np.float16),
    "double": RNG.standard_normal((2, 3)),
    "turned": RNG.standard_normal((4, 6), dtype=np.float32).T,
    "part": RNG.standard_normal((9, 8), dtype=np.float32)[::2],
    "big": RNG.standard_normal((1500, 200), dtype=np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_parameter_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    write_parameter(tmp_path / "p", ARRAYS[name])
    parameter = open_parameter(tmp_path / "p")
    assert (parameter.shape, parameter.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)
    assert np.array_equal(parameter.read(), ARRAYS[name])


def test_levels_of_detail_and_packed_dimensions_are_read(tmp_path: Path) -> None:
    description = b"\x08\x05\x12\x03\x02\xac\x02"  # float32, [2, 300] packed
    header = struct.pack("<IQQ", 0, 1, 4) + b"text" + struct.pack("<Ii", 0, len(description)) + description
    (tmp_path / "p").write_bytes(header + bytes(2400))
    assert open_parameter(tmp_path / "p").shape == (2, 300)


DESCRIPTION = b"\x08\x05\x10\x02\x10\x03"


def parameter_bytes(
    version: int = 0,
    levels: bytes = struct.pack("<Q", 0),
    tensor_version: int = 0,
    description: bytes = DESCRIPTION,
    size: int | None = None,
    values: bytes = bytes(24),
) -> bytes:
    length = len(description) if size is None else size
    return (
        struct.pack("<I", version)
        + levels
        + struct.pack("<Ii", tensor_version, length)
        + description
        + values
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated in its header"),
        (parameter_bytes()[:3], "truncated in its header"),
        (parameter_bytes()[:10], "truncated in its header"),
        (parameter_bytes()[:22], "truncated in its header"),
        (parameter_bytes(values=bytes(20)), r"truncated: 20 bytes of values, \[2, 3\] float32 are 24"),
        (parameter_bytes(values=bytes(25)), "longer than it should be"),
        (parameter_bytes(version=1), r"version 1, not 0"),
        (parameter_bytes(tensor_version=9), r"tensor version 9, not 0"),
        (parameter_bytes(levels=struct.pack("<Q", 77)), "77 levels of detail"),
        (parameter_bytes(levels=struct.pack("<QQ", 1, 2**63 + 5)), "truncated in its header"),
        (parameter_bytes(size=-4), "a description of -4 bytes"),
        (parameter_bytes(size=1 << 20), "a description of 1048576 bytes"),
        (parameter_bytes(description=b"\x08\x03\x10\x06"), r"dtype 3 \(int64\)"),
        (parameter_bytes(description=b"\x08\x63\x10\x06"), r"dtype 99 \(unknown\)"),
        (parameter_bytes(description=b"\x10\x06"), r"dtype -1 \(unknown\)"),
        (parameter_bytes(description=b"\x08\x05\x10\x86"), "its description ends early"),
        (parameter_bytes(description=b"\x08\x05\x1a\x01"), "field 26 in its description"),
        (parameter_bytes(description=b"\x08\x05\x10" + b"\xff" * 9 + b"\x01"), "impossible shape"),
        (b"just a text file, which is longer than a header", "not a Paddle parameter"),
    ],
)
def test_a_bad_parameter_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "word_embedding").write_bytes(content)
    with pytest.raises(UserError, match=f"word_embedding: .*{message}") as found:
        open_parameter(tmp_path / "word_embedding")
    assert "\n" not in str(found.value)


# --------------------------------------------------------------------------------------------- .pdparams


class Numpy1Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes the module names of numpy 1."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            super().save_global(obj, name)
            return
        module = module.replace("numpy._core", "numpy.core")
        if self.proto >= 4:
            self.save(module)
            self.save(obj.__name__)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())

    dispatch = pickle._Pickler.dispatch | {types.FunctionType: save_global}  # type: ignore[attr-defined]


class Tensor:
    """Pickled as Paddle 2.1 and later pickle a tensor: a call of tuple."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.pair = (name, array)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.pair,)


def paddle_20(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return dict(arrays)


def paddle_21(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tensors = {name: Tensor(f"linear_{name}", array) for name, array in arrays.items()}
    return tensors | {"StructuredToParameterName@@": {name: f"linear_{name}" for name in arrays}}


def paddle_ordered(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return OrderedDict(paddle_21(arrays))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", [paddle_20, paddle_21, paddle_ordered])
@pytest.mark.parametrize("pickler", [pickle.Pickler, Numpy1Pickler])
def test_every_form_paddle_pickles_in_is_read(
    tmp_path: Path, form: Callable[[dict[str, np.ndarray]], dict[str, Any]], protocol: int, pickler: Any
) -> None:
    with (tmp_path / "24L.pdparams").open("wb") as file:
        pickler(file, protocol).dump(form(ARRAYS))
    content = (tmp_path / "24L.pdparams").read_bytes()
    assert (b"numpy.core" in content) == (pickler is Numpy1Pickler)
    found = read_pdparams(tmp_path / "24L.pdparams")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


class Calls:
    """Pickled as a call of anything."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def calls_of(marker: Path) -> dict[str, Any]:
    """Values that would leave `marker` behind, or come near, if a plain unpickler read them."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "open": Calls(open, str(marker), "w"),
        "subprocess": Calls(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Calls(getattr, marker, "touch"),
        "numpy.save": Calls(np.save, str(marker), ARRAYS["matrix"]),
        "numpy.fromfile": Calls(np.fromfile, "/dev/zero"),
        "a class": marker,
        "objects": np.array([Calls(os.system, f"touch {marker}")], dtype=object),
        "an array call": Calls(np.ndarray, (1 << 40,)),
        "a structure": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", calls_of(Path("x")))
def test_a_pickle_that_calls_anything_else_runs_nothing(tmp_path: Path, name: str, protocol: int) -> None:
    marker, file = tmp_path / "marker", tmp_path / "evil.pdparams"
    file.write_bytes(pickle.dumps({"good": ARRAYS["matrix"], "bad": calls_of(marker)[name]}, protocol))
    with pytest.raises(UserError, match=r"evil\.pdparams: ") as found:
        read_pdparams(file)
    assert "\n" not in str(found.value)
    assert sorted(tmp_path.iterdir()) == [file]


def test_the_calls_of_the_test_before_do_leave_their_mark(tmp_path: Path) -> None:
    """Without this, nothing would be proved."""
    for name in ("os.system", "eval", "exec", "subprocess", "objects"):
        marker = tmp_path / name.replace(".", "_")
        pickle.loads(pickle.dumps(calls_of(marker)[name]))
        assert marker.exists()


def stack_global(module: str, name: str) -> bytes:
    return b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name)
    ) + (pickle.STACK_GLOBAL)


def by_hand(value: bytes) -> bytes:
    """{"x": value}, assembled opcode by opcode."""
    return b"\x80\x04}\x8c\x01x" + value + b"s."


STATE = b"}\x8c\x08__code__Ns"
"""{"__code__": None}"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (by_hand(stack_global("posix", "system")), "posix.system"),
        (by_hand(stack_global("numpy", "dtype.__init__.__globals__")), "builds no array"),
        (by_hand(stack_global("builtins", "tuple") + STATE + b"b"), "may only call"),
        (by_hand(stack_global("builtins", "tuple") + b"N" + STATE + b"\x86b"), "may only call"),
        (by_hand(stack_global("numpy", "ndarray") + STATE + b"b"), "not a readable"),
        (by_hand(stack_global("numpy", "ndarray") + b")\x81"), "not a readable"),
        (by_hand(stack_global("numpy", "ndarray") + b")R"), "not a readable"),
        (by_hand(stack_global("builtins", "tuple") + b")\x81"), "not a readable"),
        (
            by_hand(stack_global("collections", "OrderedDict") + b")R" + STATE + b"b"),
            "not a readable",
        ),
        (
            by_hand(stack_global("_codecs", "encode") + b"\x8c\x01a\x8c\x05rot13\x86R"),
            "encode as 'rot13'",
        ),
        (by_hand(stack_global("numpy", "dtype") + b"\x8c\x01O\x85R"), "an array of O"),
        (by_hand(stack_global("numpy._core.multiarray", "_reconstruct") + b")R"), "not an array"),
        (by_hand(b"\x8c\x01yQ"), "persistent"),
        (by_hand(b"\x82\x01"), "not a readable"),
        (by_hand(b"\x97"), "not a readable"),
        (by_hand(b"K\x05"), "'x' is a int, not an array"),
        (b"\x80\x04]\x94.", "not a dict of parameters"),
        (b"\x80\x04}\x8e" + struct.pack("<Q", 2**62), "not a readable"),
        (b"hello, this is text", "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_pickles_made_by_hand_do_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.pdparams").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.pdparams: .*{message}") as found:
        read_pdparams(tmp_path / "bad.pdparams")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"matrix": ARRAYS["matrix"]}, protocol)
    for length in range(len(whole)):
        (tmp_path / "cut.pdparams").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pdparams: "):
            read_pdparams(tmp_path / "cut.pdparams")


def test_values_that_do_not_fill_their_shape_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    pickle.Pickler(stream, 4).dump({"matrix": ARRAYS["matrix"]})
    content = stream.getvalue().replace(b"K\x07K\x05\x86", b"K\x07K\x06\x86")
    (tmp_path / "bad.pdparams").write_bytes(content)
    with pytest.raises(UserError, match="cannot reshape"):
        read_pdparams(tmp_path / "bad.pdparams")


def test_numbers_that_are_no_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pdparams").write_bytes(pickle.dumps({"ids": np.arange(4)}))
    with pytest.raises(UserError, match="ids is int64; weights are float32 or float16"):
        read_pdparams(tmp_path / "bad.pdparams")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_values_are_in_memory_only_once(tmp_path: Path, protocol: int) -> None:
    """Protocol 2 writes them as text, and every protocol lets a pickle refer to what it has read."""
    arrays = {str(n): RNG.standard_normal(1 << 18, dtype=np.float32) for n in range(20)}
    (tmp_path / "24L.pdparams").write_bytes(pickle.dumps(paddle_21(arrays), protocol))
    tracemalloc.start()
    found = read_pdparams(tmp_path / "24L.pdparams")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * sum(array.nbytes for array in found.values())
