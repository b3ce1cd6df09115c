"""AdamW on one flat piece of weights, gradients and moments, in memory that was taken before.

Every product and sum is rounded by itself, in one order, see `fastrl.ops.adamw`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.checks import wide_dtype
from fastrl.state_formats import (
    BLOCK_SIZE,
    decode_moment_into,
    encode_moment_into,
    exact_sqrt,
    join_master_into,
    num_blocks,
    split_master_into,
)


class Factors(NamedTuple):
    """Scalars of a step in the type of the arithmetic; as tensors they cost half as much."""

    keep_first: Tensor
    add_first: Tensor
    keep_second: Tensor
    add_second: Tensor
    step_size: Tensor
    epsilon: Tensor
    decay: Tensor | None
    scale: Tensor | None


def factors_of(
    dtype: torch.dtype, step: Tensor, learning_rate: float, betas: tuple[float, float],
    epsilon: float, weight_decay: float, scale: Tensor | None,
) -> Factors:
    """The scalars of step number `step` in `dtype`; arguments as in `fastrl.ops.adamw_step`."""
    root = (1 - betas[1] ** step.double()).sqrt()
    step_size = learning_rate * root / (1 - betas[0] ** step.double())
    decay = 1 - learning_rate * weight_decay

    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device="cpu")

    return Factors(
        constant(betas[0]), constant(1 - betas[0]), constant(betas[1]), constant(1 - betas[1]),
        step_size.to(dtype), (epsilon * root).to(dtype), constant(decay) if decay != 1 else None,
        None if scale is None else scale.to(dtype))


def _update(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, factors: Factors, decays: bool,
    one: Tensor, other: Tensor,
) -> None:
    """The formula on flat tensors of one wide type; `one` and `other` are scratch of their size."""
    if factors.scale is not None:
        gradient = torch.mul(gradient, factors.scale, out=one)
    torch.mul(gradient, factors.add_first, out=other)
    m.mul_(factors.keep_first).add_(other)
    torch.mul(gradient, factors.add_second, out=other).mul_(gradient)
    v.mul_(factors.keep_second).add_(other)
    exact_sqrt(v, out=other).add_(factors.epsilon)
    torch.mul(m, factors.step_size, out=one)
    if decays and factors.decay is not None:
        weight.mul_(factors.decay)
    weight.addcdiv_(one, other, value=-1)


class Scratch:
    """All temporaries of `update_piece`, to be taken before the first element changes.

    Args:
        size: Elements of the largest piece.
        like: A stored weight, for its device.
    """

    def __init__(self, size: int, like: Tensor, *, is_narrow: bool, is_8bit: bool) -> None:
        blocks = num_blocks(size)
        self.floats = torch.empty(2 + is_narrow + 2 * is_8bit, blocks * BLOCK_SIZE,
                                  dtype=wide_dtype(like.dtype), device=like.device)
        self.mask = torch.empty(size if is_narrow else blocks * is_8bit, dtype=torch.bool,
                                device=like.device)
        self.units = torch.empty(blocks * is_8bit, device=like.device)


def update_piece(
    stored: Sequence[Tensor], scales: tuple[Tensor, ...], factors: Factors, decays: bool,
    scratch: Scratch,
) -> None:
    """The step on a flat piece, without new memory.

    Args:
        stored: [n] each, as they are stored: weight, gradient, m, v, and a remainder.
        scales: Of m and of the root of v where they are codes; else empty.
        factors: See `factors_of`.
        decays: Whether weight decay applies.
        scratch: For at least n elements.
    """
    weight, gradient, first, second, *remainder = stored
    size, exact, m, v = len(weight), weight, first, second
    one, other, *more = scratch.floats[:, :size]
    if remainder:
        exact = more[0]
        join_master_into(weight, remainder[0], exact, one)
        gradient = one.copy_(gradient)
    if scales:
        blocks = len(scales[0])
        *_, padded_m, padded_v = padded = scratch.floats[:, :blocks * BLOCK_SIZE].unbind()
        m, v, units = padded_m[:size], padded_v[:size], scratch.units[:blocks]
        decode_moment_into(first, scales[0], padded_m, padded[1], units)
        decode_moment_into(second, scales[1], padded_v, padded[1], units)
        v.square_()
    _update(exact, gradient, m, v, factors, decays, one, other)
    if remainder:
        split_master_into(exact, weight, remainder[0], one, other, scratch.mask[:size])
    if scales:
        exact_sqrt(v, out=v)
        for values, codes, scale in ((padded_m, first, scales[0]), (padded_v, second, scales[1])):
            values[size:].zero_()
            encode_moment_into(values, codes, scale, padded[0], padded[1],
                               scratch.mask[:blocks])
