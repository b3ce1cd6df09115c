"""rotary and qk_norm_rotary on a GPU: queries and keys in one launch, forward and backward.

    x <- weight round(x rstd), rstd = 1 / sqrt(mean(x^2) + epsilon)         (with weights)
    (x_i, x_{i + R/2}) <- (x_i cos - x_{i + R/2} sin, x_{i + R/2} cos + x_i sin)

A program takes one token: its angles once, then tiles of query heads and of key heads, each head in
three parts: the two that turn into each other, and what does not turn. Norms round where Llama's
do; the rotation is computed in float32 and rounded once. Backward: a program takes 16 tokens, turns
the gradient back, and adds up the gradients of the weights; those partial sums are added in a fixed
order. rstd is computed again, from what is in registers anyway. Tiles depend on the sizes of a head
alone: no token depends on the others.
Bytes per element of queries and keys in half precision: 4 forward, 6 backward with norms (without,
4). Inputs may be views of merged projections. Limits: float32, float16, bfloat16. Source: Su et al.
2021 (arXiv 2104.09864).
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "qk_norm_rotary", "rotary", "supports"]

NUM_TOKENS = 16
"""Tokens in a program of the backward pass."""
TILE = 1024
"""Channels of a tile of heads, about; twice as many would not always fit into the registers."""


@triton.jit
def load_part(starts, is_head, channels, first, limit):  # type: ignore[no-untyped-def]
    """[heads, channels] float32 of channels first + channels below limit; 0 outside."""
    is_inside = is_head[:, None] & (first + channels < limit)[None, :]
    return tl.load(starts[:, None] + (first + channels)[None, :], mask=is_inside,
                   other=0.0).to(tl.float32)


@triton.jit
def store_part(starts, is_head, channels, first, limit, values):  # type: ignore[no-untyped-def]
    is_inside = is_head[:, None] & (first + channels < limit)[None, :]
    tl.store(starts[:, None] + (first + channels)[None, :], values, mask=is_inside)


@triton.jit
def load_weight(weight_ptr, channels, first, limit):  # type: ignore[no-untyped-def]
    return tl.load(weight_ptr + first + channels, mask=first + channels < limit,
                   other=0.0).to(tl.float32)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def turn_heads(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, weight_ptr, num_heads, stride_x_h, stride_out_h, cos, sin, num_turning,
    num_channels, epsilon, is_written,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    """All heads of one token, from x_ptr to out_ptr; channels are neighbours in both."""
    half = num_turning // 2
    pairs = tl.arange(0, BLOCK_HALF)
    others = tl.arange(0, BLOCK_REST)
    for start in range(0, num_heads, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        is_head = heads < num_heads
        x = x_ptr + heads.to(tl.int64) * stride_x_h
        out = out_ptr + heads.to(tl.int64) * stride_out_h
        squares = tl.zeros([BLOCK_H], tl.float32)
        if HAS_ROTARY:
            first = load_part(x, is_head, pairs, 0, half)
            second = load_part(x, is_head, pairs, half, num_turning)
            squares += tl.sum(first * first + second * second, axis=1)
        if HAS_REST:
            rest = load_part(x, is_head, others, num_turning, num_channels)
            squares += tl.sum(rest * rest, axis=1)
        if HAS_NORM:
            rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / num_channels + epsilon))[:, None]
            dtype = x_ptr.dtype.element_ty
            if HAS_ROTARY:
                first = (first * rstd).to(dtype).to(tl.float32) * load_weight(
                    weight_ptr, pairs, 0, half)
                second = (second * rstd).to(dtype).to(tl.float32) * load_weight(
                    weight_ptr, pairs, half, num_turning)
                first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            if HAS_REST:
                rest = (rest * rstd).to(dtype).to(tl.float32) * load_weight(
                    weight_ptr, others, num_turning, num_channels)
        is_stored = is_head & is_written
        if HAS_ROTARY:
            store_part(out, is_stored, pairs, 0, half, tl.fma(first, cos, -(second * sin)))
            store_part(out, is_stored, pairs, half, num_turning, tl.fma(second, cos, first * sin))
        if HAS_REST:
            store_part(out, is_stored, others, num_turning, num_channels, rest)


@triton.jit
def load_angles(angles_ptr, token, stride_n, pairs, half):  # type: ignore[no-untyped-def]
    """[1, R/2] float32: the cosines or sines of one token."""
    return tl.load(angles_ptr + token * stride_n + pairs, mask=pairs < half,
                   other=0.0).to(tl.float32)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _rotary_fwd_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    num_q_heads, num_k_heads, num_turning, num_channels, epsilon, stride_query_n, stride_query_h,
    stride_key_n, stride_key_h, stride_cos_n, stride_sin_n,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)
    cos = load_angles(cos_ptr, token, stride_cos_n, pairs, num_turning // 2)
    sin = load_angles(sin_ptr, token, stride_sin_n, pairs, num_turning // 2)
    turn_heads(query_ptr + token * stride_query_n, q_out_ptr + token * num_q_heads * num_channels,
               q_weight_ptr, num_q_heads, stride_query_h, num_channels, cos, sin, num_turning,
               num_channels, epsilon, True, HAS_NORM, HAS_ROTARY, HAS_REST, BLOCK_H, BLOCK_HALF,
               BLOCK_REST)
    turn_heads(key_ptr + token * stride_key_n, k_out_ptr + token * num_k_heads * num_channels,
               k_weight_ptr, num_k_heads, stride_key_h, num_channels, cos, sin, num_turning,
               num_channels, epsilon, True, HAS_NORM, HAS_ROTARY, HAS_REST, BLOCK_H, BLOCK_HALF,
               BLOCK_REST)


@triton.jit  # type: ignore[untyped-decorator]
def _turn_heads_back(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, dx_ptr, weight_ptr, num_heads, stride_dy_h, stride_x_h, cos, sin, num_turning,
    num_channels, epsilon, dfirst, dsecond, drest,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    """The gradient of all heads of one token; the weights' is added up by head of a tile."""
    half = num_turning // 2
    pairs = tl.arange(0, BLOCK_HALF)
    others = tl.arange(0, BLOCK_REST)
    for start in range(0, num_heads, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        is_head = heads < num_heads
        dy = dy_ptr + heads.to(tl.int64) * stride_dy_h
        x = x_ptr + heads.to(tl.int64) * stride_x_h
        dx = dx_ptr + heads.to(tl.int64) * num_channels
        if HAS_ROTARY:
            turned = load_part(dy, is_head, pairs, 0, half)
            turned_second = load_part(dy, is_head, pairs, half, num_turning)
            first = turned * cos + turned_second * sin
            second = turned_second * cos - turned * sin
        if HAS_REST:
            rest = load_part(dy, is_head, others, num_turning, num_channels)
        if HAS_NORM:
            dtype = x_ptr.dtype.element_ty
            squares = tl.zeros([BLOCK_H], tl.float32)
            along = tl.zeros([BLOCK_H], tl.float32)
            if HAS_ROTARY:
                x_first = load_part(x, is_head, pairs, 0, half)
                x_second = load_part(x, is_head, pairs, half, num_turning)
                squares += tl.sum(x_first * x_first + x_second * x_second, axis=1)
            if HAS_REST:
                x_rest = load_part(x, is_head, others, num_turning, num_channels)
                squares += tl.sum(x_rest * x_rest, axis=1)
            rstd = tl.rsqrt(squares / num_channels + epsilon)[:, None]
            if HAS_ROTARY:
                hat, hat_second = x_first * rstd, x_second * rstd
                dfirst += first * hat.to(dtype).to(tl.float32)
                dsecond += second * hat_second.to(dtype).to(tl.float32)
                first *= load_weight(weight_ptr, pairs, 0, half)
                second *= load_weight(weight_ptr, pairs, half, num_turning)
                along += tl.sum(first * hat + second * hat_second, axis=1)
            if HAS_REST:
                hat_rest = x_rest * rstd
                drest += rest * hat_rest.to(dtype).to(tl.float32)
                rest *= load_weight(weight_ptr, others, num_turning, num_channels)
                along += tl.sum(rest * hat_rest, axis=1)
            share = (along / num_channels)[:, None]
            if HAS_ROTARY:
                first = (first - hat * share) * rstd
                second = (second - hat_second * share) * rstd
            if HAS_REST:
                rest = (rest - hat_rest * share) * rstd
        if HAS_ROTARY:
            store_part(dx, is_head, pairs, 0, half, first)
            store_part(dx, is_head, pairs, half, num_turning, second)
        if HAS_REST:
            store_part(dx, is_head, others, num_turning, num_channels, rest)
    return dfirst, dsecond, drest


@triton.jit  # type: ignore[untyped-decorator]
def _rotary_bwd_kernel(  # type: ignore[no-untyped-def]
    dq_out_ptr, dk_out_ptr, query_ptr, key_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    dquery_ptr, dkey_ptr, partials_ptr, num_tokens, num_q_heads, num_k_heads, num_turning,
    num_channels, epsilon, stride_dq_n, stride_dq_h, stride_dk_n, stride_dk_h, stride_query_n,
    stride_query_h, stride_key_n, stride_key_h, stride_cos_n, stride_sin_n,
    NUM_TOKENS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr,
    HAS_REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)
    others = tl.arange(0, BLOCK_REST)
    half = num_turning // 2
    dq_first = tl.zeros([BLOCK_H, BLOCK_HALF], tl.float32)
    dq_second = tl.zeros([BLOCK_H, BLOCK_HALF], tl.float32)
    dq_rest = tl.zeros([BLOCK_H, BLOCK_REST], tl.float32)
    dk_first = tl.zeros([BLOCK_H, BLOCK_HALF], tl.float32)
    dk_second = tl.zeros([BLOCK_H, BLOCK_HALF], tl.float32)
    dk_rest = tl.zeros([BLOCK_H, BLOCK_REST], tl.float32)
    begin = program * NUM_TOKENS
    for token in range(begin, min(begin + NUM_TOKENS, num_tokens)):
        cos = load_angles(cos_ptr, token, stride_cos_n, pairs, half)
        sin = load_angles(sin_ptr, token, stride_sin_n, pairs, half)
        dq_first, dq_second, dq_rest = _turn_heads_back(
            dq_out_ptr + token * stride_dq_n, query_ptr + token * stride_query_n,
            dquery_ptr + token * num_q_heads * num_channels, q_weight_ptr, num_q_heads,
            stride_dq_h, stride_query_h, cos, sin, num_turning, num_channels, epsilon, dq_first,
            dq_second, dq_rest, HAS_NORM, HAS_ROTARY, HAS_REST, BLOCK_H, BLOCK_HALF, BLOCK_REST)
        dk_first, dk_second, dk_rest = _turn_heads_back(
            dk_out_ptr + token * stride_dk_n, key_ptr + token * stride_key_n,
            dkey_ptr + token * num_k_heads * num_channels, k_weight_ptr, num_k_heads, stride_dk_h,
            stride_key_h, cos, sin, num_turning, num_channels, epsilon, dk_first, dk_second,
            dk_rest, HAS_NORM, HAS_ROTARY, HAS_REST, BLOCK_H, BLOCK_HALF, BLOCK_REST)
    if HAS_NORM:
        q_ptr = partials_ptr + program * 2 * num_channels
        k_ptr = q_ptr + num_channels
        if HAS_ROTARY:
            tl.store(q_ptr + pairs, tl.sum(dq_first, axis=0), mask=pairs < half)
            tl.store(q_ptr + half + pairs, tl.sum(dq_second, axis=0), mask=pairs < half)
            tl.store(k_ptr + pairs, tl.sum(dk_first, axis=0), mask=pairs < half)
            tl.store(k_ptr + half + pairs, tl.sum(dk_second, axis=0), mask=pairs < half)
        if HAS_REST:
            is_rest = num_turning + others < num_channels
            tl.store(q_ptr + num_turning + others, tl.sum(dq_rest, axis=0), mask=is_rest)
            tl.store(k_ptr + num_turning + others, tl.sum(dk_rest, axis=0), mask=is_rest)


def head_settings(num_channels: int, num_turning: int) -> dict[str, Any]:
    """The tile of heads and its parts, from the sizes of a head alone."""
    has_rest = num_turning < num_channels
    block_half = triton.next_power_of_2(max(1, num_turning // 2))
    block_rest = triton.next_power_of_2(max(1, num_channels - num_turning))
    width = triton.next_power_of_2(2 * block_half + block_rest if has_rest else 2 * block_half)
    return {
        "HAS_ROTARY": num_turning > 0, "HAS_REST": has_rest, "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest, "BLOCK_H": max(1, TILE // width),
        # Without a bound on registers ptxas aims lower, and spills two of them.
        "num_warps": 8 if has_rest else 4, "maxnreg": 128,
        # The trainer's kernel and the engine's must not differ in which products are fused.
        "enable_fp_fusion": False,
    }


def with_neighbours(x: Tensor) -> Tensor:
    """x itself where its channels are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary_fwd(
    query: Tensor, key: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
    sin: Tensor, epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, contiguous, in one launch; normalised where there are weights."""
    query, key, cos, sin = (with_neighbours(x) for x in (query, key, cos, sin))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    num_tokens, num_q_heads, num_channels = query.shape
    num_turning = 2 * cos.shape[-1]
    if num_tokens > 0:
        _rotary_fwd_kernel[(num_tokens,)](
            query, key, query if q_weight is None else q_weight.contiguous(),
            key if k_weight is None else k_weight.contiguous(), cos, sin, q_out, k_out,
            num_q_heads, key.shape[1], num_turning, num_channels, epsilon,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), cos.stride(0),
            sin.stride(0), HAS_NORM=q_weight is not None,
            **head_settings(num_channels, num_turning),
        )
    return q_out, k_out


def rotary_bwd(
    dq_out: Tensor, dk_out: Tensor, query: Tensor, key: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor, sin: Tensor, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dquery, dkey, and [2, C] float32: the gradients of the weights, where there are some."""
    dq_out, dk_out, query, key, cos, sin = (
        with_neighbours(x) for x in (dq_out, dk_out, query, key, cos, sin))
    dquery, dkey = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    num_tokens, num_q_heads, num_channels = query.shape
    num_programs = triton.cdiv(num_tokens, NUM_TOKENS)
    num_turning = 2 * cos.shape[-1]
    has_norm = q_weight is not None
    partials = torch.empty(num_programs if has_norm else 0, 2, num_channels, dtype=torch.float32,
                           device=query.device)
    if num_tokens > 0:
        _rotary_bwd_kernel[(num_programs,)](
            dq_out, dk_out, query, key, query if q_weight is None else q_weight.contiguous(),
            key if k_weight is None else k_weight.contiguous(), cos, sin, dquery, dkey, partials,
            num_tokens, num_q_heads, key.shape[1], num_turning, num_channels, epsilon,
            dq_out.stride(0), dq_out.stride(1), dk_out.stride(0), dk_out.stride(1),
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), cos.stride(0),
            sin.stride(0), NUM_TOKENS=NUM_TOKENS, HAS_NORM=has_norm,
            **head_settings(num_channels, num_turning),
        )
    return dquery, dkey, partials.sum(dim=0)


@torch.library.custom_op("fastrl_kernels::rotary", mutates_args=())
def _fwd_op(
    query: Tensor, key: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
    sin: Tensor, epsilon: float,
) -> tuple[Tensor, Tensor]:
    return rotary_fwd(query, key, q_weight, k_weight, cos, sin, epsilon)


@_fwd_op.register_fake
def _(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@torch.library.custom_op("fastrl_kernels::rotary_bwd", mutates_args=())
def _bwd_op(
    dq_out: Tensor, dk_out: Tensor, query: Tensor, key: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor, sin: Tensor, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return rotary_bwd(dq_out, dk_out, query, key, q_weight, k_weight, cos, sin, epsilon)


@_bwd_op.register_fake
def _(dq_out: Tensor, dk_out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (dq_out.new_empty(dq_out.shape), dk_out.new_empty(dk_out.shape),
            dq_out.new_empty(2, dq_out.shape[-1], dtype=torch.float32))


class _Rotary(torch.autograd.Function):
    """Keeps queries and keys as they came, for the norms alone, and the angles."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
        cos: Tensor, sin: Tensor, epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.has_norm, ctx.epsilon = q_weight is not None, epsilon
        ctx.save_for_backward(cos, sin, *((query, key, q_weight, k_weight) if ctx.has_norm
                                          else ()))
        run = _fwd_op if torch.compiler.is_compiling() else rotary_fwd
        return run(query, key, q_weight, k_weight, cos, sin, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *kept = ctx.saved_tensors
        query, key, q_weight, k_weight = kept or (dq_out, dk_out, None, None)
        run = _bwd_op if torch.compiler.is_compiling() else rotary_bwd
        dquery, dkey, dweights = run(dq_out, dk_out, query, key, q_weight, k_weight, cos, sin,
                                     ctx.epsilon)
        dq_weight = dk_weight = None
        if q_weight is not None:
            dq_weight, dk_weight = dweights.to(q_weight.dtype)
        return dquery, dkey, dq_weight, dk_weight, None, None, None


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """fastrl.ops.rotary on this backend."""
    both: tuple[Tensor, Tensor] = _Rotary.apply(  # type: ignore[no-untyped-call]
        query, key, None, None, cos, sin, 0.0)
    return both


def qk_norm_rotary(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.qk_norm_rotary on this backend."""
    both: tuple[Tensor, Tensor] = _Rotary.apply(  # type: ignore[no-untyped-call]
        query, key, q_weight, k_weight, cos, sin, epsilon)
    return both


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    tensors = ("query", "key", "q_weight", "k_weight", "cos", "sin", "q_out", "k_out", "dq_out",
               "dk_out", "dquery", "dkey")
    numbers = ("num_turning", "num_channels",
               *(f"stride_{x}_{d}" for x in ("query", "key", "dq", "dk") for d in "nh"),
               "stride_cos_n", "stride_sin_n")
    # Usual heads, GPT-NeoX's, one with parts of uneven size, and one that no load fits.
    sizes = ((128, 128), (64, 64), (256, 64), (80, 20), (25, 10)) if every else ((128, 128),)
    cases: list[AotCase] = []
    for dtype, (channels, turning), has_norm in itertools.product(
            DTYPES, sizes, (True, False) if every else (True,)):
        aligned = ":16" if channels % 16 == 0 == turning % 16 else ""
        types = {**{f"{x}_ptr": f"*{dtype}{aligned}" for x in tensors},
                 **dict.fromkeys(numbers, f"i32{aligned}"), "partials_ptr": "*fp32:16",
                 "num_tokens": "i32", "num_q_heads": "i32", "num_k_heads": "i32",
                 "epsilon": "fp32"}
        constants = {"HAS_NORM": has_norm, **head_settings(channels, turning)}
        cases += [(_rotary_fwd_kernel, types, constants),
                  (_rotary_bwd_kernel, types, {**constants, "NUM_TOKENS": NUM_TOKENS})]
    return cases
