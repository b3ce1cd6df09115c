"""paged_attention of a decode step: equal and mixed lengths, with and without grouped queries."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import paged_attention

B, LAYERS, PAGE_SIZE, CHANNELS, MAX_LEN = 64, 2, 16, 48, 256


@pytest.mark.parametrize("heads", [(6, 6), (8, 2)], ids=["6 of 6 heads", "8 of 2 heads"])
@pytest.mark.parametrize("mixed", [False, True], ids=["equal", "mixed"])
@pytest.mark.parametrize("provider", ["torch"])
def test_decode(
    benchmark: BenchmarkFixture, provider: str, mixed: bool, heads: tuple[int, int]
) -> None:
    num_heads, num_kv_heads = heads
    lens = torch.randint(1, MAX_LEN + 1, (B,)) if mixed else torch.full((B,), MAX_LEN)
    table = torch.randperm(B * MAX_LEN // PAGE_SIZE).view(B, -1)
    pages = torch.randn(table.numel(), LAYERS, 2, PAGE_SIZE, num_kv_heads, CHANNELS)
    query = torch.randn(B, num_heads, CHANNELS)
    measure(
        benchmark, "paged_attention",
        lambda: paged_attention(
            query, pages, 1, table, lens, torch.arange(B + 1), max_seqlen_q=1,
            max_kv_len=MAX_LEN, scale=CHANNELS**-0.5, backend=provider),
        bytes_moved=int(lens.sum()) * 2 * num_kv_heads * CHANNELS * 4,
        flops=int(lens.sum()) * 4 * num_heads * CHANNELS)
