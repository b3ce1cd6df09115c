"""Attention on every path that a sequence can take: which of them give other bits than a pack?

A path is a whole sequence in a pack, its prompt in pages, its last token as a decode step, and both
with a prompt that others share: encoded once in a pack, read once for a decode step.
C channels per head, S tokens of a sequence, P of a shared prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.models import DecoderConfig
from fastrl.ops import packed_attention, paged_attention, prefix_attention, write_kv
from fastrl.ops.paged_attention import SharedPrefixes
from fastrl.paged_plan import PagedPlan

LENGTHS = (1, 17, 33, 100, 250)
SHARED = ((16, (1, 9)), (70, (30, 1, 7)), (160, (45, 80)))
"""Tokens of a prompt and of the responses that share it."""
PAGE_SIZE = 16
Heads = tuple[Tensor, Tensor, Tensor]
"""query [S, Hq, C]; key, value [S, Hk, C]."""


class AttentionPaths:
    """The heads, window and scale of a decoder's first layer, on random numbers.

    Args:
        config: Of the decoder.
        like: Whose dtype and device the numbers have.
        generator: Of the numbers, on that device.
    """

    def __init__(self, config: DecoderConfig, like: Tensor, generator: torch.Generator) -> None:
        self._num_heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._channels, self._like, self._generator = config.head_dim, like, generator
        self._window = None if config.windows is None else config.windows[0]
        self._scale = config.head_dim ** -0.5

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self._num_heads[0]} heads, {self._num_heads[1]} KV heads of {self._channels}"

    def different_in_pages(self) -> list[str]:
        """Sequences alone that have other bits in pages than packed, as "prompt of 33"."""
        different = []
        for length in LENGTHS:
            heads = self._heads(length)
            packed = self._packed(heads)
            for path, count in (("prompt", length), ("decode step", 1)):
                paged = self._paged([heads], count)
                if not torch.equal(paged, packed[-count:]):
                    different.append(f"{path} of {length}")
        return different

    def different_when_shared(self) -> list[str]:
        """Sequences whose prompt others share, that have other bits than packed alone."""
        different = []
        for prompt_len, response_lens in SHARED:
            prompt = self._heads(prompt_len)
            responses = [self._heads(length) for length in response_lens]
            whole: list[Heads] = [
                (torch.cat([prompt[0], q]), torch.cat([prompt[1], k]), torch.cat([prompt[2], v]))
                for q, k, v in responses]
            alone = [self._packed(heads) for heads in whole]
            shared = self._with_prefix(prompt, responses)
            expected = torch.cat([alone[0][:prompt_len], *(out[prompt_len:] for out in alone)])
            name = f"{len(responses)} after {prompt_len}"
            if not torch.equal(shared, expected):
                different.append(f"pack of {name}")
            steps = self._paged(whole, 1, prompt_len // PAGE_SIZE)
            if not torch.equal(steps, torch.cat([out[-1:] for out in alone])):
                different.append(f"decode step of {name}")
        return different

    def _heads(self, length: int) -> Heads:
        query, key, value = (
            (torch.rand(length, count, self._channels, generator=self._generator,
                        device=self._like.device) - 0.5).to(self._like.dtype)
            for count in self._num_heads)
        return query, key, value

    def _packed(self, heads: Heads) -> Tensor:
        """[S, Hq, C] of one sequence."""
        length = len(heads[0])
        return packed_attention(*heads, self._bounds([length]), max_seqlen=length,
                                scale=self._scale, window=self._window)

    def _with_prefix(self, prompt: Heads, responses: Sequence[Heads]) -> Tensor:
        """[P and all responses, Hq, C], the prompt once."""
        lengths = [len(query) for query, _, _ in responses]
        prompt_len = len(prompt[0])
        query, key, value = (torch.cat(parts) for parts in zip(prompt, *responses, strict=True))
        prefixes = torch.tensor([-1, *(0 for _ in lengths)], device=self._like.device)
        return prefix_attention(
            query, key, value, self._bounds([prompt_len, *lengths]), prefixes,
            max_seqlen=prompt_len + max(lengths),
            num_keys=prompt_len + sum(prompt_len + length for length in lengths),
            scale=self._scale, window=self._window)

    def _paged(self, sequences: Sequence[Heads], count: int, num_shared: int = 0) -> Tensor:
        """[B * count, Hq, C] of the last `count` tokens of each, all keys and values in pages.

        Args:
            num_shared: Pages at the beginning that all sequences read as one.
        """
        device = self._like.device
        lengths = [len(query) for query, _, _ in sequences]
        num_pages = [-(-length // PAGE_SIZE) for length in lengths]
        table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int64, device=device)
        pages = self._like.new_zeros(sum(num_pages), 1, 2, PAGE_SIZE, self._num_heads[1],
                                     self._channels)
        first = 0
        for row, (_, key, value) in enumerate(sequences):
            table[row, : num_pages[row]] = torch.arange(
                first, first + num_pages[row], device=device)
            slots = first * PAGE_SIZE + torch.arange(lengths[row], device=device)
            write_kv(key, value, pages, 0, slots)
            first += num_pages[row]
        table[:, :num_shared] = table[0, :num_shared].clone()
        prefixes = None
        if num_shared:
            prefixes = SharedPrefixes(
                torch.tensor([[0, len(lengths)]], device=device),
                torch.full((len(lengths),), num_shared * PAGE_SIZE, device=device))
        return paged_attention(
            torch.cat([query[-count:] for query, _, _ in sequences]), pages, 0, table,
            torch.tensor(lengths, device=device), self._bounds([count] * len(lengths)),
            max_seqlen_q=count, max_kv_len=max(lengths), scale=self._scale, window=self._window,
            prefixes=prefixes, plan=PagedPlan(is_exact=True))

    def _bounds(self, lengths: Sequence[int]) -> Tensor:
        """[B+1] int64, where each of some sequences begins."""
        return torch.tensor([0, *lengths], device=self._like.device).cumsum(0)
