"""Exact mode where it matters most: half precision on a GPU."""

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.exactness import exact_math, set_workspaces
from fastrl.exactness.sweep import sweep
from fastrl.models import CausalLM, new_decoder
from fastrl.models.families import decoder_config
from fastrl.trainers.old_logprobs import update_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs a CUDA device")]


def model() -> CausalLM:
    set_workspaces("cuda")
    return new_decoder(decoder_config(
        "qwen3", vocab_size=1031, hidden_size=256, num_layers=3, num_heads=8, num_kv_heads=4,
        intermediate_size=512, max_positions=1024), 0, dtype=torch.bfloat16, device="cuda")


def test_the_settings_hold_and_are_put_back() -> None:
    before = torch.backends.cuda.preferred_blas_library()
    with exact_math("cuda"):
        assert "lt" in str(torch.backends.cuda.preferred_blas_library()).lower()
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cuda.preferred_blas_library() == before


def test_every_line_of_the_sweep_is_exact() -> None:
    assert [line for line in sweep(model()) if not line.is_exact] == []


@pytest.mark.parametrize("num_samples", [1, 4])
def test_log_probs_of_rollout_and_update_have_the_same_bits(num_samples: int) -> None:
    prompts = [[3 + i, 9, 4, 1, 5 * i] for i in range(24)] + [list(range(2, 602))]
    decoder, sampling = model(), SamplingConfig(max_new_tokens=96, stop_token_ids=())
    rollout = Engine(decoder, EngineConfig(max_batch_size=40)).generate(
        prompts, sampling, num_samples_per_prompt=num_samples)
    with exact_math("cuda"):
        again = update_logprobs(decoder, rollout, PPOConfig(
            sampling=sampling, max_tokens_per_microbatch=4096))
    assert torch.equal(again, rollout.rollout_logprobs)
