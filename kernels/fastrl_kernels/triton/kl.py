"""kl_estimate on a GPU: k1, k2 and k3 in one launch, their gradients in another.

    u = ref_logprobs - logprobs        k1 = -u        k2 = u^2 / 2        k3 = exp(u) - 1 - u

One program per 1024 tokens. Reads 9 and writes 12 bytes per token; the backward pass reads 8 to 21
and writes 4 or 8. u is held at 20 in k3. Below |u| = 1/2 k3 is its series to u^9, where exp(u) - 1
- u would cancel, and exp(u) - 1 of the gradient is that plus u: Triton has no expm1. A masked
position is not loaded. Limits: float32, float16, bfloat16; computed in float32; other than
contiguous inputs are copied first. Source: Schulman 2020, joschu.net/blog/kl-approx.html.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "estimate_k3", "kl_estimate", "supports"]

BLOCK = 1024
MAX_EXPONENT = tl.constexpr(20.0)
"""exp is applied to at most this, as in the reference."""


@triton.jit
def _k3_series(u):  # type: ignore[no-untyped-def]
    """exp(u) - 1 - u by its series; what is left out is below 2^-24 of it up to |u| = 1/2."""
    tail = 1.0 / 40320 + u * (1.0 / 362880)
    tail = 1.0 / 120 + u * (1.0 / 720 + u * (1.0 / 5040 + u * tail))
    return u * u * (0.5 + u * (1.0 / 6 + u * (1.0 / 24 + u * tail)))


@triton.jit
def estimate_k3(k1):  # type: ignore[no-untyped-def]
    """exp(u) - 1 - u with u = -k1; a comparison holds u, since a minimum may lose NaN."""
    u = tl.where(-k1 > MAX_EXPONENT, MAX_EXPONENT, -k1)
    return tl.where(tl.abs(u) < 0.5, _k3_series(u), tl.exp(u) - 1.0 - u)


@triton.jit
def _dk3(k1):  # type: ignore[no-untyped-def]
    """Derivative of k3 by logprobs: 1 - exp(u), 0 where u is held."""
    u = tl.where(-k1 > MAX_EXPONENT, MAX_EXPONENT, -k1)
    grown = tl.where(tl.abs(u) < 0.5, u + _k3_series(u), tl.exp(u) - 1.0)
    return tl.where(-k1 > MAX_EXPONENT, 0.0, -grown)


@triton.jit  # type: ignore[untyped-decorator]
def _load_k1(  # type: ignore[no-untyped-def]
    logprobs_ptr, ref_logprobs_ptr, mask_ptr, numel, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):
    """Places of a block of tokens, which of them exist, and k1: 0 where masked."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = i < numel
    keep = is_inside
    if HAS_MASK:
        keep = tl.load(mask_ptr + i, mask=is_inside, other=0) != 0
    logprob = tl.load(logprobs_ptr + i, mask=keep, other=0.0).to(tl.float32)
    ref = tl.load(ref_logprobs_ptr + i, mask=keep, other=0.0).to(tl.float32)
    return i, is_inside, keep, logprob - ref


@triton.jit  # type: ignore[untyped-decorator]
def _kl_estimate_fwd_kernel(  # type: ignore[no-untyped-def]
    logprobs_ptr, ref_logprobs_ptr, mask_ptr, k1_ptr, k2_ptr, k3_ptr, numel,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):
    i, is_inside, _, k1 = _load_k1(logprobs_ptr, ref_logprobs_ptr, mask_ptr, numel, HAS_MASK, BLOCK)
    tl.store(k1_ptr + i, k1, mask=is_inside)
    tl.store(k2_ptr + i, 0.5 * k1 * k1, mask=is_inside)
    tl.store(k3_ptr + i, estimate_k3(k1), mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _kl_estimate_bwd_kernel(  # type: ignore[no-untyped-def]
    logprobs_ptr, ref_logprobs_ptr, mask_ptr, dk1_ptr, dk2_ptr, dk3_ptr, dlogprobs_ptr, dref_ptr,
    numel, stride_dk1, stride_dk2, stride_dk3,
    HAS_MASK: tl.constexpr, HAS_DK1: tl.constexpr, HAS_DK2: tl.constexpr, HAS_DK3: tl.constexpr,
    NEEDS_DLOGPROBS: tl.constexpr, NEEDS_DREF: tl.constexpr, BLOCK: tl.constexpr,
):
    i, is_inside, keep, k1 = _load_k1(logprobs_ptr, ref_logprobs_ptr, mask_ptr, numel, HAS_MASK,
                                      BLOCK)
    gradient = tl.zeros([BLOCK], tl.float32)
    if HAS_DK1:
        gradient += tl.load(dk1_ptr + i * stride_dk1, mask=keep, other=0.0)
    if HAS_DK2:
        gradient += tl.load(dk2_ptr + i * stride_dk2, mask=keep, other=0.0) * k1
    if HAS_DK3:
        gradient += tl.load(dk3_ptr + i * stride_dk3, mask=keep, other=0.0) * _dk3(k1)
    if NEEDS_DLOGPROBS:
        tl.store(dlogprobs_ptr + i, gradient, mask=is_inside)
    if NEEDS_DREF:
        tl.store(dref_ptr + i, -gradient, mask=is_inside)


def kl_estimate_fwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3, float32, contiguous."""
    k1, k2, k3 = (torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
                  for _ in range(3))
    if k1.numel() > 0:
        _kl_estimate_fwd_kernel[(triton.cdiv(k1.numel(), BLOCK),)](
            logprobs.contiguous(), ref_logprobs.contiguous(),
            logprobs if mask is None else mask.contiguous(), k1, k2, k3, k1.numel(),
            HAS_MASK=mask is not None, BLOCK=BLOCK,
        )
    return k1, k2, k3


def _in_order(gradient: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """A gradient as the kernel reads it: one number for all, as a sum gives it, or contiguous."""
    if gradient is None:
        return like, 0
    if all(stride == 0 for stride in gradient.stride()):
        return gradient, 0
    return gradient.contiguous(), 1


def kl_estimate_bwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, dk1: Tensor | None,
    dk2: Tensor | None, dk3: Tensor | None, needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logprobs and ref_logprobs where needed, in their types."""
    shape, device = logprobs.shape, logprobs.device
    dlogprobs, dref = (torch.empty(shape, dtype=x.dtype, device=device) if is_needed else None
                       for x, is_needed in zip((logprobs, ref_logprobs), needs, strict=True))
    given = [_in_order(x, logprobs) for x in (dk1, dk2, dk3)]
    if logprobs.numel() > 0:
        _kl_estimate_bwd_kernel[(triton.cdiv(logprobs.numel(), BLOCK),)](
            logprobs.contiguous(), ref_logprobs.contiguous(),
            logprobs if mask is None else mask.contiguous(), *(x for x, _ in given),
            logprobs if dlogprobs is None else dlogprobs, logprobs if dref is None else dref,
            logprobs.numel(), *(stride for _, stride in given), HAS_MASK=mask is not None,
            HAS_DK1=dk1 is not None, HAS_DK2=dk2 is not None, HAS_DK3=dk3 is not None,
            NEEDS_DLOGPROBS=needs[0], NEEDS_DREF=needs[1], BLOCK=BLOCK,
        )
    return dlogprobs, dref


@torch.library.custom_op("fastrl_kernels::kl_estimate", mutates_args=())
def _fwd_op(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return kl_estimate_fwd(logprobs, ref_logprobs, mask)


@_fwd_op.register_fake
def _(logprobs: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(logprobs.new_empty(logprobs.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("fastrl_kernels::kl_estimate_bwd", mutates_args=())
def _bwd_op(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, dk1: Tensor | None,
    dk2: Tensor | None, dk3: Tensor | None, needs: list[bool],
) -> tuple[Tensor, Tensor]:
    made = kl_estimate_bwd(logprobs, ref_logprobs, mask, dk1, dk2, dk3, (needs[0], needs[1]))
    dlogprobs, dref = (logprobs.new_empty(0) if x is None else x for x in made)
    return dlogprobs, dref


@_bwd_op.register_fake
def _(logprobs: Tensor, ref_logprobs: Tensor, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    return tuple(x.new_empty(x.shape) if is_needed else logprobs.new_empty(0)
                 for x, is_needed in zip((logprobs, ref_logprobs), needs, strict=True))


class _KLEstimate(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logprobs, ref_logprobs, mask)
        ctx.set_materialize_grads(False)
        run = _fwd_op if torch.compiler.is_compiling() else kl_estimate_fwd
        k1, k2, k3 = run(logprobs, ref_logprobs, mask)
        return k1, k2, k3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        run: Any = _bwd_op if torch.compiler.is_compiling() else kl_estimate_bwd
        made = run(*ctx.saved_tensors, *given, needs)
        return *(x if is_needed else None for x, is_needed in zip(made, needs, strict=True)), None


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """fastrl.ops.kl_estimate on this backend; differentiable once."""
    result: tuple[Tensor, Tensor, Tensor] = _KLEstimate.apply(  # type: ignore[no-untyped-call]
        logprobs, ref_logprobs, mask
    )
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {name: "*fp32" for name in ("k1_ptr", "k2_ptr", "k3_ptr", "dk1_ptr", "dk2_ptr",
                                        "dk3_ptr")}
    types |= {name: "i32" for name in ("numel", "stride_dk1", "stride_dk2", "stride_dk3")}
    types |= {"mask_ptr": "*i1"}
    typed = [{**types, **{name: f"*{dtype}" for name in ("logprobs_ptr", "ref_logprobs_ptr",
                                                         "dlogprobs_ptr", "dref_ptr")}}
             for dtype in DTYPES]
    flags = (True, False) if every else (True,)
    names = ("HAS_MASK", "HAS_DK1", "HAS_DK2", "HAS_DK3", "NEEDS_DLOGPROBS", "NEEDS_DREF")
    forward = [(_kl_estimate_fwd_kernel, types, {"HAS_MASK": has_mask, "BLOCK": BLOCK})
               for types, has_mask in itertools.product(typed, flags)]
    backward = [(_kl_estimate_bwd_kernel, types, dict(zip(names, values, strict=True)) |
                 {"BLOCK": BLOCK})
                for types in typed for values in itertools.product(flags, repeat=len(names))]
    return [*forward, *backward]
