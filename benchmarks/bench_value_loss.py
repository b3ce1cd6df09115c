"""value_loss, forward and backward, of a minibatch."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import value_loss

M = 64 * 1024


@pytest.mark.parametrize("provider", ["torch"])
def test_value_loss(benchmark: BenchmarkFixture, provider: str) -> None:
    values, old_values, returns = torch.randn(3, M)
    values.requires_grad_()
    mask = torch.rand(M) > 0.2

    def step() -> None:
        loss, _ = value_loss(values, old_values, returns, mask, backend=provider)
        torch.autograd.grad(loss, values)

    measure(benchmark, "value_loss", step, bytes_moved=(13 + 4) * M)
