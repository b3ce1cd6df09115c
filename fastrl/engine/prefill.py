"""One packed pass over new prompts. N packed tokens, B prompts, D width."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.engine.batch import send, upload
from fastrl.engine.cache import KVCache
from fastrl.models import CausalLM, PagedAttention
from fastrl.paged_plan import PagedPlan


def compute_prompts(
    model: CausalLM, cache: KVCache, prompts: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]], row_count: Callable[[int], int], *, is_exact: bool,
) -> Tensor:
    """[B, D] hidden states of the last token of each prompt; keys and values go into `pages`.

    Args:
        prompts: Token ids of each.
        pages: Pages of each, enough for its tokens.
        row_count: Rows that a forward pass of n rows is padded to; what the last layer computes
            for last tokens alone, too.
        is_exact: Rows of attention get the bits of a packed pass.
    """
    device, page_size = cache.kv_pages.device, cache.page_size
    lengths = [len(prompt) for prompt in prompts]
    num_tokens = sum(lengths)
    num_dummies = row_count(num_tokens) - num_tokens
    page_table = torch.zeros(len(prompts) + 1, max(map(len, pages)), dtype=torch.int64)
    for row, own in enumerate(pages):
        page_table[row, : len(own)] = torch.tensor(own)
    offsets = torch.arange(page_size)
    slots = torch.cat([
        (torch.tensor(own)[:, None] * page_size + offsets).flatten()[:length]
        for own, length in zip(pages, lengths, strict=True)])
    token_ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths])
    # The dummies are one more sequence, without anything in the cache.
    bounds = torch.tensor([0, *lengths, num_dummies]).cumsum(0)
    attention = PagedAttention(
        cache.kv_pages, send(page_table, device),
        send(F.pad(slots, (0, num_dummies), value=-1), device), send(bounds, device),
        upload([*lengths, 0], device), max(*lengths, num_dummies), max(lengths),
        PagedPlan(slots_are_finite=cache.slots_are_finite, is_exact=is_exact))
    last = bounds[1:-1] - 1
    hidden: Tensor = model(
        send(F.pad(token_ids, (0, num_dummies)), device),
        send(F.pad(positions, (0, num_dummies)), device), attention,
        send(F.pad(last, (0, row_count(len(last)) - len(last))), device))
    return hidden[: len(last)]
