"""The memory plan of a PPO trainer, from the models at hand."""

from collections.abc import Mapping, Sequence

from fastrl.config import PPOConfig
from fastrl.memory.measure import device_of, fitted
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.shapes import joined, shape_of_model
from fastrl.memory.stages import plan_ppo
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.types import Prompt


def plan_trainer(
    config: PPOConfig, models: Mapping[str, CausalLM | ScalarModel], prompts: Sequence[Prompt]
) -> tuple[MemoryPlan, PPOConfig]:
    """The plan, and the settings with the sizes that it found.

    Args:
        models: "policy", "reference", "critic" and those that score, "reward model" and so on.
        prompts: All that will be answered.
    """
    device = device_of(models["policy"], config)
    shapes = {name: shape_of_model(name, model) for name, model in models.items()}
    scoring = [shape for name, shape in shapes.items() if name.startswith("reward model")]
    longest = max(len(p.token_ids) for p in prompts) + config.sampling.max_new_tokens
    plan = plan_ppo(
        config, shapes["policy"], device, critic=shapes.get("critic"),
        reward_model=joined(scoring) if scoring else None, reference=shapes.get("reference"),
        has_reward_model=bool(scoring), longest=longest)
    return plan, fitted(config, plan, device.type)
