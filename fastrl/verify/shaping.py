"""Rewards for length and form, to be added to others with a small weight."""

import re
from collections.abc import Callable, Sequence

from fastrl.errors import ConfigError

RewardFunction = Callable[[Sequence[str], Sequence[str]], list[float]]


def length_reward(target: int, tolerance: int = 0) -> RewardFunction:
    """A reward function of a completion's length in characters.

        score = -max(0, |length - target| - tolerance) / target

    Args:
        target: Length that scores 0; at least 1.
        tolerance: Characters on either side that cost nothing.
    Raises:
        ConfigError: when a number is out of bounds.
    """
    if target < 1 or tolerance < 0:
        raise ConfigError(f"length_reward: expected a target of at least 1 and a tolerance of at "
                          f"least 0, got {target} and {tolerance}")

    def length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [-max(0, abs(len(text) - target) - tolerance) / target for text in completions]

    return length


def format_reward(pattern: str) -> RewardFunction:
    """A reward function: 1 where the whole completion matches a regular expression, else 0.

    Args:
        pattern: As Python's `re` takes it; `.` matches line ends too.
    Raises:
        ConfigError: when the pattern is not one.
    Example:
        >>> reward = format_reward("<think>.*</think><answer>.*</answer>")
        >>> reward([""], ["<think>2 + 2</think><answer>4</answer>"])
        [1.0]
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"format_reward: expected a regular expression, got {pattern!r}: "
                          f"{error}") from error

    def form(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [1.0 if compiled.fullmatch(text) else 0.0 for text in completions]

    return form
