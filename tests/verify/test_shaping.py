"""Rewards for length and form."""

import pytest

from fastrl.errors import ConfigError
from fastrl.verify import format_reward, length_reward


def test_length() -> None:
    reward = length_reward(10, tolerance=2)
    assert reward([""] * 4, ["x" * 10, "x" * 12, "x" * 7, ""]) == [0, 0, -0.1, -0.8]


def test_format() -> None:
    reward = format_reward("<a>.*</a>")
    assert reward([""] * 3, ["<a>two\nlines</a>", "<a>x</a> and more", ""]) == [1, 0, 0]


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="target of at least 1"):
        length_reward(0)
    with pytest.raises(ConfigError, match="tolerance of at least 0"):
        length_reward(3, -1)
    with pytest.raises(ConfigError, match=r"regular expression, got '\('"):
        format_reward("(")
