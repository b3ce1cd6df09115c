"""The paged KV cache: one tensor of pages, a free list and a reference count per page."""

import heapq
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.engine.batch import upload
from fastrl.errors import ConfigError
from fastrl.memory.arena import Arena
from fastrl.models.spec import ModelSpec
from fastrl.ops import copy_pages

logger = logging.getLogger("fastrl")


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens`."""
    return -(-num_tokens // page_size)


def page_shape(spec: ModelSpec, page_size: int) -> tuple[int, int, int, int, int]:
    """[L, 2, page_size, Hk, C] of a page."""
    return spec.num_layers, 2, page_size, spec.num_kv_heads, spec.head_dim


class KVCache:
    """Pages of keys and values, handed out and taken back.

    A page belongs to everyone who holds a reference; the last one to release it frees it. The pages
    lie in an arena: an idle cache may give its memory back and keep its addresses.

    Args:
        spec: The model's layers, KV heads and channels.
        num_pages: Pages to reserve.
        page_size: Tokens per page.
        dtype, device: Of the keys and values.
    Raises:
        torch.OutOfMemoryError: when there is no memory for them; see `new_cache`.
    """

    kv_pages: Tensor
    """[num_pages, L, 2, page_size, Hk, C]; with `shrink`, pages beyond `num_pages` have no memory.
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self._shape = (num_pages, *page_shape(spec, page_size))
        self._dtype = dtype
        self.page_bytes = math.prod(self._shape[1:]) * dtype.itemsize
        self.arena = Arena(num_pages * self.page_bytes, device)
        self._reset(num_pages)
        self.map()

    def _reset(self, num_pages: int) -> None:
        self._free = list(range(num_pages))  # a heap: the lowest pages stay together
        self._references = [0] * num_pages

    def map(self) -> None:
        """Have memory for all pages; their content is lost where they had none.

        Raises:
            torch.OutOfMemoryError: when there is not as much.
        """
        self.arena.map(self.num_pages * self.page_bytes)
        num_pages = self._shape[0] if self.arena.keeps_addresses else self.num_pages
        self.kv_pages = self.arena.tensor(0, (num_pages, *self._shape[1:]), self._dtype)

    def unmap(self) -> None:
        """Give the memory back; no page may be in use."""
        assert self.num_free == self.num_pages, "pages are in use"
        if not self.arena.keeps_addresses:
            self.kv_pages = self.kv_pages.new_empty(0)
        self.arena.unmap()

    def shrink(self, num_pages: int) -> None:
        """Have memory for the first `num_pages` only; none may be in use, addresses stay."""
        self.unmap()
        self._reset(num_pages)
        self.map()

    @property
    def has_shrunk(self) -> bool:
        """There are fewer pages than addresses."""
        return self.num_pages < self._shape[0]

    @property
    def slots_are_finite(self) -> bool:
        """No slot holds NaN that nobody has written there: pages begin as zeros."""
        return self.arena.is_zeroed

    @property
    def num_pages(self) -> int:
        """All pages with memory, free or not."""
        return len(self._references)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token in one layer."""
        return 2 * math.prod(self.kv_pages.shape[4:]) * self.kv_pages.element_size()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def lowest_free(self) -> int:
        """The page that is handed out next; `num_pages` where none is free."""
        return self._free[0] if self._free else self.num_pages

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

    def copy_tokens(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a page, all layers, one page to another."""
        self.kv_pages[target, :, :, :num_tokens] = self.kv_pages[source, :, :, :num_tokens]

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


def new_cache(
    spec: ModelSpec, num_pages: int, least: int, page_size: int, dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """A cache of `num_pages`, or of half as many, and so on, as there is memory for.

    Args:
        least: Pages that the longest sequence needs: there is no smaller cache.
    Raises:
        ConfigError: when there is no memory for `least` pages.
    """
    count = num_pages
    while True:
        try:
            cache = KVCache(spec, count, page_size, dtype, device)
        except torch.OutOfMemoryError as error:
            if count <= least:
                gib = count * math.prod(page_shape(spec, page_size)) * dtype.itemsize / 2**30
                raise ConfigError(
                    f"num_pages: expected a cache that fits in the memory of {device}, got {count} "
                    f"pages of {page_size} tokens, {gib:.1f} GiB; lower num_pages, max_batch_size "
                    "or max_new_tokens, or give memory back first") from error
            count = max(least, count // 2)
            continue
        if count < num_pages:
            logger.warning("num_pages: no memory on %s for %d pages of %d tokens; going on with "
                           "%d, responses are the same", device, num_pages, page_size, count)
        return cache
