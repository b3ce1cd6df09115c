"""Settings of rewards, as recipes and command lines give them; objects come from fastrl.stages."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastrl.config import check
from fastrl.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardPart:
    """One reward of a weighted sum: a reward model, a function or a labeler."""

    model: str | None = None
    """Folder of a reward model."""
    function: str | None = None
    """gsm8k, ifeval, length, format, or `path/to/file.py:name`; the file is executed."""
    labeler: str | None = None
    """Gold score of `fastrl.labelers`, for studies."""
    arguments: dict[str, Any] | None = None
    """Arguments of length (target, tolerance) and format (pattern)."""
    weight: float = 1.0
    """Factor of the scores; below 0 it is a penalty."""
    source_weights: dict[str, float] | None = None
    """Factor for prompts of a `source`, in place of `weight`; with 0 they are not scored."""
    timeout_s: float | None = 600.0
    """Seconds that a call of the function may take; None: as long as it likes, in the main
    thread."""

    def __post_init__(self) -> None:
        given = [name for name in ("model", "function", "labeler") if getattr(self, name)]
        check(len(given) == 1, "model", "exactly one of model, function and labeler",
              given or "none of them")
        check(self.arguments is None or self.function is not None, "arguments",
              "none without a function", self.arguments)
        check(self.timeout_s is None or self.timeout_s > 0, "timeout_s",
              "seconds above 0, or null", self.timeout_s)
        factors = [self.weight, *(self.source_weights or {}).values()]
        check(any(factors), "weight", "a weight other than 0, here or in source_weights", factors)


def split_function(name: str) -> tuple[str | None, str]:
    """(file, function) of `path/to/file.py:function`; (None, name) of a name without a file."""
    path, colon, function = name.rpartition(":")
    return (path, function) if colon and path.endswith(".py") else (None, name)


def join_parts(model: str | None, function: str | None, parts: Mapping[str, RewardPart] | None
               ) -> dict[str, RewardPart]:
    """All rewards of a stage by name: the shorthands `reward_model` and `reward_function` first.

    Raises:
        ConfigError: when a name is there twice, or cannot be part of a metric's name.
    """
    joined: list[tuple[str, RewardPart]] = []
    if model is not None:
        joined.append(("reward_model", RewardPart(model=model)))
    if function is not None:
        joined.append((split_function(function)[1], RewardPart(function=function)))
    joined += (parts or {}).items()
    names = [name for name, _ in joined]
    for name in names:
        check(_NAME.fullmatch(name) is not None, "rewards", "names of letters, digits, _ and -",
              name)
        if names.count(name) > 1:
            raise ConfigError(f"rewards: expected distinct names, got {name!r} twice (reward_model "
                              "and the name of reward_function count); rename it")
    return dict(joined)
