"""gather_logprobs on a GPU: one read of each row; the kernels that the linear ops share.

    z = (logits + bias) / temperature    logprob = z_token - logsumexp(z)    H = -sum_v p_v log p_v

One program per row keeps a running maximum m, s = sum e^(z - m) and t = sum e^(z - m) (z - m), and
rescales s and t when m grows. Relative to m nothing cancels: logprob = z_token - m - log s and
H = log s - t / s hold their precision at logits of 1e4. The forward pass reads 2V (half precision)
or 4V (float32) bytes per row; the backward pass reads and writes that much, from m and log s, and
keeps no copy of the logits. Limits: float32, float16, bfloat16; computed in float32. Source:
Milakov & Gimelshein 2018 (arXiv 1805.02867) for the running sum.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "gather_logprobs", "supports"]

MAX_BLOCK = 4096
NEGLIGIBLE = tl.constexpr(-1e4)
"""e^-10000 is 0 in float32. In place of -inf, products with that 0 are 0 and not NaN."""


@triton.jit  # type: ignore[untyped-decorator]
def load_scores(  # type: ignore[no-untyped-def]
    row_ptr, bias_ptr, columns, num_columns, stride_v, inverse_temperature,
    HAS_BIAS: tl.constexpr,
):
    """z of a block of columns, float32; -inf beyond the last one."""
    is_inside = columns < num_columns
    offsets = columns.to(tl.int64) * stride_v
    z = tl.load(row_ptr + offsets, mask=is_inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    return z * inverse_temperature


@triton.jit  # type: ignore[untyped-decorator]
def reduce_row(  # type: ignore[no-untyped-def]
    row_ptr, bias_ptr, num_columns, stride_v, inverse_temperature,
    HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """m, log s and the entropy of a row, in one read."""
    block = tl.arange(0, BLOCK_V)
    maximum = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)
    num_blocks = tl.cdiv(num_columns, BLOCK_V)
    for i in range(num_blocks):
        # From the end, so that a second pass from the start finds in cache what was read last.
        z = load_scores(row_ptr, bias_ptr, (num_blocks - 1 - i) * BLOCK_V + block, num_columns,
                        stride_v, inverse_temperature, HAS_BIAS)
        larger = tl.maximum(maximum, tl.max(z, axis=0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        shift = tl.maximum(maximum - finite, NEGLIGIBLE)
        scale = tl.exp(shift)
        gap = z - finite
        e = tl.exp(gap)
        weighted = (weighted + sums * shift) * scale + e * tl.maximum(gap, NEGLIGIBLE)
        sums = sums * scale + e
        maximum = larger
    s = tl.sum(sums, axis=0)
    log_sum = tl.log(s)
    return maximum, log_sum, log_sum - tl.sum(weighted, axis=0) / s


@triton.jit  # type: ignore[untyped-decorator]
def token_score(  # type: ignore[no-untyped-def]
    row_ptr, bias_ptr, token, num_columns, stride_v, inverse_temperature, HAS_BIAS: tl.constexpr,
):
    """z of one token; NaN where there is no such token."""
    is_inside = (token >= 0) & (token < num_columns)
    z = tl.load(row_ptr + token * stride_v, mask=is_inside, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + token, mask=is_inside, other=0.0).to(tl.float32)
    return z * inverse_temperature


@triton.jit  # type: ignore[untyped-decorator]
def write_gradient(  # type: ignore[no-untyped-def]
    row_ptr, bias_ptr, drow_ptr, token, maximum, log_sum, entropy, dlogprob, dentropy, scale,
    num_columns, stride_v, stride_dv, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_DENTROPY: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """scale (dlogprob (onehot - p) - dentropy p (log p + H)), which may lie over the logits.

    In place, a narrower gradient begins where its row begins: a block is written below what is
    still to be read, but the first one over itself, hence the barrier.
    """
    block = tl.arange(0, BLOCK_V)
    for start in range(0, num_columns, BLOCK_V):
        columns = start + block
        z = load_scores(row_ptr, bias_ptr, columns, num_columns, stride_v, inverse_temperature,
                        HAS_BIAS)
        logprob = z - maximum - log_sum
        p = tl.exp(logprob)
        gradient = tl.where(columns == token, dlogprob, 0.0) - p * dlogprob
        if HAS_DENTROPY:
            gradient -= dentropy * p * (tl.maximum(logprob, NEGLIGIBLE) + entropy)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(drow_ptr + columns.to(tl.int64) * stride_dv, gradient * scale,
                 mask=columns < num_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _logprobs_fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, token_ids_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
    num_columns, stride_logits_m, stride_logits_v, inverse_temperature,
    HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_m
    maximum, log_sum, entropy = reduce_row(row_ptr, bias_ptr, num_columns, stride_logits_v,
                                           inverse_temperature, HAS_BIAS, BLOCK_V)
    z = token_score(row_ptr, bias_ptr, tl.load(token_ids_ptr + row), num_columns, stride_logits_v,
                    inverse_temperature, HAS_BIAS)
    tl.store(logprobs_ptr + row, z - maximum - log_sum)
    tl.store(entropy_ptr + row, entropy)
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit  # type: ignore[untyped-decorator]
def _logprobs_bwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, token_ids_ptr, entropy_ptr, maximum_ptr, log_sum_ptr, dlogprobs_ptr,
    dentropy_ptr, dlogits_ptr, num_columns, stride_logits_m, stride_logits_v, stride_dlogits_m,
    stride_dlogits_v, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_DENTROPY: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dentropy = 0.0
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + row)
    write_gradient(
        logits_ptr + row * stride_logits_m, bias_ptr, dlogits_ptr + row * stride_dlogits_m,
        tl.load(token_ids_ptr + row), tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row),
        tl.load(entropy_ptr + row), tl.load(dlogprobs_ptr + row), dentropy, inverse_temperature,
        num_columns, stride_logits_v, stride_dlogits_v, inverse_temperature,
        HAS_BIAS, HAS_DENTROPY, IN_PLACE, BLOCK_V,
    )


def block_settings(num_columns: int) -> dict[str, int]:
    """BLOCK_V and warps: 16 columns a thread where the row is long enough."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(num_columns)))
    return {"BLOCK_V": block, "num_warps": 8 if block == MAX_BLOCK else 4}


def new_rows(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for log-probs, entropy, m and log s of the rows of `like`, [M] float32 each."""
    shape, device = like.shape[:1], like.device
    return (torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device))


def logprobs_fwd(
    logits: Tensor, token_ids: Tensor, temperature: float, bias: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, m and log s, [M] float32 each, in one launch."""
    M, V = logits.shape
    rows = new_rows(logits) if out is None else out
    if M > 0:
        _logprobs_fwd_kernel[(M,)](
            logits, logits if bias is None else bias.contiguous(), token_ids.contiguous(), *rows,
            V, logits.stride(0), logits.stride(1), 1 / temperature, HAS_BIAS=bias is not None,
            **block_settings(V),
        )
    return rows


def logprobs_bwd(
    dlogits: Tensor, logits: Tensor, token_ids: Tensor, entropy: Tensor, maximum: Tensor,
    log_sum: Tensor, dlogprobs: Tensor, dentropy: Tensor | None, temperature: float,
    bias: Tensor | None = None,
) -> None:
    """Write the gradient of the logits to `dlogits` [M, V], which may be their own memory.

    There it may have half their width, with rows that begin where theirs do.
    """
    M, V = logits.shape
    if M > 0:
        _logprobs_bwd_kernel[(M,)](
            logits, logits if bias is None else bias.contiguous(), token_ids.contiguous(), entropy,
            maximum, log_sum, dlogprobs.contiguous(),
            dlogprobs if dentropy is None else dentropy.contiguous(), dlogits, V,
            logits.stride(0), logits.stride(1), dlogits.stride(0), dlogits.stride(1),
            1 / temperature, HAS_BIAS=bias is not None, HAS_DENTROPY=dentropy is not None,
            IN_PLACE=dlogits.data_ptr() == logits.data_ptr(), **block_settings(V),
        )


@torch.library.custom_op("fastrl_kernels::gather_logprobs", mutates_args=())
def _fwd_op(
    logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return logprobs_fwd(logits, token_ids, temperature)


@_fwd_op.register_fake
def _(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("fastrl_kernels::gather_logprobs_bwd", mutates_args=())
def _bwd_op(
    logits: Tensor, token_ids: Tensor, entropy: Tensor, maximum: Tensor, log_sum: Tensor,
    dlogprobs: Tensor, dentropy: Tensor | None, temperature: float,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    logprobs_bwd(dlogits, logits, token_ids, entropy, maximum, log_sum, dlogprobs, dentropy,
                 temperature)
    return dlogits


@_bwd_op.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits)


class _GatherLogprobs(torch.autograd.Function):
    """Keeps the logits and two numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float, overwrite_logits: bool
    ) -> tuple[Tensor, Tensor]:
        run = _fwd_op if torch.compiler.is_compiling() else logprobs_fwd
        logprobs, entropy, maximum, log_sum = run(logits, token_ids, temperature)
        ctx.save_for_backward(logits, token_ids, entropy, maximum, log_sum)
        ctx.temperature, ctx.overwrite_logits = temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, token_ids, entropy, maximum, log_sum = ctx.saved_tensors
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(entropy)
        arguments = (logits, token_ids, entropy, maximum, log_sum, dlogprobs, dentropy,
                     ctx.temperature)
        if torch.compiler.is_compiling():
            return _bwd_op(*arguments), None, None, None
        # A view with rows that overlap cannot hold its own gradient.
        is_overwritten = ctx.overwrite_logits and logits.is_contiguous()
        dlogits = logits.detach() if is_overwritten else torch.empty_like(logits)
        logprobs_bwd(dlogits, *arguments)
        if is_overwritten:  # autograd refuses whoever else needs the values that are gone
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, overwrite_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.gather_logprobs on this backend."""
    result: tuple[Tensor, Tensor] = _GatherLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, token_ids, temperature, overwrite_logits
    )
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    constants = {"stride_logits_v": 1, "BLOCK_V": MAX_BLOCK, "num_warps": 8}
    types = {
        "bias_ptr": "*fp32", "token_ids_ptr": "*i64", "logprobs_ptr": "*fp32",
        "entropy_ptr": "*fp32", "maximum_ptr": "*fp32", "log_sum_ptr": "*fp32",
        "dlogprobs_ptr": "*fp32", "dentropy_ptr": "*fp32", "num_columns": "i32",
        "stride_logits_m": "i32", "stride_dlogits_m": "i32", "inverse_temperature": "fp32",
    }
    forward = [
        (_logprobs_fwd_kernel, {**types, "logits_ptr": f"*{dtype}"},
         {**constants, "HAS_BIAS": has_bias})
        for has_bias, dtype in itertools.product((True, False) if every else (True,), DTYPES)
    ]
    flags = (True, False) if every else (True,)
    backward = [
        (_logprobs_bwd_kernel,
         {**types, "logits_ptr": f"*{logits}", "dlogits_ptr": f"*{dlogits}"},
         {**constants, "stride_dlogits_v": 1, "HAS_BIAS": has_bias, "HAS_DENTROPY": has_dentropy,
          "IN_PLACE": in_place})
        # Either the gradient has the type of the logits, or it lies over float32 ones.
        for (logits, dlogits, in_place), has_bias, has_dentropy in itertools.product(
            [*((dtype, dtype, False) for dtype in DTYPES), *(("fp32", d, True) for d in DTYPES)],
            flags, flags)
    ]
    return forward + backward
