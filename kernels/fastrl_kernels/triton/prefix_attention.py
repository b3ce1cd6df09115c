"""prefix_attention on a GPU: causal attention of segments that may continue a shared prefix.

    s_ij = scale q_i . k_j    p_ij = e^(s_ij) / sum_j e^(s_ij)    out_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i . v_j - do_i . out_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i

The kernels of packed_attention, but that the keys of a segment are those of its prefix and then its
own: they are walked in the blocks and splits of the whole sequence, counted from the first token of
the prefix, and the place of each key of a block is found by comparing it with the prefix's length.
So a token has the bits that it has in packed_attention of the whole sequence, and no key is copied.
The gradient of a prefix's keys adds up its own queries and then those of its continuations, in the
order in which they are packed: no atomics.

Floor, for P pairs (i, j) and half precision: as packed_attention, 4 Hq C P operations forward and
14 Hq C P backward; the bytes of N packed tokens, in which a prefix counts once.
Limits: float32, float16, bfloat16; C up to 256; differentiable once. Source: Dao 2023
(arXiv 2307.08691), Prefix Grouper (arXiv 2506.05433).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.packed_attention import (
    SEARCHED,
    SPLIT,
    attend_tile,
    attention_aot_cases,
    dense_channels,
    end_block,
    find_tile,
    first_key_block,
    launch_settings,
    load_rows,
    merge_split,
    no_keys,
    store_rows,
    visible,
)
from fastrl_kernels.triton.paged_attention import load_cached
from fastrl_kernels.triton.support import AotCase, supports

__all__ = ["aot_cases", "prefix_attention", "supports"]


@triton.jit
def find_prefix(segment, cu_seqlens_ptr, prefixes_ptr):  # type: ignore[no-untyped-def]
    """Start [int64] and length of what a segment continues; length 0 where it continues nothing."""
    prefix = tl.load(prefixes_ptr + segment)
    index = tl.maximum(prefix, 0)
    start = tl.load(cu_seqlens_ptr + index)
    length = tl.where(prefix < 0, 0, tl.load(cu_seqlens_ptr + index + 1) - start)
    return start, length.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def load_keys(  # type: ignore[no-untyped-def]
    ptr, keys, prefix_start, prefix_len, start, num_keys, stride_n, C: tl.constexpr,
    BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] of a KV head, the prefix's rows and then the segment's own."""
    rows = tl.where(keys < prefix_len, prefix_start, start - prefix_len) + keys
    return load_cached(ptr, rows * stride_n, keys < num_keys, C, BLOCK_C, UPCAST)


@triton.jit
def count_continuations(segment, prefixes_ptr, num_segments):  # type: ignore[no-untyped-def]
    """Segments that continue this one; they stand directly behind it."""
    count = tl.zeros([], tl.int32)
    for first in range(0, num_segments, SEARCHED):
        i = first + tl.arange(0, SEARCHED)
        prefix = tl.load(prefixes_ptr + i, mask=i < num_segments, other=-1)
        count += tl.sum((prefix == segment).to(tl.int32), axis=0)
    return count


@triton.jit  # type: ignore[untyped-decorator]
def _prefix_attention_fwd_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, prefixes_ptr, out_ptr, lse_ptr,
    num_segments, num_tokens, num_tiles, num_heads, group, window, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_out_n, stride_out_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, HAS_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    segment, start, length, row = find_tile(num_tiles - 1 - pid // num_heads, cu_seqlens_ptr,
                                            num_segments, BLOCK_M)
    if row >= length:
        return
    prefix_start, prefix_len = find_prefix(segment, cu_seqlens_ptr, prefixes_ptr)
    num_keys = prefix_len + length
    key_ptr += head // group * stride_key_h
    value_ptr += head // group * stride_value_h
    rows = row + tl.arange(0, BLOCK_M)
    q = load_rows(query_ptr + start * stride_query_n + head * stride_query_h, rows, length,
                  stride_query_n, C, BLOCK_C, UPCAST)
    maximum, total, acc = no_keys(BLOCK_M, BLOCK_C)
    if HAS_SPLITS:
        whole_maximum, whole_total, whole_acc = no_keys(BLOCK_M, BLOCK_C)
    begin = prefix_len + row
    first = first_key_block(begin, window, HAS_WINDOW, BLOCK_N)
    diagonal = first if HAS_WINDOW else begin // BLOCK_N * BLOCK_N
    for block in range(first, diagonal, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_keys(key_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_key_n, C,
                      BLOCK_C, UPCAST)
        v = load_keys(value_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_value_n, C,
                      BLOCK_C, UPCAST)
        maximum, total, acc = attend_tile(q, k, v, keys, maximum, total, acc, scale_log2, False)
        if HAS_SPLITS:
            whole_maximum, whole_total, whole_acc, maximum, total, acc = end_block(
                block + BLOCK_N, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT)
    for block in range(diagonal, tl.minimum(begin + BLOCK_M, num_keys), BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_keys(key_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_key_n, C,
                      BLOCK_C, UPCAST)
        v = load_keys(value_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_value_n, C,
                      BLOCK_C, UPCAST)
        keep = visible(prefix_len + rows, keys, window, HAS_WINDOW)
        maximum, total, acc = attend_tile(q, k, v, keep, maximum, total, acc, scale_log2, True)
        if HAS_SPLITS:
            whole_maximum, whole_total, whole_acc, maximum, total, acc = end_block(
                block + BLOCK_N, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT)
    if HAS_SPLITS:
        maximum, total, acc = merge_split(
            whole_maximum, whole_total, whole_acc, maximum, total, acc)
    total = tl.where(rows < length, total, 1.0)  # beyond the last token a window holds no key
    store_rows(out_ptr + start * stride_out_n + head * stride_out_h, acc / total[:, None], rows,
               length, stride_out_n, C, BLOCK_C)
    tl.store(lse_ptr + head * num_tokens + start + rows, maximum + tl.log2(total),
             mask=rows < length)


@triton.jit  # type: ignore[untyped-decorator]
def _prefix_attention_dquery_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, prefixes_ptr, out_ptr, lse_ptr, dout_ptr,
    delta_ptr, dquery_ptr,
    num_segments, num_tokens, num_tiles, num_heads, group, window, scale, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_out_n, stride_out_h, stride_dout_n, stride_dout_h, stride_dquery_n, stride_dquery_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    segment, start, length, row = find_tile(num_tiles - 1 - pid // num_heads, cu_seqlens_ptr,
                                            num_segments, BLOCK_M)
    if row >= length:
        return
    prefix_start, prefix_len = find_prefix(segment, cu_seqlens_ptr, prefixes_ptr)
    num_keys = prefix_len + length
    key_ptr += head // group * stride_key_h
    value_ptr += head // group * stride_value_h
    numbers = head * num_tokens + start  # of a head's row in lse and delta
    rows = row + tl.arange(0, BLOCK_M)
    dout = load_rows(dout_ptr + start * stride_dout_n + head * stride_dout_h, rows, length,
                     stride_dout_n, C, BLOCK_C, UPCAST)
    out = load_rows(out_ptr + start * stride_out_n + head * stride_out_h, rows, length,
                    stride_out_n, C, BLOCK_C, UPCAST)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + numbers + rows, delta, mask=rows < length)
    q = load_rows(query_ptr + start * stride_query_n + head * stride_query_h, rows, length,
                  stride_query_n, C, BLOCK_C, UPCAST)
    lse = tl.load(lse_ptr + numbers + rows, mask=rows < length, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    begin = prefix_len + row
    first = first_key_block(begin, window, HAS_WINDOW, BLOCK_N)
    for block in range(first, tl.minimum(begin + BLOCK_M, num_keys), BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_keys(key_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_key_n, C,
                      BLOCK_C, UPCAST)
        v = load_keys(value_ptr, keys, prefix_start, prefix_len, start, num_keys, stride_value_n, C,
                      BLOCK_C, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        keep = visible(prefix_len + rows, keys, window, HAS_WINDOW)
        p = tl.exp2(tl.where(keep, scores - lse[:, None], float("-inf")))
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(dquery_ptr + start * stride_dquery_n + head * stride_dquery_h, acc * scale, rows,
               length, stride_dquery_n, C, BLOCK_C)


@triton.jit  # type: ignore[untyped-decorator]
def _prefix_attention_dkey_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, prefixes_ptr, lse_ptr, dout_ptr, delta_ptr,
    dkey_ptr, dvalue_ptr,
    num_segments, num_tokens, num_kv_heads, group, window, scale, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_dout_n, stride_dout_h, stride_dkey_n, stride_dkey_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = (pid % num_kv_heads).to(tl.int64)
    segment, start, length, row = find_tile(pid // num_kv_heads, cu_seqlens_ptr, num_segments,
                                            BLOCK_N)
    if row >= length:
        return
    keys = row + tl.arange(0, BLOCK_N)
    k = load_rows(key_ptr + start * stride_key_n + kv_head * stride_key_h, keys, length,
                  stride_key_n, C, BLOCK_C, UPCAST)
    v = load_rows(value_ptr + start * stride_value_n + kv_head * stride_value_h, keys, length,
                  stride_value_n, C, BLOCK_C, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    num_readers = 1 + count_continuations(segment, prefixes_ptr, num_segments)
    for member in range(group):
        head = kv_head * group + member
        for reader in range(num_readers):  # the segment itself, then what continues it
            begin = tl.load(cu_seqlens_ptr + segment + reader)
            num_rows = (tl.load(cu_seqlens_ptr + segment + reader + 1) - begin).to(tl.int32)
            offset = tl.where(reader == 0, 0, length)  # position of the reader's first query
            end = num_rows
            if HAS_WINDOW:  # no later query sees the last key of the block
                end = tl.minimum(num_rows, row + BLOCK_N - 1 + window - offset)
            q_ptr = query_ptr + begin * stride_query_n + head * stride_query_h
            do_ptr = dout_ptr + begin * stride_dout_n + head * stride_dout_h
            numbers = head * num_tokens + begin
            for block in range(tl.where(reader == 0, row, 0), end, BLOCK_M):
                rows = block + tl.arange(0, BLOCK_M)
                q = load_rows(q_ptr, rows, num_rows, stride_query_n, C, BLOCK_C, UPCAST)
                dout = load_rows(do_ptr, rows, num_rows, stride_dout_n, C, BLOCK_C, UPCAST)
                lse = tl.load(lse_ptr + numbers + rows, mask=rows < num_rows, other=0.0)
                delta = tl.load(delta_ptr + numbers + rows, mask=rows < num_rows, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [keys, rows]
                keep = (tl.trans(visible(offset + rows, keys, window, HAS_WINDOW))
                        & (rows < num_rows)[None, :])
                p = tl.exp2(tl.where(keep, scores - lse[None, :], float("-inf")))
                dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
                dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    place = start * stride_dkey_n + kv_head * stride_dkey_h
    store_rows(dkey_ptr + place, dk * scale, keys, length, stride_dkey_n, C, BLOCK_C)
    store_rows(dvalue_ptr + place, dv, keys, length, stride_dkey_n, C, BLOCK_C)


def prefix_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, scale: float,
    window: int | None, has_splits: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, C], and log2 sum_j 2^(s_ij log2 e) as [Hq, N] float32, in one launch.

    Args:
        has_splits: A segment may see more than SPLIT tokens. Changes no bits.
    """
    (N, Hq, _), B = query.shape, len(prefixes)
    query, key, value = (dense_channels(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(Hq, N, dtype=torch.float32, device=query.device)
    settings = launch_settings("fwd", query, window)
    num_tiles = N // settings["BLOCK_M"] + B
    if N > 0:
        _prefix_attention_fwd_kernel[(num_tiles * Hq,)](
            query, key, value, cu_seqlens.contiguous(), prefixes.contiguous(), out, lse, B, N,
            num_tiles, Hq, Hq // key.shape[1], window or 0, scale * math.log2(math.e),
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *out.stride()[:2],
            SPLIT=SPLIT, HAS_SPLITS=has_splits, **settings,
        )
    return out, lse


def prefix_attention_bwd(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor,
    out: Tensor, lse: Tensor, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in two launches."""
    (N, Hq, _), Hk, B = query.shape, key.shape[1], len(prefixes)
    query, key, value, dout = (dense_channels(x) for x in (query, key, value, dout))
    bounds = (cu_seqlens.contiguous(), prefixes.contiguous())
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    dkey = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    dvalue = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    delta = torch.empty_like(lse)
    settings = launch_settings("dquery", query, window)
    key_settings = launch_settings("dkey", query, window)
    scales = (scale, scale * math.log2(math.e))
    inputs = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    num_tiles = N // settings["BLOCK_M"] + B
    if N > 0:
        _prefix_attention_dquery_kernel[(num_tiles * Hq,)](
            query, key, value, *bounds, out, lse, dout, delta, dquery, B, N, num_tiles, Hq,
            Hq // Hk, window or 0, *scales, *inputs, *out.stride()[:2], *dout.stride()[:2],
            *dquery.stride()[:2], **settings,
        )
        _prefix_attention_dkey_kernel[((N // key_settings["BLOCK_N"] + B) * Hk,)](
            query, key, value, *bounds, lse, dout, delta, dkey, dvalue, B, N, Hk, Hq // Hk,
            window or 0, *scales, *inputs, *dout.stride()[:2], *dkey.stride()[:2], **key_settings,
        )
    return dquery, dkey, dvalue


@torch.library.custom_op("fastrl_kernels::prefix_attention", mutates_args=())
def _fwd_op(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, scale: float,
    window: int | None, has_splits: bool = True,
) -> tuple[Tensor, Tensor]:
    return prefix_attention_fwd(query, key, value, cu_seqlens, prefixes, scale, window, has_splits)


@_fwd_op.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    N, Hq, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(Hq, N, dtype=torch.float32)


@torch.library.custom_op("fastrl_kernels::prefix_attention_bwd", mutates_args=())
def _bwd_op(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor,
    out: Tensor, lse: Tensor, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return prefix_attention_bwd(dout, query, key, value, cu_seqlens, prefixes, out, lse, scale,
                                window)


@_bwd_op.register_fake
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class _PrefixAttention(torch.autograd.Function):
    """Keeps inputs, output and one number per token and head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor,
        scale: float, window: int | None, has_splits: bool,
    ) -> Tensor:
        run = _fwd_op if torch.compiler.is_compiling() else prefix_attention_fwd
        out, lse = run(query, key, value, cu_seqlens, prefixes, scale, window, has_splits)
        ctx.save_for_backward(query, key, value, cu_seqlens, prefixes, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        run = _bwd_op if torch.compiler.is_compiling() else prefix_attention_bwd
        query, key, value, cu_seqlens, prefixes, out, lse = ctx.saved_tensors
        gradients = run(dout, query, key, value, cu_seqlens, prefixes, out, lse, ctx.scale,
                        ctx.window)
        return *gradients, None, None, None, None, None


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, *,
    max_seqlen: int, scale: float, window: int | None = None,
) -> Tensor:
    """fastrl.ops.prefix_attention on this backend.

    Args:
        max_seqlen: Sums of up to SPLIT tokens are not split; no other use.
    """
    result: Tensor = _PrefixAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, cu_seqlens, prefixes, scale, window, max_seqlen > SPLIT
    )
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    return attention_aot_cases(
        {"fwd": _prefix_attention_fwd_kernel, "dquery": _prefix_attention_dquery_kernel,
         "dkey": _prefix_attention_dkey_kernel}, every)
