"""From rewards and values of a rollout, or the scores of groups, to advantages."""

from torch import Tensor

from fastrl.checks import wide_dtype
from fastrl.errors import ShapeError
from fastrl.ops import compute_gae, whiten


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every response token, in the order that PPO needs.

        rewards whitened, mean kept (option) -> GAE -> returns = advantages + values
        -> advantages whitened (option)

    The returns come from the advantages *before* whitening: they are in the unit of the values.

    Args:
        rewards: [B, T] float. Received after response token t, shaped.
        values: [B, T] float. Value of the state before response token t.
        response_mask: [B, T] bool. True for sampled tokens, EOS included.
        gamma: Discount.
        lam: Trace decay in [0, 1].
        whiten_rewards: Scale rewards to unit variance over the batch, mean kept.
        whiten_advantages: Shift and scale advantages to mean 0, variance 1 over the batch.
    Returns:
        advantages, returns: [B, T] float each, 0 where the mask is False. No gradient.
    Source: Schulman et al. 2016 (arXiv 1506.02438) for GAE; Ziegler et al. 2019 (arXiv 1909.08593)
        for the order.
    """
    if whiten_rewards:
        rewards = whiten(rewards, response_mask, keep_mean=True)
    advantages, returns = compute_gae(rewards, values, response_mask, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantages = whiten(advantages, response_mask)
    return advantages, returns


def grpo(
    scores: Tensor, *, normalize_by_std: bool = True, correction: int = 0, epsilon: float = 1e-8
) -> Tensor:
    """Advantage of each response of a group over the group's mean, in units of its spread.

        A_i = (s_i - mean) / (std + epsilon), the same for every token of response i

    Args:
        scores: [P, G] float. G responses to each of P prompts.
        normalize_by_std: False leaves the spread out, as Dr. GRPO does.
        correction: 0 for the population's standard deviation, 1 for the sample's.
        epsilon: Keeps a group of equal scores at 0.
    Returns:
        [P, G] float32 or wider.
    Raises:
        ShapeError: when scores is not [P, G] with G of at least 2.
    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1; Liu et al. 2025 (arXiv 2503.20783).
    Example:
        >>> import torch
        >>> [round(a, 2) for a in grpo(torch.tensor([[1.0, 0.0, 0.5, -0.5]]))[0].tolist()]
        [1.34, -0.45, 0.45, -1.34]
    """
    scores = _groups("grpo", scores)
    advantages = scores - scores.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (scores.std(dim=1, correction=correction, keepdim=True) + epsilon)
    return advantages


def rloo(scores: Tensor) -> Tensor:
    """Advantage of each response of a group over the mean of the others.

        A_i = s_i - sum_{j != i} s_j / (G - 1) = G / (G - 1) (s_i - mean)

    Args:
        scores: [P, G] float. G responses to each of P prompts.
    Returns:
        [P, G] float32 or wider, the same for every token of a response.
    Raises:
        ShapeError: when scores is not [P, G] with G of at least 2.
    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.3.
    Example:
        >>> import torch
        >>> rloo(torch.tensor([[1.0, 0.0]])).tolist()
        [[1.0, -1.0]]
    """
    scores = _groups("rloo", scores)
    size = scores.shape[1]
    return size / (size - 1) * (scores - scores.mean(dim=1, keepdim=True))


def _groups(name: str, scores: Tensor) -> Tensor:
    """Scores [P, G] in float32 or wider, checked."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ShapeError(f"{name}: expected scores [P, G] with G of at least 2, got "
                         f"{list(scores.shape)}; sample at least two responses per prompt")
    return scores.to(wide_dtype(scores.dtype))
