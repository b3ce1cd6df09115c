"""paged_attention on a GPU: the newest tokens of each sequence over its keys and values in pages.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j      over j <= p_i, j > p_i - window

A tile of queries holds the heads that share a KV head beside each other: those of one token in a
decode step, of several in a prompt. Keys are walked as in packed_attention, in the same blocks and
splits, counted from the sequence's first token; the place of each key of a block is looked up in
the page table, so pages may have any size and lie anywhere. In a decode step a program takes one
split, and one program per token and head merges the splits from left to right, unless max_kv_len
allows but one; a prompt's program walks and merges them all. Blocks, splits, rows per warp and the
order of every sum are those of packed_attention, so that a token has the same bits on each way and
in every batch. The grid needs no length from the device: a program beyond its sequence returns.

Where sequences begin with the same pages, a launch before the others walks the whole blocks of
these pages once for all of them: a tile holds their queries beside each other, and what each row
has after a split, or after the last shared block of one, is kept as that split's part. The launches
that follow go on from there.

Floor of a decode step in half precision: 4 Hk C bytes per cached token and layer, 4 Hq C per
sequence; Hq / Hk operations per byte. Splits add 8 Hq (C + 2) bytes per SPLIT cached tokens, 2 %
at Hq = 4 Hk. A shared token is read once for a group, and each of its sequences moves another
8 Hq (C + 2) bytes, unless the shared blocks end with a split. Limits: float32, float16, bfloat16;
C up to 256. Source: Dao 2023 (arXiv 2307.08691) and the Flash-Decoding note of the same group;
heads as rows and static grids after vLLM's unified attention (arXiv 2511.11581).
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton import packed_attention as packed
from fastrl_kernels.triton.packed_attention import (
    attend_tile,
    end_block,
    find_tile,
    first_key_block,
    merge_split,
    no_keys,
    visible,
)
from fastrl_kernels.triton.support import DTYPES, AotCase, is_interpreted, supports

__all__ = ["aot_cases", "paged_attention", "supports"]

DECODE_ROWS = 64
"""Rows of a tile of one token, most of them empty. A product of fewer is another instruction on
Hopper, and puts parts of a row into several warps, which add up its numbers in another order."""


@triton.jit  # type: ignore[untyped-decorator]
def load_cached(  # type: ignore[no-untyped-def]
    ptr, places, is_cached, C: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] of a KV head, 0 beyond the last cached token and channel."""
    channels = tl.arange(0, BLOCK_C)
    is_inside = is_cached[:, None]
    if C < BLOCK_C:
        is_inside = is_inside & (channels < C)[None, :]
    x = tl.load(ptr + places[:, None] + channels[None, :], mask=is_inside, other=0.0)
    if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly
        x = x.to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def attend_block(  # type: ignore[no-untyped-def]
    q, key_ptr, value_ptr, pages_ptr, block, kv_len, positions, maximum, total, acc, window,
    scale_log2, stride_page, stride_slot,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):
    """One step of the running softmax over the block of keys that begins at `block`."""
    keys = block + tl.arange(0, BLOCK_N)
    is_cached = keys < kv_len
    page = tl.load(pages_ptr + keys // PAGE_SIZE, mask=is_cached, other=0)
    places = page.to(tl.int64) * stride_page + (keys % PAGE_SIZE).to(tl.int64) * stride_slot
    k = load_cached(key_ptr, places, is_cached, C, BLOCK_C, UPCAST)
    v = load_cached(value_ptr, places, is_cached, C, BLOCK_C, UPCAST)
    keep = visible(positions, keys, window, HAS_WINDOW)
    return attend_tile(q, k, v, keep, maximum, total, acc, scale_log2, MASKED)


@triton.jit  # type: ignore[untyped-decorator]
def _paged_attention_fwd_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, page_table_ptr, kv_lens_ptr, cu_seqlens_ptr, shared_lens_ptr,
    out_ptr, parts_ptr, maximum_ptr, total_ptr,
    num_sequences, num_tiles, num_programs, num_heads, group, window, scale_log2,
    stride_query_n, stride_query_h, stride_page, stride_slot, stride_kv_h, stride_table_b,
    stride_out_n, stride_out_h,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, IS_DECODE: tl.constexpr,
    IS_PART: tl.constexpr, HAS_SPLITS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    pid = tl.program_id(0)  # KV heads of a tile are neighbours
    tile = pid // num_programs
    if IS_DECODE:
        sequence = tile
        row = 0
        start = tl.load(cu_seqlens_ptr + sequence)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    else:
        sequence, start, length, row = find_tile(num_tiles - 1 - tile, cu_seqlens_ptr,
                                                 num_sequences, BLOCK_Q)
    if row >= length:
        return
    kv_len = tl.load(kv_lens_ptr + sequence).to(tl.int32)
    past = kv_len - length  # tokens before the first query
    first = first_key_block(past + row, window, HAS_WINDOW, BLOCK_N)
    end = tl.minimum(kv_len, past + row + BLOCK_Q)
    # Blocks before the diagonal are seen whole by every row, unless a window cuts them.
    diagonal = first if HAS_WINDOW else tl.maximum(past + row + 1, 0) // BLOCK_N * BLOCK_N
    if IS_PART:
        split = tl.program_id(1)
        first = tl.maximum(first, split * SPLIT)
        end = tl.minimum(end, split * SPLIT + SPLIT)
        if first >= end:
            return
        diagonal = tl.minimum(tl.maximum(diagonal, first), end)
    if HAS_PREFIX:  # the keys before `shared` have been walked
        shared = tl.load(shared_lens_ptr + sequence).to(tl.int32) // BLOCK_N * BLOCK_N
        is_begun = (first < shared) & (first < end)
        first = tl.maximum(first, shared)
        diagonal = tl.maximum(diagonal, first)
        if IS_PART:
            if first >= end:
                return
    chunks = tl.cdiv(group, HEADS)
    kv_head = (pid % num_programs // chunks).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    token = row + rows // HEADS
    member = pid % num_programs % chunks * HEADS + rows % HEADS
    head = kv_head * group + member
    is_row = (rows < BLOCK_Q * HEADS) & (token < length) & (member < group)
    channels = tl.arange(0, BLOCK_C)
    is_inside = is_row[:, None]
    if C < BLOCK_C:
        is_inside = is_inside & (channels < C)[None, :]
    place = (start + token) * stride_query_n + head * stride_query_h
    q = tl.load(query_ptr + place[:, None] + channels[None, :], mask=is_inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    positions = past + token
    key_ptr += kv_head * stride_kv_h
    value_ptr += kv_head * stride_kv_h
    pages_ptr = page_table_ptr + sequence.to(tl.int64) * stride_table_b
    maximum, total, acc = no_keys(BLOCK_M, BLOCK_C)
    if IS_PART or HAS_PREFIX:
        part = ((start + token) * num_heads + head) * tl.num_programs(1) + tl.program_id(1)
    if HAS_PREFIX:
        is_known = is_row & is_begun
        maximum = tl.load(maximum_ptr + part, mask=is_known, other=float("-inf"))
        total = tl.load(total_ptr + part, mask=is_known, other=0.0)
        acc = tl.load(parts_ptr + part[:, None] * C + channels[None, :],
                      mask=is_inside & is_known[:, None], other=0.0)
    if HAS_SPLITS:
        whole_maximum, whole_total, whole_acc = no_keys(BLOCK_M, BLOCK_C)
    for block in range(first, diagonal, BLOCK_N):
        maximum, total, acc = attend_block(
            q, key_ptr, value_ptr, pages_ptr, block, kv_len, positions, maximum, total, acc, window,
            scale_log2, stride_page, stride_slot, C, BLOCK_C, BLOCK_N, PAGE_SIZE, HAS_WINDOW,
            UPCAST, False)
        if HAS_SPLITS:
            whole_maximum, whole_total, whole_acc, maximum, total, acc = end_block(
                block + BLOCK_N, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT)
    for block in range(diagonal, end, BLOCK_N):
        maximum, total, acc = attend_block(
            q, key_ptr, value_ptr, pages_ptr, block, kv_len, positions, maximum, total, acc, window,
            scale_log2, stride_page, stride_slot, C, BLOCK_C, BLOCK_N, PAGE_SIZE, HAS_WINDOW,
            UPCAST, True)
        if HAS_SPLITS:
            whole_maximum, whole_total, whole_acc, maximum, total, acc = end_block(
                block + BLOCK_N, whole_maximum, whole_total, whole_acc, maximum, total, acc, SPLIT)
    if HAS_SPLITS:
        maximum, total, acc = merge_split(
            whole_maximum, whole_total, whole_acc, maximum, total, acc)
    if IS_PART:
        tl.store(maximum_ptr + part, maximum, mask=is_row)
        tl.store(total_ptr + part, total, mask=is_row)
        tl.store(parts_ptr + part[:, None] * C + channels[None, :], acc, mask=is_inside)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # nothing in the cache: 0
        place = (start + token) * stride_out_n + head * stride_out_h
        tl.store(out_ptr + place[:, None] + channels[None, :], acc, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _paged_attention_prefix_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, page_table_ptr, kv_lens_ptr, cu_seqlens_ptr, shared_lens_ptr,
    groups_ptr, parts_ptr, maximum_ptr, total_ptr,
    num_programs, num_heads, group, window, scale_log2,
    stride_query_n, stride_query_h, stride_page, stride_slot, stride_kv_h, stride_table_b,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    pid = tl.program_id(0)
    leader = tl.load(groups_ptr + pid // num_programs * 2)
    count = tl.load(groups_ptr + pid // num_programs * 2 + 1).to(tl.int32)
    if count <= 0:
        return
    begin = tl.program_id(1) * SPLIT
    end = tl.load(shared_lens_ptr + leader).to(tl.int32) // BLOCK_N * BLOCK_N
    end = tl.minimum(end, begin + SPLIT)
    if begin >= end:
        return
    chunks = tl.cdiv(group, HEADS)
    kv_head = (pid % num_programs // chunks).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    head_of_group = pid % num_programs % chunks * HEADS + rows % HEADS
    head = kv_head * group + head_of_group
    channels = tl.arange(0, BLOCK_C)
    key_ptr += kv_head * stride_kv_h
    value_ptr += kv_head * stride_kv_h
    pages_ptr = page_table_ptr + leader * stride_table_b
    for member in range(0, count, BLOCK_Q):
        number = member + rows // HEADS
        is_row = (rows < BLOCK_Q * HEADS) & (number < count) & (head_of_group < group)
        token = tl.load(cu_seqlens_ptr + leader + number, mask=is_row, other=0)
        is_row = is_row & (tl.load(cu_seqlens_ptr + leader + number + 1, mask=is_row, other=0)
                           > token)
        positions = tl.load(kv_lens_ptr + leader + number, mask=is_row, other=0).to(tl.int32) - 1
        is_row = is_row & (positions >= 0)
        # A row whose window begins later keeps its bits in the blocks before it.
        earliest = tl.min(tl.where(is_row, positions, 2**31 - 1), axis=0)
        first = tl.maximum(begin, first_key_block(earliest, window, HAS_WINDOW, BLOCK_N))
        first = tl.where(earliest == 2**31 - 1, end, first)  # nobody is left
        is_inside = is_row[:, None]
        if C < BLOCK_C:
            is_inside = is_inside & (channels < C)[None, :]
        place = token * stride_query_n + head * stride_query_h
        q = tl.load(query_ptr + place[:, None] + channels[None, :], mask=is_inside, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        maximum, total, acc = no_keys(BLOCK_M, BLOCK_C)
        for block in range(first, end, BLOCK_N):
            maximum, total, acc = attend_block(
                q, key_ptr, value_ptr, pages_ptr, block, end, positions, maximum, total, acc,
                window, scale_log2, stride_page, stride_slot, C, BLOCK_C, BLOCK_N, PAGE_SIZE,
                HAS_WINDOW, UPCAST, HAS_WINDOW)
        part = (token * num_heads + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(maximum_ptr + part, maximum, mask=is_row)
        tl.store(total_ptr + part, total, mask=is_row)
        tl.store(parts_ptr + part[:, None] * C + channels[None, :], acc, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _paged_attention_merge_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, maximum_ptr, total_ptr, kv_lens_ptr, cu_seqlens_ptr, out_ptr,
    num_heads, num_splits, window,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    pid = tl.program_id(0)
    sequence = pid // num_heads
    token = tl.load(cu_seqlens_ptr + sequence)
    if tl.load(cu_seqlens_ptr + sequence + 1) == token:
        return
    kv_len = tl.load(kv_lens_ptr + sequence).to(tl.int32)
    row = token * num_heads + pid % num_heads
    channels = tl.arange(0, BLOCK_C)
    maximum, total, acc = no_keys(1, BLOCK_C)
    first = first_key_block(kv_len - 1, window, HAS_WINDOW, BLOCK_N) // SPLIT
    for split in range(first, tl.cdiv(kv_len, SPLIT)):
        number = row * num_splits + split + tl.arange(0, 1)
        part = tl.load(parts_ptr + number[:, None] * C + channels[None, :],
                       mask=(channels < C)[None, :], other=0.0)
        maximum, total, acc = merge_split(maximum, total, acc, tl.load(maximum_ptr + number),
                                          tl.load(total_ptr + number), part)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + (row + tl.arange(0, 1))[:, None] * C + channels[None, :], acc,
             mask=(channels < C)[None, :])


def block_settings(
    head_dim: int, dtype: torch.dtype, group: int, is_decode: bool
) -> dict[str, Any]:
    """Blocks of packed_attention but for the rows, with as many rows in a warp as there."""
    settings = packed.block_settings("fwd", head_dim, dtype)
    rows = min(DECODE_ROWS, settings["BLOCK_M"]) if is_decode else settings["BLOCK_M"]
    num_warps = settings["num_warps"] * rows // settings["BLOCK_M"]
    return {**settings, "BLOCK_M": rows, "num_warps": num_warps, "HEADS": min(group, rows),
            "SPLIT": packed.SPLIT}


def paged_attention_fwd(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, max_kv_len: int, scale: float, window: int | None,
    groups: Tensor | None, shared_lens: Tensor | None,
) -> Tensor:
    """[N, Hq, C], contiguous: one launch, two for a decode step over more than SPLIT tokens, and
    one more before them where there are groups."""
    (N, Hq, C), B, Hk = query.shape, len(kv_lens), kv_pages.shape[4]
    query = query if query.stride(2) == 1 else query.contiguous()
    kv_pages = kv_pages if kv_pages.stride(5) == 1 else kv_pages.contiguous()
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    kv_lens, cu_seqlens_q = kv_lens.contiguous(), cu_seqlens_q.contiguous()
    key, value = kv_pages[:, layer, 0], kv_pages[:, layer, 1]  # [pages, page_size, Hk, C]
    out = torch.empty(N, Hq, C, dtype=query.dtype, device=query.device)
    if N == 0 or B == 0:
        return out
    is_decode, has_prefix = max_seqlen_q == 1, shared_lens is not None
    settings = {**block_settings(C, query.dtype, Hq // Hk, is_decode),
                "PAGE_SIZE": kv_pages.shape[3], "HAS_WINDOW": window is not None,
                "UPCAST": is_interpreted() and query.dtype == torch.bfloat16}
    num_splits = triton.cdiv(max_kv_len, settings["SPLIT"])
    is_part = is_decode and num_splits > 1
    num_parts = num_splits if is_part else 1
    parts, maximum, total = out, out, out
    if is_part or has_prefix:
        parts = torch.empty(N, Hq, num_parts, C, dtype=torch.float32, device=query.device)
        maximum = torch.empty(N, Hq, num_parts, dtype=torch.float32, device=query.device)
        total = torch.empty_like(maximum)
    num_tiles = B if is_decode else N // (settings["BLOCK_M"] // settings["HEADS"]) + B
    num_programs = Hk * triton.cdiv(Hq // Hk, settings["HEADS"])
    shared_lens = kv_lens if shared_lens is None else shared_lens.contiguous()
    inputs = (query, key, value, page_table, kv_lens, cu_seqlens_q, shared_lens)
    sizes = (num_programs, Hq, Hq // Hk, window or 0, scale * math.log2(math.e))
    strides = (*query.stride()[:2], *key.stride()[:3], page_table.stride(0))
    if groups is not None and len(groups) > 0:
        _paged_attention_prefix_kernel[(len(groups) * num_programs, num_parts)](
            *inputs, groups.contiguous(), parts, maximum, total, *sizes, *strides, **settings)
    _paged_attention_fwd_kernel[(num_tiles * num_programs, num_parts)](
        *inputs, out, parts, maximum, total, B, num_tiles, *sizes, *strides, *out.stride()[:2],
        IS_DECODE=is_decode, IS_PART=is_part, HAS_SPLITS=not is_part and num_splits > 1,
        HAS_PREFIX=has_prefix, **settings)
    if is_part:
        _paged_attention_merge_kernel[(B * Hq,)](
            parts, maximum, total, kv_lens, cu_seqlens_q, out, Hq, num_splits, window or 0,
            C=C, BLOCK_C=settings["BLOCK_C"], BLOCK_N=settings["BLOCK_N"], SPLIT=settings["SPLIT"],
            HAS_WINDOW=window is not None, num_warps=1, enable_fp_fusion=False,
        )
    return out


@torch.library.custom_op("fastrl_kernels::paged_attention", mutates_args=())
def _fwd_op(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, max_kv_len: int, scale: float, window: int | None,
    groups: Tensor | None, shared_lens: Tensor | None,
) -> Tensor:
    return paged_attention_fwd(query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q,
                               max_seqlen_q, max_kv_len, scale, window, groups, shared_lens)


@_fwd_op.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape)


def paged_attention(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, *, max_seqlen_q: int, max_kv_len: int, scale: float,
    window: int | None = None, groups: Tensor | None = None, shared_lens: Tensor | None = None,
) -> Tensor:
    """fastrl.ops.paged_attention on this backend; `groups` and `shared_lens` of its prefixes."""
    run = _fwd_op if torch.compiler.is_compiling() else paged_attention_fwd
    result: Tensor = run(query.detach(), kv_pages, layer, page_table, kv_lens, cu_seqlens_q,
                         max_seqlen_q, max_kv_len, scale, window, groups, shared_lens)
    return result


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        **{f"{name}_ptr": "*i64:16" for name in (
            "page_table", "kv_lens", "cu_seqlens", "shared_lens", "groups")},
        **{f"{name}_ptr": "*fp32:16" for name in ("parts", "maximum", "total")},
        **{name: "i32" for name in ("num_sequences", "num_tiles", "num_programs", "num_heads",
                                    "num_splits", "group", "window", "stride_table_b")},
        **{f"stride_{name}": "i32:16" for name in (
            "query_n", "query_h", "page", "slot", "kv_h", "out_n", "out_h")},
        "scale_log2": "fp32",
    }
    torch_types = dict(zip(DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
    # (IS_DECODE, IS_PART, HAS_SPLITS, HAS_PREFIX)
    kinds = ((True, True, False, True), (False, False, True, False), (True, True, False, False),
             (True, False, False, True), (True, False, False, False), (False, False, False, False))
    pages = ((16, 16), (64, 16), (80, 16), (128, 1), (128, 16), (128, 256), (256, 16))
    cases: list[AotCase] = []
    for dtype, (C, page_size), has_window, (is_decode, is_part, has_splits, has_prefix) in (
            itertools.product(DTYPES, pages if every else ((128, 16),),
                              (False, True) if every else (False,), kinds if every else kinds[:2])):
        pointers = {f"{x}_ptr": f"*{dtype}:16" for x in ("query", "key", "value", "out")}
        settings = {**block_settings(C, torch_types[dtype], 4, is_decode), "PAGE_SIZE": page_size,
                    "HAS_WINDOW": has_window, "UPCAST": False}
        cases.append((_paged_attention_fwd_kernel, {**types, **pointers}, {
            **settings, "IS_DECODE": is_decode, "IS_PART": is_part, "HAS_SPLITS": has_splits,
            "HAS_PREFIX": has_prefix}))
        if is_part and has_prefix:
            cases.append((_paged_attention_prefix_kernel, {**types, **pointers}, settings))
        if is_part and has_prefix and page_size == 16:
            cases.append((_paged_attention_merge_kernel, {**types, **pointers}, {
                "C": C, "BLOCK_C": max(16, triton.next_power_of_2(C)), "BLOCK_N": 64,
                "SPLIT": packed.SPLIT, "HAS_WINDOW": has_window, "num_warps": 1,
                "enable_fp_fusion": False}))
    return cases
