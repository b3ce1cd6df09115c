"""whiten on a GPU: moments of blocks, then their merge and the scaling.

    w = (v - mean) / sqrt(var + epsilon)        (+ mean with keep_mean)

Moments are three numbers per part: count, sum, and sum of squares about the part's own mean. First
launch: one program per block of 4096 values writes the block's. Second launch: every program merges
all of them by Chan's formula, in one fixed order, and scales its block. Given moments (compute_gae
makes them) take the place of the first launch. Backward, with the means of g and g w over what is
kept: dv = rstd (g - mean g - w mean(g w)), plus mean g with keep_mean; two launches of the same
form, or one, dv = rstd g, where the moments were given.
Bytes per value in float32: 5 read, then 5 read and 4 written; backward 9, then 9 and 4. A program
reads 12 bytes per part as well, which stays below the values for up to some thousand parts.
Limits: float32, float16, bfloat16; computed in float32; tensors that are not contiguous are copied.
Source: Chan, Golub, LeVeque 1983 for the merge.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "merged_moments", "supports", "whiten"]

BLOCK_N = 4096
BLOCK_P = 1024
"""Parts that a program merges at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def merged_moments(  # type: ignore[no-untyped-def]
    moments_ptr, num_parts, epsilon, BLOCK_P: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + epsilon) of everything, from the moments [P, 3] of its parts."""
    block = tl.arange(0, BLOCK_P)
    counts = tl.zeros([BLOCK_P], tl.float32)
    sums = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part_ptr = moments_ptr + 3 * (start + block).to(tl.int64)
        is_part = start + block < num_parts
        counts += tl.load(part_ptr, mask=is_part, other=0.0)
        sums += tl.load(part_ptr + 1, mask=is_part, other=0.0)
    size = tl.maximum(tl.sum(counts), 1.0)
    mean = tl.sum(sums) / size
    squares = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part_ptr = moments_ptr + 3 * (start + block).to(tl.int64)
        is_part = start + block < num_parts
        count = tl.load(part_ptr, mask=is_part, other=0.0)
        gap = tl.load(part_ptr + 1, mask=is_part, other=0.0) / tl.maximum(count, 1.0) - mean
        squares += tl.load(part_ptr + 2, mask=is_part, other=0.0) + count * gap * gap
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares) / size + epsilon)


@triton.jit  # type: ignore[untyped-decorator]
def _moments_fwd_kernel(  # type: ignore[no-untyped-def]
    values_ptr, mask_ptr, moments_ptr, num_values, BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    i = part * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tl.load(mask_ptr + i, mask=i < num_values, other=0) != 0
    v = tl.load(values_ptr + i, mask=keep, other=0.0).to(tl.float32)
    count = tl.sum(keep.to(tl.float32))
    total = tl.sum(v)
    centred = tl.where(keep, v - total / tl.maximum(count, 1.0), 0.0)
    tl.store(moments_ptr + part * 3, count)
    tl.store(moments_ptr + part * 3 + 1, total)
    tl.store(moments_ptr + part * 3 + 2, tl.sum(centred * centred))


@triton.jit  # type: ignore[untyped-decorator]
def _whiten_fwd_kernel(  # type: ignore[no-untyped-def]
    values_ptr, mask_ptr, moments_ptr, whitened_ptr, scale_ptr, num_values, num_parts, epsilon,
    KEEP_MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):
    mean, rstd = merged_moments(moments_ptr, num_parts, epsilon, BLOCK_P)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:  # for the backward pass
        tl.store(scale_ptr, mean)
        tl.store(scale_ptr + 1, rstd)
    i = program * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tl.load(mask_ptr + i, mask=i < num_values, other=0) != 0
    v = tl.load(values_ptr + i, mask=keep, other=0.0).to(tl.float32)
    whitened = (v - mean) * rstd
    if KEEP_MEAN:
        whitened += mean
    tl.store(whitened_ptr + i, tl.where(keep, whitened, 0.0), mask=i < num_values)


@triton.jit  # type: ignore[untyped-decorator]
def _whiten_bwd_sums_kernel(  # type: ignore[no-untyped-def]
    values_ptr, mask_ptr, dwhitened_ptr, scale_ptr, sums_ptr, num_values, BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    i = part * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tl.load(mask_ptr + i, mask=i < num_values, other=0) != 0
    v = tl.load(values_ptr + i, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(dwhitened_ptr + i, mask=keep, other=0.0).to(tl.float32)
    w = (v - tl.load(scale_ptr)) * tl.load(scale_ptr + 1)
    tl.store(sums_ptr + part * 3, tl.sum(keep.to(tl.float32)))
    tl.store(sums_ptr + part * 3 + 1, tl.sum(g))
    tl.store(sums_ptr + part * 3 + 2, tl.sum(g * w))


@triton.jit  # type: ignore[untyped-decorator]
def _whiten_bwd_kernel(  # type: ignore[no-untyped-def]
    values_ptr, mask_ptr, dwhitened_ptr, scale_ptr, sums_ptr, dvalues_ptr, num_values, num_parts,
    KEEP_MEAN: tl.constexpr, IS_GIVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = tl.load(mask_ptr + i, mask=i < num_values, other=0) != 0
    g = tl.load(dwhitened_ptr + i, mask=keep, other=0.0).to(tl.float32)
    mean = tl.load(scale_ptr)
    rstd = tl.load(scale_ptr + 1)
    if IS_GIVEN:
        dv = rstd * g
    else:
        block = tl.arange(0, BLOCK_P)
        counts = tl.zeros([BLOCK_P], tl.float32)
        sums = tl.zeros([BLOCK_P], tl.float32)
        products = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            part_ptr = sums_ptr + 3 * (start + block).to(tl.int64)
            is_part = start + block < num_parts
            counts += tl.load(part_ptr, mask=is_part, other=0.0)
            sums += tl.load(part_ptr + 1, mask=is_part, other=0.0)
            products += tl.load(part_ptr + 2, mask=is_part, other=0.0)
        size = tl.maximum(tl.sum(counts), 1.0)
        mean_g = tl.sum(sums) / size
        v = tl.load(values_ptr + i, mask=keep, other=0.0).to(tl.float32)
        dv = rstd * (g - mean_g - (v - mean) * rstd * (tl.sum(products) / size))
        if KEEP_MEAN:
            dv += mean_g
    tl.store(dvalues_ptr + i, tl.where(keep, dv, 0.0), mask=i < num_values)


def whiten_fwd(
    values: Tensor, mask: Tensor, moments: Tensor | None, keep_mean: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Whitened values, float32 and contiguous, and [2] float32: mean and 1 / sqrt(var + epsilon).

    Two launches, or one where the moments [P, 3] are given.
    """
    values, mask, num_values = values.contiguous(), mask.contiguous(), values.numel()
    whitened = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    scale = torch.empty(2, dtype=torch.float32, device=values.device)
    grid = (max(1, triton.cdiv(num_values, BLOCK_N)),)  # no values: mean 0 all the same
    if moments is None:
        moments = torch.empty(grid[0], 3, dtype=torch.float32, device=values.device)
        _moments_fwd_kernel[grid](values, mask, moments, num_values, BLOCK_N=BLOCK_N, num_warps=8)
    else:
        moments = moments.float().contiguous()
    _whiten_fwd_kernel[grid](values, mask, moments, whitened, scale, num_values, len(moments),
                             epsilon, KEEP_MEAN=keep_mean, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P,
                             num_warps=8)
    return whitened, scale


def whiten_bwd(
    values: Tensor, mask: Tensor, dwhitened: Tensor, scale: Tensor, keep_mean: bool, is_given: bool
) -> Tensor:
    """Gradient like the values, contiguous. `is_given`: mean and variance were constants."""
    values, mask, dwhitened = values.contiguous(), mask.contiguous(), dwhitened.contiguous()
    dvalues, num_values = torch.empty_like(values), values.numel()
    num_parts = triton.cdiv(num_values, BLOCK_N)
    sums = torch.empty(num_parts, 3, dtype=torch.float32, device=values.device)
    if num_parts > 0 and not is_given:
        _whiten_bwd_sums_kernel[(num_parts,)](values, mask, dwhitened, scale, sums, num_values,
                                              BLOCK_N=BLOCK_N, num_warps=8)
    if num_parts > 0:
        _whiten_bwd_kernel[(num_parts,)](values, mask, dwhitened, scale, sums, dvalues, num_values,
                                         num_parts, KEEP_MEAN=keep_mean, IS_GIVEN=is_given,
                                         BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, num_warps=8)
    return dvalues


@torch.library.custom_op("fastrl_kernels::whiten", mutates_args=())
def _fwd_op(
    values: Tensor, mask: Tensor, moments: Tensor | None, keep_mean: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    return whiten_fwd(values, mask, moments, keep_mean, epsilon)


@_fwd_op.register_fake
def _(values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return (values.new_empty(values.shape, dtype=torch.float32),
            values.new_empty(2, dtype=torch.float32))


@torch.library.custom_op("fastrl_kernels::whiten_bwd", mutates_args=())
def _bwd_op(
    values: Tensor, mask: Tensor, dwhitened: Tensor, scale: Tensor, keep_mean: bool, is_given: bool
) -> Tensor:
    return whiten_bwd(values, mask, dwhitened, scale, keep_mean, is_given)


@_bwd_op.register_fake
def _(values: Tensor, *others: Any) -> Tensor:
    return values.new_empty(values.shape)


class _Whiten(torch.autograd.Function):
    """Keeps its inputs, mean and scale."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mask: Tensor, moments: Tensor | None, keep_mean: bool,
        epsilon: float,
    ) -> Tensor:
        run = _fwd_op if torch.compiler.is_compiling() else whiten_fwd
        whitened, scale = run(values, mask, moments, keep_mean, epsilon)
        ctx.save_for_backward(values, mask, scale)
        ctx.keep_mean, ctx.is_given = keep_mean, moments is not None
        return whitened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhitened: Tensor) -> tuple[Tensor | None, ...]:
        values, mask, scale = ctx.saved_tensors
        run = _bwd_op if torch.compiler.is_compiling() else whiten_bwd
        dvalues = run(values, mask, dwhitened, scale, ctx.keep_mean, ctx.is_given)
        return dvalues, None, None, None, None


def whiten(
    values: Tensor, mask: Tensor, *, keep_mean: bool = False, moments: Tensor | None = None,
    epsilon: float = 1e-8,
) -> Tensor:
    """fastrl.ops.whiten on this backend; `epsilon` is added to the variance."""
    result: Tensor = _Whiten.apply(  # type: ignore[no-untyped-call]
        values, mask, None if moments is None else moments.detach(), keep_mean, epsilon
    )
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "mask_ptr": "*i1", "moments_ptr": "*fp32", "whitened_ptr": "*fp32", "scale_ptr": "*fp32",
        "dwhitened_ptr": "*fp32", "sums_ptr": "*fp32", "num_values": "i32", "num_parts": "i32",
        "epsilon": "fp32",
    }
    block, parts = {"BLOCK_N": BLOCK_N, "num_warps": 8}, {"BLOCK_P": BLOCK_P}
    flags = (True, False) if every else (True,)
    cases: list[AotCase] = []
    for dtype in DTYPES:
        pointers = {**types, "values_ptr": f"*{dtype}", "dvalues_ptr": f"*{dtype}"}
        cases += [(kernel, pointers, block)
                  for kernel in (_moments_fwd_kernel, _whiten_bwd_sums_kernel)]
        cases += [(_whiten_fwd_kernel, pointers, {**block, **parts, "KEEP_MEAN": keep_mean})
                  for keep_mean in flags]
        cases += [(_whiten_bwd_kernel, pointers,
                   {**block, **parts, "KEEP_MEAN": keep_mean, "IS_GIVEN": is_given})
                  for keep_mean, is_given in itertools.product(flags, flags if every else (False,))]
    return cases
