"""OpenAI's chat completions as this server understands them: requests that check themselves, and errors.

Fields that plato2 does not know are refused, and so are those of OpenAI's that plato2 lacks, unless they ask
for nothing (docs/serve.md lists them).
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from plato2.config import COLDEST, DecodeConfig, Strategy, UserError

System = Literal["ignore", "refuse", "context"]
"""What to do with system messages: left out, with a warning; refused; or read as a turn of their own."""
MOST = 20
"""Samples or beams of each latent that a request may ask for, or the server's own setting if that is more."""


# ------------------------------------------------------------------------------------------------- errors


class ApiError(Exception):
    """An answer that is an error, in OpenAI's format."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers

    def to_dict(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as an answer."""
        body = json.dumps(self.to_dict())  # ASCII: the name of an unknown field may be no text
        return Response(body, self.status, self.headers, "application/json")


def wrong(param: str | None, message: str) -> ApiError:
    """An impossible value."""
    return ApiError(400, "invalid_value", f"{param}: {message}" if param else message, param)


CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}
"""pydantic's name of a mistake -> ours; others are `invalid_value`, or `invalid_type` where they end so."""


def of_validation(found: RequestValidationError) -> ApiError:
    """The first mistake in a body, named as OpenAI does: `messages[0].content`."""
    first = found.errors()[0]
    kind, place = first["type"], [part for part in first["loc"][1:] if not str(part).startswith("<")]
    if kind == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {first['ctx']['error']}")
    if not place and kind == "string_unicode":
        return ApiError(
            400, "invalid_value", "a name in the body is not valid Unicode: half of a surrogate pair"
        )
    if not place:
        return ApiError(
            400, "invalid_type", "the body must be a JSON object, sent with Content-Type: application/json"
        )
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    message = {
        "extra_forbidden": "plato2 does not know this field; leave it out",
        "missing": "is missing",
    }.get(kind, first["msg"])
    code = CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return ApiError(400, code, f"{param}: {message}", param)


# ----------------------------------------------------------------------------------------------- requests


class Strict(BaseModel):
    """An object without unknown fields, whose values have the right type already."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "annotations": ([],),
    "tool_calls": ([],),
}
"""Fields of OpenAI's for what plato2 does not have, and the values, beside null, that ask for nothing."""


def is_neutral(value: Any, info: ValidationInfo) -> Any:
    """Refuses a field that asks for what plato2 does not have."""
    values = NEUTRAL[str(info.field_name)]
    if value is not None and not any(type(value) is type(known) and value == known for known in values):
        shown = " or ".join(json.dumps(known) for known in values or (None,))
        message = f"plato2 does not have this; leave it out or send {shown}"
        raise PydanticCustomError("unsupported", "{message}", {"message": message})
    return value


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<parts>")],
    Discriminator(
        lambda value: "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None,
        custom_error_type="content_type",
        custom_error_message="must be a text or a list of text parts",
    ),
]


class Turn(Strict):
    """A message: something that was said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    name: str | None = None
    # What a client sends back of an earlier answer.
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None

    _neutral = field_validator("annotations", "audio", "function_call", "tool_calls")(is_neutral)

    @field_validator("role", mode="before")
    @classmethod
    def _calls_no_tools(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise PydanticCustomError(
                "role", "PLATO-2 cannot call tools; send the turns of user and assistant"
            )
        return role

    @property
    def text(self) -> str:
        """What was said."""
        if isinstance(self.content, str):
            return self.content
        return " ".join(part.text for part in self.content)


class StreamOptions(Strict):
    """What else a stream has."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


OPTIONS = {option.name: option.metadata for option in fields(DecodeConfig)}


def setting(name: str, le: float | None = None) -> Any:
    """A field that asks for an option of decoding, within its bounds or those of requests."""
    said = OPTIONS[name]
    return Field(default=None, description=said["help"], ge=said["ge"], le=le or said["le"])


class Extension(Strict):
    """What PLATO-2 has and OpenAI has no field for; settings that are not given are the server's."""

    candidates: bool = False
    strategy: Strategy | None = setting("strategy")
    top_k: int | None = setting("top_k")
    beam_size: int | None = setting("beam_size")
    n_samples: int | None = setting("n_samples")
    min_tokens: int | None = setting("min_tokens")
    no_repeat_ngram: int | None = setting("no_repeat_ngram")
    length_penalty: float | None = setting("length_penalty", le=10)


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, str | list[str]),
]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = setting("temperature")
    top_p: float | None = setting("top_p")
    max_tokens: int | None = setting("max_tokens")
    max_completion_tokens: int | None = setting("max_tokens")
    stop: Stop | None = None
    plato2: Extension | None = None
    # Harmless: nothing that is said depends on them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    # For what plato2 does not have.
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    _neutral = field_validator(*(NEUTRAL.keys() - {"annotations", "tool_calls"}))(is_neutral)

    @property
    def last(self) -> int:
        """The place of the last message that is no system message; 0 where all are."""
        spoken = (n for n, message in enumerate(self.messages) if message.role not in ("system", "developer"))
        return max(spoken, default=0)

    def turns(self, system: System = "ignore") -> tuple[list[str], str | None]:
        """What was said, oldest first, and a line about what was left out of it.

        Messages that one speaker sends in a row are one turn, as in `plato2 prepare`.

        Args:
            system: what to do with system messages.

        Raises:
            ApiError: the user did not speak last, or a system message is refused.
        """
        others = [n for n, message in enumerate(self.messages) if message.role in ("system", "developer")]
        if others and system == "refuse":
            text = "PLATO-2 has no system prompt; send the turns of user and assistant only"
            raise wrong(f"messages[{others[0]}].role", text)
        last = len(self.messages) - 1 if system == "context" else self.last
        if self.messages[last].role != "user":
            raise wrong(f"messages[{last}].role", "the last message must be the user's")
        said = [
            message
            for message in self.messages
            if message.role not in ("system", "developer") or (system == "context" and message.text.strip())
        ]
        turns = [
            " ".join(message.text for message in messages)
            for _, messages in groupby(said, key=lambda message: message.role)
        ]
        if not others or system == "context":
            return turns, None
        return turns, f"messages[{others[0]}]: PLATO-2 has no system prompt; it was left out"

    def decode_config(self, default: DecodeConfig, seed: int) -> DecodeConfig:
        """How to find candidates: the server's settings with what was asked for.

        Args:
            default: the server's settings.
            seed: where the request has none.

        Raises:
            ApiError: settings that contradict each other or that decoding cannot use.
        """
        own = self.plato2 or Extension()
        asked: dict[str, Any] = own.model_dump(exclude={"candidates"}, exclude_none=True)
        is_greedy = self.temperature is not None and self.temperature < COLDEST
        if is_greedy:  # said here, since the server's own strategy may be another one
            for name in ("strategy", "top_k"):
                if name in asked:
                    text = f"a temperature below {COLDEST:g} is greedy decoding; leave one of them out"
                    raise wrong(f"plato2.{name}", text)
            asked |= {"strategy": "top_k", "top_k": 1}
        elif self.temperature is not None:
            asked["temperature"] = self.temperature
        if self.top_p is not None and self.top_p < 1 and not is_greedy:
            if asked.get("strategy", "top_p") != "top_p":
                raise wrong("top_p", f"plato2.strategy is {asked['strategy']}; leave one of them out")
            asked |= {"strategy": "top_p", "top_p": self.top_p}
        strategy = asked.get("strategy", default.strategy)
        for name, its in (("top_k", "top_k"), ("beam_size", "beam")):
            if getattr(own, name) is not None and strategy != its:
                raise wrong(f"plato2.{name}", f"the strategy is {strategy}; {name} is a setting of {its}")
        for name in ("beam_size", "n_samples"):
            if asked.get(name, 1) > max(MOST, getattr(default, name)):
                raise wrong(f"plato2.{name}", f"at most {max(MOST, getattr(default, name))}")
        if strategy == "beam":
            asked.setdefault("n_samples", 1)  # a beam search always finds the same
        if self.max_tokens and self.max_completion_tokens:
            raise wrong("max_tokens", "max_completion_tokens is the same; leave one of them out")
        if most := self.max_tokens or self.max_completion_tokens:
            asked["max_tokens"] = most
            asked.setdefault("min_tokens", min(default.min_tokens, most))
        asked["seed"] = self.seed if self.seed is not None else seed
        try:
            return replace(default, **asked, stop=tuple(self.stop or ()))
        except UserError as error:
            name = str(error).partition("=")[0]
            raise wrong(f"plato2.{name}" if name in Extension.model_fields else None, str(error)) from None
