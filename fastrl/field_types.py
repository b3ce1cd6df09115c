"""Values against the types of their fields, for settings that code gives instead of a file."""

import math
import numbers
import types
import typing
from typing import Any

WORDS = {bool: "True or False", int: "a whole number below 2**63", float: "a finite number",
         str: "text", types.NoneType: "None"}


def fits(hint: Any, value: object) -> bool:
    """True when `value` is of the type `hint`; a bool is no number, an int is a float.

    Example:
        >>> fits(int | None, 3), fits(int | None, 2.5), fits(float, 3), fits(tuple[str, ...], "ab")
        (True, False, True, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(arguments[0], item) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, numbers.Integral) and -(2**63) <= int(value) < 2**63
    if hint is float:
        return isinstance(value, numbers.Real) and _is_finite(value)
    return isinstance(value, hint)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def described(hint: Any) -> str:
    """What `fits` expects, in words.

    Example:
        >>> described(tuple[str, ...] | None)
        'a tuple (text, ...) or None'
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(described, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple ({described(arguments[0])}, ...)"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))
