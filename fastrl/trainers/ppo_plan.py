"""The memory plan of a PPO trainer, from the models at hand."""

from collections.abc import Mapping, Sequence

from fastrl.config import PPOConfig
from fastrl.memory.measure import device_of, fitted
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.shapes import shape_of_model
from fastrl.memory.stages import plan_ppo
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.types import Prompt


def plan_trainer(
    config: PPOConfig, models: Mapping[str, CausalLM | ScalarModel], prompts: Sequence[Prompt]
) -> tuple[MemoryPlan, PPOConfig]:
    """The plan, and the settings with the sizes that it found.

    Args:
        models: "policy", "reference", "critic" and, where a model scores, "reward model".
        prompts: All that will be answered.
    """
    device = device_of(models["policy"], config)
    shapes = {name: shape_of_model(name, model) for name, model in models.items()}
    longest = max(len(p.token_ids) for p in prompts) + config.sampling.max_new_tokens
    plan = plan_ppo(
        config, shapes["policy"], device, critic=shapes["critic"],
        reward_model=shapes.get("reward model"), reference=shapes.get("reference"),
        has_reward_model="reward model" in shapes, longest=longest)
    return plan, fitted(config, plan, device.type)
