"""Attention states: what a forward pass attends to, behind one call for every model.

The native decoder hands its merged projections to `attention.from_projections`, so that rotary and
the writing of pages can be one kernel; any other model calls `attention(layer, query, key, value,
scale=..., window=None)` after rotary. N packed tokens, Hq and Hk query and KV heads, C channels per
head, B sequences.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastrl.ops import (
    packed_attention,
    paged_attention,
    prefix_attention,
    qk_norm_rotary,
    rms_norm,
    rotary,
    rotary_write_kv,
    write_kv,
)
from fastrl.ops.paged_attention import SharedPrefixes
from fastrl.packing import PackedBatch
from fastrl.paged_plan import PagedPlan


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

    def from_projections(
        self, layer: int, heads: Tensor, projections: "Projections", *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Attend, after the norms and the rotation of queries and keys.

        Args:
            heads: [N, Hq + 2 Hk, C]: queries, keys, values, as projected.
            projections: What they go through.
        Returns:
            [N, Hq, C], dtype of heads.
        """


@dataclass(frozen=True, slots=True)
class Projections:
    """What the merged projections of a layer are, and what they go through before attention."""

    num_kv_heads: int
    """Hk."""
    cos_sin: tuple[Tensor, Tensor] | None = None
    """[N, 1, R/2] each, of the tokens' angles; None: nothing turns."""
    norm_weights: tuple[Tensor, Tensor] | None = None
    """[C] each, of the norms of queries and of keys; None: there are none."""
    epsilon: float = 0.0
    """Of the norms."""


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Training and scoring: every token sees the tokens before it in its own sequence.

    A response that stands apart from its prompt, which others share, sees the prompt too.
    """

    cu_seqlens: Tensor
    """[B+1] int64, where each segment begins; the last entry is N."""
    max_seqlen: int
    """Tokens of the longest sequence."""
    prefixes: Tensor | None = None
    """[B] int64, the segment that each one continues, -1: none. None: all are whole sequences."""
    num_keys: int = 0
    """Tokens of all segments, what they continue included; read where there are prefixes."""

    @classmethod
    def of(cls, batch: PackedBatch) -> "PackedAttention":
        """What the tokens of a pack see."""
        return cls(batch.cu_seqlens, batch.max_seqlen, batch.prefixes, batch.num_keys)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; differentiable. See `Attention`."""
        if self.prefixes is not None:
            return prefix_attention(
                query, key, value, self.cu_seqlens, self.prefixes, max_seqlen=self.max_seqlen,
                num_keys=self.num_keys, scale=scale, window=window)
        return packed_attention(query, key, value, self.cu_seqlens, max_seqlen=self.max_seqlen,
                                scale=scale, window=window)

    def from_projections(
        self, layer: int, heads: Tensor, projections: Projections, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; differentiable. See `Attention`."""
        num_kv_heads, epsilon = projections.num_kv_heads, projections.epsilon
        query, key, value = torch.split(
            heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        weights, cos_sin = projections.norm_weights, projections.cos_sin
        if weights is not None and cos_sin is not None:
            query, key = qk_norm_rotary(query, key, *weights, *cos_sin, epsilon=epsilon)
        elif cos_sin is not None:
            query, key = rotary(query, key, *cos_sin)
        elif weights is not None:
            query, key = (rms_norm(x, weight, epsilon=epsilon)
                          for x, weight in zip((query, key), weights, strict=True))
        return self(layer, query, key, value, scale=scale, window=window)


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
    prefixes: SharedPrefixes | None = None
    """What sequences of a decode step share, where reading it once pays."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; no gradient. See `Attention`."""
        write_kv(key, value, self.kv_pages, layer, self.slot_mapping, plan=self.plan)
        return self._attend(layer, query, scale, window)

    def from_projections(
        self, layer: int, heads: Tensor, projections: Projections, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """[N, Hq, C]; no gradient. See `Attention`."""
        cos, sin = projections.cos_sin or (None, None)
        q_weight, k_weight = projections.norm_weights or (None, None)
        query = rotary_write_kv(
            heads, self.kv_pages, layer, self.slot_mapping, cos=cos, sin=sin, q_weight=q_weight,
            k_weight=k_weight, epsilon=projections.epsilon, plan=self.plan)
        return self._attend(layer, query, scale, window)

    def _attend(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        """[N, Hq, C] from what lies in the pages."""
        return paged_attention(
            query, self.kv_pages, layer, self.page_table, self.kv_lens, self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q, max_kv_len=self.max_kv_len, scale=scale, window=window,
            prefixes=self.prefixes, plan=self.plan,
        )
