"""What each stage asks of the memory: `plan_sft`, `plan_reward`, `plan_dpo` and `plan_ppo`."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from fastrl.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrl.memory import sizes
from fastrl.memory.advice import Advisor
from fastrl.memory.plan import Demand, MemoryPlan, Moment, solve
from fastrl.memory.ppo_demand import Models, ppo_demand
from fastrl.memory.shapes import ModelShape, with_adapters
from fastrl.memory.training import Device, trained, training

Config = TypeVar("Config", SFTConfig, RewardConfig, DPOConfig, PPOConfig)


def plan_sft(
    config: SFTConfig, model: ModelShape, device: Device, *, longest: int | None = None
) -> MemoryPlan:
    """The plan of supervised fine-tuning.

    Args:
        longest: Tokens of the longest example; None: `max_seq_tokens`.
    """
    model = with_adapters(model, config)
    return _plan(config, device, longest, lambda c, row: _sft(c, model, device, row))


def plan_reward(
    config: RewardConfig, model: ModelShape, device: Device, *, longest: int | None = None
) -> MemoryPlan:
    """The plan of reward-model training.

    Args:
        longest: Tokens of all completions of the prompt with the most; None: of two completions of
            `max_seq_tokens` each.
    """
    model = with_adapters(model, config, has_head=False)
    return _plan(config, device, longest, lambda c, row: _reward(c, model, device, row))


def plan_dpo(
    config: DPOConfig, policy: ModelShape, device: Device, *, reference: ModelShape | None = None,
    longest: int | None = None,
) -> MemoryPlan:
    """The plan of DPO and IPO.

    Args:
        reference: Of a second model, which is there for `scoring` before the first step only;
            None: the policy itself is read.
        longest: Tokens of the prompt and all completions of the largest ranking; None: of two
            completions of `max_seq_tokens` each.
    """
    policy = with_adapters(policy, config)
    return _plan(config, device, longest, lambda c, row: _dpo(c, policy, reference, device, row))


def plan_ppo(
    config: PPOConfig, policy: ModelShape, device: Device, *, critic: ModelShape | None = None,
    reward_model: ModelShape | None = None, reference: ModelShape | None = None,
    has_reward_model: bool = True, longest: int | None = None,
) -> MemoryPlan:
    """The plan of PPO.

    Args:
        critic, reward_model, reference: Shapes that differ from the policy's.
        has_reward_model: False where the scorer is a function.
        longest: Tokens of the longest prompt with its response; None: as the settings allow.
    """
    reward_model = (reward_model or policy) if has_reward_model else None
    if not config.has_critic:
        critic = None
    elif critic is None:
        critic = with_adapters((reward_model if config.critic_init == "reward" else None) or policy,
                               config, has_head=False)
    policy = with_adapters(policy, config)

    def demand(changed: PPOConfig, row: int | None) -> Demand:
        has_reference = changed.reference == "copy"  # with adapters off it is the policy
        return ppo_demand(changed, Models(policy, critic, reward_model,
                                          (reference or policy) if has_reference else None),
                          device, row)

    return _plan(config, device, longest, demand, has_reward_model)


def _plan(
    config: Config, device: Device, longest: int | None,
    demand_of: Callable[[Config, int | None], Demand], has_reward_model: bool = False,
) -> MemoryPlan:
    """Solve, with advice from solving again under other settings."""
    def solved(fields: dict[str, Any], row: int | None, budget: int | None) -> MemoryPlan:
        demand = demand_of(dataclasses.replace(config, **fields), row or longest)
        return solve(demand, budget or device.budget_bytes, device.type, lambda _: ())

    demand = demand_of(config, longest)
    advisor = Advisor(config, solved, has_reward_model, device.type)
    return solve(demand, device.budget_bytes, device.type,
                 lambda missing: advisor(missing, demand.min_tokens))


def _sft(config: SFTConfig, model: ModelShape, device: Device, longest: int | None) -> Demand:
    """Weights, optimiser and one microbatch at a time."""
    learned, dtype = model.trained_language_model, device.dtype
    longest = min(longest or config.max_seq_tokens, model.decoder.max_positions)

    def moments(tokens: int, pages: int) -> list[Moment]:
        row = config.max_seq_tokens if config.packing else longest
        tokens = min(tokens, config.batch_size * row)
        return training("update", "policy", learned, model, config, device, tokens,
                         sizes.loss_bytes(model.decoder, dtype, tokens,
                                          has_frozen_head=model.has_frozen_head),
                         has_dropout=config.residual_dropout > 0)

    return Demand(kept=trained("policy", model.language_model, learned, config, dtype),
                  moments=moments,
                  max_tokens=config.max_tokens_per_microbatch, min_tokens=longest)


def _reward(config: RewardConfig, model: ModelShape, device: Device, longest: int | None) -> Demand:
    """The same with a scalar head; all completions of a prompt are one row."""
    learned, dtype = model.trained_scalar_model, device.dtype
    longest = longest or 2 * min(config.max_seq_tokens, model.decoder.max_positions)

    def moments(tokens: int, pages: int) -> list[Moment]:
        tokens = min(tokens, config.batch_size * longest)
        return training("update", "reward_model", learned, model, config, device, tokens,
                         sizes.scalar_bytes(model.decoder, dtype, tokens))

    return Demand(kept=trained("reward_model", model.scalar_model, learned, config, dtype),
                  moments=moments,
                  max_tokens=config.max_tokens_per_microbatch, min_tokens=longest)


def _dpo(config: DPOConfig, model: ModelShape, reference: ModelShape | None, device: Device,
         longest: int | None) -> Demand:
    """The reference's log-probs once, before there is an optimiser; then the policy's steps."""
    learned, decoder, dtype = model.trained_language_model, model.decoder, device.dtype
    longest = longest or 2 * min(config.max_seq_tokens, decoder.max_positions)
    optimizer = {"policy_optimizer": sizes.optimizer_bytes(learned, dtype,
                                                           config.optimizer_moments)}

    def moments(tokens: int, pages: int) -> list[Moment]:
        rows = min(tokens, config.batch_size * longest)
        update = training("update", "policy", learned, model, config, device, rows,
                          sizes.logprob_bytes(decoder, dtype, rows,
                                              has_frozen_head=model.has_frozen_head))
        update = [dataclasses.replace(moment, passing={**moment.passing, **optimizer})
                  for moment in update]
        if config.reference == "none":
            return update
        source = (reference or model).decoder
        second = {} if reference is None else {
            "reference": sizes.weight_bytes(reference.language_model, dtype)}
        return [
            Moment("scoring", ("policy",), second | {
                "activations": sizes.forward_bytes(source, dtype, tokens)}),
            Moment("scoring", ("policy",), second | {
                "logits": sizes.scoring_bytes(source, dtype, tokens)}), *update]

    return Demand(kept={"policy": sizes.weight_bytes(model.language_model, dtype)}, moments=moments,
                  max_tokens=config.max_tokens_per_microbatch, min_tokens=longest)
