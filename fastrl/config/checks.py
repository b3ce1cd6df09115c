"""Checks that settings make when they are created."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from fastrl.errors import ConfigError
from fastrl.field_types import described, fits


def check(condition: bool, field: str, expected: str, value: object) -> None:
    """Raise ConfigError when a field's value is out of bounds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {value!r}; change {field}")


def check_types(config: object, cls: type[Any]) -> None:
    """Raise ConfigError where a value is not of the type that its field has in `cls`."""
    for setting in dataclasses.fields(cls):
        value = getattr(config, setting.name)
        check(fits(setting.type, value), setting.name, described(setting.type), value)


def check_positive(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or value > 0, name, "a number above 0", value)


def check_not_negative(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 0, name, "a number of at least 0", value)

UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}


def read_bytes(text: str, field: str) -> int:
    """Bytes of a number with its unit, such as 24GiB.

    Raises:
        ConfigError: when the unit is missing or another, or the number is not above 0.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})\s*", text)
    num_bytes = int(float(found[1]) * UNITS[found[2]]) if found else 0
    check(num_bytes > 0, field, f"a number above 0 and a unit ({', '.join(UNITS)}), such as 24GiB",
          text)
    return num_bytes


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested values, ready for YAML or JSON."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result
