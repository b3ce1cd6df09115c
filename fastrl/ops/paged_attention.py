"""paged_attention: attention of new tokens over keys and values that lie in pages.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= p_i, j > p_i - window

p_i is the position of query i: the last query of a sequence stands at kv_len - 1.
Shape letters: N query tokens, B sequences, S cached tokens of a sequence, Hq and Hk query and KV
heads, C channels per head, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_values
from fastrl.dense_attention import attend_dense, visible_keys
from fastrl.environment import checks_values
from fastrl.errors import ShapeError
from fastrl.ops.packed_attention import kernel_limits
from fastrl.paged_plan import PagedPlan

# Triton first on a GPU, before any has measured it: the torch path asks the device for lengths in
# every pass, so a decode step waits for it and no CUDA graph can hold one. flash_attn comes second:
# the bits of a sequence depend on the batch there.
PREFERENCE = ("triton", "flash", "torch")
FLASH_PAGE_UNIT = 256
"""Tokens of a page of flash_attn are a multiple of this."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Sequences of a decode step that begin with the same pages. They stand beside each other."""

    groups: Tensor
    """[G, 2] int64, the first sequence of a group and how many there are; 0, 0: no group."""
    shared_lens: Tensor
    """[B] int64, tokens in the pages that a sequence shares with its group, whole pages; 0 where
    it is in none. A sequence of a group has more tokens cached, or none at all."""


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
        visible = visible_keys(positions, torch.arange(kv_len, device=query.device), window)
        scores = scale * (query[begin:end].transpose(0, 1) @ key.transpose(1, 2))  # [Hq, q, S]
        probs = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[begin:end] = (probs @ value).transpose(0, 1)
    return out


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
            depends on the arguments other than query, layer, scale and window, checks and the
            choice of torch included. Triton needs none.
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
    if plan is not None and plan.is_settled:
        return attend_dense(query, kv_pages, layer, page_table, kv_lens, cu_seqlens_q, max_seqlen_q,
                            scale, window, plan)
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
    return attend_dense(
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
