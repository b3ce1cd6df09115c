"""rms_norm and layer_norm on a GPU, alone or with the addition to the residual stream.

    total = round(x + residual)        hat = (total - mean) rstd        (mean = 0 for rms_norm)
    rms_norm = weight round(hat)       layer_norm = weight hat + bias
    g = weight dy        dx = rstd (g - mean(g) - hat mean(g hat)) + dtotal

A program holds a tile of whole rows: one from D = 513 on, several of short ones, each reduced by
itself. Rows longer than MAX_BLOCK are cut into blocks, one program each, and every program walks
the whole row for its means. The backward pass gives a program 16 tiles, over which it adds up
dweight and dbias; these partial sums are folded by 256 in a fixed order. Tiles depend on D alone:
no row depends on the others, and no sum on the number of processors. rstd and mean of each row are
saved, 4 bytes each: to recompute them would put one more reduction before those of the backward
pass.
Bytes per element in half precision, float32 twice: forward 4, with the addition 8; backward 6, with
a gradient of total 8, and 8/16 for the partial sums (written and read in float32; layer_norm twice
that). Limits: float32, float16, bfloat16; computed in float32. Source: Zhang & Sennrich 2019
(arXiv 1910.07467), Ba et al. 2016 (arXiv 1607.06450).
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, as_rows, supports

__all__ = ["add_layer_norm", "add_rms_norm", "aot_cases", "layer_norm", "rms_norm", "supports"]

MAX_BLOCK = 8192
"""A longer row, with the sums of two gradients beside it, would not fit into the registers."""
FORWARD_LONG_BLOCK, BACKWARD_LONG_BLOCK = 8192, 4096
NUM_TILES = 16
"""Tiles of rows in a program of the backward pass."""
FOLD = 256
"""Partial sums that one program adds up."""


@triton.jit
def row_starts(rows, num_heads, stride_n, stride_h):  # type: ignore[no-untyped-def]
    """Where rows (n, h) of a tensor [N, H, D] begin."""
    return ((rows // num_heads).to(tl.int64) * stride_n
            + (rows % num_heads).to(tl.int64) * stride_h)


@triton.jit  # type: ignore[untyped-decorator]
def _load_total(  # type: ignore[no-untyped-def]
    x_ptrs, residual_ptrs, columns, num_columns, is_row, HAS_RESIDUAL: tl.constexpr,
):
    """round(x + residual) of a tile, float32; 0 outside."""
    is_inside = is_row[:, None] & (columns < num_columns)[None, :]
    x = tl.load(x_ptrs[:, None] + columns[None, :], mask=is_inside, other=0.0)
    total = x.to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual_ptrs[:, None] + columns[None, :], mask=is_inside, other=0.0)
        total = (total + added.to(tl.float32)).to(x.dtype).to(tl.float32)
    return total


@triton.jit
def _centred_squares(total, mean, columns, num_columns):  # type: ignore[no-untyped-def]
    """The sum of squares about the mean of each row of a tile."""
    centred = tl.where((columns < num_columns)[None, :], total - mean[:, None], 0.0)
    return tl.sum(centred * centred, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, stats_ptr, num_rows,
    num_heads, num_columns, stride_x_n, stride_x_h, stride_residual_n, stride_residual_h, epsilon,
    HAS_RESIDUAL: tl.constexpr, IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.arange(0, BLOCK_D)
    columns = block
    if IS_WIDE:  # otherwise the compiler knows where each column is, which spares registers
        columns += tl.program_id(1) * BLOCK_D
    is_row = rows < num_rows
    x_ptrs = x_ptr + row_starts(rows, num_heads, stride_x_n, stride_x_h)
    residual_ptrs = residual_ptr + row_starts(rows, num_heads, stride_residual_n,
                                              stride_residual_h)
    total = _load_total(x_ptrs, residual_ptrs, columns, num_columns, is_row, HAS_RESIDUAL)
    mean = tl.zeros([BLOCK_R], tl.float32)
    if IS_WIDE:
        if IS_CENTRED:
            for start in range(0, num_columns, BLOCK_D):
                mean += tl.sum(_load_total(x_ptrs, residual_ptrs, start + block, num_columns,
                                           is_row, HAS_RESIDUAL), axis=1)
            mean = mean / num_columns
        squares = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, num_columns, BLOCK_D):
            part = _load_total(x_ptrs, residual_ptrs, start + block, num_columns, is_row,
                               HAS_RESIDUAL)
            squares += _centred_squares(part, mean, start + block, num_columns)
    else:
        if IS_CENTRED:
            mean = tl.sum(total, axis=1) / num_columns
        squares = _centred_squares(total, mean, columns, num_columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / num_columns + epsilon))
    hat = (total - mean[:, None]) * rstd[:, None]
    is_column = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if IS_CENTRED:
        bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        y = hat * weight + bias
    else:
        y = hat.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    places = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    is_inside = is_row[:, None] & is_column[None, :]
    tl.store(y_ptr + places, y, mask=is_inside)
    if HAS_RESIDUAL:
        tl.store(total_ptr + places, total, mask=is_inside)
    is_first = is_row & (tl.program_id(1) == 0)
    tl.store(stats_ptr + rows * (1 + IS_CENTRED), rstd, mask=is_first)
    if IS_CENTRED:
        tl.store(stats_ptr + rows * 2 + 1, mean, mask=is_first)


@triton.jit
def _load_gradient(  # type: ignore[no-untyped-def]
    x_ptrs, dy_ptrs, weight_ptr, mean, rstd, columns, num_columns, is_row,
):
    """hat, dy and g = weight dy of a tile, float32; dy and g are 0 outside."""
    is_inside = is_row[:, None] & (columns < num_columns)[None, :]
    x = tl.load(x_ptrs[:, None] + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs[:, None] + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None], dy, dy * weight[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, stats_ptr, dy_ptr, dtotal_ptr, dx_ptr, partials_ptr, num_rows, num_heads,
    num_columns, stride_x_n, stride_x_h, stride_dy_n, stride_dy_h, stride_dtotal_n,
    stride_dtotal_h,
    HAS_DTOTAL: tl.constexpr, IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr,
    NUM_TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0)
    block = tl.arange(0, BLOCK_D)
    columns = block
    if IS_WIDE:  # otherwise the compiler knows where each column is, which spares registers
        columns += tl.program_id(1) * BLOCK_D
    dweight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = chunk * NUM_TILES * BLOCK_R
    for start_r in range(first, min(num_rows, first + NUM_TILES * BLOCK_R), BLOCK_R):
        rows = start_r + tl.arange(0, BLOCK_R)
        is_row = rows < num_rows
        rstd = tl.load(stats_ptr + rows * (1 + IS_CENTRED), mask=is_row, other=0.0)
        mean = tl.zeros([BLOCK_R], tl.float32)
        if IS_CENTRED:
            mean = tl.load(stats_ptr + rows * 2 + 1, mask=is_row, other=0.0)
        x_ptrs = x_ptr + row_starts(rows, num_heads, stride_x_n, stride_x_h)
        dy_ptrs = dy_ptr + row_starts(rows, num_heads, stride_dy_n, stride_dy_h)
        hat, dy, g = _load_gradient(x_ptrs, dy_ptrs, weight_ptr, mean, rstd, columns, num_columns,
                                    is_row)
        if IS_CENTRED:
            dbias += dy
            dweight += dy * hat
        else:
            dweight += dy * hat.to(dx_ptr.dtype.element_ty).to(tl.float32)
        if IS_WIDE:
            along = tl.zeros([BLOCK_R], tl.float32)
            level = tl.zeros([BLOCK_R], tl.float32)
            for start in range(0, num_columns, BLOCK_D):
                part_hat, _, part_g = _load_gradient(x_ptrs, dy_ptrs, weight_ptr, mean, rstd,
                                                     start + block, num_columns, is_row)
                along += tl.sum(part_g * part_hat, axis=1)
                level += tl.sum(part_g, axis=1)
        else:
            along = tl.sum(g * hat, axis=1)
            level = tl.sum(g, axis=1)
        dx = g - hat * (along / num_columns)[:, None]
        if IS_CENTRED:
            dx -= (level / num_columns)[:, None]
        dx *= rstd[:, None]
        is_inside = is_row[:, None] & (columns < num_columns)[None, :]
        if HAS_DTOTAL:
            starts = row_starts(rows, num_heads, stride_dtotal_n, stride_dtotal_h)
            dx += tl.load(dtotal_ptr + starts[:, None] + columns[None, :], mask=is_inside,
                          other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], dx,
                 mask=is_inside)
    is_column = columns < num_columns
    partials_ptr += chunk.to(tl.int64) * num_columns * (1 + IS_CENTRED)
    tl.store(partials_ptr + columns, tl.sum(dweight, axis=0), mask=is_column)
    if IS_CENTRED:
        tl.store(partials_ptr + num_columns + columns, tl.sum(dbias, axis=0), mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _fold_kernel(  # type: ignore[no-untyped-def]
    partials_ptr, sums_ptr, num_partials, num_columns,
    FOLD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * FOLD
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(first, min(num_partials, first + FOLD), BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        is_inside = (rows < num_partials)[:, None] & (columns < num_columns)[None, :]
        sums += tl.load(partials_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :],
                        mask=is_inside, other=0.0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * num_columns + columns,
             tl.sum(sums, axis=0), mask=columns < num_columns)


def tile_settings(num_columns: int, long_block: int) -> dict[str, Any]:
    """The tile of a program, from the width alone: about 1024 elements, or one row.

    A row longer than MAX_BLOCK is cut into blocks of `long_block`.
    """
    is_wide = num_columns > MAX_BLOCK
    block = long_block if is_wide else max(16, triton.next_power_of_2(num_columns))
    return {"BLOCK_R": max(1, 1024 // block), "BLOCK_D": block, "IS_WIDE": is_wide,
            "num_warps": 16 if is_wide else min(16, max(4, block // 256))}


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm, or layer_norm where there is a bias, in one launch.

    Returns:
        y: shape and type of x.
        total: the same; without a residual it is empty.
        stats: [rows, 1 or 2] float32: rstd, and the mean where there is a bias.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    num_columns, num_rows = x.shape[-1], math.prod(x.shape[:-1])
    stats = torch.empty(num_rows, 1 if bias is None else 2, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        rows = as_rows(x)
        added = rows if residual is None else as_rows(residual)
        settings = tile_settings(num_columns, FORWARD_LONG_BLOCK)
        weight = weight.contiguous()
        grid = (triton.cdiv(num_rows, settings["BLOCK_R"]),
                triton.cdiv(num_columns, settings["BLOCK_D"]))
        _norm_fwd_kernel[grid](
            rows, added, weight, weight if bias is None else bias.contiguous(), y, total, stats,
            num_rows, rows.shape[1], num_columns, rows.stride(0), rows.stride(1), added.stride(0),
            added.stride(1), epsilon, HAS_RESIDUAL=residual is not None,
            IS_CENTRED=bias is not None, **settings,
        )
    return y, total, stats


def norm_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, shape of `total`, and [1 or 2, D]: dweight, and dbias where stats hold means."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    num_columns, (num_rows, num_stats) = total.shape[-1], stats.shape
    if total.numel() == 0:
        return dx, torch.zeros(num_stats, num_columns, dtype=weight.dtype, device=weight.device)
    rows, dy_rows = as_rows(total), as_rows(dy)
    dtotal_rows = dy_rows if dtotal is None else as_rows(dtotal)
    settings = tile_settings(num_columns, BACKWARD_LONG_BLOCK)
    num_chunks = triton.cdiv(num_rows, NUM_TILES * settings["BLOCK_R"])
    partials = torch.empty(num_chunks, num_stats * num_columns, dtype=torch.float32,
                           device=dx.device)
    _norm_bwd_kernel[(num_chunks, triton.cdiv(num_columns, settings["BLOCK_D"]))](
        rows, weight.contiguous(), stats, dy_rows, dtotal_rows, dx, partials, num_rows,
        rows.shape[1], num_columns, rows.stride(0), rows.stride(1), dy_rows.stride(0),
        dy_rows.stride(1), dtotal_rows.stride(0), dtotal_rows.stride(1),
        HAS_DTOTAL=dtotal is not None, IS_CENTRED=num_stats == 2, NUM_TILES=NUM_TILES, **settings,
    )
    return dx, fold(partials, weight.dtype).view(num_stats, num_columns)


def fold(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum [D] over P of partial sums [P, D], in an order that P alone decides."""
    P, D = partials.shape
    num_programs = triton.cdiv(P, FOLD)
    sums = torch.empty(num_programs, D, dtype=dtype if num_programs == 1 else torch.float32,
                       device=partials.device)
    _fold_kernel[(num_programs, triton.cdiv(D, 32))](partials, sums, P, D, FOLD=FOLD, BLOCK_P=32,
                                                     BLOCK_D=32)
    return sums[0] if num_programs == 1 else fold(sums, dtype)


@torch.library.custom_op("fastrl_kernels::norm", mutates_args=())
def _fwd_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_fwd(x, residual, weight, bias, epsilon)


@_fwd_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, ...]:
    stats = x.new_empty(math.prod(x.shape[:-1]), 1 if bias is None else 2, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), stats


@torch.library.custom_op("fastrl_kernels::norm_bwd", mutates_args=())
def _bwd_op(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    return norm_bwd(dy, dtotal, total, weight, stats)


@_bwd_op.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(stats.shape[1], len(weight))


class _Norm(torch.autograd.Function):
    """Keeps what was normalised and one or two numbers per row; y alone without a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
        epsilon: float,
    ) -> Any:
        run = _fwd_op if torch.compiler.is_compiling() else norm_fwd
        y, total, stats = run(x, residual, weight, bias, epsilon)
        ctx.save_for_backward(x if residual is None else total, weight, stats)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> Any:
        if dy is None:
            return dtotal, dtotal if ctx.has_residual else None, None, None, None
        total, weight, stats = ctx.saved_tensors
        run = _bwd_op if torch.compiler.is_compiling() else norm_bwd
        dx, dparameters = run(dy, dtotal, total, weight, stats)
        return (dx, dx if ctx.has_residual else None, dparameters[0],
                dparameters[1] if len(dparameters) == 2 else None, None)


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """fastrl.ops.rms_norm on this backend."""
    y: Tensor = _Norm.apply(x, None, weight, None, epsilon)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.add_rms_norm on this backend."""
    both: tuple[Tensor, Tensor] = _Norm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, None, epsilon)
    return both


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """fastrl.ops.layer_norm on this backend."""
    y: Tensor = _Norm.apply(x, None, weight, bias, epsilon)  # type: ignore[no-untyped-call]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.add_layer_norm on this backend."""
    both: tuple[Tensor, Tensor] = _Norm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, bias, epsilon)
    return both


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    # Several rows in a tile, one row, a row that is cut; the same where no row is aligned.
    widths = (128, 1024, 4096, MAX_BLOCK, 9008, 100, 1000, 9001) if every else (4096,)
    flags = (True, False) if every else (True,)
    tensors = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "total_ptr", "dy_ptr",
               "dtotal_ptr", "dx_ptr")
    strides = [f"stride_{x}_{d}" for x in ("x", "residual", "dy", "dtotal") for d in "nh"]
    cases: list[AotCase] = []
    for dtype, num_columns in itertools.product(DTYPES, widths):
        aligned = ":16" if num_columns % 16 == 0 else ""
        types = {
            **dict.fromkeys(tensors, f"*{dtype}{aligned}"),
            **dict.fromkeys(("num_columns", *strides), f"i32{aligned}"),
            "stats_ptr": "*fp32:16", "partials_ptr": "*fp32:16", "sums_ptr": f"*{dtype}{aligned}",
            "num_rows": "i32", "num_heads": "i32", "num_partials": "i32", "epsilon": "fp32",
        }
        for is_added, is_centred in itertools.product(flags, flags):
            cases += [
                (_norm_fwd_kernel, types, {
                    "HAS_RESIDUAL": is_added, "IS_CENTRED": is_centred,
                    **tile_settings(num_columns, FORWARD_LONG_BLOCK)}),
                (_norm_bwd_kernel, types, {
                    "HAS_DTOTAL": is_added, "IS_CENTRED": is_centred, "NUM_TILES": NUM_TILES,
                    **tile_settings(num_columns, BACKWARD_LONG_BLOCK)}),
            ]
        cases.append((_fold_kernel, types, {"FOLD": FOLD, "BLOCK_P": 32, "BLOCK_D": 32}))
    return cases
