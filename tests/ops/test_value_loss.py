"""value_loss: golden numbers, statistics, masks, and any split into microbatches."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import value_loss


def inputs(M: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, old_values, returns = torch.randn(3, M, dtype=dtype)
    return values.requires_grad_(), old_values, returns, torch.rand(M) > 0.3


def test_golden(golden: SimpleNamespace) -> None:
    for value, old_value, target, expected in golden.VALUE_LOSSES:
        value, old_value, target = (torch.tensor([x], dtype=torch.float64)
                                    for x in (value, old_value, target))
        loss, stats = value_loss(value, old_value, target, torch.tensor([True]),
                                 value_clip_range=0.2)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert stats.value_loss.item() == pytest.approx(expected, abs=1e-12)
        assert stats.clip_fraction.item() == (expected == 0.845)


def test_without_clipping_it_is_half_the_squared_error() -> None:
    values, old_values, returns, mask = inputs(9)
    loss, stats = value_loss(values, old_values, returns, mask, value_clip_range=None)
    torch.testing.assert_close(loss, 0.5 * (values - returns)[mask].square().mean())
    assert stats.clip_fraction.item() == 0


def test_statistics() -> None:
    values, old_values, returns, mask = inputs(30)
    _, stats = value_loss(values, old_values, returns, mask)
    v, r = values.detach()[mask], returns[mask]
    assert stats.count.item() == mask.sum()
    for got, expected in ((stats.values, v.sum()), (stats.returns, r.sum()),
                          (stats.squared_error, (v - r).square().sum()),
                          (stats.squared_returns, r.square().sum())):
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad
    explained = 1 - (v - r).square().mean() / r.var(correction=0)
    torch.testing.assert_close(stats.explained_variance, explained)


def test_statistics_add_up() -> None:
    values, old_values, returns, mask = inputs(9)
    _, whole = value_loss(values, old_values, returns, mask)
    parts = [value_loss(values[s], old_values[s], returns[s], mask[s])[1]
             for s in (slice(0, 4), slice(4, 9))]
    total = parts[0] + parts[1]
    for name in whole.__dataclass_fields__:
        assert getattr(total, name).item() == pytest.approx(getattr(whole, name).item())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_split_gives_the_same_loss_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    values, old_values, returns, mask = inputs(40, dtype)
    count = int(mask.sum())
    whole, _ = value_loss(values, old_values, returns, mask)
    (expected,) = torch.autograd.grad(whole, values)
    parts = [value_loss(values[s], old_values[s], returns[s], mask[s], denominator=count)[0]
             for s in (slice(0, 1), slice(1, 27), slice(27, 40))]
    (gradient,) = torch.autograd.grad(sum(parts), values)
    assert (sum(parts) - whole).abs() <= tolerance * whole.abs()
    assert (gradient - expected).norm() <= tolerance * expected.norm()


def test_gradient_within_the_clip_range_is_the_error() -> None:
    """Where clipped and unclipped are the same number, torch splits the gradient; both halves
    arrive."""
    values = torch.tensor([0.6, 0.4], requires_grad=True)
    loss, _ = value_loss(values, torch.full((2,), 0.5), torch.tensor([2.0, 0.0]),
                         torch.ones(2, dtype=torch.bool), denominator=1)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([-1.4, 0.4]))


def test_masked_tokens_may_hold_anything() -> None:
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([1.0, nan, inf], requires_grad=True)
    loss, stats = value_loss(values, torch.tensor([0.5, nan, inf]), torch.tensor([2.0, nan, -inf]),
                             torch.tensor([True, False, False]))
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(0.845) and gradient[1:].tolist() == [0.0, 0.0]
    assert all(getattr(stats, name).isfinite() for name in stats.__dataclass_fields__)


def test_nothing_counts() -> None:
    values, old_values, returns, mask = inputs(5)
    loss, _ = value_loss(values, old_values, returns, torch.zeros_like(mask))
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros(5, dtype=torch.float64))


def test_gradcheck() -> None:
    values, old_values, returns, mask = inputs(20)
    for clip in (0.2, None):
        assert torch.autograd.gradcheck(
            lambda x, c=clip: value_loss(x, old_values, returns, mask, value_clip_range=c)[0],
            values)


def test_bad_input() -> None:
    one, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"value_loss: expected one shape .* returns \[2\]"):
        value_loss(one, one, one[:2], mask)
    with pytest.raises(ShapeError, match="loss_mask to be bool"):
        value_loss(one, one, one, one)
    with pytest.raises(ConfigError, match="denominator above 0, got 0"):
        value_loss(one, one, one, mask, denominator=0)
    with pytest.raises(ConfigError, match="value_clip_range above 0"):
        value_loss(one, one, one, mask, value_clip_range=0.0)
