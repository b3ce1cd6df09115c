"""Plans of PPO with fewer models: what is left of the 8B plan, by hand."""

import dataclasses
from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.residents import NEEDS, PARKABLE
from fastrl.memory.shapes import shape_named, with_adapters
from fastrl.memory.stages import plan_ppo
from fastrl.memory.training import Device

LLAMA_8B = shape_named("llama-3.1-8b")
WEIGHTS, WIDTH, GB = 16_060_522_496, 4096, 10**9
CONFIG = PPOConfig(
    activation_checkpointing=True, optimizer_moments="8bit", ema_decay=None, eval_steps=None,
    rollout_batch_size=64, minibatch_size=64, max_tokens_per_microbatch=4096,
    sampling=SamplingConfig(max_new_tokens=256), engine=EngineConfig(num_pages=1024))
STATES = 64 * 256 * WIDTH * 2
"""D numbers of 2 bytes for each response token."""


def plan(gigabytes: int = 1000, **settings: Any) -> MemoryPlan:
    return plan_ppo(dataclasses.replace(CONFIG, **settings), LLAMA_8B,
                    Device("cuda", gigabytes * GB, torch.bfloat16))


def bytes_of(planned: MemoryPlan) -> dict[str, int]:
    return {resident.name: resident.num_bytes for resident in planned.residents}


def test_without_a_reference_nothing_is_kept_for_it() -> None:
    ours, theirs = bytes_of(plan(reference="none", kl_coef=0.0)), bytes_of(plan())
    assert theirs.pop("reference") == WEIGHTS
    assert ours == theirs


@pytest.mark.parametrize("trunk", ["reward", "policy"])
def test_a_head_is_all_that_the_critic_keeps(trunk: str) -> None:
    planned, own = plan(critic_trunk=trunk, critic_init=trunk), plan()
    assert bytes_of(own)["critic"] > 15 * GB < bytes_of(own)["critic_gradients"]
    assert bytes_of(planned)["critic"] == 2 * WIDTH
    # Two codes and two float32 scales per 256 numbers, and the 16 bits that bf16 drops.
    assert bytes_of(planned)["critic_optimizer"] == 2 * WIDTH + 2 * 4 * WIDTH // 256 + 2 * WIDTH
    saved = own.total("policy_update") - planned.total("policy_update")
    kept = STATES if trunk == "reward" else 0
    assert saved == (bytes_of(own)["critic"] + bytes_of(own)["critic_optimizer"]
                     - bytes_of(planned)["critic"] - bytes_of(planned)["critic_optimizer"] - kept)


def test_the_head_on_the_reward_model_reads_states() -> None:
    update = plan(critic_trunk="reward").phases["critic_update"]
    assert update["activations"] == STATES and update["critic_gradients"] == 2 * WIDTH
    assert not update.get("logits") and not update.get("scratch")


def test_the_head_on_the_policy_is_updated_with_it() -> None:
    settings = {"critic_trunk": "policy", "critic_init": "policy"}
    assert "critic_update" not in plan(**settings).phases
    warmup = plan(**settings, num_critic_warmup_iterations=3)
    assert warmup.phases["critic_update"]["activations"] == STATES
    assert warmup.phases["policy_update"] == plan(**settings).phases["policy_update"]


@pytest.mark.parametrize("settings", [
    {}, {"critic_trunk": "reward"}, {"critic_trunk": "policy", "critic_init": "policy"},
    {"reference": "none", "kl_coef": 0.0}])
def test_a_plan_has_in_each_phase_what_the_trainer_brings_there(settings: dict[str, Any]) -> None:
    """Of what may be parked, and no more; a joint critic's head is never parked in an update."""
    config = dataclasses.replace(CONFIG, parking="on", eval_steps=5, ema_decay=0.9, **settings)
    whole = plan_ppo(config, LLAMA_8B, Device("cuda", 1000 * GB, torch.bfloat16))
    phases = {phase: {r.name for r in whole.residents if phase in r.phases} for phase in NEEDS}
    for phase, needed in NEEDS.items():
        is_joint = config.critic_trunk == "policy" and phase == "policy_update"
        present = set(needed) & {r.name for r in whole.residents}
        present |= {"critic"} if is_joint else set()
        if phase in whole.phases:
            assert phases[phase] & PARKABLE == present & PARKABLE, phase


def test_fewer_models_fit_where_four_have_to_park() -> None:
    settings = {"critic_trunk": "policy", "critic_init": "policy", "reference": "none",
                "kl_coef": 0.0}
    assert "reference" in plan(120).parks and "critic_optimizer" in plan(120).parks
    assert plan(120, **settings).parks == frozenset() and plan(120, **settings).fits
    assert "critic" not in plan(80, **settings).parks


@pytest.mark.parametrize(("init", "owner", "other"), [
    ("reward", "reward_model", "policy"), ("policy", "policy", "reward_model")])
def test_a_critic_with_adapters_needs_the_trunk_it_shares(
    init: str, owner: str, other: str
) -> None:
    """And has no trunk, no reference and no second head in the plan; see fastrl.models.lora."""
    shape = shape_named("qwen3-0.6b")
    config = PPOConfig(parking="on", critic_init=init, lora_rank=16,  # type: ignore[arg-type]
                       reference="adapters_off")
    plan = plan_ppo(config, shape, Device("cuda", 80 * 10**9, torch.bfloat16))
    adapted = with_adapters(shape, config)
    rows = {row.name: row.num_bytes for row in plan.residents}
    assert rows["policy"] == 2 * (sum(shape.language_model) + sum(adapted.adapters))
    assert rows["critic"] == 2 * (sum(adapted.adapters) + 1024)
    assert rows["policy_gradients"] == rows["ema"] // 2 == 2 * sum(adapted.adapters)
    assert rows["reward_model"] == 2 * sum(shape.scalar_model)
    assert "reference" not in rows
    update = plan.phases["critic_update"]
    assert owner in update and other not in update
    assert "critic" not in plan.phases["rollout"]
    shared = plan_ppo(dataclasses.replace(config, critic_trunk=init), shape,
                      Device("cuda", 80 * 10**9, torch.bfloat16))
    assert {row.name: row.num_bytes for row in shared.residents}["critic"] == 2 * 1024
