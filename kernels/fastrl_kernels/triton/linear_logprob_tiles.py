"""linear_logprobs, forward only, with no logits in memory: tiles of the product, reduced in place.

    z = (hidden @ weight.T + bias) / temperature
    logprob = z_token - logsumexp(z)        H = -sum_v p_v log p_v

A program makes 128 rows x 2048 columns of logits, one tile of 128 x 128 after the other, and keeps
of each row the maximum m, s = sum e^(z - m), t = sum e^(z - m) (z - m) and the token's z, from the
same accumulator. A second kernel merges the slices of a row from left to right. The tiles and the
slices depend on the vocabulary and the type alone, so a row's bits depend on no other row. Floor:
2MDV operations (float32 without tensor cores, "ieee"), 2(MD + VD) bytes in half precision where the
cache holds what neighbours share, and 32 bytes per row and slice. Limits: float32, float16,
bfloat16; hidden and weight of one type. Source: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.logprob import NEGLIGIBLE, new_rows
from fastrl_kernels.triton.support import DTYPES, AotCase, is_interpreted, supports

__all__ = ["aot_cases", "supports", "tiled_logprobs"]

SLICE = 2048
"""Columns of the vocabulary per program: enough to pay for its start, few enough to fill a GPU."""
MERGE_ROWS = 128


@triton.jit
def _rescaled(maximum, sums, weighted, larger):  # type: ignore[no-untyped-def]
    """s and t of rows relative to a maximum that is at least as large."""
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    shift = tl.maximum(maximum - finite, NEGLIGIBLE)
    scale = tl.exp(shift)
    return sums * scale, (weighted + sums * shift) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _logprob_slices_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, weight_ptr, bias_ptr, token_ids_ptr, parts_ptr, num_rows, num_columns, width,
    stride_hidden_m, stride_hidden_d, stride_weight_v, stride_weight_d, inverse_temperature,
    HAS_BIAS: tl.constexpr, WIDENS: tl.constexpr, SLICE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    slice_start = tl.program_id(1) * SLICE
    slice_end = tl.minimum(slice_start + SLICE, num_columns)
    token = tl.load(token_ids_ptr + row, mask=is_row, other=-1)
    block_d = tl.arange(0, BLOCK_D)
    hidden_row = hidden_ptr + row[:, None] * stride_hidden_m
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    target = tl.zeros([BLOCK_M], tl.float32)
    for start in range(slice_start, slice_end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        is_column = column < num_columns
        weight_row = weight_ptr + column.to(tl.int64)[None, :] * stride_weight_v
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + block_d
            is_inside = d < width
            h = tl.load(hidden_row + d.to(tl.int64)[None, :] * stride_hidden_d,
                        mask=is_row[:, None] & is_inside[None, :], other=0.0)
            w = tl.load(weight_row + d.to(tl.int64)[:, None] * stride_weight_d,
                        mask=is_inside[:, None] & is_column[None, :], other=0.0)
            if WIDENS:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            z += bias[None, :]
        z = tl.where(is_column[None, :], z * inverse_temperature, float("-inf"))
        target += tl.sum(tl.where(column[None, :] == token[:, None], z, 0.0), axis=1)
        larger = tl.maximum(maximum, tl.max(z, axis=1))
        sums, weighted = _rescaled(maximum, sums, weighted, larger)
        maximum = larger
        gap = z - tl.where(larger == float("-inf"), 0.0, larger)[:, None]
        e = tl.exp(gap)
        sums += tl.sum(e, axis=1)
        weighted += tl.sum(e * tl.maximum(gap, NEGLIGIBLE), axis=1)
    stride = tl.zeros([], tl.int64) + num_rows
    part_ptr = parts_ptr + tl.program_id(1) * 4 * stride + row
    tl.store(part_ptr, maximum, mask=is_row)
    tl.store(part_ptr + stride, sums, mask=is_row)
    tl.store(part_ptr + 2 * stride, weighted, mask=is_row)
    tl.store(part_ptr + 3 * stride, target, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_slices_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, token_ids_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr, num_rows,
    num_columns, num_slices, SLICE: tl.constexpr, BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    stride = tl.zeros([], tl.int64) + num_rows
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for i in range(num_slices):
        part_ptr = parts_ptr + i * 4 * stride + row
        part_maximum = tl.load(part_ptr, mask=is_row, other=0.0)
        larger = tl.maximum(maximum, part_maximum)
        sums, weighted = _rescaled(maximum, sums, weighted, larger)
        more_sums, more_weighted = _rescaled(
            part_maximum, tl.load(part_ptr + stride, mask=is_row, other=1.0),
            tl.load(part_ptr + 2 * stride, mask=is_row, other=0.0), larger)
        sums += more_sums
        weighted += more_weighted
        maximum = larger
    token = tl.load(token_ids_ptr + row, mask=is_row, other=-1)
    is_token = (token >= 0) & (token < num_columns)
    z = tl.load(parts_ptr + (token // SLICE * 4 + 3) * stride + row, mask=is_row & is_token,
                other=float("nan"))
    log_sum = tl.log(sums)
    tl.store(logprobs_ptr + row, z - maximum - log_sum, mask=is_row)
    tl.store(entropy_ptr + row, log_sum - weighted / sums, mask=is_row)
    tl.store(maximum_ptr + row, maximum, mask=is_row)
    tl.store(log_sum_ptr + row, log_sum, mask=is_row)


def tile_settings(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Sizes of a tile and launch options: tensor cores take larger ones than float32 units.

    Rows that do not begin at 16 bytes are loaded number by number; wide tiles of them would spill.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_D": 64 if width % 16 == 0 else 32,
            "num_warps": 8, "num_stages": 3}


def tiled_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, m and log s, [M] float32 each; hidden and weight are of one type.

    In memory beyond them: 16 bytes per row and 2048 columns.
    """
    (M, D), V = hidden.shape, len(weight)
    rows = new_rows(hidden)
    num_slices = triton.cdiv(V, SLICE)
    parts = torch.empty(num_slices, 4, M, dtype=torch.float32, device=hidden.device)
    settings, token_ids = tile_settings(hidden.dtype, D), token_ids.contiguous()
    if M > 0:
        _logprob_slices_kernel[(triton.cdiv(M, settings["BLOCK_M"]), num_slices)](
            hidden, weight, weight if bias is None else bias.contiguous(), token_ids, parts, M, V,
            D, *hidden.stride(), *weight.stride(), 1 / temperature, HAS_BIAS=bias is not None,
            # The interpreter multiplies bfloat16 as the integers that stand for it.
            WIDENS=is_interpreted() and hidden.dtype == torch.bfloat16, SLICE=SLICE, **settings,
        )
        _merge_slices_kernel[(triton.cdiv(M, MERGE_ROWS),)](
            parts, token_ids, *rows, M, V, num_slices, SLICE=SLICE, BLOCK_M=MERGE_ROWS,
        )
    return rows


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    names = ("parts_ptr", "logprobs_ptr", "entropy_ptr", "maximum_ptr", "log_sum_ptr", "bias_ptr")
    types = {name: "*fp32" for name in names}
    types |= {name: "i32" for name in ("num_rows", "num_columns", "num_slices")}
    types |= {"token_ids_ptr": "*i64", "inverse_temperature": "fp32"}
    strides = ("width", "stride_hidden_m", "stride_weight_v")
    dtypes = dict(zip(DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
    slices = [
        (_logprob_slices_kernel,
         {**types, **{name: f"i32{aligned}" for name in strides},
          "hidden_ptr": f"*{name}{aligned}", "weight_ptr": f"*{name}{aligned}"},
         {"stride_hidden_d": 1, "stride_weight_d": 1, "HAS_BIAS": has_bias, "WIDENS": False,
          "SLICE": SLICE, **tile_settings(dtypes[name], 16 if aligned else 1)})
        for name, has_bias, aligned in itertools.product(
            DTYPES, (True, False) if every else (True,), (":16", "") if every else (":16",))
    ]
    return [*slices, (_merge_slices_kernel, types, {"SLICE": SLICE, "BLOCK_M": MERGE_ROWS})]
