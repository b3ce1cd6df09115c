"""Plain values, as YAML gives them, into config dataclasses: the inverse of `config.to_dict`.

Nothing is guessed: a word is not turned into a number, nor 1 into true. A number without a
fraction is accepted where a float is expected, a list where a tuple is.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastrl.config import to_dict
from fastrl.errors import ConfigError
from fastrl.yaml_file import check_keys

Config = TypeVar("Config")


def parse_config(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build a config dataclass from plain values.

    Args:
        cls: The dataclass; nested dataclasses are built from nested mappings.
        values: Field name -> value. Fields with a default may be left out.
        where: What error messages begin with, such as a file and stage name.
    Raises:
        ConfigError: an unknown key (the nearest one is named), a missing one, a value of the
            wrong type, or one that the dataclass itself refuses.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    check_keys(values, [field.name for field in fields], where)
    hints = typing.get_type_hints(cls)
    missing = [field.name for field in fields if field.name not in values
               and field.default is dataclasses.MISSING
               and field.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(map(repr, missing))}; "
                          "these settings have no default, add them")
    defaults = {field.name: field.default for field in fields}
    parsed = {name: _parse(hints[name], _completed(value, defaults[name]), f"{where}: {name}")
              for name, value in values.items()}
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _completed(value: Any, default: Any) -> Any:
    """Settings of a nested config; those left out are of the field's default, not of its class."""
    if (isinstance(value, Mapping) and dataclasses.is_dataclass(default)
            and not isinstance(default, type)):
        return {**to_dict(default), **value}
    return value


def _parse(hint: Any, value: Any, where: str) -> Any:
    """One value of the type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not types.NoneType]
        if value == "None" and inner is not str:
            _refuse(where, "a value, or null for none", value)
        return _parse(inner, value, where)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            _refuse(where, "one of " + ", ".join(map(repr, arguments)), value)
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is dict:
        return _parse_dict(arguments[1], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            _refuse(where, "settings, one `name: value` per line", value)
        return parse_config(typing.cast(type[Any], hint), value, where)
    return _parse_scalar(hint, value, where)


def _parse_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list, of any length for `tuple[X, ...]`, else of one value per argument."""
    if not isinstance(value, (list, tuple)):
        _refuse(where, "a list [...]", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        _refuse(where, f"a list of {len(arguments)} values", value)
    return tuple(_parse(hint, item, f"{where}[{index}]")
                 for index, (hint, item) in enumerate(zip(arguments, value, strict=True)))


def _parse_dict(hint: Any, value: Any, where: str) -> dict[str, Any]:
    """A mapping with free keys and values of one type."""
    if not isinstance(value, Mapping):
        _refuse(where, "settings, one `name: value` per line", value)
    return {str(key): _parse(hint, item, f"{where}.{key}") for key, item in value.items()}


def _parse_scalar(hint: Any, value: Any, where: str) -> Any:
    """A bool, int, float or str; bool is no number here."""
    if isinstance(value, int) and not -2**63 <= value < 2**63:
        _refuse(where, "a number between -2**63 and 2**63", value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            _refuse(where, "a finite number", value)
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return _refuse(where, names[hint], value)


def _shown(value: object) -> str:
    """A value in a message: a number of thousands of digits, or a whole file, is cut."""
    if isinstance(value, int) and value.bit_length() > 4096:
        return "a number of more than 1,200 digits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _refuse(where: str, expected: str, value: object) -> typing.NoReturn:
    raise ConfigError(f"{where}: expected {expected}, got {_shown(value)}")
