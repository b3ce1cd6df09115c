"""From rewards and values of a rollout to advantages and value targets."""

from torch import Tensor

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
