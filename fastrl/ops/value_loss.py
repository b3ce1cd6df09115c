"""value_loss: squared error of the critic, with its change clipped.

    V_c = clip(V, V_old - eps, V_old + eps)
    loss = 0.5 sum_mask max((V - returns)^2, (V_c - returns)^2) / denominator
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_float,
    check_mask,
    check_positive,
    check_shape,
    check_values,
    wide_dtype,
)

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class ValueStats:
    """Detached sums over the True positions of the mask, float64 scalars.

    Divide a sum by `count` for the mean. Statistics of microbatches are combined with `+`.
    """

    count: Tensor
    """Number of True positions."""
    value_loss: Tensor
    """Losses before division by the denominator."""
    clip_fraction: Tensor
    """Number of tokens whose loss the clip changed."""
    squared_error: Tensor
    """(values - returns)^2, not clipped."""
    values: Tensor
    """Values of the critic."""
    returns: Tensor
    """Targets."""
    squared_returns: Tensor
    """Targets squared."""

    def __add__(self, other: "ValueStats") -> "ValueStats":
        """Statistics of both microbatches together."""
        return ValueStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    @property
    def explained_variance(self) -> Tensor:
        """1 - MSE / Var(returns): 1 is perfect, 0 no better than the mean."""
        variance = self.squared_returns / self.count - (self.returns / self.count).square()
        return 1 - self.squared_error / self.count / variance


def value_loss_reference(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    value_clip_range: float | None = 0.2,
) -> tuple[Tensor, ValueStats]:
    """value_loss in plain torch."""
    dtype = wide_dtype(values.dtype)
    values, old_values, returns = (
        x.to(dtype).masked_fill(~loss_mask, 0.0) for x in (values, old_values, returns)
    )
    errors = (values - returns).square()
    losses, is_clipped = 0.5 * errors, torch.zeros_like(loss_mask)
    if value_clip_range is not None:
        near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
        clipped_errors = (near - returns).square()
        losses, is_clipped = 0.5 * torch.maximum(errors, clipped_errors), clipped_errors > errors
    divisor = loss_mask.sum().clamp(min=1) if denominator is None else denominator

    def total(x: Tensor) -> Tensor:
        return x.detach().double().sum()

    stats = ValueStats(
        count=total(loss_mask), value_loss=total(losses), clip_fraction=total(is_clipped),
        squared_error=total(errors), values=total(values), returns=total(returns),
        squared_returns=total(returns.double().square()),
    )
    return losses.sum() / divisor, stats


def _check(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor,
    denominator: float | None, value_clip_range: float | None,
) -> None:
    op = "value_loss"
    floats = {"values": values, "old_values": old_values, "returns": returns}
    check_shape(op, {**floats, "loss_mask": loss_mask}, ndim=values.dim(), layout="[...]")
    check_float(op, **floats)
    check_mask(op, loss_mask=loss_mask)
    check_positive(op, denominator=denominator, value_clip_range=value_clip_range)
    check_values(op, loss_mask, **floats)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    value_clip_range: float | None = 0.2,
    backend: str | None = None,
) -> tuple[Tensor, ValueStats]:
    """The clipped value loss of PPO, as a token mean, and its statistics.

        V_c = clip(V, V_old - eps, V_old + eps)
        loss = 0.5 sum_mask max((V - returns)^2, (V_c - returns)^2) / denominator

    Args:
        values: [B, T] or [M] float. Current critic; differentiable.
        old_values: Same shape. Critic when the batch was made.
        returns: Same shape. Targets.
        loss_mask: Same shape, bool. True for tokens that count; elsewhere anything, NaN too.
        denominator: Tokens of the whole minibatch; None: the True positions of this mask.
        value_clip_range: eps; None: plain squared error.
        backend: See fastrl.backends.
    Returns:
        loss: Scalar float32 (float64 for float64); 0 when nothing counts. triton: differentiable
            once, by values.
        stats: ValueStats.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when denominator or value_clip_range is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: a few passes over [M] (triton: one, and one over the gradient).
    Source: Ziegler et al. 2019 (arXiv 1909.08593), code.
    Example:
        >>> one = torch.ones(1)
        >>> loss, stats = value_loss(one, 0.5 * one, 2 * one, torch.tensor([True]))
        >>> round(float(loss), 4), float(stats.clip_fraction)
        (0.845, 1.0)
    """
    _check(values, old_values, returns, loss_mask, denominator, value_clip_range)
    name = choose("value_loss", "value_loss", PREFERENCE, values.device.type, values.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import value_loss as kernel

        loss, sums = kernel.value_loss(values, old_values, returns, loss_mask,
                                       denominator=denominator, value_clip_range=value_clip_range)
        return loss, ValueStats(*sums)
    return value_loss_reference(values, old_values, returns, loss_mask, denominator=denominator,
                                value_clip_range=value_clip_range)
