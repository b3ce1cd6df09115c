"""kl_estimate on a GPU: k1, k2 and k3 in one launch, their gradient in one; see csrc/kl.cu.

    u = ref_logprobs - logprobs        k1 = -u        k2 = u^2 / 2        k3 = exp(u) - 1 - u

Limits: float32 arithmetic; other floating types but float64 are converted first.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of
from fastrl_kernels.cuda.gae import supports

__all__ = ["kl_estimate", "kl_fwd", "kl_bwd", "supports"]


def kl_fwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of contiguous float32 tensors, 0 where the mask is False."""
    k1, k2, k3 = (torch.empty_like(logprobs) for _ in range(3))
    compiled_ops().kl_estimate(logprobs, ref_logprobs, mask, k1, k2, k3, stream_of(logprobs))
    return k1, k2, k3


def kl_bwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, dk1: Tensor, dk2: Tensor,
    dk3: Tensor,
) -> Tensor:
    """The gradient by logprobs; the one by ref_logprobs is its negative."""
    dlogprobs = torch.empty_like(logprobs)
    gradients = (dk1.contiguous(), dk2.contiguous(), dk3.contiguous())
    compiled_ops().kl_gradient(logprobs, ref_logprobs, mask, *gradients, dlogprobs,
                               stream_of(logprobs))
    return dlogprobs


# The two ops are what a graph holds. Gradients need the first registered with the second.
@torch.library.custom_op("fastrl_cuda::kl_estimates", mutates_args=())
def _kl_estimates(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return kl_fwd(logprobs, ref_logprobs, mask)


@_kl_estimates.register_fake
def _(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(logprobs), torch.empty_like(logprobs), torch.empty_like(logprobs)


@torch.library.custom_op("fastrl_cuda::kl_estimates_backward", mutates_args=())
def _kl_backward(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, dk1: Tensor, dk2: Tensor,
    dk3: Tensor,
) -> Tensor:
    return kl_bwd(logprobs, ref_logprobs, mask, dk1, dk2, dk3)


@_kl_backward.register_fake
def _(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, dk1: Tensor, dk2: Tensor,
    dk3: Tensor,
) -> Tensor:
    return torch.empty_like(logprobs)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dk1: Tensor, dk2: Tensor, dk3: Tensor) -> tuple[Tensor, Tensor, None]:
    dlogprobs = _kl_backward(*ctx.saved_tensors, dk1, dk2, dk3)
    return dlogprobs, -dlogprobs, None


_kl_estimates.register_autograd(_backward, setup_context=_save)


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3; arguments as in fastrl.ops.kl_estimate."""
    logprobs, ref_logprobs = logprobs.float().contiguous(), ref_logprobs.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    k1, k2, k3 = _kl_estimates(logprobs, ref_logprobs, mask)
    return k1, k2, k3
