"""packed_attention: causal attention within each sequence of a packed batch.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= i, j > i - window, same sequence

Shape letters: N packed tokens, B sequences, Hq and Hk query and KV heads, C channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_values
from fastrl.errors import ShapeError

PREFERENCE = ("torch",)
MAX_PADDING = 1.25
"""Padded tokens per real token in one call of the dense kernel."""


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None,
) -> Tensor:
    """packed_attention, one sequence at a time with a plain softmax."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))  # [H, S, C]
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        scores = scale * (q @ k.transpose(1, 2))  # [Hq, S, S]
        scores = scores.masked_fill(~_causal_mask(end - begin, window, q.device), -torch.inf)
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[S, S] bool, True where the query of the row may see the key of the column."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    window: int | None,
) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ShapeError(
            f"packed_attention: expected query [N, Hq, C] and key and value [N, Hk, C], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"packed_attention: query and key differ in tokens or channels: {list(query.shape)} "
            f"and {list(key.shape)}; both cover the same packed tokens"
        )
    if query.shape[1] % key.shape[1]:
        raise ShapeError(
            f"packed_attention: {query.shape[1]} query heads are not a multiple of "
            f"{key.shape[1]} KV heads"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int64:
        raise ShapeError(
            f"packed_attention: expected cu_seqlens [B+1] int64, got {list(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if max_seqlen < 1 or (window is not None and window < 1):
        raise ShapeError(
            f"packed_attention: max_seqlen and window must be at least 1, got {max_seqlen} and "
            f"{window}"
        )
    check_values("packed_attention", query=query, key=key, value=value)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None, backend: str | None = None,
) -> Tensor:
    """Causal self-attention of each sequence of a packed batch. Differentiable.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= i, j > i - window

    Args:
        query: [N, Hq, C]. Query head h reads KV head h // (Hq / Hk).
        key, value: [N, Hk, C], dtype of query.
        cu_seqlens: [B+1] int64. Where each sequence begins; the last entry is N.
        max_seqlen: Tokens of the longest sequence, known to the host.
        scale: Factor of the scores, usually C ** -0.5.
        window: Keys a query may see, itself included; None sees all before it.
        backend: See fastrl.backends.
    Returns:
        [N, Hq, C], dtype of query.
    Raises:
        ShapeError: when shapes or dtypes do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: at most `MAX_PADDING` times the multiplications of the real tokens; one dense call per
        group of sequences of similar length.
    Source: Vaswani et al. 2017 (arXiv 1706.03762); window: Mistral 7B (arXiv 2310.06825).
    Example:
        >>> x = torch.ones(3, 1, 2)
        >>> cu = torch.tensor([0, 1, 3])
        >>> packed_attention(x, x, x, cu, max_seqlen=2, scale=1.0).shape
        torch.Size([3, 1, 2])
    """
    _check(query, key, value, cu_seqlens, max_seqlen, window)
    choose("packed_attention", "packed_attention", PREFERENCE, query.device.type, query.dtype,
           backend)
    return _packed_attention_torch(query, key, value, cu_seqlens, max_seqlen, scale, window)


def _packed_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None,
) -> Tensor:
    """Sequences of similar length are padded together: one dense causal call per group."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    if min(lengths) == max(lengths):
        q, k, v = (x.view(len(lengths), -1, *x.shape[1:]) for x in (query, key, value))
        return _dense_attention(q, k, v, scale, window).flatten(0, 1)
    outputs, rows = [], []
    for group in similar_lengths(lengths):
        longest = lengths[group[0]]
        members = torch.tensor(group, device=query.device)
        offsets = torch.arange(longest, device=query.device)
        packed_rows = cu_seqlens[members, None] + offsets  # [b, S]
        real = packed_rows < cu_seqlens[members + 1, None]
        # Padding repeats the first row of the sequence: it stands after every real token, where
        # a causal query cannot see it.
        padded = torch.where(real, packed_rows, cu_seqlens[members, None]).flatten()
        q, k, v = (x.index_select(0, padded).view(len(group), longest, *x.shape[1:])
                   for x in (query, key, value))
        attended = _dense_attention(q, k, v, scale, window).flatten(0, 1)
        outputs.append(attended.index_select(0, real.flatten().nonzero().squeeze(-1)))
        rows.append(packed_rows[real])
    order = torch.cat(rows).argsort()
    return torch.cat(outputs).index_select(0, order)


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Groups of indices, longest first, whose padded area is at most MAX_PADDING times its own."""
    groups: list[list[int]] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total += lengths[index]
        if not groups or longest * (len(groups[-1]) + 1) > MAX_PADDING * total:
            groups.append([])
            longest = total = lengths[index]
        groups[-1].append(index)
    return groups


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """[B, S, Hq, C] from query [B, S, Hq, C] and key, value [B, S, Hk, C]."""
    length = query.shape[1]
    windowed = window is not None and window < length
    mask = _causal_mask(length, window, query.device) if windowed else None
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask,
        is_causal=mask is None, scale=scale, enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
