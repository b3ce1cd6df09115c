"""compute_gae on a GPU: a reverse associative scan over each response.

    A_t = R_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}        returns_t = A_t + V_t

(A, V) at a token is an affine function of (A, V) at the next one, and the identity where the mask
is False. Affine functions compose associatively, so one scan carries both through masked tokens.
One program per response walks its blocks from the end. Reads 9 and writes 8 bytes per token, and 12
bytes per response. Limits: float32, float16, bfloat16; computed in float32, summed in the order of
the scan, which is not that of the loop over time. Source: Schulman et al. 2016 (arXiv 1506.02438);
Blelloch 1990 for the scan.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "compute_gae", "supports"]

MAX_BLOCK = 1024


@triton.jit
def _compose(a1, b1, c1, d1, e1, a2, b2, c2, d2, e2):  # type: ignore[no-untyped-def]
    """First A = a1 A + b1 V + e1, V = c1 V + d1, then the same with 2 (the earlier token)."""
    return a2 * a1, a2 * b1 + b2 * c1, c2 * c1, c2 * d1 + d2, a2 * e1 + b2 * d1 + e2


@triton.jit  # type: ignore[untyped-decorator]
def _gae_fwd_kernel(  # type: ignore[no-untyped-def]
    rewards_ptr, values_ptr, mask_ptr, cu_seqlens_ptr, advantages_ptr, returns_ptr, moments_ptr,
    num_tokens, gamma, lam, stride_rewards_b, stride_rewards_t, stride_values_b, stride_values_t,
    stride_mask_b, stride_mask_t,
    HAS_MASK: tl.constexpr, IS_PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if IS_PACKED:  # a response is a piece of row 0
        start = tl.load(cu_seqlens_ptr + row)
        length = tl.load(cu_seqlens_ptr + row + 1) - start
        rewards_ptr += start * stride_rewards_t
        values_ptr += start * stride_values_t
        mask_ptr += start * stride_mask_t
    else:
        start = row * num_tokens
        length = tl.zeros([], tl.int64) + num_tokens
        rewards_ptr += row * stride_rewards_b
        values_ptr += row * stride_values_b
        mask_ptr += row * stride_mask_b
    block = tl.arange(0, BLOCK_T)
    advantage = tl.zeros([], tl.float32)  # of the next token that is not masked
    value = tl.zeros([], tl.float32)
    count = tl.zeros([], tl.float32)
    mean = tl.zeros([], tl.float32)
    squares = tl.zeros([], tl.float32)
    num_blocks = tl.cdiv(length, BLOCK_T)
    for i in range(num_blocks):
        t = (num_blocks - 1 - i) * BLOCK_T + block
        is_inside = t < length
        keep = is_inside
        if HAS_MASK:
            keep = tl.load(mask_ptr + t * stride_mask_t, mask=is_inside, other=0) != 0
        v = tl.load(values_ptr + t * stride_values_t, mask=keep, other=0.0).to(tl.float32)
        r = tl.load(rewards_ptr + t * stride_rewards_t, mask=keep, other=0.0).to(tl.float32)
        a, b, c, d, e = tl.associative_scan(
            (tl.where(keep, gamma * lam, 1.0), tl.where(keep, gamma, 0.0),
             tl.where(keep, 0.0, 1.0), v, r - v), 0, _compose, reverse=True)
        carried = a * advantage + b * value + e
        kept = tl.where(keep, carried, 0.0)
        tl.store(advantages_ptr + start + t, kept, mask=is_inside)
        tl.store(returns_ptr + start + t, kept + v, mask=is_inside)
        is_first = block == 0
        advantage = tl.sum(tl.where(is_first, carried, 0.0))
        value = tl.sum(tl.where(is_first, c * value + d, 0.0))
        # Chan's merge of two sets of moments: sums of plain squares would cancel.
        block_count = tl.sum(keep.to(tl.float32))
        block_mean = tl.sum(kept) / tl.maximum(block_count, 1.0)
        centred = tl.where(keep, kept - block_mean, 0.0)
        total = tl.maximum(count + block_count, 1.0)
        gap = block_mean - mean
        squares += tl.sum(centred * centred) + gap * gap * count * block_count / total
        mean += gap * block_count / total
        count += block_count
    tl.store(moments_ptr + row * 3, count)
    tl.store(moments_ptr + row * 3 + 1, mean * count)
    tl.store(moments_ptr + row * 3 + 2, squares)


def gae_fwd(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, gamma: float, lam: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns, and what whitening needs of each response, in one launch.

    Returns:
        advantages, returns: shape of rewards, float32, contiguous.
        moments: [B, 3] float32: the count of True tokens, the sum of their advantages, and the sum
            of squares about the response's own mean.
    """
    mask = rewards if response_mask is None else response_mask
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    num_rows = rewards.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    num_tokens = rewards.shape[-1]
    moments = torch.empty(num_rows, 3, dtype=torch.float32, device=rewards.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(max(num_tokens, 16)))
    if num_rows > 0:
        _gae_fwd_kernel[(num_rows,)](
            rewards, values, mask, rewards if cu_seqlens is None else cu_seqlens.contiguous(),
            advantages, returns, moments, num_tokens, gamma, lam,
            rewards.stride(0), rewards.stride(-1), values.stride(0), values.stride(-1),
            mask.stride(0), mask.stride(-1),
            HAS_MASK=response_mask is not None, IS_PACKED=cu_seqlens is not None, BLOCK_T=block,
        )
    return advantages, returns, moments


# What a compiled graph holds; eager code calls gae_fwd, which costs the host less.
@torch.library.custom_op("fastrl_kernels::compute_gae", mutates_args=())
def _fwd_op(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, gamma: float, lam: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return gae_fwd(rewards, values, response_mask, gamma, lam, cu_seqlens)


@_fwd_op.register_fake
def _(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, gamma: float, lam: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (rewards.new_empty(rewards.shape, dtype=torch.float32),
            rewards.new_empty(rewards.shape, dtype=torch.float32),
            rewards.new_empty(num_rows, 3, dtype=torch.float32))


def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None = None, *, gamma: float = 1.0,
    lam: float = 0.95, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """fastrl.ops.compute_gae on this backend, moments included."""
    run = _fwd_op if torch.compiler.is_compiling() else gae_fwd
    result: tuple[Tensor, Tensor, Tensor] = run(
        rewards.detach(), values.detach(), response_mask, gamma, lam, cu_seqlens)
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "mask_ptr": "*i1", "cu_seqlens_ptr": "*i64",
        "advantages_ptr": "*fp32", "returns_ptr": "*fp32", "moments_ptr": "*fp32",
        "num_tokens": "i32", "gamma": "fp32", "lam": "fp32",
        "stride_rewards_b": "i32", "stride_rewards_t": "i32", "stride_values_b": "i32",
        "stride_values_t": "i32", "stride_mask_b": "i32", "stride_mask_t": "i32",
    }
    variants = itertools.product((True, False), (False, True)) if every else [(True, False)]
    blocks = (MAX_BLOCK, 16) if every else (MAX_BLOCK,)
    return [
        (_gae_fwd_kernel, {**types, "rewards_ptr": f"*{dtype}", "values_ptr": "*fp32"},
         {"HAS_MASK": has_mask, "IS_PACKED": is_packed, "BLOCK_T": block})
        for (has_mask, is_packed), block, dtype in itertools.product(variants, blocks, DTYPES)
    ]
