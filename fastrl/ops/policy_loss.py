"""policy_loss: the clipped objective of PPO from log-probs.

    rho_t = exp(logprobs_t - old_logprobs_t)
    loss = sum_mask max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)) / denominator
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_float,
    check_mask,
    check_positive,
    check_shape,
    check_values,
    wide_dtype,
)

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")
MAX_LOG_RATIO = 20.0
"""The log-ratio is held within plus and minus this, so that the ratio stays finite."""


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Detached sums over the True positions of the mask, float64 scalars.

    Divide a sum by `count` for the mean. Statistics of microbatches are combined with `+`.
    """

    count: Tensor
    """Number of True positions."""
    policy_loss: Tensor
    """Clipped losses times their weights, without KL and entropy bonus and before division by the
    denominator."""
    clip_fraction: Tensor
    """Number of tokens whose loss the clip (or the dual clip) changed."""
    approx_kl: Tensor
    """KL(old policy || current policy), estimated by 0.5 log_ratio^2."""
    approx_kl_k3: Tensor
    """The same KL, estimated by ratio - 1 - log_ratio: unbiased for samples of the old policy."""
    ratio: Tensor
    """Probability ratios."""
    squared_ratio: Tensor
    """Probability ratios squared."""
    entropy: Tensor
    """Entropies in nats; 0 where the op does not know them (policy_loss)."""
    max_abs_log_ratio: Tensor
    """Largest |log_ratio|, not held within MAX_LOG_RATIO: a maximum, not a sum."""

    def __add__(self, other: "PolicyStats") -> "PolicyStats":
        """Statistics of both microbatches together."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        largest = torch.maximum(self.max_abs_log_ratio, other.max_abs_log_ratio)
        return PolicyStats(**{**sums, "max_abs_log_ratio": largest})

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2 of the ratios w: `count` where all are equal, 1 where one rules.

        Source: Kish 1965, section 11.7.
        """
        return self.ratio.square() / self.squared_ratio


def token_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_range: float,
    entropy: Tensor | None = None,
    *,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Clipped losses [M] times their weights, 0 where masked, and their statistics."""
    dtype = wide_dtype(logprobs.dtype)
    exact = (logprobs.to(dtype) - old_logprobs.to(dtype)).masked_fill(~loss_mask, 0.0)
    log_ratio = exact.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = advantages.to(dtype).masked_fill(~loss_mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    losses, is_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        is_capped = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(is_capped, -dual_clip * advantages, losses)
        is_clipped = is_clipped | is_capped
    if token_weights is not None:
        losses = losses * token_weights.to(dtype).masked_fill(~loss_mask, 0.0)
    wide = log_ratio.detach().double()
    ratios = ratio.detach().double().masked_fill(~loss_mask, 0.0)
    stats = PolicyStats(
        count=loss_mask.double().sum(),
        policy_loss=losses.detach().double().sum(),
        clip_fraction=is_clipped.double().sum(),
        approx_kl=0.5 * wide.square().sum(),
        approx_kl_k3=(wide.expm1() - wide).sum(),
        ratio=ratios.sum(),
        squared_ratio=ratios.square().sum(),
        entropy=torch.zeros_like(wide.sum()) if entropy is None
        else entropy.detach().double().masked_fill(~loss_mask, 0.0).sum(),
        max_abs_log_ratio=torch.cat([exact.detach().double().abs(), wide.new_zeros(1)]).amax(),
    )
    return losses, stats


def policy_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    clip_range: float = 0.2,
) -> tuple[Tensor, PolicyStats]:
    """policy_loss in plain torch."""
    logprobs, old_logprobs, advantages, loss_mask = (
        x.flatten() for x in (logprobs, old_logprobs, advantages, loss_mask)
    )
    losses, stats = token_losses(logprobs, old_logprobs, advantages, loss_mask, clip_range)
    divisor = loss_mask.sum().clamp(min=1) if denominator is None else denominator
    return losses.sum() / divisor, stats


def _check(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor,
    denominator: float | None, clip_range: float,
) -> None:
    op = "policy_loss"
    floats = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
    check_shape(op, {**floats, "loss_mask": loss_mask}, ndim=logprobs.dim(), layout="[...]")
    check_float(op, **floats)
    check_mask(op, loss_mask=loss_mask)
    check_positive(op, denominator=denominator, clip_range=clip_range)
    check_values(op, loss_mask, **floats)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    clip_range: float = 0.2,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """The clipped policy loss of PPO, as a token mean, and its statistics.

        rho_t = exp(logprobs_t - old_logprobs_t)
        loss = sum_mask max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)) / denominator

    Args:
        logprobs: [B, T] or [M] float. Current policy; differentiable.
        old_logprobs: Same shape. Policy when the batch was made.
        advantages: Same shape.
        loss_mask: Same shape, bool. True for tokens that count; elsewhere anything, NaN too.
        denominator: Tokens of the whole minibatch; None: the True positions of this mask.
        clip_range: eps.
        backend: See fastrl.backends.
    Returns:
        loss: Scalar float32 (float64 for float64); 0 when nothing counts. triton: differentiable
            once, by logprobs.
        stats: PolicyStats.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when denominator or clip_range is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: a few passes over [M] (triton: one, and one over the gradient).
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    Example:
        >>> logprobs, old = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        >>> loss, stats = policy_loss(logprobs, old, torch.ones(1), torch.tensor([True]))
        >>> round(float(loss), 4), float(stats.clip_fraction)
        (-1.2, 1.0)
    """
    _check(logprobs, old_logprobs, advantages, loss_mask, denominator, clip_range)
    name = choose("policy_loss", "policy_loss", PREFERENCE, logprobs.device.type, logprobs.dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import policy_loss as kernel

        loss, sums = kernel.policy_loss(
            logprobs, old_logprobs, advantages, loss_mask, denominator=denominator,
            clip_range=clip_range, max_log_ratio=MAX_LOG_RATIO)
        return loss, PolicyStats(*sums)
    return policy_loss_reference(logprobs, old_logprobs, advantages, loss_mask,
                                 denominator=denominator, clip_range=clip_range)
