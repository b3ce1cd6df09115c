"""linear_policy_loss, forward and backward, beside log_softmax, gather and autograd.

The size at which the extra memory has to be at most a fifth of the plain way's, and the time no
longer.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import linear_policy_loss, policy_loss

M, D, V = 4096, 288, 32000


@pytest.mark.parametrize("provider", ["torch", "plain"])
def test_linear_policy_loss(benchmark: BenchmarkFixture, provider: str) -> None:
    hidden = torch.randn(M, D, requires_grad=True)
    weight = (0.05 * torch.randn(V, D)).requires_grad_()
    token_ids, advantages = torch.randint(V, (M,)), torch.randn(M)
    old_logprobs, mask = torch.full((M,), -10.4), torch.ones(M, dtype=torch.bool)

    def fused() -> torch.Tensor:
        return linear_policy_loss(hidden, weight, token_ids, old_logprobs, advantages, mask,
                                  denominator=M, backend=provider)[0]

    def plain() -> torch.Tensor:
        all_logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
        logprobs = all_logprobs.gather(1, token_ids[:, None]).squeeze(1)
        return policy_loss(logprobs, old_logprobs, advantages, mask)[0]

    def step() -> None:
        torch.autograd.grad(plain() if provider == "plain" else fused(), (hidden, weight))

    measure(benchmark, "linear_policy_loss", step, flops=6 * M * D * V)
