"""linear_kl on a GPU: two chunks of logits by cuBLAS, one pass over both.

    q, p = softmax of the policy's and the reference's z = (hidden @ weight.T + bias) / temperature
    reverse: KL(q || p) = sum_v q_v (log q_v - log p_v)        forward: KL(p || q)

Forward: one program per row reads both rows once and keeps, of the first and the second of the two
distributions, the maximum m and s = sum e^(z - m), and t = sum e^(z1 - m1) ((z1 - m1) - (z2 - m2)):
KL = t / s1 - log s1 + log s2. Backward: the same products again, and one pass that overwrites the
policy's logits with their gradient, in the operands' type, from the four numbers and KL that were
kept. Operations 2M(D + D2)V and that with 4MDV; per pair of logits 8 bytes written and read
forward, and 10 more and two readings of the gradient backward (half-precision operands). In memory
at a time: one chunk of each. Limits: float32, float16 (its gradients need a scaled loss), bfloat16;
differentiable once. Source: Milakov & Gimelshein 2018 (arXiv 1805.02867) for the running sums.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.head_chunks import chunk_slices
from fastrl_kernels.triton.linear_logprob import (
    Gradients,
    add_head_gradients,
    as_tensors,
    gradient_view,
    multiply,
    new_chunk,
    new_gradients,
    same_dtype,
)
from fastrl_kernels.triton.logprob import MAX_BLOCK, NEGLIGIBLE, block_settings, load_scores
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "linear_kl", "supports"]
NUM_STATS = 5
"""Of the policy m and log s, of the reference m and log s, and KL."""


@triton.jit
def _shifted(maximum, z):  # type: ignore[no-untyped-def]
    """The larger maximum, z relative to it, and what the sums so far shift by.

    Sums over nothing but -inf are 0, or infinite where that is the answer: any shift will do.
    """
    larger = tl.maximum(maximum, tl.max(z, axis=0))
    origin = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, z - origin, tl.where(maximum == float("-inf"), 0.0, maximum - origin)


@triton.jit  # type: ignore[untyped-decorator]
def _kl_fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, ref_logits_ptr, ref_bias_ptr, stats_ptr, num_columns, stride_logits_m,
    stride_ref_logits_m, stride_stats_k, inverse_temperature, HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr, IS_REVERSE: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_V)
    m1 = tl.full([], float("-inf"), tl.float32)
    m2 = tl.full([], float("-inf"), tl.float32)
    s1 = tl.zeros([BLOCK_V], tl.float32)
    s2 = tl.zeros([BLOCK_V], tl.float32)
    t = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        columns = start + block
        z1 = load_scores(logits_ptr + row * stride_logits_m, bias_ptr, columns, num_columns, 1,
                         inverse_temperature, HAS_BIAS)
        z2 = load_scores(ref_logits_ptr + row * stride_ref_logits_m, ref_bias_ptr, columns,
                         num_columns, 1, inverse_temperature, HAS_REF_BIAS)
        if not IS_REVERSE:
            z1, z2 = z2, z1
        m1, gap1, shift1 = _shifted(m1, z1)
        m2, gap2, shift2 = _shifted(m2, z2)
        scale1 = tl.exp(shift1)
        e1 = tl.exp(gap1)
        # What rounds to probability 0 adds nothing, whatever its gap: 0 * inf would be NaN.
        t = tl.where(scale1 == 0, 0.0, (t + s1 * (shift1 - shift2)) * scale1)
        t += e1 * (tl.maximum(gap1, NEGLIGIBLE) - tl.where(e1 == 0, 0.0, gap2))
        s1 = s1 * scale1 + e1
        s2 = s2 * tl.exp(shift2) + tl.exp(gap2)
    sum1 = tl.sum(s1, axis=0)
    log_sum1 = tl.log(sum1)
    log_sum2 = tl.log(tl.sum(s2, axis=0))
    kl = tl.sum(t, axis=0) / sum1 - log_sum1 + log_sum2
    if not IS_REVERSE:
        m1, m2 = m2, m1
        log_sum1, log_sum2 = log_sum2, log_sum1
    stats_ptr += row
    stride = tl.zeros([], tl.int64) + stride_stats_k
    tl.store(stats_ptr, m1)
    tl.store(stats_ptr + stride, log_sum1)
    tl.store(stats_ptr + 2 * stride, m2)
    tl.store(stats_ptr + 3 * stride, log_sum2)
    tl.store(stats_ptr + 4 * stride, kl)


@triton.jit  # type: ignore[untyped-decorator]
def _kl_bwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, ref_logits_ptr, ref_bias_ptr, stats_ptr, dkl_ptr, dlogits_ptr,
    num_columns, stride_logits_m, stride_ref_logits_m, stride_dlogits_m, stride_stats_k,
    inverse_temperature, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    IS_REVERSE: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row
    stride = tl.zeros([], tl.int64) + stride_stats_k
    maximum = tl.load(stats_ptr)
    log_sum = tl.load(stats_ptr + stride)
    ref_maximum = tl.load(stats_ptr + 2 * stride)
    ref_log_sum = tl.load(stats_ptr + 3 * stride)
    kl = tl.load(stats_ptr + 4 * stride)
    scale = tl.load(dkl_ptr + row) * inverse_temperature
    for start in range(0, num_columns, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z = load_scores(logits_ptr + row * stride_logits_m, bias_ptr, columns, num_columns, 1,
                        inverse_temperature, HAS_BIAS)
        ref_z = load_scores(ref_logits_ptr + row * stride_ref_logits_m, ref_bias_ptr, columns,
                            num_columns, 1, inverse_temperature, HAS_REF_BIAS)
        logprob = z - maximum - log_sum
        ref_logprob = ref_z - ref_maximum - ref_log_sum
        q = tl.exp(logprob)
        if IS_REVERSE:
            gap = tl.maximum(logprob, NEGLIGIBLE) - tl.where(q == 0, 0.0, ref_logprob)
            gradient = q * (gap - kl)
        else:
            gradient = q - tl.exp(ref_logprob)
        # A narrower gradient begins where its row of logits begins: a block is written below what
        # is still to be read, but the first one over itself.
        tl.debug_barrier()
        tl.store(dlogits_ptr + row * stride_dlogits_m + columns, gradient * scale,
                 mask=columns < num_columns)


class _Heads:
    """Both models' operands, in types that a product takes, and memory for a chunk of each."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], temperature: float, direction: str,
        chunk_tokens: int | None,
    ) -> None:
        hidden, weight, self.bias, ref_hidden, ref_weight, self.ref_bias = tensors
        assert hidden is not None and weight is not None
        assert ref_hidden is not None and ref_weight is not None
        self.hidden, self.weight = same_dtype(hidden, weight)
        self.ref_hidden, self.ref_weight = same_dtype(ref_hidden, ref_weight)
        self.chunks = chunk_slices(len(hidden), 8 * len(weight), chunk_tokens)
        self.buffers = [new_chunk(hidden, weight, self.chunks, torch.float32) for _ in range(2)]
        self.options = {"HAS_BIAS": self.bias is not None,
                        "HAS_REF_BIAS": self.ref_bias is not None,
                        "IS_REVERSE": direction == "reverse", **block_settings(len(weight))}
        self.inverse_temperature = 1 / temperature

    def logits(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of a chunk, [m, V] float32 each, as the kernels take them: with their biases."""
        logits, ref_logits = (buffer[: rows.stop - rows.start] for buffer in self.buffers)
        multiply(self.hidden[rows], self.weight.T, logits)
        multiply(self.ref_hidden[rows], self.ref_weight.T, ref_logits)
        return (logits, logits if self.bias is None else self.bias.contiguous(),
                ref_logits, ref_logits if self.ref_bias is None else self.ref_bias.contiguous())


def linear_kl_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, temperature: float, direction: str, chunk_tokens: int | None,
) -> Tensor:
    """[5, M] float32: of the policy m and log s, of the reference m and log s, and KL."""
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    heads = _Heads(tensors, temperature, direction, chunk_tokens)
    stats = torch.empty(NUM_STATS, len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in heads.chunks:
        logits, bias_or_any, ref_logits, ref_bias_or_any = heads.logits(rows)
        _kl_fwd_kernel[(len(logits),)](
            logits, bias_or_any, ref_logits, ref_bias_or_any, stats[:, rows], logits.shape[1],
            logits.stride(0), ref_logits.stride(0), stats.stride(0), heads.inverse_temperature,
            **heads.options,
        )
    return stats


def linear_kl_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, stats: Tensor, dkl: Tensor, temperature: float, direction: str,
    chunk_tokens: int | None, needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of hidden, weight and bias in float32, where needed."""
    gradients = new_gradients(hidden, weight, bias, needs)
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    heads = _Heads(tensors, temperature, direction, chunk_tokens)
    dkl = dkl.contiguous()
    for rows in heads.chunks:
        logits, bias_or_any, ref_logits, ref_bias_or_any = heads.logits(rows)
        dlogits = gradient_view(logits, heads.hidden.dtype)
        _kl_bwd_kernel[(len(logits),)](
            logits, bias_or_any, ref_logits, ref_bias_or_any, stats[:, rows], dkl[rows], dlogits,
            logits.shape[1], logits.stride(0), ref_logits.stride(0), dlogits.stride(0),
            stats.stride(0), heads.inverse_temperature, **heads.options,
        )
        add_head_gradients(dlogits, heads.hidden[rows], heads.weight, rows, gradients)
    return gradients


@torch.library.custom_op("fastrl_kernels::linear_kl", mutates_args=())
def _fwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, temperature: float, direction: str, chunk_tokens: int | None,
) -> Tensor:
    return linear_kl_fwd(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature,
                         direction, chunk_tokens)


@_fwd_op.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(NUM_STATS, hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastrl_kernels::linear_kl_bwd", mutates_args=())
def _bwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, stats: Tensor, dkl: Tensor, temperature: float, direction: str,
    chunk_tokens: int | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = linear_kl_bwd(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, stats, dkl, temperature, direction,
        chunk_tokens, (needs[0], needs[1], needs[2]))
    return as_tensors(gradients, hidden)


@_bwd_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    gradients = new_gradients(hidden, weight, bias, (needs[0], needs[1], needs[2]))
    return as_tensors(gradients, hidden)


class _LinearKL(torch.autograd.Function):
    """Keeps its inputs and five numbers per row; backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        run = _fwd_op if torch.compiler.is_compiling() else linear_kl_fwd
        stats = run(*arguments)
        ctx.save_for_backward(*arguments[:6], stats)
        ctx.settings = arguments[6:]
        return stats[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: Tensor) -> tuple[Tensor | None, ...]:
        run: Any = _bwd_op if torch.compiler.is_compiling() else linear_kl_bwd
        needs = ctx.needs_input_grad[:3]
        gradients = run(*ctx.saved_tensors, dkl, *ctx.settings, needs)
        return (*(gradient.to(x.dtype) if is_needed else None for gradient, is_needed, x in
                  zip(gradients, needs, ctx.saved_tensors[:3], strict=True)), *(None,) * 6)


def linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *,
    bias: Tensor | None = None, ref_bias: Tensor | None = None, temperature: float = 1.0,
    direction: str = "reverse", chunk_tokens: int | None = None,
) -> Tensor:
    """fastrl.ops.linear_kl on this backend."""
    ref_bias = None if ref_bias is None else ref_bias.detach()
    kl: Tensor = _LinearKL.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, ref_hidden.detach(), ref_weight.detach(), ref_bias, temperature,
        direction, chunk_tokens
    )
    return kl


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {name: "*fp32" for name in ("logits_ptr", "ref_logits_ptr", "stats_ptr", "dkl_ptr")}
    types |= {name: "i32" for name in ("num_columns", "stride_logits_m", "stride_ref_logits_m",
                                       "stride_dlogits_m", "stride_stats_k")}
    types |= {"inverse_temperature": "fp32"}
    flags = (True, False) if every else (True,)
    return [
        (kernel, {**types, **{name: f"*{dtype}" for name in ("bias_ptr", "ref_bias_ptr",
                                                             "dlogits_ptr")}},
         {"HAS_BIAS": has_bias, "HAS_REF_BIAS": has_ref_bias, "IS_REVERSE": is_reverse,
          "BLOCK_V": MAX_BLOCK, "num_warps": 8})
        for kernel in (_kl_fwd_kernel, _kl_bwd_kernel) for dtype in DTYPES
        for has_bias, has_ref_bias, is_reverse in itertools.product(flags, flags, (True, False))
    ]
