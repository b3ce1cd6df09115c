"""shape_rewards on a GPU: the penalty and the score in one launch; see csrc/kl.cu.

    rewards_t = -kl_coef * kl_t + [t is the last response token] * score

Limits: float32 arithmetic; other floating types but float64 are converted first.
"""

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of
from fastrl_kernels.cuda.gae import supports

__all__ = ["rewards_fwd", "shape_rewards", "supports"]

ESTIMATORS = ("k1", "k2", "k3")


def rewards_fwd(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor,
    kl_coef: float, estimator: int, num_estimates: int,
) -> tuple[Tensor, Tensor]:
    """Rewards [B, T], and the penalty's estimates or all three, [1, B, T] or [3, B, T].

    estimator is 1, 2 or 3.
    """
    logprobs = logprobs.float().contiguous()
    rewards = torch.empty_like(logprobs)
    kl = logprobs.new_empty(num_estimates, *logprobs.shape)
    estimates = list(kl) if num_estimates == 3 else [
        kl[0] if number == estimator else None for number in (1, 2, 3)]
    compiled_ops().shape_rewards(
        scores.float().contiguous(), logprobs, ref_logprobs.float().contiguous(),
        response_mask.contiguous(), kl_coef, estimator, rewards, *estimates, stream_of(logprobs))
    return rewards, kl


# What a compiled graph holds; eager code calls rewards_fwd, which costs the host less.
@torch.library.custom_op("fastrl_cuda::shaped_rewards", mutates_args=())
def _shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor,
    kl_coef: float, estimator: int, num_estimates: int,
) -> tuple[Tensor, Tensor]:
    return rewards_fwd(scores, logprobs, ref_logprobs, response_mask, kl_coef, estimator,
                       num_estimates)


@_shaped_rewards.register_fake
def _(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor,
    kl_coef: float, estimator: int, num_estimates: int,
) -> tuple[Tensor, Tensor]:
    like = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    return like, like.new_empty(num_estimates, *like.shape)


@torch.no_grad()
def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    return_estimates: bool = False,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
    """Rewards and the estimates they contain; arguments as in fastrl.ops.shape_rewards."""
    run = _shaped_rewards if torch.compiler.is_compiling() else rewards_fwd
    rewards, kl = run(scores, logprobs, ref_logprobs, response_mask, kl_coef,
                      ESTIMATORS.index(estimator) + 1, 3 if return_estimates else 1)
    return rewards, ((kl[0], kl[1], kl[2]) if return_estimates else kl[0])
