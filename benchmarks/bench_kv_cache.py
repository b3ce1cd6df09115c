"""write_kv of a decode step and of a prefill."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl.ops import write_kv

LAYERS, PAGE_SIZE, KV_HEADS, CHANNELS = 6, 16, 6, 48


@pytest.mark.parametrize("num_tokens", [64, 4096])
@pytest.mark.parametrize("provider", ["torch"])
def test_write_kv(benchmark: BenchmarkFixture, provider: str, num_tokens: int) -> None:
    key, value = torch.randn(2, num_tokens, KV_HEADS, CHANNELS)
    pages = torch.zeros(512, LAYERS, 2, PAGE_SIZE, KV_HEADS, CHANNELS)
    slots = torch.randperm(512 * PAGE_SIZE)[:num_tokens]
    measure(benchmark, "kv_cache",
            lambda: write_kv(key, value, pages, 3, slots, backend=provider),
            bytes_moved=2 * 2 * key.numel() * key.element_size())
