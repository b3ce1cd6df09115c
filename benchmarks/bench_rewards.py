"""shape_rewards of a rollout."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import shape_rewards

B, T = 512, 256


@pytest.mark.parametrize("provider", ["torch"])
def test_shape_rewards(benchmark: BenchmarkFixture, provider: str) -> None:
    logprobs, ref_logprobs = torch.randn(2, B, T)
    scores, mask = torch.randn(B), torch.arange(T) < torch.randint(1, T, (B, 1))
    measure(benchmark, "rewards",
            lambda: shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.02,
                                  backend=provider),
            bytes_moved=(9 + 8) * B * T)
