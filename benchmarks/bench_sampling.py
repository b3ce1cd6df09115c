"""sample_tokens of a decode step: plain, and with every truncation."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import sample_tokens

B = 64


@pytest.mark.parametrize("vocab_size", [512, 32000, 151936])
@pytest.mark.parametrize("truncated", [False, True], ids=["plain", "truncated"])
@pytest.mark.parametrize("provider", ["torch"])
def test_sample_tokens(
    benchmark: BenchmarkFixture, provider: str, truncated: bool, vocab_size: int
) -> None:
    logits = torch.randn(B, vocab_size)
    rows = torch.arange(B)
    top_k, top_p, min_p = (50, 0.9, 0.01) if truncated else (0, 1.0, 0.0)
    off = torch.zeros(B, dtype=torch.bool)
    measure(
        benchmark, "sampling",
        lambda: sample_tokens(
            logits, rows, rows, temperature=torch.ones(B), top_k=torch.full((B,), top_k),
            top_p=torch.full((B,), top_p), min_p=torch.full((B,), min_p), greedy=off,
            raw_logprobs=off, backend=provider),
        bytes_moved=4 * B * vocab_size)
