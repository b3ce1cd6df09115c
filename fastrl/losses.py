"""Losses that need no kernel: pure functions of log-probs."""

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
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss of direct preference optimisation, and the margin, of each pair.

        h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
        sigmoid: -(1 - label_smoothing) log sigmoid(dpo_beta h)
                 - label_smoothing log sigmoid(-dpo_beta h)
        ipo:     (h - 1 / (2 dpo_beta))^2

    Args:
        chosen_logprobs, rejected_logprobs: [B] float. Log-probs of the responses under the policy,
            summed over their tokens (for ipo the mean over them); differentiable.
        ref_chosen_logprobs, ref_rejected_logprobs: [B] float. The same under the reference; zeros
            where there is none.
        dpo_beta: Strength of the pull towards the reference; above 0.
        loss_type: sigmoid or ipo.
        label_smoothing: Share of labels taken to be wrong, from 0 to below 0.5; sigmoid only.
    Returns:
        losses: [B]. margins: [B], dpo_beta h, the implicit reward of chosen over rejected; no
        gradient.
    Raises:
        ShapeError: when the four tensors are not of one shape [B].
        ConfigError: when a coefficient or the type is out of bounds.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; Azar et al. 2023 (arXiv 2310.12036),
        eq. 17, for ipo.
    """
    tensors = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    shapes = [list(tensor.shape) for tensor in tensors]
    if chosen_logprobs.ndim != 1 or len({tuple(shape) for shape in shapes}) != 1:
        raise ShapeError(f"dpo_loss: expected four tensors of one shape [B], got {shapes}; sum the "
                         "log-probs of each response over its tokens")
    if dpo_beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"dpo_loss: expected dpo_beta above 0 and label_smoothing from 0 to "
                          f"below 0.5, got {dpo_beta} and {label_smoothing}; change them")
    if loss_type not in ("sigmoid", "ipo") or (loss_type == "ipo" and label_smoothing > 0):
        raise ConfigError(f"dpo_loss: expected loss_type sigmoid, or ipo without label_smoothing, "
                          f"got {loss_type!r} and {label_smoothing}; change loss_type")
    policy_margins = chosen_logprobs - rejected_logprobs
    difference = policy_margins - (ref_chosen_logprobs - ref_rejected_logprobs)
    margins = dpo_beta * difference
    if loss_type == "ipo":
        losses = (difference - 1 / (2 * dpo_beta)).square()
    else:
        losses = (-(1 - label_smoothing) * logsigmoid(margins)
                  - label_smoothing * logsigmoid(-margins))
    return losses, margins.detach()
