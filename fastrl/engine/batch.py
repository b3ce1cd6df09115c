"""The decode batch: one row of every tensor per running sequence, and dummy rows after them.

Shape letters: R rows (running sequences, then dummies), K steps of a round, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """State of the running sequences, on the model's device. Tensors change in place each step.

    A row whose response has ended is dead: it neither writes nor reads the cache, and its numbers
    stay as they are until it leaves. A dummy row is dead from the start.
    """

    size: int
    """Real rows; dummies follow."""
    has_groups: bool
    """Some rows share pages that are to be read once."""
    index: Tensor
    """[R] int64, row of the results."""
    alive: Tensor
    """[R] int64, 1 until the response ends."""
    stopped: Tensor
    """[R] int64, 1 once a stop token has ended it."""
    seeds: Tensor
    """[R] int64, keys of the random numbers."""
    token_ids: Tensor
    """[R] int64, the newest token, not in the cache yet."""
    kv_lens: Tensor
    """[R] int64, tokens in the cache."""
    num_generated: Tensor
    """[R] int64, response tokens, the newest included."""
    max_tokens: Tensor
    """[R] int64, longest response."""
    num_recorded: Tensor
    """[R] int64, tokens that are replayed, not drawn."""
    page_table: Tensor
    """[R, pages] int64."""
    seen: Tensor
    """[R, V] bool, tokens of prompt and response; [R, 0] where no penalty needs it."""
    shared_lens: Tensor
    """[R] int64, tokens in the pages that a row shares with its group, if `has_groups`."""
    groups: Tensor
    """[R, 2] int64, first row and rows of each group, if `has_groups`; zeros follow."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def select(self, rows: Sequence[int]) -> "DecodeBatch":
        """The real rows `rows`, in that order, without dummies and groups."""
        index = upload(rows, self.index.device)
        return DecodeBatch(len(rows), False, **{
            name: tensor.index_select(0, index) for name, tensor in self.tensors().items()})

    def join(self, other: "DecodeBatch") -> "DecodeBatch":
        """The real rows of both, without dummies and groups."""
        more = other.tensors()
        return DecodeBatch(self.size + other.size, False, **{
            name: torch.cat([tensor[: self.size], more[name][: other.size]])
            for name, tensor in self.tensors().items()})

    def pad(self, num_rows: int, trash: int) -> "DecodeBatch":
        """`num_rows` rows: dummies follow, and their results go to row `trash`. Without groups."""
        padded = {name: pad_rows(tensor, num_rows) for name, tensor in self.tensors().items()}
        padded["index"][self.size :] = trash
        return DecodeBatch(self.size, False, **padded)

    def with_groups(self, groups: Sequence[tuple[int, int, int]]) -> "DecodeBatch":
        """The same rows, with (first row, rows, tokens that they share) of every group."""
        if not groups:
            return replace(self, has_groups=False)
        num_rows, device = len(self.index), self.index.device
        shared_lens, table = [0] * num_rows, [(0, 0)] * num_rows
        for number, (first, count, tokens) in enumerate(groups):
            table[number] = first, count
            shared_lens[first : first + count] = [tokens] * count
        return replace(self, has_groups=True, shared_lens=upload(shared_lens, device),
                       groups=upload(table, device))


@dataclass(frozen=True, slots=True)
class RecentTokens:
    """What each row has drawn since the host last recorded results. Changes in place."""

    token_ids: Tensor
    """[R, K] int64; before a step, the token that is replayed in it, if any."""
    logprobs: Tensor
    """[R, K] float32."""
    entropy: Tensor
    """[R, K] float32."""
    column: Tensor
    """[1] int64, the column that the next step writes."""

    @classmethod
    def empty(cls, num_rows: int, num_steps: int, device: torch.device) -> "RecentTokens":
        """Zeros for `num_steps` steps."""
        token_ids = torch.zeros(num_rows, num_steps, dtype=torch.int64, device=device)
        logprobs = torch.zeros_like(token_ids, dtype=torch.float32)
        return cls(token_ids, logprobs, torch.zeros_like(logprobs),
                   torch.zeros(1, dtype=torch.int64, device=device))


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """`tensor` with rows of zeros up to `num_rows`."""
    missing = num_rows - tensor.shape[0]
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor


def upload(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers of the host as int64 on the device."""
    return send(torch.tensor(values, dtype=torch.int64), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; a GPU gets it in its own time, nobody waits."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
