"""write_kv: put new keys and values into the pages of a KV cache.

    slot = page * page_size + offset
    kv_pages[page, layer, 0, offset] = key_n,  kv_pages[page, layer, 1, offset] = value_n

Shape letters: N tokens, L layers, Hk KV heads, C channels per head.
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_range
from fastrl.errors import ShapeError

PREFERENCE = ("torch",)


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


def _check(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    if kv_pages.dim() != 6 or kv_pages.shape[2] != 2:
        raise ShapeError(
            f"write_kv: expected kv_pages [num_pages, L, 2, page_size, Hk, C], got "
            f"{list(kv_pages.shape)}"
        )
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
    if slot_mapping.shape != key.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ShapeError(
            f"write_kv: expected slot_mapping [{key.shape[0]}] int64, got "
            f"{list(slot_mapping.shape)} {slot_mapping.dtype}"
        )
    if not 0 <= layer < kv_pages.shape[1]:
        raise ShapeError(
            f"write_kv: expected a layer from 0 to {kv_pages.shape[1] - 1}, got {layer}"
        )
    check_range("write_kv", kv_pages.shape[0] * kv_pages.shape[3], lowest=-1,
                slot_mapping=slot_mapping)


def write_kv(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor, *,
    backend: str | None = None,
) -> None:
    """Write one key and one value per token into the cache, in place.

        kv_pages[slot // page_size, layer, (0, 1), slot % page_size] = key, value

    Args:
        key, value: [N, Hk, C], dtype of the pages.
        kv_pages: [num_pages, L, 2, page_size, Hk, C], changed in place. No gradient.
        layer: Index into L.
        slot_mapping: [N] int64, slots without repetition; -1 writes nothing.
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
    _check(key, value, kv_pages, layer, slot_mapping)
    choose("write_kv", "kv_cache", PREFERENCE, key.device.type, key.dtype, backend)
    _write_kv_torch(key, value, kv_pages, layer, slot_mapping)


def _write_kv_torch(
    key: Tensor, value: Tensor, kv_pages: Tensor, layer: int, slot_mapping: Tensor
) -> None:
    if (slot_mapping < 0).any():
        rows = (slot_mapping >= 0).nonzero().squeeze(-1)
        key, value, slot_mapping = key[rows], value[rows], slot_mapping[rows]
    page_size = kv_pages.shape[3]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    kv_pages[:, layer, 0].index_put_((pages, offsets), key)
    kv_pages[:, layer, 1].index_put_((pages, offsets), value)
