"""Losses that need no kernel: pure functions of log-probs."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.errors import ConfigError, ShapeError


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    dpo_beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean loss of direct preference optimisation, and the margin of each pair.

        z = dpo_beta [ (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)) ]
        loss = mean of -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)

    Args:
        chosen_logprobs, rejected_logprobs: [B] float. Log-probs of the responses, summed over their
            tokens, under the policy; differentiable.
        ref_chosen_logprobs, ref_rejected_logprobs: [B] float. The same under the reference.
        dpo_beta: Strength of the pull towards the reference; above 0.
        label_smoothing: Share of labels taken to be wrong, from 0 to below 0.5.
    Returns:
        loss: Scalar. margins: [B], z, the implicit reward of chosen over rejected; no gradient.
    Raises:
        ShapeError: when the four tensors are not of one shape [B].
        ConfigError: when a coefficient is out of bounds.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    tensors = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    shapes = [list(tensor.shape) for tensor in tensors]
    if chosen_logprobs.ndim != 1 or len({tuple(shape) for shape in shapes}) != 1:
        raise ShapeError(f"dpo_loss: expected four tensors of one shape [B], got {shapes}; sum the "
                         "log-probs of each response over its tokens")
    if dpo_beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"dpo_loss: expected dpo_beta above 0 and label_smoothing from 0 to "
                          f"below 0.5, got {dpo_beta} and {label_smoothing}; change them")
    policy_margins = chosen_logprobs - rejected_logprobs
    margins = dpo_beta * (policy_margins - (ref_chosen_logprobs - ref_rejected_logprobs))
    losses = (-(1 - label_smoothing) * logsigmoid(margins)
              - label_smoothing * logsigmoid(-margins))
    return torch.mean(losses), margins.detach()
