"""What the layers of one pass over the pages of a KV cache share.

Shape letters as in paged_attention; b sequences of a group, q query tokens of each, n rows.
"""

from dataclasses import dataclass, field

from torch import Tensor


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
    layers: list[Tensor] = field(default_factory=list)
    """What is read in place: [b, 2, S, Hk, C] of every layer, keys and values."""
    padded: list[Tensor] = field(default_factory=list)
    """One tensor [b, Hk, num_rows, C], zeros past the rows that a layer's query fills."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the keys and values of a pass go, in torch."""

    rows: Tensor | None
    """[n] int64, rows that have a slot; None: all have."""
    pages: Tensor
    """[n] int64."""
    offsets: Tensor
    """[n] int64, slots within the pages."""

    @classmethod
    def of(cls, slot_mapping: Tensor, page_size: int) -> "Places":
        """The places of slots [N] int64, of which -1 is none."""
        rows = None
        if (slot_mapping < 0).any():
            rows = (slot_mapping >= 0).nonzero().squeeze(-1)
            slot_mapping = slot_mapping[rows]
        return cls(rows, slot_mapping // page_size, slot_mapping % page_size)


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
    is_settled: bool = False
    """The first layer took the torch path on a CPU, and nothing looks at values or keeps gradients:
    the others check and choose nothing."""
    places: Places | None = None
    """Of the torch path of write_kv on a CPU."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Of flash_attn: lengths and pages as it takes them."""
