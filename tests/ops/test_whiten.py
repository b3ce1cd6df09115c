"""whiten: golden numbers, masks, given moments, gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ShapeError
from fastrl.ops import compute_gae, whiten
from fastrl.ops.whiten import row_moments

VALUES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), -7.0]])
MASK = torch.tensor([[True, True, False], [True, False, True]])


def test_golden(golden: SimpleNamespace) -> None:
    advantages = torch.tensor([golden.GAE_ADVANTAGES[0.95]])
    expected = torch.tensor([golden.GAE_WHITENED_095])
    everything = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(advantages, everything), expected, rtol=0, atol=2e-6)


def test_golden_with_moments(golden: SimpleNamespace) -> None:
    """GAE, then whitening without another look for mean and variance."""
    rewards, values = torch.tensor([golden.GAE_REWARDS]), torch.tensor([golden.GAE_VALUES])
    everything = torch.ones(1, 4, dtype=torch.bool)
    advantages, _, moments = compute_gae(rewards, values, everything, return_moments=True)
    whitened = whiten(advantages, everything, moments=moments)
    # The golden numbers come from advantages of four digits.
    torch.testing.assert_close(whitened, torch.tensor([golden.GAE_WHITENED_095]), rtol=0, atol=1e-3)


def test_keeps_the_mean_golden(golden: SimpleNamespace) -> None:
    values = torch.tensor(golden.WHITEN_VALUES)
    whitened = whiten(values, torch.ones(3, 3, dtype=torch.bool), keep_mean=True)
    expected = torch.tensor(golden.WHITEN_KEEP_MEAN_FIRST_ROW)
    torch.testing.assert_close(whitened[0], expected, rtol=0, atol=6e-5)
    assert whitened.mean().item() == pytest.approx(1.6, abs=1e-5)


def test_ignores_what_is_masked() -> None:
    whitened = whiten(VALUES, MASK)
    alone = whiten(VALUES[MASK], torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(whitened[MASK], alone)
    assert torch.equal(whitened[~MASK], torch.zeros(2))


def test_equal_values_and_large_offsets() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    assert torch.equal(whiten(torch.full((4,), 3.0), everything), torch.zeros(4))
    # A sum of squares in float32 would lose this variance of 1 beside a mean of 4096 squared.
    shifted = torch.tensor([4095.0, 4097.0, 4095.0, 4097.0])
    for moments in (None, row_moments(shifted.reshape(2, 2), everything.reshape(2, 2))):
        torch.testing.assert_close(whiten(shifted, everything, moments=moments),
                                   torch.tensor([-1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("keep_mean", [False, True])
def test_moments_of_parts_are_those_of_the_whole(keep_mean: bool) -> None:
    values = 3 + torch.randn(5, 9, dtype=torch.float64)
    mask = torch.rand(5, 9) > 0.3
    mask[2] = False
    moments = row_moments(values.masked_fill(~mask, torch.nan), mask)
    expected = whiten(values, mask, keep_mean=keep_mean)
    got = whiten(values, mask, keep_mean=keep_mean, moments=moments)
    torch.testing.assert_close(got, expected)
    piece = whiten(values[3:], mask[3:], keep_mean=keep_mean, moments=moments)
    assert torch.equal(piece, got[3:])


def test_nothing_is_kept() -> None:
    values = torch.full((2, 3), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for moments in (None, row_moments(values, nothing)):
        whitened = whiten(values, nothing, keep_mean=True, moments=moments)
        (gradient,) = torch.autograd.grad(whitened.sum(), values)
        assert torch.equal(whitened, torch.zeros(2, 3))
        assert torch.equal(gradient, torch.zeros(2, 3))


def test_gradients() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    moments = row_moments(values.detach(), mask)
    for keep_mean in (False, True):
        for given in (None, moments):
            assert torch.autograd.gradcheck(
                lambda v, k=keep_mean, m=given: whiten(v, mask, keep_mean=k, moments=m), values)


@pytest.mark.parametrize("moments", [None, torch.tensor([[3.0, 300.0, 2.0]])])
def test_half_precision_is_computed_in_float32(moments: Tensor | None) -> None:
    values, mask = torch.tensor([99.0, 100.0, 101.0, 7.0]), torch.tensor([True, True, True, False])
    values[0] += 0.5
    half = values.bfloat16()
    assert torch.equal(whiten(half, mask, moments=moments), whiten(half.float(), mask,
                                                                  moments=moments))


def test_nan_stays_in_the_mask() -> None:
    values, mask = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, True, False])
    assert whiten(values, mask).isnan().tolist() == [True, True, False]


def test_bad_input() -> None:
    one, mask = torch.ones(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ShapeError, match="whiten: expected mask to be bool"):
        whiten(one, one)
    with pytest.raises(ShapeError, match=r"moments \[P, 3\] as compute_gae .* got \[3\]"):
        whiten(one, mask, moments=torch.ones(3))
    with pytest.raises(ShapeError, match="moments to be floating point"):
        whiten(one, mask, moments=torch.ones(1, 3, dtype=torch.int64))
