"""value_loss on a GPU: the kernels of ppo_loss.py without its first half.

    V_c = clip(V, V_old - eps, V_old + eps)
    loss = 0.5 sum_mask max((V - returns)^2, (V_c - returns)^2) / denominator

Two launches; 13 bytes read and 4 written per token in float32. Limits as there.
"""

from torch import Tensor

from fastrl_kernels.triton.ppo_loss import Settings, loss_and_sums, value_fields
from fastrl_kernels.triton.support import supports

__all__ = ["supports", "value_loss"]


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, *,
    denominator: float | None = None, value_clip_range: float | None = 0.2,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """fastrl.ops.value_loss on this backend; the fields of ValueStats in order."""
    settings = Settings(denominator, 0.0, value_clip_range, 1.0, 0.0, 0.0)
    loss, sums = loss_and_sums((None, None, None, values, old_values, returns), loss_mask, None,
                               settings)
    return loss, value_fields(sums)
