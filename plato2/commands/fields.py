"""Options that belong together: the fields of a dataclass, annotated as Typer wants them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

Verb = Callable[..., None]


def takes_fields(kind: type) -> Callable[[Verb], Verb]:
    """Gives a verb the fields of a dataclass as options, in the place of its parameter of that type.

    The verb gets them as one object, which has checked itself.
    """

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True).parameters
        (place,) = (name for name, parameter in own.items() if parameter.annotation is kind)
        types = get_type_hints(kind, include_extras=True)

        @functools.wraps(verb)
        def with_fields(**given: Any) -> None:
            values = {field.name: given.pop(field.name) for field in fields(kind)}
            verb(**{place: kind(**values)}, **given)

        parameters = []
        for name, parameter in own.items():
            if name != place:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for field in fields(kind):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                option = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
                parameters.append(option.replace(annotation=types[field.name]))
        with_fields.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_fields.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del with_fields.__wrapped__  # or its signature would be taken
        return with_fields

    return decorate
