"""packed_attention forward and backward: equal and mixed lengths."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import packed_attention

B, LENGTH, HEADS, KV_HEADS, CHANNELS = 64, 64, 8, 4, 8


@pytest.mark.parametrize("mixed", [False, True], ids=["equal", "mixed"])
@pytest.mark.parametrize("provider", ["torch"])
def test_forward_and_backward(benchmark: BenchmarkFixture, provider: str, mixed: bool) -> None:
    lengths = torch.randint(8, LENGTH + 1, (B,)) if mixed else torch.full((B,), LENGTH)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    query, key, value = (torch.randn(int(lengths.sum()), heads, CHANNELS, requires_grad=True)
                         for heads in (HEADS, KV_HEADS, KV_HEADS))

    def step() -> None:
        out = packed_attention(query, key, value, cu_seqlens, max_seqlen=LENGTH,
                               scale=CHANNELS**-0.5, backend=provider)
        torch.autograd.grad(out.sum(), [query, key, value])

    pairs = int((lengths * (lengths + 1) // 2).sum())
    measure(benchmark, "packed_attention", step, flops=14 * pairs * HEADS * CHANNELS)
