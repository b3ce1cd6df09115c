"""masked_sum, masked_mean, whiten."""

from types import SimpleNamespace

import pytest
import torch

from fastrl.errors import ShapeError
from fastrl.ops import masked_mean, masked_sum, whiten

VALUES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), -7.0]])
MASK = torch.tensor([[True, True, False], [True, False, True]])


def test_masked_positions_do_not_exist() -> None:
    assert masked_sum(VALUES, MASK).item() == 0.0
    assert masked_mean(VALUES, MASK).item() == 0.0
    assert masked_mean(VALUES[:, :1], MASK[:, :1]).item() == 2.5


def test_an_empty_mask_gives_zeros_with_zero_gradient() -> None:
    values = torch.full((2, 3), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(values, nothing).item() == masked_mean(values, nothing).item() == 0.0
    whitened = whiten(values, nothing, keep_mean=True)
    assert torch.equal(whitened, torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(masked_mean(values, nothing) + whitened.sum(), values)
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_whiten_golden(golden: SimpleNamespace) -> None:
    advantages = torch.tensor([golden.GAE_ADVANTAGES[0.95]])
    expected = torch.tensor([golden.GAE_WHITENED_095])
    everything = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(advantages, everything), expected, rtol=0, atol=2e-6)


def test_whiten_keeps_the_mean_golden(golden: SimpleNamespace) -> None:
    values = torch.tensor(golden.WHITEN_VALUES)
    whitened = whiten(values, torch.ones(3, 3, dtype=torch.bool), keep_mean=True)
    expected = torch.tensor(golden.WHITEN_KEEP_MEAN_FIRST_ROW)
    torch.testing.assert_close(whitened[0], expected, rtol=0, atol=6e-5)
    assert whitened.mean().item() == pytest.approx(1.6, abs=1e-5)


def test_whiten_ignores_what_is_masked() -> None:
    whitened = whiten(VALUES, MASK)
    alone = whiten(VALUES[MASK], torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(whitened[MASK], alone)
    assert torch.equal(whitened[~MASK], torch.zeros(2))


def test_whiten_equal_values_and_large_offsets() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    assert torch.equal(whiten(torch.full((4,), 3.0), everything), torch.zeros(4))
    # A sum of squares in float32 would lose this variance of 1 beside a mean of 4096 squared.
    shifted = torch.tensor([4095.0, 4097.0, 4095.0, 4097.0])
    torch.testing.assert_close(whiten(shifted, everything), torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_gradients() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    for keep_mean in (False, True):
        assert torch.autograd.gradcheck(lambda v, k=keep_mean: whiten(v, mask, keep_mean=k), values)
    assert torch.autograd.gradcheck(lambda v: masked_mean(v, mask), values)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"masked_sum: expected one shape .* mask \[3\]"):
        masked_sum(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="whiten: expected mask to be bool"):
        whiten(torch.ones(2), torch.ones(2))
    with pytest.raises(ShapeError, match="masked_mean: expected values to be floating point"):
        masked_mean(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
