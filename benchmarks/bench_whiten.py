"""whiten of a rollout's advantages, with and without the moments that compute_gae gives."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import whiten
from fastrl.ops.whiten import row_moments

B, T = 512, 256


@pytest.mark.parametrize("has_moments", [False, True])
@pytest.mark.parametrize("provider", ["torch"])
def test_whiten(benchmark: BenchmarkFixture, has_moments: bool, provider: str) -> None:
    values, mask = torch.randn(B, T), torch.rand(B, T) > 0.2
    moments = row_moments(values, mask) if has_moments else None
    reads = 5 if has_moments else 10
    measure(benchmark, "whiten", lambda: whiten(values, mask, moments=moments, backend=provider),
            bytes_moved=(reads + 4) * B * T)
