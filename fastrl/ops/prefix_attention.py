"""prefix_attention: causal attention of sequences that begin alike, their beginning encoded once.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j     over j in the prefix, then j <= i of its own

A segment is a prefix, what follows one, or a sequence by itself. `prefixes[b]` is the segment that
segment b continues, -1 where there is none. Those that continue a prefix follow it directly.

Shape letters: N packed tokens, B segments, Hq and Hk query and KV heads, C channels per head.

Which path "auto" takes; the first line that fits (figures: docs/kernels.md):

    flash_attn installed, half precision, GPU, C up to 256                           flash
    half precision, GPU from Ampere on, C up to 256 and a multiple of 8              torch: varlen
    anything else: CPU, float32, float64, odd or large heads                         torch: dense
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device
from fastrl.dense_attention import MIN_EXACT_ROWS, visible_keys, whole_units
from fastrl.environment import checks_values
from fastrl.errors import ShapeError
from fastrl.ops.packed_attention import (
    check_packed,
    kernel_limits,
    packed_attention,
    similar_lengths,
    torch_path,
    varlen_arguments,
)

PREFERENCE = ("flash", "torch", "triton")


def prefix_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, *,
    max_seqlen: int, num_keys: int, scale: float, window: int | None = None,
) -> Tensor:
    """prefix_attention, one segment at a time with a plain softmax."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for b, prefix in enumerate(prefixes.tolist()):
        own = slice(bounds[b], bounds[b + 1])
        before = slice(bounds[prefix], bounds[prefix + 1]) if prefix >= 0 else slice(0, 0)
        q = query[own].transpose(0, 1)  # [Hq, S, C]
        k, v = (torch.cat([x[before], x[own]]).transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        scores = scale * (q @ k.transpose(1, 2))  # [Hq, S, P + S]
        positions = torch.arange(k.shape[1], device=q.device)
        keep = visible_keys(positions[k.shape[1] - q.shape[1]:], positions, window)
        outputs.append((scores.masked_fill(~keep, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def _check_prefixes(
    cu_seqlens: Tensor, prefixes: Tensor, max_seqlen: int, num_keys: int, num_tokens: int
) -> None:
    op = "prefix_attention"
    if prefixes.dtype != torch.int64 or prefixes.shape != (len(cu_seqlens) - 1,):
        raise ShapeError(f"{op}: expected prefixes [{len(cu_seqlens) - 1}] int64, one for each "
                         f"segment of cu_seqlens, got {list(prefixes.shape)} {prefixes.dtype}")
    check_device(op, {"cu_seqlens": cu_seqlens, "prefixes": prefixes})
    if num_keys < num_tokens:
        raise ShapeError(f"{op}: expected num_keys of at least {num_tokens}, the packed tokens, "
                         f"got {num_keys}; it counts a prefix again for each that continues it")
    if torch.compiler.is_compiling() or not checks_values():
        return
    latest = -1
    for b, prefix in enumerate(prefixes.tolist()):
        latest = b if prefix == -1 else latest
        if prefix not in (-1, latest):
            raise ShapeError(f"{op}: expected prefixes[{b}] to be -1 or {latest}, the last segment "
                             f"without a prefix, got {prefix} (FASTRL_CHECK=1)")
    lens = _key_lens(cu_seqlens, prefixes)
    if int(lens.max()) > max_seqlen or int(lens.sum()) != num_keys:
        raise ShapeError(f"{op}: expected max_seqlen of at least {int(lens.max())} and num_keys "
                         f"{int(lens.sum())}, prefixes counted, got {max_seqlen} and {num_keys} "
                         "(FASTRL_CHECK=1)")


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, *,
    max_seqlen: int, num_keys: int, scale: float, window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal self-attention of packed sequences whose common beginnings are packed once.

    The table at the head of the file says which kernel runs.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j     over j in the prefix, then j <= i

    Equals packed_attention of every prefix + continuation, of which the prefix's rows are kept
    once; the gradient of a prefix's key is the sum over all that continue it, in a fixed order.

    Args:
        query: [N, Hq, C]. Query head h reads KV head h // (Hq / Hk).
        key, value: [N, Hk, C], dtype of query.
        cu_seqlens: [B+1] int64. Where each segment begins; the last entry is N.
        prefixes: [B] int64. The segment that each one continues, which stands directly before it
            and its siblings; -1: none. A prefix has no prefix.
        max_seqlen: Tokens of the longest segment, its prefix included, known to the host.
        num_keys: Tokens of all segments, their prefixes included, known to the host.
        scale: Factor of the scores, usually C ** -0.5.
        window: Keys a query may see, itself included; None sees all before it.
        backend: See fastrl.backends.
    Returns:
        [N, Hq, C], dtype of query.
    Raises:
        ShapeError: when shapes or dtypes do not fit together.
        ConfigError: when scale is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: the pairs of real queries and keys; but for triton, keys and values of a prefix are copied
        once for each segment that continues it.
    Source: Prefix Grouper (arXiv 2506.05433).
    Example:
        >>> x = torch.ones(4, 1, 2)  # two tokens, and two continuations of one token each
        >>> cu, prefixes = torch.tensor([0, 2, 3, 4]), torch.tensor([-1, 0, 0])
        >>> prefix_attention(x, x, x, cu, prefixes, max_seqlen=3, num_keys=8, scale=1.0).shape
        torch.Size([4, 1, 2])
    """
    check_packed("prefix_attention", query, key, value, cu_seqlens, max_seqlen, scale, window)
    _check_prefixes(cu_seqlens, prefixes, max_seqlen, num_keys, len(query))
    C, device = query.shape[2], query.device
    if window is not None and window >= max_seqlen:
        window = None
    name = choose("prefix_attention", "prefix_attention", PREFERENCE, device.type, query.dtype,
                  backend, kernel_limits(C))
    if name == "triton":
        from fastrl_kernels.triton import prefix_attention as triton_kernels

        return triton_kernels.prefix_attention(query, key, value, cu_seqlens, prefixes,
                                               max_seqlen=max_seqlen, scale=scale, window=window)
    capability = torch.cuda.get_device_properties(device).major if device.type == "cuda" else 0
    path = torch_path(device.type, query.dtype, C, max_seqlen, window, False, capability)
    if name == "torch" and path == "dense":
        return _attend_dense(query, key, value, cu_seqlens, prefixes, scale, window)
    rows, cu_seqlens_k = key_rows(cu_seqlens, prefixes, num_keys)
    # Not index_select: the gradient of this one is summed in a fixed order on a GPU too.
    arguments = (query, key[rows], value[rows], cu_seqlens, max_seqlen, scale, window)
    if name == "flash":
        from fastrl_kernels.flash import prefix_attention as flash_kernels

        return flash_kernels.prefix_attention(*arguments, cu_seqlens_k=cu_seqlens_k)
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(**{**varlen_arguments(*arguments),
                              "cu_seq_k": cu_seqlens_k.to(torch.int32)})
    return cast(Tensor, out)


def _key_lens(cu_seqlens: Tensor, prefixes: Tensor) -> Tensor:
    """[B] int64, keys of each segment: its prefix's and its own."""
    lens = cu_seqlens[1:] - cu_seqlens[:-1]
    return lens + torch.where(prefixes >= 0, lens[prefixes.clamp_min(0)], 0)


def key_rows(cu_seqlens: Tensor, prefixes: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Packed rows [num_keys] of the keys of every segment, prefix first, and where each begins.

    No host read. For kernels that want the keys of each sequence end to end.

    Returns:
        rows: [num_keys] int64; cu_seqlens_k: [B+1] int64.
    """
    lens = _key_lens(cu_seqlens, prefixes)
    cu_seqlens_k = F.pad(lens.cumsum(0), (1, 0))
    segments = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens,
                                       output_size=num_keys)
    offsets = torch.arange(num_keys, device=lens.device) - cu_seqlens_k[segments]
    prefix_lens = (lens - (cu_seqlens[1:] - cu_seqlens[:-1]))[segments]
    begins = torch.where(offsets < prefix_lens, cu_seqlens[prefixes.clamp_min(0)][segments],
                         cu_seqlens[segments] - prefix_lens)
    return begins + offsets, cu_seqlens_k


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, scale: float,
    window: int | None,
) -> Tensor:
    """What has no prefix in packed_attention; then one dense call for each prefix."""
    bounds, parents, device = cu_seqlens.tolist(), prefixes.tolist(), query.device
    lengths = [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    alone = [b for b, prefix in enumerate(parents) if prefix < 0]
    rows = [torch.cat([torch.arange(bounds[b], bounds[b + 1], device=device) for b in alone])]
    q, k, v = (x.index_select(0, rows[0]) for x in (query, key, value))
    outputs = [packed_attention(
        q, k, v, torch.tensor([0, *(lengths[b] for b in alone)], device=device).cumsum(0),
        max_seqlen=max(1, *(lengths[b] for b in alone)), scale=scale, window=window,
        backend="torch")]
    children: dict[int, list[int]] = {}
    for b, prefix in enumerate(parents):
        if prefix >= 0:
            children.setdefault(prefix, []).append(b)
    for prefix, members in children.items():
        before = slice(bounds[prefix], bounds[prefix + 1])
        for part in similar_lengths([lengths[b] for b in members]):
            group = torch.tensor([members[i] for i in part], device=device)
            # As many queries and keys as give a row the bits that it has in a whole sequence.
            longest = max(lengths[members[part[0]]], MIN_EXACT_ROWS)
            num_keys = whole_units(lengths[prefix] + longest, device)
            packed_rows = cu_seqlens[group, None] + torch.arange(longest, device=device)  # [b, S]
            real = packed_rows < cu_seqlens[group + 1, None]
            # Padding repeats the first row, behind every real token: see packed_attention.
            padded = torch.where(real, packed_rows, cu_seqlens[group, None]).flatten()
            q, k, v = (x.index_select(0, padded).view(*packed_rows.shape, *x.shape[1:])
                       for x in (query, key, value))
            missing = (len(group), num_keys - lengths[prefix] - longest, *key.shape[1:])
            k, v = (torch.cat([x[before].expand(len(group), -1, -1, -1), own,
                               own.new_zeros(missing)], dim=1) for x, own in ((key, k), (value, v)))
            positions = torch.arange(num_keys, device=device)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale,
                attn_mask=visible_keys(positions[lengths[prefix]:][:longest], positions, window),
                enable_gqa=query.shape[1] != key.shape[1])
            outputs.append(out.transpose(1, 2)[real])
            rows.append(packed_rows[real])
    return torch.cat(outputs).index_select(0, torch.cat(rows).argsort())
