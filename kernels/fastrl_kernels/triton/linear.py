"""linear on a GPU, with rows whose bits do not depend on how many there are.

    y = x @ weight.T + bias        dx = dy @ weight        dweight = dy.T @ x        dbias = sum dy

A program makes a tile of 64 rows, the height of one instruction on newer matrix units, and 128
columns (float32 64). Tile, instructions and the order of the inner dimension follow type and width,
never the number of rows, and nothing is cut along the inner dimension: a row's sum is one chain.
The compiler is not told the number of rows either, so that one code serves all. Programs go down
eight tiles of rows before they go to the next columns, so that neighbours share what they read. The
backward pass is two products by torch: its sums depend on the number of rows by their nature.
Floor: 2NDO operations (float32 without tensor cores, "ieee"), 2(ND + DO + NO) bytes in half
precision where the cache holds what neighbours share.
Limits: float32, float16, bfloat16, one type for x, weight and bias; sums in float32, y of that type
or float32.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, is_interpreted, supports

__all__ = ["aot_cases", "linear", "supports"]

GROUP = 8
"""Tiles of rows that are made one after the other with the same columns."""


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _linear_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_columns, width, stride_x_n, stride_x_d,
    stride_weight_o, stride_weight_d, HAS_BIAS: tl.constexpr, WIDENS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):
    num_row_tiles = tl.cdiv(num_rows, BLOCK_N)
    group_size = GROUP * tl.cdiv(num_columns, BLOCK_O)
    first_tile = tl.program_id(0) // group_size * GROUP
    num_tiles = tl.minimum(num_row_tiles - first_tile, GROUP)
    place = tl.program_id(0) % group_size
    row = (first_tile + place % num_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (place // num_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_column = row < num_rows, column < num_columns
    x_row = x_ptr + row[:, None] * stride_x_n
    weight_row = weight_ptr + column[None, :] * stride_weight_o
    y = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_inside = d < width
        x = tl.load(x_row + d.to(tl.int64)[None, :] * stride_x_d,
                    mask=is_row[:, None] & is_inside[None, :], other=0.0)
        w = tl.load(weight_row + d.to(tl.int64)[:, None] * stride_weight_d,
                    mask=is_inside[:, None] & is_column[None, :], other=0.0)
        if WIDENS:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        y = tl.dot(x, w, y, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        y += bias[None, :]
    tl.store(y_ptr + row[:, None] * num_columns + column[None, :],
             y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def tile_settings(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Sizes of a tile and launch options, by type and width alone.

    Rows that do not begin at 16 bytes are loaded number by number; wide tiles of them would spill.
    """
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 64, "BLOCK_O": 128, "BLOCK_D": 64 if width % 16 == 0 else 32,
            "num_warps": 4, "num_stages": 3}


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y [N, O] of rows x [N, D] in one launch, written into contiguous `y` of any float type."""
    (N, D), O = x.shape, len(weight)  # noqa: E741
    if y.numel() > 0:
        settings = tile_settings(x.dtype, D)
        grid = (triton.cdiv(N, settings["BLOCK_N"]) * triton.cdiv(O, settings["BLOCK_O"]),)
        _linear_fwd_kernel[grid](
            x, weight, weight if bias is None else bias.contiguous(), y, N, O, D, *x.stride(),
            *weight.stride(), HAS_BIAS=bias is not None,
            # The interpreter multiplies bfloat16 as the integers that stand for it.
            WIDENS=is_interpreted() and x.dtype == torch.bfloat16, GROUP=GROUP, **settings)
    return y


def _new_y(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return linear_fwd(x, weight, bias, _new_y(x, weight, out_dtype))


_linear_op = torch.library.custom_op("fastrl_kernels::linear", _linear, mutates_args=())


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return _new_y(x, weight, out_dtype)


class _Linear(torch.autograd.Function):
    """Keeps x and weight, as torch's own does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Any:
        ctx.save_for_backward(x, weight)
        run: Any = _linear_op if torch.compiler.is_compiling() else _linear
        return run(x, weight, bias, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy = dy.to(x.dtype)
        return (dy @ weight if needs_x else None, dy.T @ x if needs_weight else None,
                dy.sum(dim=0) if needs_bias else None, None)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """fastrl.ops.linear on this backend."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, out_dtype or x.dtype)
    return y.view(*x.shape[:-1], len(weight))


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    dtypes = dict(zip(DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
    flags = ((True, True), (True, False), (False, True), (False, False)) if every else (
        (True, True), (False, True))
    return [
        (_linear_fwd_kernel,
         {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{name}{aligned}"),
          "y_ptr": f"*{'fp32' if is_wide else name}{aligned}", "num_rows": "i32",
          **dict.fromkeys(("num_columns", "width", "stride_x_n", "stride_weight_o"),
                          f"i32{aligned}")},
         {"stride_x_d": 1, "stride_weight_d": 1, "HAS_BIAS": has_bias, "WIDENS": False,
          "GROUP": GROUP, **tile_settings(dtypes[name], 16 if aligned else 1)})
        for name, (is_wide, has_bias), aligned in itertools.product(
            DTYPES, flags, (":16", "") if every else (":16",))
        if not (is_wide and name == "fp32")
    ]
