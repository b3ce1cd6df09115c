"""Intervals of shares and of means over seeds, and evaluations pooled over seeds."""

import math

import pytest

from fastrl.errors import ConfigError
from fastrl.intervals import mean_over_seeds, rate_over_seeds, wilson
from fastrl.pooling import pool_evaluations


def test_wilson_against_a_published_example():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81 of 263 and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("values, half", [
    ([0.0, 2.0], 12.7062),              # t of 1 degree; standard error 1
    ([1.0, 2.0, 3.0], 4.3027 / 3**0.5),
    ([-1.0, 1.0] * 8, 2.1314 * (16 / 15 / 16)**0.5),  # beyond the table: t of 15 degrees
])
def test_the_interval_of_a_mean_is_students(values, half):
    pooled = mean_over_seeds(values)
    assert pooled.high - pooled.mean == pytest.approx(half, rel=1e-3)
    assert pooled.mean - pooled.low == pytest.approx(half, rel=1e-3)
    assert pooled.by_seed == tuple(values)


def test_one_seed_says_nothing_of_others():
    assert mean_over_seeds([0.5]).low == -math.inf
    assert rate_over_seeds([0.5], [100]).low == 0 and rate_over_seeds([0.5], [100]).high == 1
    with pytest.raises(ConfigError, match="at least one value"):
        mean_over_seeds([])


def test_seeds_that_agree_by_luck_have_the_interval_of_their_prompts():
    agreeing = rate_over_seeds([0.8, 0.8, 0.8], [100, 100, 100])
    assert (agreeing.low, agreeing.high) == pytest.approx(wilson(0.8, 300))
    apart = rate_over_seeds([0.6, 0.7, 0.8], [100, 100, 100])  # Student: .1 / sqrt 3 * 4.3027
    assert (apart.low, apart.high) == pytest.approx((0.7 - 0.24842, 0.7 + 0.24842), abs=1e-4)
    assert rate_over_seeds([0.5, 1.0], [9, 9]).high == 1


def evaluation(rate, kl, opponent="start"):
    return {"win_rates": [{"model": "ppo", "opponent": opponent, "rate": rate, "num_prompts": 50}],
            "models": {"ppo": {"kl": {"k1": kl}, "score_mean": 2 * rate, "response_length": 8.0}}}


def test_evaluations_of_seeds_are_pooled():
    (wins,) = pool_evaluations([evaluation(0.6, 1.0), evaluation(0.8, 3.0)])
    assert (wins.model, wins.opponent) == ("ppo", "start")
    assert wins.rate.mean == pytest.approx(0.7) and wins.rate.by_seed == (0.6, 0.8)
    assert wins.kl.mean == 2.0 and wins.kl.by_seed == (1.0, 3.0)
    assert wins.facts == {"score_mean": pytest.approx(1.4), "response_length": 8.0}
    with pytest.raises(ConfigError, match="evaluations of the same pairs"):
        pool_evaluations([evaluation(0.6, 1.0), evaluation(0.8, 3.0, "other")])
