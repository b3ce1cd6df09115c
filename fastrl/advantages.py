"""From rewards and values of a rollout, or the scores of groups, to advantages.

`gae` needs a critic; `grpo`, `dr_grpo` and `rloo` take totals of whole responses, [P, G];
`reinforce_plus_plus`, its baseline form and `remax` take the rewards of tokens, [B, T].
"""

import torch
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
        >>> [round(a, 2) for a in grpo(torch.tensor([[1.0, 0.0, 0.5, -0.5]]))[0].tolist()]
        [1.34, -0.45, 0.45, -1.34]
    """
    scores = _groups("grpo", scores)
    advantages = scores - scores.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (scores.std(dim=1, correction=correction, keepdim=True) + epsilon)
    return advantages


def dr_grpo(scores: Tensor) -> Tensor:
    """Advantage of each response of a group over the group's mean, in the unit of the scores.

        A_i = s_i - mean

    Args:
        scores: [P, G] float. G responses to each of P prompts.
    Returns:
        [P, G] float32 or wider, the same for every token of a response.
    Raises:
        ShapeError: when scores is not [P, G] with G of at least 2.
    Source: Liu et al. 2025 (arXiv 2503.20783), section 3.
    """
    return grpo(scores, normalize_by_std=False)


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
        >>> rloo(torch.tensor([[1.0, 0.0]])).tolist()
        [[1.0, -1.0]]
    """
    scores = _groups("rloo", scores)
    size = scores.shape[1]
    return size / (size - 1) * (scores - scores.mean(dim=1, keepdim=True))


def reinforce_plus_plus(
    rewards: Tensor, response_mask: Tensor, *, gamma: float = 1.0, whiten_advantages: bool = True
) -> Tensor:
    """Rewards to come from each token on, whitened over the whole batch.

        A_t = sum_{k >= t} gamma^(k - t) R_k

    Args:
        rewards: [B, T] float. Received after response token t, the KL term among them.
        response_mask: [B, T] bool. True for sampled tokens, EOS included.
        gamma: Discount in [0, 1].
        whiten_advantages: Shift and scale to mean 0, variance 1 over the tokens of the batch.
    Returns:
        [B, T] float32 or wider, 0 where the mask is False. No gradient.
    Source: Hu et al. 2025 (arXiv 2501.03262), section 3.
    Example:
        >>> reinforce_plus_plus(torch.tensor([[-1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool),
        ...                     whiten_advantages=False).tolist()
        [[1.0, 2.0]]
    """
    advantages, _ = compute_gae(rewards, torch.zeros_like(rewards), response_mask, gamma=gamma,
                                lam=1.0)
    return whiten(advantages, response_mask) if whiten_advantages else advantages


def reinforce_plus_plus_baseline(
    rewards: Tensor, scores: Tensor, response_mask: Tensor, *, gamma: float = 1.0,
    whiten_advantages: bool = True,
) -> Tensor:
    """`reinforce_plus_plus` less the mean score of the response's group, before whitening.

    Args:
        rewards: [B, T] float. As for `reinforce_plus_plus`; B = P G, groups one after the other.
        scores: [P, G] float. What the last reward of each response has of its score.
        response_mask, gamma, whiten_advantages: As for `reinforce_plus_plus`.
    Returns:
        [B, T] float32 or wider, 0 where the mask is False. No gradient.
    Raises:
        ShapeError: when scores is not [P, G] with G of at least 2 and P G = B.
    Source: Hu et al. 2025 (arXiv 2501.03262), section 3.
    """
    scores = _groups("reinforce_plus_plus_baseline", scores)
    baselines = scores.mean(dim=1).repeat_interleave(scores.shape[1])
    return _less_baselines("reinforce_plus_plus_baseline", rewards, baselines, response_mask,
                           gamma, whiten_advantages)


def remax(
    rewards: Tensor, greedy_scores: Tensor, response_mask: Tensor, *, gamma: float = 1.0,
    whiten_advantages: bool = False,
) -> Tensor:
    """Rewards to come from each token on, less the score of the greedy response to its prompt.

        A_t = sum_{k >= t} gamma^(k - t) R_k - s_greedy

    Args:
        rewards: [B, T] float. As for `reinforce_plus_plus`; B = P G, samples of one prompt one
            after the other.
        greedy_scores: [P] float. Score of the most likely response to each prompt.
        response_mask, gamma, whiten_advantages: As for `reinforce_plus_plus`.
    Returns:
        [B, T] float32 or wider, 0 where the mask is False. No gradient.
    Raises:
        ShapeError: when greedy_scores is not [P] with P a divisor of B.
    Source: Li et al. 2023 (arXiv 2310.10505), section 4.
    """
    if greedy_scores.ndim != 1 or not len(greedy_scores) or len(rewards) % len(greedy_scores):
        raise ShapeError(f"remax: expected greedy_scores [P] with P a divisor of {len(rewards)} "
                         f"responses, got {list(greedy_scores.shape)}; score one greedy response "
                         "per prompt")
    baselines = greedy_scores.repeat_interleave(len(rewards) // len(greedy_scores))
    return _less_baselines("remax", rewards, baselines, response_mask, gamma, whiten_advantages)


def _less_baselines(
    name: str, rewards: Tensor, baselines: Tensor, response_mask: Tensor, gamma: float,
    whiten_advantages: bool,
) -> Tensor:
    """Rewards to come less a baseline of each response [B], whitened where asked."""
    if len(baselines) != len(rewards):
        raise ShapeError(f"{name}: expected scores of {len(rewards)} responses, as rewards has, "
                         f"got {len(baselines)}; give the scores of all groups")
    advantages = reinforce_plus_plus(rewards, response_mask, gamma=gamma, whiten_advantages=False)
    advantages = (advantages - baselines[:, None].to(advantages)).masked_fill(~response_mask, 0.0)
    return whiten(advantages, response_mask) if whiten_advantages else advantages


def _groups(name: str, scores: Tensor) -> Tensor:
    """Scores [P, G] in float32 or wider, checked."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ShapeError(f"{name}: expected scores [P, G] with G of at least 2, got "
                         f"{list(scores.shape)}; sample at least two responses per prompt")
    return scores.to(wide_dtype(scores.dtype))
