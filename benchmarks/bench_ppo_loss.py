"""ppo_loss, forward and backward, of a minibatch; advantages whitened on the way."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import ppo_loss

M = 64 * 1024


@pytest.mark.parametrize("provider", ["torch"])
def test_ppo_loss(benchmark: BenchmarkFixture, provider: str) -> None:
    logprobs, old_logprobs, advantages, values, old_values, returns = torch.randn(6, M)
    logprobs, values = logprobs.requires_grad_(), values.requires_grad_()
    mask, moments = torch.rand(M) > 0.2, torch.tensor([[M, 0.0, M]])

    def step() -> None:
        loss, *_ = ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask,
                            moments=moments, backend=provider)
        torch.autograd.grad(loss, (logprobs, values))

    measure(benchmark, "ppo_loss", step, bytes_moved=(25 + 8) * M)
