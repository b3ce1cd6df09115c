"""One step of a stage in a process of its own; prints planned and measured bytes as JSON.

Run by test_measured.py: `python measured_stage.py sft|long|reward|dpo|ppo|lora [name=value ...]`.
"""

import json
import logging
import sys
from typing import Any

import torch

from fastrl.config import (
    DPOConfig,
    EngineConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from fastrl.models import CausalLM, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, Prompt, TokenExample


def model(hidden_size: int, num_layers: int, max_positions: int = 256) -> CausalLM:
    """A random decoder; a small vocabulary would leave the head's share untested."""
    torch.set_num_threads(1)
    return new_decoder(decoder_config(
        "llama", vocab_size=8192, hidden_size=hidden_size, num_layers=num_layers, num_heads=8,
        num_kv_heads=4, max_positions=max_positions, eos_token_ids=(1,)), 0)


def tokens(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 8192, (length,), generator=generator).tolist())


def trainer(stage: str, settings: dict[str, Any]) -> Any:
    """The stage on rows of 64 tokens, with microbatches of two rows."""
    common = {"max_tokens_per_microbatch": 128, "device": "cpu"} | settings
    if stage == "sft":
        rows = [TokenExample(tokens(64, i), (False, *[True] * 63)) for i in range(4)]
        return SFTTrainer(SFTConfig(batch_size=4, select_by="last", **common),
                          model(768, 9), rows)
    if stage == "long":  # what passes through, not what stays
        rows = [TokenExample(tokens(2048, i), (False, *[True] * 2047)) for i in range(2)]
        return SFTTrainer(SFTConfig(batch_size=2, select_by="last", **common | {
            "max_tokens_per_microbatch": 4096}), model(256, 10, 2048), rows)
    if stage == "reward":
        rankings = [Comparison(tokens(24, i), (tokens(40, i + 9), tokens(40, i + 99)), (0, 1))
                    for i in range(2)]
        return RewardTrainer(RewardConfig(batch_size=2, **common),
                             scalar_from_causal(model(768, 9), 0), rankings)
    if stage == "dpo":
        rankings = [Comparison(tokens(24, i), (tokens(20, i + 9), tokens(20, i + 99)), (0, 1))
                    for i in range(2)]
        return DPOTrainer(DPOConfig(batch_size=2, **common), model(768, 9), rankings,
                          reference=model(768, 9))
    lora: dict[str, Any] = {}
    policy, reference = model(512, 8), model(512, 8)
    if stage == "lora":  # a reward model, a policy, and critic and reference on their weights
        lora = {"lora_rank": 16, "reference": "adapters_off", "missing_eos_penalty": None}
        policy, reference = model(1024, 10), None
    config = PPOConfig(rollout_batch_size=4, minibatch_size=4, eval_steps=None,
                       sampling=SamplingConfig(max_new_tokens=16),
                       engine=EngineConfig(max_batch_size=4), **common | lora)
    reward_model = scalar_from_causal(policy, 0)
    prompts = [Prompt(tokens(48, i), "") for i in range(4)]
    return PPOTrainer(config, policy, reference, initial_critic(config, policy, reward_model),
                      RewardModelScorer(reward_model, 128), prompts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    pairs = dict(word.split("=") for word in sys.argv[2:])
    made = trainer(sys.argv[1], {name: json.loads(value) for name, value in pairs.items()})
    metrics = made.step()
    print(json.dumps({name: value for name, value in metrics.items() if "memory/" in name}
                     | {"peak_phase": made.memory.plan.peak_phase,
                        "phases": made.memory.plan.phases}))
