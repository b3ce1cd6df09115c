"""Attention by torch's dense kernel: what packed_attention shares with the torch path of
paged_attention, and that path, which takes sequences of about one length in one call.

Shape letters as there; b sequences of a group, q query tokens of each.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.environment import checks_values
from fastrl.paged_plan import PagedGroup, PagedPlan

CPU_LENGTH_UNIT = 16
"""The dense CPU kernel takes exponentials 16 keys at a time and the last few of a row one by one,
with other last bits. Rows of whole sixteens have the same bits whatever the length around them."""
CHUNK_BYTES = 2**21
"""Keys and values gathered at a time: what is gathered is read again while it is in cache."""
SLOT_UNIT = 16
"""Cached tokens are rounded up to a multiple of this, and further by `size_bucket`."""
DENSE_BLOCK = 512
"""Keys that the dense CPU kernel takes at a time."""
MIN_EXACT_ROWS = 4
"""Query rows of the dense CPU kernel: with one or two it makes products of another kind, with other
last bits than those of a whole prompt."""


def whole_units(length: int, device: torch.device) -> int:
    """Tokens that a sequence of `length` is padded to for the dense kernel."""
    return -(-length // CPU_LENGTH_UNIT) * CPU_LENGTH_UNIT if device.type == "cpu" else length


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """[..., q, S] bool, True where the query may see the key, from [..., q] and [S]."""
    distance = query_positions[..., None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend_dense(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, scale: float, window: int | None, plan: PagedPlan,
) -> Tensor:
    """paged_attention in torch: sequences of one shape together, as many as fit CHUNK_BYTES.

    Args:
        plan: Made empty; filled by the first layer of a pass.
        Others: As paged_attention has them, checked.
    Returns:
        [N, Hq, C], rows of zeros where nothing is cached.
    """
    if plan.groups is None:
        plan.is_settled = query.is_cpu and not checks_values() and not torch.is_grad_enabled()
        plan.groups = list(_groups(query, kv_pages, page_table, kv_lens, cu_seqlens_q,
                                   max_seqlen_q, plan))
        every_row = torch.arange(len(query), device=query.device)
        plan.is_one_group = (len(plan.groups) == 1
                             and torch.equal(plan.groups[0].rows_q, every_row))
    if plan.is_one_group:
        return _attend_group(query, kv_pages, layer, plan.groups[0], scale, window)
    out = torch.zeros_like(query)
    for group in plan.groups:
        chunk = query.index_select(0, group.rows_q)
        out.index_copy_(0, group.rows_q,
                        _attend_group(chunk, kv_pages, layer, group, scale, window))
    return out


def _attend_group(
    query: Tensor, kv_pages: Tensor, layer: int, group: PagedGroup, scale: float,
    window: int | None,
) -> Tensor:
    """[b * q, Hq, C] from the query rows [b * q, Hq, C] of a group."""
    query = query.view(-1, group.length_q, *query.shape[1:])  # [b, q, Hq, C]
    key, value = _gather(kv_pages, layer, group)
    attend = _attend_prompt if group.is_prompt else _attend_last
    return attend(query, key, value, group, scale, window).flatten(0, 1)


def _groups(
    query: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, plan: PagedPlan,
) -> Iterator[PagedGroup]:
    """Sequences by (query tokens, cached tokens rounded up, whether the query is all there is)."""
    page_size, num_kv_heads, channels = kv_pages.shape[3:]
    slot_bytes = 2 * num_kv_heads * channels * kv_pages.element_size()
    lengths_q = ([1] * len(kv_lens) if max_seqlen_q == 1
                 else (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist())
    members: defaultdict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for row, (length_q, kv_len) in enumerate(zip(lengths_q, kv_lens.tolist(), strict=True)):
        if length_q and kv_len:
            num_units = size_bucket(-(-kv_len // SLOT_UNIT))
            members[length_q, num_units, length_q == kv_len > 1].append(row)
    for (length_q, num_units, is_prompt), rows in members.items():
        if is_prompt:
            num_rows = num_slots = whole_units(length_q, query.device)
        else:
            num_rows = length_q * (query.shape[1] // num_kv_heads)
            num_rows = max(num_rows, MIN_EXACT_ROWS) if plan.is_exact else num_rows
            num_slots = num_units * SLOT_UNIT
        num_rows, num_slots = _dense_shape(num_rows, num_slots, channels)
        if plan.slots_are_finite and num_slots <= page_size and channels % 4 == 0:
            batches = _arithmetic_runs(page_table[rows, 0].tolist(), rows)
        else:
            step = max(1, CHUNK_BYTES // (num_slots * slot_bytes))
            batches = [(rows[i : i + step], None) for i in range(0, len(rows), step)]
        for batch, in_place in batches:
            yield _group(torch.tensor(batch, device=query.device), length_q, is_prompt, num_rows,
                         num_slots, page_size, page_table, kv_lens, cu_seqlens_q, in_place)


def _arithmetic_runs(pages: list[int], rows: list[int]) -> list[tuple[list[int], slice | None]]:
    """Rows in the order of their pages, cut where these are no longer equally far apart."""
    runs: list[tuple[list[int], slice | None]] = []
    for page, row in sorted(zip(pages, rows, strict=True)):
        members, taken = runs[-1] if runs else ([], None)
        if taken is None or page < taken.stop or len(members) > 1 and page != (
                taken.stop - 1 + taken.step):
            runs.append(([row], slice(page, page + 1, 1)))
        else:
            members.append(row)
            runs[-1] = (members, slice(taken.start, page + 1, page - taken.stop + 1))
    return runs


def _group(
    rows: Tensor, length_q: int, is_prompt: bool, num_rows: int, num_slots: int, page_size: int,
    page_table: Tensor, kv_lens: Tensor, cu_seqlens_q: Tensor, in_place: slice | None,
) -> PagedGroup:
    """The sequences `rows` [b] as one dense call."""
    offsets = torch.arange(length_q, device=rows.device)
    lens = kv_lens[rows]
    num_pages = -(-num_slots // page_size)
    missing = max(0, num_pages - page_table.shape[1])
    pages = F.pad(page_table[rows], (0, missing))[:, :num_pages]
    slots = torch.arange(num_slots, device=rows.device)
    pages = pages.masked_fill(slots[::page_size] >= lens[:, None], 0)
    first_unwritten = min(int(lens.min()), num_slots)
    unwritten = (slots[first_unwritten:] >= lens[:, None])[..., None, None]
    return PagedGroup(
        rows_q=(cu_seqlens_q[rows, None] + offsets).flatten(), length_q=length_q,
        is_prompt=is_prompt, kv_lens=lens, pages=pages.flatten(), in_place=in_place,
        num_rows=num_rows, num_slots=num_slots, first_unwritten=first_unwritten,
        unwritten=unwritten)


def size_bucket(size: int) -> int:
    """`size` rounded up to three significant bits: fewer groups, at most a quarter more."""
    unit = 1 << max(0, size.bit_length() - 3)
    return -(-size // unit) * unit


def slots_read(kv_len: int) -> int:
    """Slots that a page needs for the dense CPU kernel to read a whole sequence in it."""
    return size_bucket(-(-kv_len // SLOT_UNIT)) * SLOT_UNIT + 3  # see _dense_shape


def _gather(kv_pages: Tensor, layer: int, group: PagedGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [b, S, Hk, C] of a group, 0 past the length of a sequence."""
    page_slots = min(kv_pages.shape[3], group.num_slots)
    if group.in_place is not None:
        if not group.layers:
            group.layers.extend(kv_pages[group.in_place, :, :, :page_slots].unbind(1))
        key, value = group.layers[layer].unbind(1)
        return key, value
    sides = []
    for side in (0, 1):
        gathered = kv_pages[:, layer, side, :page_slots].index_select(0, group.pages)
        gathered = gathered.view(len(group.kv_lens), -1, *gathered.shape[2:])[:, :group.num_slots]
        # A slot that was never written may hold NaN, and 0 * NaN would reach the sum over values.
        gathered[:, group.first_unwritten :].masked_fill_(group.unwritten, 0)
        sides.append(gathered)
    return sides[0], sides[1]


def _attend_prompt(
    query: Tensor, key: Tensor, value: Tensor, group: PagedGroup, scale: float,
    window: int | None,
) -> Tensor:
    """[b, q, Hq, C] from query tokens [b, q, Hq, C] that are all there is in the cache."""
    mask = None
    if window is not None and window < group.length_q:
        visible = visible_keys(torch.arange(group.num_rows, device=query.device),
                           torch.arange(group.num_slots, device=query.device), window)
        mask = visible[None, None]
    out = _dense(query.transpose(1, 2), key, value, mask, group.num_rows, scale)
    return out.transpose(1, 2)


def _attend_last(
    query: Tensor, key: Tensor, value: Tensor, group: PagedGroup, scale: float,
    window: int | None,
) -> Tensor:
    """[b, q, Hq, C] from query tokens [b, q, Hq, C] that are the last in the cache."""
    batch_size, length, num_heads, channels = query.shape
    num_kv_heads = key.shape[2]
    num_shared = num_heads // num_kv_heads
    if window not in group.masks:
        hidden = ~_last_mask(group, num_shared, window)
        group.masks[window] = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(
            hidden, -torch.inf)
    # The query heads of a KV head stand beside each other as if they were query tokens.
    query = query.view(batch_size, length, num_kv_heads, num_shared, channels)
    query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
    num_rows = query.shape[2]
    if num_rows < group.num_rows:
        if not group.padded:
            group.padded.append(F.pad(query, (0, 0, 0, group.num_rows - num_rows)))
        else:
            group.padded[0].narrow(2, 0, num_rows).copy_(query)
        query = group.padded[0]
    out = _dense(query, key, value, group.masks[window], group.num_rows, scale)
    out = out.narrow(2, 0, num_rows).reshape(batch_size, num_kv_heads, num_shared, length, channels)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _last_mask(group: PagedGroup, num_shared: int, window: int | None) -> Tensor:
    """[b, 1, rows, S] bool for `num_shared` query heads per KV head, padded rows seeing all."""
    device = group.kv_lens.device
    offsets = torch.arange(group.length_q, device=device)
    positions = group.kv_lens[:, None] - group.length_q + offsets
    visible = visible_keys(positions, torch.arange(group.num_slots, device=device), window)
    mask = visible[:, None].repeat(1, 1, num_shared, 1)
    return F.pad(mask, (0, 0, 0, group.num_rows - mask.shape[2]), value=True)


def _dense_shape(num_rows: int, num_slots: int, channels: int) -> tuple[int, int]:
    """Query rows and key slots, a few more than given, that the dense CPU kernel should get.

    The products in it take other code, with other last bits, for data that does not begin at a
    multiple of four numbers, and where data begins depends on the batch: every thread gets a
    scratch space of rows * (slots + 2 + channels) numbers, at most DENSE_BLOCK slots, one after
    the other. So that is made a multiple of four here, and `_dense` does the same for channels.
    """
    if num_rows >= 32:  # taken in blocks of an even size
        return num_rows, num_slots
    channels = -(-channels // 4) * 4
    if num_slots + 3 <= DENSE_BLOCK:
        while num_rows * (num_slots + 2 + channels) % 4:
            num_slots += 1
    while num_rows * (min(num_slots, DENSE_BLOCK) + 2 + channels) % 4:
        num_rows += 1
    return num_rows, num_slots


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, num_rows: int, scale: float
) -> Tensor:
    """[b, H, q, C] from query [b, H, q, C] and key, value [b, S, Hk, C], with `num_rows` rows.

    Args:
        mask: [b or 1, 1, num_rows, S], bool or added to the scores; None: causal from the first
            key on.
    """
    batch_size, _, length, channels = query.shape
    if channels % 4:
        query, key, value = (F.pad(x, (0, -channels % 4)) for x in (query, key, value))
    if length < num_rows:
        query = F.pad(query, (0, 0, 0, num_rows - length))
    if query.shape[0] * query.shape[1] == 1:  # a single product would be cut among the threads
        query, key, value = (x.expand(2, -1, -1, -1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        scale=scale, enable_gqa=query.shape[1] != key.shape[2],
    )
    return out if out.shape == (batch_size, query.shape[1], length, channels) else out[
        :batch_size, :, :length, :channels]
