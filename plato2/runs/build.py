"""From a node of the configuration to the object it names, with its keys and plain values checked first.

The open groups (stage, data, trainer, strategy, logger) have no schema of their own: the signature of what
`_target_` names is their schema. A typo in a key, or a word where a number belongs, is found before anything
is computed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from plato2.config import UserError, did_you_mean

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def build(node: Mapping[str, Any], key: str, **arguments: Any) -> Any:
    """Calls what a node's `_target_` names with the node's keys and further arguments.

    Args:
        node: the keys; a value that is itself a node with a `_target_` is built first.
        key: where the node stands in the configuration, for messages.
        arguments: what the configuration does not say.

    Raises:
        UserError: a key that the target does not take (names the nearest one), or a value of another type.
    """
    target = find(str(node["_target_"]), f"{key}._target_")
    given = {
        name: build(value, f"{key}.{name}") if isinstance(value, Mapping) and "_target_" in value else value
        for name, value in node.items()
        if name != "_target_"
    }
    check_arguments(target, given, key)
    for name, parameter in _parameters(target).items():
        if parameter.default is parameter.empty and name not in {**given, **arguments}:
            raise UserError(f"{key}.{name}: missing; {target.__name__} needs it")
    return target(**given, **arguments)


def find(dotted: str, key: str) -> Callable[..., Any]:
    """The class or function of a dotted name.

    Raises:
        UserError: there is none.
    """
    module, _, name = dotted.rpartition(".")
    try:
        target: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}={dotted}: cannot be imported ({error}); give package.module.Class, and the folder of a "
            "module that is not beside train.py in PYTHONPATH"
        ) from None
    return target


def check_arguments(target: Callable[..., Any], given: Mapping[str, Any], key: str) -> None:
    """Compares keys and plain values with the signature of what will be called.

    Raises:
        UserError: names the key, the value and what could stand there.
    """
    check_keys(given, list(_parameters(target)), f"{key}.", target.__name__)
    types = hints(target)
    for name, value in given.items():
        if name in types and not _fits(value, types[name]):
            raise UserError(f"{key}.{name}={value}: must be {' or '.join(_words(types[name]))}")


def check_keys(given: Iterable[str], known: Sequence[str], prefix: str, owner: str) -> None:
    """Compares keys with the known ones.

    Raises:
        UserError: names the key and the nearest known one.
    """
    for name in given:
        if name not in known:
            raise UserError(f"{prefix}{name}: {owner} has no such option; {did_you_mean(name, known)}")


def check_counts(node: Mapping[str, Any], names: Sequence[str], key: str) -> None:
    """Refuses values that are not whole numbers of at least 1.

    Raises:
        UserError: names the key and the value.
    """
    for name in names:
        value = node.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}.{name}={value}: must be a whole number, at least 1")


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What can be given by name; not what `**kwargs` would swallow, typos included."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(target).parameters.items()
    return {name: parameter for name, parameter in found if parameter.kind not in variadic}


def hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The types of the arguments of what will be called; none where they are known to type checkers only."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # names that exist for type checkers only: nothing to compare with
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML may stand where `hint` is; types with no plain values fit."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint not in (int, float, str, NoneType)
    if hint is float:
        return isinstance(value, int | float)
    kind = origin or hint
    return isinstance(value, kind) if kind in (int, str, bool, NoneType, list, dict) else True


def _words(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, UnionType):
        return list(dict.fromkeys(word for part in get_args(hint) for word in _words(part)))
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [str(WORDS.get(hint) or getattr(hint, "__name__", hint))]
