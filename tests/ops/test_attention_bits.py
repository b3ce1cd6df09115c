"""A row of attention has the same bits in training, in a prompt's pass and in a decode step."""

import pytest
import torch
from torch import Tensor

from fastrl.ops import packed_attention, paged_attention, write_kv
from fastrl.paged_plan import PagedPlan

PAGE_SIZE = 16
# One token, around the unit of 16, around blocks of 32 and 64 rows; the last for prompts alone:
# beyond 256 keys the library sums a decode step's products in another order.
LENGTHS = [1, 5, 15, 16, 17, 33, 69, 100, 250, 530]
MAX_DECODED = 256
# Groups of queries, one key head, and channels that are no multiple of four.
HEADS = [(4, 4, 8), (6, 2, 8), (3, 1, 6), (2, 1, 64)]


def _pages(key: Tensor, value: Tensor) -> Tensor:
    """[pages, 1, 2, PAGE_SIZE, Hk, C] that hold keys and values [S, Hk, C] in order, else 0."""
    pages = torch.zeros(-(-len(key) // PAGE_SIZE), 1, 2, PAGE_SIZE, *key.shape[1:])
    write_kv(key, value, pages, 0, torch.arange(len(key)))
    return pages


def _paged(query: Tensor, pages: Tensor, length: int) -> Tensor:
    """Attention of the last `len(query)` of `length` tokens."""
    return paged_attention(
        query, pages, 0, torch.arange(len(pages))[None], torch.tensor([length]),
        torch.tensor([0, len(query)]), max_seqlen_q=len(query), max_kv_len=length, scale=0.3,
        plan=PagedPlan(is_exact=True))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "channels"), HEADS)
def test_a_row_of_float32_has_the_same_bits_on_every_path(
    num_heads: int, num_kv_heads: int, channels: int
) -> None:
    query, key, value = (torch.randn(sum(LENGTHS), heads, channels)
                         for heads in (num_heads, num_kv_heads, num_kv_heads))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = packed_attention(query, key, value, bounds, max_seqlen=max(LENGTHS), scale=0.3)
    for i, length in enumerate(LENGTHS):
        rows = slice(int(bounds[i]), int(bounds[i + 1]))
        q, k, v = query[rows], key[rows], value[rows]
        alone = packed_attention(q, k, v, torch.tensor([0, length]), max_seqlen=length, scale=0.3)
        assert torch.equal(packed[rows], alone), f"packed, {length} tokens"
        pages = _pages(k, v)
        assert torch.equal(_paged(q, pages, length), alone), f"prompt of {length} tokens"
        for place in {1, length // 2 + 1, length} & set(range(MAX_DECODED + 1)):  # tokens so far
            decoded = _paged(q[place - 1 : place], pages, place)
            assert torch.equal(decoded, alone[place - 1 : place]), f"token {place} of {length}"
