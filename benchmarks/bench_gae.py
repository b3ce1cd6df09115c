"""compute_gae of a rollout."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import compute_gae

B, T = 512, 1024


@pytest.mark.parametrize("provider", ["torch"])
def test_compute_gae(benchmark: BenchmarkFixture, provider: str) -> None:
    rewards, values = torch.randn(2, B, T)
    mask = torch.arange(T) < torch.randint(1, T, (B, 1))
    measure(benchmark, "gae", lambda: compute_gae(rewards, values, mask, backend=provider),
            bytes_moved=(9 + 8) * B * T)
