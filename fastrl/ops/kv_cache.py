"""write_kv, rotary_write_kv, copy_pages: what changes the pages of a KV cache.

    slot = page * page_size + offset
    kv_pages[page, layer, 0, offset] = key_n,  kv_pages[page, layer, 1, offset] = value_n

Shape letters: N tokens, L layers, Hq and Hk query and KV heads, C channels per head, R rotary ones,
F pages that are copied.
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_range
from fastrl.environment import checks_values
from fastrl.errors import ShapeError
from fastrl.ops.norm import rms_norm_reference
from fastrl.ops.rotary import check_angles, check_head_weights, rotate
from fastrl.paged_plan import PagedPlan, Places

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")


def write_kv_reference(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    """write_kv, one token at a time."""
    page_size = kv_pages.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            kv_pages[page, layer, 0, offset] = key[row]
            kv_pages[page, layer, 1, offset] = value[row]


def rotary_write_kv_reference(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, epsilon: float = 0.0,
) -> Tensor:
    """rotary_write_kv in plain torch: norms, rotation, write_kv, one after the other."""
    turned, value = _turn(heads, kv_pages.shape[4], cos, sin, q_weight, k_weight, epsilon)
    write_kv_reference(turned[:, -value.shape[1]:], value, kv_pages, layer, slot_mapping)
    return turned[:, :-value.shape[1]]


def copy_pages_reference(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """copy_pages in plain torch."""
    kv_pages.index_copy_(0, targets, kv_pages.index_select(0, sources))


def _turn(
    heads: Tensor, num_kv_heads: int, cos: Tensor | None, sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Queries with keys [N, Hq + Hk, C], normalised and turned, and values [N, Hk, C]."""
    turned, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if q_weight is not None and k_weight is not None:
        query, key = turned[:, :-num_kv_heads], turned[:, -num_kv_heads:]
        turned = torch.cat((rms_norm_reference(query, q_weight, epsilon=epsilon),
                            rms_norm_reference(key, k_weight, epsilon=epsilon)), dim=1)
    if cos is not None and sin is not None:
        turned = rotate(turned, cos, sin)
    return turned, value


def _check_pages(op: str, kv_pages: Tensor) -> None:
    if kv_pages.dim() != 6 or kv_pages.shape[2] != 2 or not kv_pages.is_contiguous():
        raise ShapeError(
            f"{op}: expected kv_pages [num_pages, L, 2, page_size, Hk, C], contiguous, got "
            f"{list(kv_pages.shape)} with strides {list(kv_pages.stride())}"
        )


def _check_place(op: str, x: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor) -> None:
    """What is written for tokens x [N, ...] has a place in the pages."""
    if slot_mapping.shape != x.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ShapeError(
            f"{op}: expected slot_mapping [{x.shape[0]}] int64, got "
            f"{list(slot_mapping.shape)} {slot_mapping.dtype}"
        )
    if not 0 <= layer < kv_pages.shape[1]:
        raise ShapeError(f"{op}: expected a layer from 0 to {kv_pages.shape[1] - 1}, got {layer}")
    check_device(op, {"kv_pages": kv_pages, "keys": x, "slot_mapping": slot_mapping})
    check_range(op, kv_pages.shape[0] * kv_pages.shape[3], lowest=-1, slot_mapping=slot_mapping)


def _check(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    _check_pages("write_kv", kv_pages)
    if key.shape != value.shape or key.shape[1:] != kv_pages.shape[4:]:
        raise ShapeError(
            f"write_kv: expected key and value [N, {kv_pages.shape[4]}, {kv_pages.shape[5]}] as "
            f"the pages hold them, got {list(key.shape)} and {list(value.shape)}"
        )
    if key.dtype != kv_pages.dtype or value.dtype != kv_pages.dtype:
        raise ShapeError(
            f"write_kv: expected key and value in {kv_pages.dtype}, the dtype of the pages, got "
            f"{key.dtype} and {value.dtype}"
        )
    check_device("write_kv", {"key": key, "value": value})
    _check_place("write_kv", key, kv_pages, layer, slot_mapping)


def _check_heads(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, cos: Tensor | None,
    sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
) -> None:
    op = "rotary_write_kv"
    _check_pages(op, kv_pages)
    num_kv_heads, num_channels = kv_pages.shape[4:]
    if heads.dim() != 3 or heads.shape[1] <= 2 * num_kv_heads or heads.shape[2] != num_channels \
            or heads.dtype != kv_pages.dtype:
        raise ShapeError(
            f"{op}: expected heads [N, Hq + 2 * {num_kv_heads}, {num_channels}] in "
            f"{kv_pages.dtype}, as the pages hold keys and values, got {list(heads.shape)} in "
            f"{heads.dtype}")
    if (cos is None) != (sin is None) or (q_weight is None) != (k_weight is None):
        raise ShapeError(f"{op}: expected both of cos and sin, and both of q_weight and k_weight, "
                         "or neither")
    if cos is not None and sin is not None:
        check_angles(op, heads, cos, sin)
    if q_weight is not None and k_weight is not None:
        check_head_weights(op, heads, (q_weight, k_weight))
    _check_place(op, heads, kv_pages, layer, slot_mapping)


def _check_copy(kv_pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    op = "copy_pages"
    _check_pages(op, kv_pages)
    if sources.dim() != 1 or sources.shape != targets.shape \
            or not sources.dtype == targets.dtype == torch.int64:
        raise ShapeError(f"{op}: expected sources and targets [F] int64, got "
                         f"{list(sources.shape)} {sources.dtype} and {list(targets.shape)} "
                         f"{targets.dtype}")
    check_device(op, {"kv_pages": kv_pages, "sources": sources, "targets": targets})
    check_range(op, kv_pages.shape[0], sources=sources, targets=targets)
    if torch.compiler.is_compiling() or not checks_values():
        return
    if len(set(targets.tolist()) - set(sources.tolist())) < len(targets):
        raise ShapeError(f"{op}: expected targets that differ, and none that is a source; got "
                         f"sources {sources.tolist()} and targets {targets.tolist()}")


def write_kv(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, *,
    plan: PagedPlan | None = None, backend: str | None = None,
) -> None:
    """Write one key and one value per token into the cache, in place.

        kv_pages[slot // page_size, layer, (0, 1), slot % page_size] = key, value

    Args:
        key, value: [N, Hk, C], dtype of the pages.
        kv_pages: [num_pages, L, 2, page_size, Hk, C], contiguous, changed in place. No gradient.
        layer: Index into L.
        slot_mapping: [N] int64, slots without repetition; -1 writes nothing.
        plan: One object for all layers of a pass; see paged_attention.
        backend: See fastrl.backends.
    Raises:
        ShapeError: when shapes or dtypes do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes 2 * N * Hk * C elements.
    Source: Kwon et al. 2023 (arXiv 2309.06180), pages; the layout with all layers of a page
        together makes copying a page one contiguous move.
    Example:
        >>> pages = torch.zeros(2, 1, 2, 4, 1, 1)
        >>> write_kv(torch.ones(1, 1, 1), torch.ones(1, 1, 1), pages, 0, torch.tensor([6]))
        >>> int(pages[1, 0, 0, 2]), int(pages.sum())
        (1, 2)
    """
    if plan is not None and plan.is_settled and plan.places is not None:
        _write_kv_places(key, value, kv_pages, layer, plan.places)
        return
    _check(key, value, kv_pages, layer, slot_mapping)
    name = choose("write_kv", "kv_cache", PREFERENCE, key.device.type, key.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import kv_cache

        kv_cache.write_kv(key, value, kv_pages, layer, slot_mapping)
    elif name == "cuda":
        from fastrl_kernels.cuda import kv_cache as cuda_kv_cache

        cuda_kv_cache.write_kv(key, value, kv_pages, layer, slot_mapping)
    else:
        _write_kv_torch(key.detach(), value.detach(), kv_pages, layer, slot_mapping, plan)


def _write_kv_torch(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor,
    plan: PagedPlan | None,
) -> None:
    if not kv_pages.is_cpu:
        _write_kv_unseen(key, value, kv_pages, layer, slot_mapping)
        return
    places = Places.of(slot_mapping, kv_pages.shape[3])
    if plan is not None:
        plan.places = places
    _write_kv_places(key, value, kv_pages, layer, places)


def _write_kv_places(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, places: Places
) -> None:
    if places.rows is not None:
        key, value = key[places.rows], value[places.rows]
    for side, x in zip(kv_pages.select(1, layer).unbind(1), (key, value), strict=True):
        side.index_put_((places.pages, places.offsets), x)


def _write_kv_unseen(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    """The same without a look at the slots, for which the host would have to wait.

    A token without a slot repeats what the first token that has one writes; where none has one,
    slot 0 gets what it holds.
    """
    if not len(slot_mapping):
        return
    is_written = slot_mapping >= 0
    own = torch.arange(len(slot_mapping), device=slot_mapping.device)
    rows = torch.where(is_written, own, is_written.int().argmax())
    slots = slot_mapping[rows].clamp(min=0)
    places = slots // kv_pages.shape[3], slots % kv_pages.shape[3]
    for side, x in enumerate((key, value)):
        target = kv_pages[:, layer, side]
        target.index_put_(places, torch.where(is_written.any(), x[rows], target[places]))


def rotary_write_kv(
    heads: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, *,
    cos: Tensor | None = None, sin: Tensor | None = None, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, epsilon: float = 0.0, plan: PagedPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """From the merged projections: norms and rotation of queries and keys, then `write_kv`.

        query, key = qk_norm_rotary(query, key)        kv_pages[slot, layer] = key, value

    The numbers are those of `qk_norm_rotary` or `rotary` on the same backend, bit for bit.

    Args:
        heads: [N, Hq + 2 Hk, C], dtype of the pages: queries, keys, values.
        kv_pages: [num_pages, L, 2, page_size, Hk, C], contiguous, changed in place. No gradient.
        layer: Index into L.
        slot_mapping: [N] int64, slots without repetition; -1 writes nothing.
        cos, sin: [N, 1, R/2], dtype of heads; None: nothing turns.
        q_weight, k_weight: [C] each, dtype of heads; None: no norms.
        epsilon: Added to the mean square.
        plan: One object for all layers of a pass; see paged_attention.
        backend: See fastrl.backends.
    Returns:
        [N, Hq, C], the queries; a view where memory allows it.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes N * (Hq + 2 Hk) * C elements in one launch.
    Source: see qk_norm_rotary and write_kv.
    Example:
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 6.0]]])  # query, key, value
        >>> pages, one = torch.zeros(1, 1, 2, 1, 1, 2), torch.ones(1, 1, 1)
        >>> slots = torch.tensor([0])
        >>> rotary_write_kv(heads, pages, 0, slots, cos=0 * one, sin=one)  # a quarter turn
        tensor([[[0., 1.]]])
        >>> pages.flatten().tolist()
        [-2.0, 0.0, 5.0, 6.0]
    """
    if plan is not None and plan.is_settled and plan.places is not None:
        turned, value = _turn(heads, kv_pages.shape[4], cos, sin, q_weight, k_weight, epsilon)
        _write_kv_places(turned[:, -value.shape[1]:], value, kv_pages, layer, plan.places)
        return turned[:, :-value.shape[1]]
    _check_heads(heads, kv_pages, layer, slot_mapping, cos, sin, q_weight, k_weight)
    name = choose("rotary_write_kv", "kv_cache", PREFERENCE, heads.device.type, heads.dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import kv_cache

        return kv_cache.rotary_write_kv(heads, kv_pages, layer, slot_mapping, cos, sin, q_weight,
                                        k_weight, epsilon)
    if name == "cuda":
        from fastrl_kernels.cuda import kv_cache as cuda_kv_cache

        return cuda_kv_cache.rotary_write_kv(heads, kv_pages, layer, slot_mapping, cos, sin,
                                             q_weight, k_weight, epsilon)
    turned, value = _turn(heads, kv_pages.shape[4], cos, sin, q_weight, k_weight, epsilon)
    turned, value = turned.detach(), value.detach()
    _write_kv_torch(turned[:, -value.shape[1]:], value, kv_pages, layer, slot_mapping,
                    plan)
    return turned[:, :-value.shape[1]]


def copy_pages(
    kv_pages: Tensor, sources: Tensor, targets: Tensor, *, backend: str | None = None
) -> None:
    """Copy whole pages, all layers at once, in place: the fork of many sequences.

        kv_pages[targets] = kv_pages[sources]

    Args:
        kv_pages: [num_pages, L, 2, page_size, Hk, C], contiguous, changed in place. No gradient.
        sources: [F] int64, pages.
        targets: [F] int64, pages without repetition, none of them a source.
        backend: See fastrl.backends.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes F pages in one launch; torch holds a copy of them besides.
    Source: Kwon et al. 2023 (arXiv 2309.06180), copy on write.
    Example:
        >>> pages = torch.arange(3.0).view(3, 1, 1, 1, 1, 1).repeat(1, 1, 2, 1, 1, 1)
        >>> copy_pages(pages, torch.tensor([2]), torch.tensor([0]))
        >>> pages[:, 0, 0].flatten().tolist()
        [2.0, 1.0, 2.0]
    """
    _check_copy(kv_pages, sources, targets)
    name = choose("copy_pages", "kv_cache", PREFERENCE, kv_pages.device.type, kv_pages.dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import kv_cache

        kv_cache.copy_pages(kv_pages, sources, targets)
    elif name == "cuda":
        from fastrl_kernels.cuda import kv_cache as cuda_kv_cache

        cuda_kv_cache.copy_pages(kv_pages, sources, targets)
    else:
        copy_pages_reference(kv_pages, sources, targets)
