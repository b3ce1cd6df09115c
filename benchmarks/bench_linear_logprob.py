"""linear_logprobs, forward and backward, beside the same with all logits in memory."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import linear_logprobs
from fastrl.ops.linear_logprob import linear_logprobs_reference

M, D, V = 1024, 288, 32000


@pytest.mark.parametrize("provider", ["torch", "stored_logits"])
def test_linear_logprobs(benchmark: BenchmarkFixture, provider: str) -> None:
    op = linear_logprobs if provider == "torch" else linear_logprobs_reference
    hidden = torch.randn(M, D, requires_grad=True)
    weight = (0.05 * torch.randn(V, D)).requires_grad_()
    token_ids = torch.randint(V, (M,))

    def step() -> None:
        logprobs, _ = op(hidden, weight, token_ids)
        torch.autograd.grad(-logprobs.mean(), (hidden, weight))

    measure(benchmark, "linear_logprob", step, flops=6 * M * D * V)
