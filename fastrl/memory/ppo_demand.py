"""What an iteration of PPO asks of the memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastrl.config import PPOConfig
from fastrl.memory import sizes
from fastrl.memory.pages import max_prefill_tokens, tokens_per_page
from fastrl.memory.plan import Demand, Moment
from fastrl.memory.residents import NEEDS, SWAP
from fastrl.memory.shapes import ModelShape
from fastrl.memory.training import Device, trained, training
from fastrl.memory.trunks import head_sizes, on_trunk


@dataclass(frozen=True, slots=True)
class Models:
    """The shapes of PPO's models."""

    policy: ModelShape
    critic: ModelShape | None
    reward_model: ModelShape | None
    reference: ModelShape | None


def ppo_demand(config: PPOConfig, models: Models, device: Device, longest: int | None) -> Demand:
    """Up to four models in turns, and pages of keys and values."""
    policy, dtype = models.policy, device.dtype
    asked = config.max_prompt_tokens + config.sampling.max_new_tokens
    longest = min(longest or asked, policy.decoder.max_positions)
    kept = trained("policy", policy.language_model, policy.trained_language_model, config, dtype)
    if models.critic is not None:
        critic = models.critic
        # A critic with adapters has a trunk that it shares: see `trunk_owner`.
        own_weights = critic.trained_scalar_model if critic.adapters else critic.scalar_model
        kept |= trained("critic", own_weights, critic.trained_scalar_model, config, dtype)
    width = (models.reward_model or policy if config.critic_trunk == "reward" else policy
             ).decoder.hidden_size
    kept |= head_sizes(config, width, dtype)
    if config.ema_decay is not None:
        kept["ema"] = sizes.ema_bytes(policy.trained_language_model, dtype)
    if models.reference is not None:
        kept["reference"] = sizes.weight_bytes(models.reference.language_model, dtype)
    if models.reward_model is not None:
        kept["reward_model"] = sizes.weight_bytes(models.reward_model.scalar_model, dtype)
    page_size = tokens_per_page(config.engine, device.type, longest)
    per_sequence = -(-longest // page_size)
    num_sequences = min(config.engine.max_batch_size, config.rollout_batch_size) + 1
    max_pages = config.engine.num_pages or num_sequences * per_sequence
    page_bytes = sizes.kv_bytes(policy.decoder, dtype, page_size)

    def moments(tokens: int, pages: int) -> list[Moment]:
        cache = {"kv_cache": pages * page_bytes}
        return on_trunk(config, width, dtype, [
            *_rollout("rollout", config, policy, device, longest, cache),
            *_scoring("scoring", config, models, device, min(
                tokens, config.rollout_batch_size * longest), longest),
            *_updates(config, models, device, min(
                tokens, config.minibatch_size * longest), longest),
            *_evaluation(config, models, device, tokens, longest, cache)])

    return Demand(
        kept=kept, moments=moments, max_tokens=config.max_tokens_per_microbatch,
        min_tokens=longest, page_size=page_size, page_bytes=page_bytes,
        min_pages=min(per_sequence, max_pages), max_pages=max_pages,
        parking=config.parking)


def _rollout(
    phase: str, config: PPOConfig, policy: ModelShape, device: Device, longest: int,
    passing: Mapping[str, int],
) -> list[Moment]:
    """Prefill in one pass, then decode a row per sequence."""
    num_rows = min(config.engine.max_batch_size, config.rollout_batch_size)
    prefill = max_prefill_tokens(config.engine, device.type)
    prefill = max(longest, min(prefill, config.rollout_batch_size * longest))
    forward = sizes.forward_bytes(policy.decoder, device.dtype, prefill)
    logits = sizes.sampling_bytes(policy.decoder, device.dtype, num_rows, device_type=device.type)
    logits += policy.joined_head_bytes(device.dtype)
    copies = sizes.copy_bytes(policy.decoder, device.dtype, device_type=device.type)
    needs = NEEDS["rollout"]
    return [Moment(phase, needs, {**passing, "scratch": copies, "activations": forward}),
            Moment(phase, needs, {**passing, "scratch": copies, "logits": logits})]


def _scoring(
    phase: str, config: PPOConfig, models: Models, device: Device, tokens: int, longest: int,
    passing: Mapping[str, int] = MappingProxyType({}),
) -> list[Moment]:
    """One model after the other; a language model makes logits, the others a number per token."""
    moments = []
    for name in NEEDS[phase]:
        shape: ModelShape | None = getattr(models, name, None)
        if shape is None:
            continue
        forward = sizes.forward_bytes(shape.decoder, device.dtype, tokens)
        scores = (sizes.scoring_bytes if name in ("policy", "reference") else sizes.scalar_bytes)(
            shape.decoder, device.dtype, _num_scored(config, tokens, longest))
        if name == "policy":
            scores += shape.joined_head_bytes(device.dtype)
        needed = (name, *(trunk_owner(config, models) if name == "critic" else ()))
        moments += [Moment(phase, needed, {**passing, "activations": forward}),
                    Moment(phase, needed, {**passing, "logits": scores})]
    return moments


def trunk_owner(config: PPOConfig, models: Models) -> tuple[str, ...]:
    """The model on whose frozen trunk a critic with adapters lies; none of another critic."""
    if models.critic is None or not models.critic.adapters or config.critic_trunk != "own":
        return ()
    has_owner = config.critic_init == "reward" and models.reward_model is not None
    return ("reward_model",) if has_owner else ("policy",)


def _num_scored(config: PPOConfig, tokens: int, longest: int) -> int:
    """Response tokens of a microbatch, at most."""
    return min(tokens, -(-tokens // longest) * config.sampling.max_new_tokens)


def _updates(
    config: PPOConfig, models: Models, device: Device, tokens: int, longest: int,
) -> list[Moment]:
    """The policy's steps, then those of the critic, where there is one."""
    policy, critic, dtype = models.policy, models.critic, device.dtype
    num_scored = tokens if config.ptx_coef > 0 else _num_scored(config, tokens, longest)
    moments = [
        *training("policy_update", "policy", policy.trained_language_model, policy, config, device,
                   tokens, sizes.loss_bytes(policy.decoder, dtype, num_scored,
                                            has_frozen_head=policy.has_frozen_head),
                   NEEDS["policy_update"])]
    if critic is None:
        return moments
    return [
        *moments,
        *training("critic_update", "critic", critic.trained_scalar_model, critic, config, device,
                   tokens, sizes.scalar_bytes(critic.decoder, dtype, tokens),
                   (*NEEDS["critic_update"], *trunk_owner(config, models)))]


def _evaluation(
    config: PPOConfig, models: Models, device: Device, tokens: int, longest: int,
    cache: dict[str, int],
) -> list[Moment]:
    """Rollout and scores, with the average in place of the weights where that is judged."""
    if config.eval_steps is None:
        return []
    phase, tokens = "evaluation", min(tokens, config.num_eval_prompts * longest)
    swapped: dict[str, int] = {}
    if config.ema_decay is not None and config.eval_with_ema:
        swapped = {"swapped": sizes.weight_bytes(models.policy.trained_language_model,
                                                 device.dtype)}
    return [*([Moment(phase, SWAP, swapped)] if swapped else ()),
            *_rollout(phase, config, models.policy, device, longest, cache | swapped),
            *_scoring(phase, config, models, device, tokens, longest, swapped)]
