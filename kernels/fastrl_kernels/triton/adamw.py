"""adamw_step on a GPU: every tensor in one launch, one pass over the bytes.

    g = scale dL/dw        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - step_size m / (sqrt(v) + epsilon root)

A program takes 16384 elements of one tensor, found through a table of addresses, in tiles of 8 x
256: a row is a block of 8-bit moments with its scale. Bytes per parameter: 28 in float32 (16 read,
12 written), 26 for bf16 weights with remainders (14, 12), 14 with 8-bit moments besides (8, 6).
Products and sums are rounded one by one, as in the reference, so the bits are the same. Limits:
float32, and bfloat16 with remainders. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels import multi_tensor
from fastrl_kernels.multi_tensor import CHUNK
from fastrl_kernels.triton import support
from fastrl_kernels.triton.support import AotCase

__all__ = ["aot_cases", "prepare_adamw_step", "supports"]

ROWS = 8
COLUMNS = tl.constexpr(9)  # of the table, see multi_tensor.adamw_rows


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the op on such tensors; None where it can."""
    if dtype == torch.float16:
        return "weights are float32, or bfloat16 with remainders, not float16"
    return support.supports(device_type, dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _pointer(  # type: ignore[no-untyped-def]
    row_ptr, column: tl.constexpr, type: tl.constexpr, IS_ALIGNED: tl.constexpr
):
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(type))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def _encode(values, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes (int32, without sign) and scales of the rows of `values`, 0 beyond a tensor's end."""
    magnitudes = tl.abs(values)
    is_bad = tl.max(tl.where(magnitudes < float("inf"), 0, 1), 1)  # a NaN compares False
    scales = tl.where(is_bad > 0, float("nan"), tl.max(magnitudes, 1))
    is_used = (scales > 0)[:, None]
    shares = tl.div_rn(magnitudes, tl.where(is_used, scales[:, None], 1.0))
    return tl.where(is_used, tl.sqrt_rn(shares) * LEVELS + 0.5, 0.0).to(tl.int32), scales


@triton.jit  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]
    table_ptr, chunks_ptr, factors_ptr, keep_first, add_first, keep_second, add_second, decay,
    IS_BF16: tl.constexpr, IS_8BIT: tl.constexpr, IS_ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * chunk).to(tl.int64) * COLUMNS
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    numel = tl.load(row_ptr + 8)
    decay = tl.where(tl.load(row_ptr + 7) != 0, decay, 1.0)
    step_size = tl.load(factors_ptr)
    epsilon = tl.load(factors_ptr + 1)
    scale = tl.load(factors_ptr + 2)
    if IS_ALIGNED:
        numel = tl.multiple_of(numel, 16)
    if IS_BF16:
        weight_ptr = _pointer(row_ptr, 0, tl.int16, IS_ALIGNED)
        gradient_ptr = _pointer(row_ptr, 1, tl.bfloat16, IS_ALIGNED)
        remainder_ptr = _pointer(row_ptr, 4, tl.int16, IS_ALIGNED)
    else:
        weight_ptr = _pointer(row_ptr, 0, tl.float32, IS_ALIGNED)
        gradient_ptr = _pointer(row_ptr, 1, tl.float32, IS_ALIGNED)
    if IS_8BIT:
        first_ptr = _pointer(row_ptr, 2, tl.int8, IS_ALIGNED)
        second_ptr = _pointer(row_ptr, 3, tl.uint8, IS_ALIGNED)
        first_scale_ptr = _pointer(row_ptr, 5, tl.float32, IS_ALIGNED)
        second_scale_ptr = _pointer(row_ptr, 6, tl.float32, IS_ALIGNED)
    else:
        first_ptr = _pointer(row_ptr, 2, tl.float32, IS_ALIGNED)
        second_ptr = _pointer(row_ptr, 3, tl.float32, IS_ALIGNED)
    rows = tl.arange(0, ROWS)
    tile = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
    for begin in range(start, tl.minimum(start + CHUNK, numel), ROWS * 256):
        i = begin + tile
        is_inside = i < numel
        blocks = begin // 256 + rows
        is_block = blocks * 256 < numel
        g = tl.load(gradient_ptr + i, mask=is_inside, other=0.0).to(tl.float32) * scale
        m = tl.load(first_ptr + i, mask=is_inside, other=0).to(tl.float32)
        v = tl.load(second_ptr + i, mask=is_inside, other=0).to(tl.float32)
        if IS_8BIT:
            first_scales = tl.load(first_scale_ptr + blocks, mask=is_block, other=0.0)
            second_scales = tl.load(second_scale_ptr + blocks, mask=is_block, other=0.0)
            m = m * tl.abs(m) * tl.div_rn(first_scales, 16129.0)[:, None]
            root = v * v * tl.div_rn(second_scales, 65025.0)[:, None]
            v = root * root
        if IS_BF16:
            high = tl.load(weight_ptr + i, mask=is_inside, other=0).to(tl.int32) << 16
            low = tl.load(remainder_ptr + i, mask=is_inside, other=0).to(tl.int32)
            w = (high + low).to(tl.float32, bitcast=True)
        else:
            w = tl.load(weight_ptr + i, mask=is_inside, other=0.0)
        m = m * keep_first + g * add_first
        v = v * keep_second + g * add_second * g
        root = tl.sqrt_rn(v)
        w = w * decay - tl.div_rn(m * step_size, root + epsilon)
        if IS_BF16:
            bits = w.to(tl.int32, bitcast=True)
            # A NaN must not be rounded up: 0x7fffffff would become -0.
            high = tl.where(w != w, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
            tl.store(weight_ptr + i, high.to(tl.int16), mask=is_inside)
            tl.store(remainder_ptr + i, (bits - (high << 16)).to(tl.int16), mask=is_inside)
        else:
            tl.store(weight_ptr + i, w, mask=is_inside)
        if IS_8BIT:
            codes, scales = _encode(m, 127.0)
            tl.store(first_ptr + i, tl.where(m < 0, -codes, codes).to(tl.int8), mask=is_inside)
            tl.store(first_scale_ptr + blocks, scales, mask=is_block)
            codes, scales = _encode(root, 255.0)
            least = tl.where((root > 0) & (scales > 0)[:, None], 1, 0)
            tl.store(second_ptr + i, tl.maximum(codes, least).to(tl.uint8), mask=is_inside)
            tl.store(second_scale_ptr + blocks, scales, mask=is_block)
        else:
            tl.store(first_ptr + i, m, mask=is_inside)
            tl.store(second_ptr + i, v, mask=is_inside)


def _prepare(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], scales: Sequence[Tensor],
    factors: Tensor, beta1: float, beta2: float, decay: float, decayed: Sequence[bool],
) -> Callable[[], None]:
    """Takes all memory for a launch over contiguous tensors, for two where some are not read 16
    bytes at a time; what it returns launches.

    Args:
        scales: Of m and v of each parameter in turn.
        factors: See multi_tensor.adamw_factors.
    """
    rows = multi_tensor.adamw_rows(parameters, gradients, first, second, remainders, scales,
                                   decayed)
    numels = tuple(p.numel() for p in parameters)
    tables = [(is_aligned, *multi_tensor.tensor_table(*group, factors.device))
              for is_aligned, *group in multi_tensor.by_alignment(rows, numels, 7)]

    def run() -> None:
        for is_aligned, table, chunks in tables:
            if len(chunks) > 0:
                _adamw_kernel[(len(chunks),)](
                    table, chunks, factors, beta1, 1 - beta1, beta2, 1 - beta2, decay,
                    IS_BF16=bool(remainders), IS_8BIT=bool(scales), IS_ALIGNED=is_aligned,
                    CHUNK=CHUNK, ROWS=ROWS, num_warps=8, enable_fp_fusion=False)

    return run


def launch(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], scales: Sequence[Tensor],
    factors: Tensor, beta1: float, beta2: float, decay: float, decayed: Sequence[bool],
) -> None:
    """The step at once."""
    _prepare(parameters, gradients, first, second, remainders, scales, factors, beta1, beta2,
             decay, decayed)()


# What a compiled graph holds: the table is made of addresses, which a trace does not have.
_launch_op = torch.library.custom_op(
    "fastrl_kernels::adamw_step", launch,
    mutates_args=("parameters", "first", "second", "remainders", "scales"))


@_launch_op.register_fake
def _(*arguments: object) -> None:
    return None


prepare_adamw_step = partial(multi_tensor.prepare_adamw, _prepare, _launch_op)
"""fastrl.ops.adamw.prepare_adamw_step on this backend."""


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {"table_ptr": "*i64", "chunks_ptr": "*i32", "factors_ptr": "*fp32",
             "keep_first": "fp32", "add_first": "fp32", "keep_second": "fp32",
             "add_second": "fp32", "decay": "fp32"}
    return [
        (_adamw_kernel, types,
         {"IS_BF16": is_bf16, "IS_8BIT": is_8bit, "IS_ALIGNED": is_aligned, "CHUNK": CHUNK,
          "ROWS": ROWS, "num_warps": 8, "enable_fp_fusion": False})
        for is_bf16, is_8bit, is_aligned in itertools.product(
            (False, True), (False, True), (True, False) if every else (True,))
    ]
