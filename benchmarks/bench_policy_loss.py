"""policy_loss, forward and backward, of a minibatch."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import policy_loss

M = 64 * 1024


@pytest.mark.parametrize("provider", ["torch"])
def test_policy_loss(benchmark: BenchmarkFixture, provider: str) -> None:
    logprobs, old_logprobs, advantages = torch.randn(3, M)
    logprobs.requires_grad_()
    mask = torch.rand(M) > 0.2

    def step() -> None:
        loss, _ = policy_loss(logprobs, old_logprobs, advantages, mask, backend=provider)
        torch.autograd.grad(loss, logprobs)

    measure(benchmark, "policy_loss", step, bytes_moved=(13 + 4) * M)
