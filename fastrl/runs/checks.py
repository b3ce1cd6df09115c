"""What stages of several kinds check."""

from typing import Literal

from fastrl.config import check

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


def check_fraction(run: object, name: str) -> None:
    value = getattr(run, name)
    check(value is None or 0 <= value < 1, name, "a share from 0 to below 1", value)


def check_files(run: object, *names: str) -> None:
    for name in names:
        value = getattr(run, name)
        check(len(value) > 0, name, "at least one file", value)


def check_weights(weights: dict[str, float] | None) -> None:
    for source, weight in (weights or {}).items():
        check(weight >= 0, f"source_weights.{source}", "a number of at least 0", weight)
    check(weights is None or sum(weights.values()) > 0, "source_weights",
          "at least one weight above 0", weights)
