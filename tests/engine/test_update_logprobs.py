"""The engine's log-probs are those of the update's forward, for every native family."""

from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.trainers.old_logprobs import update_logprobs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [8] * 16, [50, 2, 11, 44, 12]]
SAMPLING = SamplingConfig(max_new_tokens=20, stop_token_ids=(0, 1))
SIZES: dict[str, Any] = {"vocab_size": 53, "hidden_size": 40, "num_layers": 3, "num_heads": 4,
                         "intermediate_size": 52, "max_positions": 64}


@pytest.mark.parametrize(("family", "share_prefix"),
                         [*((family, True) for family in FAMILIES), ("llama", False)])
def test_rollout_and_update_agree_with_preemption_under_any_microbatch(
    family: str, share_prefix: bool, preemptions: list[int]
) -> None:
    model = new_decoder(decoder_config(family, **SIZES), 0)
    with torch.no_grad():  # so that tokens are not all about equally likely
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    engine = Engine(model, EngineConfig(page_size=4, num_pages=20, share_prefix=share_prefix))
    rollout = engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=3)
    assert preemptions and float(rollout.rollout_logprobs.min()) < -6
    for max_tokens in (1, 50, 8192):
        again = update_logprobs(model, rollout, PPOConfig(
            sampling=SAMPLING, max_tokens_per_microbatch=max_tokens))
        assert float((again - rollout.rollout_logprobs).abs().max()) <= 1e-5, max_tokens
