"""prefix_attention by `flash_attn.flash_attn_varlen_func`, on keys laid out for every segment.

Where a segment has more keys than queries the causal mask of flash_attn ends at the last query and
the last key, so that the queries are the newest tokens. What flash's packed_attention says of
windows, positions and determinism holds here.
"""

import torch
from torch import Tensor

from fastrl_kernels.flash.packed_attention import supports, varlen_arguments

__all__ = ["prefix_attention", "supports"]


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, *, cu_seqlens_k: Tensor,
) -> Tensor:
    """fastrl.ops.prefix_attention on this backend.

    Args:
        key, value: [num_keys, Hk, C], the keys of every segment end to end, its prefix first.
        cu_seqlens_k: [B+1] int64, where those of each segment begin.
    """
    from flash_attn import flash_attn_varlen_func

    arguments = varlen_arguments(query, key, value, cu_seqlens, max_seqlen, scale, window)
    result: Tensor = flash_attn_varlen_func(
        **arguments | {"cu_seqlens_k": cu_seqlens_k.to(torch.int32)})
    return result
