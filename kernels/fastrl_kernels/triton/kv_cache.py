"""write_kv, rotary_write_kv and copy_pages on a GPU, one launch each.

    row = ((slot / page_size * L + layer) * 2 + side) * page_size + slot % page_size
    kv_pages[row] = key_n or value_n, [Hk, C]

A program takes one tile of heads of one token: of its queries, keys or values. Queries and keys go
through `turn_heads` of rotary.py, the device function of the trainer's rotary, so that both get the
same bits; values are copied. A token with slot -1 writes its query alone. Pages are copied in
blocks, all pages in one launch: a page is one contiguous block for all layers.
Bytes per element in half precision: 4, each read and written once. Offsets are int64: an arena may
exceed 2^31 elements. Limits: float32, float16, bfloat16. Source: Kwon et al. 2023 (arXiv
2309.06180) for pages.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.rotary import head_settings, load_angles, turn_heads, with_neighbours
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "copy_pages", "rotary_write_kv", "supports", "write_kv"]

PAGE_BLOCK = 8192
"""Elements of a page that a program copies."""


@triton.jit
def kv_place(  # type: ignore[no-untyped-def]
    slot, layer, side, num_layers, page_size, num_heads, head, num_channels,
):
    """Where a head begins in the pages; `slot` is int64, and so is all that meets it."""
    row = ((slot // page_size * num_layers + layer) * 2 + side) * page_size + slot % page_size
    return (row * num_heads + head) * num_channels


@triton.jit(do_not_specialize=["layer", "num_slots"])  # type: ignore[untyped-decorator]
def _write_kv_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr,
    q_out_ptr, kv_pages_ptr, layer, num_slots, num_layers, page_size, num_q_heads, num_kv_heads,
    num_turning, num_channels, epsilon, stride_query_n, stride_query_h, stride_key_n, stride_key_h,
    stride_value_n, stride_value_h, stride_cos_n, stride_sin_n, stride_slots,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_q_tiles = tl.cdiv(num_q_heads, BLOCK_H)
    num_kv_tiles = tl.cdiv(num_kv_heads, BLOCK_H)
    slot = tl.load(slots_ptr + token * stride_slots)
    is_written = (slot >= 0) & (slot < num_slots)
    pairs = tl.arange(0, BLOCK_HALF)
    cos = load_angles(cos_ptr, token, stride_cos_n, pairs, num_turning // 2)
    sin = load_angles(sin_ptr, token, stride_sin_n, pairs, num_turning // 2)
    if tile < num_q_tiles:
        first = tile * BLOCK_H
        turn_heads(query_ptr + token * stride_query_n + first.to(tl.int64) * stride_query_h,
                   q_out_ptr + (token * num_q_heads + first) * num_channels, q_weight_ptr,
                   tl.minimum(num_q_heads - first, BLOCK_H), stride_query_h, num_channels, cos,
                   sin, num_turning, num_channels, epsilon, True, HAS_NORM, HAS_ROTARY, HAS_REST,
                   BLOCK_H, BLOCK_HALF, BLOCK_REST)
    elif tile < num_q_tiles + num_kv_tiles:
        first = (tile - num_q_tiles) * BLOCK_H
        place = kv_place(slot, layer, 0, num_layers, page_size, num_kv_heads, first, num_channels)
        turn_heads(key_ptr + token * stride_key_n + first.to(tl.int64) * stride_key_h,
                   kv_pages_ptr + place, k_weight_ptr,
                   tl.minimum(num_kv_heads - first, BLOCK_H), stride_key_h, num_channels, cos, sin,
                   num_turning, num_channels, epsilon, is_written, HAS_NORM, HAS_ROTARY, HAS_REST,
                   BLOCK_H, BLOCK_HALF, BLOCK_REST)
    else:
        first = (tile - num_q_tiles - num_kv_tiles) * BLOCK_H
        place = kv_place(slot, layer, 1, num_layers, page_size, num_kv_heads, first, num_channels)
        turn_heads(value_ptr + token * stride_value_n + first.to(tl.int64) * stride_value_h,
                   kv_pages_ptr + place, k_weight_ptr, tl.minimum(num_kv_heads - first, BLOCK_H),
                   stride_value_h, num_channels, cos, sin, 0, num_channels, epsilon, is_written,
                   False, False, True, BLOCK_H, 1, BLOCK_C)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_pages_kernel(  # type: ignore[no-untyped-def]
    kv_pages_ptr, sources_ptr, targets_ptr, num_pages, page_numel, stride_sources, stride_targets,
    BLOCK: tl.constexpr,
):
    fork = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources_ptr + fork * stride_sources)
    target = tl.load(targets_ptr + fork * stride_targets)
    exists = (source >= 0) & (source < num_pages) & (target >= 0) & (target < num_pages)
    is_inside = exists & (places < page_numel)
    page = tl.load(kv_pages_ptr + source * page_numel + places, mask=is_inside)
    tl.store(kv_pages_ptr + target * page_numel + places, page, mask=is_inside)


def write_heads(
    query: Tensor | None, key: Tensor, value: Tensor, kv_pages: Tensor, layer: int,
    slot_mapping: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, epsilon: float,
) -> Tensor:
    """The one launch; returns the queries, contiguous, empty where there are none."""
    key, value = with_neighbours(key), with_neighbours(value)
    query = key[:, :0] if query is None else with_neighbours(query)
    num_tokens, num_q_heads, num_channels = query.shape
    num_kv_heads, num_turning = key.shape[1], 0
    q_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    angles = (key, key)
    if cos is not None and sin is not None:
        num_turning = 2 * cos.shape[-1]
        angles = (with_neighbours(cos), with_neighbours(sin))
    settings = head_settings(num_channels, num_turning)
    block = settings["BLOCK_H"]
    if num_tokens > 0:
        grid = (num_tokens, triton.cdiv(num_q_heads, block) + 2 * triton.cdiv(num_kv_heads, block))
        _write_kv_kernel[grid](
            query, key, value, key if q_weight is None else q_weight.contiguous(),
            key if k_weight is None else k_weight.contiguous(), *angles, slot_mapping, q_out,
            kv_pages, layer, kv_pages.shape[0] * kv_pages.shape[3], kv_pages.shape[1],
            kv_pages.shape[3], num_q_heads, num_kv_heads,
            num_turning, num_channels, epsilon, query.stride(0), query.stride(1), key.stride(0),
            key.stride(1), value.stride(0), value.stride(1), angles[0].stride(0),
            angles[1].stride(0), slot_mapping.stride(0), HAS_NORM=q_weight is not None,
            BLOCK_C=triton.next_power_of_2(num_channels), **settings,
        )
    return q_out


def split_heads(heads: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values."""
    heads, first = heads.detach(), heads.shape[1] - 2 * num_kv_heads
    return heads[:, :first], heads[:, first:-num_kv_heads], heads[:, -num_kv_heads:]


@torch.library.custom_op("fastrl_kernels::write_kv", mutates_args=("kv_pages",))
def _write_op(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    write_heads(None, key, value, kv_pages, layer, slot_mapping, None, None, None, None, 0.0)


@_write_op.register_fake
def _(*arguments: object) -> None:
    return None


@torch.library.custom_op("fastrl_kernels::rotary_write_kv", mutates_args=("kv_pages",))
def _rotary_write_op(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, cos: Tensor | None,
    sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, epsilon: float,
) -> Tensor:
    return write_heads(*split_heads(heads, kv_pages.shape[4]), kv_pages, layer, slot_mapping, cos,
                       sin, q_weight, k_weight, epsilon)


@_rotary_write_op.register_fake
def _(heads: Tensor, kv_pages: Tensor, *others: object) -> Tensor:
    return heads.new_empty(heads.shape[0], heads.shape[1] - 2 * kv_pages.shape[4], heads.shape[2])


@torch.library.custom_op("fastrl_kernels::copy_pages", mutates_args=("kv_pages",))
def _copy_op(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    copy_blocks(kv_pages, sources, targets)


@_copy_op.register_fake
def _(*arguments: object) -> None:
    return None


def copy_blocks(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """The one launch of copy_pages."""
    page_numel = kv_pages[:1].numel()
    if len(sources) > 0 and page_numel > 0:
        _copy_pages_kernel[(len(sources), triton.cdiv(page_numel, PAGE_BLOCK))](
            kv_pages, sources, targets, len(kv_pages), page_numel, sources.stride(0),
            targets.stride(0), BLOCK=PAGE_BLOCK, num_warps=8,
        )


def write_kv(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    """fastrl.ops.write_kv on this backend."""
    key, value = key.detach(), value.detach()
    if torch.compiler.is_compiling():
        _write_op(key, value, kv_pages, layer, slot_mapping)
    else:
        write_heads(None, key, value, kv_pages, layer, slot_mapping, None, None, None, None, 0.0)


def rotary_write_kv(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, cos: Tensor | None,
    sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, epsilon: float,
) -> Tensor:
    """fastrl.ops.rotary_write_kv on this backend; no copy where nothing happens to the queries."""
    if cos is None and q_weight is None:
        query, key, value = split_heads(heads, kv_pages.shape[4])
        write_kv(key, value, kv_pages, layer, slot_mapping)
        return query
    if torch.compiler.is_compiling():
        out: Tensor = _rotary_write_op(heads, kv_pages, layer, slot_mapping, cos, sin, q_weight,
                                       k_weight, epsilon)
        return out
    return write_heads(*split_heads(heads, kv_pages.shape[4]), kv_pages, layer, slot_mapping, cos,
                       sin, q_weight, k_weight, epsilon)


def copy_pages(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """fastrl.ops.copy_pages on this backend."""
    run = _copy_op if torch.compiler.is_compiling() else copy_blocks
    run(kv_pages, sources, targets)


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    tensors = ("query", "key", "value", "q_weight", "k_weight", "cos", "sin", "q_out", "kv_pages")
    strides = [f"stride_{x}_{d}" for x in ("query", "key", "value") for d in "nh"]
    # As in rotary.py, and a model whose heads do not turn.
    sizes = ((128, 128), (64, 64), (256, 64), (80, 20), (25, 10), (64, 0)) if every else (
        (128, 128),)
    cases: list[AotCase] = []
    for dtype, (channels, turning), has_norm in itertools.product(
            DTYPES, sizes, (True, False) if every else (True,)):
        aligned = ":16" if channels % 16 == 0 == turning % 16 else ""
        types = {**{f"{x}_ptr": f"*{dtype}{aligned}" for x in tensors},
                 **dict.fromkeys((*strides, "stride_cos_n", "stride_sin_n", "num_turning",
                                  "num_channels", "page_size"), f"i32{aligned}"),
                 **dict.fromkeys(("layer", "num_slots", "num_layers", "num_q_heads",
                                  "num_kv_heads"), "i32"),
                 "slots_ptr": "*i64", "epsilon": "fp32"}
        cases.append((_write_kv_kernel, types, {
            "stride_slots": 1, "HAS_NORM": has_norm, **head_settings(channels, turning),
            "BLOCK_C": triton.next_power_of_2(channels)}))
    cases += [(_copy_pages_kernel,
               {"kv_pages_ptr": f"*{dtype}:16", "sources_ptr": "*i64", "targets_ptr": "*i64",
                "num_pages": "i32", "page_numel": "i32:16"},
               {"stride_sources": 1, "stride_targets": 1, "BLOCK": PAGE_BLOCK, "num_warps": 8})
              for dtype in DTYPES]
    return cases
