"""What each stage asks of the memory: `plan_sft`, `plan_reward` and `plan_ppo`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from fastrl.config import PPOConfig, RewardConfig, SFTConfig, TrainConfig
from fastrl.dense_attention import slots_read
from fastrl.memory import sizes
from fastrl.memory.plan import Demand, MemoryPlan, Moment, gib, solve
from fastrl.memory.shapes import ModelShape
from fastrl.memory.trunks import head_sizes, on_trunk

PAGE_SIZE = 16
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
Config = TypeVar("Config", SFTConfig, RewardConfig, PPOConfig)


@dataclass(frozen=True, slots=True)
class Device:
    """Where a stage runs, as far as a plan asks."""

    type: str
    """cuda or cpu."""
    budget_bytes: int
    """Memory for this process."""
    dtype: torch.dtype
    """Of the weights."""


def plan_sft(
    config: SFTConfig, model: ModelShape, device: Device, *, longest: int | None = None
) -> MemoryPlan:
    """The plan of supervised fine-tuning.

    Args:
        longest: Tokens of the longest example; None: `max_seq_tokens`.
    """
    return _plan(config, device, lambda c: _sft(c, model, device, longest))


def plan_reward(
    config: RewardConfig, model: ModelShape, device: Device, *, longest: int | None = None
) -> MemoryPlan:
    """The plan of reward-model training.

    Args:
        longest: Tokens of all completions of the prompt with the most; None: of two completions of
            `max_seq_tokens` each.
    """
    return _plan(config, device, lambda c: _reward(c, model, device, longest))


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
    critic = critic or (reward_model if config.critic_init == "reward" else None) or policy
    models = _Models(policy, critic, reward_model,
                     None if config.reference == "none" else reference or policy)
    return _plan(config, device, lambda c: _ppo(c, models, device, longest))


def _plan(config: Config, device: Device, demand_of: Callable[[Config], Demand]) -> MemoryPlan:
    """Solve, with advice from solving again under other settings."""
    def advice(missing: int) -> Sequence[str]:
        return _advice(config, device, demand_of, missing)

    return solve(demand_of(config), device.budget_bytes, device.type, advice)


def _changes(config: TrainConfig) -> list[tuple[str, dict[str, Any]]]:
    """Settings that save memory, those that cost least first."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("activation_checkpointing true", {"activation_checkpointing": True}),
        ("optimizer_moments 8bit", {"optimizer_moments": "8bit"})]
    if isinstance(config, PPOConfig):
        changes += [("ema_decay null", {"ema_decay": None, "eval_with_ema": False})]
        if config.parking == "off":
            changes += [("parking auto", {"parking": "auto"})]
    return [(name, change) for name, change in changes
            if any(getattr(config, field) != value for field, value in change.items())]


def _advice(
    config: Config, device: Device, demand_of: Callable[[Config], Demand], missing: int
) -> list[str]:
    """What to change: each setting that alone is enough, else all of them and what is left."""
    def solved(change: dict[str, Any]) -> MemoryPlan:
        return solve(demand_of(dataclasses.replace(config, **change)), device.budget_bytes,
                     device.type, lambda _: ())

    changes: list[tuple[str, dict[str, Any]]] = _changes(config)
    lines: list[str] = [] if not missing else [f"{gib(missing)} too much"]
    now: MemoryPlan = solved({})
    for name, change in changes:
        then: MemoryPlan = solved(change)
        if missing and then.fits:
            lines.append(f"set {name}: it fits then")
        elif not missing and then.max_tokens_per_microbatch > now.max_tokens_per_microbatch:
            lines.append(f"set {name}: microbatches of {then.max_tokens_per_microbatch} tokens "
                         f"instead of {now.max_tokens_per_microbatch}")
    if not missing or len(lines) > 1:
        return lines
    everything = solved({key: value for _, change in changes for key, value in change.items()})
    names: str = ", ".join(name for name, _ in changes)
    if everything.fits:
        return [*lines, f"set all of {names}: it fits then"]
    left = everything.peak_bytes + everything.reserve_bytes
    row = demand_of(config).min_tokens
    return [*lines, *([f"set {names}"] if changes else []),
            f"even so {everything.peak_phase} needs {gib(left)}: take a smaller model, a device "
            f"with more memory, or rows shorter than {row} tokens"]


def _training(
    phase: str, name: str, numels: Sequence[int], shape: ModelShape, config: TrainConfig,
    device: Device, tokens: int, loss: int, also: tuple[str, ...] = (), has_dropout: bool = False,
) -> list[Moment]:
    """Backward through a model, then its optimiser step.

    Args:
        name: What the residents' names begin with.
        tokens: Of a microbatch.
        loss: Bytes of what the head makes.
        also: What else the step needs on the device.
    """
    dtype = device.dtype
    needs = (name, f"{name}_optimizer", *also)
    gradients = {f"{name}_gradients": sizes.weight_bytes(numels, dtype)}
    activations = sizes.activation_bytes(
        shape.decoder, dtype, tokens, device_type=device.type,
        is_checkpointed=config.activation_checkpointing, has_dropout=has_dropout)
    scratch = sizes.scratch_bytes(numels, dtype, config.optimizer_moments, device_type=device.type)
    return [Moment(phase, needs, gradients | {"activations": activations, "logits": loss}),
            Moment(phase, needs, gradients | {"scratch": scratch})]


def _sft(config: SFTConfig, model: ModelShape, device: Device, longest: int | None) -> Demand:
    """Weights, optimiser and one microbatch at a time."""
    numels, dtype = model.language_model, device.dtype
    longest = min(longest or config.max_seq_tokens, model.decoder.max_positions)

    def moments(tokens: int, pages: int) -> list[Moment]:
        row = config.max_seq_tokens if config.packing else longest
        tokens = min(tokens, config.batch_size * row)
        return _training("update", "policy", numels, model, config, device, tokens,
                         sizes.loss_bytes(model.decoder, dtype, tokens),
                         has_dropout=config.residual_dropout > 0)

    return Demand(kept=_trained("policy", numels, config, dtype), moments=moments,
                  max_tokens=config.max_tokens_per_microbatch, min_tokens=longest)


def _reward(config: RewardConfig, model: ModelShape, device: Device, longest: int | None) -> Demand:
    """The same with a scalar head; all completions of a prompt are one row."""
    numels, dtype = model.scalar_model, device.dtype
    longest = longest or 2 * min(config.max_seq_tokens, model.decoder.max_positions)

    def moments(tokens: int, pages: int) -> list[Moment]:
        tokens = min(tokens, config.batch_size * longest)
        return _training("update", "reward_model", numels, model, config, device, tokens,
                         sizes.scalar_bytes(model.decoder, dtype, tokens))

    return Demand(kept=_trained("reward_model", numels, config, dtype), moments=moments,
                  max_tokens=config.max_tokens_per_microbatch, min_tokens=longest)


def _trained(
    name: str, numels: Sequence[int], config: TrainConfig, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of a model that learns: weights and optimiser."""
    return {name: sizes.weight_bytes(numels, dtype),
            f"{name}_optimizer": sizes.optimizer_bytes(numels, dtype, config.optimizer_moments)}


@dataclass(frozen=True, slots=True)
class _Models:
    policy: ModelShape
    critic: ModelShape
    reward_model: ModelShape | None
    reference: ModelShape | None


def _ppo(config: PPOConfig, models: _Models, device: Device, longest: int | None) -> Demand:
    """Four models in turns, and pages of keys and values."""
    policy, dtype = models.policy, device.dtype
    asked = config.max_prompt_tokens + config.sampling.max_new_tokens
    longest = min(longest or asked, policy.decoder.max_positions)
    kept = (_trained("policy", policy.language_model, config, dtype)
            | _trained("critic", models.critic.scalar_model, config, dtype))
    width = (models.reward_model or policy if config.critic_trunk == "reward" else policy
             ).decoder.hidden_size
    kept |= head_sizes(config, width, dtype)
    if config.ema_decay is not None:
        kept["ema"] = sizes.ema_bytes(policy.language_model, dtype)
    if models.reference is not None:
        kept["reference"] = sizes.weight_bytes(models.reference.language_model, dtype)
    if models.reward_model is not None:
        kept["reward_model"] = sizes.weight_bytes(models.reward_model.scalar_model, dtype)
    page_size = _page_size(config, device, longest)
    per_sequence = -(-longest // page_size)
    num_sequences = min(config.engine.max_batch_size, config.rollout_batch_size) + 1
    max_pages = config.engine.num_pages or num_sequences * per_sequence
    page_bytes = sizes.kv_bytes(policy.decoder, dtype, page_size)

    def moments(tokens: int, pages: int) -> list[Moment]:
        cache = {"kv_cache": pages * page_bytes}
        return on_trunk(config, width, dtype, [
            *_rollout("rollout", ("policy",), config, policy, device, longest, cache),
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


def _page_size(config: PPOConfig, device: Device, longest: int) -> int:
    """Tokens per page, as the engine chooses it."""
    if config.engine.page_size is not None:
        return config.engine.page_size
    is_whole = device.type == "cpu" and config.engine.num_pages is None
    return slots_read(longest) if is_whole else PAGE_SIZE


def _rollout(
    phase: str, needs: tuple[str, ...], config: PPOConfig, policy: ModelShape, device: Device,
    longest: int, cache: dict[str, int],
) -> list[Moment]:
    """Prefill in one pass, then decode a row per sequence."""
    num_rows = min(config.engine.max_batch_size, config.rollout_batch_size)
    prefill = config.engine.max_prefill_tokens or PREFILL_TOKENS.get(device.type, 8192)
    prefill = max(longest, min(prefill, config.rollout_batch_size * longest))
    forward = sizes.forward_bytes(policy.decoder, device.dtype, prefill)
    logits = sizes.sampling_bytes(policy.decoder, device.dtype, num_rows, device_type=device.type)
    copies = sizes.copy_bytes(policy.decoder, device.dtype, device_type=device.type)
    return [Moment(phase, needs, cache | {"scratch": copies, "activations": forward}),
            Moment(phase, needs, cache | {"scratch": copies, "logits": logits})]


def _scoring(
    phase: str, config: PPOConfig, models: _Models, device: Device, tokens: int, longest: int,
    swapped: Mapping[str, int] = MappingProxyType({}), needs: tuple[str, ...] = (),
) -> list[Moment]:
    """One model after the other; a language model makes logits, the others a number per token."""
    moments = []
    for name, shape in (("policy", models.policy), ("reference", models.reference),
                        ("critic", models.critic), ("reward_model", models.reward_model)):
        if shape is None:
            continue
        forward = sizes.forward_bytes(shape.decoder, device.dtype, tokens)
        scores = (sizes.scoring_bytes if name in ("policy", "reference") else sizes.scalar_bytes)(
            shape.decoder, device.dtype, _num_scored(config, tokens, longest))
        moments += [Moment(phase, (*needs, name), {**swapped, "activations": forward}),
                    Moment(phase, (*needs, name), {**swapped, "logits": scores})]
    return moments


def _num_scored(config: PPOConfig, tokens: int, longest: int) -> int:
    """Response tokens of a microbatch, at most."""
    return min(tokens, -(-tokens // longest) * config.sampling.max_new_tokens)


def _updates(
    config: PPOConfig, models: _Models, device: Device, tokens: int, longest: int,
) -> list[Moment]:
    """The policy's steps, then the critic's."""
    policy, critic, dtype = models.policy, models.critic, device.dtype
    num_scored = tokens if config.ptx_coef > 0 else _num_scored(config, tokens, longest)
    return [
        *_training("policy_update", "policy", policy.language_model, policy, config, device, tokens,
                   sizes.loss_bytes(policy.decoder, dtype, num_scored),
                   () if config.ema_decay is None else ("ema",)),
        *_training("critic_update", "critic", critic.scalar_model, critic, config, device, tokens,
                   sizes.scalar_bytes(critic.decoder, dtype, tokens))]


def _evaluation(
    config: PPOConfig, models: _Models, device: Device, tokens: int, longest: int,
    cache: dict[str, int],
) -> list[Moment]:
    """Rollout and scores, with the average in place of the weights where that is judged."""
    if config.eval_steps is None:
        return []
    tokens = min(tokens, config.num_eval_prompts * longest)
    needs: tuple[str, ...] = ("policy",)
    swapped: dict[str, int] = {}
    if config.ema_decay is not None and config.eval_with_ema:
        needs = ("policy", "ema")
        swapped = {"swapped": sizes.weight_bytes(models.policy.language_model, device.dtype)}
    return [
        *_rollout("evaluation", needs, config, models.policy, device, longest, cache | swapped),
        *(moment for moment in _scoring("evaluation", config, models, device, tokens, longest,
                                        swapped, needs) if "critic" not in moment.needs)]
