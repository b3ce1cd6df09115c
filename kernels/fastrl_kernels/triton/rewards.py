"""shape_rewards on a GPU: KL estimates and the shaped reward in one launch.

    rewards_t = -kl_coef * kl_t + [t is the last response token] * score

One program per response walks its blocks from the end, so that the first True position that it
meets is the last response token. Reads 9 and writes 8 bytes per token, 16 with all three estimates;
nothing between. Limits: float32, float16, bfloat16; computed in float32. Source: Ouyang et al. 2022
(arXiv 2203.02155), eq. 2; Schulman 2020 for the estimators, which are those of kl.py.
"""

import itertools
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.kl import estimate_k3
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "shape_rewards", "supports"]

MAX_BLOCK = 1024
ESTIMATORS = ("k1", "k2", "k3")


@triton.jit  # type: ignore[untyped-decorator]
def _shape_rewards_fwd_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, logprobs_ptr, ref_logprobs_ptr, mask_ptr, rewards_ptr, kl_ptr, num_tokens, kl_coef,
    stride_scores_b, stride_logprobs_b, stride_logprobs_t, stride_ref_b, stride_ref_t,
    stride_mask_b, stride_mask_t, stride_kl_k, ESTIMATOR: tl.constexpr,
    WRITES_ALL: tl.constexpr, BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    score = tl.load(scores_ptr + row * stride_scores_b).to(tl.float32)
    is_scored = tl.zeros([], tl.int32)
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    for i in range(num_blocks):
        t = (num_blocks - 1 - i).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_inside = t < num_tokens
        keep = tl.load(mask_ptr + row * stride_mask_b + t * stride_mask_t,
                       mask=is_inside, other=0) != 0
        logprob = tl.load(logprobs_ptr + row * stride_logprobs_b + t * stride_logprobs_t,
                          mask=keep, other=0.0).to(tl.float32)
        ref = tl.load(ref_logprobs_ptr + row * stride_ref_b + t * stride_ref_t,
                      mask=keep, other=0.0).to(tl.float32)
        k1 = logprob - ref
        k2 = 0.5 * k1 * k1
        k3 = estimate_k3(k1)
        kl = k1
        if ESTIMATOR == 1:
            kl = k2
        if ESTIMATOR == 2:
            kl = k3
        last = tl.max(tl.where(keep, t, -1), 0)
        is_last = (t == last) & (is_scored == 0) & keep
        is_scored = tl.where(last >= 0, 1, is_scored)
        reward = tl.where(is_last, score - kl_coef * kl, -kl_coef * kl)
        tl.store(rewards_ptr + row * num_tokens + t, reward, mask=is_inside)
        place = kl_ptr + row * num_tokens + t
        if WRITES_ALL:
            stride = tl.zeros([], tl.int64) + stride_kl_k
            tl.store(place, k1, mask=is_inside)
            tl.store(place + stride, k2, mask=is_inside)
            tl.store(place + 2 * stride, k3, mask=is_inside)
        else:
            tl.store(place, kl, mask=is_inside)


def shape_rewards_fwd(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float,
    estimator: str, num_estimates: int,
) -> tuple[Tensor, Tensor]:
    """Rewards [B, T], and the penalty's estimates or all three, [1, B, T] or [3, B, T]."""
    num_rows, num_tokens = logprobs.shape
    rewards = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=logprobs.device)
    kl = torch.empty(num_estimates, *rewards.shape, dtype=torch.float32, device=logprobs.device)
    if num_rows > 0:
        _shape_rewards_fwd_kernel[(num_rows,)](
            scores, logprobs, ref_logprobs, response_mask, rewards, kl, num_tokens, kl_coef,
            scores.stride(0), *logprobs.stride(), *ref_logprobs.stride(),
            *response_mask.stride(), kl.stride(0), ESTIMATOR=ESTIMATORS.index(estimator),
            WRITES_ALL=num_estimates == 3,
            BLOCK_T=min(MAX_BLOCK, triton.next_power_of_2(max(num_tokens, 16))),
        )
    return rewards, kl


# What a compiled graph holds; eager code calls shape_rewards_fwd, which costs the host less.
@torch.library.custom_op("fastrl_kernels::shape_rewards", mutates_args=())
def _fwd_op(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float,
    estimator: str, num_estimates: int,
) -> tuple[Tensor, Tensor]:
    return shape_rewards_fwd(scores, logprobs, ref_logprobs, response_mask, kl_coef, estimator,
                             num_estimates)


@_fwd_op.register_fake
def _(scores: Tensor, logprobs: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return (logprobs.new_empty(logprobs.shape, dtype=torch.float32),
            logprobs.new_empty(others[-1], *logprobs.shape, dtype=torch.float32))


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *,
    kl_coef: float, estimator: Literal["k1", "k2", "k3"] = "k1", return_estimates: bool = False,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
    """fastrl.ops.shape_rewards on this backend."""
    run = _fwd_op if torch.compiler.is_compiling() else shape_rewards_fwd
    rewards, kl = run(scores.detach(), logprobs.detach(), ref_logprobs.detach(), response_mask,
                      kl_coef, estimator, 3 if return_estimates else 1)
    return rewards, ((kl[0], kl[1], kl[2]) if return_estimates else kl[0])


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "scores_ptr": "*fp32", "mask_ptr": "*i1", "rewards_ptr": "*fp32", "kl_ptr": "*fp32",
        "num_tokens": "i32", "kl_coef": "fp32", "stride_scores_b": "i32",
        "stride_logprobs_b": "i32", "stride_logprobs_t": "i32", "stride_ref_b": "i32",
        "stride_ref_t": "i32", "stride_mask_b": "i32", "stride_mask_t": "i32",
        "stride_kl_k": "i32",
    }
    blocks = (MAX_BLOCK, 16) if every else (MAX_BLOCK,)
    variants = itertools.product((0, 1, 2), (False, True)) if every else [(2, True)]
    return [
        (_shape_rewards_fwd_kernel,
         {**types, "logprobs_ptr": f"*{dtype}", "ref_logprobs_ptr": f"*{dtype}"},
         {"ESTIMATOR": estimator, "WRITES_ALL": writes_all, "BLOCK_T": block})
        for (estimator, writes_all), block, dtype in itertools.product(variants, blocks, DTYPES)
    ]
