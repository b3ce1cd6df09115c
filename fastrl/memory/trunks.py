"""PPO's plan where the critic is a head on a trunk that another model brings."""

import dataclasses
from collections.abc import Sequence

import torch

from fastrl.config import PPOConfig
from fastrl.memory import sizes
from fastrl.memory.plan import Moment


def head_sizes(config: PPOConfig, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a critic that is a head of `width` numbers, in place of a model's; else nothing."""
    if config.critic_trunk == "own":
        return {}
    return {"critic": sizes.weight_bytes([width], dtype),
            "critic_optimizer": sizes.optimizer_bytes([width], dtype, config.optimizer_moments)}


def on_trunk(
    config: PPOConfig, width: int, dtype: torch.dtype, moments: Sequence[Moment]
) -> list[Moment]:
    """The moments of an iteration with a critic of its own, as they are on a shared trunk.

    The pass over the critic is the one over the trunk's owner. States of all response tokens are
    kept from scoring to the critic's update, unless that is part of the policy's.
    """
    if config.critic_trunk == "own":
        return list(moments)
    is_joint = config.critic_trunk == "policy"
    owner = "policy" if is_joint else "reward_model"
    has_update = not is_joint or config.num_critic_warmup_iterations > 0
    num_tokens = config.rollout_batch_size * config.sampling.max_new_tokens
    states = num_tokens * width * dtype.itemsize if has_update else 0
    result, has_head_update = list[Moment](), False
    for moment in moments:
        if moment.phase == "scoring" and moment.needs == ("critic",):
            continue
        if moment.phase == "scoring" and owner in moment.needs:
            moment = _with(moment, states, "critic")
        elif moment.phase == "policy_update":
            moment = _with(moment, 0, "critic") if is_joint else _with(moment, states)
        elif moment.phase == "critic_update":
            if has_head_update or not has_update:
                continue
            has_head_update = True
            passing = {name: num_bytes for name, num_bytes in moment.passing.items()
                       if name == "kv_cache"}
            moment = Moment("critic_update", ("critic", "critic_optimizer"), passing | {
                "critic_gradients": sizes.weight_bytes([width], dtype), "activations": states})
        result.append(moment)
    return result


def _with(moment: Moment, states: int, *needs: str) -> Moment:
    """A moment with more bytes of activations, and more residents needed."""
    activations = moment.passing.get("activations", 0) + states
    return dataclasses.replace(moment, needs=(*moment.needs, *needs),
                               passing={**moment.passing, "activations": activations})
