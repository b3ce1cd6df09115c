"""compute_gae on a GPU: a warp scan over affine maps; see csrc/gae.cu.

    delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

Limits: float32 arithmetic; other floating types but float64 are converted first.
"""

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of


def gae_fwd(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None,
    gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: advantages and returns like rewards, moments [B, 3], all float32.

    moments holds count, sum and sum of squares about the row's own mean, of the advantages.
    """
    rewards, values = rewards.float().contiguous(), values.float().contiguous()
    mask = None if response_mask is None else response_mask.contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    num_rows = rewards.shape[0] if offsets is None else offsets.shape[0] - 1
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    moments = rewards.new_empty(num_rows, 3)
    compiled_ops().gae(rewards, values, mask, offsets, gamma, gamma * lam, advantages, returns,
                       moments, stream_of(rewards))
    return advantages, returns, moments


# What a compiled graph holds; eager code calls gae_fwd, which costs the host less.
@torch.library.custom_op("fastrl_cuda::compute_gae", mutates_args=())
def _compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None,
    gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return gae_fwd(rewards, values, response_mask, cu_seqlens, gamma, lam)


@_compute_gae.register_fake
def _(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None,
    gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like = rewards.new_empty(rewards.shape, dtype=torch.float32)
    return like, torch.empty_like(like), like.new_empty(num_rows, 3)


@torch.no_grad()
def compute_gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns and moments; arguments as in fastrl.ops.compute_gae."""
    run = _compute_gae if torch.compiler.is_compiling() else gae_fwd
    result: tuple[Tensor, Tensor, Tensor] = run(rewards, values, response_mask, cu_seqlens, gamma,
                                                lam)
    return result


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this kernel refuses, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return None
