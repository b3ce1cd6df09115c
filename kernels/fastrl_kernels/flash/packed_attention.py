"""packed_attention by `flash_attn.flash_attn_varlen_func`.

Its window counts the keys to the left of the query, ours the query too. Positions are int32. The
backward pass adds up dq with atomics, in a fixed order only where torch's deterministic algorithms
are on. Limits: float16, bfloat16; up to 256 channels. Source: Dao 2023 (arXiv 2307.08691).
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["packed_attention", "supports", "varlen_arguments"]


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the op on such tensors; None where it can."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return ("it takes float16 and bfloat16, the tensors are "
                f"{str(dtype).removeprefix('torch.')}")
    return None


def varlen_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None,
) -> dict[str, Any]:
    """What `flash_attn_varlen_func` is called with."""
    cu = cu_seqlens.to(torch.int32)
    return {
        "q": query, "k": key, "v": value, "cu_seqlens_q": cu, "cu_seqlens_k": cu,
        "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen, "softmax_scale": scale,
        "causal": True, "window_size": (-1 if window is None else window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None,
) -> Tensor:
    """fastrl.ops.packed_attention on this backend."""
    from flash_attn import flash_attn_varlen_func

    result: Tensor = flash_attn_varlen_func(
        **varlen_arguments(query, key, value, cu_seqlens, max_seqlen, scale, window)
    )
    return result
