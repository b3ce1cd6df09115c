"""whiten and masked_mean of a rollout's advantages."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import masked_mean, whiten

B, T = 512, 256


@pytest.mark.parametrize("op", [whiten, masked_mean])
@pytest.mark.parametrize("provider", ["torch"])
def test_masked(benchmark: BenchmarkFixture, op: object, provider: str) -> None:
    values, mask = torch.randn(B, T), torch.rand(B, T) > 0.2
    writes = 4 if op is whiten else 0
    measure(benchmark, "masked", lambda: op(values, mask, backend=provider),
            bytes_moved=(5 + writes) * B * T)
