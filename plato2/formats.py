"""What a file says, held to the schema of its format; whatever is wrong with it is one line.

A schema is a pydantic model or a dataclass of plain values. Types are strict: a text is not a number, and 2.0
is not a count. JSON is parsed with limits: of nesting, and of the digits of a number.
"""

from __future__ import annotations

import json
import reprlib
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from plato2 import __version__
from plato2.config import ModelConfig, OptimConfig, Use, UserError

Schema = TypeVar("Schema")
Count = Annotated[int, Field(ge=0, le=2**53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
JSON_BYTES = 1 << 24
"""The largest record of ours: a configuration, a lineage, an index of weights."""
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=(), arbitrary_types_allowed=True)


class Open(BaseModel):
    """A format to which others may add keys of their own."""

    model_config = ConfigDict(extra="allow", **_STRICT)


class Closed(BaseModel):
    """A format all of whose keys are ours: an unknown one was written by a newer plato2."""

    model_config = ConfigDict(extra="forbid", **_STRICT)


for closed in (ModelConfig, OptimConfig, Use):
    with_config(Closed.model_config)(closed)


class StageArguments(Open):
    """What is stored with the weights of a stage: the arguments of its constructor.

    A stage may have more of its own, which its constructor checks.
    """

    model: ModelConfig
    optim: OptimConfig | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    head: Literal["first", "dual", "pmi"] | None = None
    tau: Annotated[float, Field(gt=0)] | None = None
    validation_noise: Literal["fixed", "none"] | None = None
    recognition_head: Literal["tied", "linear"] | None = None
    bow_head: Literal["tied", "linear"] | None = None
    recognition_bias: Literal["learned", "balanced"] | None = None


def parse(schema: type[Schema], data: bytes, name: str, cure: str) -> Schema:
    """What a JSON text says.

    Args:
        schema: of its format.
        data: the text, UTF-8.
        name: of the file, for the message.
        cure: for the message, unless the text was written by a newer plato2.

    Raises:
        UserError: not JSON, or not of this format; names the key and the value.
    """
    try:
        found: Schema = _adapter(cast(Any, schema)).validate_json(data)
        return found
    except ValidationError as error:
        raise UserError(f"{name}: {_explained(error, cure)}") from None
    except UserError as error:  # a dataclass that checks itself
        raise UserError(f"{name}: {error}; {cure}") from None


def check(schema: type[Schema], value: Any, name: str, cure: str) -> Schema:
    """The same for a value that was already read, e.g. from a checkpoint; it must be of plain values.

    Raises:
        UserError: it is not, or not of this format.
    """
    text, size = [], 0
    try:
        for part in json.JSONEncoder().iterencode(value):
            text.append(part)
            size += len(part)
            if size > JSON_BYTES:  # a few bytes can refer to each other without end
                raise ValueError(f"more than {JSON_BYTES:,} characters")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not of plain values ({error}); {cure}") from None
    return parse(schema, "".join(text).encode(), name, cure)


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _explained(error: ValidationError, cure: str) -> str:
    """The first thing that is wrong: its key, its value, why, and the cure."""
    first = error.errors(include_url=False)[0]
    key, reason = ".".join(map(str, first["loc"])), str(first["msg"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return (
            f"{key}: unknown to plato2 {__version__}; another version of plato2 wrote it, a newer one: update"
        )
    if first["type"] == "json_invalid":
        return f"not valid JSON ({reason.removeprefix('Invalid JSON: ')}); {cure}"
    if first["type"] == "missing":
        return f"{key} is missing; {cure}"
    value = reprlib.repr(first["input"])
    return f"{key}={value}: {reason.removeprefix('Input ')}; {cure}" if key else f"{reason}; {cure}"
