"""The paged KV cache: one tensor of pages, a free list and a reference count per page."""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.engine.batch import upload
from fastrl.errors import ConfigError
from fastrl.models.spec import ModelSpec
from fastrl.ops import copy_pages


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens`."""
    return -(-num_tokens // page_size)


class KVCache:
    """Pages of keys and values, handed out and taken back.

    A page belongs to everyone who holds a reference; the last one to release it frees it.

    Args:
        spec: The model's layers, KV heads and channels.
        num_pages: Pages to reserve.
        page_size: Tokens per page.
        dtype, device: Of the keys and values.
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        shape = (num_pages, spec.num_layers, 2, page_size, spec.num_kv_heads, spec.head_dim)
        try:
            self.kv_pages: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            gib = math.prod(shape) * dtype.itemsize / 2**30
            raise ConfigError(
                f"num_pages: expected a cache that fits in the memory of {device}, got {num_pages} "
                f"pages of {page_size} tokens, {gib:.1f} GiB; lower num_pages, max_batch_size or "
                "max_new_tokens") from error
        """[num_pages, L, 2, page_size, Hk, C]; begins as zeros, so that no slot ever holds NaN."""
        self._free = list(range(num_pages))  # a heap: the lowest pages stay together
        self._references = [0] * num_pages

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return len(self._references)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token in one layer."""
        return 2 * math.prod(self.kv_pages.shape[4:]) * self.kv_pages.element_size()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages with one reference each; the caller has made sure they exist."""
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take one reference from each page; those without any are free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] -= 1
            if not self._references[page]:
                heapq.heappush(self._free, page)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages, all layers at once."""
        if sources:
            pairs = upload([sources, targets], self.kv_pages.device)
            copy_pages(self.kv_pages, pairs[0], pairs[1])

    def check(self, holders: Sequence[Sequence[int]]) -> None:
        """Assert that references are exactly those of `holders` and that no page is lost.

        Args:
            holders: The pages of everyone who holds some.
        """
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._references, "references and holders differ"
        free = [page for page, count in enumerate(counts) if not count]
        assert sorted(self._free) == free, "the free list is not the pages without references"
