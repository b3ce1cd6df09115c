"""linear_policy_loss on a GPU: each chunk of logits becomes its own gradient in one launch.

    z = (hidden @ weight.T + bias) / temperature        rho = exp(logprob(z) - old_logprob)
    L = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range_high))
        where A < 0 and dual_clip is given: min(L, -A dual_clip)
    loss = sum_mask w (L + kl_coef kl - entropy_coef H) / denominator

Per chunk: logits by cuBLAS, one program per row that reduces the row, knows then the token's loss,
statistics and derivatives, and walks the row again to overwrite it with its gradient, and the two
products with hidden and weight, summed in float32. A masked row is not read, only zeroed. The
gradient is written without 1 / (denominator temperature), which the backward pass applies: it stays
near 1, where float16 has digits. Operations 6MDV; per logit 4 bytes written, 8 read, 2 written over
them and 4 read by the products (half-precision operands, float32 logits). In memory: one chunk.
Limits: float32, float16, bfloat16; differentiable once. Source: Schulman et al. 2017
(arXiv 1707.06347), eq. 7; gradient in the forward after linkedin/Liger-Kernel (arXiv 2410.10989).
"""

import itertools
from typing import Any, NamedTuple

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
    new_chunk,
    new_gradients,
    project,
    same_dtype,
)
from fastrl_kernels.triton.logprob import (
    MAX_BLOCK,
    block_settings,
    reduce_row,
    token_score,
    write_gradient,
)
from fastrl_kernels.triton.ppo_loss import policy_token
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "linear_policy_loss", "supports"]
NUM_STATS = 10
"""count, w L, clipped, k2, k3, ratio, ratio^2, entropy: sums; |log_ratio|: the largest; the sum of
w (L + kl_coef kl - entropy_coef H)."""
ESTIMATORS = ("k1", "k2", "k3")


@triton.jit  # type: ignore[untyped-decorator]
def _policy_loss_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, token_ids_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr,
    token_weights_ptr, ref_logprobs_ptr, dlogits_ptr, stats_ptr,
    num_columns, stride_logits_m, stride_dlogits_m, stride_stats_k,
    inverse_temperature, ratio_low, ratio_high, dual_clip, entropy_coef, kl_coef, max_log_ratio,
    max_exponent,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, KL: tl.constexpr, WRITES_GRADIENT: tl.constexpr,
    NUM_STATS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_m
    drow_ptr = dlogits_ptr + row * stride_dlogits_m
    stats_ptr += row
    stride = tl.zeros([], tl.int64) + stride_stats_k
    if tl.load(mask_ptr + row) != 0:
        maximum, log_sum, entropy = reduce_row(row_ptr, bias_ptr, num_columns, 1,
                                               inverse_temperature, HAS_BIAS, BLOCK_V)
        token = tl.load(token_ids_ptr + row)
        z = token_score(row_ptr, bias_ptr, token, num_columns, 1, inverse_temperature, HAS_BIAS)
        logprob = z - maximum - log_sum
        advantage = tl.load(advantages_ptr + row).to(tl.float32)
        exact, log_ratio, ratio, loss, is_clipped, dlogprob = policy_token(
            logprob, tl.load(old_logprobs_ptr + row).to(tl.float32), advantage, ratio_low,
            ratio_high, max_log_ratio)
        if HAS_DUAL_CLIP:
            bound = -dual_clip * advantage
            is_capped = (advantage < 0) & (loss > bound)
            loss = tl.where(is_capped, bound, loss)
            dlogprob = tl.where(is_capped, 0.0, dlogprob)
            is_clipped = is_clipped | is_capped
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(token_weights_ptr + row).to(tl.float32)
        objective = loss.to(tl.float64) - entropy_coef * entropy.to(tl.float64)
        if KL > 0:
            # In float64: exp(u) - 1 - u and exp(u) - 1 cancel where the models are near.
            u = (tl.load(ref_logprobs_ptr + row).to(tl.float32) - logprob).to(tl.float64)
            if KL == 3:
                held = tl.where(u > max_exponent, max_exponent, u)
                kl = tl.exp(held) - 1.0 - held
                dkl = tl.where(u > max_exponent, 0.0, 1.0 - tl.exp(held))
            else:
                kl = -u if KL == 1 else 0.5 * u * u
                dkl = -u
            objective += kl_coef * kl
            dlogprob += (kl_coef * dkl).to(tl.float32)
        wide = log_ratio.to(tl.float64)  # exp(u) - 1 - u cancels for ratios near 1
        tl.store(stats_ptr, 1.0)
        tl.store(stats_ptr + stride, weight * loss)
        tl.store(stats_ptr + 2 * stride, is_clipped.to(tl.float64))
        tl.store(stats_ptr + 3 * stride, 0.5 * wide * wide)
        tl.store(stats_ptr + 4 * stride, tl.exp(wide) - 1.0 - wide)
        tl.store(stats_ptr + 5 * stride, ratio)
        tl.store(stats_ptr + 6 * stride, ratio.to(tl.float64) * ratio)
        tl.store(stats_ptr + 7 * stride, entropy)
        tl.store(stats_ptr + 8 * stride, tl.abs(exact))
        tl.store(stats_ptr + 9 * stride, weight * objective)
        if WRITES_GRADIENT:
            write_gradient(row_ptr, bias_ptr, drow_ptr, token, maximum, log_sum, entropy, dlogprob,
                           -entropy_coef, weight, num_columns, 1, 1, inverse_temperature,
                           HAS_BIAS, HAS_ENTROPY, True, BLOCK_V)
    else:
        for k in range(NUM_STATS):
            tl.store(stats_ptr + k * stride, 0.0)
        if WRITES_GRADIENT:
            zeros = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, num_columns, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                tl.store(drow_ptr + columns, zeros, mask=columns < num_columns)


class Settings(NamedTuple):
    """Coefficients of a token's loss."""

    clip_range: float
    clip_range_high: float
    dual_clip: float
    """0: none."""
    temperature: float
    entropy_coef: float
    kl_coef: float
    kl_estimator: float
    """1, 2, 3; 0: no KL. As the others, for an op's list holds one type."""
    max_log_ratio: float
    max_exponent: float


def policy_loss_of_logits(
    logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor,
    token_weights: Tensor | None, ref_logprobs: Tensor | None, stats: Tensor, bias: Tensor | None,
    gradient_dtype: torch.dtype | None, settings: Settings,
) -> Tensor:
    """Write the tokens' statistics to `stats` [10, m]; returns the gradient over the `logits`.

    The gradient is that of the sum of the losses by z. `logits` is contiguous; where
    `gradient_dtype` is None they stay as they are and are returned.
    """
    dlogits = logits if gradient_dtype is None else gradient_view(logits, gradient_dtype)
    _policy_loss_kernel[(len(logits),)](
        logits, logits if bias is None else bias.contiguous(), token_ids.contiguous(),
        old_logprobs.contiguous(), advantages.contiguous(), loss_mask.contiguous(),
        logits if token_weights is None else token_weights.contiguous(),
        logits if ref_logprobs is None else ref_logprobs.contiguous(), dlogits, stats,
        logits.shape[1], logits.stride(0), dlogits.stride(0), stats.stride(0),
        1 / settings.temperature, 1 - settings.clip_range, 1 + settings.clip_range_high,
        settings.dual_clip, settings.entropy_coef, settings.kl_coef, settings.max_log_ratio,
        settings.max_exponent,
        HAS_BIAS=bias is not None, HAS_ENTROPY=settings.entropy_coef != 0,
        HAS_DUAL_CLIP=settings.dual_clip > 0, HAS_WEIGHTS=token_weights is not None,
        KL=int(settings.kl_estimator), WRITES_GRADIENT=gradient_dtype is not None,
        NUM_STATS=NUM_STATS, **block_settings(logits.shape[1]),
    )
    return dlogits


def linear_policy_loss_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, old_logprobs: Tensor,
    advantages: Tensor, loss_mask: Tensor, token_weights: Tensor | None,
    ref_logprobs: Tensor | None, settings: Settings, chunk_tokens: int | None,
    logits_dtype: torch.dtype, keeps_rows: bool, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Statistics [10] float64 and the gradients that are needed, of the sum of the losses by z."""
    gradients = new_gradients(hidden, weight, bias, needs)
    hidden, weight = same_dtype(hidden, weight)
    chunks = chunk_slices(len(hidden), logits_dtype.itemsize * len(weight), chunk_tokens)
    buffer = new_chunk(hidden, weight, chunks, logits_dtype)
    stats = torch.zeros(NUM_STATS, max(1, len(hidden)), dtype=torch.float64, device=hidden.device)
    for rows in chunks:
        # NaN in a masked hidden state would pass through a product with a gradient of 0.
        kept = hidden[rows].masked_fill(~loss_mask[rows, None], 0.0)
        logits = buffer[: rows.stop - rows.start]
        project(kept, weight, logits, keeps_rows)
        dlogits = policy_loss_of_logits(
            logits, token_ids[rows], old_logprobs[rows], advantages[rows], loss_mask[rows],
            None if token_weights is None else token_weights[rows],
            None if ref_logprobs is None else ref_logprobs[rows],
            stats[:, rows], bias, hidden.dtype if any(needs) else None, settings)
        add_head_gradients(dlogits, kept, weight, rows, gradients)
    sums = torch.cat([stats[:8].sum(dim=1), stats[8:9].amax(dim=1), stats[9:].sum(dim=1)])
    return sums, gradients


@torch.library.custom_op("fastrl_kernels::linear_policy_loss", mutates_args=())
def _fwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, old_logprobs: Tensor,
    advantages: Tensor, loss_mask: Tensor, token_weights: Tensor | None,
    ref_logprobs: Tensor | None, settings: list[float], chunk_tokens: int | None,
    logits_dtype: torch.dtype, keeps_rows: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats, gradients = linear_policy_loss_fwd(
        hidden, weight, bias, token_ids, old_logprobs, advantages, loss_mask, token_weights,
        ref_logprobs, Settings._make(settings), chunk_tokens, logits_dtype, keeps_rows,
        (needs[0], needs[1], needs[2]))
    return stats, *as_tensors(gradients, hidden)


@_fwd_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    gradients = new_gradients(hidden, weight, bias, (needs[0], needs[1], needs[2]))
    return hidden.new_empty(NUM_STATS, dtype=torch.float64), *as_tensors(gradients, hidden)


class KnownGradients(torch.autograd.Function):
    """The loss as a function of hidden, weight and bias whose gradients are known but for a factor.

    The factor meets them in the pass that rounds them to the inputs' type.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, factor: float, dhidden: Tensor | None, dweight: Tensor | None,
        dbias: Tensor | None, *inputs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.factor, ctx.dtypes = factor, [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        factor = dloss * ctx.factor
        return (None,) * 5 + tuple(
            None if gradient is None
            else torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor,
    loss_mask: Tensor, *, bias: Tensor | None = None, denominator: float, clip_range: float = 0.2,
    clip_range_high: float | None = None, dual_clip: float | None = None, temperature: float = 1.0,
    entropy_coef: float = 0.0, token_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3",
    max_log_ratio: float = 20.0, max_exponent: float = 20.0, chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32, keeps_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.linear_policy_loss on this backend: the loss, and the statistics as [9] float64.

    Args:
        max_log_ratio: Where the log-ratio is held, in both directions.
        max_exponent: Where the exponent of k3 is held.
        logits_dtype: float32, or the type of hidden: half the bytes, logits rounded once.
        keeps_rows: Logits by the kernel of linear.
    """
    inputs = (hidden, weight, bias)
    is_recording = torch.is_grad_enabled()
    needs: Any = tuple(is_recording and x is not None and x.requires_grad for x in inputs)
    settings = Settings(
        clip_range, clip_range if clip_range_high is None else clip_range_high, dual_clip or 0.0,
        temperature, entropy_coef, kl_coef,
        0 if ref_logprobs is None else 1 + ESTIMATORS.index(kl_estimator), max_log_ratio,
        max_exponent)
    tensors: Any = (*(None if x is None else x.detach() for x in inputs), token_ids,
                    old_logprobs.detach(), advantages.detach(), loss_mask,
                    None if token_weights is None else token_weights.detach(),
                    None if ref_logprobs is None else ref_logprobs.detach())
    if torch.compiler.is_compiling():
        stats, *made = _fwd_op(*tensors, [float(x) for x in settings], chunk_tokens, logits_dtype,
                               keeps_rows, list(needs))
        dhidden, dweight, dbias = (gradient if is_needed else None
                                   for gradient, is_needed in zip(made, needs, strict=True))
        gradients: Gradients = dhidden, dweight, dbias
    else:
        arguments: Any = (*tensors, settings, chunk_tokens, logits_dtype, keeps_rows, needs)
        stats, gradients = linear_policy_loss_fwd(*arguments)
    loss = (stats[9] / denominator).float()
    if any(needs):
        loss = KnownGradients.apply(  # type: ignore[no-untyped-call]
            loss, 1 / (denominator * temperature), *gradients, *inputs
        )
    return loss, stats[:9]


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "bias_ptr": "*fp32", "token_ids_ptr": "*i64",
        "old_logprobs_ptr": "*fp32", "advantages_ptr": "*fp32", "mask_ptr": "*i1",
        "token_weights_ptr": "*fp32", "ref_logprobs_ptr": "*fp32",
        "stats_ptr": "*fp64", "num_columns": "i32",
        "stride_logits_m": "i32", "stride_dlogits_m": "i32", "stride_stats_k": "i32",
        "inverse_temperature": "fp32", "ratio_low": "fp32", "ratio_high": "fp32",
        "dual_clip": "fp32", "entropy_coef": "fp32", "kl_coef": "fp32", "max_log_ratio": "fp32",
        "max_exponent": "fp32",
    }
    flags = (True, False) if every else (True,)
    pairs = [("fp32", dtype) for dtype in DTYPES]  # of the logits and of their gradient
    pairs += [(dtype, dtype) for dtype in ("fp16", "bf16")] if every else []
    # Dual clip and weights, and the estimator of the KL: of PPO, of GRPO, and the others.
    terms = [(False, 0), (True, 3), *([(True, 1), (True, 2)] if every else [])]
    return [
        (_policy_loss_kernel,
         {**types, "logits_ptr": f"*{logits}", "dlogits_ptr": f"*{dlogits}"},
         {"HAS_BIAS": has_bias, "HAS_ENTROPY": has_entropy, "HAS_DUAL_CLIP": has_more,
          "HAS_WEIGHTS": has_more, "KL": kl, "WRITES_GRADIENT": writes_gradient,
          "NUM_STATS": NUM_STATS, "BLOCK_V": MAX_BLOCK, "num_warps": 8})
        for (logits, dlogits), has_bias, has_entropy, writes_gradient, (has_more, kl)
        in itertools.product(pairs, flags, flags, flags, terms)
    ]
