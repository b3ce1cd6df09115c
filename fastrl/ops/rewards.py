"""shape_rewards: a KL penalty on every token, the score on the last.

    rewards_t = -kl_coef * kl_t + [t is the last response token] * score
"""

from typing import Literal, overload

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_float, check_mask, check_shape, check_values
from fastrl.errors import ConfigError, ShapeError
from fastrl.ops.kl import kl_estimate_reference

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")
ESTIMATORS = ("k1", "k2", "k3")
Estimator = Literal["k1", "k2", "k3"]
Estimates = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def shape_rewards_reference(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: Estimator = "k1",
    return_estimates: bool = False,
) -> tuple[Tensor, Tensor | Estimates]:
    """shape_rewards in plain torch."""
    estimates = kl_estimate_reference(logprobs, ref_logprobs, response_mask)
    kl = estimates[ESTIMATORS.index(estimator)]
    num_left = response_mask.long().flip(1).cumsum(1).flip(1)  # [B, T], this token included
    is_last = response_mask & (num_left == 1)
    rewards = torch.where(is_last, scores[:, None] - kl_coef * kl, -kl_coef * kl)
    return rewards, (estimates if return_estimates else kl)


def _check(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, estimator: str
) -> None:
    op = "shape_rewards"
    check_shape(op, {"logprobs": logprobs, "ref_logprobs": ref_logprobs,
                     "response_mask": response_mask}, ndim=2, layout="[B, T]")
    check_float(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_mask(op, response_mask=response_mask)
    check_device(op, {"logprobs": logprobs, "scores": scores})
    if scores.shape != logprobs.shape[:1]:
        raise ShapeError(f"{op}: expected scores [B] with B = {logprobs.shape[0]}, got "
                         f"{list(scores.shape)}; one score per response")
    if estimator not in ESTIMATORS:
        raise ConfigError(f"{op}: expected estimator k1, k2 or k3, got {estimator!r}")
    check_values(op, response_mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_values(op, scores=scores)


@overload
def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *,
    kl_coef: float, estimator: Estimator = "k1", return_estimates: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *,
    kl_coef: float, estimator: Estimator = "k1", return_estimates: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Estimates]: ...


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: Estimator = "k1",
    return_estimates: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | Estimates]:
    """Per-token rewards of PPO, and the KL estimates they contain.

        rewards_t = -kl_coef * kl_t + [t is the last response token] * score

    Args:
        scores: [B] float. One number per response.
        logprobs: [B, T] float. Policy that drew the tokens.
        ref_logprobs: [B, T] float. Reference, of the same tokens.
        response_mask: [B, T] bool. True for sampled tokens, EOS included.
        kl_coef: beta, weight of the penalty.
        estimator: Which of `kl_estimate` is the penalty.
        return_estimates: Return all three estimates in place of that one, in the same launch.
        backend: See fastrl.backends.
    Returns:
        rewards, kl: [B, T] float32 (float64 for float64) each, 0 where the mask is False. No
        gradient. A response without a token receives no score. With return_estimates: rewards,
        (k1, k2, k3), [B, T] each.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when there is no such estimator.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads 9 bytes, writes 8 bytes per token; 16 with all estimates.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq. 2; Ziegler et al. 2019 (arXiv 1909.08593).
    Example:
        >>> logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> rewards, kl = shape_rewards(torch.tensor([3.0]), logprobs, ref, mask, kl_coef=0.5)
        >>> rewards.tolist(), kl.tolist()
        ([[-0.5, 3.0]], [[1.0, 0.0]])
    """
    _check(scores, logprobs, ref_logprobs, response_mask, estimator)
    dtype = torch.promote_types(logprobs.dtype, ref_logprobs.dtype)
    dtype = torch.promote_types(dtype, scores.dtype)
    name = choose("shape_rewards", "rewards", PREFERENCE, logprobs.device.type, dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import rewards

        return rewards.shape_rewards(scores, logprobs, ref_logprobs, response_mask,
                                     kl_coef=kl_coef, estimator=estimator,
                                     return_estimates=return_estimates)
    if name == "cuda":
        from fastrl_kernels.cuda import rewards as cuda_rewards

        return cuda_rewards.shape_rewards(scores, logprobs, ref_logprobs, response_mask,
                                          kl_coef=kl_coef, estimator=estimator,
                                          return_estimates=return_estimates)
    return shape_rewards_reference(scores, logprobs, ref_logprobs, response_mask, kl_coef=kl_coef,
                                   estimator=estimator, return_estimates=return_estimates)
