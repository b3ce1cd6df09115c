"""What lies under the critic: a trunk of its own, the reward model's, or the policy's.

Above a shared trunk the critic is a head: the trunk is in memory once, one forward pass serves both
heads on it, and where it stands still (the reward model's always, the policy's in the critic's
warmup) its hidden states are computed once per iteration and the head is trained on them.
"""

import copy
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from fastrl.config import PPOConfig
from fastrl.errors import ConfigError
from fastrl.memory.residents import ListTensors, tensors_of
from fastrl.models.causal_lm import CausalLM, ScalarModel, scalar_from_causal
from fastrl.models.lora import adapt, sharing_copy, trained_parameters, without_adapters
from fastrl.models.scoring import read_trunk, response_values
from fastrl.out_of_memory import PassBudget
from fastrl.rewards import RewardModelScorer, Scorer
from fastrl.types import Rollout

SCORING_PARTS = {"own": ("critic",), "reward": ("critic", "reward_model"),
                 "policy": ("policy", "critic")}
"""`critic_trunk` -> residents that the pass over the critic's trunk needs."""


def reference_part(config: PPOConfig) -> str:
    """The resident whose weights the reference has."""
    return "policy" if config.reference == "adapters_off" else "reference"


def initial_critic(
    config: PPOConfig, policy: CausalLM, reward_model: ScalarModel | None
) -> ScalarModel:
    """The critic that `critic_init` and `critic_trunk` ask for.

    Args:
        policy: Under a zero head for `critic_init` policy; copied, or shared with
            `critic_trunk` policy. With `lora_rank` its frozen weights are shared, and a critic
            with a trunk of its own has adapters of its own on them.
        reward_model: For `critic_init` reward, reward shift included; copied whole, or with
            `critic_trunk` reward its head copied on its own trunk, which is frozen. With
            `lora_rank` its trunk is shared and frozen, under adapters of the critic's own.
    Raises:
        ConfigError: when there is no reward model to start from.
    """
    if config.critic_init == "policy":
        if config.critic_trunk == "policy":
            critic = scalar_from_causal(policy, config.seed, init="zero", copies_trunk=False)
            (critic if config.lora_rank == 0 else critic.head).requires_grad_(True)
            return critic
        if config.lora_rank > 0:
            policy = without_adapters(policy)
        critic = scalar_from_causal(policy, config.seed, init="zero",
                                    copies_trunk=config.lora_rank == 0)
        return _trainable(critic, config)
    if reward_model is None:
        raise ConfigError(
            "critic_init: expected a reward model to start the critic from, got none; give one, or "
            "set critic_init to policy"
        )
    if config.critic_trunk == "own":
        if config.lora_rank == 0:
            return copy.deepcopy(reward_model).requires_grad_(True)
        critic = sharing_copy(reward_model)
        critic.head = copy.deepcopy(reward_model.head)
        return _trainable(critic, config)
    head = copy.deepcopy(reward_model.head).requires_grad_(True)
    return ScalarModel(reward_model.backbone.requires_grad_(False), head, reward_model.spec)


def _trainable(critic: ScalarModel, config: PPOConfig) -> ScalarModel:
    """A critic whose weights are all trained, or its adapters and its head."""
    critic.requires_grad_(True)
    adapt(critic, config)
    return critic


def critic_weights(config: PPOConfig, critic: ScalarModel | None) -> list[nn.Parameter]:
    """The weights that are the critic's alone: all that it trains, or those of its head."""
    if critic is None:
        return []
    return (trained_parameters(critic) if config.critic_trunk == "own"
            else list(critic.head.parameters()))


def check_trunk(
    config: PPOConfig, policy: CausalLM, critic: ScalarModel | None, scorer: Scorer
) -> None:
    """Refuse a critic that does not lie on the trunk that the config names.

    Raises:
        ConfigError: says which model the critic has to be made from.
    """
    if critic is None:
        return
    if config.critic_trunk == "policy" and critic.backbone is not policy.backbone:
        raise ConfigError(
            "critic_trunk: expected a critic on the policy's own trunk for 'policy', got one with "
            "another trunk; make it with initial_critic, or set critic_trunk to own"
        )
    if config.critic_trunk == "reward" and (
            not isinstance(scorer, RewardModelScorer)
            or critic.backbone is not scorer.model.backbone):
        raise ConfigError(
            "critic_trunk: expected a reward model as scorer and a critic on its trunk for "
            f"'reward', got scorer {type(scorer).__name__} and a critic with another trunk; make "
            "it with initial_critic, or set critic_trunk to own"
        )


def resident_parts(
    config: PPOConfig, models: Mapping[str, CausalLM | ScalarModel]
) -> dict[str, ListTensors]:
    """What each resident's tensors are; a shared trunk belongs to the model that brought it.

    The value head is the critic's, and on the policy's trunk also the policy's, which trains it.

    Args:
        models: By name.
    """
    modules: dict[str, list[nn.Module]] = {}
    for name, model in models.items():
        part = "reward_model" if name.startswith("reward model") else name
        modules.setdefault(part, []).append(model)
    critic = models.get("critic")
    if critic is not None and config.critic_trunk != "own":
        assert isinstance(critic, ScalarModel)
        modules["critic"] = [critic.head]
        if config.critic_trunk == "policy":
            modules["policy"] += [critic.head]

    def tensors_in(name: str) -> list[Tensor]:
        return [tensor for module in modules[name] for tensor in tensors_of(module)]

    return {name: partial(tensors_in, name) for name in modules}


def read_critic(
    config: PPOConfig, critic: ScalarModel, scorer: Scorer, rollout: Rollout, passes: PassBudget,
    *, trunk_stands_still: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
    """What the critic says of a rollout, and where it shares the reward model's trunk its scores.

    Args:
        passes: Of the critic's trunk.
        trunk_stands_still: The critic's update of this iteration leaves its trunk alone.
    Returns:
        values [B, T], scores [B] or None where the scorer has yet to be asked, float32; and the
        states that the critic's head can be trained on: B tensors [T_i, D], None where the trunk
        is trained too. No gradient.
    """
    if config.critic_trunk == "own":
        values = response_values(critic, rollout, passes, share_prefix=config.share_prefix)
        return values, None, None
    score_head = None
    if config.critic_trunk == "reward":
        assert isinstance(scorer, RewardModelScorer)  # see check_trunk
        score_head = scorer.model.head
    reading = read_trunk(critic.backbone, rollout, passes, value_head=critic.head,
                         score_head=score_head, keeps_states=trunk_stands_still,
                         share_prefix=config.share_prefix)
    return reading.values, reading.scores, reading.states
