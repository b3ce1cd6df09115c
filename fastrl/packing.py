"""Packed batches: sequences end to end, and the one shift between hidden states and targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.errors import ShapeError


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end, as every model of fastrl reads them."""

    token_ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64, counted from 0 in each sequence."""
    cu_seqlens: Tensor
    """[B+1] int64, where each sequence begins; the last entry is N."""
    max_seqlen: int
    """Tokens of the longest sequence."""


def pack_sequences(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lay token lists end to end.

    Args:
        sequences: B token lists, none empty.
        device: Where the tensors live.
    Raises:
        ShapeError: when there is no sequence, or an empty one.
    """
    lengths = [len(s) for s in sequences]
    if not lengths or min(lengths) == 0:
        raise ShapeError(
            f"pack_sequences: expected at least one sequence and no empty one, got lengths "
            f"{lengths[:8]}; drop empty rows before packing"
        )
    flat = [token for sequence in sequences for token in sequence]
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return PackedBatch(
        token_ids=torch.tensor(flat, dtype=torch.int64, device=device),
        positions=positions.to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max(lengths),
    )


def predict_rows(target_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the hidden states that predict the tokens marked in a packed batch.

    The hidden state of packed position i predicts the token at position i + 1. This is the only
    place of fastrl that shifts.

    Args:
        target_mask: [N] bool, True at tokens to be predicted; never True at the first token of a
            sequence (nothing predicts it).
    Returns:
        rows, targets: [M] int64 each, `targets = rows + 1`, in packed order. `hidden[rows]`
        predicts `token_ids[targets]`.
    """
    targets = target_mask.nonzero().squeeze(-1)
    return targets - 1, targets


def response_target_mask(cu_seqlens: Tensor, prompt_lens: Tensor) -> Tensor:
    """[N] bool, True at response tokens of packed prompt + response sequences.

    Args:
        cu_seqlens: [B+1] int64.
        prompt_lens: [B] int64, at least 1 each.
    """
    seqlens = cu_seqlens[1:] - cu_seqlens[:-1]
    total = int(cu_seqlens[-1])
    rows = torch.repeat_interleave(torch.arange(len(seqlens), device=seqlens.device), seqlens)
    offsets = torch.arange(total, device=seqlens.device) - cu_seqlens[:-1][rows]
    return offsets >= prompt_lens[rows]


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive groups of indices whose lengths sum to at most `max_tokens`.

    A single sequence longer than the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    total = 0
    for index, length in enumerate(lengths):
        if not groups or total + length > max_tokens:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += length
    return groups
