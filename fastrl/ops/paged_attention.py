"""paged_attention: attention of new tokens over keys and values that lie in pages.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= p_i, j > p_i - window

p_i is the position of query i: the last query of a sequence stands at kv_len - 1.
Shape letters: N query tokens, B sequences, S cached tokens of a sequence, Hq and Hk query and KV
heads, C channels per head, L layers.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_values
from fastrl.environment import checks_values
from fastrl.errors import ShapeError
from fastrl.ops.packed_attention import kernel_limits, whole_units

# Triton first on a GPU, before any has measured it: the torch path asks the device for lengths in
# every pass, so a decode step waits for it and no CUDA graph can hold one. flash_attn comes second:
# the bits of a sequence depend on the batch there.
PREFERENCE = ("triton", "flash", "torch")
CHUNK_BYTES = 2**21
"""Keys and values gathered at a time: what is gathered is read again while it is in cache."""
SLOT_UNIT = 16
"""Cached tokens are rounded up to a multiple of this, and further by `size_bucket`."""
FLASH_PAGE_UNIT = 256
"""Tokens of a page of flash_attn are a multiple of this."""
DENSE_BLOCK = 512
"""Keys that the dense CPU kernel takes at a time."""
MIN_EXACT_ROWS = 4
"""Query rows of the dense CPU kernel: with one or two it makes products of another kind, with other
last bits than those of a whole prompt."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Sequences of a decode step that begin with the same pages. They stand beside each other."""

    groups: Tensor
    """[G, 2] int64, the first sequence of a group and how many there are; 0, 0: no group."""
    shared_lens: Tensor
    """[B] int64, tokens in the pages that a sequence shares with its group, whole pages; 0 where
    it is in none. A sequence of a group has more tokens cached, or none at all."""


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Sequences of one shape, taken in one dense call."""

    rows_q: Tensor
    """[b * q] int64, their rows of the query."""
    length_q: int
    """q, query tokens of each."""
    is_prompt: bool
    """The query tokens are all there is in the cache."""
    kv_lens: Tensor
    """[b] int64."""
    pages: Tensor
    """[b * pages] int64, page 0 where a sequence has none."""
    in_place: slice | None
    """The pages, where each sequence has one and keys and values are read where they lie."""
    num_rows: int
    """Query rows of the dense call for each KV head (of a prompt: for each query head)."""
    num_slots: int
    """S, cached tokens of the dense call."""
    first_unwritten: int
    """The first slot that some sequence has not written."""
    unwritten: Tensor
    """[b, S - first_unwritten, 1, 1] bool."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """By window: [b, 1, num_rows, S], 0 where a row may see a slot, else -inf."""


@dataclass(slots=True)
class PagedPlan:
    """What the layers of one pass share. Made empty; the first layer fills it."""

    slots_are_finite: bool = False
    """No slot of the pages holds NaN or infinity, written or not. Then a CPU reads keys and values
    of sequences that have one page where they lie."""
    is_exact: bool = False
    """On a CPU, float32 rows over at most 256 tokens get the bits of packed_attention: for heads
    without others beside them, up to half more time."""
    groups: list[PagedGroup] | None = None
    """Of the torch path."""
    is_one_group: bool = False
    """There is one group, of all rows in their order."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Of flash_attn: lengths and pages as it takes them."""


def paged_attention_reference(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, *, max_seqlen_q: int, max_kv_len: int, scale: float,
    window: int | None = None, prefixes: SharedPrefixes | None = None,
) -> Tensor:
    """paged_attention, one sequence at a time, the shared pages as its group's first has them."""
    page_size, num_kv_heads = kv_pages.shape[3], kv_pages.shape[4]
    if prefixes is not None:
        page_table = page_table.clone()
        for first, count in prefixes.groups.tolist():
            num_shared = int(prefixes.shared_lens[first]) // page_size if count else 0
            page_table[first : first + count, :num_shared] = page_table[first, :num_shared].clone()
    out = torch.zeros_like(query)
    bounds = cu_seqlens_q.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if kv_len == 0 or begin == end:
            continue
        pages = page_table[row, : -(-kv_len // page_size)]
        key, value = (kv_pages[pages, layer, side].flatten(0, 1)[:kv_len].transpose(0, 1)
                      .repeat_interleave(query.shape[1] // num_kv_heads, dim=0) for side in (0, 1))
        positions = torch.arange(kv_len - (end - begin), kv_len, device=query.device)
        visible = _visible(positions, torch.arange(kv_len, device=query.device), window)
        scores = scale * (query[begin:end].transpose(0, 1) @ key.transpose(1, 2))  # [Hq, q, S]
        probs = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[begin:end] = (probs @ value).transpose(0, 1)
    return out


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """[..., q, S] bool, True where the query may see the key, from [..., q] and [S]."""
    distance = query_positions[..., None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _check(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, max_kv_len: int, window: int | None,
    prefixes: SharedPrefixes | None,
) -> None:
    if query.dim() != 3 or kv_pages.dim() != 6 or kv_pages.shape[2] != 2:
        raise ShapeError(
            f"paged_attention: expected query [N, Hq, C] and kv_pages [num_pages, L, 2, "
            f"page_size, Hk, C], got {list(query.shape)} and {list(kv_pages.shape)}"
        )
    if 0 in kv_pages.shape[3:]:
        raise ShapeError(f"paged_attention: expected pages with at least one slot, head and "
                         f"channel, got kv_pages {list(kv_pages.shape)}")
    if query.shape[2] != kv_pages.shape[5] or query.shape[1] % kv_pages.shape[4]:
        raise ShapeError(
            f"paged_attention: expected query heads in multiples of {kv_pages.shape[4]} with "
            f"{kv_pages.shape[5]} channels, as the pages hold them, got {list(query.shape)}"
        )
    if query.dtype != kv_pages.dtype:
        raise ShapeError(
            f"paged_attention: expected query in {kv_pages.dtype}, the dtype of the pages, got "
            f"{query.dtype}"
        )
    if kv_pages.device != query.device:
        check_device("paged_attention", {"query": query, "kv_pages": kv_pages})
    if not 0 <= layer < kv_pages.shape[1]:
        raise ShapeError(f"paged_attention: expected a layer from 0 to {kv_pages.shape[1] - 1}, "
                         f"got {layer}")
    for name, index in (("page_table", page_table), ("kv_lens", kv_lens),
                        ("cu_seqlens_q", cu_seqlens_q)):
        if index.dtype != torch.int64 or index.device != query.device:
            raise ShapeError(f"paged_attention: expected {name} int64 on {query.device}, got "
                             f"{index.dtype} on {index.device}")
    batch_size = kv_lens.shape[0]
    if page_table.dim() != 2 or page_table.shape[0] != batch_size \
            or cu_seqlens_q.shape != (batch_size + 1,):
        raise ShapeError(
            f"paged_attention: expected page_table [B, pages] and cu_seqlens_q [B+1] for "
            f"{batch_size} kv_lens, got {list(page_table.shape)} and {list(cu_seqlens_q.shape)}"
        )
    if max_kv_len > page_table.shape[1] * kv_pages.shape[3]:
        raise ShapeError(
            f"paged_attention: {page_table.shape[1]} pages of {kv_pages.shape[3]} tokens hold no "
            f"max_kv_len of {max_kv_len}; give page_table more columns"
        )
    if max_seqlen_q < 1 or (window is not None and window < 1):
        raise ShapeError(
            f"paged_attention: max_seqlen_q and window must be at least 1, got {max_seqlen_q} "
            f"and {window}"
        )
    if prefixes is not None:
        _check_prefixes(prefixes, page_table, kv_lens, max_seqlen_q, kv_pages.shape[3])
    check_values("paged_attention", query=query)


def _check_prefixes(
    prefixes: SharedPrefixes, page_table: Tensor, kv_lens: Tensor, max_seqlen_q: int,
    page_size: int,
) -> None:
    """Shapes and types; what the numbers say where FASTRL_CHECK is 1."""
    groups, shared_lens = prefixes.groups, prefixes.shared_lens
    for name, index in (("groups", groups), ("shared_lens", shared_lens)):
        if index.dtype != torch.int64 or index.device != kv_lens.device:
            raise ShapeError(f"paged_attention: expected prefixes.{name} int64 on "
                             f"{kv_lens.device}, got {index.dtype} on {index.device}")
    if groups.dim() != 2 or groups.shape[1] != 2 or shared_lens.shape != kv_lens.shape:
        raise ShapeError(
            f"paged_attention: expected prefixes with groups [G, 2] and shared_lens "
            f"{list(kv_lens.shape)}, got {list(groups.shape)} and {list(shared_lens.shape)}")
    if max_seqlen_q != 1:
        raise ShapeError(f"paged_attention: prefixes are of steps of one token per sequence, got "
                         f"max_seqlen_q {max_seqlen_q}; leave them out for prompts")
    if torch.compiler.is_compiling() or not checks_values():
        return
    expected = torch.zeros_like(shared_lens)
    for first, count in groups.tolist():
        rows = slice(first, first + count)
        if not 0 <= first <= first + count <= len(kv_lens) or count and expected[rows].any():
            raise ShapeError(f"paged_attention: expected groups of sequences 0 to "
                             f"{len(kv_lens) - 1} without one in two of them, got {first} and "
                             f"{count} more, itself included (FASTRL_CHECK=1)")
        if count:
            expected[rows] = shared = int(shared_lens[first])
            pages = page_table[rows, : shared // page_size]
            lens = kv_lens[rows]
            if shared < 1 or shared % page_size or (pages != pages[:1]).any() \
                    or ((lens <= shared) & (lens > 0)).any():
                raise ShapeError(
                    f"paged_attention: expected sequences {first} to {first + count - 1} to share "
                    f"their first {shared} tokens in whole pages of {page_size} and to have more "
                    f"tokens or none, got lengths {lens.tolist()} and pages {pages.tolist()} "
                    "(FASTRL_CHECK=1)")
    if not torch.equal(expected, shared_lens):
        raise ShapeError(f"paged_attention: expected shared_lens of the groups, "
                         f"{expected.tolist()}, got {shared_lens.tolist()} (FASTRL_CHECK=1)")


def paged_attention(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, *, max_seqlen_q: int, max_kv_len: int, scale: float,
    window: int | None = None, prefixes: SharedPrefixes | None = None,
    plan: PagedPlan | None = None, backend: str | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of each sequence over its cached tokens.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= p_i, j > p_i - window

    The keys and values of the new tokens are in the cache already (`write_kv`). The bits of a
    sequence's output depend on nothing but that sequence: on a CPU work is grouped by length,
    rounded; in Triton they are also those of packed_attention in Triton. flash promises neither.

    Args:
        query: [N, Hq, C]. Sequence b owns rows cu_seqlens_q[b] to cu_seqlens_q[b+1], which are
            its last tokens. Query head h reads KV head h // (Hq / Hk).
        kv_pages: [num_pages, L, 2, page_size, Hk, C]. Slots past kv_len may hold anything.
        layer: Index into L.
        page_table: [B, pages] int64. Entries past the last page in use may hold anything.
        kv_lens: [B] int64. Cached tokens, the new ones included; 0 gives rows of zeros.
        cu_seqlens_q: [B+1] int64.
        max_seqlen_q, max_kv_len: The longest of each, known to the host.
        scale: Factor of the scores, usually C ** -0.5.
        window: Keys a query may see, itself included; None sees all before it.
        prefixes: What may be read once for several sequences of a decode step. No bit of the
            result depends on it. Triton reads once what it can; the others read the table of each.
        plan: One object for all layers of a pass, so that the first does for all of them what
            depends on the arguments other than query, layer, scale and window. Triton needs none.
        backend: See fastrl.backends.
    Returns:
        [N, Hq, C], dtype of query. No gradient.
    Raises:
        ShapeError: when shapes or dtypes do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads 2 * Hk * C elements per cached token; on a CPU they are copied once, a few MiB at
        a time, unless `plan.slots_are_finite` and a page is as long as a sequence.
    Source: Kwon et al. 2023 (arXiv 2309.06180).
    Example:
        >>> pages = torch.ones(1, 1, 2, 4, 1, 2)
        >>> one = torch.tensor([1])
        >>> paged_attention(torch.ones(1, 1, 2), pages, 0, one[:, None] - 1, one,
        ...                 torch.tensor([0, 1]), max_seqlen_q=1, max_kv_len=1, scale=1.0)
        tensor([[[1., 1.]]])
    """
    _check(query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q, max_kv_len,
           window, prefixes)
    name = choose("paged_attention", "paged_attention", PREFERENCE, query.device.type, query.dtype,
                  backend, _limits(kv_pages))
    plan = plan or PagedPlan()
    if name == "triton":
        from fastrl_kernels.triton import paged_attention as triton_kernels

        return triton_kernels.paged_attention(
            query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_kv_len=max_kv_len, scale=scale, window=window,
            groups=None if prefixes is None else prefixes.groups,
            shared_lens=None if prefixes is None else prefixes.shared_lens)
    if name == "flash":
        from fastrl_kernels.flash import paged_attention as flash_kernels

        return flash_kernels.paged_attention(
            query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            max_kv_len=max_kv_len, scale=scale, window=window, tables=plan.tables)
    return _paged_attention_torch(
        query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q, scale, window,
        plan,
    )


def _limits(kv_pages: Tensor) -> tuple[tuple[str, str], ...]:
    """(backend, reason) of the kernels that these pages rule out."""
    page_size, channels = kv_pages.shape[3], kv_pages.shape[5]
    limits = kernel_limits(channels)
    if page_size % FLASH_PAGE_UNIT:
        limits += (("flash", f"its pages hold a multiple of {FLASH_PAGE_UNIT} tokens, these hold "
                             f"{page_size}"),)
    return limits


def _paged_attention_torch(
    query: Tensor, kv_pages: Tensor, layer: int, page_table: Tensor, kv_lens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, scale: float, window: int | None, plan: PagedPlan,
) -> Tensor:
    """Sequences of one shape go together, as many at a time as fit CHUNK_BYTES."""
    if plan.groups is None:
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
    sides = []
    page_slots = min(kv_pages.shape[3], group.num_slots)
    for side in (0, 1):
        if group.in_place is not None:
            sides.append(kv_pages[group.in_place, layer, side, :page_slots])
            continue
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
        visible = _visible(torch.arange(group.num_rows, device=query.device),
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
    out = _dense(query, key, value, group.masks[window], group.num_rows, scale)
    out = out.reshape(batch_size, num_kv_heads, num_shared, length, channels)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _last_mask(group: PagedGroup, num_shared: int, window: int | None) -> Tensor:
    """[b, 1, rows, S] bool for `num_shared` query heads per KV head, padded rows seeing all."""
    device = group.kv_lens.device
    offsets = torch.arange(group.length_q, device=device)
    positions = group.kv_lens[:, None] - group.length_q + offsets
    visible = _visible(positions, torch.arange(group.num_slots, device=device), window)
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
    query = F.pad(query, (0, 0, 0, num_rows - length))
    if query.shape[0] * query.shape[1] == 1:  # a single product would be cut among the threads
        query, key, value = (x.expand(2, -1, -1, -1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        scale=scale, enable_gqa=query.shape[1] != key.shape[2],
    )
    return out[:batch_size, :, :length, :channels]
