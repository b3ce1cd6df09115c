"""ppo_loss: the policy loss and the value loss of PPO together, from log-probs and values.

    loss = policy_loss(logprobs, ...) + value_coef value_loss(values, ...)
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_float,
    check_mask,
    check_not_negative,
    check_positive,
    check_shape,
    check_values,
)
from fastrl.ops.policy_loss import MAX_LOG_RATIO, PolicyStats, policy_loss_reference
from fastrl.ops.value_loss import ValueStats, value_loss_reference
from fastrl.ops.whiten import VARIANCE_EPSILON, check_moments, whiten_reference

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    clip_range: float = 0.2,
    value_clip_range: float | None = 0.2,
    value_coef: float = 1.0,
    moments: Tensor | None = None,
) -> tuple[Tensor, PolicyStats, ValueStats]:
    """ppo_loss in plain torch."""
    if moments is not None:
        advantages = whiten_reference(advantages, loss_mask, moments=moments)
    policy, policy_stats = policy_loss_reference(logprobs, old_logprobs, advantages, loss_mask,
                                                 denominator=denominator, clip_range=clip_range)
    value, value_stats = value_loss_reference(values, old_values, returns, loss_mask,
                                              denominator=denominator,
                                              value_clip_range=value_clip_range)
    return policy + value_coef * value, policy_stats, value_stats


def _check(
    floats: dict[str, Tensor], loss_mask: Tensor, moments: Tensor | None,
    denominator: float | None, clip_range: float, value_clip_range: float | None,
    value_coef: float,
) -> None:
    op = "ppo_loss"
    check_shape(op, {**floats, "loss_mask": loss_mask}, ndim=loss_mask.dim(), layout="[...]")
    check_float(op, **floats)
    check_mask(op, loss_mask=loss_mask)
    check_moments(op, floats["advantages"], moments)
    check_positive(op, denominator=denominator, clip_range=clip_range,
                   value_clip_range=value_clip_range)
    check_not_negative(op, value_coef=value_coef)
    check_values(op, loss_mask, **floats)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float | None = None,
    clip_range: float = 0.2,
    value_clip_range: float | None = 0.2,
    value_coef: float = 1.0,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats, ValueStats]:
    """The clipped policy loss plus the clipped value loss of PPO, and the statistics of both.

        loss = policy_loss(logprobs, ...) + value_coef value_loss(values, ...)

    For callers that hold log-probs; `linear_policy_loss` starts from hidden states.

    Args:
        logprobs: [B, T] or [M] float. Current policy; differentiable.
        old_logprobs: Same shape. Policy when the batch was made.
        advantages: Same shape; a constant to autograd.
        values: Same shape. Current critic; differentiable.
        old_values: Same shape. Critic when the batch was made.
        returns: Same shape. Targets of the critic, not whitened.
        loss_mask: Same shape, bool. True for tokens that count; elsewhere anything, NaN too.
        denominator: Tokens of the whole minibatch; None: the True positions of this mask.
        clip_range: eps of the ratio.
        value_clip_range: eps of the values; None: plain squared error.
        value_coef: Weight of the value loss.
        moments: [P, 3] as compute_gae returns them, of the whole batch: the advantages are
            whitened by them on the way. None: the advantages are used as they are.
        backend: See fastrl.backends.
    Returns:
        loss: Scalar float32 (float64 for float64); 0 when nothing counts. triton: differentiable
            once.
        policy_stats, value_stats: PolicyStats and ValueStats.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when a coefficient is out of bounds.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: some hundred passes over [M], half as many backward (triton: one, and one per gradient).
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 and 9.
    Example:
        >>> one, mask = torch.ones(1), torch.tensor([True])
        >>> logprobs, old = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        >>> loss, policy, value = ppo_loss(logprobs, old, one, one, 0.5 * one, 2 * one, mask,
        ...                                value_coef=0.1)
        >>> round(float(loss), 4), float(policy.clip_fraction), round(float(value.value_loss), 4)
        (-1.1155, 1.0, 0.845)
    """
    advantages = advantages.detach()
    floats = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages,
              "values": values, "old_values": old_values, "returns": returns}
    _check(floats, loss_mask, moments, denominator, clip_range, value_clip_range, value_coef)
    dtype = torch.promote_types(logprobs.dtype, values.dtype)
    name = choose("ppo_loss", "ppo_loss", PREFERENCE, logprobs.device.type, dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import ppo_loss as kernels

        loss, policy_sums, value_sums = kernels.ppo_loss(
            **floats, loss_mask=loss_mask, denominator=denominator, clip_range=clip_range,
            value_clip_range=value_clip_range, value_coef=value_coef, moments=moments,
            max_log_ratio=MAX_LOG_RATIO, epsilon=VARIANCE_EPSILON)
        return loss, PolicyStats(*policy_sums), ValueStats(*value_sums)
    return ppo_loss_reference(
        **floats, loss_mask=loss_mask, denominator=denominator, clip_range=clip_range,
        value_clip_range=value_clip_range, value_coef=value_coef, moments=moments)
