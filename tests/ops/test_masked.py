"""masked_sum, masked_mean."""

import pytest
import torch

from fastrl.errors import ShapeError
from fastrl.ops import masked_mean, masked_sum

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
    (gradient,) = torch.autograd.grad(masked_mean(values, nothing), values)
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_gradients() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    assert torch.autograd.gradcheck(lambda v: masked_mean(v, mask), values)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"masked_sum: expected one shape .* mask \[3\]"):
        masked_sum(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="masked_sum: expected mask to be bool"):
        masked_sum(torch.ones(2), torch.ones(2))
    with pytest.raises(ShapeError, match="masked_mean: expected values to be floating point"):
        masked_mean(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
