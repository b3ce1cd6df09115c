"""ranking_loss, forward and backward, of the paper's batch: 64 prompts of 9 completions."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import ranking_loss

B, K = 64, 9


@pytest.mark.parametrize("provider", ["torch"])
def test_ranking_loss(benchmark: BenchmarkFixture, provider: str) -> None:
    scores = torch.randn(B * K, requires_grad=True)
    ranks = torch.arange(K).repeat(B)
    cu_groups = torch.arange(0, B * K + 1, K)

    def step() -> None:
        loss, _ = ranking_loss(scores, ranks, cu_groups, backend=provider)
        torch.autograd.grad(loss, scores)

    measure(benchmark, "ranking_loss", step, bytes_moved=(4 + 8 + 4) * B * K)
