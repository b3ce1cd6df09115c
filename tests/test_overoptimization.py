"""The two curves of over-optimisation: points of a known curve, and peaks by hand."""

import math

import pytest

from fastrl.errors import ShapeError
from fastrl.overoptimization import Fit, fit_gain

DISTANCES = (0.25, 0.5, 1.0, 1.5, 2.5, 4.0)


def test_points_of_the_curves_give_their_coefficients_back():
    # R_bon(d) = d (1.2 - 0.3 d), R_RL(d) = d (0.9 - 0.5 log d), written out at each distance.
    bon = fit_gain("best_of_n", DISTANCES, [0.28125, 0.525, 0.9, 1.125, 1.125, 0.0])
    assert (bon.a, bon.b) == pytest.approx((1.2, 0.3)) and bon.rms_error < 1e-12
    rl = fit_gain("rl", (1.0, math.e, math.e**2), [0.9, 0.4 * math.e, -0.1 * math.e**2])
    assert (rl.a, rl.b) == pytest.approx((0.9, 0.5)) and rl.rms_error < 1e-12


def test_golden_peaks():
    assert Fit("best_of_n", 2.0, 0.5, 0.0).peak == pytest.approx((2.0, 2.0))
    assert Fit("best_of_n", 1.2, 0.3, 0.0).peak == pytest.approx((2.0, 1.2))
    # exp(3 - 1) and 0.5 exp(3 - 1)
    assert Fit("rl", 1.5, 0.5, 0.0).peak == pytest.approx((7.389056, 3.694528))
    for form, a, b in (("best_of_n", 1.0, 0.0), ("best_of_n", -1.0, 0.5), ("rl", 1.0, -0.1),
                       ("rl", 1.0, 1e-4)):
        assert Fit(form, a, b, 0.0).peak is None


@pytest.mark.parametrize("form, a, b", [("best_of_n", 1.3, 0.2), ("rl", 1.3, 0.6)])
def test_a_peak_is_higher_than_what_is_beside_it(form, a, b):
    fit = Fit(form, a, b, 0.0)
    distance, gain = fit.peak
    assert fit(distance) == pytest.approx(gain)
    assert fit(distance * 0.99) < gain > fit(distance * 1.01) and fit(0.0) == 0


def test_noise_moves_a_fit_as_least_squares_does():
    gains = [0.3, 0.5, 0.95, 1.1, 1.15, -0.05]
    fit = fit_gain("best_of_n", DISTANCES, gains)
    error = [fit(d) - r for d, r in zip(DISTANCES, gains, strict=True)]
    assert fit.rms_error == pytest.approx(math.sqrt(sum(e * e for e in error) / 6))
    for da, db in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        other = Fit("best_of_n", fit.a + da, fit.b + db, 0.0)
        assert sum((other(d) - r)**2 for d, r in zip(DISTANCES, gains, strict=True)) > sum(
            e * e for e in error)


def test_two_distances_above_0_are_needed():
    assert fit_gain("rl", [0.0, 0.0, 1.0, 1.0], [0.0, 0.1, 0.5, 0.6]) is None
    assert fit_gain("rl", [], []) is None
    with pytest.raises(ShapeError, match="as many gains as distances"):
        fit_gain("rl", [1.0], [1.0, 2.0])
    with pytest.raises(ShapeError, match="of at least 0"):
        fit_gain("rl", [-1.0, 1.0], [1.0, 2.0])
