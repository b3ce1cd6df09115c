"""The advantages that a config asks for, and how much each response counts in the loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from fastrl.advantages import (
    dr_grpo,
    gae,
    grpo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)
from fastrl.config import PPOConfig, SamplingConfig

GROUP_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
"""Rules that take the totals of whole responses, [P, G]."""


def greedy_sampling(config: PPOConfig) -> SamplingConfig:
    """How the responses are drawn whose scores are the baselines of remax."""
    return replace(config.sampling, greedy=True)


def compute_advantages(
    config: PPOConfig, rewards: Tensor, scores: Tensor, response_mask: Tensor, *,
    values: Tensor | None, greedy_scores: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Advantages before whitening over the batch, and what a critic should have said.

    Args:
        rewards: [B, T] float. Shaped; samples of one prompt one after the other.
        scores: [B] float. As PPO uses them.
        response_mask: [B, T] bool.
        values: [B, T] float. Of the critic; None where there is none.
        greedy_scores: [P] float. Of the greedy responses, for remax; else None.
    Returns:
        advantages: [B, T] float. returns: [B, T] float, None without a critic.
    """
    if config.advantage == "gae":
        assert values is not None  # see check_settings
        return gae(rewards, values, response_mask, gamma=config.gamma, lam=config.lam,
                   whiten_rewards=config.whiten_rewards, whiten_advantages=False)
    if config.advantage in GROUP_RULES:
        totals = rewards.sum(dim=1).reshape(-1, config.num_samples_per_prompt)
        advantages = GROUP_RULES[config.advantage](totals).reshape(-1, 1)
        return advantages * response_mask, None
    if config.advantage == "reinforce_plus_plus":
        return reinforce_plus_plus(rewards, response_mask, gamma=config.gamma,
                                   whiten_advantages=False), None
    if config.advantage == "reinforce_plus_plus_baseline":
        return reinforce_plus_plus_baseline(
            rewards, scores.reshape(-1, config.num_samples_per_prompt), response_mask,
            gamma=config.gamma, whiten_advantages=False), None
    assert config.advantage == "remax" and greedy_scores is not None
    return remax(rewards, greedy_scores, response_mask, gamma=config.gamma), None


def response_weights(
    config: PPOConfig, response_lens: Tensor, rows: Sequence[int]
) -> Tensor | None:
    """What each token of the responses `rows` counts in a mean over the tokens of all of them.

        loss = 1/n sum_i 1/L_i sum_t l_it        weight_i = sum_j T_j / (n L_i)

    L_i is the mean length of the n responses (`loss_mean` token), the response's own length
    (sequence), the mean length of the responses to its prompt (group) or `max_new_tokens`
    (constant).

    Args:
        response_lens: [B] int64. T of every response of the iteration.
        rows: The n responses of a minibatch.
    Returns:
        [n] float64; None where each weight is 1.
    Source: Yu et al. 2025 (arXiv 2503.14476) for token, Shao et al. 2024 (arXiv 2402.03300) for
        sequence, Liu et al. 2025 (arXiv 2503.20783) for constant.
    """
    if config.loss_mean == "token":
        return None
    lengths = response_lens.double()
    own = lengths[list(rows)]
    if config.loss_mean == "group":
        size = config.num_samples_per_prompt
        divisors = lengths.reshape(-1, size).mean(dim=1).repeat_interleave(size)[list(rows)]
    else:
        divisors = own if config.loss_mean == "sequence" else own.new_full(
            own.shape, float(config.sampling.max_new_tokens))
    return own.sum() / (len(rows) * divisors)
