"""policy_loss on a GPU: the kernels of ppo_loss.py without its second half.

    rho = exp(logprob - old_logprob)
    loss = sum_mask max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) / denominator

Two launches; 13 bytes read and 4 written per token in float32. Limits as there.
"""

from torch import Tensor

from fastrl_kernels.triton.ppo_loss import Settings, loss_and_sums, policy_fields
from fastrl_kernels.triton.support import supports

__all__ = ["policy_loss", "supports"]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, *,
    denominator: float | None = None, clip_range: float = 0.2, max_log_ratio: float = 20.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """fastrl.ops.policy_loss on this backend; the fields of PolicyStats in order.

    Args:
        max_log_ratio: Where the log-ratio is held, in both directions.
    """
    settings = Settings(denominator, clip_range, None, 0.0, max_log_ratio, 0.0)
    loss, sums = loss_and_sums((logprobs, old_logprobs, advantages, None, None, None), loss_mask,
                               None, settings)
    return loss, policy_fields(sums)
