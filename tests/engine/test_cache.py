"""Pages handed out and taken back."""

import pytest
import torch

from fastrl.engine.cache import KVCache, new_cache, pages_for
from fastrl.errors import ConfigError
from fastrl.models import ModelSpec

SPEC = ModelSpec(architecture="llama", num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
                 hidden_size=32, vocab_size=11, max_positions=64, eos_token_ids=())


def _cache(num_pages: int = 6) -> KVCache:
    return KVCache(SPEC, num_pages, 4, torch.float32, torch.device("cpu"))


def test_pages_for() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_layout_and_first_pages() -> None:
    cache = _cache()
    assert cache.kv_pages.shape == (6, 3, 2, 4, 2, 8)
    assert cache.kv_pages[0].is_contiguous()  # a copy of a page is one move for all layers
    assert cache.allocate(2) == [0, 1] and cache.num_free == 4


def test_a_page_is_free_when_its_last_holder_releases_it() -> None:
    cache = _cache()
    pages = cache.allocate(3)
    cache.retain(pages[:2])
    cache.check([pages, pages[:2]])
    cache.release(pages)
    assert cache.num_free == 4
    cache.check([pages[:2]])
    cache.release(pages[:2])
    assert cache.num_free == 6
    cache.check([])


def test_a_cache_that_does_not_fit_names_its_size() -> None:
    with pytest.raises(ConfigError, match=r"num_pages: .* of cpu, got 1000000000000000 pages"):
        new_cache(SPEC, 10**15, 10**15, 4, torch.float32, torch.device("cpu"))


def test_misuse_is_caught() -> None:
    cache = _cache()
    pages = cache.allocate(1)
    with pytest.raises(AssertionError, match="differ"):
        cache.check([])
    cache.release(pages)
    for misuse in (cache.release, cache.retain):
        with pytest.raises(AssertionError, match="is free"):
            misuse(pages)


def test_copy_moves_whole_pages() -> None:
    cache = _cache()
    cache.kv_pages.copy_(torch.randn_like(cache.kv_pages))
    before = cache.kv_pages.clone()
    cache.copy([1, 4], [5, 0])
    assert torch.equal(cache.kv_pages[5], before[1]) and torch.equal(cache.kv_pages[0], before[4])
    assert torch.equal(cache.kv_pages[1:5], before[1:5])
    cache.copy([], [])
