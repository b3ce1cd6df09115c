"""What one PPO iteration learns from, the gradient of a minibatch, and the numbers to log."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.heads import ScalarHead
from fastrl.ops import (
    PolicyStats,
    ValueStats,
    kl_estimate,
    linear_logprobs,
    linear_policy_loss,
    masked_mean,
    value_loss,
)
from fastrl.packing import predict_rows
from fastrl.rewards import adjust_scores
from fastrl.trainers.common import accumulate, packed_forward
from fastrl.trainers.ppo_advantages import response_weights
from fastrl.types import Rollout


@dataclass(frozen=True, slots=True)
class PPOBatch:
    """Everything an iteration knows about its responses before the first optimiser step."""

    rollout: Rollout
    sequences: list[list[int]]
    """Token ids of every sequence, prompt and response."""
    old_logprobs: Tensor
    """[B, T], of the policy that the update starts from."""
    ref_logprobs: Tensor | None
    """[B, T], of the frozen reference; None without one."""
    kl_estimates: tuple[Tensor, Tensor, Tensor] | None
    """k1, k2, k3, [B, T] each, of KL(policy || reference); None without a reference."""
    values: Tensor | None
    """[B, T], of the critic, before each response token; None without one."""
    raw_scores: Tensor
    """[B], as the scorer gave them."""
    scores: Tensor
    """[B], clipped, and replaced where a response did not stop."""
    rewards: Tensor
    """[B, T], score on the last token, and KL on every one where it is in the reward."""
    raw_advantages: Tensor
    """[B, T], before whitening."""
    advantages: Tensor
    """[B, T], whitened where the config says so."""
    returns: Tensor | None
    """[B, T], targets of the critic."""
    kl_coef: float
    """beta of this iteration."""
    critic_states: list[Tensor] | None = None
    """B tensors [T_i, D] that `values` were read from, where the trunk under the critic is left
    alone by its update."""

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True for sampled tokens."""
        return self.rollout.response_mask


def unpack_sequences(rollout: Rollout) -> list[list[int]]:
    """Token ids of every sequence of a rollout, with one copy from the device."""
    token_ids, bounds = rollout.token_ids.tolist(), rollout.cu_seqlens.tolist()
    return [token_ids[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _response_forward(
    model: CausalLM | ScalarModel, batch: PPOBatch, rows: list[int], config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Model output at the M positions that predict the responses `rows`, and the M tokens."""
    output, packed = packed_forward(
        model, [batch.sequences[i] for i in rows], batch.rollout.prompt_lens[rows].tolist(),
        share_prefix=config.share_prefix)
    sources, targets = predict_rows(packed.is_response, packed)
    return output[sources], packed.token_ids[targets]


def _accumulate(
    batch: PPOBatch, rows: list[int], config: PPOConfig, loss_of: Callable[[list[int]], Tensor]
) -> None:
    """Backward through the responses `rows`, samples of one prompt in one microbatch if they fit.

    Args:
        loss_of: Given places in `rows`, their share of the loss.
    """
    prompt_lens = batch.rollout.prompt_lens.tolist()
    prompts = [batch.sequences[i][:prompt_lens[i]] for i in rows] if config.share_prefix else None
    accumulate([len(batch.sequences[i]) for i in rows], config.max_tokens_per_microbatch, loss_of,
               prompts=prompts)


def backward_policy(
    policy: CausalLM,
    batch: PPOBatch,
    rows: list[int],
    config: PPOConfig,
    *,
    measures_ratio: bool = False,
    value_head: ScalarHead | None = None,
) -> dict[str, float]:
    """Add the gradient of the clipped policy loss of one minibatch to the policy.

    With a value head on the policy's trunk the loss is policy loss + value_coef * value loss, both
    from one forward pass; the gradient of the value loss reaches trunk and head.

    Every mean is over the response tokens of the whole minibatch, so that the split into
    microbatches does not change the gradient.

    Args:
        rows: Responses of the minibatch.
        measures_ratio: Also compare the engine's log-probs with those of this very forward; True
            for the first minibatch of an iteration, where the weights are the engine's.
        value_head: On the policy's trunk; None: the critic has an update of its own.
    Returns:
        Metrics of the minibatch, of the state before the optimiser step.
    """
    denominator = int(batch.rollout.response_lens[rows].sum())
    temperature = config.sampling.temperature
    weights = response_weights(config, batch.rollout.response_lens, rows)
    parts: list[PolicyStats] = []
    value_parts: list[ValueStats] = []
    ratios: list[Tensor] = []

    def loss_of(part: list[int]) -> Tensor:
        taken = [rows[i] for i in part]
        mask = batch.mask[taken]
        hidden, token_ids = _response_forward(policy, batch, taken, config)
        loss: Tensor
        loss, stats = policy.lm_head(
            hidden, linear_policy_loss, token_ids, batch.old_logprobs[taken][mask],
            batch.advantages[taken][mask], torch.ones_like(token_ids, dtype=torch.bool),
            denominator=denominator, clip_range=config.clip_range,
            clip_range_high=config.clip_range_high, dual_clip=config.dual_clip,
            temperature=temperature, entropy_coef=config.entropy_coef,
            token_weights=None if weights is None else weights[part].repeat_interleave(
                mask.sum(dim=1)).to(hidden.device, torch.float32),
            **_kl_in_loss(batch, taken, config),
        )
        parts.append(stats)
        if measures_ratio:
            with torch.no_grad():
                logprobs, _ = policy.lm_head(hidden.detach(), linear_logprobs, token_ids,
                                             temperature=temperature)
            ratios.append((logprobs - batch.rollout.rollout_logprobs[taken][mask]).exp())
        if value_head is not None:
            loss = loss + _value_share(value_head(hidden), batch, taken, denominator, config,
                                       value_parts)
        return loss

    _accumulate(batch, rows, config, loss_of)
    stats = sum(parts[1:], parts[0])
    metrics = {
        "loss/policy": float(stats.policy_loss / stats.count),
        "clip/fraction": float(stats.clip_fraction / stats.count),
        "kl/approx": float(stats.approx_kl / stats.count),
        "ratio/effective_share": float(stats.effective_sample_size / stats.count),
    }
    if measures_ratio:
        ratio = torch.cat(ratios)
        metrics["ratio/first_minibatch_mean"] = float(ratio.mean())
        metrics["ratio/first_minibatch_max_error"] = float((ratio - 1).abs().max())
    return metrics | _value_metrics(value_parts)


def _kl_in_loss(batch: PPOBatch, taken: list[int], config: PPOConfig) -> dict[str, Any]:
    """What the policy loss is told of the KL to the reference; nothing where it is in the reward.
    """
    if config.kl_in == "reward" or batch.ref_logprobs is None or batch.kl_coef == 0:
        return {}
    return {"ref_logprobs": batch.ref_logprobs[taken][batch.mask[taken]],
            "kl_coef": batch.kl_coef, "kl_estimator": config.kl_estimator}


def _value_share(
    values: Tensor, batch: PPOBatch, taken: list[int], denominator: int, config: PPOConfig,
    parts: list[ValueStats],
) -> Tensor:
    """value_coef times the value loss of the values [M] of some responses; adds its statistics."""
    assert batch.values is not None and batch.returns is not None  # there is a critic
    mask = batch.mask[taken]
    loss, stats = value_loss(
        values, batch.values[taken][mask], batch.returns[taken][mask],
        torch.ones_like(values, dtype=torch.bool),
        denominator=denominator, value_clip_range=config.value_clip_range,
    )
    parts.append(stats)
    return config.value_coef * loss


def _value_metrics(parts: Sequence[ValueStats]) -> dict[str, float]:
    """Metrics of the value losses of a minibatch; empty where there was none."""
    if not parts:
        return {}
    stats = sum(parts[1:], parts[0])
    return {"loss/value": float(stats.value_loss / stats.count),
            "clip/value_fraction": float(stats.clip_fraction / stats.count)}


def backward_critic(
    critic: ScalarModel, batch: PPOBatch, rows: list[int], config: PPOConfig
) -> dict[str, float]:
    """Add the gradient of the clipped value loss of one minibatch to the critic.

    Where the batch has the hidden states under the critic, only its head is run, and trained.

    Args:
        rows: Responses of the minibatch.
    Returns:
        Metrics of the minibatch, of the state before the optimiser step.
    """
    denominator = int(batch.rollout.response_lens[rows].sum())
    parts: list[ValueStats] = []

    def loss_of(part: list[int]) -> Tensor:
        taken = [rows[i] for i in part]
        if batch.critic_states is None:
            values, _ = _response_forward(critic, batch, taken, config)
        else:
            values = critic.head(torch.cat([batch.critic_states[i] for i in taken]))
        return _value_share(values, batch, taken, denominator, config, parts)

    _accumulate(batch, rows, config, loss_of)
    return _value_metrics(parts)


def response_metrics(
    rollout: Rollout, kl_estimates: tuple[Tensor, Tensor, Tensor] | None, raw_scores: Tensor
) -> dict[str, float]:
    """What a set of responses looks like, in training and evaluation; no KL without estimates."""
    stopped = [reason == "stop" for reason in rollout.finish_reasons]
    kl = {} if kl_estimates is None else {
        "kl/policy_ref": float(kl_estimates[0].sum(dim=1).mean()),
        "kl/policy_ref_k3": float(kl_estimates[2].sum(dim=1).mean()),
    }
    return {
        "reward/score_mean": float(raw_scores.mean()),
        "reward/score_std": float(raw_scores.std(correction=0)),
        "reward/score_min": float(raw_scores.min()),
        "reward/score_max": float(raw_scores.max()),
        **kl,
        "entropy/mean": float(masked_mean(rollout.entropy, rollout.response_mask)),
        "response/length_mean": float(rollout.response_lens.double().mean()),
        "response/eos_rate": sum(stopped) / len(stopped),
        **_likeness(rollout, stopped),
    }


def _likeness(rollout: Rollout, stopped: Sequence[bool]) -> dict[str, float]:
    """How many responses are empty, and how many the same."""
    rows, lengths = rollout.response_ids.tolist(), rollout.response_lens.tolist()
    counts = Counter(tuple(row[:length]) for row, length in zip(rows, lengths, strict=True))
    # A response that stopped has its stop token among its tokens.
    empty = sum(length - stop <= 0 for length, stop in zip(lengths, stopped, strict=True))
    return {"response/empty_share": empty / len(rows),
            "response/most_common_share": max(counts.values()) / len(rows)}


def used_scores(raw_scores: Tensor, rollout: Rollout, config: PPOConfig) -> Tensor:
    """Scores [B] as PPO uses them: clipped, and replaced where a response did not stop."""
    return adjust_scores(raw_scores, rollout.finish_reasons, clip=config.reward_clip,
                         missing_eos_penalty=config.missing_eos_penalty)


def batch_metrics(batch: PPOBatch, config: PPOConfig) -> dict[str, float]:
    """What an iteration knows before it learns."""
    metrics = {
        **response_metrics(batch.rollout, batch.kl_estimates, batch.raw_scores),
        "reward/used_score_mean": float(batch.scores.mean()),
        "reward/used_score_std": float(batch.scores.std(correction=0)),
        "reward/total_mean": float(batch.rewards.sum(dim=1).mean()),
        "advantage/std": float(batch.raw_advantages[batch.mask].double().std(correction=0)),
    }
    if config.num_samples_per_prompt > 1:
        groups = batch.scores.reshape(-1, config.num_samples_per_prompt)
        is_equal = (groups == groups[:, :1]).all(dim=1)
        metrics["reward/equal_group_share"] = float(is_equal.double().mean())
    return metrics | _critic_metrics(batch)


def _critic_metrics(batch: PPOBatch) -> dict[str, float]:
    """How well the critic predicted; empty without one."""
    if batch.values is None or batch.returns is None:
        return {}
    returns = batch.returns[batch.mask].double()
    residuals = returns - batch.values[batch.mask].double()
    variance = float(returns.var(correction=0))
    return {
        "value/mean": float(masked_mean(batch.values, batch.mask)),
        "value/return_mean": float(returns.mean()),
        "value/return_std": variance ** 0.5,
        # Equal returns leave nothing to explain.
        "value/explained_variance":
            1 - float(residuals.square().mean()) / variance if variance > 0 else 0.0,
    }


def eval_metrics(
    rollout: Rollout, ref_logprobs: Tensor | None, raw_scores: Tensor, config: PPOConfig
) -> dict[str, float]:
    """Held-out metrics; `eval/objective` is the mean score as PPO uses it - beta * KL.

    beta is that of the config also when a controller moves it, so that evaluations compare. Without
    a reference there is no KL, and beta is 0.
    """
    estimates = None if ref_logprobs is None else kl_estimate(
        rollout.rollout_logprobs, ref_logprobs, rollout.response_mask)
    metrics = response_metrics(rollout, estimates, raw_scores)
    objective = (float(used_scores(raw_scores, rollout, config).mean())
                 - config.kl_coef * metrics.get("kl/policy_ref", 0.0))
    return {"eval/objective": objective,
            **{f"eval/{name.replace('/', '_')}": value for name, value in metrics.items()}}


def mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: math.fsum(values) / len(values) for name in names
            if (values := [row[name] for row in rows if name in row])}
