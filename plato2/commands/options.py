"""Options of a verb made of a dataclass, whose fields say their names, types, defaults, bounds and help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from plato2.config import UserError, explained


def takes(
    kind: type,
    *,
    leave_out: Collection[str] = (),
    arguments: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
    panel: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb an option for each field of a dataclass, in the place of its parameter of that type.

    The verb gets them as one object, which has checked itself. A field that the verb has as a parameter of
    its own, such as a seed of another meaning, stays the verb's.

    Args:
        kind: the dataclass; its fields are made by `plato2.config.option`, or annotated as Typer wants them.
        leave_out: fields that are not options.
        arguments: fields that are positional arguments.
        flags: what is typed for a field, where that is not its name.
        panel: group of the options in `--help`.
    """
    types = get_type_hints(kind, include_extras=True)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(verb, eval_str=True).parameters
        (place,) = (name for name, parameter in own.items() if parameter.annotation is kind)
        added = [field for field in fields(kind) if field.name not in {*leave_out, *own}]

        @functools.wraps(verb)
        def with_options(**given: Any) -> None:
            values = {
                field.name: _value(field.name, types[field.name], given.pop(field.name)) for field in added
            }
            verb(**{place: kind(**values)}, **given)

        parameters = []
        for name, parameter in own.items():
            if name != place:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for field in added:
                flag = (flags or {}).get(field.name, f"--{field.name.replace('_', '-')}")
                flag = "" if field.name in arguments else flag
                parameters.append(_parameter(field, types[field.name], flag, panel))
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del with_options.__wrapped__  # or its signature would be taken
        return with_options

    return decorate


def _parameter(field: Field[Any], kind: Any, flag: str, panel: str | None) -> inspect.Parameter:
    """A field as Typer wants it; without a flag it is positional."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if get_origin(kind) is Annotated:
        default = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    help = explained(field)
    if get_origin(kind) in (list, dict):
        if flag:
            help += " NAME=VALUE; may be repeated." if get_origin(kind) is dict else " May be repeated."
        kind = list[str]
        if default is not MISSING:
            kind, default = list[str] | None, None
    said: dict[str, Any] = {"help": help, "show_default": field.metadata["default_text"] or True}
    info = typer.Option(flag, rich_help_panel=panel, **said) if flag else typer.Argument(**said)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, info],
    )


def _value(name: str, kind: Any, given: Any) -> Any:
    """A field's value from what was typed."""
    if get_origin(kind) is dict:
        return dict(pair(text, name) for text in given or [])
    return given or [] if get_origin(kind) is list else given


def pair(text: str, option: str) -> tuple[str, str]:
    """The two sides of `NAME=VALUE`.

    Raises:
        UserError: the text is not of this form.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"{option}={text}: must be NAME=VALUE")
    return name, value
