"""masked_mean of a rollout's advantages."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import masked_mean

B, T = 512, 256


@pytest.mark.parametrize("provider", ["torch"])
def test_masked_mean(benchmark: BenchmarkFixture, provider: str) -> None:
    values, mask = torch.randn(B, T), torch.rand(B, T) > 0.2
    measure(benchmark, "masked", lambda: masked_mean(values, mask, backend=provider),
            bytes_moved=5 * B * T)
