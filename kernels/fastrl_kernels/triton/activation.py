"""swiglu and gelu on a GPU: one launch each way, nothing kept but the input.

    swiglu(gate, up) = round(silu(gate)) up        silu(x) = x sigmoid(x)
    dgate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))        dup = dy round(silu(gate))
    gelu(x) = x Phi(x)        dx = dy (Phi(x) + x Phi'(x))
    Phi(x) = (1 + erf(x / sqrt 2)) / 2, or sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)

(1 + tanh u) / 2 is sigmoid(2 u), so there is no tanh; a sigmoid is made from e^-|x|, which cannot
overflow, and 1 - sigmoid from the same e^-|x|, which does not cancel. A program holds one block of
one row, with any stride between rows. `round` is to the type of the tensors, as torch does it.
Bytes per output element in half precision, float32 twice: swiglu 6 forward and 10 backward, gelu 4
and 6. Limits: float32, float16, bfloat16; computed in float32. Source: Shazeer 2020
(arXiv 2002.05202), Hendrycks & Gimpel 2016 (arXiv 1606.08415).
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.norm import row_starts
from fastrl_kernels.triton.support import DTYPES, AotCase, as_rows, supports

__all__ = ["aot_cases", "gelu", "supports", "swiglu"]

MAX_BLOCK = 1024
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBE = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """sigmoid(x) and 1 - sigmoid(x)."""
    small = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + small)
    return tl.where(x >= 0, share, small * share), tl.where(x >= 0, small * share, share)


@triton.jit  # type: ignore[untyped-decorator]
def _normal(x, IS_TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Phi(x) and its derivative, exact or in the tanh form."""
    if IS_TANH:
        phi, rest = _sigmoid(2.0 * ROOT_2_OVER_PI * x * (1.0 + CUBE * x * x))
        slope = 2.0 * ROOT_2_OVER_PI * phi * rest * (1.0 + 3.0 * CUBE * x * x)
    else:
        phi = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
        slope = 0.5 * ROOT_2_OVER_PI * tl.exp(-0.5 * x * x)
    return phi, slope


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_fwd_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, y_ptr, num_heads, num_columns, stride_gate_up_n, stride_gate_up_h,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_inside = columns < num_columns
    gate_ptr = gate_up_ptr + row_starts(row, num_heads, stride_gate_up_n, stride_gate_up_h)
    gate = tl.load(gate_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_columns + columns, mask=is_inside, other=0.0).to(tl.float32)
    share, _ = _sigmoid(gate)
    silu = (gate * share).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * num_columns + columns, silu * up, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_bwd_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, dy_ptr, dgate_up_ptr, num_heads, num_columns, stride_gate_up_n, stride_gate_up_h,
    stride_dy_n, stride_dy_h,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_inside = columns < num_columns
    gate_ptr = gate_up_ptr + row_starts(row, num_heads, stride_gate_up_n, stride_gate_up_h)
    dy_ptr += row_starts(row, num_heads, stride_dy_n, stride_dy_h)
    gate = tl.load(gate_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_columns + columns, mask=is_inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    share, rest = _sigmoid(gate)
    silu = (gate * share).to(dgate_up_ptr.dtype.element_ty).to(tl.float32)
    dgate_ptr = dgate_up_ptr + row.to(tl.int64) * 2 * num_columns
    tl.store(dgate_ptr + columns, dy * up * share * (1.0 + gate * rest), mask=is_inside)
    tl.store(dgate_ptr + num_columns + columns, dy * silu, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, num_heads, num_columns, stride_x_n, stride_x_h,
    IS_TANH: tl.constexpr, BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_inside = columns < num_columns
    x_ptr += row_starts(row, num_heads, stride_x_n, stride_x_h)
    x = tl.load(x_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    phi, _ = _normal(x, IS_TANH)
    tl.store(y_ptr + row.to(tl.int64) * num_columns + columns, x * phi, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, dx_ptr, num_heads, num_columns, stride_x_n, stride_x_h, stride_dy_n,
    stride_dy_h,
    IS_TANH: tl.constexpr, BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_inside = columns < num_columns
    x_ptr += row_starts(row, num_heads, stride_x_n, stride_x_h)
    dy_ptr += row_starts(row, num_heads, stride_dy_n, stride_dy_h)
    x = tl.load(x_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    phi, slope = _normal(x, IS_TANH)
    tl.store(dx_ptr + row.to(tl.int64) * num_columns + columns, dy * (phi + x * slope),
             mask=is_inside)


def block_settings(num_columns: int) -> dict[str, int]:
    """BLOCK_I and warps: 8 elements a thread where the row is long enough."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(num_columns)))
    return {"BLOCK_I": block, "num_warps": max(1, block // 256)}


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """swiglu in one launch."""
    num_columns = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], num_columns, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() > 0:
        rows, settings = as_rows(gate_up), block_settings(num_columns)
        grid = (y.numel() // num_columns, triton.cdiv(num_columns, settings["BLOCK_I"]))
        _swiglu_fwd_kernel[grid](rows, y, rows.shape[1], num_columns, rows.stride(0),
                                 rows.stride(1), **settings)
    return y


def swiglu_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up in one launch."""
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if dy.numel() > 0:
        rows, dy_rows, num_columns = as_rows(gate_up), as_rows(dy), dy.shape[-1]
        settings = block_settings(num_columns)
        grid = (dy.numel() // num_columns, triton.cdiv(num_columns, settings["BLOCK_I"]))
        _swiglu_bwd_kernel[grid](rows, dy_rows, dgate_up, rows.shape[1], num_columns,
                                 rows.stride(0), rows.stride(1), dy_rows.stride(0),
                                 dy_rows.stride(1), **settings)
    return dgate_up


def gelu_fwd(x: Tensor, is_tanh: bool) -> Tensor:
    """gelu in one launch."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        rows, num_columns = as_rows(x), x.shape[-1]
        settings = block_settings(num_columns)
        grid = (x.numel() // num_columns, triton.cdiv(num_columns, settings["BLOCK_I"]))
        _gelu_fwd_kernel[grid](rows, y, rows.shape[1], num_columns, rows.stride(0),
                               rows.stride(1), IS_TANH=is_tanh, **settings)
    return y


def gelu_bwd(dy: Tensor, x: Tensor, is_tanh: bool) -> Tensor:
    """The gradient of x in one launch."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        rows, dy_rows, num_columns = as_rows(x), as_rows(dy), x.shape[-1]
        settings = block_settings(num_columns)
        grid = (x.numel() // num_columns, triton.cdiv(num_columns, settings["BLOCK_I"]))
        _gelu_bwd_kernel[grid](rows, dy_rows, dx, rows.shape[1], num_columns, rows.stride(0),
                               rows.stride(1), dy_rows.stride(0), dy_rows.stride(1),
                               IS_TANH=is_tanh, **settings)
    return dx


@torch.library.custom_op("fastrl_kernels::swiglu", mutates_args=())
def _swiglu_op(gate_up: Tensor) -> Tensor:
    return swiglu_fwd(gate_up)


@_swiglu_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("fastrl_kernels::swiglu_bwd", mutates_args=())
def _swiglu_bwd_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    return swiglu_bwd(dy, gate_up)


@_swiglu_bwd_op.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


@torch.library.custom_op("fastrl_kernels::gelu", mutates_args=())
def _gelu_op(x: Tensor, is_tanh: bool) -> Tensor:
    return gelu_fwd(x, is_tanh)


@_gelu_op.register_fake
def _(x: Tensor, is_tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastrl_kernels::gelu_bwd", mutates_args=())
def _gelu_bwd_op(dy: Tensor, x: Tensor, is_tanh: bool) -> Tensor:
    return gelu_bwd(dy, x, is_tanh)


@_gelu_bwd_op.register_fake
def _(dy: Tensor, x: Tensor, is_tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


class _Swiglu(torch.autograd.Function):
    """Keeps gate_up alone: silu is made again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu_op(gate_up) if torch.compiler.is_compiling() else swiglu_fwd(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        run = _swiglu_bwd_op if torch.compiler.is_compiling() else swiglu_bwd
        return run(dy, gate_up)


class _Gelu(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.is_tanh = is_tanh
        return _gelu_op(x, is_tanh) if torch.compiler.is_compiling() else gelu_fwd(x, is_tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        run = _gelu_bwd_op if torch.compiler.is_compiling() else gelu_bwd
        return run(dy, x, ctx.is_tanh), None


def swiglu(gate_up: Tensor) -> Tensor:
    """fastrl.ops.swiglu on this backend."""
    y: Tensor = _Swiglu.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """fastrl.ops.gelu on this backend."""
    y: Tensor = _Gelu.apply(x, approximate == "tanh")  # type: ignore[no-untyped-call]
    return y


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    tensors = ("gate_up_ptr", "x_ptr", "y_ptr", "dy_ptr", "dgate_up_ptr", "dx_ptr")
    integers = ("num_columns", *(f"stride_{x}_{d}" for x in ("gate_up", "x", "dy") for d in "nh"))
    widths = (128, 256, 512, MAX_BLOCK, 100, 1000) if every else (MAX_BLOCK,)
    cases: list[AotCase] = []
    for dtype, num_columns in itertools.product(DTYPES, widths):
        aligned = ":16" if num_columns % 16 == 0 else ""
        types = {**dict.fromkeys(tensors, f"*{dtype}{aligned}"),
                 **dict.fromkeys(integers, f"i32{aligned}"), "num_heads": "i32"}
        settings = block_settings(num_columns)
        cases += [(_swiglu_fwd_kernel, types, settings), (_swiglu_bwd_kernel, types, settings)]
        for is_tanh in (False, True):
            cases += [(kernel, types, {"IS_TANH": is_tanh, **settings})
                      for kernel in (_gelu_fwd_kernel, _gelu_bwd_kernel)]
    return cases
