"""How a score that is wanted follows the distance from the reference: two fits with a peak.

With d = sqrt(KL(policy || reference)) and R the gain in score over the reference, R(0) = 0:

    best of n    R(d) = d (a - b d)        highest at a / (2 b), a^2 / (4 b) there
    RL           R(d) = d (a - b log d)    highest at exp(a / b - 1), b d there

Source: Gao et al. 2022 (arXiv 2210.10760), section 3; the peaks follow from R'(d) = 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fastrl.errors import ShapeError

Form = Literal["best_of_n", "rl"]


@dataclass(frozen=True, slots=True)
class Fit:
    """One of the two curves with its coefficients."""

    form: Form
    a: float
    """Gain per unit of distance at the start (of RL: at d = 1)."""
    b: float
    """How fast it bends down; where it is not above 0 there is no peak."""
    rms_error: float
    """Root of the mean squared distance from the points, in units of the score."""

    def __call__(self, distance: float) -> float:
        """The gain at a distance of at least 0."""
        if distance == 0:
            return 0.0
        bend = distance if self.form == "best_of_n" else math.log(distance)
        return distance * (self.a - self.b * bend)

    @property
    def peak(self) -> tuple[float, float] | None:
        """(distance, gain) where the curve is highest; None where it never falls."""
        if self.b <= 0 or (self.form == "best_of_n" and self.a <= 0):
            return None
        if self.form == "best_of_n":
            return self.a / (2 * self.b), self.a**2 / (4 * self.b)
        exponent = self.a / self.b - 1
        if exponent > 700:  # beyond what a float holds: no peak within reach
            return None
        return math.exp(exponent), self.b * math.exp(exponent)


def fit_gain(form: Form, distances: Sequence[float], gains: Sequence[float]) -> Fit | None:
    """The curve with the least squared error; linear in a and b, so there is one.

    Args:
        form: best_of_n or rl.
        distances: sqrt(KL) of at least 0; points at 0 say nothing and are left out.
        gains: Score minus that of the reference, one for each.
    Returns:
        The fit; None with fewer than two different distances above 0.
    Raises:
        ShapeError: when there are not as many gains as distances, or a distance is below 0.
    Example:
        >>> fit = fit_gain("best_of_n", [1.0, 2.0, 3.0], [1.5, 2.0, 1.5])
        >>> round(fit.a, 6), round(fit.b, 6), round(fit.peak[0], 6)
        (2.0, 0.5, 2.0)
    """
    if len(distances) != len(gains) or min(distances, default=0.0) < 0:
        raise ShapeError(f"fit_gain: expected as many gains as distances, and these of at least 0, "
                         f"got {len(gains)} and {list(distances)}; pass sqrt(KL), 0 where an "
                         "estimate of KL is below")
    points = [(d, r) for d, r in zip(distances, gains, strict=True) if d > 0]
    if len({d for d, _ in points}) < 2:
        return None
    bend: Callable[[float], float] = (lambda d: d) if form == "best_of_n" else math.log
    matrix = torch.tensor([[d, -d * bend(d)] for d, _ in points], dtype=torch.float64)
    target = torch.tensor([[r] for _, r in points], dtype=torch.float64)
    # gelsd, since points that lie close together make the columns almost parallel.
    solution = torch.linalg.lstsq(matrix, target, driver="gelsd").solution
    residual = float((matrix @ solution - target).square().mean().sqrt())
    return Fit(form, float(solution[0]), float(solution[1]), residual)
