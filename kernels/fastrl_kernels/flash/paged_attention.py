"""paged_attention by `flash_attn.flash_attn_varlen_func` with a table of pages.

Its pages hold a multiple of 256 tokens, its positions and pages are int32. How it splits a long
cache among programs depends on the batch, so the bits of a sequence do too. Limits: float16,
bfloat16; up to 256 channels. Source: Dao 2023 (arXiv 2307.08691).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels.flash.packed_attention import supports

__all__ = ["paged_attention", "supports", "varlen_arguments"]


def varlen_arguments(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, max_kv_len: int, scale: float, window: int | None,
    tables: dict[str, Tensor],
) -> dict[str, Any]:
    """What `flash_attn_varlen_func` is called with; fills `tables` where it is empty."""
    if not tables:
        tables["block_table"] = page_table.to(torch.int32)
        tables["cu_seqlens_q"] = cu_seqlens_q.to(torch.int32)
        tables["cu_seqlens_k"] = F.pad(kv_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return {
        "q": query, "k": kv_pages[:, layer, 0], "v": kv_pages[:, layer, 1], **tables,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_kv_len, "softmax_scale": scale,
        "causal": True, "window_size": (-1 if window is None else window - 1, 0),
    }


def paged_attention(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, *, max_seqlen_q: int, max_kv_len: int, scale: float,
    window: int | None = None, tables: dict[str, Tensor],
) -> Tensor:
    """fastrl.ops.paged_attention on this backend.

    Args:
        tables: Empty for the first layer of a pass; the others find there what it made.
    """
    from flash_attn import flash_attn_varlen_func

    result: Tensor = flash_attn_varlen_func(**varlen_arguments(
        query.detach(), kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q,
        max_kv_len, scale, window, tables))
    return result
