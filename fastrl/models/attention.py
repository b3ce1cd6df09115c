"""Attention states: what a forward pass attends to, behind one call for every model.

A model calls `attention(layer, query, key, value, scale=..., window=None)` after rotary. N packed
tokens, Hq and Hk query and KV heads, C channels per head, B sequences.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fastrl.ops import packed_attention, paged_attention, write_kv
from fastrl.ops.paged_attention import PagedPlan


class Attention(Protocol):
    """What every attention state can do."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            layer: Index of the calling layer, from 0.
            query: [N, Hq, C].
            key, value: [N, Hk, C].
            scale: Factor of the scores.
            window: Token i sees tokens j with i - window < j <= i; None: all before it.
        Returns:
            [N, Hq, C], dtype of query.
        """


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Training and scoring: every token sees the tokens before it in its own sequence."""

    cu_seqlens: Tensor
    """[B+1] int64, where each sequence begins; the last entry is N."""
    max_seqlen: int
    """Tokens of the longest sequence."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; differentiable. See `Attention`."""
        return packed_attention(query, key, value, self.cu_seqlens, max_seqlen=self.max_seqlen,
                                scale=scale, window=window)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Prefill and decode: writes keys and values into pages, then attends to what lies there."""

    kv_pages: Tensor
    """[num_pages, L, 2, page_size, Hk, C], changed in place."""
    page_table: Tensor
    """[B, pages] int64, the pages of each sequence in order."""
    slot_mapping: Tensor
    """[N] int64, `page * page_size + offset` of each new token; -1 writes nothing."""
    cu_seqlens_q: Tensor
    """[B+1] int64, where the new tokens of each sequence begin."""
    kv_lens: Tensor
    """[B] int64, tokens of each sequence, the new ones included."""
    max_seqlen_q: int
    """Most new tokens of a sequence."""
    max_kv_len: int
    """Tokens of the longest sequence."""
    plan: PagedPlan = field(default_factory=PagedPlan)
    """What all layers of the pass share."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; no gradient. See `Attention`."""
        write_kv(key, value, self.kv_pages, layer, self.slot_mapping)
        return paged_attention(
            query, self.kv_pages, layer, self.page_table, self.kv_lens, self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q, max_kv_len=self.max_kv_len, scale=scale, window=window,
            plan=self.plan,
        )
