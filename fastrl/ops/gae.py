"""compute_gae: advantages and returns of every response token.

    delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
    returns_t = A_t + V_t                      V after the last response token = 0
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_device,
    check_float,
    check_index,
    check_mask,
    check_offsets,
    check_shape,
    check_share,
    check_values,
    wide_dtype,
)
from fastrl.errors import ShapeError
from fastrl.ops.whiten import row_moments

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")


@torch.no_grad()
def compute_gae_reference(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """compute_gae in plain torch: one pass over time, from the end, on vectors [B]."""
    if response_mask is None:
        response_mask = torch.ones_like(rewards, dtype=torch.bool)
    if cu_seqlens is not None:
        rows, columns, shape = _padded_places(cu_seqlens)
        rewards_BT, values_BT, mask_BT = (
            x.new_zeros(shape).index_put((rows, columns), x)
            for x in (rewards, values, response_mask)
        )
        padded = compute_gae_reference(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
        return padded[0][rows, columns], padded[1][rows, columns]
    dtype = wide_dtype(torch.promote_types(rewards.dtype, values.dtype))
    rewards, values = rewards.to(dtype), values.to(dtype)
    advantages = torch.zeros_like(values)
    carried = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        mask, value = response_mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        carried = torch.where(mask, delta + gamma * lam * carried, carried)
        next_value = torch.where(mask, value, next_value)
        advantages[:, t] = carried
    zero = values.new_zeros(())
    return (torch.where(response_mask, advantages, zero),
            torch.where(response_mask, advantages + values, zero))


@torch.no_grad()
def moments_reference(
    advantages: Tensor, response_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The moments [B, 3] that compute_gae returns on request, in plain torch."""
    if response_mask is None:
        response_mask = torch.ones_like(advantages, dtype=torch.bool)
    if cu_seqlens is not None:
        rows, columns, shape = _padded_places(cu_seqlens)
        advantages, response_mask = (x.new_zeros(shape).index_put((rows, columns), x)
                                     for x in (advantages, response_mask))
    return row_moments(advantages, response_mask)


def _padded_places(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Row and column [N] of each packed token in a padded batch, and the batch's shape [B, T]."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    columns = torch.arange(len(rows), device=lengths.device) - cu_seqlens[:-1][rows]
    return rows, columns, (len(lengths), int(lengths.max()))


def _check(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None, gamma: float, lam: float,
    cu_seqlens: Tensor | None,
) -> None:
    op = "compute_gae"
    tensors = {"rewards": rewards, "values": values}
    check_float(op, **tensors)
    if response_mask is not None:
        check_mask(op, response_mask=response_mask)
        tensors["response_mask"] = response_mask
    check_share(op, gamma=gamma, lam=lam)
    if cu_seqlens is None:
        check_shape(op, tensors, ndim=2, layout="[B, T] (or [N] with cu_seqlens)")
        check_values(op, response_mask, rewards=rewards, values=values)
        return
    check_shape(op, tensors, ndim=1, layout="[N] (or [B, T] without cu_seqlens)")
    check_index(op, cu_seqlens=cu_seqlens)
    check_device(op, {"rewards": rewards, "cu_seqlens": cu_seqlens})
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ShapeError(f"{op}: expected cu_seqlens [B+1] with B at least 1, got "
                         f"{list(cu_seqlens.shape)}")
    check_offsets(op, len(rewards), cu_seqlens=cu_seqlens)
    check_values(op, response_mask, rewards=rewards, values=values)


@overload
def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None = None, *, gamma: float = 1.0,
    lam: float = 0.95, cu_seqlens: Tensor | None = None, return_moments: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor | None = None, *, gamma: float = 1.0,
    lam: float = 0.95, cu_seqlens: Tensor | None = None, return_moments: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    return_moments: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Advantages by generalised advantage estimation, and the returns they imply.

        delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
        returns_t = A_t + V_t                      V after the last response token = 0

    A masked position is skipped: the token before it sees the value and the advantage of the next
    True one, however far away. Nothing is whitened here.

    Args:
        rewards: [B, T] float. Received after response token t. Packed: [N].
        values: [B, T] float. Value of the state before response token t. Packed: [N].
        response_mask: [B, T] bool. True for sampled tokens, EOS included; None: all. Packed: [N].
        gamma: Discount in [0, 1].
        lam: Trace decay in [0, 1]. 1 = Monte Carlo, 0 = one step.
        cu_seqlens: [B+1] int64. Given for packed inputs: where each response begins; the last
            entry is N.
        return_moments: Also return what `whiten` and `ppo_loss` need to know of the advantages; the
            kernels make it in the same launch.
        backend: See fastrl.backends.
    Returns:
        advantages, returns: shape of rewards, float32 (float64 for float64) each, 0 where the mask
        is False. No gradient.
        moments: [B, 3] of the same type, with return_moments: of each response the number of True
        tokens, the sum of their advantages, and the sum of squares about their own mean.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when gamma or lam is outside [0, 1].
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: T steps on vectors of B; a packed call pads first.
    Source: Schulman et al. 2016 (arXiv 1506.02438), section 3.
    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> advantages, returns = compute_gae(rewards, values, mask, lam=1.0)
        >>> advantages.tolist(), returns.tolist()
        ([[0.5, 0.75]], [[1.0, 1.0]])
    """
    _check(rewards, values, response_mask, gamma, lam, cu_seqlens)
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    name = choose("compute_gae", "gae", PREFERENCE, values.device.type, dtype, backend)
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "cu_seqlens": cu_seqlens}
    if name == "triton":
        from fastrl_kernels.triton import gae

        result = gae.compute_gae(rewards, values, response_mask, **options)
        return result if return_moments else result[:2]
    if name == "cuda":
        from fastrl_kernels.cuda import gae as cuda_gae

        result = cuda_gae.compute_gae(rewards, values, response_mask, **options)
        return result if return_moments else result[:2]
    advantages, returns = compute_gae_reference(rewards, values, response_mask, **options)
    if not return_moments:
        return advantages, returns
    return advantages, returns, moments_reference(advantages, response_mask, cu_seqlens)
