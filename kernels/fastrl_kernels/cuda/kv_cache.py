"""write_kv, rotary_write_kv and copy_pages on a GPU, one launch each; see csrc/kv_cache.cu.

    kv_pages[slot / page_size, layer, (0, 1), slot % page_size] = key, value

Limits: float32, float16, bfloat16, one type for all tensors; up to 2^31 heads of all tokens.
"""

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of

__all__ = ["copy_pages", "rotary_write_kv", "supports", "write_kv"]


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these kernels refuse, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {str(dtype).removeprefix('torch.')}"
    return None


def write_heads(
    query: Tensor | None, key: Tensor, value: Tensor, kv_pages: Tensor, layer: int,
    slot_mapping: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, epsilon: float,
) -> Tensor:
    """The one launch; returns the queries, contiguous, empty where there are none."""
    # Strides between tokens and between heads are free.
    heads = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    others = [None if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin)]
    query_out = key.new_empty(key[:, :0].shape if query is None else query.shape)
    compiled_ops().write_kv(
        *heads, *others, epsilon, kv_pages, layer, slot_mapping.contiguous(),
        None if query is None else query_out, stream_of(kv_pages))
    return query_out


def split_heads(heads: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values."""
    heads, first = heads.detach(), heads.shape[1] - 2 * num_kv_heads
    return heads[:, :first], heads[:, first:-num_kv_heads], heads[:, -num_kv_heads:]


# What a compiled graph holds; eager code calls the functions above, which cost the host less.
@torch.library.custom_op("fastrl_cuda::written_kv", mutates_args=("kv_pages",))
def _write_op(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    write_heads(None, key, value, kv_pages, layer, slot_mapping, None, None, None, None, 0.0)


@_write_op.register_fake
def _(*arguments: object) -> None:
    return None


@torch.library.custom_op("fastrl_cuda::turned_and_written_kv", mutates_args=("kv_pages",))
def _rotary_write_op(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, cos: Tensor | None,
    sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, epsilon: float,
) -> Tensor:
    return write_heads(*split_heads(heads, kv_pages.shape[4]), kv_pages, layer, slot_mapping, cos,
                       sin, q_weight, k_weight, epsilon)


@_rotary_write_op.register_fake
def _(heads: Tensor, kv_pages: Tensor, *others: object) -> Tensor:
    return heads.new_empty(heads.shape[0], heads.shape[1] - 2 * kv_pages.shape[4], heads.shape[2])


@torch.library.custom_op("fastrl_cuda::copied_pages", mutates_args=("kv_pages",))
def _copy_op(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    copy_blocks(kv_pages, sources, targets)


@_copy_op.register_fake
def _(*arguments: object) -> None:
    return None


def copy_blocks(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """The one launch of copy_pages."""
    compiled_ops().copy_pages(kv_pages, sources.contiguous(), targets.contiguous(),
                              stream_of(kv_pages))


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
