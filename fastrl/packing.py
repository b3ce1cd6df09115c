"""Packed batches: sequences end to end, prompts that several responses share held once, and the one
shift between hidden states and targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from fastrl.errors import ShapeError


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences end to end, as every model of fastrl reads them.

    A sequence is one segment; neighbours that share their prompt are a segment for the prompt and
    one for each response. Without sharing segments are sequences.
    """

    token_ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64, counted from 0 in each sequence."""
    cu_seqlens: Tensor
    """[segments + 1] int64, where each segment begins; the last entry is N."""
    max_seqlen: int
    """Tokens of the longest sequence."""
    ends: Tensor
    """[B] int64, row of each sequence's last token."""
    previous: Tensor
    """[N] int64, row of the token before each one; no meaning at the first of a sequence."""
    is_response: Tensor
    """[N] bool, True behind the prompts; all False where no prompts were told."""
    prefixes: Tensor | None = None
    """[segments] int64, the segment that each one continues, -1: none. None: nothing is shared."""
    num_keys: int = 0
    """Tokens of all segments, what they continue included; 0 where nothing is shared."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Tokens that lie together; `begin` is the position of the first."""

    token_ids: Sequence[int]
    num_prompt_tokens: int
    begin: int = 0
    prefix: int = -1


def pack_sequences(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", *,
    prompt_lens: Sequence[int] | None = None, share_prefix: bool = False,
) -> PackedBatch:
    """Lay token lists end to end.

    Args:
        sequences: B token lists, none empty.
        device: Where the tensors live.
        prompt_lens: Tokens of the prompt of each sequence, at least 1; the others are its response.
            None: no one asks for responses.
        share_prefix: Neighbours with equal prompts hold the prompt once.
    Raises:
        ShapeError: when there is no sequence, or an empty one, or a prompt that is empty or longer
            than its sequence.
    """
    lengths = [len(s) for s in sequences]
    if not lengths or min(lengths) == 0:
        raise ShapeError(
            f"pack_sequences: expected at least one sequence and no empty one, got lengths "
            f"{lengths[:8]}; drop empty rows before packing"
        )
    if prompt_lens is None:
        segments, last = [_Segment(s, len(s)) for s in sequences], list(range(len(sequences)))
    else:
        segments, last = _segments(sequences, prompt_lens, share_prefix)
    begins = [0, *accumulate(len(segment.token_ids) for segment in segments)]
    previous = torch.arange(-1, begins[-1] - 1)
    positions, is_response = [], []
    for segment, begin in zip(segments, begins[:-1], strict=True):
        offsets = torch.arange(len(segment.token_ids))
        positions.append(segment.begin + offsets)
        is_response.append(offsets >= segment.num_prompt_tokens)
        if segment.prefix >= 0 and segment.token_ids:
            previous[begin] = begins[segment.prefix + 1] - 1
    # A response without tokens ends where its prompt does.
    ends = [begins[(b if segments[b].token_ids else segments[b].prefix) + 1] - 1 for b in last]
    is_shared = len(segments) > len(sequences)
    return PackedBatch(
        token_ids=torch.tensor([t for segment in segments for t in segment.token_ids],
                               dtype=torch.int64, device=device),
        positions=torch.cat(positions).to(device),
        cu_seqlens=torch.tensor(begins, dtype=torch.int64, device=device),
        max_seqlen=max(lengths),
        ends=torch.tensor(ends, dtype=torch.int64, device=device),
        previous=previous.to(device),
        is_response=torch.cat(is_response).to(device),
        prefixes=torch.tensor([segment.prefix for segment in segments], dtype=torch.int64,
                              device=device) if is_shared else None,
        num_keys=sum(segment.begin + len(segment.token_ids) for segment in segments)
        if is_shared else 0,
    )


def _segments(
    sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int], share_prefix: bool
) -> tuple[list[_Segment], list[int]]:
    """The segments of a pack, and the one that each sequence ends in."""
    for index, (sequence, length) in enumerate(zip(sequences, prompt_lens, strict=True)):
        if not 1 <= length <= len(sequence):
            raise ShapeError(f"pack_sequences: expected a prompt of 1 to {len(sequence)} tokens in "
                             f"sequence {index}, got {length}; check prompt_lens")
    segments, last = list[_Segment](), list[int]()

    def prompt(index: int) -> tuple[int, ...]:
        return tuple(sequences[index][:prompt_lens[index]])

    indices = range(len(sequences))
    families = groupby(indices, prompt) if share_prefix else ((None, [i]) for i in indices)
    for _, family in families:
        first, *others = family
        begin = prompt_lens[first]
        if not others:
            segments.append(_Segment(sequences[first], begin))
            last.append(len(segments) - 1)
            continue
        prefix = len(segments)
        segments.append(_Segment(sequences[first][:begin], begin))
        segments += [_Segment(sequences[i][begin:], 0, begin, prefix) for i in (first, *others)]
        last += range(prefix + 1, len(segments))
    return segments, last


def predict_rows(target_mask: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Rows of the hidden states that predict the tokens marked in a packed batch.

    The hidden state of a token predicts the one after it. This is the only place of fastrl that
    shifts.

    Args:
        target_mask: [N] bool, True at tokens to be predicted; never True at the first token of a
            sequence (nothing predicts it).
        batch: The pack that the mask is of.
    Returns:
        rows, targets: [M] int64 each, in packed order. `hidden[rows]` predicts
        `token_ids[targets]`. The last row of a shared prompt predicts the first token of every
        response to it.
    """
    targets = target_mask.nonzero().squeeze(-1)
    return batch.previous[targets], targets


def split_by_tokens(
    lengths: Sequence[int], max_tokens: int, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Groups of indices whose sequences take at most `max_tokens` together.

    A single sequence longer than the budget gets a group of its own.

    Args:
        lengths: Tokens of each sequence, its prompt included.
        max_tokens: Token budget.
        prompts: Prompt of each sequence. Sequences with equal prompts then stand beside each other,
            take the prompt once in a group, and share a group where they fit into one. None: no
            prompt is shared, and the indices stay in order.
    """
    families: dict[object, list[int]] = {}
    for index in range(len(lengths)):
        families.setdefault(index if prompts is None else tuple(prompts[index]), []).append(index)
    groups: list[list[int]] = []
    full = total = max_tokens + 1
    for family in families.values():
        shared = 0 if prompts is None else len(prompts[family[0]])
        if total + shared + sum(lengths[index] - shared for index in family) > max_tokens:
            total = full
        is_held = False  # the prompt, by the last group
        for index in family:
            new = lengths[index] - shared * is_held
            if total + new > max_tokens:
                groups.append([])
                total, new = 0, lengths[index]
            groups[-1].append(index)
            total += new
            is_held = True
    return groups
