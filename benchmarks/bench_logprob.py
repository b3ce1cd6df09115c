"""gather_logprobs of stored logits."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import gather_logprobs

M, V = 1024, 32000


@pytest.mark.parametrize("provider", ["torch"])
def test_gather_logprobs(benchmark: BenchmarkFixture, provider: str) -> None:
    logits, token_ids = torch.randn(M, V), torch.randint(V, (M,))
    measure(benchmark, "logprob",
            lambda: gather_logprobs(logits, token_ids, backend=provider),
            bytes_moved=4 * M * V)
