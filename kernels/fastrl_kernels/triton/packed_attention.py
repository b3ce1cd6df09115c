"""packed_attention on a GPU: causal attention of ragged sequences, forward and backward.

    s_ij = scale q_i . k_j    p_ij = e^(s_ij) / sum_j e^(s_ij)    out_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i . v_j - do_i . out_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i

Tiles begin at the first token of a sequence. Sequence i owns the tiles from cu_seqlens[i] // BLOCK
+ i on, which are enough for any length: the grid, (N // BLOCK + B) heads, needs no length and no
host synchronisation, and a program finds its sequence by counting; at most one tile per sequence is
spare and returns at once. Keys are walked in blocks counted from the sequence's first token, so the
bits of a row depend on its own sequence alone. Block sizes depend on C and the type only. Every
SPLIT keys are summed up by themselves and then merged from left to right, so that paged_attention
can give the splits to several programs and still has the bits of this kernel.
Backward, without atomics: one kernel per block of queries (dq, and do . out), then one per block of
keys (dk, dv) that adds up the queries and the heads of its group in a fixed order.

Floor, for P pairs (i, j) and half precision: forward 4 Hq C P operations and 2 N C (2 Hq + 2 Hk)
bytes; backward 14 Hq C P operations, of which 4 repeat s and do . v instead of adding up dq in
memory, and 2 N C (4 Hq + 4 Hk) bytes. Keeps 4 bytes per token and head, log2 sum_j 2^(s_ij log2 e).
Limits: float32, float16, bfloat16; C up to 256; differentiable once. Source: Dao 2023
(arXiv 2307.08691); numbering of the tiles after vLLM's unified attention (arXiv 2511.11581).
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, is_interpreted, supports

__all__ = ["MAX_HEAD_DIM", "aot_cases", "packed_attention", "supports"]

MAX_HEAD_DIM = 256
SPLIT = 512
"""Keys that are summed up by themselves, counted from the first token of a sequence. What the
splits gave is merged from left to right: here by one program, in paged_attention by several."""
SEARCHED = tl.constexpr(256)
"""Sequences that are looked at together when a program looks for its own."""


@triton.jit  # type: ignore[untyped-decorator]
def find_tile(tile, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence that owns a tile, its start [int64] and length, the tile's first row in it."""
    count = tl.zeros([], tl.int32)
    for first in range(0, num_sequences, SEARCHED):
        i = first + tl.arange(0, SEARCHED)
        is_inside = i < num_sequences
        begin = tl.load(cu_seqlens_ptr + i, mask=is_inside, other=0)
        count += tl.sum((is_inside & (begin // BLOCK + i <= tile)).to(tl.int32), axis=0)
    start = tl.load(cu_seqlens_ptr + count - 1)
    length = tl.load(cu_seqlens_ptr + count) - start
    row = (tile - (start // BLOCK + count - 1)) * BLOCK
    return count - 1, start, length.to(tl.int32), row.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def places(  # type: ignore[no-untyped-def]
    ptr, rows, num_rows, stride_n, C: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Addresses of rows [BLOCK, BLOCK_C] of a head, and which of them exist."""
    channels = tl.arange(0, BLOCK_C)
    is_inside = (rows < num_rows)[:, None]
    if C < BLOCK_C:
        is_inside = is_inside & (channels < C)[None, :]
    return ptr + rows.to(tl.int64)[:, None] * stride_n + channels[None, :], is_inside


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(  # type: ignore[no-untyped-def]
    ptr, rows, num_rows, stride_n, C: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """[BLOCK, BLOCK_C] of a head, 0 beyond the last row and channel."""
    addresses, is_inside = places(ptr, rows, num_rows, stride_n, C, BLOCK_C)
    x = tl.load(addresses, mask=is_inside, other=0.0)
    if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly
        x = x.to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(  # type: ignore[no-untyped-def]
    ptr, x, rows, num_rows, stride_n, C: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Write where `load_rows` would read."""
    addresses, is_inside = places(ptr, rows, num_rows, stride_n, C, BLOCK_C)
    tl.store(addresses, x, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def visible(queries, keys, window, HAS_WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """True where the query of the row may see the key of the column."""
    keep = keys[None, :] <= queries[:, None]
    if HAS_WINDOW:
        keep = keep & (keys[None, :] > queries[:, None] - window)
    return keep


@triton.jit  # type: ignore[untyped-decorator]
def first_key_block(  # type: ignore[no-untyped-def]
    row, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Where the walk over the keys of a tile begins: a block counted from the first token."""
    first = row * 0
    if HAS_WINDOW:
        first = tl.maximum(row - window + 1, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit  # type: ignore[untyped-decorator]
def attend_tile(  # type: ignore[no-untyped-def]
    q, k, v, keep, maximum, total, acc, scale_log2, MASKED: tl.constexpr,
):
    """One step of the running softmax over a tile of keys that has been loaded.

    Scores are in units of log 2: `scale_log2` is scale log2 e. A row that sees no key of the tile
    keeps its bits.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, axis=1))
    finite = tl.where(larger == float("-inf"), 0.0, larger)  # no key so far: not inf - inf
    p = tl.exp2(scores - finite[:, None])
    kept = tl.exp2(maximum - finite)
    acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return larger, total * kept + tl.sum(p, axis=1), acc


@triton.jit  # type: ignore[untyped-decorator]
def no_keys(BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum, total and sum of values of rows that have seen no key."""
    return (tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_C], tl.float32))


@triton.jit
def merge_split(  # type: ignore[no-untyped-def]
    whole_maximum, whole_total, whole_acc, maximum, total, acc,
):
    """Add what a split of the keys gave to what those before it gave. No keys change no bits."""
    larger = tl.maximum(whole_maximum, maximum)
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    whole, part = tl.exp2(whole_maximum - finite), tl.exp2(maximum - finite)
    return (larger, whole_total * whole + total * part,
            whole_acc * whole[:, None] + acc * part[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def end_block(  # type: ignore[no-untyped-def]
    end, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT: tl.constexpr,
):
    """Merge and begin anew where the block of keys that ends at `end` was the last of a split."""
    if end % SPLIT == 0:
        whole_maximum, whole_total, whole_acc = merge_split(
            whole_maximum, whole_total, whole_acc, maximum, total, acc)
        maximum, total, acc = no_keys(acc.shape[0], acc.shape[1])
    return whole_maximum, whole_total, whole_acc, maximum, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _packed_attention_fwd_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,
    num_sequences, num_tokens, num_tiles, num_heads, group, window, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_out_n, stride_out_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, HAS_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)  # heads that share keys are neighbours; long rows begin first
    head = (pid % num_heads).to(tl.int64)
    _, start, length, row = find_tile(num_tiles - 1 - pid // num_heads, cu_seqlens_ptr,
                                      num_sequences, BLOCK_M)
    if row >= length:
        return
    query_ptr += start * stride_query_n + head * stride_query_h
    key_ptr += start * stride_key_n + head // group * stride_key_h
    value_ptr += start * stride_value_n + head // group * stride_value_h
    rows = row + tl.arange(0, BLOCK_M)
    q = load_rows(query_ptr, rows, length, stride_query_n, C, BLOCK_C, UPCAST)
    maximum, total, acc = no_keys(BLOCK_M, BLOCK_C)
    if HAS_SPLITS:
        whole_maximum, whole_total, whole_acc = no_keys(BLOCK_M, BLOCK_C)
    first = first_key_block(row, window, HAS_WINDOW, BLOCK_N)
    # Blocks before the diagonal are seen whole by every row, unless a window cuts them.
    diagonal = first if HAS_WINDOW else row // BLOCK_N * BLOCK_N
    for block in range(first, diagonal, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, keys, length, stride_key_n, C, BLOCK_C, UPCAST)
        v = load_rows(value_ptr, keys, length, stride_value_n, C, BLOCK_C, UPCAST)
        maximum, total, acc = attend_tile(q, k, v, keys, maximum, total, acc, scale_log2, False)
        if HAS_SPLITS:
            whole_maximum, whole_total, whole_acc, maximum, total, acc = end_block(
                block + BLOCK_N, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT)
    for block in range(diagonal, tl.minimum(row + BLOCK_M, length), BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, keys, length, stride_key_n, C, BLOCK_C, UPCAST)
        v = load_rows(value_ptr, keys, length, stride_value_n, C, BLOCK_C, UPCAST)
        keep = visible(rows, keys, window, HAS_WINDOW)
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
def _packed_attention_dquery_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr,
    dquery_ptr,
    num_sequences, num_tokens, num_tiles, num_heads, group, window, scale, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_out_n, stride_out_h, stride_dout_n, stride_dout_h, stride_dquery_n, stride_dquery_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    _, start, length, row = find_tile(num_tiles - 1 - pid // num_heads, cu_seqlens_ptr,
                                      num_sequences, BLOCK_M)
    if row >= length:
        return
    query_ptr += start * stride_query_n + head * stride_query_h
    key_ptr += start * stride_key_n + head // group * stride_key_h
    value_ptr += start * stride_value_n + head // group * stride_value_h
    out_ptr += start * stride_out_n + head * stride_out_h
    dout_ptr += start * stride_dout_n + head * stride_dout_h
    numbers = head * num_tokens + start  # of a head's row in lse and delta
    rows = row + tl.arange(0, BLOCK_M)
    dout = load_rows(dout_ptr, rows, length, stride_dout_n, C, BLOCK_C, UPCAST)
    out = load_rows(out_ptr, rows, length, stride_out_n, C, BLOCK_C, UPCAST)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + numbers + rows, delta, mask=rows < length)
    q = load_rows(query_ptr, rows, length, stride_query_n, C, BLOCK_C, UPCAST)
    lse = tl.load(lse_ptr + numbers + rows, mask=rows < length, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = first_key_block(row, window, HAS_WINDOW, BLOCK_N)
    for block in range(first, tl.minimum(row + BLOCK_M, length), BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, keys, length, stride_key_n, C, BLOCK_C, UPCAST)
        v = load_rows(value_ptr, keys, length, stride_value_n, C, BLOCK_C, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        keep = visible(rows, keys, window, HAS_WINDOW)
        p = tl.exp2(tl.where(keep, scores - lse[:, None], float("-inf")))
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(dquery_ptr + start * stride_dquery_n + head * stride_dquery_h, acc * scale, rows,
               length, stride_dquery_n, C, BLOCK_C)


@triton.jit  # type: ignore[untyped-decorator]
def _packed_attention_dkey_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, cu_seqlens_ptr, lse_ptr, dout_ptr, delta_ptr, dkey_ptr,
    dvalue_ptr,
    num_sequences, num_tokens, num_kv_heads, group, window, scale, scale_log2,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    stride_dout_n, stride_dout_h, stride_dkey_n, stride_dkey_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = (pid % num_kv_heads).to(tl.int64)
    _, start, length, row = find_tile(pid // num_kv_heads, cu_seqlens_ptr, num_sequences, BLOCK_N)
    if row >= length:
        return
    keys = row + tl.arange(0, BLOCK_N)
    k = load_rows(key_ptr + start * stride_key_n + kv_head * stride_key_h, keys, length,
                  stride_key_n, C, BLOCK_C, UPCAST)
    v = load_rows(value_ptr + start * stride_value_n + kv_head * stride_value_h, keys, length,
                  stride_value_n, C, BLOCK_C, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = length
    if HAS_WINDOW:  # no later query sees the last key of the block
        end = tl.minimum(length, row + BLOCK_N - 1 + window)
    for member in range(group):
        head = kv_head * group + member
        q_ptr = query_ptr + start * stride_query_n + head * stride_query_h
        do_ptr = dout_ptr + start * stride_dout_n + head * stride_dout_h
        numbers = head * num_tokens + start
        for block in range(row, end, BLOCK_M):
            rows = block + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr, rows, length, stride_query_n, C, BLOCK_C, UPCAST)
            dout = load_rows(do_ptr, rows, length, stride_dout_n, C, BLOCK_C, UPCAST)
            lse = tl.load(lse_ptr + numbers + rows, mask=rows < length, other=0.0)
            delta = tl.load(delta_ptr + numbers + rows, mask=rows < length, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [keys, rows]
            keep = tl.trans(visible(rows, keys, window, HAS_WINDOW)) & (rows < length)[None, :]
            p = tl.exp2(tl.where(keep, scores - lse[None, :], float("-inf")))
            dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    place = start * stride_dkey_n + kv_head * stride_dkey_h
    store_rows(dkey_ptr + place, dk * scale, keys, length, stride_dkey_n, C, BLOCK_C)
    store_rows(dvalue_ptr + place, dv, keys, length, stride_dkey_n, C, BLOCK_C)


def block_settings(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes, warps and stages of "fwd", "dquery" or "dkey", by channels and type alone."""
    block_c = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:  # no tensor cores: operands live in registers
        settings = (16, 16, 4 if block_c <= 64 else 8, 1)
    elif block_c > 128:
        settings = (32, 32, 8, 2) if kernel == "dkey" else (64, 32, 8, 2)
    elif kernel == "fwd":
        settings = (128, 64, 8, 2 if block_c <= 64 else 3)
    else:
        settings = (32, 64, 8, 2) if kernel == "dkey" else (64, 64, 4 if block_c <= 64 else 8, 2)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    # Where a product meets a sum, whether the compiler rounds in between must not depend on masks.
    exact = {"enable_fp_fusion": False} if kernel == "fwd" else {}
    return {"C": head_dim, "BLOCK_C": block_c, **dict(zip(names, settings, strict=True)), **exact}


def launch_settings(kernel: str, query: Tensor, window: int | None) -> dict[str, Any]:
    """The constants of a launch."""
    return {**block_settings(kernel, query.shape[2], query.dtype), "HAS_WINDOW": window is not None,
            "UPCAST": is_interpreted() and query.dtype == torch.bfloat16}


def packed_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float,
    window: int | None, has_splits: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, C], and log2 sum_j 2^(s_ij log2 e) as [Hq, N] float32, in one launch.

    Args:
        has_splits: A sequence may have more than SPLIT tokens. Changes no bits.
    """
    (N, Hq, _), B = query.shape, len(cu_seqlens) - 1
    query, key, value = (dense_channels(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(Hq, N, dtype=torch.float32, device=query.device)
    settings = launch_settings("fwd", query, window)
    num_tiles = N // settings["BLOCK_M"] + B
    if N > 0:
        _packed_attention_fwd_kernel[(num_tiles * Hq,)](
            query, key, value, cu_seqlens.contiguous(), out, lse, B, N, num_tiles, Hq,
            Hq // key.shape[1], window or 0, scale * math.log2(math.e), *query.stride()[:2],
            *key.stride()[:2], *value.stride()[:2], *out.stride()[:2], SPLIT=SPLIT,
            HAS_SPLITS=has_splits, **settings,
        )
    return out, lse


def packed_attention_bwd(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, out: Tensor,
    lse: Tensor, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in two launches."""
    (N, Hq, _), Hk, B = query.shape, key.shape[1], len(cu_seqlens) - 1
    query, key, value, dout = (dense_channels(x) for x in (query, key, value, dout))
    cu_seqlens = cu_seqlens.contiguous()
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
        _packed_attention_dquery_kernel[(num_tiles * Hq,)](
            query, key, value, cu_seqlens, out, lse, dout, delta, dquery, B, N, num_tiles, Hq,
            Hq // Hk, window or 0, *scales, *inputs, *out.stride()[:2], *dout.stride()[:2],
            *dquery.stride()[:2], **settings,
        )
        _packed_attention_dkey_kernel[((N // key_settings["BLOCK_N"] + B) * Hk,)](
            query, key, value, cu_seqlens, lse, dout, delta, dkey, dvalue, B, N, Hk, Hq // Hk,
            window or 0, *scales, *inputs, *dout.stride()[:2], *dkey.stride()[:2], **key_settings,
        )
    return dquery, dkey, dvalue


def dense_channels(x: Tensor) -> Tensor:
    """x, or a copy where its channels are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("fastrl_kernels::packed_attention", mutates_args=())
def _fwd_op(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float,
    window: int | None, has_splits: bool = True,
) -> tuple[Tensor, Tensor]:
    return packed_attention_fwd(query, key, value, cu_seqlens, scale, window, has_splits)


@_fwd_op.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    N, Hq, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(Hq, N, dtype=torch.float32)


@torch.library.custom_op("fastrl_kernels::packed_attention_bwd", mutates_args=())
def _bwd_op(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, out: Tensor,
    lse: Tensor, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return packed_attention_bwd(dout, query, key, value, cu_seqlens, out, lse, scale, window)


@_bwd_op.register_fake
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class _PackedAttention(torch.autograd.Function):
    """Keeps inputs, output and one number per token and head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float,
        window: int | None, has_splits: bool,
    ) -> Tensor:
        run = _fwd_op if torch.compiler.is_compiling() else packed_attention_fwd
        out, lse = run(query, key, value, cu_seqlens, scale, window, has_splits)
        ctx.save_for_backward(query, key, value, cu_seqlens, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        run = _bwd_op if torch.compiler.is_compiling() else packed_attention_bwd
        query, key, value, cu_seqlens, out, lse = ctx.saved_tensors
        gradients = run(dout, query, key, value, cu_seqlens, out, lse, ctx.scale, ctx.window)
        return *gradients, None, None, None, None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None,
) -> Tensor:
    """fastrl.ops.packed_attention on this backend.

    Args:
        max_seqlen: A window this long cuts nothing, and sums of up to SPLIT tokens are not split;
            no other use.
    """
    if window is not None and window >= max_seqlen:
        window = None
    result: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, cu_seqlens, scale, window, max_seqlen > SPLIT
    )
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    return attention_aot_cases(
        {"fwd": _packed_attention_fwd_kernel, "dquery": _packed_attention_dquery_kernel,
         "dkey": _packed_attention_dkey_kernel}, every)


def attention_aot_cases(kernels: dict[str, Any], every: bool) -> list[AotCase]:
    """The cases of the three kernels of an attention with gradients; see aot_cases."""
    types = {
        "cu_seqlens_ptr": "*i64:16", "prefixes_ptr": "*i64:16", "lse_ptr": "*fp32:16",
        "delta_ptr": "*fp32:16",
        **{name: "i32" for name in ("num_sequences", "num_segments", "num_tokens", "num_tiles",
                                    "num_heads", "num_kv_heads", "group", "window")},
        **{f"stride_{x}_{d}": "i32:16" for d in "nh"
           for x in ("query", "key", "value", "out", "dout", "dquery", "dkey")},
        "scale": "fp32", "scale_log2": "fp32",
    }
    pointers = ("query_ptr", "key_ptr", "value_ptr", "out_ptr", "dout_ptr", "dquery_ptr",
                "dkey_ptr", "dvalue_ptr")
    torch_types = dict(zip(DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
    cases = itertools.product(kernels, DTYPES, (16, 32, 64, 80, 128, 256) if every else (128,),
                              (False, True) if every else (False,),
                              (False, True) if every else (True,))
    return [
        (kernels[kernel], {**types, **{name: f"*{dtype}:16" for name in pointers}},
         {**block_settings(kernel, head_dim, torch_types[dtype]), "HAS_WINDOW": has_window,
          "UPCAST": False,
          **({"SPLIT": SPLIT, "HAS_SPLITS": has_splits} if kernel == "fwd" else {})})
        for kernel, dtype, head_dim, has_window, has_splits in cases
        if kernel == "fwd" or not (every and has_splits)
    ]
