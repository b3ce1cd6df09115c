"""ppo_loss on a GPU: both losses, their gradients and all statistics in two launches.

    rho = exp(logprob - old_logprob)        V_c = clip(V, V_old - eps_v, V_old + eps_v)
    loss = (sum_mask max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
            + value_coef 0.5 sum_mask max((V - returns)^2, (V_c - returns)^2)) / denominator

First launch: one program per block of 1024 tokens computes the losses and the gradients of the sums
of losses, whitens A by given moments (whiten.py) on the way, and writes its 15 sums. Second launch:
one program adds these in a fixed order to the statistics, the loss, and the factor 1 / denominator,
which the backward pass applies, one product per gradient; so the count of the mask can be the
denominator without a word to the host. policy_loss and value_loss are the same kernels with one
half left out. Bytes per token in float32: 25 read and 8 written (one half: 13 and 4), 0.2 for sums;
backward as much as the gradients again, read and written. Limits: float32, float16, bfloat16;
computed in float32, sums and k2, k3 in float64; tensors that are not contiguous are copied;
differentiable once. Sources: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; Ziegler et al. 2019
(arXiv 1909.08593), code.
"""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports
from fastrl_kernels.triton.whiten import BLOCK_P, merged_moments

__all__ = ["aot_cases", "ppo_loss", "supports"]

NUM_SUMS = tl.constexpr(15)
"""count; policy loss, clipped, k2, k3, ratio, ratio^2, entropy (0) and the largest |log_ratio|;
value loss, clipped, squared error, values, returns, returns^2."""
LARGEST = tl.constexpr(8)
FIRST_OF_VALUES = tl.constexpr(9)
BLOCK_N = 1024
LAUNCH = {"num_warps": 8, "maxnreg": 80}
"""Four tokens a thread. Without the bound ptxas aims at 48 registers where no gradient is written,
and spills one."""
BLOCK_K = 16
BLOCK_PARTS = 64
"""Blocks whose sums are added at a time: 64 x 16 float64, 8 per thread."""


@triton.jit
def policy_token(  # type: ignore[no-untyped-def]
    logprob, old_logprob, advantage, ratio_low, ratio_high, max_log_ratio,
):
    """A token's log-ratios (exact and held), ratio, loss, whether clipped, and derivative.

    Comparisons, not min and max, so that NaN stays NaN.
    """
    exact = logprob - old_logprob
    log_ratio = tl.where(exact > max_log_ratio, max_log_ratio, exact)
    log_ratio = tl.where(exact < -max_log_ratio, -max_log_ratio, log_ratio)
    ratio = tl.exp(log_ratio)
    held = tl.where(ratio > ratio_high, ratio_high, ratio)
    held = tl.where(ratio < ratio_low, ratio_low, held)
    unclipped = -advantage * ratio
    clipped = -advantage * held
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)
    is_active = (tl.abs(exact) <= max_log_ratio) & (is_clipped == 0)
    return exact, log_ratio, ratio, loss, is_clipped, tl.where(is_active, unclipped, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _value_token(  # type: ignore[no-untyped-def]
    value, old_value, target, value_clip_range, CLIPS_VALUES: tl.constexpr,
):
    """A token's squared error, the larger of it and the clipped one, whether clipped, derivative.

    The derivative is that of half the larger one. Where both are equal though the value is outside
    its range, it is half as long, as that of torch's maximum.
    """
    error = value - target
    squared = error * error
    if CLIPS_VALUES:
        low = old_value - value_clip_range
        high = old_value + value_clip_range
        near = tl.where(value > high, high, value)
        near = tl.where(value < low, low, near)
        near = tl.where(old_value != old_value, old_value, near)
        clipped = (near - target) * (near - target)
        is_clipped = clipped > squared
        larger = tl.where((squared >= clipped) | (squared != squared), squared, clipped)
        is_tied = (clipped == squared) & ((value < low) | (value > high))
        derivative = tl.where(is_clipped, 0.0, tl.where(is_tied, 0.5 * error, error))
    else:
        is_clipped = squared < 0
        larger = squared
        derivative = error
    return squared, larger, is_clipped, derivative


@triton.jit  # type: ignore[untyped-decorator]
def _largest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum along an axis; NaN where there is one, which tl.max passes over."""
    num_nan = tl.sum((x != x).to(tl.int32), axis)
    return tl.where(num_nan > 0, float("nan"), tl.max(x, axis))


@triton.jit  # type: ignore[untyped-decorator]
def _ppo_loss_fwd_kernel(  # type: ignore[no-untyped-def]
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, values_ptr, old_values_ptr, returns_ptr,
    mask_ptr, moments_ptr, dlogprobs_ptr, dvalues_ptr, sums_ptr, num_tokens, num_moments,
    stride_sums_k, ratio_low, ratio_high, value_clip_range, value_coef, max_log_ratio, epsilon,
    HAS_POLICY: tl.constexpr, HAS_VALUES: tl.constexpr, HAS_MOMENTS: tl.constexpr,
    CLIPS_VALUES: tl.constexpr, WRITES_DLOGPROBS: tl.constexpr, WRITES_DVALUES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK_N + tl.arange(0, BLOCK_N)
    is_inside = i < num_tokens
    keep = tl.load(mask_ptr + i, mask=is_inside, other=0) != 0
    sums_ptr += program
    stride = tl.zeros([], tl.int64) + stride_sums_k
    tl.store(sums_ptr, tl.sum(keep.to(tl.float64), 0))
    if HAS_POLICY:
        advantage = tl.load(advantages_ptr + i, mask=keep, other=0.0).to(tl.float32)
        if HAS_MOMENTS:
            mean, rstd = merged_moments(moments_ptr, num_moments, epsilon, BLOCK_P)
            advantage = tl.where(keep, (advantage - mean) * rstd, 0.0)
        exact, log_ratio, ratio, loss, is_clipped, dlogprob = policy_token(
            tl.load(logprobs_ptr + i, mask=keep, other=0.0).to(tl.float32),
            tl.load(old_logprobs_ptr + i, mask=keep, other=0.0).to(tl.float32),
            advantage, ratio_low, ratio_high, max_log_ratio)
        wide = log_ratio.to(tl.float64)  # exp(u) - 1 - u cancels for ratios near 1
        weight = tl.where(keep, ratio, 0.0).to(tl.float64)
        tl.store(sums_ptr + stride, tl.sum(loss.to(tl.float64), 0))
        tl.store(sums_ptr + 2 * stride, tl.sum(is_clipped.to(tl.float64), 0))
        tl.store(sums_ptr + 3 * stride, tl.sum(0.5 * wide * wide, 0))
        tl.store(sums_ptr + 4 * stride, tl.sum(tl.exp(wide) - 1.0 - wide, 0))
        tl.store(sums_ptr + 5 * stride, tl.sum(weight, 0))
        tl.store(sums_ptr + 6 * stride, tl.sum(weight * weight, 0))
        tl.store(sums_ptr + 7 * stride, 0.0)
        tl.store(sums_ptr + LARGEST * stride, _largest(tl.abs(exact), 0))
        if WRITES_DLOGPROBS:
            tl.store(dlogprobs_ptr + i, dlogprob, mask=is_inside)
    else:
        for k in range(1, FIRST_OF_VALUES):
            tl.store(sums_ptr + k * stride, 0.0)
    if HAS_VALUES:
        value = tl.load(values_ptr + i, mask=keep, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + i, mask=keep, other=0.0).to(tl.float32)
        squared, larger, is_clipped, dvalue = _value_token(
            value, tl.load(old_values_ptr + i, mask=keep, other=0.0).to(tl.float32), target,
            value_clip_range, CLIPS_VALUES)
        wide = target.to(tl.float64)
        tl.store(sums_ptr + 9 * stride, tl.sum(0.5 * larger.to(tl.float64), 0))
        tl.store(sums_ptr + 10 * stride, tl.sum(is_clipped.to(tl.float64), 0))
        tl.store(sums_ptr + 11 * stride, tl.sum(squared.to(tl.float64), 0))
        tl.store(sums_ptr + 12 * stride, tl.sum(value.to(tl.float64), 0))
        tl.store(sums_ptr + 13 * stride, tl.sum(wide, 0))
        tl.store(sums_ptr + 14 * stride, tl.sum(wide * wide, 0))
        if WRITES_DVALUES:
            tl.store(dvalues_ptr + i, value_coef * dvalue, mask=is_inside)
    else:
        for k in range(FIRST_OF_VALUES, NUM_SUMS):
            tl.store(sums_ptr + k * stride, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _ppo_loss_reduce_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, totals_ptr, loss_ptr, factor_ptr, num_parts, stride_sums_k, denominator, value_coef,
    HAS_DENOMINATOR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    totals = tl.zeros([BLOCK_K, BLOCK_PARTS], tl.float64)
    for start in range(0, num_parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        sums = tl.load(sums_ptr + (k.to(tl.int64) * stride_sums_k)[:, None] + part[None, :],
                       mask=(k < NUM_SUMS)[:, None] & (part < num_parts)[None, :], other=0.0)
        larger = tl.where((sums > totals) | (sums != sums), sums, totals)
        totals = tl.where((k == LARGEST)[:, None], larger, totals + sums)
    total = tl.where(k == LARGEST, _largest(totals, 1), tl.sum(totals, 1))
    tl.store(totals_ptr + k, total, mask=k < NUM_SUMS)
    divisor = tl.maximum(tl.sum(tl.where(k == 0, total, 0.0), 0), 1.0)
    if HAS_DENOMINATOR:
        divisor = tl.zeros([], tl.float64) + denominator
    loss = tl.sum(tl.where(k == 1, total, 0.0) + tl.where(k == 9, value_coef * total, 0.0), 0)
    tl.store(loss_ptr, loss / divisor)
    tl.store(factor_ptr, 1.0 / divisor)


class Settings(NamedTuple):
    """The numbers of a call. `epsilon` is added to the variance of the advantages."""

    denominator: float | None
    clip_range: float
    value_clip_range: float | None
    value_coef: float
    max_log_ratio: float
    epsilon: float


Inputs = tuple[Tensor | None, ...]
"""logprobs, old_logprobs, advantages, values, old_values, returns: three of them may be None."""


def ppo_loss_fwd(
    logprobs: Tensor | None, old_logprobs: Tensor | None, advantages: Tensor | None,
    values: Tensor | None, old_values: Tensor | None, returns: Tensor | None, loss_mask: Tensor,
    moments: Tensor | None, denominator: float | None, clip_range: float,
    value_clip_range: float | None, value_coef: float, max_log_ratio: float, epsilon: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, 1 / denominator (float32 scalars), the 15 sums (float64), dlogprobs and dvalues.

    The gradients are those of the sums of losses, value_coef included, float32; empty where not
    needed. The half whose inputs are None is left out. Two launches.
    """
    mask = loss_mask.contiguous()
    num_tokens, device = mask.numel(), mask.device
    inputs = [mask if x is None else x.contiguous()
              for x in (logprobs, old_logprobs, advantages, values, old_values, returns)]
    if moments is not None:
        moments = moments.float().contiguous()
    gradients = [torch.empty(mask.shape if is_needed else (0,), dtype=torch.float32, device=device)
                 for is_needed in needs]
    num_parts = triton.cdiv(num_tokens, BLOCK_N)
    sums = torch.empty(NUM_SUMS.value, num_parts, dtype=torch.float64, device=device)
    totals = torch.empty(NUM_SUMS.value, dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    factor = torch.empty_like(loss)
    if num_parts > 0:
        _ppo_loss_fwd_kernel[(num_parts,)](
            *inputs, mask, mask if moments is None else moments, *gradients, sums, num_tokens,
            0 if moments is None else len(moments), num_parts, 1 - clip_range, 1 + clip_range,
            value_clip_range or 0.0, value_coef, max_log_ratio, epsilon,
            HAS_POLICY=logprobs is not None, HAS_VALUES=values is not None,
            HAS_MOMENTS=moments is not None, CLIPS_VALUES=value_clip_range is not None,
            WRITES_DLOGPROBS=needs[0], WRITES_DVALUES=needs[1], BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P,
            **LAUNCH,
        )
    _ppo_loss_reduce_kernel[(1,)](
        sums, totals, loss, factor, num_parts, num_parts, denominator or 0.0, value_coef,
        HAS_DENOMINATOR=denominator is not None, BLOCK_K=BLOCK_K, BLOCK_PARTS=BLOCK_PARTS,
    )
    return loss, factor, totals, gradients[0], gradients[1]


@torch.library.custom_op("fastrl_kernels::ppo_loss", mutates_args=())
def _fwd_op(
    logprobs: Tensor | None, old_logprobs: Tensor | None, advantages: Tensor | None,
    values: Tensor | None, old_values: Tensor | None, returns: Tensor | None, loss_mask: Tensor,
    moments: Tensor | None, denominator: float | None, clip_range: float,
    value_clip_range: float | None, value_coef: float, max_log_ratio: float, epsilon: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return ppo_loss_fwd(logprobs, old_logprobs, advantages, values, old_values, returns, loss_mask,
                        moments, denominator, clip_range, value_clip_range, value_coef,
                        max_log_ratio, epsilon, needs)


@_fwd_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    mask, needs = arguments[6], arguments[-1]
    gradients = (mask.shape if is_needed else (0,) for is_needed in needs)
    return tuple(mask.new_empty(shape, dtype=torch.float64 if i == 2 else torch.float32)
                 for i, shape in enumerate(((), (), (NUM_SUMS.value,), *gradients)))


class _PPOLoss(torch.autograd.Function):
    """The gradients are made in the forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor | None, old_logprobs: Tensor | None, advantages: Tensor | None,
        values: Tensor | None, old_values: Tensor | None, returns: Tensor | None,
        loss_mask: Tensor, moments: Tensor | None, settings: Settings, needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        run = _fwd_op if torch.compiler.is_compiling() else ppo_loss_fwd
        loss, factor, totals, dlogprobs, dvalues = run(
            logprobs, old_logprobs, advantages, values, old_values, returns, loss_mask, moments,
            *settings, needs)
        ctx.save_for_backward(factor, dlogprobs, dvalues)
        ctx.dtypes = [x.dtype if x is not None and is_needed else None
                      for x, is_needed in zip((logprobs, values), needs, strict=True)]
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = dloss * factor
        dlogprobs, dvalues = (
            None if dtype is None
            else torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return dlogprobs, None, None, dvalues, *(None,) * 6


def loss_and_sums(
    inputs: Inputs, loss_mask: Tensor, moments: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The loss, differentiable by log-probs and values, and the 15 sums."""
    is_recording = torch.is_grad_enabled()
    needs = [is_recording and x is not None and x.requires_grad for x in (inputs[0], inputs[3])]
    result: tuple[Tensor, Tensor] = _PPOLoss.apply(  # type: ignore[no-untyped-call]
        *(x if x is None or i in (0, 3) else x.detach() for i, x in enumerate(inputs)),
        loss_mask, None if moments is None else moments.detach(), settings, needs)
    return result


def policy_fields(sums: Tensor) -> tuple[Tensor, ...]:
    """The fields of PolicyStats, in order."""
    return sums[:FIRST_OF_VALUES.value].unbind()


def value_fields(sums: Tensor) -> tuple[Tensor, ...]:
    """The fields of ValueStats, in order."""
    return sums[0], *sums[FIRST_OF_VALUES.value:].unbind()


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor,
    old_values: Tensor, returns: Tensor, loss_mask: Tensor, *, denominator: float | None = None,
    clip_range: float = 0.2, value_clip_range: float | None = 0.2, value_coef: float = 1.0,
    moments: Tensor | None = None, max_log_ratio: float = 20.0, epsilon: float = 1e-8,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """fastrl.ops.ppo_loss on this backend; the fields of PolicyStats and of ValueStats in order.

    Args:
        max_log_ratio: Where the log-ratio is held, in both directions.
        epsilon: Added to the variance of the advantages.
    """
    settings = Settings(denominator, clip_range, value_clip_range, value_coef, max_log_ratio,
                        epsilon)
    loss, sums = loss_and_sums((logprobs, old_logprobs, advantages, values, old_values, returns),
                               loss_mask, moments, settings)
    return loss, policy_fields(sums), value_fields(sums)


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    floats = ("old_logprobs_ptr", "advantages_ptr", "old_values_ptr", "returns_ptr", "moments_ptr",
              "dlogprobs_ptr", "dvalues_ptr", "loss_ptr", "factor_ptr")
    scalars = ("ratio_low", "ratio_high", "value_clip_range", "value_coef", "max_log_ratio",
               "epsilon", "denominator")
    types = {
        **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(scalars, "fp32"), "mask_ptr": "*i1",
        "sums_ptr": "*fp64", "totals_ptr": "*fp64", "num_tokens": "i32", "num_moments": "i32",
        "num_parts": "i32", "stride_sums_k": "i32",
    }
    names = ("HAS_POLICY", "HAS_VALUES", "HAS_MOMENTS", "CLIPS_VALUES", "WRITES_DLOGPROBS",
             "WRITES_DVALUES")
    flags = [(True,) * 6]
    if every:  # a half that is left out has no clip and no gradient; moments need both halves
        halves = [(True, *rest) for rest in itertools.product((False, True), repeat=2)]
        pairs = [*itertools.product(halves, halves), *(((False,) * 3, half) for half in halves),
                 *(((True, False, writes), (False,) * 3) for writes in (False, True))]
        flags = [(p[0], v[0], p[1], v[1], p[2], v[2]) for p, v in pairs]
    forward: list[AotCase] = [
        (_ppo_loss_fwd_kernel,
         {**types, "logprobs_ptr": f"*{dtype}", "values_ptr": f"*{dtype}"},
         {**dict(zip(names, chosen, strict=True)), "BLOCK_N": BLOCK_N, "BLOCK_P": BLOCK_P,
          **LAUNCH})
        for chosen, dtype in itertools.product(flags, DTYPES)
    ]
    reduction: list[AotCase] = [
        (_ppo_loss_reduce_kernel, types,
         {"HAS_DENOMINATOR": has_denominator, "BLOCK_K": BLOCK_K, "BLOCK_PARTS": BLOCK_PARTS})
        for has_denominator in ((False, True) if every else (False,))
    ]
    return forward + reduction
