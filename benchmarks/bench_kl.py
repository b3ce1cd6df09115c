"""kl_estimate of a rollout."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import kl_estimate

B, T = 512, 256


@pytest.mark.parametrize("provider", ["torch"])
def test_kl_estimate(benchmark: BenchmarkFixture, provider: str) -> None:
    logprobs, ref_logprobs = torch.randn(2, B, T)
    mask = torch.rand(B, T) > 0.2
    measure(benchmark, "kl",
            lambda: kl_estimate(logprobs, ref_logprobs, mask, backend=provider),
            bytes_moved=(9 + 12) * B * T)
