"""shape_rewards: KL on every token, the score on the last."""

from types import SimpleNamespace

import pytest
import torch

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import shape_rewards


def golden_call(golden: SimpleNamespace, **options) -> tuple:
    logprobs = torch.tensor([golden.SHAPING_LOGPROBS], dtype=torch.float64)
    ref_logprobs = torch.tensor([golden.SHAPING_REF_LOGPROBS], dtype=torch.float64)
    scores = torch.tensor([golden.SHAPING_SCORE], dtype=torch.float64)
    everything = torch.ones(1, 3, dtype=torch.bool)
    return shape_rewards(scores, logprobs, ref_logprobs, everything,
                         kl_coef=golden.SHAPING_KL_COEF, **options)


def test_golden(golden: SimpleNamespace) -> None:
    rewards, kl = golden_call(golden)
    for result, numbers in ((rewards, golden.SHAPING_REWARDS), (kl, golden.SHAPING_K1)):
        torch.testing.assert_close(result, torch.tensor([numbers], dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimator_is_an_option(golden: SimpleNamespace, estimator: str) -> None:
    rewards, kl = golden_call(golden, estimator=estimator)
    expected = torch.tensor([getattr(golden, f"SHAPING_{estimator.upper()}")], dtype=torch.float64)
    torch.testing.assert_close(kl, expected, rtol=0, atol=6e-9)
    scores = torch.tensor([[0.0, 0.0, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(rewards, scores - 0.02 * expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_all_estimates_with_the_rewards(golden: SimpleNamespace, estimator: str) -> None:
    rewards, estimates = golden_call(golden, estimator=estimator, return_estimates=True)
    assert torch.equal(rewards, golden_call(golden, estimator=estimator)[0])
    expected = (golden.SHAPING_K1, golden.SHAPING_K2, golden.SHAPING_K3)
    for got, numbers in zip(estimates, expected, strict=True):
        torch.testing.assert_close(got, torch.tensor([numbers], dtype=torch.float64), rtol=0,
                                   atol=6e-9)


def test_the_score_goes_to_the_last_true_position() -> None:
    mask = torch.tensor([[True, False, False],   # padding after one token
                         [True, False, True],    # a hole
                         [False, True, False],
                         [False, False, False],  # no token: no score
                         [True, True, True]])
    zeros = torch.zeros(5, 3)
    rewards, kl = shape_rewards(torch.arange(1.0, 6.0), zeros, zeros, mask, kl_coef=0.5)
    assert rewards.tolist() == [[1, 0, 0], [0, 0, 2], [0, 3, 0], [0, 0, 0], [0, 0, 5]]
    assert torch.equal(kl, zeros)


def test_masked_positions_may_hold_anything() -> None:
    logprobs = torch.tensor([[-1.0, float("nan")]])
    rewards, kl = shape_rewards(torch.ones(1), logprobs, torch.tensor([[-2.0, float("inf")]]),
                                torch.tensor([[True, False]]), kl_coef=0.25)
    assert rewards.tolist() == [[0.75, 0.0]] and kl.tolist() == [[1.0, 0.0]]


def test_no_gradient_flows() -> None:
    logprobs = torch.randn(2, 3, requires_grad=True)
    rewards, kl = shape_rewards(torch.ones(2), logprobs, torch.zeros(2, 3),
                                torch.ones(2, 3, dtype=torch.bool), kl_coef=0.1)
    assert not rewards.requires_grad and not kl.requires_grad


def test_bad_input() -> None:
    BT, everything = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"expected scores \[B\] with B = 2, got \[3\]"):
        shape_rewards(torch.ones(3), BT, BT, everything, kl_coef=0.1)
    with pytest.raises(ShapeError, match="expected one shape"):
        shape_rewards(torch.ones(2), BT, BT[:, :2], everything, kl_coef=0.1)
    with pytest.raises(ShapeError, match="response_mask to be bool"):
        shape_rewards(torch.ones(2), BT, BT, BT, kl_coef=0.1)
    with pytest.raises(ConfigError, match="estimator k1, k2 or k3, got 'k4'"):
        shape_rewards(torch.ones(2), BT, BT, everything, kl_coef=0.1, estimator="k4")
