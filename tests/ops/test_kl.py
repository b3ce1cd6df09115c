"""kl_estimate: golden numbers, masks, extremes, and expectation against the exact KL."""

from types import SimpleNamespace

import pytest
import torch

from fastrl.errors import ShapeError
from fastrl.ops import kl_estimate


def test_golden(golden: SimpleNamespace) -> None:
    estimates = kl_estimate(torch.tensor([golden.SHAPING_LOGPROBS], dtype=torch.float64),
                            torch.tensor([golden.SHAPING_REF_LOGPROBS], dtype=torch.float64))
    expected = (golden.SHAPING_K1, golden.SHAPING_K2, golden.SHAPING_K3)
    for estimate, numbers in zip(estimates, expected, strict=True):
        torch.testing.assert_close(estimate, torch.tensor([numbers], dtype=torch.float64),
                                   rtol=0, atol=6e-9)


def test_masked_positions_are_zero() -> None:
    nan = float("nan")
    mask = torch.tensor([True, False])
    for estimate in kl_estimate(torch.tensor([-1.0, nan]), torch.tensor([-2.0, nan]), mask):
        assert estimate[0] > 0 and estimate[1] == 0


def test_equal_logprobs_give_exactly_zero() -> None:
    logprobs = torch.randn(100)
    for estimate in kl_estimate(logprobs, logprobs):
        assert torch.equal(estimate, torch.zeros(100))


def test_extremes_stay_finite_and_k3_is_never_negative() -> None:
    logprobs = torch.tensor([-1e4, 0.0, -3.0, -1e-7])
    k1, k2, k3 = kl_estimate(logprobs, torch.tensor([0.0, -1e4, -3.0 + 1e-6, 0.0]))
    assert all(k.isfinite().all() for k in (k1, k2, k3))
    assert (k3 >= 0).all() and k3[1] == 9999.0 and k3[0] > 1e8


def test_expectations_under_the_policy() -> None:
    """Summed over the vocabulary with the policy's probabilities: k1 and k3 give the exact KL."""
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(dim=-1)
    exact = (policy.exp() * (policy - reference)).sum()
    k1, k2, k3 = ((policy.exp() * k).sum() for k in kl_estimate(policy, reference))
    assert k1.item() == pytest.approx(exact.item(), rel=1e-12)
    assert k3.item() == pytest.approx(exact.item(), rel=1e-12)
    assert k2.item() != pytest.approx(exact.item(), rel=1e-3)  # biased


def test_gradients() -> None:
    inputs = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x[0], x[1]), inputs)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"kl_estimate: expected one shape"):
        kl_estimate(torch.ones(2), torch.ones(3))
    with pytest.raises(ShapeError, match="expected mask to be bool"):
        kl_estimate(torch.ones(2), torch.ones(2), torch.ones(2))
    with pytest.raises(ShapeError, match=r"mask \[3\]"):
        kl_estimate(torch.ones(2), torch.ones(2), torch.ones(3, dtype=torch.bool))
