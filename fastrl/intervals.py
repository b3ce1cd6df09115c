"""95% intervals of shares and of means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.errors import ConfigError

Z_95 = 1.959964
"""Two-sided 95% point of the normal distribution."""

_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Two-sided 95% points of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """A quantity over seeds."""

    mean: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    by_seed: tuple[float, ...]


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share.

    Args:
        rate: From 0 to 1.
        count: Outcomes behind it, at least 1.
    Source: Wilson 1927, Journal of the American Statistical Association 22.
    Example:
        >>> [round(end, 3) for end in wilson(0.8, 300)]
        [0.751, 0.841]
    """
    z = Z_95
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(
        rate * (1 - rate) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def mean_over_seeds(values: Sequence[float]) -> Pooled:
    """The mean with Student's 95% interval; of one value, the value with an endless one.

    Source: Student 1908, Biometrika 6.
    Example:
        >>> pooled = mean_over_seeds([1.0, 2.0, 3.0])
        >>> round(pooled.low, 3), round(pooled.high, 3)
        (-0.484, 4.484)
    """
    count = len(values)
    if count == 0:
        raise ConfigError("mean_over_seeds: expected at least one value, got none")
    mean = sum(values) / count
    if count == 1:
        return Pooled(mean, -math.inf, math.inf, tuple(values))
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = _t_95(count - 1) * math.sqrt(variance / count)
    return Pooled(mean, mean - half, mean + half, tuple(values))


def rate_over_seeds(rates: Sequence[float], num_prompts: Sequence[int]) -> Pooled:
    """The mean of win rates, with an interval over seeds that is no narrower than one over prompts.

    Student's interval of the seeds' rates has the chance of both, but of a few seeds that agree by
    luck it says too little; Wilson's interval of all prompts together is what no agreement of seeds
    can undercut. The interval spans both.

    Args:
        rates: From 0 to 1, one for each seed.
        num_prompts: Prompts behind each.
    Example:
        >>> pooled = rate_over_seeds([0.8, 0.8, 0.8], [100, 100, 100])
        >>> round(pooled.low, 3), round(pooled.high, 3)
        (0.751, 0.841)
    """
    seeds = mean_over_seeds(rates)
    low, high = wilson(seeds.mean, sum(num_prompts))
    return Pooled(seeds.mean, max(0.0, min(seeds.low, low)), min(1.0, max(seeds.high, high)),
                  seeds.by_seed)


def _t_95(degrees: int) -> float:
    """Student's t; beyond the table the first terms of its expansion, exact to a thousandth."""
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = Z_95
    return (z + (z**3 + z) / (4 * degrees)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2))
